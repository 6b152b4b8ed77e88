// The RWKV-5 and RWKV-6 recurrences on a GPU: forward, backward and one token at a time, any length, any decay <= 1.
//
//   y_t = (S_{t-1} + v_t (u * k_t)^T) r_t,   S_t = S_{t-1} diag(d_t) + v_t k_t^T,   d = exp(w), S is [value, key]
//
// RWKV-6 has a decay for each token (w is [T, H, N]), RWKV-5 one for all of them (w is [H, N]; kStatic below).
// Layout in memory, in registers and in shared memory: gpu_heads.cuh. Gradients that are sums over tokens (of u, and of
// w in RWKV-5) are [S, H, N]: one row for each head of a sequence. Everything inside is float32.
//
// Forward. Rows of the state know nothing of each other: a block takes 32 of a head through all tokens of a sequence
// (2 kN threads). Tokens come in batches of 8, two buffers of them in shared memory and the next in registers, so a
// batch costs one barrier. y of 2 or 4 tokens is summed over lanes at once, so that few shuffles leave a number in each
// lane. Before every 16th token the state goes to memory, as a checkpoint.
//
// Backward. With G the gradient of S_t, which goes back in time as G diag(d) + dy r^T:
//   dr = S_{t-1}^T dy + u k (dy.v)    dk = G^T v + u r (dy.v)    dv = G k + dy (r.(u k))    du += r k (dy.v)
//   dw = d * column sums of G * S_{t-1}
// so d/dw is a sum of what passes through the decay, without cancellation, and nothing is ever divided by a decay.
// The states come once more from the checkpoints: the second 8 tokens of 16 find theirs by going through the first 8,
// the state before 8 tokens stays in shared memory, and leads to those before 4 and 2 tokens, in registers. That makes
// twice the work of the forward update. Sums over rows go through shared memory, those of two tokens at a time.
// A block takes a whole head back, with 64 threads up to N = 32 and 256 up to 64. Beyond that it takes 32 rows, with
// 256 threads: what the blocks of a head have to add up goes to the workspace, and `add_parts_kernel` adds it in a
// fixed order.
//
// Shared memory of a block, in KB: forward 9, 15, 28, backward 11, 40, 57 for kN = 32, 64, 128; RWKV-5 a little less in
// the backward pass. Workspace: where N > 64, 3 T H N + S H N floats for every 32 rows of a head; RWKV-5 2 T H N and
// 2 S H N.

#pragma once

#include "gpu_heads.cuh"

namespace rwkv {

struct Inputs {
  const void* r;
  const float* w;
  const void *k, *v;
  const float* u;
};

constexpr int kMostParts = 4;  // blocks that share out a head
constexpr int kBadValue = 1;   // cudaErrorInvalidValue

inline bool can_run(const Heads& heads) {
  return heads.dtype >= kFloat32 && heads.dtype <= kFloat16 && is_head_size(heads.N) && heads.S >= 0 && heads.H >= 0 &&
         heads.T >= 0 && static_cast<int64_t>(heads.S) * heads.H * kMostParts <= 0x7fffffff;
}

inline dim3 blocks_of(const Heads& heads, int parts) { return dim3(static_cast<unsigned>(heads.S * heads.H * parts)); }

// ---------------------------------------------------------------------------------------------- tokens on their way

// What the tokens of a head have in common, in shared memory.
template <int kN>
struct HeadRows {
  static constexpr int kFloats = 3 * kN;
  float *u, *d, *d_last;  // [kN]; d is RWKV-5's exp(w), d_last that of the last token of a batch

  __device__ explicit HeadRows(float* memory) : u(memory), d(memory + kN), d_last(memory + 2 * kN) {}
};

template <int kThreads, bool kStatic, int kN>
__device__ __forceinline__ void put_head(const Inputs& in, int head, int N, const HeadRows<kN>& rows) {
  for (int j = static_cast<int>(threadIdx.x); j < kN; j += kThreads) {
    rows.u[j] = j < N ? in.u[head * N + j] : 0.f;
    if (!kStatic) continue;
    const float w = j < N ? in.w[head * N + j] : 0.f, d = decay_of(w);
    rows.d[j] = d;
    // A decay near 1 that is rounded the same way at each of a thousand tokens is wrong in the fifth digit after them.
    // So every batch's last token makes up for what was rounded off at all of them, which `1 - d` and expm1f(w) tell.
    rows.d_last[j] = d > 0.5f ? d + kBatchTokens * ((1.f - d) + expm1f(w)) : d;
  }
}

// A batch of tokens in shared memory. Tokens that are not there have decay 1 and nothing else.
template <int kN, int kRows>
struct Batch {
  static constexpr int kFloats = kBatchTokens * (3 * kN + 2 * kRows + 2);
  float *r, *d, *k;     // [kBatchTokens, kN]
  float *v, *dy;        // [kBatchTokens, kRows]: of the block's rows
  float *bonus, *dy_v;  // [kBatchTokens]: r.(u k) and dy.v, the latter of the block's rows

  __device__ explicit Batch(float* memory) {
    r = memory;
    d = r + kBatchTokens * kN;
    k = d + kBatchTokens * kN;
    v = k + kBatchTokens * kN;
    bonus = v + kBatchTokens * kRows;
    dy_v = bonus + kBatchTokens;  // forward needs no more than the bonus
    dy = dy_v + kBatchTokens;
  }
  static constexpr int kForwardFloats = kFloats - kBatchTokens * kRows;
};

// sums[t] = sum_j x[t][j] y[t][j] weights[j] of a batch's rows, without weights where they are null. A thread
// multiplies the 4 elements that `Rows` let it put there itself, so there need be no barrier before.
template <int kWidth, int kThreads>
__device__ __forceinline__ void put_products(const float* x, const float* y, const float* weights, float* sums) {
  constexpr int kLanes = kWidth / 4;
  static_assert(kBatchTokens * kLanes <= kThreads, "no thread has put more than one");
  const int four = static_cast<int>(threadIdx.x);
  const bool has_four = four < kBatchTokens * kLanes;
  float a[4], b[4], c[4] = {1.f, 1.f, 1.f, 1.f}, sum[1] = {0.f};
  if (has_four) {
    read_four(x, four * 4, a);
    read_four(y, four * 4, b);
    if (weights != nullptr) read_four(weights, four % kLanes * 4, c);
#pragma unroll
    for (int j = 0; j < 4; ++j) sum[0] += a[j] * (c[j] * b[j]);
  }
  const float product = sum_lanes<1, kLanes>(sum);
  if (has_four && four % kLanes == 0) sums[four / kLanes] = product;
}

// A batch of inputs, and of dy for the backward pass, on its way from global to shared memory.
template <int kN, int kRows, int kThreads, bool kStatic, bool kBackward>
struct Fetched {
  Rows<kN, kThreads> r, w, k;
  Rows<kRows, kThreads> v, dy;

  // `token` counts in the sequence; of the batch n tokens are there, none if n <= 0.
  __device__ __forceinline__ void fetch(const Heads& heads, const Task& task, const Inputs& in, const void* d_outputs,
                                        int64_t token, int64_t n) {
    const int64_t first = heads.row(task.first_token + token, task.head), stride = heads.row_stride();
    const int rows = heads.N - task.first_row;
    r.fetch(in.r, heads.dtype, first, stride, n, heads.N);
    if (!kStatic) w.fetch(in.w, kFloat32, first, stride, n, heads.N);
    k.fetch(in.k, heads.dtype, first, stride, n, heads.N);
    v.fetch(in.v, heads.dtype, first + task.first_row, stride, n, rows);
    if (kBackward) dy.fetch(d_outputs, heads.dtype, first + task.first_row, stride, n, rows);
  }

  __device__ __forceinline__ void put(int dtype, const HeadRows<kN>& head, const Batch<kN, kRows>& batch,
                                      int64_t n) const {
    r.put(dtype, batch.r);
    k.put(dtype, batch.k);
    v.put(dtype, batch.v);
    if (kStatic) {
      const int rows = static_cast<int>(n < kBatchTokens ? n : kBatchTokens);
      for (int i = not_before(static_cast<int>(threadIdx.x)); i < kBatchTokens * kN; i += kThreads)
        batch.d[i] = i >= rows * kN ? 1.f : i < (kBatchTokens - 1) * kN ? head.d[i % kN] : head.d_last[i % kN];
    } else {
      w.put_decay(kFloat32, batch.d);
    }
    put_products<kN, kThreads>(batch.r, batch.k, head.u, batch.bonus);
    if (kBackward) {
      dy.put(dtype, batch.dy);
      put_products<kRows, kThreads>(batch.dy, batch.v, nullptr, batch.dy_v);
    }
  }
};

__device__ __forceinline__ void add_four(float* to, const float (&x)[4]) {
  float sum[4];
  read_four(to, 0, sum);
#pragma unroll
  for (int j = 0; j < 4; ++j) sum[j] += x[j];
  write_four(to, 0, sum);
}

// s = s diag(d) + v k^T.
__device__ __forceinline__ void add_token(const float (&d)[4], const float (&v)[4], const float (&k)[4],
                                          float (&s)[4][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) s[i][j] = s[i][j] * d[j] + v[i] * k[j];
}

__device__ __forceinline__ void copy_tile(const float (&from)[4][4], float (&to)[4][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) to[i][j] = from[i][j];
}

// Takes s over token t of a batch.
template <int kN, int kRows>
__device__ __forceinline__ void advance(const Batch<kN, kRows>& batch, const Tile<kN>& tile, int t, float (&s)[4][4]) {
  float d[4], k[4], v[4];
  read_four(batch.d, t * kN + tile.column, d);
  read_four(batch.k, t * kN + tile.column, k);
  read_four(batch.v, t * kRows + tile.row, v);
  add_token(d, v, k, s);
}

// ---------------------------------------------------------------------------------------------- forward

constexpr int kForwardRows = 32;

template <int kN>
struct ForwardBlock {
  static constexpr int kThreads = kForwardRows * kN / 16;
  static constexpr int kTogether = kN == 32 ? 2 : 4;  // tokens whose y are summed over lanes in one go
  static constexpr int kBatchFloats = Batch<kN, kForwardRows>::kForwardFloats;
  static constexpr size_t kSharedBytes = sizeof(float) * (HeadRows<kN>::kFloats + 2 * kBatchFloats);
};

// checkpoints may be null.
template <int kN, bool kStatic>
__global__ void __launch_bounds__(ForwardBlock<kN>::kThreads, 512 / ForwardBlock<kN>::kThreads)
    forward_kernel(Heads heads, Inputs in, const float* state, void* y, float* final_state, float* checkpoints) {
  using Block = ForwardBlock<kN>;
  constexpr int kThreads = Block::kThreads, kTogether = Block::kTogether;
  const Tile<kN> tile;
  const Task task = task_of_block(heads, kForwardRows);
  const int N = heads.N, row = task.first_row + tile.row;
  float* const memory = shared_memory();
  const HeadRows<kN> head(memory);
  put_head<kThreads, kStatic>(in, task.head, N, head);
  __syncthreads();

  float s[4][4];
  load_tile(state + heads.state(task.s, task.head), N, row, tile.column, s);
  Fetched<kN, kForwardRows, kThreads, kStatic, false> next;
  next.fetch(heads, task, in, nullptr, 0, task.n_tokens);
  for (int64_t first = 0; first < task.n_tokens; first += kBatchTokens) {
    const int64_t n = task.n_tokens - first;
    const int buffer = static_cast<int>(first / kBatchTokens % 2);
    const Batch<kN, kForwardRows> batch(memory + HeadRows<kN>::kFloats + buffer * Block::kBatchFloats);
    next.put(heads.dtype, head, batch, n);
    __syncthreads();  // all threads are here: none reads the other buffer any more
    next.fetch(heads, task, in, nullptr, first + kBatchTokens, n - kBatchTokens);
    if (checkpoints != nullptr && first % kGroupTokens == 0)
      store_tile(s, N, row, tile.column,
                 checkpoints + heads.state(task.first_checkpoint + first / kGroupTokens, task.head));

    for (int t = 0; t < kBatchTokens && t < n; t += kTogether) {
      float sums[4 * kTogether];
#pragma unroll
      for (int q = 0; q < kTogether; ++q) {
        float r[4];
        read_four(batch.r, (t + q) * kN + tile.column, r);
        row_parts(s, r, sums + 4 * q);
        advance(batch, tile, t + q, s);
      }
      const float sum = sum_lanes<4 * kTogether, Tile<kN>::kLanes>(sums);
      const int mine = tile.lane % Tile<kN>::kLanes, token = t + mine / 4, i = mine % 4;
      if (mine < 4 * kTogether && token < n && row < N)
        store(y, heads.row(task.first_token + first + token, task.head) + row + i,
              sum + batch.bonus[token] * batch.v[token * kForwardRows + tile.row + i], heads.dtype);
    }
  }
  store_tile(s, N, row, tile.column, final_state + heads.state(task.s, task.head));
  if (checkpoints != nullptr && task.n_spare > 0) {
    const float zero[4][4] = {};
    store_tile(zero, N, row, tile.column,
               checkpoints + heads.state(task.first_checkpoint + task.n_groups(), task.head));
  }
}

template <bool kStatic>
int forward(const Heads& heads, const Inputs& in, const float* state, void* y, float* final_state, float* checkpoints,
            void* stream) {
  if (!can_run(heads)) return kBadValue;
  if (heads.S == 0 || heads.H == 0) return 0;
  const dim3 grid = blocks_of(heads, parts_of_head(heads.N, kForwardRows));
  return for_head_size(heads.N, [&](auto size) {
    constexpr int kN = decltype(size)::value;
    using Block = ForwardBlock<kN>;
    return launch(forward_kernel<kN, kStatic>, grid, dim3(Block::kThreads), Block::kSharedBytes, stream, heads, in,
                  state, y, final_state, checkpoints);
  });
}

// ---------------------------------------------------------------------------------------------- one token

// r, w, k, v, y are [S, H, N]. The states are read and written once; they may be the same.
template <int kN, bool kStatic>
__global__ void __launch_bounds__(ForwardBlock<kN>::kThreads)
    step_kernel(Heads heads, Inputs in, const float* state, void* y, float* final_state) {
  const Tile<kN> tile;
  const Task task = task_of_block(heads, kForwardRows);
  const int N = heads.N, row = task.first_row + tile.row, column = tile.column;
  const int64_t first = heads.row(task.s, task.head), first_of_head = static_cast<int64_t>(task.head) * N;
  float s[4][4], r[4] = {}, d[4] = {}, k[4] = {}, v[4] = {}, sums[4], bonus = 0.f;
  load_tile(state + heads.state(task.s, task.head), N, row, column, s);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (row < N) v[j] = load(in.v, first + row + j, heads.dtype);
    if (column >= N) continue;
    r[j] = load(in.r, first + column + j, heads.dtype);
    d[j] = decay_of(in.w[(kStatic ? first_of_head : first) + column + j]);
    k[j] = load(in.k, first + column + j, heads.dtype);
    bonus += r[j] * (in.u[first_of_head + column + j] * k[j]);
  }
  row_parts(s, r, sums);
#pragma unroll
  for (int i = 0; i < 4; ++i) sums[i] += v[i] * bonus;
  add_token(d, v, k, s);
  store_tile(s, N, row, column, final_state + heads.state(task.s, task.head));
  const float sum = sum_lanes<4, Tile<kN>::kLanes>(sums);
  const int i = tile.lane % Tile<kN>::kLanes;
  if (i < 4 && row < N) store(y, first + row + i, sum, heads.dtype);
}

template <bool kStatic>
int step(const Heads& heads, const Inputs& in, const float* state, void* y, float* final_state, void* stream) {
  if (!can_run(heads)) return kBadValue;
  if (heads.S == 0 || heads.H == 0) return 0;
  const dim3 grid = blocks_of(heads, parts_of_head(heads.N, kForwardRows));
  return for_head_size(heads.N, [&](auto size) {
    constexpr int kN = decltype(size)::value;
    return launch(step_kernel<kN, kStatic>, grid, dim3(ForwardBlock<kN>::kThreads), 0, stream, heads, in, state, y,
                  final_state);
  });
}

// ---------------------------------------------------------------------------------------------- backward

// Where gradients go. Those of r, w, k, u are sums over all rows of a head: where several blocks share them out, part p
// of each is p tensors further on, in the workspace.
struct Gradients {
  void* r;
  float* w;
  void *k, *v;
  float* u;
  int sums_dtype;  // of r and k
};

template <int kN, bool kStatic>
struct BackwardBlock {
  static constexpr int kRows = kN == 64 ? 64 : 32;
  static constexpr bool kIsWhole = kRows == kN;  // it has all rows of a head
  static constexpr int kThreads = kRows * kN / 16;
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int kTogether = 2;            // tokens whose sums are in shared memory together
  static constexpr int kSums = kStatic ? 2 : 3;  // of the columns, for each token: for r, k and, unless static, w
  static constexpr int kKeptFloats = kRows * kN;
  static constexpr int kSumFloats = kTogether * kSums * kWarps * kN;
  static constexpr int kDwFloats = kStatic ? 4 * kThreads : 0;
  static constexpr size_t kSharedBytes =
      sizeof(float) * (HeadRows<kN>::kFloats + Batch<kN, kRows>::kFloats + kKeptFloats + kSumFloats + kDwFloats);
  static_assert(kTogether * kN <= kThreads, "a thread for each column of each token");
  static_assert(kSharedBytes <= kMaxSharedBytes, "more than every chip has");
};

// Takes g from the gradient of the state after token t to that of the state s before it. Leaves this warp's sums of
// columns in sums, [kSums, kWarps, kN] from this warp's place in the first, and this thread's parts of dv without the
// bonus in dv. For RWKV-5 it adds what passes through the decay to this thread's 4 numbers in dw.
template <int kN, bool kStatic>
__device__ __forceinline__ void walk_back(const Batch<kN, BackwardBlock<kN, kStatic>::kRows>& batch,
                                          const Tile<kN>& tile, int t, bool is_there, const float (&s)[4][4],
                                          float (&g)[4][4], float* sums, float* dv, float* dw) {
  using Block = BackwardBlock<kN, kStatic>;
  constexpr int kNextSum = Block::kWarps * kN;
  float r[4], d[4], k[4], v[4], dy[4], columns[4];
  read_four(batch.dy, t * Block::kRows + tile.row, dy);
  column_parts(s, dy, columns);
  put_column_sums(tile, columns, sums);

  read_four(batch.v, t * Block::kRows + tile.row, v);
  column_parts(g, v, columns);
  put_column_sums(tile, columns, sums + kNextSum);

#pragma unroll
  for (int j = 0; j < 4; ++j)
    columns[j] = (g[0][j] * s[0][j] + g[1][j] * s[1][j]) + (g[2][j] * s[2][j] + g[3][j] * s[3][j]);
  if constexpr (kStatic) {
    if (is_there) add_four(dw, columns);  // else its decay is not that of the head
  } else {
    put_column_sums(tile, columns, sums + 2 * kNextSum);
  }

  read_four(batch.k, t * kN + tile.column, k);
  row_parts(g, k, dv);
  read_four(batch.d, t * kN + tile.column, d);
  read_four(batch.r, t * kN + tile.column, r);
  add_token(d, dy, r, g);
}

template <int kN, bool kStatic>
__global__ void __launch_bounds__(BackwardBlock<kN, kStatic>::kThreads, 512 / BackwardBlock<kN, kStatic>::kThreads)
    backward_kernel(Heads heads, Inputs in, const float* checkpoints, const void* dy, const float* d_final,
                    Gradients out, float* d_state) {
  using Block = BackwardBlock<kN, kStatic>;
  constexpr int kRows = Block::kRows, kThreads = Block::kThreads, kWarps = Block::kWarps;
  constexpr int kTokenSums = Block::kSums * kWarps * kN;
  const Tile<kN> tile;
  const Task task = task_of_block(heads, kRows);
  const int N = heads.N, row = task.first_row + tile.row;

  float* const memory = shared_memory();
  const HeadRows<kN> head(memory);
  const Batch<kN, kRows> batch(memory + HeadRows<kN>::kFloats);
  float* const kept = memory + HeadRows<kN>::kFloats + Batch<kN, kRows>::kFloats;  // the state before the batch
  float* const sums = kept + Block::kKeptFloats;                                   // [kTogether, kSums, kWarps, kN]
  // RWKV-5: dw without the decay, of this thread's rows and columns and all tokens. There is no register for it.
  float* const dw = sums + Block::kSumFloats + 4 * threadIdx.x;
  put_head<kThreads, kStatic>(in, task.head, N, head);
  if (kStatic) write_four(dw, 0, {0.f, 0.f, 0.f, 0.f});

  float g[4][4];
  load_tile(d_final + heads.state(task.s, task.head), N, row, tile.column, g);
  Fetched<kN, kRows, kThreads, kStatic, true> next;
  float du = 0.f;  // of this thread's column and every second token

  // Batches of tokens from the last one to the first.
  for (int64_t first = (task.n_tokens + kBatchTokens - 1) / kBatchTokens * kBatchTokens - kBatchTokens; first >= 0;
       first -= kBatchTokens) {
    const int64_t group = first / kGroupTokens, first_of_group = group * kGroupTokens;
    float s[4][4];
    next.fetch(heads, task, in, dy, first_of_group, task.n_tokens - first_of_group);
    load_tile(checkpoints + heads.state(task.first_checkpoint + group, task.head), N, not_before(row),
              not_before(tile.column), s);
    if (first > first_of_group) {  // the second batch: its first state comes from the first one
      __syncthreads();             // nobody reads the last batch any more
      next.put(heads.dtype, head, batch, kBatchTokens);
      next.fetch(heads, task, in, dy, first, task.n_tokens - first);
      __syncthreads();
#pragma unroll 2
      for (int t = 0; t < kBatchTokens; ++t) advance(batch, tile, t, s);
    }
    keep_tile<kThreads>(s, kept);
    __syncthreads();
    next.put(heads.dtype, head, batch, task.n_tokens - first);
    __syncthreads();

    const int64_t position = heads.row(task.first_token + first, task.head);
    const int n = static_cast<int>(task.n_tokens - first < kBatchTokens ? task.n_tokens - first : kBatchTokens);
    for (int four = (n - 1) / 4 * 4; four >= 0; four -= 4) {
      float start[4][4];
      take_tile<kThreads>(kept, start);
      for (int t = 0; t < four; ++t) advance(batch, tile, t, start);
#pragma unroll 1
      for (int pair = four + 2; pair >= four; pair -= 2) {
        if (pair >= n) continue;
        float before[2][4][4], dv[8];
        copy_tile(start, before[0]);
        for (int t = four; t < pair; ++t) advance(batch, tile, t, before[0]);
        copy_tile(before[0], before[1]);
        advance(batch, tile, pair, before[1]);
        __syncthreads();  // the sums of the last pair are read
#pragma unroll
        for (int q = 1; q >= 0; --q)
          walk_back<kN, kStatic>(batch, tile, pair + q, pair + q < n, before[q], g,
                                 sums + q * kTokenSums + tile.warp * kN, dv + 4 * q, dw);
        const float sum = sum_lanes<8, Tile<kN>::kLanes>(dv);
        const int mine = not_before(tile.lane) % Tile<kN>::kLanes, token = pair + mine / 4, i = mine % 4;
        if (mine < 8 && token < n && row < N)
          store(out.v, position + token * heads.row_stride() + row + i,
                sum + batch.bonus[token] * batch.dy[token * kRows + tile.row + i], heads.dtype);
        __syncthreads();

        const int thread = not_before(static_cast<int>(threadIdx.x));
        if (thread >= Block::kTogether * kN) continue;
        const int q = thread / kN, column = thread % kN, t = pair + q;
        const float* const columns = sums + q * kTokenSums + column;
        const float r = batch.r[t * kN + column], k = batch.k[t * kN + column], dy_v = batch.dy_v[t];
        const float own = head.u[column] * dy_v;  // of the token with itself: no decay between
        du += r * k * dy_v;
        if (t >= n || column >= N) continue;
        const int64_t first_of_part = Block::kIsWhole ? 0 : not_before(task.part) * heads.row(heads.T, 0);
        const int64_t at = first_of_part + position + t * heads.row_stride() + column;
        store(out.r, at, sum_warps<kWarps>(columns, kN) + own * k, out.sums_dtype);
        store(out.k, at, sum_warps<kWarps>(columns + kWarps * kN, kN) + own * r, out.sums_dtype);
        if (!kStatic) out.w[at] = batch.d[t * kN + column] * sum_warps<kWarps>(columns + 2 * kWarps * kN, kN);
      }
    }
  }
  store_tile(g, N, row, tile.column, d_state + heads.state(task.s, task.head));

  __syncthreads();  // the head's u and d are there, even if it has no tokens, and the sums are read
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < Block::kTogether * kN) batch.r[thread] = du;
  if constexpr (kStatic) {
    float columns[4];
    read_four(dw, 0, columns);
    put_column_sums(tile, columns, sums + tile.warp * kN);
  }
  __syncthreads();
  if (thread < N) {
    const int64_t at = ((static_cast<int64_t>(task.part) * heads.S + task.s) * heads.H + task.head) * N + thread;
    out.u[at] = batch.r[thread] + batch.r[kN + thread];
    if (kStatic) out.w[at] = head.d[thread] * sum_warps<kWarps>(sums + thread, kN);
  }
}

constexpr int kAddThreads = 256;

// sums[i] = parts[0][i] + parts[1][i] + ..
__global__ void __launch_bounds__(kAddThreads)
    add_parts_kernel(const float* parts, int n_parts, int64_t count, void* sums, int dtype) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kAddThreads + threadIdx.x;
  if (i >= count) return;
  float sum = parts[i];
  for (int part = 1; part < n_parts; ++part) sum += parts[part * count + i];
  store(sums, i, sum, dtype);
}

inline int add_parts(const float* parts, int n_parts, int64_t count, void* sums, int dtype, void* stream) {
  if (count == 0) return 0;
  const dim3 grid(static_cast<unsigned>((count + kAddThreads - 1) / kAddThreads));
  return launch(add_parts_kernel, grid, dim3(kAddThreads), 0, stream, parts, n_parts, count, sums, dtype);
}

// Parts of a head that blocks of the backward pass share out.
inline int backward_parts(int N) { return N <= 64 ? 1 : parts_of_head(N, BackwardBlock<128, false>::kRows); }

// Floats of the gradients of r, w, k, u, of one part.
template <bool kStatic>
int64_t floats_of_part(int S, int64_t T, int H, int N) {
  const int64_t by_token = T * H * N, by_sequence = static_cast<int64_t>(S) * H * N;
  return kStatic ? 2 * by_token + 2 * by_sequence : 3 * by_token + by_sequence;
}

template <bool kStatic>
int64_t workspace_bytes(bool is_backward, int S, int64_t T, int H, int N) {
  const int parts = backward_parts(N);
  if (!is_backward || parts == 1) return 0;
  return parts * floats_of_part<kStatic>(S, T, H, N) * static_cast<int64_t>(sizeof(float));
}

template <bool kStatic>
int backward(const Heads& heads, const Inputs& in, const float* checkpoints, const void* dy, const float* d_final,
             const Gradients& out, float* d_state, void* workspace, void* stream) {
  if (!can_run(heads)) return kBadValue;
  if (heads.S == 0 || heads.H == 0) return 0;
  const int parts = backward_parts(heads.N);
  const int64_t by_token = heads.T * heads.H * heads.N, by_sequence = static_cast<int64_t>(heads.S) * heads.H * heads.N;
  const int64_t of_w = kStatic ? by_sequence : by_token;
  float* const r_parts = static_cast<float*>(workspace);
  float* const k_parts = r_parts + parts * by_token;
  float* const w_parts = k_parts + parts * by_token;
  float* const u_parts = w_parts + parts * of_w;
  const Gradients written = parts == 1 ? out : Gradients{r_parts, w_parts, k_parts, out.v, u_parts, kFloat32};

  int code = for_head_size(heads.N, [&](auto size) {
    constexpr int kN = decltype(size)::value;
    using Block = BackwardBlock<kN, kStatic>;
    return launch(backward_kernel<kN, kStatic>, blocks_of(heads, parts), dim3(Block::kThreads),
                  Block::kSharedBytes, stream, heads, in, checkpoints, dy, d_final, written, d_state);
  });
  if (parts == 1) return code;
  if (code == 0) code = add_parts(r_parts, parts, by_token, out.r, heads.dtype, stream);
  if (code == 0) code = add_parts(k_parts, parts, by_token, out.k, heads.dtype, stream);
  if (code == 0) code = add_parts(w_parts, parts, of_w, out.w, kFloat32, stream);
  if (code == 0) code = add_parts(u_parts, parts, by_sequence, out.u, kFloat32, stream);
  return code;
}

}  // namespace rwkv
