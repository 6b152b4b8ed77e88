// Kernels that are wrong, each in one way; tests/ops/test_emulation.py wants the emulation to say so. Not for a GPU.

#include "gpu_mma.cuh"

namespace rwkv {

__global__ void some_return_before_a_barrier() {
  if (threadIdx.x < 5) return;
  __syncthreads();
}

__global__ void a_barrier_for_one_warp() {
  if (threadIdx.x < 32) __syncthreads();
}

__global__ void lanes_that_do_not_come(float* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_xor_sync(0xffffffff, 1.f, 1);
  __syncthreads();
}

__global__ void different_masks(float* out) {
  out[threadIdx.x] = __shfl_xor_sync(threadIdx.x % 32 < 16 ? 0xffffffff : 0xffff0001, 1.f, 1);
}

__global__ void different_operations(float* out) {
  if (threadIdx.x == 3)
    __syncwarp();
  else
    out[threadIdx.x] = __shfl_xor_sync(0xffffffff, 1.f, 1);
}

__global__ void outside_of_its_own_mask(float* out) {
  out[threadIdx.x] = __shfl_xor_sync(0x0000ffff, 1.f, 1);
}

__global__ void from_a_lane_outside_of_the_mask(float* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(0x0000ffff, 1.f, 16);
}

// Asks for 64 floats.
__global__ void writes_shared_memory_at(int at) { shared_memory()[at] = 1.f; }
__global__ void reads_shared_memory_at(int at, float* out) { out[0] = shared_memory()[at]; }

__global__ void wrong_address(float* nowhere) {
  if (threadIdx.x == 7 && blockIdx.x == 2) *nowhere = 1.f;
}

__device__ int recurse(volatile int* numbers, int depth) {
  volatile int own[256];
  own[depth % 256] = numbers[0];
  return depth == 0 ? own[0] : recurse(own, depth - 1) + own[depth % 256];
}

__global__ void too_deep(int* out, int depth) {
  volatile int zero = 0;
  out[0] = recurse(&zero, depth);
}

// What a neighbour has not written yet.
__global__ void no_barrier(float* out, int distance) {
  float* const shared = shared_memory();
  shared[threadIdx.x] = 1.f;
  out[threadIdx.x] = shared[(static_cast<int>(threadIdx.x) + distance + 64) % 64];
}

// What the block before has left.
__global__ void counts_blocks(int* counter, int* order) {
  order[blockIdx.x] = counter[0]++;
}

__global__ void does_not_wait(const float* x, float* out, int commits) {
  float* const shared = shared_memory();
  cp_async<4>(shared + threadIdx.x, x + threadIdx.x);
  if (commits) cp_async_commit();
  if (commits) cp_async_wait<1>();
  if (!commits) cp_async_wait<0>();
  out[threadIdx.x] = shared[threadIdx.x];
}

__global__ void not_aligned(const float* x) { cp_async<16>(shared_memory(), x + 1); }
__global__ void copies_too_far(const float* x) { cp_async<4>(shared_memory() + threadIdx.x * 2, x); }

}  // namespace rwkv

using namespace rwkv;

RWKV_EXPORT const char* explain(int code) { return error_text(code); }
RWKV_EXPORT int run_some_return_before_a_barrier() { return launch(some_return_before_a_barrier, 3, 64, 0, nullptr); }
RWKV_EXPORT int run_a_barrier_for_one_warp() { return launch(a_barrier_for_one_warp, 1, 64, 0, nullptr); }
RWKV_EXPORT int run_lanes_that_do_not_come(float* out) {
  return launch(lanes_that_do_not_come, 1, 64, 0, nullptr, out);
}
RWKV_EXPORT int run_different_masks(float* out) { return launch(different_masks, 1, 64, 0, nullptr, out); }
RWKV_EXPORT int run_different_operations(float* out) { return launch(different_operations, 1, 64, 0, nullptr, out); }
RWKV_EXPORT int run_outside_of_its_own_mask(float* out) {
  return launch(outside_of_its_own_mask, 1, 64, 0, nullptr, out);
}
RWKV_EXPORT int run_from_a_lane_outside_of_the_mask(float* out) {
  return launch(from_a_lane_outside_of_the_mask, 1, 64, 0, nullptr, out);
}
RWKV_EXPORT int run_writes_shared_memory_at(int at) { return launch(writes_shared_memory_at, 1, 1, 256, nullptr, at); }
RWKV_EXPORT int run_reads_shared_memory_at(int at, float* out) {
  return launch(reads_shared_memory_at, 1, 1, 256, nullptr, at, out);
}
RWKV_EXPORT int run_wrong_address(float* nowhere) { return launch(wrong_address, 4, 64, 0, nullptr, nowhere); }
RWKV_EXPORT int run_too_deep(int* out, int depth) { return launch(too_deep, 1, 1, 0, nullptr, out, depth); }
RWKV_EXPORT int run_no_barrier(float* out, int distance) {
  return launch(no_barrier, 1, 64, 256, nullptr, out, distance);
}
RWKV_EXPORT int run_counts_blocks(int* counter, int* order, int blocks) {
  return launch(counts_blocks, blocks, 1, 0, nullptr, counter, order);
}
RWKV_EXPORT int run_does_not_wait(const float* x, float* out, int commits) {
  return launch(does_not_wait, 1, 64, 256, nullptr, x, out, commits);
}
RWKV_EXPORT int run_not_aligned(const float* x) { return launch(not_aligned, 1, 1, 256, nullptr, x); }
RWKV_EXPORT int run_copies_too_far(const float* x) { return launch(copies_too_far, 1, 64, 256, nullptr, x); }
