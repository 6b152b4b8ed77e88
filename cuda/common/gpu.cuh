// What every kernel (.cu) includes, and all that it includes of the GPU: launches, shared memory, dtypes.
//
// A kernel's source is compiled twice: by nvcc for a GPU, and, with -DRWKV_EMULATED, by a C++ compiler for the tests
// (emulation/README.md). So it uses what stands here, and CUDA's own names as far as emulation/emulation.h knows them:
// no <<<>>> but launch(), no __shared__ but shared_memory().

#pragma once

#include <cstddef>
#include <cstdint>

#if defined(RWKV_EMULATED)
#include "../emulation/emulation.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#define RWKV_EXPORT extern "C" __attribute__((visibility("default")))

namespace rwkv {

// The dtype of a tensor, as Python passes it. A runtime value: the branch is the same for all threads and costs
// little, a template for each dtype would triple the time of a build.
constexpr int kFloat32 = 0;
constexpr int kBFloat16 = 1;
constexpr int kFloat16 = 2;

// No block of an exact kernel may ask for more shared memory: what sm_75, the smallest of the chips that we build for,
// gives a block.
constexpr size_t kMaxSharedBytes = 65536;
// Nor one of a chunked kernel, which needs tensor cores: what every chip from sm_80 on gives a block, the consumer cards
// among them (sm_86, sm_89, sm_120), which have least.
constexpr size_t kMaxSharedBytesChunked = 101376;

#if !defined(RWKV_EMULATED)

namespace internal {
template <typename T>
struct Same {
  using type = T;
};
}  // namespace internal

// Starts kernel(args...) on a stream and returns at once: 0, or the code of what went wrong, for error_text().
template <typename... Parameters>
int launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
           typename internal::Same<Parameters>::type... args) {
  constexpr size_t kAlwaysThere = 48 * 1024;  // more must be asked for
  const void* function = reinterpret_cast<const void*>(kernel);
  cudaError_t error = cudaSuccess;
  if (shared_bytes > kAlwaysThere)
    error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  if (error == cudaSuccess) {
    void* addresses[] = {&args...};
    error = cudaLaunchKernel(function, grid, block, addresses, shared_bytes, static_cast<cudaStream_t>(stream));
  }
  if (error != cudaSuccess) cudaGetLastError();  // it is returned here, so nobody shall find it again later
  return static_cast<int>(error);
}

inline const char* error_text(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

// The shared memory that launch() asked for, from a multiple of 16 bytes; holds anything when a block starts.
__device__ __forceinline__ float* shared_memory() {
  extern __shared__ float4 rwkv_shared_memory[];
  return reinterpret_cast<float*>(rwkv_shared_memory);
}

// A barrier of all warps of a block, each of which may come to it in other code: PTX counts the warps that arrive, whereas
// C++ promises that __syncthreads() holds threads together only where all of them come to the same one.
__device__ __forceinline__ void meet() { asm volatile("bar.sync 0;" ::: "memory"); }

// Bits of a 16-bit float to and from float32, rounding to nearest, ties to even.
__device__ __forceinline__ float bfloat16_to_float(uint16_t bits) {
  return __uint_as_float(static_cast<unsigned>(bits) << 16);
}
__device__ __forceinline__ float float16_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
__device__ __forceinline__ uint16_t float_to_bfloat16(float x) {
  // Not __bfloat16_as_ushort, which CUDA 11 has for sm_80 and later alone.
  return static_cast<__nv_bfloat16_raw>(__float2bfloat16_rn(x)).x;
}
__device__ __forceinline__ uint16_t float_to_float16(float x) { return __half_as_ushort(__float2half_rn(x)); }

// exp(x) for what is rounded to 16 bits next, in two instructions: off by 2^-22 + |x| 2^-24 of itself, 0 where it is below
// 2^-126. And 1 / x, off by one bit, inf where x is below that.
__device__ __forceinline__ float rough_exp(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
  return y;
}
__device__ __forceinline__ float rough_inverse(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

#endif

// Element i of a tensor of the given dtype.
__device__ __forceinline__ float load(const void* tensor, int64_t i, int dtype) {
  if (dtype == kFloat32) return static_cast<const float*>(tensor)[i];
  const uint16_t bits = static_cast<const uint16_t*>(tensor)[i];
  return dtype == kBFloat16 ? bfloat16_to_float(bits) : float16_to_float(bits);
}

__device__ __forceinline__ void store(void* tensor, int64_t i, float x, int dtype) {
  if (dtype == kFloat32)
    static_cast<float*>(tensor)[i] = x;
  else
    static_cast<uint16_t*>(tensor)[i] = dtype == kBFloat16 ? float_to_bfloat16(x) : float_to_float16(x);
}

// exp(w), the decay of a log decay w <= 0. What is rounded off a decay near 1 adds up over many tokens, so there it must
// be right to its last bit; expf() of a GPU may be two off. The series leaves out less than a quarter of that bit.
__device__ __forceinline__ float decay_of(float w) {
  const float near_1 = 1.f + w * (1.f + w * (1.f / 2 + w * (1.f / 6 + w * (1.f / 24))));
  const float further = expf(w);  // a branch would take more registers
  return w > -0.0625f ? near_1 : further;
}

}  // namespace rwkv
