// What the CPU kernels with a matrix state for each head share: sizes, a thread's memory, rows in and out, products
// with a state, and the split of heads over threads.
//
// Layout: r, k, v, y and their like are [B, T, H, N], states [B, H, N, N], all contiguous. Inside a kernel all rows
// have n floats, n = N padded with zeros to whole vectors.

#pragma once

#include <omp.h>

#include "cpu_vector.h"

namespace rwkv {

constexpr int kChunk = 8;   // tokens that go through a state together
constexpr int kGroup = 4;   // chunks from one checkpoint to the next
constexpr int kHeads = 12;  // heads that go through time together; their states stay in the second-level cache

constexpr int kUsualHeadSize = 64;

struct Sizes {
  int B, T, H, N;
  size_t stride() const { return static_cast<size_t>(H) * N; }  // from one token to the next
  size_t n_checkpoints() const { return (T + kChunk * kGroup - 1) / (kChunk * kGroup); }
  // Where the first token of head number `task` of B * H lies.
  size_t start(int task) const { return task / H * (T * stride()) + static_cast<size_t>(task % H) * N; }
};

inline size_t square(int n) { return static_cast<size_t>(n) * n; }

// Asks for rows that will be needed soon: rows of one head lie H * N floats apart, which the hardware does not
// foresee.
template <int kWrite>
inline void prefetch_rows(const float* from, size_t stride, int rows, int N) {
  for (int i = 0; i < rows; ++i)
    for (int at = 0; at < N; at += 16) __builtin_prefetch(from + i * stride + at, kWrite, 2);
}

// Hands out a thread's memory piece by piece; every piece starts at a multiple of 64 bytes.
class Arena {
 public:
  explicit Arena(float* memory) : next_(memory) {}
  float* take(size_t n_floats) {
    float* piece = next_;
    next_ += (n_floats + 15) / 16 * 16;
    return piece;
  }

 private:
  float* next_;
};

inline __attribute__((always_inline)) void copy(const float* from, int n, float* to) {
  int at = 0;
  for (; at + kLanes <= n; at += kLanes) store(to + at, load(from + at));
  for (; at < n; ++at) to[at] = from[at];
}

// Copies `rows` rows of N floats, `stride` apart, into rows of n floats; the rest of kRows rows is zero.
template <int kRows>
void load_rows(const float* from, size_t stride, int rows, int N, int n, float* to) {
  for (int i = 0; i < kRows; ++i, to += n) {
    if (i < rows) copy(from + i * stride, N, to);
    const int filled = i < rows ? N : 0;
    for (int at = filled; at < n; ++at) to[at] = 0.f;
  }
}

inline void store_rows(const float* from, int n, int rows, int N, size_t stride, float* to) {
  for (int i = 0; i < rows; ++i) copy(from + i * n, N, to + i * stride);
}

inline void transpose_matrix(const float* from, int n, float* to) {
  for (int row = 0; row < n; row += kLanes)
    for (int column = 0; column < n; column += kLanes) {
      Vec x[kLanes];
      for (int i = 0; i < kLanes; ++i) x[i] = load(from + (row + i) * n + column);
      transpose(x);
      for (int i = 0; i < kLanes; ++i) store(to + (column + i) * n + row, x[i]);
    }
}

// out[i] = sum_l x[i][l] m[l], for kRows rows.
template <int kRows, int kVecs>
inline __attribute__((always_inline)) void multiply_tile(const float* x, const float* m, int n, float* out) {
  Vec sum[kRows][kVecs] = {};
  for (int l = 0; l < n; ++l) {
    Vec row[kVecs];
#pragma GCC unroll 4
    for (int c = 0; c < kVecs; ++c) row[c] = load(m + l * n + c * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
      for (int c = 0; c < kVecs; ++c) sum[i][c] += x[i * n + l] * row[c];
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 4
    for (int c = 0; c < kVecs; ++c) store(out + i * n + c * kLanes, sum[i][c]);
}

template <int kRows>
void multiply(const float* x, const float* m, int n, float* out) {
  constexpr int kTile = kRows < kRowTile ? kRows : kRowTile;
  for (int row = 0; row < kRows; row += kTile) {
    int column = 0;
    for (; column + 2 * kLanes <= n; column += 2 * kLanes)
      multiply_tile<kTile, 2>(x + row * n, m + column, n, out + row * n + column);
    if (column < n) multiply_tile<kTile, 1>(x + row * n, m + column, n, out + row * n + column);
  }
}

// What adds sum_j rows[j][l] columns[j][c] to a matrix [l, c].
struct Outer {
  const float *rows, *columns;
};

// out[l][c] = decay m[l][c] + the terms, with decay[l], or decay[c] where kByColumn; out_t, where wanted, is its
// transpose. out may be m.
template <int kRows, bool kByColumn = false, int kTerms>
void update_state(const float* decay, const float* m, const Outer (&terms)[kTerms], int n, float* out, float* out_t) {
  for (int l = 0; l < n; l += kLanes)
    for (int column = 0; column < n; column += kLanes) {
      Vec sum[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        const Vec before = load(m + (l + i) * n + column);
        if constexpr (kByColumn)
          sum[i] = load(decay + column) * before;
        else
          sum[i] = decay[l + i] * before;
      }
      for (const Outer& term : terms)
        for (int j = 0; j < kRows; ++j) {
          const Vec value = load(term.columns + j * n + column);
#pragma GCC unroll 16
          for (int i = 0; i < kLanes; ++i) sum[i] += term.rows[j * n + l + i] * value;
        }
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(out + (l + i) * n + column, sum[i]);
      if (out_t == nullptr) continue;
      transpose(sum);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(out_t + (column + i) * n + l, sum[i]);
    }
}

// out[i] += sum_j weight[i][j] x[j] for j < n_terms.
inline void add_weighted(const float* weight, int weight_stride, const float* x, int n_terms, int n, float* out) {
  for (int c = 0; c < n; c += kLanes) {
    Vec sum = load(out + c);
    for (int j = 0; j < n_terms; ++j) sum += weight[j * weight_stride] * load(x + j * n + c);
    store(out + c, sum);
  }
}

// Sums 2 kChunk vectors: the first kChunk sums go to `first`, the others to `second`.
inline void sum_pairs(Vec* partial, float* first, float* second) {
  alignas(64) float sums[2 * kChunk];
  for (int i = 0; i < 2 * kChunk; i += kLanes) store(sums + i, sum_each(partial + i));
  std::memcpy(first, sums, kChunk * sizeof(float));
  std::memcpy(second, sums + kChunk, kChunk * sizeof(float));
}
static_assert(2 * kChunk % kLanes == 0, "sum_pairs takes whole vectors");

// Shares out the B * H heads: a thread gets neighbours, and takes at most kHeads of one sequence at a time.
// run(first, count) computes heads first .. first + count - 1.
template <typename Run>
void for_each_block(const Sizes& sizes, int n_threads, Run run) {
#pragma omp parallel num_threads(n_threads)
  {
    const DenormalsAreZero guard;
    const int64_t n_heads = static_cast<int64_t>(sizes.B) * sizes.H;
    const int end = n_heads * (omp_get_thread_num() + 1) / omp_get_num_threads();
    for (int first = n_heads * omp_get_thread_num() / omp_get_num_threads(); first < end;) {
      const int in_row = sizes.H - first % sizes.H;
      const int available = end - first < in_row ? end - first : in_row;
      const int n_blocks = (available + kHeads - 1) / kHeads;
      const int count = (available + n_blocks - 1) / n_blocks;
      run(first, count);
      first += count;
    }
  }
}

}  // namespace rwkv

#define RWKV_EXPORT extern "C" __attribute__((visibility("default")))
