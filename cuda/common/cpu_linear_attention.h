// The RWKV-5 and RWKV-6 recurrences on the CPU, forward and backward, float32, any head size, any length, any
// decay <= 1.
//
//   y_t = (S_{t-1} + v_t (u * k_t)^T) r_t,   S_t = S_{t-1} diag(d_t) + v_t k_t^T,   d = exp(w), S is [value, key]
//
// RWKV-6 has a decay for each token (w is [T, H, N]), RWKV-5 one for all of them (w is [H, N]; kStatic below).
// Layout: r, k, v, y are [T, H, N] with the tokens of all S sequences, u is [H, N], states are [S, H, N, N], all
// contiguous (cpu_heads.h). Gradients that are sums over tokens (of u, and of w in RWKV-5) are [S, H, N]: one row for
// each head of a sequence.
// Parallel split: a thread computes whole heads of a sequence and owns all that it writes for them, so results do
// not depend on the number of threads.
//
// Method: chunks of kChunk tokens. Inside a chunk, with H = S^T ([key, value]) the state before it,
//   y_i = r~_i H + sum_{j<=i} score_ij v_j
//   H'  = diag(d_1..d_C) H + sum_j k^_j v_j^T
// where score_ij = sum_n r_i k_j times the decays strictly between j and i, score_ii = sum_n r_i u k_i, r~_i carries
// the decays from the start of the chunk up to the token before i, and k^_j those after j up to the end. Every decay
// factor is a product of numbers <= 1, built by running products: nothing is divided, so no decay can overflow.
//
// Backward: the forward pass leaves a state every kGroup chunks; a group's inner states are computed again. The
// gradients that flow through decays use the same running products (see `decay_row`), so d/dw has no cancellation.
//
// Memory of a thread, in floats: forward 7 kChunk N + (1 + kHeads) N^2, backward 7 (kGroup + 1) kChunk N
// + (kGroup + 2 kHeads) N^2; 0.2 and 0.5 MB at N = 64.

#pragma once

#include "cpu_heads.h"

namespace rwkv {

struct Inputs {
  const float *r, *w, *k, *v, *u;
};

// What is known of one chunk; all matrices have rows of n floats, n = N padded with zeros to whole vectors.
struct Chunk {
  float *r, *d, *k, *v;    // [kChunk, n]; d = exp(w)
  float *r_start, *k_end;  // r~, k^
  float* y;                // [kChunk, n]
  float* decay;            // [n], all decays of the chunk
  float* scores;           // [kChunk, kChunk]
};

inline Chunk take_chunk(Arena& arena, int n) {
  Chunk c;
  for (float** rows : {&c.r, &c.d, &c.k, &c.v, &c.r_start, &c.k_end, &c.y})
    *rows = arena.take(static_cast<size_t>(kChunk) * n);
  c.decay = arena.take(n);
  c.scores = arena.take(kChunk * kChunk);
  return c;
}

// What a Chunk or a ChunkGradients takes, each piece rounded up by less than 16.
inline size_t rows_floats(int n) { return 7 * kChunk * n + n + kChunk * kChunk + 9 * 16; }

// The rows of heads first .. first + count - 1 of u, or of the static w, as [count, n].
inline void load_head_rows(const float* from, const Sizes& sizes, int first, int count, int n, float* to) {
  std::memset(to, 0, static_cast<size_t>(count) * n * sizeof(float));
  store_rows(from + static_cast<size_t>(first % sizes.H) * sizes.N, sizes.N, count, sizes.N, n, to);
}

// What the tokens of a head have in common.
struct Head {
  const float* u;
  const float* d;  // RWKV-5's exp(w)
};

// u and, for RWKV-5, exp(w) of neighbouring heads.
template <bool kStatic>
struct Heads {
  float *u, *d;
  Heads(Arena& arena, const Inputs& in, const Sizes& sizes, int first, int count, int n)
      : u(arena.take(static_cast<size_t>(count) * n)), d(arena.take(static_cast<size_t>(count) * n)), n_(n) {
    load_head_rows(in.u, sizes, first, count, n, u);
    if (!kStatic) return;
    load_head_rows(in.w, sizes, first, count, n, d);
    for (int at = 0; at < count * n; at += kLanes) store(d + at, exp(load(d + at)));
  }
  static size_t floats(int count, int n) { return 2 * (static_cast<size_t>(count) * n + 16); }
  Head operator[](int i) const { return {u + i * n_, d + i * n_}; }

 private:
  int n_;
};

// Fills c.d with the decays of the chunk; tokens beyond the end have decay 1.
template <int kRows, bool kStatic>
inline void load_decays(const float* w, const Head& head, size_t stride, int rows, int N, int n, const Chunk& c) {
  if constexpr (kStatic) {
    for (int i = 0; i < kRows; ++i)
      for (int at = 0; at < n; at += kLanes) store(c.d + i * n + at, i < rows ? load(head.d + at) : spread(1.f));
  } else {
    load_rows<kRows>(w, stride, rows, N, n, c.d);
    for (int at = 0; at < kRows * n; at += kLanes) store(c.d + at, exp(load(c.d + at)));
  }
}

// Scores of rows i and, where kSecond, i + 1 with all tokens; 0 for later tokens. Going back in time, z takes one
// decay more at each step; where it arrives at the start of the chunk it is r~.
template <int kColumns, bool kSecond>
inline __attribute__((always_inline)) void score_rows(const Chunk& c, const float* u, int i, int n) {
  Vec partial[2 * kChunk] = {};
  const float *first = c.r + i * n, *second = first + n;
  for (int column = 0; column < n; column += kColumns * kLanes) {
    Vec z[kColumns], z2[kColumns];
#pragma GCC unroll 4
    for (int m = 0; m < kColumns; ++m) {
      const int at = column + m * kLanes;
      z[m] = load(first + at);
      partial[i] += z[m] * load(u + at) * load(c.k + i * n + at);
      if constexpr (kSecond) {
        z2[m] = load(second + at);
        partial[kChunk + i] += z2[m] * load(c.k + i * n + at);
        partial[kChunk + i + 1] += z2[m] * load(u + at) * load(c.k + (i + 1) * n + at);
        z2[m] *= load(c.d + i * n + at);
      }
    }
    for (int j = i - 1; j >= 0; --j) {
      Vec sum = partial[j], sum2 = partial[kChunk + j];
#pragma GCC unroll 4
      for (int m = 0; m < kColumns; ++m) {
        const int at = j * n + column + m * kLanes;
        const Vec k = load(c.k + at), d = load(c.d + at);
        sum += z[m] * k;
        z[m] *= d;
        if constexpr (kSecond) {
          sum2 += z2[m] * k;
          z2[m] *= d;
        }
      }
      partial[j] = sum;
      partial[kChunk + j] = sum2;
    }
    for (int m = 0; m < kColumns; ++m) {
      store(c.r_start + i * n + column + m * kLanes, z[m]);
      if constexpr (kSecond) store(c.r_start + (i + 1) * n + column + m * kLanes, z2[m]);
    }
  }
  float unused[kChunk];
  sum_pairs(partial, c.scores + i * kChunk, kSecond ? c.scores + (i + 1) * kChunk : unused);
}

template <int kRows, int kColumns>
inline void compute_scores(const Chunk& c, const float* u, int n) {
  static_assert(kRows == 1 || kRows % 2 == 0, "rows go in pairs");
  for (int i = 0; i < kRows; i += 2) score_rows<kColumns, (kRows > 1)>(c, u, i, n);
}

// Loads a chunk's inputs and computes all that does not depend on the state.
template <int kRows, bool kStatic>
void prepare_chunk(const Inputs& in, const Head& head, size_t offset, size_t stride, int rows, int N, int n,
                   const Chunk& c) {
  load_rows<kRows>(in.r + offset, stride, rows, N, n, c.r);
  load_rows<kRows>(in.k + offset, stride, rows, N, n, c.k);
  load_rows<kRows>(in.v + offset, stride, rows, N, n, c.v);
  load_decays<kRows, kStatic>(in.w + (kStatic ? 0 : offset), head, stride, rows, N, n, c);
  if (n % (4 * kLanes) == 0)
    compute_scores<kRows, 4>(c, head.u, n);
  else
    compute_scores<kRows, 1>(c, head.u, n);
  for (int column = 0; column < n; column += kLanes) {
    Vec decay = spread(1.f);
    for (int j = kRows - 1; j >= 0; --j) {
      const int at = j * n + column;
      store(c.k_end + at, load(c.k + at) * decay);
      decay *= load(c.d + at);
    }
    store(c.decay + column, decay);
  }
}

// Takes the state h, [key, value], over a chunk. `next` is where the rows lie that this thread takes after these.
template <int kRows, bool kStatic>
void forward_chunk(const Inputs& in, const Head& head, const Sizes& sizes, size_t offset, size_t next, int rows, int n,
                   const Chunk& c, float* h, float* y) {
  const size_t stride = sizes.stride();
  const int N = sizes.N;
  prepare_chunk<kRows, kStatic>(in, head, offset, stride, rows, N, n, c);
  prefetch_rows<0>(in.r + next, stride, rows, N);
  if (!kStatic) prefetch_rows<0>(in.w + next, stride, rows, N);
  multiply<kRows>(c.r_start, h, n, c.y);
  prefetch_rows<0>(in.k + next, stride, rows, N);
  prefetch_rows<0>(in.v + next, stride, rows, N);
  for (int i = 0; i < kRows; ++i) add_weighted(c.scores + i * kChunk, 1, c.v, i + 1, n, c.y + i * n);
  store_rows(c.y, n, rows, N, stride, y + offset);
  update_state<kRows>(c.decay, h, {{c.k_end, c.v}}, n, h, nullptr);
}

// Neighbouring heads go through time together, because their rows share pages of memory. n is known when compiling
// for the usual head size, which makes every loop above a fixed one.
template <bool kStatic, int kFixed>
void forward_heads(const Inputs& in, const Sizes& sizes, int first, int count, const float* state, float* y,
                   float* final_state, float* checkpoints) {
  const int T = sizes.length(first), N = sizes.N, n = kFixed ? kFixed : padded(N);
  Arena arena(thread_workspace(rows_floats(n) + Heads<kStatic>::floats(count, n) + (count + 1) * square(n) + 16));
  const Chunk c = take_chunk(arena, n);
  const Heads<kStatic> heads(arena, in, sizes, first, count, n);
  float* const states = arena.take(count * square(n));
  float* const s = arena.take(square(n));  // a state as [value, key]
  for (int i = 0; i < count; ++i) {
    std::memset(s, 0, square(n) * sizeof(float));
    store_rows(state + (first + i) * square(N), N, N, N, n, s);
    transpose_matrix(s, n, states + i * square(n));
  }
  for (int t = 0; t < T; t += kChunk)
    for (int i = 0; i < count; ++i) {
      float* const h = states + i * square(n);
      if (checkpoints != nullptr && t % kCheckpointTokens == 0)
        store_rows(h, n, N, N, N, checkpoints + sizes.checkpoint(first + i, t / kCheckpointTokens));
      const size_t offset = sizes.start(first + i) + t * sizes.stride();
      const size_t next = i + 1 < count ? offset + N : sizes.start(first) + (t + kChunk) * sizes.stride();
      if (T - t == 1)  // a step of generation
        forward_chunk<1, kStatic>(in, heads[i], sizes, offset, next, 1, n, c, h, y);
      else
        forward_chunk<kChunk, kStatic>(in, heads[i], sizes, offset, next, T - t < kChunk ? T - t : kChunk, n, c, h, y);
    }
  for (int i = 0; i < count; ++i) {
    transpose_matrix(states + i * square(n), n, s);
    store_rows(s, n, N, N, N, final_state + (first + i) * square(N));
    if (checkpoints != nullptr) clear_spare_checkpoint(sizes, first + i, checkpoints);
  }
}

// ---------------------------------------------------------------------------------------------- backward

struct Gradients {
  float *r, *w, *k, *v, *u;
};

struct ChunkGradients {
  float *dy, *dv;            // [kChunk, n]
  float *r_state, *k_state;  // gradients of r~, k^
  float *dr, *dw, *dk;       // [kChunk, n]
  float* d_scores;           // [kChunk, kChunk]
  float* decay;              // [n], gradient of the log of the chunk's whole decay, through the state
  float *dh, *ds;            // [n, n]: gradient of the state, as [key, value] and [value, key]
  float *du, *dw_sum;        // [n]: sums over the tokens of a head; the second is RWKV-5's gradient of w
};

inline ChunkGradients take_gradients(Arena& arena, int n) {
  ChunkGradients g;
  for (float** rows : {&g.dy, &g.dv, &g.r_state, &g.k_state, &g.dr, &g.dw, &g.dk})
    *rows = arena.take(static_cast<size_t>(kChunk) * n);
  g.decay = arena.take(n);
  g.d_scores = arena.take(kChunk * kChunk);
  g.dh = g.ds = g.du = g.dw_sum = nullptr;  // each head has its own, see backward_heads
  return g;
}

// d_scores[i][j] = sum_v dy_i v_j for j <= i, else 0.
inline void score_gradients(const Chunk& c, const ChunkGradients& g, int n) {
  for (int i = 0; i < kChunk; i += 2) {
    Vec partial[2 * kChunk] = {};
    const float *first = g.dy + i * n, *second = first + n;
    for (int j = 0; j <= i + 1; ++j) {
      Vec sum = {}, sum2 = {};
      for (int column = 0; column < n; column += kLanes) {
        const Vec v = load(c.v + j * n + column);
        sum += load(first + column) * v;
        sum2 += load(second + column) * v;
      }
      partial[j] = j <= i ? sum : Vec{};
      partial[kChunk + j] = sum2;
    }
    sum_pairs(partial, g.d_scores + i * kChunk, g.d_scores + (i + 1) * kChunk);
  }
}

// Gradients of one place that reads what tokens 0..last wrote, through the decays between. z[t] is the weight of the
// reading with the decays from t on. Going up in t, `sum` is what was written before t, decayed to t; it starts as
// what the state brings. All that passes the decay of t is z[t] * sum: the gradient of log d_t, without cancellation.
// write(t, weight) returns what t wrote, times the gradient of its score, and adds to the gradient of k_t.
// Returns the gradient of the reading vector.
template <typename Write>
inline __attribute__((always_inline)) Vec decay_row(const Vec* d, const Vec* z, Vec sum, int last, Vec* dw,
                                                    Write write) {
#pragma GCC unroll 8
  for (int t = 0; t <= last; ++t) {
    dw[t] += z[t] * sum;
    sum = sum * d[t] + write(t, z[t + 1]);
  }
  return sum;
}

// Gradients of r, w, k, u for one vector of key channels.
template <bool kStatic>
inline void decay_gradients(const Chunk& c, const ChunkGradients& g, const float* u, int rows, int n, int column) {
  Vec d[kChunk], k[kChunk], dk[kChunk], dw[kChunk] = {};
  Vec z[kChunk + 1];
  for (int t = 0; t < kChunk; ++t) {
    d[t] = load(c.d + t * n + column);
    k[t] = load(c.k + t * n + column);
  }

  // Read by the end of the chunk.
  z[kChunk] = spread(1.f);
  for (int t = kChunk - 1; t >= 0; --t) z[t] = z[t + 1] * d[t];
  decay_row(d, z, load(g.decay + column), kChunk - 1, dw, [&](int t, Vec weight) {
    const Vec from_k = load(g.k_state + t * n + column);
    dk[t] = weight * from_k;
    return k[t] * from_k;
  });

  const Vec bonus = load(u + column);
  Vec du = load(g.du + column);
#pragma GCC unroll 8
  for (int i = 0; i < kChunk; ++i) {
    const Vec r = load(c.r + i * n + column);
    const float* d_scores = g.d_scores + i * kChunk;
    z[i] = r;  // read by y_i, before the decay of i
#pragma GCC unroll 8
    for (int t = i - 1; t >= 0; --t) z[t] = z[t + 1] * d[t];
    const Vec dr = decay_row(d, z, load(g.r_state + i * n + column), i - 1, dw, [&](int t, Vec weight) {
      dk[t] += d_scores[t] * weight;
      return d_scores[t] * k[t];
    });
    const Vec own = d_scores[i] * bonus;  // of the token with itself: no decay between
    store(g.dr + i * n + column, dr + own * k[i]);
    dk[i] += own * r;
    du += d_scores[i] * (r * k[i]);
  }
  store(g.du + column, du);
  for (int t = 0; t < kChunk; ++t) store(g.dk + t * n + column, dk[t]);
  if constexpr (kStatic) {
    Vec sum = {};
    for (int t = 0; t < rows; ++t) sum += dw[t];  // tokens beyond the end have decays that are not w's
    store(g.dw_sum + column, load(g.dw_sum + column) + sum);
  } else {
    for (int t = 0; t < kChunk; ++t) store(g.dw + t * n + column, dw[t]);
  }
}

// Takes g.dh, g.ds from the gradient of the state after the chunk to that before it; s is the state before the chunk,
// [value, key].
template <bool kStatic>
void backward_chunk(const Chunk& c, const float* s, const ChunkGradients& g, const float* u, int rows, int n) {
  multiply<kChunk>(c.k_end, g.dh, n, g.dv);
  for (int j = 0; j < kChunk; ++j)
    add_weighted(c.scores + j * kChunk + j, kChunk, g.dy + j * n, kChunk - j, n, g.dv + j * n);
  score_gradients(c, g, n);
  multiply<kChunk>(g.dy, s, n, g.r_state);
  multiply<kChunk>(c.v, g.ds, n, g.k_state);
  for (int column = 0; column < n; column += kLanes) {
    Vec sum[4] = {};
    for (int i = 0; i < n; i += 4)
#pragma GCC unroll 4
      for (int m = 0; m < 4; ++m) sum[m] += load(s + (i + m) * n + column) * load(g.ds + (i + m) * n + column);
    store(g.decay + column, (sum[0] + sum[1]) + (sum[2] + sum[3]));
  }
  for (int column = 0; column < n; column += kLanes) decay_gradients<kStatic>(c, g, u, rows, n, column);
  update_state<kChunk>(c.decay, g.dh, {{c.r_start, g.dy}}, n, g.dh, g.ds);
}

// One group of chunks of one head with T tokens. Enters with the gradient of the state after it in g.dh, g.ds. `states` has room
// for the state before each chunk, [value, key].
template <bool kStatic>
void backward_group(const Inputs& in, const Head& head, const Sizes& sizes, size_t start, int T, int first_chunk,
                    int n_chunks, const float* checkpoint, const float* dy, const Gradients& out, int n,
                    const Chunk* chunks, float* states, const ChunkGradients& g) {
  const int N = sizes.N;
  const size_t stride = sizes.stride();
  const auto rows_of = [&](int i) {
    const int left = T - (first_chunk + i) * kChunk;
    return left < kChunk ? left : kChunk;
  };
  const auto offset_of = [&](int i) { return start + (first_chunk + i) * kChunk * stride; };

  // The checkpoint is [key, value]; the place of the second state is free meanwhile.
  std::memset(states + square(n), 0, square(n) * sizeof(float));
  store_rows(checkpoint, N, N, N, n, states + square(n));
  transpose_matrix(states + square(n), n, states);
  for (int i = 0; i < n_chunks; ++i) {
    const Chunk& c = chunks[i];
    prepare_chunk<kChunk, kStatic>(in, head, offset_of(i), stride, rows_of(i), N, n, c);
    if (i + 1 < n_chunks) {
      const size_t next = offset_of(i + 1);
      const int rows = rows_of(i + 1);
      if (!kStatic) prefetch_rows<0>(in.w + next, stride, rows, N);
      for (const float* rows_from : {in.r, in.k, in.v}) prefetch_rows<0>(rows_from + next, stride, rows, N);
      update_state<kChunk, true>(c.decay, states + i * square(n), {{c.v, c.k_end}}, n, states + (i + 1) * square(n),
                                 nullptr);
    } else {
      prefetch_rows<0>(dy + offset_of(i), stride, rows_of(i), N);
    }
  }
  for (int i = n_chunks - 1; i >= 0; --i) {
    const size_t offset = offset_of(i);
    const int rows = rows_of(i);
    load_rows<kChunk>(dy + offset, stride, rows, N, n, g.dy);
    if (i > 0) prefetch_rows<0>(dy + offset_of(i - 1), stride, rows_of(i - 1), N);
    if (!kStatic) prefetch_rows<1>(out.w + offset, stride, rows, N);
    for (float* rows_to : {out.r, out.k, out.v}) prefetch_rows<1>(rows_to + offset, stride, rows, N);
    backward_chunk<kStatic>(chunks[i], states + i * square(n), g, head.u, rows, n);
    store_rows(g.dr, n, rows, N, stride, out.r + offset);
    store_rows(g.dk, n, rows, N, stride, out.k + offset);
    store_rows(g.dv, n, rows, N, stride, out.v + offset);
    if (!kStatic) store_rows(g.dw, n, rows, N, stride, out.w + offset);
  }
}

template <bool kStatic, int kFixed>
void backward_heads(const Inputs& in, const Sizes& sizes, int first, int count, const float* checkpoints,
                    const float* dy, const float* d_final, const Gradients& out, float* d_state) {
  const int N = sizes.N, n = kFixed ? kFixed : padded(N);
  const size_t sums = 2 * static_cast<size_t>(count) * n;
  Arena arena(thread_workspace((kGroup + 1) * rows_floats(n) + Heads<kStatic>::floats(count, n) + sums +
                               (kGroup + 2 * count) * square(n) + 3 * 16));
  Chunk chunks[kGroup];
  for (Chunk& c : chunks) c = take_chunk(arena, n);
  ChunkGradients g = take_gradients(arena, n);
  const Heads<kStatic> heads(arena, in, sizes, first, count, n);
  float* const states = arena.take(kGroup * square(n));
  float* const d_states = arena.take(2 * count * square(n));
  float* const d_sums = arena.take(sums);
  std::memset(d_sums, 0, sums * sizeof(float));
  const auto take_head = [&](int i) {
    g.dh = d_states + 2 * i * square(n);
    g.ds = g.dh + square(n);
    g.du = d_sums + 2 * i * n;
    g.dw_sum = g.du + n;
  };
  for (int i = 0; i < count; ++i) {
    take_head(i);
    std::memset(g.ds, 0, square(n) * sizeof(float));
    store_rows(d_final + (first + i) * square(N), N, N, N, n, g.ds);
    transpose_matrix(g.ds, n, g.dh);
  }
  const int T = sizes.length(first), n_chunks = (T + kChunk - 1) / kChunk;
  for (int group = (n_chunks + kGroup - 1) / kGroup - 1; group >= 0; --group)
    for (int i = 0; i < count; ++i) {
      take_head(i);
      const int chunk = group * kGroup;
      backward_group<kStatic>(in, heads[i], sizes, sizes.start(first + i), T, chunk,
                              n_chunks - chunk < kGroup ? n_chunks - chunk : kGroup,
                              checkpoints + sizes.checkpoint(first + i, group), dy, out, n,
                              chunks, states, g);
    }
  for (int i = 0; i < count; ++i) {
    take_head(i);
    store_rows(g.ds, n, N, N, N, d_state + (first + i) * square(N));
    copy(g.du, N, out.u + static_cast<size_t>(first + i) * N);
    if (kStatic) copy(g.dw_sum, N, out.w + static_cast<size_t>(first + i) * N);
  }
}

// ---------------------------------------------------------------------------------------------- launch

// checkpoints may be null where no backward pass follows.
template <bool kStatic>
void forward(const Inputs& in, const Sizes& sizes, const float* state, float* y, float* final_state,
             float* checkpoints, int n_threads) {
  const auto run =
      sizes.N == kUsualHeadSize ? forward_heads<kStatic, kUsualHeadSize> : forward_heads<kStatic, 0>;
  for_each_block(sizes, n_threads,
                 [&](int first, int count) { run(in, sizes, first, count, state, y, final_state, checkpoints); });
}

template <bool kStatic>
void backward(const Inputs& in, const Sizes& sizes, const float* checkpoints, const float* dy, const float* d_final,
              const Gradients& out, float* d_state, int n_threads) {
  const auto run =
      sizes.N == kUsualHeadSize ? backward_heads<kStatic, kUsualHeadSize> : backward_heads<kStatic, 0>;
  for_each_block(sizes, n_threads,
                 [&](int first, int count) { run(in, sizes, first, count, checkpoints, dy, d_final, out, d_state); });
}

}  // namespace rwkv
