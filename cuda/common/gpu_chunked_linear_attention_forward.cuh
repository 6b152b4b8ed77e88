// The forward pass of RWKV-6 and RWKV-5 on tensor cores. Formulas, levels and factors:
// gpu_chunked_linear_attention.cuh.
//
// A block takes 64 values of a head (N = 128: two blocks a head) through the chunks of a span, with 8 warps. Four of
// them walk: each has 16 values and all keys of the state in its registers, as float32, [value, key], and multiplies
// with the values as rows, so that what it computes stays in its registers and none of them waits for another:
//   y^T = S r'^T + V^T A^T,   S <- S diag(decay) + V^T k'
// with r', k', decay of `StateFactors`. S is rounded to bfloat16 for the first product alone. y takes the place of v in
// shared memory, 16 tokens by 16 values of one warp, and leaves from there 16 bytes at a time.
// The other four prepare the next chunk meanwhile. First a warp takes 16 keys, a lane 2 neighbouring keys of 4
// neighbouring tokens, so that what it needs of the decay of other tokens are 2 products. The 16 rows of a level become
// a matrix, R its first 8 rows, K the others; a product of it with its own transposed has A_ij of this level, one mma
// for each 16 keys, whose two operands are the same registers. So then a warp takes a level. That makes two parts of a
// chunk, with a barrier behind each:
//   walk:      y of this chunk                          | S
//   prepare:   fetch the third next, scale the next one | A of the next one; the one after that has arrived
// so two to three chunks are on their way or just there, and both halves of the block always have something to do.
//
// Segments. S of a segment's end is linear in that of its start, S_end = S_start diag(exp(sum of w)) + K, with K the
// state that a pass from zero ends with. Where sequences are few and long, `change_kernel` finds K of all segments but
// the last ones side by side (half a pass: no r, no y), `join_kernel` goes through the segments of each sequence and
// leaves the state that each begins with in place of K, and then `forward_kernel` takes all segments from there.
//
// What a chunk costs. Products, mma of 16 x 8 x 16: N / 8 + 2 for y and N / 8 for S in each of the 4 warps that walk,
// N / 16 in each of those that prepare: 18 and 4 for N = 64, 34 and 8 for N = 128. Exponentials: 17 N, RWKV-5 5 N. On
// sm_90 and for N = 64 a warp that walks issues some 150 instructions, one that prepares 400. Registers of a thread: at
// most 103 for N = 64 and 124 for N = 128, so that two blocks share a multiprocessor. Shared memory of a block in KB,
// for N = 64 and 128: RWKV-6 53 and 92, RWKV-5 41 and 68; of `change_kernel` 33 and 56, 21 and 32. Workspace: none, or,
// with segments, N N + N floats for each head of each slot (gpu_chunks.cuh).
//
// What is not finite in v reaches the earlier tokens of its chunk, too: they multiply it with 0.

#pragma once

#include "gpu_chunked_linear_attention.cuh"

namespace rwkv::chunked {

// ---------------------------------------------------------------------------------------------- levels

// The token whose row stands in a row of a level, and the row that a token has there.
__host__ __device__ constexpr int token_of_row(int level, int row) {
  const int low = (1 << level) - 1, i = row % 8;
  return (i & ~low) << 1 | (row < 8 ? 1 << level : 0) | (i & low);
}
__host__ __device__ constexpr int row_of_token(int level, int token) {
  const int low = (1 << level) - 1;
  return (token >> 1 & ~low) | (token & low) | (token >> level & 1 ? 0 : 8);
}

// Whether the tokens of rows i < 8 and 8 + j of a level are a pair of it: their higher bits are the same.
__host__ __device__ constexpr bool is_pair(int level, int i, int j) { return i >> level == j >> level; }

// The rows of all levels, in shared memory.
template <int kN>
struct Levels {
  static constexpr int kSize = (kLevels - 1) * Matrix<kN>::size_of(kChunkTokens);  // of `scaled`, in numbers

  Matrix<kN> r, k;   // [16, kN], as they came: level 0
  uint16_t* scaled;  // levels 1, 2, 3, one behind the other

  __device__ __forceinline__ Matrix<kN> level(int number) const {
    return {scaled + (number - 1) * Matrix<kN>::size_of(kChunkTokens)};
  }
  __device__ __forceinline__ uint16_t* at(int number, int row, int column) const {
    if (number > 0) return level(number).at(row, column);
    return (row < 8 ? r : k).at(token_of_row(0, row), column);
  }
};

// x[i][key] = the matrix of a level, [row + i, column + key], 16 x 16, as `load_a` does it. {x[1], x[3]} is an operand
// b: the transposed of rows 8 to 15.
template <int kN>
__device__ __forceinline__ void load_level_a(const Levels<kN>& levels, int number, int column, unsigned (&x)[4]) {
  const int lane = lane_of_thread();
  ldmatrix<4>(x, levels.at(number, lane % 16, column + lane / 16 * 8));
}

// b[key / 8][row][key % 8] = the matrix of a level, [row, column + key], as `load_b` does it.
template <int kN>
__device__ __forceinline__ void load_level_b(const Levels<kN>& levels, int number, int column, unsigned (&b)[2][2]) {
  const int lane = lane_of_thread();
  unsigned x[4];
  ldmatrix_transposed<4>(x, levels.at(number, lane % 16, column + lane / 16 * 8));
  b[0][0] = x[0], b[0][1] = x[1], b[1][0] = x[2], b[1][1] = x[3];
}

// ---------------------------------------------------------------------------------------------- factors

// The decay of 16 keys of a chunk, of which a lane has the keys first_key + 2 (lane % 8) and the next one, of the
// tokens 4 q .. 4 q + 3 with q = lane / 8. All lanes of a warp must make theirs together. [i][c]: of token 4 q + i and
// key + c.
template <int kN, bool kStatic>
struct Factors {
  int q, key;
  float before[4][2], after[4][2];  // p(4 q, 4 q + i - 1) and p(4 q + i + 1, 4 q + 3)
  float middle[2][2];               // the decay of tokens 4 q + 1 and 4 q + 2
  // What these lack: `before` to the start of the chunk, `after` to its end, and the one or the other to its middle.
  float to_start[2], to_end[2], to_middle[2];
  float sum[2];  // of w of all 16 tokens

  // w: [16, kN] with 0 for tokens that are not there; if kStatic [kN], and n_tokens are there.
  __device__ __forceinline__ Factors(const float* w, int n_tokens, int first_key)
      : q(lane_of_thread() / 8), key(first_key + lane_of_thread() % 8 * 2) {
    float own[4][2];
    if constexpr (kStatic) {
      const float2 both = *reinterpret_cast<const float2*>(w + key);
      const float decay[2] = {rough_exp(both.x), rough_exp(both.y)};
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int c = 0; c < 2; ++c) own[i][c] = 4 * q + i < n_tokens ? decay[c] : 1.f;
      sum[0] = static_cast<float>(n_tokens) * both.x;
      sum[1] = static_cast<float>(n_tokens) * both.y;
    } else {
      float logs[4][2];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 both = *reinterpret_cast<const float2*>(w + (4 * q + i) * kN + key);
        logs[i][0] = both.x, logs[i][1] = both.y;
      }
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        sum[c] = (logs[0][c] + logs[1][c]) + (logs[2][c] + logs[3][c]);
        sum[c] += __shfl_xor_sync(kAllLanes, sum[c], 8);
        sum[c] += __shfl_xor_sync(kAllLanes, sum[c], 16);
#pragma unroll
        for (int i = 0; i < 4; ++i) own[i][c] = rough_exp(logs[i][c]);
      }
    }
    const bool is_upper_four = q & 1, is_upper_eight = q & 2;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      before[0][c] = 1.f;
      before[1][c] = own[0][c];
      before[2][c] = before[1][c] * own[1][c];
      before[3][c] = before[2][c] * own[2][c];
      after[3][c] = 1.f;
      after[2][c] = own[3][c];
      after[1][c] = own[2][c] * after[2][c];
      after[0][c] = own[1][c] * after[1][c];
      middle[0][c] = own[1][c];
      middle[1][c] = own[2][c];
      const float four = before[3][c] * own[3][c];
      const float near = __shfl_xor_sync(kAllLanes, four, 8);         // p of the other 4 of the same 8 tokens
      const float far = __shfl_xor_sync(kAllLanes, four * near, 16);  // p of the other 8
      to_start[c] = (is_upper_four ? near : 1.f) * (is_upper_eight ? far : 1.f);
      to_end[c] = (is_upper_four ? 1.f : near) * (is_upper_eight ? 1.f : far);
      to_middle[c] = is_upper_four == is_upper_eight ? near : 1.f;
    }
  }
};

// Two neighbouring numbers of a matrix, as they lie there, the lower half first; `column` is even.
template <int kColumns>
__device__ __forceinline__ unsigned* pair_at(const Matrix<kColumns>& m, int row, int column) {
  return reinterpret_cast<unsigned*>(m.at(row, column));
}
__device__ __forceinline__ float lower_of(unsigned pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float upper_of(unsigned pair) { return __uint_as_float(pair & 0xffff0000u); }
template <int kColumns>
__device__ __forceinline__ void put_pair(const Matrix<kColumns>& m, int row, int column, float lower, float upper) {
  *pair_at(m, row, column) = pack_bfloat16(lower, upper);
}

// ---------------------------------------------------------------------------------------------- preparing a chunk

// What the state is multiplied with and by in a chunk, in shared memory.
template <int kN>
struct StateFactors {
  Matrix<kN> r;  // [16, kN], r_i p(0, i-1)
  Matrix<kN> k;  // [16, kN], k_j p(j+1, 15)
  float* decay;  // [kN], p(0, 15)
};

// Makes levels.scaled and `state` of levels.r, levels.k and w (as in Factors). Where total is not null, the sum of w
// over the chunk's tokens is added to it, [kN]; the same thread always has the same key. kStateAlone: state.k and
// state.decay are made, nothing else, and nothing of r is read. All kThreads threads take part, whole warps; what they
// read must be there, what they leave is there after a barrier.
template <int kN, int kThreads, bool kStatic, bool kStateAlone>
__device__ __forceinline__ void scale_chunk(const Levels<kN>& levels, const float* w, int n_tokens, int thread,
                                            const StateFactors<kN>& state, float* total) {
  constexpr int kKeys = kThreads / kWarp * 16;  // of all warps
  static_assert(kN % kKeys == 0, "a warp takes 16 keys, and no warp fewer of them than another");
#pragma unroll
  for (int first_key = 0; first_key < kN; first_key += kKeys) {
    const Factors<kN, kStatic> factors(w, n_tokens, first_key + thread / kWarp * 16);
    const int q = factors.q, key = factors.key;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float(&before)[2] = factors.before[i], (&after)[2] = factors.after[i];
      const int token = 4 * q + i;
      const unsigned k_pair = *pair_at(levels.k, token, key);
      const float k[2] = {lower_of(k_pair), upper_of(k_pair)};
      put_pair(state.k, token, key, k[0] * (after[0] * factors.to_end[0]), k[1] * (after[1] * factors.to_end[1]));
      if constexpr (!kStateAlone) {
        const unsigned r_pair = *pair_at(levels.r, token, key);
        const float r[2] = {lower_of(r_pair), upper_of(r_pair)};
        put_pair(state.r, token, key, r[0] * (before[0] * factors.to_start[0]),
                 r[1] * (before[1] * factors.to_start[1]));
        // Where the bit of a level is set, the row is one of R. Next to the boundary it has no factor.
        if (i == 0 || i == 3) {
          const float(&x)[2] = i == 0 ? k : r, (&factor)[2] = factors.middle[i / 3];
          put_pair(levels.level(1), row_of_token(1, token), key, x[0] * factor[0], x[1] * factor[1]);
        } else {
          *pair_at(levels.level(1), row_of_token(1, token), key) = i == 1 ? k_pair : r_pair;
        }
        const bool in_2 = q & 1, in_3 = q & 2;
        put_pair(levels.level(2), row_of_token(2, token), key, (in_2 ? r[0] : k[0]) * (in_2 ? before[0] : after[0]),
                 (in_2 ? r[1] : k[1]) * (in_2 ? before[1] : after[1]));
        put_pair(levels.level(3), row_of_token(3, token), key,
                 (in_3 ? r[0] : k[0]) * ((in_3 ? before[0] : after[0]) * factors.to_middle[0]),
                 (in_3 ? r[1] : k[1]) * ((in_3 ? before[1] : after[1]) * factors.to_middle[1]));
      }
    }
    if (q < 2) {
      const float sum = q == 0 ? factors.sum[0] : factors.sum[1];
      state.decay[key + q] = decay_of(sum);
      if (total != nullptr) total[key + q] += sum;
    }
  }
}

// Where a thread's two numbers of the product of a level belong in A, in numbers from its start; below 0 where they are
// of no pair.
struct Entries {
  int at[2];

  __device__ __forceinline__ explicit Entries(int level) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int i = lane_g(), j = 2 * lane_t() + c;
      const int place = token_of_row(level, i) * Matrix<kChunkTokens>::kStride + token_of_row(level, 8 + j);
      at[c] = is_pair(level, i, j) ? place : -1;
    }
  }
};

// Makes A of a chunk, [16, 16], its diagonal and what is below. u: [kN], in shared memory. A warp takes a level, whose
// entries these are, and then 8 lanes the diagonal's number of a token. `levels` must be there, A is there after a
// barrier.
template <int kN>
__device__ __forceinline__ void put_attention(const Levels<kN>& levels, const float* u, int thread,
                                              const Entries& entries, const Matrix<kChunkTokens>& attention) {
  constexpr int kLanes = kLevels * kWarp / kChunkTokens;
  const int level = thread / kWarp, token = thread / kLanes, first_key = thread % kLanes * 2;
  float even[4] = {}, odd[4] = {};  // two chains of products, half as long
#pragma unroll
  for (int column = 0; column < kN; column += 32) {
    unsigned x[4];
    load_level_a(levels, level, column, x);
    mma_bfloat16(even, x, {x[1], x[3]});
    load_level_a(levels, level, column + 16, x);
    mma_bfloat16(odd, x, {x[1], x[3]});
  }
  float sum[1] = {0.f};
#pragma unroll
  for (int key = first_key; key < kN; key += 2 * kLanes) {
    const unsigned r = *pair_at(levels.r, token, key), k = *pair_at(levels.k, token, key);
    const float2 both = *reinterpret_cast<const float2*>(u + key);
    sum[0] += lower_of(r) * (both.x * lower_of(k)) + upper_of(r) * (both.y * upper_of(k));
  }
  const float bonus = sum_lanes<1, kLanes>(sum);
#pragma unroll
  for (int c = 0; c < 2; ++c)  // rows 8 to 15 of the product are of no use
    if (entries.at[c] >= 0) attention.first[entries.at[c]] = float_to_bfloat16(even[c] + odd[c]);
  if (thread % kLanes == 0) *attention.at(token, token) = float_to_bfloat16(bonus);
}

// ---------------------------------------------------------------------------------------------- a block

constexpr int kBlockValues = 64;
constexpr int kWalkThreads = kBlockValues / 16 * kWarp;
constexpr int kPrepareThreads = kLevels * kWarp;
constexpr int kForwardThreads = kWalkThreads + kPrepareThreads;
static_assert(kWalkThreads % kPrepareThreads == 0, "threads that prepare are counted from 0, after those that walk");

// A block's shared memory. kStateAlone: without what only y needs.
template <int kN, bool kStatic, bool kStateAlone>
struct ForwardMemory {
  static constexpr int kFetched = 3;        // chunks of r, w, k
  static constexpr int kFetchedValues = 4;  // of v, which is read a chunk later than those
  static constexpr int kRows = Matrix<kN>::size_of(kChunkTokens);
  static constexpr int kValueRows = Matrix<kBlockValues>::size_of(kChunkTokens);
  static constexpr int kAttention = Matrix<kChunkTokens>::size_of(kChunkTokens);
  static constexpr int kHeadFloats = 2 * kN;
  static constexpr int kDecayFloats = kStatic ? 0 : kFetched * kChunkTokens * kN;
  static constexpr int kFloats = kHeadFloats + 2 * kN + kDecayFloats;
  static constexpr int kNumbers = kFetched * kRows + kFetchedValues * kValueRows + 2 * kRows +
                                  (kStateAlone ? 0 : kFetched * kRows + 2 * kRows + Levels<kN>::kSize + 2 * kAttention);
  static constexpr size_t kBytes = kFloats * sizeof(float) + kNumbers * sizeof(uint16_t);
  static_assert(kBytes <= kMaxSharedBytesChunked, "more than every chip has");

  float* const head_w;        // [kN], of RWKV-5
  float* const u_or_total;    // [kN]: u; kStateAlone: the sum of w of all tokens
  float* const first_factor;  // [2, kN]
  float* const first_w;       // [kFetched, 16, kN]
  uint16_t* const first;      // k, v, what scales k; then what only y needs

  __device__ explicit ForwardMemory(float* memory)
      : head_w(memory),
        u_or_total(memory + kN),
        first_factor(memory + kHeadFloats),
        first_w(memory + kHeadFloats + 2 * kN),
        first(reinterpret_cast<uint16_t*>(memory + kFloats)) {}

  __device__ __forceinline__ float* w(int chunk) const {
    return kStatic ? head_w : first_w + chunk % kFetched * (kChunkTokens * kN);
  }
  __device__ __forceinline__ Matrix<kN> k(int chunk) const { return {first + chunk % kFetched * kRows}; }
  __device__ __forceinline__ Matrix<kBlockValues> v(int chunk) const {
    return {first + kFetched * kRows + chunk % kFetchedValues * kValueRows};
  }
  __device__ __forceinline__ StateFactors<kN> state(int chunk) const {
    return {{of_y() + (kFetched + chunk % 2) * kRows},
            {first + kFetched * kRows + kFetchedValues * kValueRows + chunk % 2 * kRows},
            first_factor + chunk % 2 * kN};
  }
  __device__ __forceinline__ Matrix<kN> r(int chunk) const { return {of_y() + chunk % kFetched * kRows}; }
  __device__ __forceinline__ Levels<kN> levels(int chunk) const {
    return {r(chunk), k(chunk), of_y() + (kFetched + 2) * kRows};
  }
  __device__ __forceinline__ Matrix<kChunkTokens> attention(int chunk) const {
    return {of_y() + (kFetched + 2) * kRows + Levels<kN>::kSize + chunk % 2 * kAttention};
  }

 private:
  __device__ __forceinline__ uint16_t* of_y() const {
    return first + (kFetched + 2) * kRows + kFetchedValues * kValueRows;
  }
};

inline int parts_of_chunked_head(int N) { return N / kBlockValues; }

// ---------------------------------------------------------------------------------------------- preparing

// Starts the copies of the chunks of a span, one after the other.
template <int kN, bool kStatic, bool kStateAlone>
struct Fetch {
  const Inputs& in;
  const ForwardMemory<kN, kStatic, kStateAlone>& memory;
  const int thread, first_value;
  const int64_t stride;  // from one token to the next
  int64_t at;            // position of the next chunk's first number
  int64_t n_tokens;      // that are left, from the next chunk on

  __device__ __forceinline__ Fetch(const Heads& heads, const Span& span, const Inputs& in, int thread,
                                   const ForwardMemory<kN, kStatic, kStateAlone>& memory)
      : in(in),
        memory(memory),
        thread(thread),
        first_value(span.part * kBlockValues),
        stride(heads.row_stride()),
        at(heads.row(span.first_token, span.head)),
        n_tokens(span.n_tokens) {}

  // If there is one left.
  __device__ __forceinline__ void start_next(int chunk) {
    if (n_tokens > 0) {
      const int n_rows = static_cast<int>(n_tokens < kChunkTokens ? n_tokens : kChunkTokens);
      if constexpr (!kStateAlone)
        fetch_chunk<kN, kPrepareThreads>(in.r + at, stride, n_rows, thread, memory.r(chunk));
      if constexpr (!kStatic) fetch_chunk<kN, kPrepareThreads>(in.w + at, stride, n_rows, thread, memory.w(chunk));
      fetch_chunk<kN, kPrepareThreads>(in.k + at, stride, n_rows, thread, memory.k(chunk));
      fetch_chunk<kBlockValues, kPrepareThreads>(in.v + at + first_value, stride, n_rows, thread, memory.v(chunk));
    }
    cp_async_commit();
    at += kChunkTokens * stride;
    n_tokens -= kChunkTokens;
  }
};

// ---------------------------------------------------------------------------------------------- walking

// 16 values of a state, [16, kN] in tiles of 8 keys, from a head's row `value` on in memory, [kN, kN].
template <int kN>
__device__ __forceinline__ void load_state(const float* state, int value, float (&s)[kN / 8][4]) {
  const float* const from = state + (value + lane_g()) * kN + 2 * lane_t();
#pragma unroll
  for (int tile = 0; tile < kN / 8; ++tile) {
    const float2 upper = *reinterpret_cast<const float2*>(from + tile * 8);
    const float2 lower = *reinterpret_cast<const float2*>(from + 8 * kN + tile * 8);
    s[tile][0] = upper.x, s[tile][1] = upper.y, s[tile][2] = lower.x, s[tile][3] = lower.y;
  }
}

template <int kN>
__device__ __forceinline__ void store_state(const float (&s)[kN / 8][4], float* state, int value) {
  float* const to = state + (value + lane_g()) * kN + 2 * lane_t();
#pragma unroll
  for (int tile = 0; tile < kN / 8; ++tile) {
    *reinterpret_cast<float2*>(to + tile * 8) = make_float2(s[tile][0], s[tile][1]);
    *reinterpret_cast<float2*>(to + 8 * kN + tile * 8) = make_float2(s[tile][2], s[tile][3]);
  }
}

template <int kN>
__device__ __forceinline__ void store_checkpoint(const float (&s)[kN / 8][4], uint16_t* checkpoint, int value) {
  uint16_t* const to = checkpoint + (value + lane_g()) * kN + 2 * lane_t();
#pragma unroll
  for (int tile = 0; tile < kN / 8; ++tile) {
    *reinterpret_cast<unsigned*>(to + tile * 8) = pack_bfloat16(s[tile][0], s[tile][1]);
    *reinterpret_cast<unsigned*>(to + 8 * kN + tile * 8) = pack_bfloat16(s[tile][2], s[tile][3]);
  }
}

// y of a chunk, of this warp's 16 values from `value` on in the block. v_transposed: those of v, [16, 16]. y takes
// their place in v, [token, value].
template <int kN>
__device__ __forceinline__ void put_outputs(const float (&s)[kN / 8][4], const StateFactors<kN>& factors,
                                            const Matrix<kChunkTokens>& attention, const unsigned (&v_transposed)[4],
                                            const Matrix<kBlockValues>& v, int value) {
  float y[2][4] = {};  // [value, token]
  unsigned b[2][2];
  load_b_transposed(attention, 0, 0, b);
  multiply_add(y, v_transposed, b);
#pragma unroll
  for (int tile = 0; tile < kN / 8; tile += 2) {
    unsigned a[4];
    as_a(s[tile], s[tile + 1], a);
    load_b_transposed(factors.r, 0, tile * 8, b);
    multiply_add(y, a, b);
  }
  __syncwarp();  // all lanes have read v
  store_tile_transposed(y[0], v, 0, value);
  store_tile_transposed(y[1], v, 8, value);
}

// Takes 16 values of the state over a chunk.
template <int kN>
__device__ __forceinline__ void advance(const StateFactors<kN>& factors, const unsigned (&v_transposed)[4],
                                        float (&s)[kN / 8][4]) {
#pragma unroll
  for (int tile = 0; tile < kN / 8; tile += 2) {
    unsigned b[2][2];
    load_b(factors.k, 0, tile * 8, b);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float2 decay = *reinterpret_cast<const float2*>(factors.decay + (tile + i) * 8 + 2 * lane_t());
      s[tile + i][0] *= decay.x, s[tile + i][1] *= decay.y, s[tile + i][2] *= decay.x, s[tile + i][3] *= decay.y;
      mma_bfloat16(s[tile + i], v_transposed, b[i]);
    }
  }
}

// ---------------------------------------------------------------------------------------------- kernels

// The two halves of a block come to the same barriers, each in a loop of its own, so that neither holds registers for
// what the other one does.

// Prepares the chunks of a span, one before the walk; from before the first barrier on.
template <int kN, bool kStatic, bool kStateAlone>
__device__ __forceinline__ void prepare(const Heads& heads, const Span& span, const Inputs& in,
                                        const ForwardMemory<kN, kStatic, kStateAlone>& memory) {
  const int thread = static_cast<int>(threadIdx.x % kPrepareThreads), n_chunks = static_cast<int>(span.n_chunks());
  const int last_tokens = static_cast<int>(span.n_tokens - static_cast<int64_t>(n_chunks - 1) * kChunkTokens);
  Fetch<kN, kStatic, kStateAlone> fetch(heads, span, in, thread, memory);
  const Entries entries(thread / kWarp);
  fetch.start_next(0);
  fetch.start_next(1);
  for (int key = thread; key < kN; key += kPrepareThreads) {
    memory.u_or_total[key] = kStateAlone ? 0.f : in.u[span.head * kN + key];
    if (kStatic) memory.head_w[key] = in.w[span.head * kN + key];
  }
  if constexpr (!kStateAlone)  // above the diagonal it stays 0
    for (int i = thread; i < memory.kAttention; i += kPrepareThreads)
      *memory.attention(0).at(0, i) = *memory.attention(1).at(0, i) = 0;
  cp_async_wait<1>();
  meet();
#pragma unroll 1
  for (int chunk = 0; chunk < n_chunks; ++chunk) {
    fetch.start_next(chunk + 2);
    scale_chunk<kN, kPrepareThreads, kStatic, kStateAlone>(
        memory.levels(chunk), memory.w(chunk), chunk + 1 < n_chunks ? kChunkTokens : last_tokens, thread,
        memory.state(chunk), kStateAlone ? memory.u_or_total : nullptr);
    if constexpr (!kStateAlone) {
      meet();
      put_attention(memory.levels(chunk), memory.u_or_total, thread, entries, memory.attention(chunk));
    }
    cp_async_wait<1>();  // for all but the copies that this step has started
    meet();
  }
  if constexpr (!kStateAlone) meet();  // the walk's last chunk
  meet();
}

// Block (slot * H + head) * parts + part has 64 values of a head of a span. states: of each sequence, or, where there
// are segments, of each slot, at its start. checkpoints may be null.
template <int kN, bool kStatic>
__global__ void __launch_bounds__(kForwardThreads, 2)
    forward_kernel(Heads heads, int segment_tokens, Inputs in, const float* states, uint16_t* y, float* final_state,
                   uint16_t* checkpoints) {
  constexpr int kChunksOfState = kStateTokens / kChunkTokens;
  const ForwardMemory<kN, kStatic, false> memory(shared_memory());
  const Span span = span_of_block(heads, kN / kBlockValues, segment_tokens);
  if (!span.is_used) return;
  if (threadIdx.x >= kWalkThreads) return prepare(heads, span, in, memory);

  const int value = static_cast<int>(threadIdx.x) / kWarp * 16, value_of_head = span.part * kBlockValues + value;
  const int n_chunks = static_cast<int>(span.n_chunks()), lane = lane_of_thread(), token = lane / 2;
  // All that is needed of the span, so that it takes no registers: where y, checkpoints and the last state go. A lane
  // stores 8 values of a token. A sequence may have room for a checkpoint more than it has use for.
  uint16_t* to = y + heads.row(span.first_token + token, span.head) + value_of_head + lane % 2 * 8;
  const bool has_last_token = (n_chunks - 1) * static_cast<int64_t>(kChunkTokens) + token < span.n_tokens;
  uint16_t* checkpoint = checkpoints + heads.state(span.first_checkpoint, span.head);
  const bool has_spare = span.is_last && span.first_checkpoint + (span.n_tokens + kStateTokens - 1) / kStateTokens <=
                                             (span.first_token + span.n_tokens) / kStateTokens + span.s;
  float* const last_state = span.is_last ? final_state + heads.state(span.s, span.head) : nullptr;
  float s[kN / 8][4];
  load_state<kN>(states + heads.state(segment_tokens == 0 ? span.s : span.slot, span.head), value_of_head, s);

  for (int i = 0; i < 3; ++i) meet();  // the first chunk is prepared
#pragma unroll 1
  for (int chunk = 0; chunk < n_chunks; ++chunk) {
    if (checkpoints != nullptr && chunk % kChunksOfState == 0) {
      store_checkpoint<kN>(s, checkpoint, value_of_head);
      checkpoint += heads.state(1, 0);
    }
    const Matrix<kBlockValues> v = memory.v(chunk);
    unsigned v_transposed[4];
    load_a_transposed(v, 0, value, v_transposed);
    put_outputs<kN>(s, memory.state(chunk), memory.attention(chunk), v_transposed, v, value);
    __syncwarp();
    if (chunk + 1 < n_chunks || has_last_token)
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(v.at(token, value + lane % 2 * 8));
    to += kChunkTokens * heads.row_stride();
    meet();
    advance<kN>(memory.state(chunk), v_transposed, s);
    meet();
  }

  if (last_state != nullptr) store_state<kN>(s, last_state, value_of_head);
  if (checkpoints == nullptr || !has_spare) return;
  const float zero[kN / 8][4] = {};
  store_checkpoint<kN>(zero, checkpoint, value_of_head);
}

// The state that each segment but the last one of a sequence ends with, from zero, to states, [slots, H, N, N], and the
// sum of its w to totals, [slots, H, N].
template <int kN, bool kStatic>
__global__ void __launch_bounds__(kForwardThreads, 2)
    change_kernel(Heads heads, int segment_tokens, Inputs in, float* states, float* totals) {
  const ForwardMemory<kN, kStatic, true> memory(shared_memory());
  const Span span = span_of_block(heads, kN / kBlockValues, segment_tokens);
  if (!span.is_used || span.is_last) return;
  if (threadIdx.x >= kWalkThreads) {
    prepare(heads, span, in, memory);
    const int thread = static_cast<int>(threadIdx.x % kPrepareThreads);
    if (span.part == 0)
      for (int key = thread; key < kN; key += kPrepareThreads)
        totals[(span.slot * heads.H + span.head) * kN + key] = memory.u_or_total[key];
    return;
  }
  const int value = static_cast<int>(threadIdx.x) / kWarp * 16;
  float s[kN / 8][4] = {};
  meet();
  meet();  // the first chunk is prepared
  const int n_chunks = static_cast<int>(span.n_chunks());
#pragma unroll 1
  for (int chunk = 0; chunk < n_chunks; ++chunk) {
    unsigned v_transposed[4];
    load_a_transposed(memory.v(chunk), 0, value, v_transposed);
    advance<kN>(memory.state(chunk), v_transposed, s);
    meet();
  }
  store_state<kN>(s, states + heads.state(span.slot, span.head), span.part * kBlockValues + value);
}

constexpr int kJoinThreads = 256;
constexpr int kJoinElements = 4 * kJoinThreads;  // of a state, that a block has

// Puts the state that each segment begins with in place of what `change_kernel` left in states. Block
// (s * H + head) * pieces + piece, a thread 4 neighbouring keys.
template <int kN>
__global__ void __launch_bounds__(kJoinThreads)
    join_kernel(Heads heads, int segment_tokens, const float* state, float* states, const float* totals) {
  constexpr int kPieces = kN * kN / kJoinElements;
  const int64_t block = blockIdx.x;
  const int element = static_cast<int>(block % kPieces) * kJoinElements + static_cast<int>(threadIdx.x) * 4;
  const int head = static_cast<int>(block / kPieces % heads.H), s = static_cast<int>(block / kPieces / heads.H);
  const int64_t start = heads.start(s), n_tokens = heads.start(s + 1) - start;
  const int64_t first = start / segment_tokens + s;
  const int64_t n_segments = n_tokens <= 0 ? 1 : (n_tokens + segment_tokens - 1) / segment_tokens;

  float4 now = *reinterpret_cast<const float4*>(state + heads.state(s, head) + element);
  float4* at = reinterpret_cast<float4*>(states + heads.state(first, head) + element);
  const float4* total = reinterpret_cast<const float4*>(totals + (first * heads.H + head) * kN + element % kN);
  const int64_t next = heads.state(1, 0) / 4, next_total = static_cast<int64_t>(heads.H) * kN / 4;
  for (int64_t i = 0; i + 1 < n_segments; ++i, at += next, total += next_total) {
    const float4 change = *at, log = *total;
    *at = now;
    now.x = now.x * decay_of(log.x) + change.x;
    now.y = now.y * decay_of(log.y) + change.y;
    now.z = now.z * decay_of(log.z) + change.z;
    now.w = now.w * decay_of(log.w) + change.w;
  }
  *at = now;  // the last segment has left nothing there
}

// ---------------------------------------------------------------------------------------------- from the host

// With segments, their states are found first: half of a pass and more.
constexpr int64_t kSegmentsWork = 2;

inline int forward_segment_tokens(Form form, int S, int64_t T, int H, int N) {
  return segment_tokens_of(form, S, T, static_cast<int64_t>(H) * parts_of_chunked_head(N), kSegmentsWork);
}

inline int64_t forward_workspace_bytes(Form form, int S, int64_t T, int H, int N) {
  const int segment_tokens = forward_segment_tokens(form, S, T, H, N);
  if (segment_tokens == 0) return 0;
  return count_slots(S, T, segment_tokens) * H * (N + 1) * N * static_cast<int64_t>(sizeof(float));
}

inline int64_t workspace_bytes(Form form, bool is_backward, int S, int64_t T, int H, int N) {
  return is_backward ? backward_workspace_bytes(form, S, T, H, N) : forward_workspace_bytes(form, S, T, H, N);
}

template <bool kStatic>
int forward(Form form, const Heads& heads, const Inputs& in, const float* state, void* y, float* final_state,
            void* checkpoints, void* workspace, void* stream) {
  if (!can_run(heads)) return kBadValue;
  if (heads.S == 0 || heads.H == 0) return 0;
  const int segment_tokens = forward_segment_tokens(form, heads.S, heads.T, heads.H, heads.N);
  const int64_t slots = count_slots(heads.S, heads.T, segment_tokens);
  const int64_t n_blocks = slots * heads.H * parts_of_chunked_head(heads.N);
  const int64_t n_joins = static_cast<int64_t>(heads.S) * heads.H * heads.N * heads.N / kJoinElements;
  if (n_blocks > 0x7fffffff || n_joins > 0x7fffffff) return kBadValue;
  const dim3 grid(static_cast<unsigned>(n_blocks)), block(kForwardThreads);

  return for_chunked_head_size(heads.N, [&](auto size) {
    constexpr int kN = decltype(size)::value;
    const float* starts = state;
    int code = 0;
    if (segment_tokens != 0) {
      float* const states = static_cast<float*>(workspace);
      float* const totals = states + slots * heads.H * kN * kN;
      code = launch(change_kernel<kN, kStatic>, grid, block, ForwardMemory<kN, kStatic, true>::kBytes, stream, heads,
                    segment_tokens, in, states, totals);
      if (code == 0)
        code = launch(join_kernel<kN>, dim3(static_cast<unsigned>(n_joins)), dim3(kJoinThreads), 0, stream, heads,
                      segment_tokens, state, states, totals);
      starts = states;
    }
    if (code != 0) return code;
    return launch(forward_kernel<kN, kStatic>, grid, block, ForwardMemory<kN, kStatic, false>::kBytes, stream, heads,
                  segment_tokens, in, starts, static_cast<uint16_t*>(y), final_state,
                  static_cast<uint16_t*>(checkpoints));
  });
}

}  // namespace rwkv::chunked
