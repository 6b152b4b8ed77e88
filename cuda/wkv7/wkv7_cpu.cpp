// The RWKV-7 recurrence on the CPU, forward and backward, float32, any head size, any length, any decay <= 1.
//
//   S_t = S_{t-1} diag(d_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T,   y_t = S_t r_t,   d = exp(w), S is [value, key]
//
// Layout: r, w, k, v, a, b, y are [T, H, N] with the tokens of all S sequences, states [S, H, N, N], all contiguous
// (cpu_heads.h).
// Parallel split: a thread computes whole heads of a sequence and owns all that it writes for them, so results do
// not depend on the number of threads.
//
// Method: chunks of kChunk tokens. Inside a chunk, with H = S^T ([key, value]) the state before it,
//   u_i = a_i . state before token i = a~_i H + sum_{j<i} (ab_ij u_j + ak_ij v_j)
//   y_i = r~_i H + sum_{j<=i} (qb_ij u_j + qk_ij v_j)
//   H'  = diag(d_1..d_C) H + sum_j k^_j v_j^T + b^_j u_j^T
// where ab_ij = sum_n a_i b_j times the decays strictly between j and i, qb_ij = the same with r_i and the decay of
// i too, a~, r~ carry the decays from the start of the chunk and k^, b^ those up to its end. Every decay factor is
// a product of numbers <= 1, built by running products: nothing is divided, so no decay can overflow.
// The work is then in products of a [kChunk, N] with an [N, N] matrix, which keep the arithmetic units busy.
//
// Backward: the forward pass leaves a state every kGroup chunks; a group's inner states are computed again. The
// gradients that flow through decays use the same running products (see `decay_row`), so d/dw has no cancellation.
//
// Memory of a thread, in floats: forward 12 kChunk N + (2 + kHeads) N^2, backward 12 (kGroup + 1) kChunk N
// + 2 (kGroup + kHeads) N^2; 0.25 and 0.65 MB at N = 64.

#include "../common/cpu_heads.h"

namespace {

using namespace rwkv;

struct Inputs {
  const float *r, *w, *k, *v, *a, *b;
};

// What is known of one chunk; all matrices have rows of n floats, n = N padded with zeros to whole vectors.
struct Chunk {
  float *r, *d, *k, *v, *a, *b;      // [kChunk, n]; d = exp(w)
  float *r_start, *a_start;          // r~, a~
  float *k_end, *b_end;              // k^, b^
  float *u, *y;                      // [kChunk, n]
  float* decay;                      // [n], all decays of the chunk
  float *ab, *ak, *qb, *qk;          // [kChunk, kChunk]
  float *h, *s;                      // [n, n]: the state before the chunk, as [key, value] and [value, key]
};

Chunk take_chunk(Arena& arena, int n) {
  Chunk c;
  for (float** rows : {&c.r, &c.d, &c.k, &c.v, &c.a, &c.b, &c.r_start, &c.a_start, &c.k_end, &c.b_end, &c.u, &c.y})
    *rows = arena.take(static_cast<size_t>(kChunk) * n);
  c.decay = arena.take(n);
  for (float** pairs : {&c.ab, &c.ak, &c.qb, &c.qk}) *pairs = arena.take(kChunk * kChunk);
  c.h = arena.take(square(n));
  c.s = arena.take(square(n));
  return c;
}

// What a Chunk or a ChunkGradients takes without its [n, n] matrices, each piece rounded up by less than 16.
size_t rows_floats(int n) { return 12 * kChunk * n + n + 4 * kChunk * kChunk + 17 * 16; }
size_t chunk_floats(int n) { return rows_floats(n) + 2 * (square(n) + 16); }

// with_b[j] = sum_n z b_j, with_k[j] = sum_n z k_j for j = last..0, where z starts as x and then takes one decay
// more at each step back; 0 for j > last. Leaves z at the start of the chunk in `start`.
template <int kColumns>
inline void pair_row(const Chunk& c, const float* x, int last, int n, float* with_b, float* with_k, float* start) {
  Vec partial[2 * kChunk] = {};
  constexpr int kStep = kColumns * kLanes;
  for (int column = 0; column < n; column += kStep) {
    Vec z[kColumns];
    for (int m = 0; m < kColumns; ++m) z[m] = load(x + column + m * kLanes);
    for (int j = last; j >= 0; --j) {
      Vec sum_b = partial[j], sum_k = partial[kChunk + j];
#pragma GCC unroll 4
      for (int m = 0; m < kColumns; ++m) {
        const int at = j * n + column + m * kLanes;
        sum_b += z[m] * load(c.b + at);
        sum_k += z[m] * load(c.k + at);
        z[m] *= load(c.d + at);
      }
      partial[j] = sum_b;
      partial[kChunk + j] = sum_k;
    }
    for (int m = 0; m < kColumns; ++m) store(start + column + m * kLanes, z[m]);
  }
  sum_pairs(partial, with_b, with_k);
}

// Loads a chunk's inputs and computes all that does not depend on the state.
template <int kRows>
void prepare_chunk(const Inputs& in, size_t offset, size_t stride, int rows, int N, int n, const Chunk& c) {
  load_rows<kRows>(in.r + offset, stride, rows, N, n, c.r);
  load_rows<kRows>(in.w + offset, stride, rows, N, n, c.d);
  load_rows<kRows>(in.k + offset, stride, rows, N, n, c.k);
  load_rows<kRows>(in.v + offset, stride, rows, N, n, c.v);
  load_rows<kRows>(in.a + offset, stride, rows, N, n, c.a);
  load_rows<kRows>(in.b + offset, stride, rows, N, n, c.b);
  for (int i = 0; i < kRows * n; i += kLanes) store(c.d + i, exp(load(c.d + i)));

  for (int i = 0; i < kRows; ++i) {
    float* a_start = c.a_start + i * n;
    float* r_start = c.r_start + i * n;
    float *ab = c.ab + i * kChunk, *ak = c.ak + i * kChunk, *qb = c.qb + i * kChunk, *qk = c.qk + i * kChunk;
    if (n % (4 * kLanes) == 0) {
      pair_row<4>(c, c.a + i * n, i - 1, n, ab, ak, a_start);
      pair_row<4>(c, c.r + i * n, i, n, qb, qk, r_start);
    } else {
      pair_row<1>(c, c.a + i * n, i - 1, n, ab, ak, a_start);
      pair_row<1>(c, c.r + i * n, i, n, qb, qk, r_start);
    }
  }
  for (int column = 0; column < n; column += kLanes) {
    Vec decay = spread(1.f);
    for (int j = kRows - 1; j >= 0; --j) {
      const int at = j * n + column;
      store(c.k_end + at, load(c.k + at) * decay);
      store(c.b_end + at, load(c.b + at) * decay);
      decay *= load(c.d + at);
    }
    store(c.decay + column, decay);
  }
}

// u of a prepared chunk, from the state c.h before it.
template <int kRows>
void compute_u(const Chunk& c, int n) {
  multiply<kRows>(c.a_start, c.h, n, c.u);
  for (int i = 0; i < kRows; ++i) {
    add_weighted(c.ak + i * kChunk, 1, c.v, i, n, c.u + i * n);
    add_weighted(c.ab + i * kChunk, 1, c.u, i, n, c.u + i * n);
  }
}

template <int kRows>
void compute_y(const Chunk& c, int n) {
  multiply<kRows>(c.r_start, c.h, n, c.y);
  for (int i = 0; i < kRows; ++i) {
    add_weighted(c.qk + i * kChunk, 1, c.v, i + 1, n, c.y + i * n);
    add_weighted(c.qb + i * kChunk, 1, c.u, i + 1, n, c.y + i * n);
  }
}

// `next` is where the rows lie that this thread takes after these.
template <int kRows>
void forward_chunk(const Inputs& in, const Sizes& sizes, size_t offset, size_t next, int rows, int n, const Chunk& c,
                   float* y) {
  const size_t stride = sizes.stride();
  const int N = sizes.N;
  prepare_chunk<kRows>(in, offset, stride, rows, N, n, c);
  prefetch_rows<0>(in.r + next, stride, rows, N);
  prefetch_rows<0>(in.w + next, stride, rows, N);
  compute_u<kRows>(c, n);
  prefetch_rows<0>(in.k + next, stride, rows, N);
  prefetch_rows<0>(in.v + next, stride, rows, N);
  compute_y<kRows>(c, n);
  prefetch_rows<0>(in.a + next, stride, rows, N);
  prefetch_rows<0>(in.b + next, stride, rows, N);
  store_rows(c.y, n, rows, N, stride, y + offset);
  update_state<kRows>(c.decay, c.h, {{c.k_end, c.v}, {c.b_end, c.u}}, n, c.h, nullptr);
}

// Neighbouring heads go through time together, because their rows share pages of memory. n is known when compiling
// for the usual head size, which makes every loop above a fixed one.
template <int kFixed>
void forward_heads(const Inputs& in, const Sizes& sizes, int first, int count, const float* state, float* y,
                   float* final_state, float* checkpoints) {
  const int T = sizes.length(first), N = sizes.N, n = kFixed ? kFixed : padded(N);
  Arena arena(thread_workspace(chunk_floats(n) + count * square(n) + 16));
  Chunk c = take_chunk(arena, n);
  float* const states = arena.take(count * square(n));
  for (int i = 0; i < count; ++i) {
    std::memset(c.s, 0, square(n) * sizeof(float));
    store_rows(state + (first + i) * square(N), N, N, N, n, c.s);
    transpose_matrix(c.s, n, states + i * square(n));
  }
  for (int t = 0; t < T; t += kChunk)
    for (int i = 0; i < count; ++i) {
      c.h = states + i * square(n);
      if (checkpoints != nullptr && t % kCheckpointTokens == 0)
        store_rows(c.h, n, N, N, N, checkpoints + sizes.checkpoint(first + i, t / kCheckpointTokens));
      const size_t offset = sizes.start(first + i) + t * sizes.stride();
      const size_t next = i + 1 < count ? offset + N : sizes.start(first) + (t + kChunk) * sizes.stride();
      if (T - t == 1)  // a step of generation
        forward_chunk<1>(in, sizes, offset, next, 1, n, c, y);
      else
        forward_chunk<kChunk>(in, sizes, offset, next, T - t < kChunk ? T - t : kChunk, n, c, y);
    }
  for (int i = 0; i < count; ++i) {
    transpose_matrix(states + i * square(n), n, c.s);
    store_rows(c.s, n, N, N, N, final_state + (first + i) * square(N));
    if (checkpoints != nullptr) clear_spare_checkpoint(sizes, first + i, checkpoints);
  }
}

// ---------------------------------------------------------------------------------------------- backward

struct Gradients {
  float *r, *w, *k, *v, *a, *b;
};

// Gradients of one place that read what tokens 0..last wrote, through the decays between. z[t] is the weight of the
// reading with the decays from t on. Going up in t, `sum` is what was written before t, decayed to t; it starts as
// what the state brings. All that passes the decay of t is z[t] * sum: the gradient of log d_t, without cancellation.
// write(t, weight) returns what t wrote, times the gradient of its score, and adds to the gradients of k_t and b_t.
// Returns the gradient of the reading vector.
template <typename Write>
inline __attribute__((always_inline)) Vec decay_row(const Vec* d, const Vec* z, Vec sum, int last, Vec* dw,
                                                    Write write) {
  for (int t = 0; t <= last; ++t) {
    dw[t] += z[t] * sum;
    sum = sum * d[t] + write(t, z[t + 1]);
  }
  return sum;
}

struct ChunkGradients {
  float *dy, *du, *dv;               // [kChunk, n]; du becomes the gradient of u through everything
  float *r_state, *a_state;          // gradients of r~, a~
  float *k_state, *b_state;          // gradients of k^, b^
  float *dr, *dw, *dk, *da, *db;     // [kChunk, n]
  float *d_ab, *d_ak, *d_qb, *d_qk;  // [kChunk, kChunk]
  float* decay;                      // [n], gradient of the log of the chunk's whole decay, through the state
  float *dh, *ds;                    // [n, n]: gradient of the state, as [key, value] and [value, key]
};

ChunkGradients take_gradients(Arena& arena, int n) {
  ChunkGradients g;
  for (float** rows : {&g.dy, &g.du, &g.dv, &g.r_state, &g.a_state, &g.k_state, &g.b_state, &g.dr, &g.dw, &g.dk, &g.da,
                       &g.db})
    *rows = arena.take(static_cast<size_t>(kChunk) * n);
  for (float** pairs : {&g.d_ab, &g.d_ak, &g.d_qb, &g.d_qk}) *pairs = arena.take(kChunk * kChunk);
  g.decay = arena.take(n);
  g.dh = g.ds = nullptr;  // one pair for each head, see backward_heads
  return g;
}

// d_u[j] = sum_v x u_j, d_v[j] = sum_v x v_j for j <= last, else 0.
inline void pair_gradients(const Chunk& c, const float* x, int last, int n, float* d_u, float* d_v) {
  Vec partial[2 * kChunk] = {};
  for (int j = 0; j <= last; ++j) {
    Vec sum_u = {}, sum_v = {};
    for (int column = 0; column < n; column += kLanes) {
      const Vec value = load(x + column);
      sum_u += value * load(c.u + j * n + column);
      sum_v += value * load(c.v + j * n + column);
    }
    partial[j] = sum_u;
    partial[kChunk + j] = sum_v;
  }
  sum_pairs(partial, d_u, d_v);
}

// Gradients of r, w, k, a, b for one vector of key channels.
inline void decay_gradients(const Chunk& c, const ChunkGradients& g, int n, int column) {
  Vec d[kChunk], k[kChunk], b[kChunk], dk[kChunk], db[kChunk], dw[kChunk] = {};
  Vec z[kChunk + 1];
  for (int t = 0; t < kChunk; ++t) {
    d[t] = load(c.d + t * n + column);
    k[t] = load(c.k + t * n + column);
    b[t] = load(c.b + t * n + column);
  }

  // Read by the end of the chunk.
  z[kChunk] = spread(1.f);
  for (int t = kChunk - 1; t >= 0; --t) z[t] = z[t + 1] * d[t];
  decay_row(d, z, load(g.decay + column), kChunk - 1, dw, [&](int t, Vec weight) {
    const Vec from_k = load(g.k_state + t * n + column), from_b = load(g.b_state + t * n + column);
    dk[t] = weight * from_k;
    db[t] = weight * from_b;
    return k[t] * from_k + b[t] * from_b;
  });

#pragma GCC unroll 8
  for (int i = 0; i < kChunk; ++i) {
    z[i + 1] = load(c.r + i * n + column);  // read by y_i, after the decay of i
#pragma GCC unroll 8
    for (int t = i; t >= 0; --t) z[t] = z[t + 1] * d[t];
    const float *d_qk = g.d_qk + i * kChunk, *d_qb = g.d_qb + i * kChunk;
    store(g.dr + i * n + column,
          decay_row(d, z, load(g.r_state + i * n + column), i, dw, [&](int t, Vec weight) {
            dk[t] += d_qk[t] * weight;
            db[t] += d_qb[t] * weight;
            return d_qk[t] * k[t] + d_qb[t] * b[t];
          }));

    z[i] = load(c.a + i * n + column);  // read by u_i, before the decay of i
#pragma GCC unroll 8
    for (int t = i - 1; t >= 0; --t) z[t] = z[t + 1] * d[t];
    const float *d_ak = g.d_ak + i * kChunk, *d_ab = g.d_ab + i * kChunk;
    store(g.da + i * n + column,
          decay_row(d, z, load(g.a_state + i * n + column), i - 1, dw, [&](int t, Vec weight) {
            dk[t] += d_ak[t] * weight;
            db[t] += d_ab[t] * weight;
            return d_ak[t] * k[t] + d_ab[t] * b[t];
          }));
  }
  for (int t = 0; t < kChunk; ++t) {
    store(g.dw + t * n + column, dw[t]);
    store(g.dk + t * n + column, dk[t]);
    store(g.db + t * n + column, db[t]);
  }
}

// Takes g.dh, g.ds from the gradient of the state after the chunk to that before it.
void backward_chunk(const Chunk& c, const ChunkGradients& g, int n) {
  multiply<kChunk>(c.b_end, g.dh, n, g.du);
  multiply<kChunk>(c.k_end, g.dh, n, g.dv);
  for (int j = kChunk - 1; j >= 0; --j) {
    const int at = j * kChunk + j, after = at + kChunk, n_after = kChunk - 1 - j;
    add_weighted(c.qb + at, kChunk, g.dy + j * n, n_after + 1, n, g.du + j * n);
    add_weighted(c.ab + after, kChunk, g.du + (j + 1) * n, n_after, n, g.du + j * n);
    add_weighted(c.qk + at, kChunk, g.dy + j * n, n_after + 1, n, g.dv + j * n);
    add_weighted(c.ak + after, kChunk, g.du + (j + 1) * n, n_after, n, g.dv + j * n);
  }
  for (int i = 0; i < kChunk; ++i) {
    pair_gradients(c, g.dy + i * n, i, n, g.d_qb + i * kChunk, g.d_qk + i * kChunk);
    pair_gradients(c, g.du + i * n, i - 1, n, g.d_ab + i * kChunk, g.d_ak + i * kChunk);
  }
  multiply<kChunk>(g.dy, c.s, n, g.r_state);
  multiply<kChunk>(g.du, c.s, n, g.a_state);
  multiply<kChunk>(c.v, g.ds, n, g.k_state);
  multiply<kChunk>(c.u, g.ds, n, g.b_state);
  for (int column = 0; column < n; column += kLanes) {
    Vec sum = {};
    for (int i = 0; i < n; ++i) sum += load(c.s + i * n + column) * load(g.ds + i * n + column);
    store(g.decay + column, sum);
  }
  for (int column = 0; column < n; column += kLanes) decay_gradients(c, g, n, column);
  update_state<kChunk>(c.decay, g.dh, {{c.r_start, g.dy}, {c.a_start, g.du}}, n, g.dh, g.ds);
}

// One group of chunks of one head with T tokens. Enters with the gradient of the state after it in g.dh, g.ds.
void backward_group(const Inputs& in, const Sizes& sizes, size_t start, int T, int first_chunk, int n_chunks,
                    const float* checkpoint, const float* dy, const Gradients& out, int n, const Chunk* chunks,
                    const ChunkGradients& g) {
  const int N = sizes.N;
  const size_t stride = sizes.stride();
  const auto rows_of = [&](int i) {
    const int left = T - (first_chunk + i) * kChunk;
    return left < kChunk ? left : kChunk;
  };
  const auto offset_of = [&](int i) { return start + (first_chunk + i) * kChunk * stride; };

  std::memset(chunks[0].h, 0, square(n) * sizeof(float));
  store_rows(checkpoint, N, N, N, n, chunks[0].h);
  transpose_matrix(chunks[0].h, n, chunks[0].s);
  for (int i = 0; i < n_chunks; ++i) {
    const Chunk& c = chunks[i];
    prepare_chunk<kChunk>(in, offset_of(i), stride, rows_of(i), N, n, c);
    if (i + 1 < n_chunks) {
      const size_t next = offset_of(i + 1);
      const int rows = rows_of(i + 1);
      for (const float* rows_from : {in.r, in.w, in.k}) prefetch_rows<0>(rows_from + next, stride, rows, N);
      compute_u<kChunk>(c, n);
      for (const float* rows_from : {in.v, in.a, in.b}) prefetch_rows<0>(rows_from + next, stride, rows, N);
      update_state<kChunk>(c.decay, c.h, {{c.k_end, c.v}, {c.b_end, c.u}}, n, chunks[i + 1].h, chunks[i + 1].s);
    } else {
      prefetch_rows<0>(dy + offset_of(i), stride, rows_of(i), N);
      compute_u<kChunk>(c, n);
    }
  }
  for (int i = n_chunks - 1; i >= 0; --i) {
    const size_t offset = offset_of(i);
    const int rows = rows_of(i);
    load_rows<kChunk>(dy + offset, stride, rows, N, n, g.dy);
    if (i > 0) prefetch_rows<0>(dy + offset_of(i - 1), stride, rows_of(i - 1), N);
    for (float* rows_to : {out.r, out.w, out.k, out.v, out.a, out.b})
      prefetch_rows<1>(rows_to + offset, stride, rows, N);
    backward_chunk(chunks[i], g, n);
    store_rows(g.dr, n, rows, N, stride, out.r + offset);
    store_rows(g.dw, n, rows, N, stride, out.w + offset);
    store_rows(g.dk, n, rows, N, stride, out.k + offset);
    store_rows(g.dv, n, rows, N, stride, out.v + offset);
    store_rows(g.da, n, rows, N, stride, out.a + offset);
    store_rows(g.db, n, rows, N, stride, out.b + offset);
  }
}

template <int kFixed>
void backward_heads(const Inputs& in, const Sizes& sizes, int first, int count, const float* checkpoints,
                    const float* dy, const float* d_final, const Gradients& out, float* d_state) {
  const int N = sizes.N, n = kFixed ? kFixed : padded(N);
  Arena arena(thread_workspace(kGroup * chunk_floats(n) + rows_floats(n) + 2 * count * square(n) + 16));
  Chunk chunks[kGroup];
  for (Chunk& c : chunks) c = take_chunk(arena, n);
  ChunkGradients g = take_gradients(arena, n);
  float* const d_states = arena.take(2 * count * square(n));
  const auto take_state = [&](int i) {
    g.dh = d_states + 2 * i * square(n);
    g.ds = g.dh + square(n);
  };
  for (int i = 0; i < count; ++i) {
    take_state(i);
    std::memset(g.ds, 0, square(n) * sizeof(float));
    store_rows(d_final + (first + i) * square(N), N, N, N, n, g.ds);
    transpose_matrix(g.ds, n, g.dh);
  }
  const int T = sizes.length(first), n_chunks = (T + kChunk - 1) / kChunk;
  for (int group = (n_chunks + kGroup - 1) / kGroup - 1; group >= 0; --group)
    for (int i = 0; i < count; ++i) {
      take_state(i);
      const int chunk = group * kGroup;
      backward_group(in, sizes, sizes.start(first + i), T, chunk, n_chunks - chunk < kGroup ? n_chunks - chunk : kGroup,
                     checkpoints + sizes.checkpoint(first + i, group), dy, out, n, chunks, g);
    }
  for (int i = 0; i < count; ++i) {
    take_state(i);
    store_rows(g.ds, n, N, N, N, d_state + (first + i) * square(N));
  }
}

}  // namespace

// Tokens from one checkpoint to the next; checkpoints are [T / this + S, H, N, N].
RWKV_EXPORT int rwkv_wkv7_checkpoint_tokens() { return kCheckpointTokens; }

// checkpoints may be null where no backward pass follows.
RWKV_EXPORT void rwkv_wkv7_forward(int S, int H, int N, const int64_t* cu_seqlens, const float* r, const float* w, const float* k,
                                   const float* v, const float* a, const float* b, const float* state, float* y,
                                   float* final_state, float* checkpoints, int n_threads) {
  const Inputs in{r, w, k, v, a, b};
  const Sizes sizes{{S, cu_seqlens}, H, N};
  const auto run = N == kUsualHeadSize ? forward_heads<kUsualHeadSize> : forward_heads<0>;
  for_each_block(sizes, n_threads,
                 [&](int first, int count) { run(in, sizes, first, count, state, y, final_state, checkpoints); });
}

RWKV_EXPORT void rwkv_wkv7_backward(int S, int H, int N, const int64_t* cu_seqlens, const float* r, const float* w, const float* k,
                                    const float* v, const float* a, const float* b, const float* checkpoints,
                                    const float* dy, const float* d_final, float* dr, float* dw, float* dk, float* dv,
                                    float* da, float* db, float* d_state, int n_threads) {
  const Inputs in{r, w, k, v, a, b};
  const Gradients out{dr, dw, dk, dv, da, db};
  const Sizes sizes{{S, cu_seqlens}, H, N};
  const auto run = N == kUsualHeadSize ? backward_heads<kUsualHeadSize> : backward_heads<0>;
  for_each_block(sizes, n_threads,
                 [&](int first, int count) { run(in, sizes, first, count, checkpoints, dy, d_final, out, d_state); });
}
