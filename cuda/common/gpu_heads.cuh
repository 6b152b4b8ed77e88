// What the GPU kernels with a matrix state for each head share: where sequences, rows and states lie, how a state lies
// in the registers of a block's threads, rows of tokens on their way through shared memory, and sums.
//
// In memory: r, w, k, v and their like are [T, H, N] with the T tokens of all S sequences, states [S, H, N, N] as
// [value, key], checkpoints [T / kGroupTokens + S, H, N, N], all contiguous. Inside a kernel a head has kN = 32, 64 or
// 128 rows and columns, of which those beyond N are zero: a head size that is not one of the three costs time, not
// memory, and no code of its own.
//
// In registers: a thread holds 4 x 4 elements of a state, s[row][column]. Of a warp's 32 lanes kN / 4 lie side by side
// along the columns (keys), so that a warp holds 16, 8 or 4 whole rows (values), and the warps of a block lie one below
// the other. Then:
//   s x     a thread adds up its 4 columns, `sum_lanes` adds up lanes: shuffles only, no barrier;
//   x^T s   a thread adds up its 4 rows, `put_column_sums` those of a warp, and after a barrier `sum_warps` the warps.
// The order of every sum is fixed: a kernel gives the same bits on every run.
//
// In shared memory: kBatchTokens rows of every input, as float32, rows of kN floats. `Rows` reads them in two steps, so
// that what comes next travels while what is there is computed.

#pragma once

#include "gpu.cuh"

namespace rwkv {

constexpr int kGroupTokens = 16;  // tokens from one checkpoint to the next
constexpr int kBatchTokens = 8;   // tokens that are in shared memory together
static_assert(kGroupTokens % kBatchTokens == 0, "a checkpoint lies before a batch");

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// ---------------------------------------------------------------------------------------------- in memory

// Sizes of a call. cu_seqlens, [S + 1], may be null: then all sequences have T / S tokens.
struct Heads {
  int dtype, S;
  int64_t T;
  int H, N;
  const int64_t* cu_seqlens;

  // Positions in tensors, in elements: of a token's row, and of a state or checkpoint.
  __device__ int64_t row(int64_t token, int head) const { return (token * H + head) * N; }
  __device__ int64_t row_stride() const { return static_cast<int64_t>(H) * N; }
  __device__ int64_t state(int64_t index, int head) const { return (index * H + head) * N * N; }

  // Where sequence s starts, which is where the one before it ends. Never outside of the tensors.
  __device__ int64_t start(int s) const {
    const int64_t start = cu_seqlens == nullptr ? T / S * s : cu_seqlens[s];
    return start < 0 ? 0 : start > T ? T : start;
  }
};

// A block computes `rows` rows of the state of one head of one sequence, from first_row on, for all its tokens.
struct Task {
  int s, head, part, first_row;
  int64_t first_token, n_tokens;
  int64_t first_checkpoint;  // in states; those of a sequence follow each other
  int n_spare;               // checkpoints for which a sequence has room and no use, 0 or 1

  __device__ int64_t n_groups() const { return (n_tokens + kGroupTokens - 1) / kGroupTokens; }
};

// Parts of a head that blocks of `rows` rows share out.
inline __host__ __device__ int parts_of_head(int N, int rows) { return (N + rows - 1) / rows; }

// Block (s * H + head) * parts + part has this task.
__device__ inline Task task_of_block(const Heads& heads, int rows) {
  const int parts = parts_of_head(heads.N, rows), block = static_cast<int>(blockIdx.x);
  Task task;
  task.part = block % parts;
  task.head = block / parts % heads.H;
  task.s = block / parts / heads.H;
  task.first_row = task.part * rows;
  const int64_t start = heads.start(task.s), next = heads.start(task.s + 1), end = next < start ? start : next;
  task.first_token = start;
  task.n_tokens = end - start;
  task.first_checkpoint = start / kGroupTokens + task.s;
  task.n_spare = static_cast<int>(end / kGroupTokens - start / kGroupTokens + 1 - task.n_groups());
  return task;
}

// Runs f(Constant<kN>()) with the size that a head of N is padded to.
template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};
template <typename Function>
int for_head_size(int N, Function f) {
  if (N <= 32) return f(Constant<32>());
  if (N <= 64) return f(Constant<64>());
  return f(Constant<128>());
}

inline bool is_head_size(int N) { return N >= 8 && N <= 128 && N % 8 == 0; }

// x, of which the compiler knows nothing: what depends on it is computed where it stands. Else whatever does not change
// in a loop is computed before it, to the last address, and takes the registers that a state needs.
__device__ __forceinline__ int not_before(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Four neighbouring elements as they lie in memory: 4 words of float32, 2 of a 16-bit dtype.
struct Packed {
  unsigned words[4];
};

template <typename Vector, typename Element>
__device__ __forceinline__ bool is_aligned(const Element* address) {
  return reinterpret_cast<uintptr_t>(address) % sizeof(Vector) == 0;
}

// Reads elements i .. i + 3. One access where the address allows it: a tensor may start anywhere in its storage.
__device__ __forceinline__ Packed fetch_four(const void* x, int64_t i, int dtype) {
  Packed packed{};
  if (dtype == kFloat32) {
    const unsigned* at = static_cast<const unsigned*>(x) + i;
    if (is_aligned<uint4>(at)) {
      const uint4 four = *reinterpret_cast<const uint4*>(at);
      packed.words[0] = four.x, packed.words[1] = four.y, packed.words[2] = four.z, packed.words[3] = four.w;
    } else {
      for (int j = 0; j < 4; ++j) packed.words[j] = at[j];
    }
  } else {
    const uint16_t* at = static_cast<const uint16_t*>(x) + i;
    if (is_aligned<uint2>(at)) {
      const uint2 four = *reinterpret_cast<const uint2*>(at);
      packed.words[0] = four.x, packed.words[1] = four.y;
    } else {
      packed.words[0] = at[0] | static_cast<unsigned>(at[1]) << 16;
      packed.words[1] = at[2] | static_cast<unsigned>(at[3]) << 16;
    }
  }
  return packed;
}

__device__ __forceinline__ void unpack(const Packed& packed, int dtype, float (&x)[4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const uint16_t bits = static_cast<uint16_t>(packed.words[j / 2] >> (j % 2 * 16));
    x[j] = dtype == kFloat32    ? __uint_as_float(packed.words[j])
           : dtype == kBFloat16 ? bfloat16_to_float(bits)
                                : float16_to_float(bits);
  }
}

__device__ __forceinline__ float4 load_four(const float* x) {
  if (is_aligned<float4>(x)) return *reinterpret_cast<const float4*>(x);
  return make_float4(x[0], x[1], x[2], x[3]);
}

__device__ __forceinline__ void store_four(float* x, float a, float b, float c, float d) {
  if (is_aligned<float4>(x))
    *reinterpret_cast<float4*>(x) = make_float4(a, b, c, d);
  else
    x[0] = a, x[1] = b, x[2] = c, x[3] = d;
}

// ---------------------------------------------------------------------------------------------- in registers

// Where the 4 x 4 elements of a thread lie in the rows of its block.
template <int kN>
struct Tile {
  static constexpr int kLanes = kN / 4;              // that hold a row
  static constexpr int kLaneRows = kWarp / kLanes;   // times 4 rows: those of a warp
  static constexpr int kRows = 4 * kLaneRows;

  int warp, lane, row, column;  // the first row, counted in the block, and the first column

  __device__ Tile() {
    warp = static_cast<int>(threadIdx.x) / kWarp;
    lane = static_cast<int>(threadIdx.x) % kWarp;
    row = warp * kRows + lane / kLanes * 4;
    column = lane % kLanes * 4;
  }
};

// Four neighbours of a row in shared memory; `at` is a multiple of 4.
__device__ __forceinline__ void read_four(const float* row, int at, float (&x)[4]) {
  const float4 four = *reinterpret_cast<const float4*>(row + at);
  x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
}

__device__ __forceinline__ void write_four(float* row, int at, const float (&x)[4]) {
  *reinterpret_cast<float4*>(row + at) = make_float4(x[0], x[1], x[2], x[3]);
}

// A thread's part of a state in global memory, [N, N]; row and column count in the head.
__device__ __forceinline__ void load_tile(const float* state, int N, int row, int column, float (&s)[4][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const bool inside = row + i < N && column < N;
    const float4 four = inside ? load_four(state + (row + i) * N + column) : make_float4(0.f, 0.f, 0.f, 0.f);
    s[i][0] = four.x, s[i][1] = four.y, s[i][2] = four.z, s[i][3] = four.w;
  }
}

__device__ __forceinline__ void store_tile(const float (&s)[4][4], int N, int row, int column, float* state) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (row + i < N && column < N) store_four(state + (row + i) * N + column, s[i][0], s[i][1], s[i][2], s[i][3]);
}

// A thread's part of a state in shared memory that only this thread reads again: no barrier is needed. `memory` has
// 16 floats for each of the kThreads threads.
template <int kThreads>
__device__ __forceinline__ void keep_tile(const float (&s)[4][4], float* memory) {
#pragma unroll
  for (int i = 0; i < 4; ++i) write_four(memory, (i * kThreads + static_cast<int>(threadIdx.x)) * 4, s[i]);
}

template <int kThreads>
__device__ __forceinline__ void take_tile(const float* memory, float (&s)[4][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) read_four(memory, (i * kThreads + static_cast<int>(threadIdx.x)) * 4, s[i]);
}

// sums[i] = sum_j s[i][j] x[j]: this thread's part of s x.
__device__ __forceinline__ void row_parts(const float (&s)[4][4], const float (&x)[4], float* sums) {
#pragma unroll
  for (int i = 0; i < 4; ++i) sums[i] = (s[i][0] * x[0] + s[i][1] * x[1]) + (s[i][2] * x[2] + s[i][3] * x[3]);
}

// sums[j] = sum_i x[i] s[i][j]: this thread's part of x^T s.
__device__ __forceinline__ void column_parts(const float (&s)[4][4], const float (&x)[4], float (&sums)[4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) sums[j] = (x[0] * s[0][j] + x[1] * s[1][j]) + (x[2] * s[2][j] + x[3] * s[3][j]);
}

// ---------------------------------------------------------------------------------------------- sums

// Adds up x over kLanes neighbouring lanes; lane l gets the sum of x[l % kCount]. At each step a lane gives away the
// half of its numbers that it does not end with, so that kCount sums cost little more than one: 8 numbers over 16 lanes
// are 4 + 2 + 1 + 1 shuffles. A recursion, because an array that a loop halves ends up in memory; kResults is its own.
template <int kCount, int kLanes, int kResults = kCount>
__device__ __forceinline__ float sum_lanes(const float (&x)[kCount]) {
  static_assert(kCount <= kLanes, "every sum needs a lane");
  if constexpr (kCount > 1) {
    constexpr int kHalf = kCount / 2;
    const bool upper = static_cast<int>(threadIdx.x) & kHalf;
    float half[kHalf];
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float low = x[i], high = x[kHalf + i];
      half[i] = (upper ? high : low) + __shfl_xor_sync(kAllLanes, upper ? low : high, kHalf);
    }
    return sum_lanes<kHalf, kLanes, kResults>(half);
  } else {
    float sum = x[0];
#pragma unroll
    for (int distance = kResults; distance < kLanes; distance *= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
    return sum;
  }
}

// The first 4 of kCount sums of `sum_lanes`, in every lane.
template <int kCount>
__device__ __forceinline__ void spread_four(float sum, float (&x)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = __shfl_sync(kAllLanes, sum, i, kCount);
}

// Adds up the column sums x of a warp's threads and leaves them in `sums`, [kN], this warp's alone. Destroys x.
template <int kN>
__device__ __forceinline__ void put_column_sums(const Tile<kN>& tile, float (&x)[4], float* sums) {
  if constexpr (kN == 128) {
    write_four(sums, tile.column, x);
  } else {
    const bool lower_half = tile.lane & 16;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float kept = lower_half ? x[2 + j] : x[j], given = lower_half ? x[j] : x[2 + j];
      x[j] = kept + __shfl_xor_sync(kAllLanes, given, 16);
    }
    float* const pair = sums + tile.column + (lower_half ? 2 : 0);
    if constexpr (kN == 64) {
      *reinterpret_cast<float2*>(pair) = make_float2(x[0], x[1]);
    } else {
      const bool odd = tile.lane & 8;
      const float kept = odd ? x[1] : x[0], given = odd ? x[0] : x[1];
      pair[odd ? 1 : 0] = kept + __shfl_xor_sync(kAllLanes, given, 8);
    }
  }
}

// The sum over warps of what they left `stride` floats apart.
template <int kWarps>
__device__ __forceinline__ float sum_warps(const float* first, int stride) {
  float sum = first[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) sum += first[warp * stride];
  return sum;
}

// ---------------------------------------------------------------------------------------------- in shared memory

// kBatchTokens rows of kWidth columns on their way from global to shared memory. Between `fetch` and `put` they are in
// registers, as they came, so that nothing waits for them.
template <int kWidth, int kThreads>
struct Rows {
  static constexpr int kFours = kBatchTokens * kWidth / 4;
  static constexpr int kPerThread = (kFours + kThreads - 1) / kThreads;
  Packed packed[kPerThread];

  // x: a tensor; first: position of the first element; stride: from one token to the next; tokens beyond n_tokens and
  // columns beyond n_columns are not read and become 0.
  __device__ __forceinline__ void fetch(const void* x, int dtype, int64_t first, int64_t stride, int64_t n_tokens,
                                        int n_columns) {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int four = i * kThreads + not_before(static_cast<int>(threadIdx.x));
      const int token = four / (kWidth / 4), column = four % (kWidth / 4) * 4;
      packed[i] = four < kFours && token < n_tokens && column < n_columns
                      ? fetch_four(x, first + token * stride + column, dtype)
                      : Packed{};
    }
  }

  // rows: [kBatchTokens, kWidth].
  __device__ __forceinline__ void put(int dtype, float* rows) const {
    put_each(dtype, rows, [](float x) { return x; });
  }

  // Puts exp(x): a decay, 1 for tokens that are not there.
  __device__ __forceinline__ void put_decay(int dtype, float* rows) const {
    put_each(dtype, rows, [](float w) { return decay_of(w); });
  }

 private:
  template <typename Function>
  __device__ __forceinline__ void put_each(int dtype, float* rows, Function f) const {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int four = i * kThreads + not_before(static_cast<int>(threadIdx.x));
      if (kFours % kThreads != 0 && four >= kFours) continue;
      float x[4];
      unpack(packed[i], dtype, x);
      for (float& element : x) element = f(element);
      write_four(rows, four * 4, x);
    }
  }
};

// Writes n_tokens rows of n_columns out of [kBatchTokens, kWidth].
template <int kWidth, int kThreads>
__device__ __forceinline__ void store_rows(const float* rows, int n_tokens, int n_columns, void* x, int dtype,
                                           int64_t first, int64_t stride) {
  for (int i = not_before(static_cast<int>(threadIdx.x)); i < n_tokens * kWidth; i += kThreads)
    if (i % kWidth < n_columns) store(x, first + i / kWidth * stride + i % kWidth, rows[i], dtype);
}

}  // namespace rwkv
