// Small kernels that use one thing each of cuda/common/gpu.cuh and gpu_mma.cuh; tests/ops/test_emulation.py runs them.

#include "gpu_mma.cuh"

namespace rwkv {

constexpr unsigned kAllLanes = 0xffffffff;

__device__ int64_t number_of_thread() {
  const int64_t block = (static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int64_t in_block = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  return block * (blockDim.x * blockDim.y * blockDim.z) + in_block;
}

// out: [threads, 6].
__global__ void write_indices(int* out) {
  const unsigned indices[] = {blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z};
  for (int i = 0; i < 6; ++i) out[number_of_thread() * 6 + i] = static_cast<int>(indices[i]);
}

__global__ void convert(const void* from, int from_dtype, void* to, int to_dtype, int64_t n) {
  const int64_t i = number_of_thread();
  if (i < n) store(to, i, load(from, i, from_dtype), to_dtype);
}

// Sums of the rows of [blocks, n]: shuffles in a warp, shared memory between warps.
__global__ void __launch_bounds__(256) sum_rows(const float* x, float* sums, int n) {
  float* const of_warps = shared_memory();
  const int thread = static_cast<int>(threadIdx.x), n_threads = static_cast<int>(blockDim.x);
  float sum = 0.f;
  for (int i = thread; i < n; i += n_threads) sum += __ldg(x + static_cast<int64_t>(blockIdx.x) * n + i);
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
  if (thread % 32 == 0) of_warps[thread / 32] = sum;
  __syncthreads();
  if (thread == 0) {
    for (int warp = 1; warp < n_threads / 32; ++warp) sum += of_warps[warp];
    sums[blockIdx.x] = sum;
  }
}

// How often a value goes round a ring of threads: barriers in a loop, among them threads that have other work.
__global__ void rotate(int* ring, int n_steps) {
  int* const shared = reinterpret_cast<int*>(shared_memory());
  const int thread = static_cast<int>(threadIdx.x), n_threads = static_cast<int>(blockDim.x);
  int value = ring[thread];
  for (int step = 0; step < n_steps; ++step) {
    if (thread % 32 < 16) value += __shfl_xor_sync(0x0000ffffu, 0, 1);  // half a warp meets alone
    shared[thread] = value;
    __syncthreads();
    value = shared[(thread + 1) % n_threads];
    __syncthreads();
  }
  ring[thread] = value;
}

// out: [4, 32]: xor, up, down, from lane `by`.
__global__ void shuffle(const float* x, float* out, int by, int width) {
  const int lane = static_cast<int>(threadIdx.x);
  out[lane] = __shfl_xor_sync(kAllLanes, x[lane], by, width);
  out[32 + lane] = __shfl_up_sync(kAllLanes, x[lane], static_cast<unsigned>(by), width);
  out[64 + lane] = __shfl_down_sync(kAllLanes, x[lane], static_cast<unsigned>(by), width);
  out[96 + lane] = __shfl_sync(kAllLanes, x[lane], by, width);
}

// -------------------------------------------------------------------------------------------- tensor cores

// One product from fragments as they lie in memory: a [32, 4], b [32, 2], c [32, 4].
__global__ void multiply_fragments(int dtype, const unsigned* a, const unsigned* b, float* c) {
  const int lane = static_cast<int>(threadIdx.x);
  unsigned own_a[4], own_b[2];
  float own_c[4];
  for (int i = 0; i < 4; ++i) own_a[i] = a[lane * 4 + i], own_c[i] = c[lane * 4 + i];
  for (int i = 0; i < 2; ++i) own_b[i] = b[lane * 2 + i];
  if (dtype == kBFloat16)
    mma_bfloat16(own_c, own_a, own_b);
  else if (dtype == kFloat16)
    mma_float16(own_c, own_a, own_b);
  else
    mma_tf32(own_c, own_a, own_b);
  for (int i = 0; i < 4; ++i) c[lane * 4 + i] = own_c[i];
}

__global__ void round_to_tf32(const float* x, unsigned* out) {
  out[number_of_thread()] = to_tf32(x[number_of_thread()]);
}

// out: [n, 2], e^x and 1 / x.
__global__ void roughly(const float* x, float* out) {
  const int64_t i = number_of_thread();
  out[i * 2] = rough_exp(x[i]);
  out[i * 2 + 1] = rough_inverse(x[i]);
}

// out: [n, 2], pairs as bfloat16 and as float16.
__global__ void pack(const float* pairs, unsigned* out) {
  const int64_t i = number_of_thread();
  out[i * 2] = pack_bfloat16(pairs[i * 2], pairs[i * 2 + 1]);
  out[i * 2 + 1] = pack_float16(pairs[i * 2], pairs[i * 2 + 1]);
}

// kCount matrices out of x, [32, 8] 16-bit; registers: [32, kCount].
template <int kCount, bool kTransposed>
__global__ void read_matrices(const uint16_t* x, unsigned* registers) {
  uint16_t* const shared = reinterpret_cast<uint16_t*>(shared_memory());
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = 0; i < 8; ++i) shared[lane * 8 + i] = x[lane * 8 + i];
  __syncthreads();
  unsigned own[kCount];
  if constexpr (kTransposed)
    ldmatrix_transposed(own, shared + lane * 8);
  else
    ldmatrix(own, shared + lane * 8);
  for (int i = 0; i < kCount; ++i) registers[lane * kCount + i] = own[i];
}

// Tile [16 x 32] of c = x y for x [m, k], y [k, n], bfloat16: a warp for every 8 columns, k in slices of 16 that come
// by cp.async while the ones before are multiplied.
constexpr int kSliceX = 16 * 24, kSliceY = 16 * 40;  // rows padded against bank conflicts, still multiples of 16 bytes

__device__ void fetch_slice(const uint16_t* x, const uint16_t* y, int slice, int k, int n, uint16_t* shared) {
  const int row = static_cast<int>(threadIdx.x) % 64 / 4, quarter = static_cast<int>(threadIdx.x) % 4;
  if (threadIdx.x < 64)
    cp_async<8>(shared + row * 24 + quarter * 4, x + (blockIdx.y * 16 + row) * k + slice * 16 + quarter * 4);
  else
    cp_async<16>(shared + kSliceX + row * 40 + quarter * 8,
                 y + (slice * 16 + row) * n + blockIdx.x * 32 + quarter * 8);
}

__global__ void __launch_bounds__(128) multiply(const uint16_t* x, const uint16_t* y, float* c, int k, int n) {
  uint16_t* const shared = reinterpret_cast<uint16_t*>(shared_memory());  // 2 slices of both
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32, n_slices = k / 16;
  float sum[4] = {};
  fetch_slice(x, y, 0, k, n, shared);
  cp_async_commit();
  for (int slice = 0; slice < n_slices; ++slice) {
    if (slice + 1 < n_slices) fetch_slice(x, y, slice + 1, k, n, shared + (slice + 1) % 2 * (kSliceX + kSliceY));
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    const uint16_t* const slice_x = shared + slice % 2 * (kSliceX + kSliceY);
    unsigned a[4], b[2];
    ldmatrix(a, slice_x + lane % 16 * 24 + lane / 16 * 8);
    ldmatrix_transposed(b, slice_x + kSliceX + lane % 16 * 40 + warp * 8);
    mma_bfloat16(sum, a, b);
    __syncthreads();
  }
  for (int i = 0; i < 4; ++i)
    c[(blockIdx.y * 16 + lane / 4 + i / 2 * 8) * n + blockIdx.x * 32 + warp * 8 + lane % 4 * 2 + i % 2] = sum[i];
}

// Each thread copies kBytes of x, or zeros where it is odd.
template <int kBytes>
__global__ void copy(const char* x, char* out) {
  char* const shared = reinterpret_cast<char*>(shared_memory());
  const int at = static_cast<int>(threadIdx.x) * kBytes;
  cp_async<kBytes>(shared + at, x + at, threadIdx.x % 2 == 0);
  cp_async_commit();
  cp_async_wait<0>();
  for (int i = 0; i < kBytes; ++i) out[at + i] = shared[at + i];
}

}  // namespace rwkv

using namespace rwkv;

RWKV_EXPORT const char* explain(int code) { return error_text(code); }
RWKV_EXPORT int run_write_indices(int* out, int gx, int gy, int gz, int bx, int by, int bz) {
  return launch(write_indices, dim3(gx, gy, gz), dim3(bx, by, bz), 0, nullptr, out);
}
RWKV_EXPORT int run_convert(const void* from, int from_dtype, void* to, int to_dtype, int n) {
  return launch(convert, (n + 255) / 256, 256, 0, nullptr, from, from_dtype, to, to_dtype, n);
}
RWKV_EXPORT int run_sum_rows(const float* x, float* sums, int rows, int n, int threads, int shared_bytes) {
  return launch(sum_rows, rows, threads, shared_bytes, nullptr, x, sums, n);
}
RWKV_EXPORT int run_rotate(int* ring, int threads, int n_steps) {
  return launch(rotate, 1, threads, threads * sizeof(int), nullptr, ring, n_steps);
}
RWKV_EXPORT int run_shuffle(const float* x, float* out, int by, int width) {
  return launch(shuffle, 1, 32, 0, nullptr, x, out, by, width);
}
RWKV_EXPORT int run_multiply_fragments(int dtype, const unsigned* a, const unsigned* b, float* c) {
  return launch(multiply_fragments, 1, 32, 0, nullptr, dtype, a, b, c);
}
RWKV_EXPORT int run_round_to_tf32(const float* x, unsigned* out, int n) {
  return launch(round_to_tf32, n / 32, 32, 0, nullptr, x, out);
}
RWKV_EXPORT int run_roughly(const float* x, float* out, int n) {
  return launch(roughly, n / 32, 32, 0, nullptr, x, out);
}
RWKV_EXPORT int run_pack(const float* pairs, unsigned* out, int n) {
  return launch(pack, n / 32, 32, 0, nullptr, pairs, out);
}
RWKV_EXPORT int run_read_matrices(const uint16_t* x, unsigned* registers, int count, int transposed) {
  const auto kernel = count == 1   ? transposed ? read_matrices<1, true> : read_matrices<1, false>
                      : count == 2 ? transposed ? read_matrices<2, true> : read_matrices<2, false>
                                   : (transposed ? read_matrices<4, true> : read_matrices<4, false>);
  return launch(kernel, 1, 32, 512, nullptr, x, registers);
}
RWKV_EXPORT int run_multiply(const uint16_t* x, const uint16_t* y, float* c, int m, int k, int n) {
  return launch(multiply, dim3(n / 32, m / 16), 128, 4 * (kSliceX + kSliceY), nullptr, x, y, c, k, n);
}
RWKV_EXPORT int run_copy(const char* x, char* out, int bytes) {
  return launch(bytes == 4 ? copy<4> : bytes == 8 ? copy<8> : copy<16>, 1, 32, 32 * bytes, nullptr, x, out);
}
