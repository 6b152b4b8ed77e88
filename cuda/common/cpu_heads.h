// What the CPU kernels with a matrix state for each head share: sizes, a thread's memory, rows in and out, products
// with a state, and the split of heads over threads.
//
// Layout: r, k, v, y and their like are [T, H, N] with the T tokens of all S sequences (cpu_sequences.h), states
// [S, H, N, N], all contiguous. Checkpoints are [T / 32 + S, H, N, N], those of a sequence one after another. Inside a
// kernel all rows have n floats, n = N padded with zeros to whole vectors.

#pragma once

#include "cpu_sequences.h"
#include "cpu_vector.h"

namespace rwkv {

constexpr int kChunk = 8;   // tokens that go through a state together
constexpr int kGroup = 4;   // chunks from one checkpoint to the next
constexpr int kHeads = 12;  // heads that go through time together; their states stay in the second-level cache
constexpr int kCheckpointTokens = kChunk * kGroup;

constexpr int kUsualHeadSize = 64;

inline size_t square(int n) { return static_cast<size_t>(n) * n; }

// Head h of sequence s is head number s * H + h.
struct Sizes {
  Sequences sequences;
  int H, N;
  size_t stride() const { return static_cast<size_t>(H) * N; }  // from one token to the next
  int length(int head) const { return sequences.length(head / H); }
  // Where the first token of a head lies.
  size_t start(int head) const { return sequences.start(head / H) * stride() + static_cast<size_t>(head % H) * N; }
  // Where the checkpoint before a group of chunks of a head lies.
  size_t checkpoint(int head, int group) const {
    return ((sequences.first_checkpoint(head / H, kCheckpointTokens) + group) * H + head % H) * square(N);
  }
  // How many checkpoints a head has room for: as many as it needs, or one more.
  int n_checkpoints(int head) const {
    const int s = head / H;
    return sequences.first_checkpoint(s + 1, kCheckpointTokens) - sequences.first_checkpoint(s, kCheckpointTokens);
  }
};

// The checkpoint of a head that has room for one more than it needs is zero.
inline void clear_spare_checkpoint(const Sizes& sizes, int head, float* checkpoints) {
  const int needed = (sizes.length(head) + kCheckpointTokens - 1) / kCheckpointTokens;
  if (needed < sizes.n_checkpoints(head))
    std::memset(checkpoints + sizes.checkpoint(head, needed), 0, square(sizes.N) * sizeof(float));
}

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

// Shares out the heads of all sequences: a thread gets neighbours, and takes at most kHeads of one sequence at a time.
// run(first, count) computes heads first .. first + count - 1.
template <typename Run>
void for_each_block(const Sizes& sizes, int n_threads, Run run) {
  for_each_share(sizes.sequences, sizes.H, n_threads, [&](int first, int end) {
    const DenormalsAreZero guard;
    while (first < end) {
      const int in_row = sizes.H - first % sizes.H;
      const int available = end - first < in_row ? end - first : in_row;
      const int n_blocks = (available + kHeads - 1) / kHeads;
      const int count = (available + n_blocks - 1) / n_blocks;
      run(first, count);
      first += count;
    }
  });
}

}  // namespace rwkv

#define RWKV_EXPORT extern "C" __attribute__((visibility("default")))
