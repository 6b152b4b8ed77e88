// What forward and backward of RWKV-6 and RWKV-5 on tensor cores share: a chunk of 16 tokens is prepared.
//
//   y_t = (S_{t-1} + v_t (u * k_t)^T) r_t,   S_t = S_{t-1} diag(d_t) + v_t k_t^T,   d = exp(w), S is [value, key]
//
// With p(i, j) the product of the decays d of the tokens from i to j, both included, of each key (1 where i > j), the
// tokens 0 .. 15 of a chunk that begins with the state S give
//   y_i = S (r_i p(0, i-1)) + sum_{j <= i} A_ij v_j,   S' = S diag(p(0, 15)) + sum_j v_j (k_j p(j+1, 15))^T,
//   A_ij = sum over keys of r_i k_j p(j+1, i-1) for j < i,   A_ii = sum over keys of r_i u k_i.
//
// Any decay is exact, because no factor is ever above 1. Tokens i > j first differ in one bit of their numbers, that of
// 2^level: i has it, j has not, and the higher bits are the same. Where the bit changes lies a boundary m, j < m <= i,
// which is the same for all pairs of those higher bits; so with rows R_i = r_i p(m, i-1) and K_j = k_j p(j+1, m-1) A_ij
// = R_i . K_j. Each token has one row for each of the 4 levels, R where it has the bit, K where not, so that the 16
// rows of a level are one matrix, the first 8 of them R, the others K. A product of it with its own transposed has A_ij
// of this level: one mma of 16 x 8 for each 16 keys, whose two operands are the same registers. Pairs with other higher
// bits are dropped. Level 0 has no factors: m = i = j + 1. Its rows are r and k as they came.
//
// The products p are those of at most 15 decays, rounded to float32: that is 2^-20 of a factor, which is rounded to
// bfloat16 next. What the state decays by in a chunk is exp of the sum of w instead, because a decay near 1 that is
// rounded to float32 at each of thousands of tokens would be wrong in its fifth digit after them.
//
// How threads share out a chunk: a warp takes 16 keys at once, a lane 2 neighbouring keys of 4 neighbouring tokens, so
// that what it needs of other tokens are 2 products, of the other half of its 8 tokens, and of the other 8 tokens.

#pragma once

#include "gpu_chunks.cuh"

namespace rwkv::chunked {

constexpr int kBadValue = 1;  // cudaErrorInvalidValue
constexpr int kLevels = 4;
static_assert(kChunkTokens == 1 << kLevels, "a level for each bit of a token's number");

// bfloat16 but for w and u, which are float32. w is [T, H, N], or [H, N] where all tokens have the same (RWKV-5).
struct Inputs {
  const uint16_t* r;
  const float* w;
  const uint16_t *k, *v;
  const float* u;

  Inputs(const void* r, const float* w, const void* k, const void* v, const float* u)
      : r(static_cast<const uint16_t*>(r)),
        w(w),
        k(static_cast<const uint16_t*>(k)),
        v(static_cast<const uint16_t*>(v)),
        u(u) {}
};

inline bool can_run(const Heads& heads) {
  return heads.dtype == kBFloat16 && (heads.N == 64 || heads.N == 128) && heads.S >= 0 && heads.H >= 0 && heads.T >= 0;
}

// Runs f(Constant<N>()) with the head size, one that can_run takes.
template <typename Function>
int for_chunked_head_size(int N, Function f) {
  return N == 64 ? f(Constant<64>()) : f(Constant<128>());
}

// Who chooses whether sequences stay whole (segment_tokens_for) or are cut into segments, here of the least length.
enum class Form { kBySizes, kWhole, kSegments };

inline int segment_tokens_of(Form form, int S, int64_t T, int64_t n_blocks, int64_t work) {
  return form == Form::kWhole      ? 0
         : form == Form::kSegments ? kStateTokens
                                   : segment_tokens_for(S, T, n_blocks, work);
}

// Bytes of the workspace of the backward pass, which a unit of its own has, of sizes that can_run takes.
int64_t backward_workspace_bytes(Form form, int S, int64_t T, int H, int N);

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
// tokens 4 q .. 4 q + 3 with q = lane / 8. All lanes of a warp must make theirs together. [i][key]: of token 4 q + i.
template <int kN, bool kStatic>
struct Factors {
  int q, key;  // key: the first of the lane's two
  float before[4][2];     // p(4 q, 4 q + i - 1)
  float after[4][2];      // p(4 q + i + 1, 4 q + 3)
  float middle[2][2];     // the decay of tokens 4 q + 1 and 4 q + 2
  float near[2], far[2];  // p of the other 4 of the same 8 tokens, and of the other 8
  float sum[2];           // of w of all 16 tokens

  // w: [16, kN] with 0 for tokens that are not there; if kStatic [kN], and n_tokens are there.
  __device__ __forceinline__ Factors(const float* w, int n_tokens, int first_key)
      : q(lane_of_thread() / 8), key(first_key + lane_of_thread() % 8 * 2) {
    float own[4][2];
    if constexpr (kStatic) {
      const float2 both = *reinterpret_cast<const float2*>(w + key);
      const float decay[2] = {decay_of(both.x), decay_of(both.y)};
      const int n = n_tokens < 0 ? 0 : n_tokens < kChunkTokens ? n_tokens : kChunkTokens;
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int c = 0; c < 2; ++c) own[i][c] = 4 * q + i < n ? decay[c] : 1.f;
      sum[0] = static_cast<float>(n) * both.x;
      sum[1] = static_cast<float>(n) * both.y;
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
        for (int i = 0; i < 4; ++i) own[i][c] = expf(logs[i][c]);
      }
    }
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
      near[c] = __shfl_xor_sync(kAllLanes, four, 8);
      far[c] = __shfl_xor_sync(kAllLanes, four * near[c], 16);
    }
  }

  // That of r or k of token 4 q + i in its row of a level.
  __device__ __forceinline__ float of_level(int level, int i, int c) const {
    if (level == 0) return 1.f;
    if (level == 1) return i == 0 ? middle[0][c] : i == 3 ? middle[1][c] : 1.f;
    if (level == 2) return q & 1 ? before[i][c] : after[i][c];
    return q & 2 ? before[i][c] * (q & 1 ? near[c] : 1.f) : after[i][c] * (q & 1 ? 1.f : near[c]);
  }
  // p from the start of the chunk to the token before token 4 q + i, and from the one after it to the end.
  __device__ __forceinline__ float from_start(int i, int c) const {
    return before[i][c] * (q & 1 ? near[c] : 1.f) * (q & 2 ? far[c] : 1.f);
  }
  __device__ __forceinline__ float to_end(int i, int c) const {
    return after[i][c] * (q & 1 ? 1.f : near[c]) * (q & 2 ? 1.f : far[c]);
  }
};

// Two neighbouring numbers of a matrix; `column` is even.
template <int kColumns>
__device__ __forceinline__ void read_pair(const Matrix<kColumns>& m, int row, int column, float (&x)[2]) {
  const unsigned bits = *reinterpret_cast<const unsigned*>(m.at(row, column));
  x[0] = __uint_as_float(bits << 16);
  x[1] = __uint_as_float(bits & 0xffff0000u);
}
template <int kColumns>
__device__ __forceinline__ void write_pair(const Matrix<kColumns>& m, int row, int column, float x, float y) {
  *reinterpret_cast<unsigned*>(m.at(row, column)) = pack_bfloat16(x, y);
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
// over the chunk's tokens is added to it, [kN]; the same thread always has the same key. kKeysAlone: state.k and
// state.decay are made, nothing else, and nothing of r is read. All kThreads threads take part, whole warps; what they
// read must be there, what they leave is there after a barrier.
template <int kN, int kThreads, bool kStatic, bool kKeysAlone>
__device__ __forceinline__ void scale_chunk(const Levels<kN>& levels, const float* w, int n_tokens, int thread,
                                            const StateFactors<kN>& state, float* total) {
  static_assert(kThreads % kWarp == 0, "a warp takes 16 keys");
#pragma unroll 1
  for (int first_key = thread / kWarp * 16; first_key < kN; first_key += kThreads / kWarp * 16) {
    const Factors<kN, kStatic> factors(w, n_tokens, first_key);
    const int q = factors.q, key = factors.key;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int token = 4 * q + i;
      float r[2], k[2];
      read_pair(levels.k, token, key, k);
      write_pair(state.k, token, key, k[0] * factors.to_end(i, 0), k[1] * factors.to_end(i, 1));
      if constexpr (!kKeysAlone) {
        read_pair(levels.r, token, key, r);
        write_pair(state.r, token, key, r[0] * factors.from_start(i, 0), r[1] * factors.from_start(i, 1));
#pragma unroll
        for (int level = 1; level < kLevels; ++level) {
          const bool has_bit = token >> level & 1;
          write_pair(levels.level(level), row_of_token(level, token), key,
                     (has_bit ? r[0] : k[0]) * factors.of_level(level, i, 0),
                     (has_bit ? r[1] : k[1]) * factors.of_level(level, i, 1));
        }
      }
    }
    if (q == 0) {
      *reinterpret_cast<float2*>(state.decay + key) = make_float2(decay_of(factors.sum[0]), decay_of(factors.sum[1]));
      if (total != nullptr) total[key] += factors.sum[0], total[key + 1] += factors.sum[1];
    }
  }
}

// Makes A of a chunk, [16, 16], with its diagonal and zeros above it. u: [kN], in shared memory. All kThreads threads
// take part, whole warps; `levels` must be there, A is there after a barrier.
template <int kN, int kThreads>
__device__ __forceinline__ void put_attention(const Levels<kN>& levels, const float* u, int thread,
                                              const Matrix<kChunkTokens>& attention) {
  static_assert(kThreads % kWarp == 0, "a warp takes a level");
#pragma unroll 1
  for (int level = thread / kWarp; level < kLevels; level += kThreads / kWarp) {
    float even[4] = {}, odd[4] = {};  // two chains of products, half as long
#pragma unroll
    for (int column = 0; column < kN; column += 32) {
      unsigned x[4];
      load_level_a(levels, level, column, x);
      mma_bfloat16(even, x, {x[1], x[3]});
      load_level_a(levels, level, column + 16, x);
      mma_bfloat16(odd, x, {x[1], x[3]});
    }
    const int g = lane_g();
#pragma unroll
    for (int c = 0; c < 2; ++c) {  // rows 8 to 15 of the product are of no use
      const int j = 2 * lane_t() + c, row = token_of_row(level, g), column = token_of_row(level, 8 + j);
      if (!is_pair(level, g, j)) continue;
      *attention.at(row, column) = float_to_bfloat16(even[c] + odd[c]);
      *attention.at(column, row) = 0;
    }
  }
  constexpr int kLanes = 8;  // that take a token together
#pragma unroll
  for (int token = thread / kLanes; token < kChunkTokens; token += kThreads / kLanes) {
    float sum[1] = {0.f};
#pragma unroll
    for (int first_key = 0; first_key < kN; first_key += 2 * kLanes) {
      const int key = first_key + thread % kLanes * 2;
      float r[2], k[2];
      read_pair(levels.r, token, key, r);
      read_pair(levels.k, token, key, k);
      const float2 both = *reinterpret_cast<const float2*>(u + key);
      sum[0] += r[0] * (both.x * k[0]) + r[1] * (both.y * k[1]);
    }
    const float bonus = sum_lanes<1, kLanes>(sum);
    if (thread % kLanes == 0) *attention.at(token, token) = float_to_bfloat16(bonus);
  }
}

}  // namespace rwkv::chunked
