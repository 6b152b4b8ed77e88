// What forward and backward of RWKV-6 and RWKV-5 on tensor cores share: how a chunk of 16 tokens is computed at once.
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
// which is the same for all pairs of those higher bits; so with rows R_i = r_i p(m, i-1) and K_j = k_j p(j+1, m-1)
// A_ij = R_i . K_j. Each token has one row for each of the 4 levels, R where it has the bit, K where not. Level 0 has
// no factors: m = i = j + 1, and its rows are r and k as they came.
//
// The products p are those of at most 15 decays, with rounding errors of 2^-18 of a factor, which is rounded to
// bfloat16 next. What the state decays by in a chunk is exp of the sum of w instead, because a decay near 1 that is
// rounded to float32 at each of thousands of tokens would be wrong in its fifth digit after them.

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

}  // namespace rwkv::chunked
