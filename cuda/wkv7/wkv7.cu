// The RWKV-7 recurrence on a GPU in its exact form: forward, backward and one step, token by token in float32, any head
// size up to 128, any length, any decay <= 1.
//
//   S_t = S_{t-1} diag(d_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T,   y_t = S_t r_t,   d = exp(w), S is [value, key]
//
// Layout: common/gpu_heads.cuh says how tensors lie in memory and a state in registers, 4 x 4 elements a thread. kN is
// the head size N padded to 32, 64 or 128.
//
// Forward. The rows of a state do not need each other, so a block takes 32 of them (16 where kN is 128) of one head of
// one sequence through all its tokens, with a warp for every 16, 8 or 4 rows. Inputs come through shared memory in
// batches of kBatchTokens, the next one on its way while one is computed; there is a barrier a batch and none a token.
// What the next token removes, S_t a_{t+1}, is a product with the same state as y_t, so that both are summed over lanes
// in one go: one chain of shuffles a token. Every kGroupTokens tokens the state is kept as a checkpoint.
//
// Backward. With G the gradient of S_t, which has what came from later tokens and dy_t r_t^T, and u = S_{t-1} a_t:
//   dv = G k,  du = G b                                                      sums over columns, as above
//   dk = G^T v,  db = G^T u,  da = S_{t-1}^T du,  dr = S_t^T dy              sums over rows
//   d(log d) = d * column sums of (G * S_{t-1})                              the same; nothing cancels
//   G before the token = G diag(d) + du a^T
// Sums over rows are added up across the warps of a block through shared memory, with two barriers a token. A block of
// 8 warps has a whole head (2 warps do where kN is 32); where kN is 128 it has 32 rows, and leaves its share of the
// sums in the workspace, from where `add_parts_kernel` adds up those of a head.
// States are computed again from checkpoints, never divided back. A group of tokens between checkpoints is taken in
// halves of kBatchTokens, the later one first, and a half in quarters: the state before the half is kept in shared
// memory, those before kQuarter - 1 tokens of a quarter in registers. So the update of the state by a token is computed
// 2.3 times, and what it removes 1.5 times, on average.
//
// Shared memory of a block, in floats: forward 2 kBatchTokens (5 kN + 2 rows), backward
// kBatchTokens (5 kN + 4 rows) + 16 threads + 5 kN warps; at kN = 64 and 128 these are 24 and 42, 44 and 60 KB.
// Workspace: of the backward pass where N > 64, 5 T H N floats for every 32 rows of a head.

#include "../common/gpu_heads.cuh"

namespace {

using namespace rwkv;

// w is the logarithm of the decay, float32; the others are of the call's dtype.
struct Inputs {
  const void *r, *w, *k, *v, *a, *b;
};

template <int kN>
struct ForwardBlock {
  static constexpr int kWarps = kN == 32 ? 2 : 4;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kRows = kWarps * Tile<kN>::kRows;
  static constexpr int kResident = kN == 32 ? 8 : kN == 64 ? 4 : 3;  // blocks in a multiprocessor
};

template <int kN>
struct BackwardBlock {
  static constexpr int kWarps = kN == 32 ? 2 : 8;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kRows = kWarps * Tile<kN>::kRows;
  static constexpr bool kHasHead = kRows == kN;       // all its rows
  static constexpr int kResident = kN == 32 ? 6 : 2;  // as above
};

// s = s diag(d) + u b^T + v k^T
__device__ __forceinline__ void update(const float (&d)[4], const float (&k)[4], const float (&b)[4],
                                       const float (&u)[4], const float (&v)[4], float (&s)[4][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) s[i][j] = s[i][j] * d[j] + (u[i] * b[j] + v[i] * k[j]);
}

__device__ __forceinline__ void copy_tile(const float (&from)[4][4], float (&to)[4][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) to[i][j] = from[i][j];
}

// u = s a, in every lane that has the row.
template <int kN>
__device__ __forceinline__ void multiply(const float (&s)[4][4], const float (&a)[4], float (&u)[4]) {
  float sums[4];
  row_parts(s, a, sums);
  spread_four<4>(sum_lanes<4, Tile<kN>::kLanes>(sums), u);
}

// Four neighbours of a token's row in global memory, 0 beyond the head.
__device__ __forceinline__ void read_head(const void* x, int dtype, int64_t row, int at, int N, float (&four)[4]) {
  unpack(at < N ? fetch_four(x, row + at, dtype) : Packed{}, dtype, four);
}

// ---------------------------------------------------------------------------------------------- forward

// A batch of tokens in shared memory.
template <int kN>
struct ForwardBatch {
  static constexpr int kRows = ForwardBlock<kN>::kRows;
  static constexpr int kFloats = kBatchTokens * (5 * kN + 2 * kRows);
  float *r, *d, *k, *b, *a_next;  // [kBatchTokens, kN]; a_next is a of the token after each
  float *v, *y;                   // [kBatchTokens, kRows]

  __device__ explicit ForwardBatch(float* memory) {
    constexpr int kSize = kBatchTokens * kN;
    r = memory, d = r + kSize, k = d + kSize, b = k + kSize, a_next = b + kSize;
    v = a_next + kSize, y = v + kBatchTokens * kRows;
  }
};

// A batch on its way there.
template <int kN>
struct ForwardFetch {
  static constexpr int kThreads = ForwardBlock<kN>::kThreads;
  Rows<kN, kThreads> r, w, k, b, a_next;
  Rows<ForwardBlock<kN>::kRows, kThreads> v;

  __device__ __forceinline__ void fetch(const Heads& heads, const Inputs& in, const Task& task, int64_t first) {
    const int64_t row = heads.row(task.first_token + first, task.head), stride = heads.row_stride();
    const int64_t left = task.n_tokens - first;
    r.fetch(in.r, heads.dtype, row, stride, left, heads.N);
    w.fetch(in.w, kFloat32, row, stride, left, heads.N);
    k.fetch(in.k, heads.dtype, row, stride, left, heads.N);
    b.fetch(in.b, heads.dtype, row, stride, left, heads.N);
    a_next.fetch(in.a, heads.dtype, row + stride, stride, left - 1, heads.N);
    v.fetch(in.v, heads.dtype, row + task.first_row, stride, left, heads.N - task.first_row);
  }

  __device__ __forceinline__ void put(int dtype, const ForwardBatch<kN>& to) const {
    r.put(dtype, to.r);
    k.put(dtype, to.k);
    b.put(dtype, to.b);
    a_next.put(dtype, to.a_next);
    v.put(dtype, to.v);
    w.put_decay(kFloat32, to.d);
  }
};

template <int kN>
__global__ void __launch_bounds__(ForwardBlock<kN>::kThreads, ForwardBlock<kN>::kResident)
    forward_kernel(Heads heads, Inputs in, const float* state, void* y, float* final_state, float* checkpoints) {
  constexpr int kRows = ForwardBlock<kN>::kRows, kLanes = Tile<kN>::kLanes;
  const Task task = task_of_block(heads, kRows);
  const Tile<kN> tile;
  const int N = heads.N, row = task.first_row + tile.row;

  float s[4][4], u[4];
  load_tile(state + heads.state(task.s, task.head), N, row, tile.column, s);
  // Also where there are no tokens, of which nothing is read: behind a branch the compiler cannot tell that the state has
  // come, and waits for it at every token, and with it for the next batch.
  ForwardFetch<kN> next;
  float a[4];
  read_head(in.a, heads.dtype, heads.row(task.first_token, task.head), tile.column, task.n_tokens > 0 ? N : 0, a);
  multiply<kN>(s, a, u);
  next.fetch(heads, in, task, 0);
  next.put(heads.dtype, ForwardBatch<kN>(shared_memory()));
  __syncthreads();
  for (int64_t first = 0; first < task.n_tokens; first += kBatchTokens) {
    const int buffer = first / kBatchTokens % 2;
    const ForwardBatch<kN> batch(shared_memory() + buffer * ForwardBatch<kN>::kFloats);
    const int64_t left = task.n_tokens - first;
    if (left > kBatchTokens) next.fetch(heads, in, task, first + kBatchTokens);
    if (checkpoints != nullptr && first % kGroupTokens == 0)
      store_tile(s, N, row, tile.column,
                 checkpoints + heads.state(task.first_checkpoint + first / kGroupTokens, task.head));

    const int n_tokens = left < kBatchTokens ? static_cast<int>(left) : kBatchTokens;
    for (int t = 0; t < n_tokens; ++t) {
      float r[4], d[4], k[4], b[4], a_next[4], v[4], sums[8];
      read_four(batch.d, t * kN + tile.column, d);
      read_four(batch.k, t * kN + tile.column, k);
      read_four(batch.b, t * kN + tile.column, b);
      read_four(batch.v, t * kRows + tile.row, v);
      read_four(batch.a_next, t * kN + tile.column, a_next);
      read_four(batch.r, t * kN + tile.column, r);
      update(d, k, b, u, v, s);
      row_parts(s, a_next, sums);
      row_parts(s, r, sums + 4);
      const float sum = sum_lanes<8, kLanes>(sums);
      spread_four<8>(sum, u);
      if (tile.lane % kLanes / 4 == 1) batch.y[t * kRows + tile.row + tile.lane % 4] = sum;  // lanes 4..7 of a row
    }
    if (left > kBatchTokens)
      next.put(heads.dtype, ForwardBatch<kN>(shared_memory() + (1 - buffer) * ForwardBatch<kN>::kFloats));
    __syncthreads();
    store_rows<kRows, ForwardBlock<kN>::kThreads>(
        batch.y, n_tokens, N - task.first_row, y, heads.dtype,
        heads.row(task.first_token + first, task.head) + task.first_row, heads.row_stride());
  }
  store_tile(s, N, row, tile.column, final_state + heads.state(task.s, task.head));
  if (checkpoints != nullptr && task.n_spare > 0) {
    const float zeros[4][4] = {};
    store_tile(zeros, N, row, tile.column,
               checkpoints + heads.state(task.first_checkpoint + task.n_groups(), task.head));
  }
}

// One token for each sequence, straight from global memory. final_state may be state: a thread reads all that it
// writes over.
template <int kN>
__global__ void __launch_bounds__(ForwardBlock<kN>::kThreads)
    step_kernel(Heads heads, Inputs in, const float* state, void* y, float* final_state) {
  constexpr int kLanes = Tile<kN>::kLanes;
  const Task task = task_of_block(heads, ForwardBlock<kN>::kRows);
  const Tile<kN> tile;
  const int N = heads.N, row = task.first_row + tile.row;
  const int64_t at = heads.row(task.s, task.head), state_at = heads.state(task.s, task.head);

  float s[4][4], r[4], d[4], k[4], v[4], a[4], b[4], u[4], sums[4];
  load_tile(state + state_at, N, row, tile.column, s);
  read_head(in.r, heads.dtype, at, tile.column, N, r);
  read_head(in.w, kFloat32, at, tile.column, N, d);
  for (float& x : d) x = decay_of(x);
  read_head(in.k, heads.dtype, at, tile.column, N, k);
  read_head(in.v, heads.dtype, at, row, N, v);
  read_head(in.a, heads.dtype, at, tile.column, N, a);
  read_head(in.b, heads.dtype, at, tile.column, N, b);
  multiply<kN>(s, a, u);
  update(d, k, b, u, v, s);
  row_parts(s, r, sums);
  const float sum = sum_lanes<4, kLanes>(sums);
  store_tile(s, N, row, tile.column, final_state + state_at);
  if (tile.lane % kLanes < 4 && row < N) store(y, at + row + tile.lane % 4, sum, heads.dtype);
}

// ---------------------------------------------------------------------------------------------- backward

// Gradients that are sums over the rows of a state, in the order in which they are kept together.
enum ColumnSum { kDr, kDw, kDk, kDa, kDb, kColumnSums };

struct ColumnGradients {
  void* of[kColumnSums];

  // Indexed without an address, so that the pointers stay where parameters are.
  __device__ __forceinline__ void* operator[](int which) const {
    void* x = of[0];
#pragma unroll
    for (int i = 1; i < kColumnSums; ++i) x = which == i ? of[i] : x;
    return x;
  }
};

__device__ __forceinline__ int dtype_of(int which, int dtype) { return which == kDw ? kFloat32 : dtype; }

// What a block has in shared memory of half a group of tokens.
template <int kN>
struct BackwardHalf {
  static constexpr int kRows = BackwardBlock<kN>::kRows, kThreads = BackwardBlock<kN>::kThreads;
  static constexpr int kWarpSums = kColumnSums * kN;  // that a warp leaves for a token
  static constexpr int kFloats =
      kBatchTokens * (5 * kN + 4 * kRows) + 16 * kThreads + BackwardBlock<kN>::kWarps * kWarpSums;
  float *r, *d, *k, *a, *b;  // [kBatchTokens, kN]
  float *v, *dy, *u, *dv;    // [kBatchTokens, kRows]
  float* start;              // the state before the half, see keep_tile
  float* sums;               // of a token, [kWarps, kColumnSums, kN]

  __device__ explicit BackwardHalf(float* memory) {
    constexpr int kSize = kBatchTokens * kN, kRowsSize = kBatchTokens * kRows;
    r = memory, d = r + kSize, k = d + kSize, a = k + kSize, b = a + kSize;
    v = b + kSize, dy = v + kRowsSize, u = dy + kRowsSize, dv = u + kRowsSize;
    start = dv + kRowsSize;
    sums = start + 16 * kThreads;
  }

  __device__ __forceinline__ void read(const Heads& heads, const Inputs& in, const void* dy_in, const Task& task,
                                       int64_t first) const {
    const int64_t row = heads.row(task.first_token + first, task.head), stride = heads.row_stride();
    const int64_t left = task.n_tokens - first;
    Rows<kN, kThreads> r_rows, w_rows, k_rows, a_rows, b_rows;
    Rows<kRows, kThreads> v_rows, dy_rows;
    r_rows.fetch(in.r, heads.dtype, row, stride, left, heads.N);
    w_rows.fetch(in.w, kFloat32, row, stride, left, heads.N);
    k_rows.fetch(in.k, heads.dtype, row, stride, left, heads.N);
    a_rows.fetch(in.a, heads.dtype, row, stride, left, heads.N);
    b_rows.fetch(in.b, heads.dtype, row, stride, left, heads.N);
    v_rows.fetch(in.v, heads.dtype, row + task.first_row, stride, left, heads.N - task.first_row);
    dy_rows.fetch(dy_in, heads.dtype, row + task.first_row, stride, left, heads.N - task.first_row);
    r_rows.put(heads.dtype, r);
    w_rows.put_decay(kFloat32, d);
    k_rows.put(heads.dtype, k);
    a_rows.put(heads.dtype, a);
    b_rows.put(heads.dtype, b);
    v_rows.put(heads.dtype, v);
    dy_rows.put(heads.dtype, dy);
  }

  // u of token t, from the state before it; other lanes of the warp may take it after a __syncwarp().
  __device__ __forceinline__ void put_removed(const Tile<kN>& tile, int t, const float (&s)[4][4],
                                              float (&removed)[4]) const {
    float at[4];
    read_four(a, t * kN + tile.column, at);
    multiply<kN>(s, at, removed);
    if (tile.lane % Tile<kN>::kLanes == 0) write_four(u, t * kRows + tile.row, removed);
  }

  __device__ __forceinline__ void take_removed(const Tile<kN>& tile, int t, float (&removed)[4]) const {
    read_four(u, t * kRows + tile.row, removed);
  }

  // Takes s over token t.
  __device__ __forceinline__ void advance(const Tile<kN>& tile, int t, const float (&removed)[4],
                                          float (&s)[4][4]) const {
    float d_[4], k_[4], b_[4], v_[4];
    read_four(d, t * kN + tile.column, d_);
    read_four(k, t * kN + tile.column, k_);
    read_four(b, t * kN + tile.column, b_);
    read_four(v, t * kRows + tile.row, v_);
    update(d_, k_, b_, removed, v_, s);
  }

  // Takes g from the gradient of the state after token t to that of the state s before it. Leaves dv in its row, and
  // this warp's part of the column sums.
  __device__ __forceinline__ void walk_back(const Tile<kN>& tile, int t, const float (&s)[4][4],
                                            float (&g)[4][4]) const {
    float r_[4], d_[4], k_[4], a_[4], b_[4], v_[4], dy_[4], u_[4], du_[4], sums_[8], column[4];
    read_four(r, t * kN + tile.column, r_);
    read_four(dy, t * kRows + tile.row, dy_);
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) g[i][j] += dy_[i] * r_[j];

    read_four(k, t * kN + tile.column, k_);
    read_four(b, t * kN + tile.column, b_);
    row_parts(g, b_, sums_);
    row_parts(g, k_, sums_ + 4);
    const float sum = sum_lanes<8, Tile<kN>::kLanes>(sums_);
    spread_four<8>(sum, du_);
    if (tile.lane % Tile<kN>::kLanes / 4 == 1) dv[t * kRows + tile.row + tile.lane % 4] = sum;

    float* const warp_sums = sums + tile.warp * kWarpSums;
    __syncthreads();  // the sums of the token after this one have been read
    column_parts(s, du_, column);
    put_column_sums<kN>(tile, column, warp_sums + kDa * kN);
    read_four(v, t * kRows + tile.row, v_);
    const float dy_v = (dy_[0] * v_[0] + dy_[1] * v_[1]) + (dy_[2] * v_[2] + dy_[3] * v_[3]);
    column_parts(g, v_, column);
    put_column_sums<kN>(tile, column, warp_sums + kDk * kN);
    read_four(u, t * kRows + tile.row, u_);
    const float dy_u = (dy_[0] * u_[0] + dy_[1] * u_[1]) + (dy_[2] * u_[2] + dy_[3] * u_[3]);
    column_parts(g, u_, column);
    put_column_sums<kN>(tile, column, warp_sums + kDb * kN);
    read_four(d, t * kN + tile.column, d_);
#pragma unroll
    for (int j = 0; j < 4; ++j)
      column[j] = d_[j] * ((g[0][j] * s[0][j] + g[1][j] * s[1][j]) + (g[2][j] * s[2][j] + g[3][j] * s[3][j]));
    put_column_sums<kN>(tile, column, warp_sums + kDw * kN);
    // S_t^T dy, of S_t = s diag(d) + u b^T + v k^T. k and b are read again: there are no registers to keep them in.
    read_four(k, t * kN + tile.column, k_);
    read_four(b, t * kN + tile.column, b_);
    column_parts(s, dy_, column);
#pragma unroll
    for (int j = 0; j < 4; ++j) column[j] = column[j] * d_[j] + (dy_u * b_[j] + dy_v * k_[j]);
    put_column_sums<kN>(tile, column, warp_sums + kDr * kN);

    read_four(a, t * kN + tile.column, a_);
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) g[i][j] = g[i][j] * d_[j] + du_[i] * a_[j];
  }
};

constexpr int kQuarter = 4;  // tokens whose states a thread has in registers

// parts: [parts of a head, kColumnSums, T, H, N], for the sums of blocks that have not all rows of a head.
template <int kN>
__global__ void __launch_bounds__(BackwardBlock<kN>::kThreads, BackwardBlock<kN>::kResident)
    backward_kernel(Heads heads, Inputs in, const float* checkpoints, const void* dy, const float* d_final,
                    ColumnGradients gradients, void* dv, float* d_state, float* parts) {
  using Block = BackwardBlock<kN>;
  using Half = BackwardHalf<kN>;
  constexpr int kThreads = Block::kThreads;
  const Task task = task_of_block(heads, Block::kRows);
  const Tile<kN> tile;
  const int N = heads.N, row = task.first_row + tile.row;
  const Half half(shared_memory());

  float g[4][4];
  load_tile(d_final + heads.state(task.s, task.head), N, row, tile.column, g);
  // Halves of groups, from the last one to the first.
  const int n_halves = static_cast<int>((task.n_tokens + kBatchTokens - 1) / kBatchTokens);
  for (int number = n_halves - 1; number >= 0; --number) {
    const int64_t first = static_cast<int64_t>(number) * kBatchTokens, left = task.n_tokens - first;
    const int n_tokens = left < kBatchTokens ? static_cast<int>(left) : kBatchTokens;
    float s[4][4], removed[4];
    load_tile(checkpoints + heads.state(task.first_checkpoint + first / kGroupTokens, task.head), N, not_before(row),
              not_before(tile.column), s);
    if (first % kGroupTokens != 0) {
      half.read(heads, in, dy, task, first - kBatchTokens);
      __syncthreads();
#pragma unroll 1
      for (int t = 0; t < kBatchTokens; ++t) {
        half.put_removed(tile, t, s, removed);
        half.advance(tile, t, removed, s);
      }
      __syncthreads();
    }
    keep_tile<kThreads>(s, half.start);
    half.read(heads, in, dy, task, first);
    __syncthreads();

#pragma unroll 1
    for (int t = 0; t < kQuarter; ++t) {
      half.put_removed(tile, t, s, removed);
      half.advance(tile, t, removed, s);
    }
    __syncwarp();
    for (int quarter = (n_tokens - 1) / kQuarter * kQuarter; quarter >= 0; quarter -= kQuarter) {
      float states[kQuarter - 1][4][4];  // before the tokens of the quarter, but for its first one
      if (quarter == 0) take_tile<kThreads>(half.start, s);
#pragma unroll
      for (int t = 0; t < kQuarter; ++t) {
        if (quarter == 0)
          half.take_removed(tile, t, removed);
        else
          half.put_removed(tile, quarter + t, s, removed);
        if (t + 1 == kQuarter) break;
        half.advance(tile, quarter + t, removed, s);
        copy_tile(s, states[t]);
      }
      __syncwarp();
#pragma unroll
      for (int t = kQuarter - 1; t >= 0; --t) {
        const int token = quarter + t;
        if (token >= n_tokens) continue;
        if (t > 0) {
          half.walk_back(tile, token, states[t - 1], g);
        } else {
          take_tile<kThreads>(half.start, s);
#pragma unroll 1
          for (int i = 0; i < quarter; ++i) {
            half.take_removed(tile, i, removed);
            half.advance(tile, i, removed, s);
          }
          half.walk_back(tile, token, s, g);
        }
        __syncthreads();
        const int64_t at = heads.row(task.first_token + first + token, task.head);
#pragma unroll 1
        for (int i = not_before(static_cast<int>(threadIdx.x)); i < Half::kWarpSums; i += kThreads) {
          const int which = i / kN, column = i % kN;
          if (column >= N) continue;
          const float sum = sum_warps<Block::kWarps>(half.sums + i, Half::kWarpSums);
          if constexpr (Block::kHasHead)
            store(gradients[which], at + column, sum, dtype_of(which, heads.dtype));
          else
            parts[(task.part * kColumnSums + which) * heads.row(heads.T, 0) + at + column] = sum;
        }
      }
    }
    store_rows<Block::kRows, kThreads>(half.dv, n_tokens, N - task.first_row, dv, heads.dtype,
                                       heads.row(task.first_token + first, task.head) + task.first_row,
                                       heads.row_stride());
    __syncthreads();
  }
  store_tile(g, N, row, tile.column, d_state + heads.state(task.s, task.head));
}

constexpr int kAddThreads = 256;

__global__ void __launch_bounds__(kAddThreads)
    add_parts_kernel(const float* parts, int n_parts, int64_t n_elements, int dtype, ColumnGradients gradients) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kAddThreads + threadIdx.x;
  if (i >= n_elements) return;
#pragma unroll
  for (int which = 0; which < kColumnSums; ++which) {
    float sum = 0.f;
    for (int part = 0; part < n_parts; ++part) sum += parts[(part * kColumnSums + which) * n_elements + i];
    store(gradients.of[which], i, sum, dtype_of(which, dtype));
  }
}

// ---------------------------------------------------------------------------------------------- launches

constexpr int kBadValue = 1;  // cudaErrorInvalidValue

bool can_run(const Heads& heads) {
  const int64_t most_blocks = static_cast<int64_t>(heads.S) * heads.H * 16;
  return heads.dtype >= kFloat32 && heads.dtype <= kFloat16 && is_head_size(heads.N) && heads.S >= 0 && heads.H >= 0 &&
         heads.T >= 0 && most_blocks <= 0x7fffffff;
}

unsigned n_blocks(const Heads& heads, int rows) {
  return static_cast<unsigned>(heads.S) * heads.H * parts_of_head(heads.N, rows);
}

// How many blocks share the rows of a head in the backward pass.
int backward_parts(int N) {
  return for_head_size(N, [&](auto size) { return parts_of_head(N, BackwardBlock<size.value>::kRows); });
}

}  // namespace

// Tokens from one checkpoint to the next; checkpoints are [T / this + S, H, N, N].
RWKV_EXPORT int rwkv_wkv7_checkpoint_tokens() { return kGroupTokens; }

// Text of a code that one of the functions here returned.
RWKV_EXPORT const char* rwkv_wkv7_error(int code) { return error_text(code); }

// Bytes of the workspace of a call; with 0 it may be null.
RWKV_EXPORT int64_t rwkv_wkv7_workspace_bytes(int is_backward, int, int64_t T, int H, int N) {
  const int parts = backward_parts(N);
  return is_backward && parts > 1 ? sizeof(float) * parts * kColumnSums * T * H * N : 0;
}

// checkpoints may be null where no backward pass follows.
RWKV_EXPORT int rwkv_wkv7_forward(int dtype, int S, int64_t T, int H, int N, const int64_t* cu_seqlens, const void* r,
                                  const float* w, const void* k, const void* v, const void* a, const void* b,
                                  const float* state, void* y, float* final_state, float* checkpoints, void*,
                                  void* stream) {
  const Heads heads{dtype, S, T, H, N, cu_seqlens};
  if (!can_run(heads)) return kBadValue;
  if (S == 0 || H == 0) return 0;
  return for_head_size(N, [&](auto size) {
    constexpr int kN = decltype(size)::value;
    constexpr size_t kShared = 2 * ForwardBatch<kN>::kFloats * sizeof(float);
    static_assert(kShared <= kMaxSharedBytes, "no chip may be too small");
    return launch(forward_kernel<kN>, dim3(n_blocks(heads, ForwardBlock<kN>::kRows)), dim3(ForwardBlock<kN>::kThreads),
                  kShared, stream, heads, Inputs{r, w, k, v, a, b}, state, y, final_state, checkpoints);
  });
}

RWKV_EXPORT int rwkv_wkv7_backward(int dtype, int S, int64_t T, int H, int N, const int64_t* cu_seqlens, const void* r,
                                   const float* w, const void* k, const void* v, const void* a, const void* b,
                                   const float* checkpoints, const void* dy, const float* d_final, void* dr, float* dw,
                                   void* dk, void* dv, void* da, void* db, float* d_state, void* workspace,
                                   void* stream) {
  const Heads heads{dtype, S, T, H, N, cu_seqlens};
  if (!can_run(heads)) return kBadValue;
  if (S == 0 || H == 0) return 0;
  const int n_parts = backward_parts(N);
  float* const parts = n_parts > 1 ? static_cast<float*>(workspace) : nullptr;
  const ColumnGradients gradients{{dr, dw, dk, da, db}};
  const int error = for_head_size(N, [&](auto size) {
    constexpr int kN = decltype(size)::value;
    constexpr size_t kShared = BackwardHalf<kN>::kFloats * sizeof(float);
    static_assert(kShared <= kMaxSharedBytes, "no chip may be too small");
    return launch(backward_kernel<kN>, dim3(n_blocks(heads, BackwardBlock<kN>::kRows)),
                  dim3(BackwardBlock<kN>::kThreads), kShared, stream, heads, Inputs{r, w, k, v, a, b}, checkpoints, dy,
                  d_final, gradients, dv, d_state, parts);
  });
  const int64_t n_elements = T * H * N, n_add_blocks = (n_elements + kAddThreads - 1) / kAddThreads;
  if (error != 0 || n_parts == 1 || n_elements == 0) return error;
  return launch(add_parts_kernel, dim3(static_cast<unsigned>(n_add_blocks)), dim3(kAddThreads), 0, stream, parts,
                n_parts, n_elements, dtype, gradients);
}

// One token for each of S sequences, inputs and y [S, H, N]. final_state may be state.
RWKV_EXPORT int rwkv_wkv7_step(int dtype, int S, int H, int N, const void* r, const float* w, const void* k,
                               const void* v, const void* a, const void* b, const float* state, void* y,
                               float* final_state, void* stream) {
  const Heads heads{dtype, S, S, H, N, nullptr};
  if (!can_run(heads)) return kBadValue;
  if (S == 0 || H == 0) return 0;
  return for_head_size(N, [&](auto size) {
    constexpr int kN = decltype(size)::value;
    return launch(step_kernel<kN>, dim3(n_blocks(heads, ForwardBlock<kN>::kRows)), dim3(ForwardBlock<kN>::kThreads), 0,
                  stream, heads, Inputs{r, w, k, v, a, b}, state, y, final_state);
  });
}
