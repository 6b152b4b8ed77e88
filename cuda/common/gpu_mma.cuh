// Tensor cores for kernels: thin wrappers of mma.sync, ldmatrix and cp.async, for compute capability 8.0 and later.
//
// A warp multiplies together. Each lane holds a few elements of each matrix, its fragment; with g = lane / 4 and
// t = lane % 4 (the layouts of the PTX manual):
//
//   16-bit, m16n8k16: a register holds two neighbours, the lower one in the lower half.
//     a [16, 16]  a[0]: row g,  columns 2t, 2t+1     a[1]: row g+8, columns 2t, 2t+1
//                 a[2]: row g,  columns 2t+8, 2t+9   a[3]: row g+8, columns 2t+8, 2t+9
//     b [16, 8]   b[0]: rows 2t, 2t+1, column g      b[1]: rows 2t+8, 2t+9, column g
//   tf32, m16n8k8:
//     a [16, 8]   a[0]: row g, column t              a[1]: row g+8, column t
//                 a[2]: row g, column t+4            a[3]: row g+8, column t+4
//     b [8, 8]    b[0]: row t, column g              b[1]: row t+4, column g
//   c [16, 8]     c[0], c[1]: row g, columns 2t, 2t+1   c[2], c[3]: row g+8, columns 2t, 2t+1
//
// All lanes of the warp must come to an mma or ldmatrix together. What is compiled for an older chip traps: a library
// holds its other kernels for that one too.

#pragma once

#include "gpu.cuh"

#if defined(RWKV_EMULATED)
#include "../emulation/emulation_mma.h"
#else

namespace rwkv {

// Two floats as one register of a fragment, rounded to nearest even.
__device__ __forceinline__ unsigned pack_bfloat16(float lower, float upper) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(lower, upper);
  return *reinterpret_cast<const unsigned*>(&pair);
}
__device__ __forceinline__ unsigned pack_float16(float lower, float upper) {
  const __half2 pair = __floats2half2_rn(lower, upper);
  return *reinterpret_cast<const unsigned*>(&pair);
}

// A float with 10 bits of mantissa, rounded to nearest, ties away from zero.
__device__ __forceinline__ unsigned to_tf32(float x) {
  unsigned bits = 0;
#if __CUDA_ARCH__ >= 800
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
#else
  __trap();
#endif
  return bits;
}

// c += a b.
__device__ __forceinline__ void mma_bfloat16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();
#endif
}
__device__ __forceinline__ void mma_float16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();
#endif
}
__device__ __forceinline__ void mma_tf32(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  __trap();
#endif
}

// An address in shared memory as PTX wants it.
__device__ __forceinline__ unsigned shared_address(const void* shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(shared));
}

// Reads kCount (1, 2 or 4) matrices of 8 rows of 8 16-bit elements from shared memory. Lane 8 i + j says where row j of
// matrix i starts, at a multiple of 16 bytes; lanes from 8 kCount on must give any such address. Matrix i goes to
// registers[i]: row g, columns 2t and 2t+1.
template <int kCount>
__device__ __forceinline__ void ldmatrix(unsigned (&registers)[kCount], const void* row) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4, "ldmatrix reads 1, 2 or 4 matrices");
#if __CUDA_ARCH__ >= 800
  const unsigned from = shared_address(row);
  if constexpr (kCount == 1)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(registers[0]) : "r"(from) : "memory");
  else if constexpr (kCount == 2)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(registers[0]), "=r"(registers[1])
                 : "r"(from)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(from)
                 : "memory");
#else
  __trap();
#endif
}

// The same, each matrix transposed: rows 2t and 2t+1, column g.
template <int kCount>
__device__ __forceinline__ void ldmatrix_transposed(unsigned (&registers)[kCount], const void* row) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4, "ldmatrix reads 1, 2 or 4 matrices");
#if __CUDA_ARCH__ >= 800
  const unsigned from = shared_address(row);
  if constexpr (kCount == 1)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(registers[0])
                 : "r"(from)
                 : "memory");
  else if constexpr (kCount == 2)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(registers[0]), "=r"(registers[1])
                 : "r"(from)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(from)
                 : "memory");
#else
  __trap();
#endif
}

// Starts a copy of kBytes (4, 8 or 16) from global to shared memory, both at multiples of kBytes; zeros where not
// `wanted`, and then `global` is not read and may lie outside. This thread has the data after cp_async_commit and
// cp_async_wait, the others after a barrier that follows.
template <int kBytes>
__device__ __forceinline__ void cp_async(void* shared, const void* global, bool wanted = true) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
#if __CUDA_ARCH__ >= 800
  const unsigned to = shared_address(shared);
  const int read = wanted ? kBytes : 0;
  if constexpr (kBytes == 16)  // past the first-level cache
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(read) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global), "n"(kBytes), "r"(read)
                 : "memory");
#else
  __trap();
#endif
}

// Makes a group of the copies that this thread has started since the last one.
__device__ __forceinline__ void cp_async_commit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until all groups of this thread but the last kPending have arrived.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

}  // namespace rwkv

#endif
