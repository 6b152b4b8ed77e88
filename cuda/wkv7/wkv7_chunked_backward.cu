// The backward pass of the chunked RWKV-7 recurrence, on tensor cores: bfloat16 inputs, head sizes 64 and 128.
//
// Of a chunk, with what wkv7_chunked.cuh prepares, S the state before it, dO = dy, dS the gradient of the state after
// it and D = dS diag(e^G_16):
//   dU = Aqb^T dO + b~ D^T,   dP = M^T dU,   dV = Aqk^T dO + k~ D^T + Aak^T dP,   dS <- D + dO^T r~ + dP^T a~
// and, with the gradients of the scores, dAqk = dO V^T and dAqb = dO U^T where j <= i, dAak = dP V^T and dAab = dP U^T
// where j < i,
//   xr = dAqk k~ + dAqb b~ + dO S           dr = e^G xr
//   xa = dAak k~ + dAab b~ + dP S           da = e^(G - w) xa
//   xk = dAqk^T r~ + dAak^T a~ + V D        dk = e^-G xk
//   xb = dAqb^T r~ + dAab^T a~ + U D        db = e^-G xb
//   dw_t = sum_{i >= t} (r~ xr - k~ xk - b~ xb + a~ xa)_i - (a~ xa)_t + sum_i (k~ (V D) + b~ (U D))_i
//          + the sum over values of S D
// where r~, k~, a~, b~, S and D are what the products took, rounded: then what they round off cancels.
//
// Split. A block has 64 values of one head of one span (gpu_chunks.cuh), and all keys. What a value needs is local to
// one of its four walking warps, 16 values each, with values as the rows of every product, so that S, dS and all from
// dU to dP stay in registers. dr, dw, dk, da, db are sums over values: for them D, S, dP, U go through shared memory,
// and the four assisting warps share out the keys, 16 at a time; they prepare the chunks, too. Where N is 128 a head
// has two blocks, which leave their shares of these five in the workspace for `add_parts_kernel`.
//
// Order. An interval of 4 chunks, from one checkpoint to the next, is walked forward, for the states, and then
// backward: 7 visits, as the last chunk needs only one. A visit has three steps with a barrier after each:
//        walking warps                                   assisting warps
//   1    U (forward), dU, dP (backward)                  dr, dw, dk, da, db of the visit before
//   2    dV; U and dP to shared memory                   operands of the next visit; fetch those of the one after
//   3    S (forward); D and S to shared memory, dS       gradients of the scores; scores of the next visit
// Where N is 128 shared memory has room for one chunk only: the two take turns, with 7 barriers a visit, and the inputs
// of the next chunk wait in registers.
// What the walk forward leaves for that back, 3 states in bfloat16 and 3 U, goes to the workspace as it lies in a
// thread's registers, and comes back within microseconds: most of it never leaves the second-level cache.
//
// Segments. Where blocks are few, each takes a segment of a sequence. dS before a segment is dS P^T + Q, of that after
// it: `backward_kernel` in summary form gives the Q (from dS = 0) and P^T (from the identity, with dO = 0) of each,
// `join_kernel` goes through those of a sequence in float32, and then each segment is an ordinary span.
//
// Precision. With kSplit the factors of Aak V, a~ S, M, dU and dP are split in two bfloat16, all others are one.
//
// Costs of a visit, products of 16 x 8 x 16 a warp where N is 64 (128): walking, forward 50 (90) with kSplit, 28 (52)
// without, backward 62 (110) and 40 (72); assisting, preparation 8 (16), gradients 56 (104). Shared memory of a block:
// 97,056 (97,312) bytes. Registers: at most 128 (255) a thread, so that two blocks (one) fit on a multiprocessor.
// Workspace: 30,720 (55,296) bytes a block; where N is 128, 10 T H N floats; with segments, 3 N^2 floats for each of
// them and head.

#include "wkv7_chunked.cuh"

namespace {

using namespace rwkv;

constexpr int kBlockValues = 64;
constexpr int kRoleWarps = 4, kRoleThreads = kRoleWarps * kWarp;  // that walk, and that assist
constexpr int kThreads = 2 * kRoleThreads;
constexpr int kIntervalChunks = kStateTokens / kChunkTokens;

struct Inputs {
  const uint16_t* r;
  const float* w;
  const uint16_t *k, *v, *a, *b, *dy;
};

// Gradients that are sums over values, in the order in which their shares are kept. dw is float32.
enum KeyGradient { kDr, kDw, kDk, kDa, kDb, kKeyGradients };

struct Outputs {
  void* of[kKeyGradients];
  uint16_t* dv;
  float* d_state;
};

// ---------------------------------------------------------------------------------------------- visits

// One visit after the other, over all chunks of a span, in intervals of kInterval chunks, the last interval first.
template <int kInterval>
struct Visit {
  int first, n_chunks, step;  // of the interval

  __device__ explicit Visit(int n_all) {
    first = (n_all + kInterval - 1) / kInterval * kInterval - kInterval;
    n_chunks = n_all - first;
    step = 0;
  }
  __device__ bool is_any() const { return first >= 0; }
  __device__ bool is_forward() const { return step < n_chunks; }
  __device__ bool is_backward() const { return step + 1 >= n_chunks; }
  __device__ int chunk_in_interval() const { return step < n_chunks ? step : 2 * (n_chunks - 1) - step; }
  __device__ int chunk() const { return first + chunk_in_interval(); }
  // Beyond the last visit there is none.
  __device__ Visit after(int n_visits) const {
    Visit visit = *this;
    for (int i = 0; i < n_visits && visit.first >= 0; ++i) {
      if (++visit.step < 2 * visit.n_chunks - 1) continue;
      visit.first -= kInterval, visit.n_chunks = kInterval, visit.step = 0;
    }
    return visit;
  }
};

// ---------------------------------------------------------------------------------------------- shared memory

// Where a block's numbers lie in tensors, in elements. In shared memory, for there are no registers to keep it in.
struct Place {
  int64_t tokens;           // the row of the first token
  int64_t checkpoints;      // the first checkpoint
  int64_t state;            // before the sequence; -1 where the block has not its first token
  int n_chunks, last_rows;  // last_rows: tokens of the last chunk
};

template <int kN>
struct Memory {
  static constexpr bool kOverlaps = kN == 64;  // the roles
  static constexpr int kRing = kOverlaps ? 3 : 1, kPair = kOverlaps ? 2 : 1;

  // In numbers of 2 bytes, each a multiple of 16 bytes.
  static constexpr int kKeys = Matrix<kN>::size_of(kChunkTokens), kValues = Matrix<kBlockValues>::size_of(kChunkTokens);
  static constexpr int kFloats = 2 * kChunkTokens * kN, kDecays = 2 * kKeys, kState = Matrix<kN>::size_of(kBlockValues);
  static constexpr int kSquare = Scores::kMatrixSize;
  static constexpr int kSlot = 4 * kKeys + 2 * kValues + 2 * kN;  // r, k, a, b, v, dy, end_decay

  static constexpr int kW = kRing * kSlot, kDecay = kW + kPair * kFloats, kLow = kDecay + kPair * kDecays;
  static constexpr int kScores = kLow + 2 * kKeys, kScratch = kScores + Scores::size_of(true);
  static constexpr int kGradientScores = kScratch + 2 * kScratchFloats, kU = kGradientScores + 4 * kSquare;
  static constexpr int kDp = kU + kValues, kD = kDp + kValues, kS = kD + kState, kPlace = kS + kState;
  static constexpr int kSize = kPlace + sizeof(Place) / 2;
  static constexpr size_t kBytes = 2 * kSize;

  uint16_t* first;

  __device__ explicit Memory(float* memory) : first(reinterpret_cast<uint16_t*>(memory)) {}

  __device__ uint16_t* slot(int visit) const { return first + visit % kRing * kSlot; }
  __device__ float* floats(int at) const { return reinterpret_cast<float*>(first + at); }
  __device__ float* w(int visit) const { return floats(kW + visit % kPair * kFloats); }
  __device__ float* decay(int visit) const { return floats(kDecay + visit % kPair * kDecays); }
  __device__ Operands<kN> operands(int visit) const {
    uint16_t* const at = slot(visit);
    return {{at},
            {at + kKeys},
            {at + 2 * kKeys},
            {at + 3 * kKeys},
            {first + kLow},
            {first + kLow + kKeys},
            decay(visit),
            floats(visit % kRing * kSlot + 4 * kKeys + 2 * kValues)};
  }
  // [token, value]
  __device__ Matrix<kBlockValues> v(int visit) const { return {slot(visit) + 4 * kKeys}; }
  __device__ Matrix<kBlockValues> dy(int visit) const { return {slot(visit) + 4 * kKeys + kValues}; }
  __device__ Matrix<kBlockValues> u() const { return {first + kU}; }
  __device__ Matrix<kBlockValues> dp() const { return {first + kDp}; }
  // [value, key]
  __device__ Matrix<kN> d() const { return {first + kD}; }
  __device__ Matrix<kN> s() const { return {first + kS}; }
  __device__ Scores scores() const { return Scores(first + kScores); }
  __device__ Place& place() const { return *reinterpret_cast<Place*>(first + kPlace); }
  __device__ float* scratch() const { return floats(kScratch); }
  __device__ Matrix<16> d_qk() const { return {first + kGradientScores}; }
  __device__ Matrix<16> d_qb() const { return {first + kGradientScores + kSquare}; }
  __device__ Matrix<16> d_ak() const { return {first + kGradientScores + 2 * kSquare}; }
  __device__ Matrix<16> d_ab() const { return {first + kGradientScores + 3 * kSquare}; }
};

// ---------------------------------------------------------------------------------------------- walking warps

// A sum of products; with kApart that of its small addends is another one until the end, so that both chains are
// shorter.
template <bool kSplit, bool kApart>
struct SplitSum {
  float sum[2][4] = {}, small[2][4] = {};  // small: unused without kApart

  // Adds a b, of which the low parts are used only with kSplit.
  __device__ __forceinline__ void add(const unsigned (&a)[4], const unsigned (&a_low)[4], const unsigned (&b)[2][2],
                                      const unsigned (&b_low)[2][2]) {
    multiply_add(sum, a, b);
    if constexpr (kSplit) {
      multiply_add(kApart ? small : sum, a_low, b);
      multiply_add(kApart ? small : sum, a, b_low);
    }
  }
  // The same where `a` is exact.
  __device__ __forceinline__ void add(const unsigned (&a)[4], const unsigned (&b)[2][2],
                                      const unsigned (&b_low)[2][2]) {
    multiply_add(sum, a, b);
    if constexpr (kSplit) multiply_add(kApart ? small : sum, a, b_low);
  }
  __device__ __forceinline__ void finish() {
    if constexpr (kSplit && kApart)
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[i / 4][i % 4] += small[i / 4][i % 4];
  }
};

// Two tiles of results as an operand, with its low part where kSplit.
template <bool kSplit>
__device__ __forceinline__ void as_factor(const float (&left)[4], const float (&right)[4], unsigned (&a)[4],
                                          unsigned (&low)[4]) {
  if constexpr (kSplit)
    as_split_a(left, right, a, low);
  else
    as_a(left, right, a);
}

// m[column + i][row + j] = a[j][i]: an operand of 16 values and 16 tokens to rows of tokens.
__device__ __forceinline__ void store_a_transposed(const unsigned (&a)[4], const Matrix<kBlockValues>& m, int value) {
  const int g = lane_g(), t = lane_t();
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int token = i / 2 * 8 + 2 * t, at = value + i % 2 * 8 + g;
    *m.at(token, at) = static_cast<uint16_t>(a[i]);
    *m.at(token + 1, at) = static_cast<uint16_t>(a[i] >> 16);
  }
}

// m[row + i][column + j] = a[i][j].
template <int kColumns>
__device__ __forceinline__ void store_a(const unsigned (&a)[4], const Matrix<kColumns>& m, int row, int column) {
  const int g = lane_g(), t = lane_t();
#pragma unroll
  for (int i = 0; i < 4; ++i)
    *reinterpret_cast<unsigned*>(m.at(row + i % 2 * 8 + g, column + i / 2 * 8 + 2 * t)) = a[i];
}

// rows += a b, of keys key .. key + 15.
template <int kN>
__device__ __forceinline__ void add_to_rows(const unsigned (&a)[4], const unsigned (&b)[2][2], int key,
                                            StateRows<kN>& rows) {
  mma_bfloat16(rows.s[key / 8], a, b[0]);
  mma_bfloat16(rows.s[key / 8 + 1], a, b[1]);
}

// What a walking warp does in a visit. Operands u and dp are [value, token].
template <int kN, bool kSplit>
struct Walk {
  const Memory<kN>& memory;
  int visit, value;  // the warp's first value in the block

  // U^T from the state s before the chunk.
  __device__ __forceinline__ void removed(const StateRows<kN>& s, unsigned (&u)[4]) const {
    const Operands<kN> x = memory.operands(visit);
    const Scores scores = memory.scores();
    SplitSum<kSplit, false> rhs, sum;  // two states are there already: registers are short
    unsigned a[4], low[4], b[2][2], b_low[2][2];
    load_a_transposed(memory.v(visit), 0, value, a);
    load_b_transposed(scores.ak, 0, 0, b);
    if constexpr (kSplit) load_b_transposed(scores.ak_low, 0, 0, b_low);
    rhs.add(a, b, b_low);
#pragma unroll
    for (int key = 0; key < kN; key += 16) {
      as_factor<kSplit>(s.s[key / 8], s.s[key / 8 + 1], a, low);
      load_b_transposed(x.a, 0, key, b);
      if constexpr (kSplit) load_b_transposed(x.a_low, 0, key, b_low);
      rhs.add(a, low, b, b_low);
    }
    rhs.finish();
    as_factor<kSplit>(rhs.sum[0], rhs.sum[1], a, low);
    load_b(scores.inverse, 0, 0, b);
    if constexpr (kSplit) load_b(scores.inverse_low, 0, 0, b_low);
    sum.add(a, low, b, b_low);
    sum.finish();
    as_a(sum.sum[0], sum.sum[1], u);
  }

  // Takes s over the chunk.
  __device__ __forceinline__ void advance(const unsigned (&u)[4], StateRows<kN>& s) const {
    const Operands<kN> x = memory.operands(visit);
    unsigned v[4], b[2][2];
    load_a_transposed(memory.v(visit), 0, value, v);
#pragma unroll
    for (int key = 0; key < kN; key += 16) {
      load_b(x.k, 0, key, b);
      add_to_rows(v, b, key, s);
      load_b(x.b, 0, key, b);
      add_to_rows(u, b, key, s);
    }
    decay(s);
  }

  __device__ __forceinline__ void decay(StateRows<kN>& rows) const {
    const float* const end_decay = memory.operands(visit).end_decay + 2 * lane_t();
#pragma unroll
    for (int tile = 0; tile < kN / 8; ++tile) {
      const float2 by = *reinterpret_cast<const float2*>(end_decay + 8 * tile);
      rows.s[tile][0] *= by.x, rows.s[tile][1] *= by.y, rows.s[tile][2] *= by.x, rows.s[tile][3] *= by.y;
    }
  }

  // dP^T, from D.
  __device__ __forceinline__ void removed_gradient(const StateRows<kN>& d, unsigned (&dp)[4]) const {
    const Operands<kN> x = memory.operands(visit);
    const Scores scores = memory.scores();
    SplitSum<kSplit, true> du, sum;
    unsigned a[4], low[4], b[2][2], b_low[2][2];
    load_a_transposed(memory.dy(visit), 0, value, a);
    load_b(scores.qb, 0, 0, b);
    if constexpr (kSplit) load_b(scores.qb_low, 0, 0, b_low);
    du.add(a, b, b_low);
#pragma unroll
    for (int key = 0; key < kN; key += 16) {
      as_factor<kSplit>(d.s[key / 8], d.s[key / 8 + 1], a, low);
      load_b_transposed(x.b, 0, key, b);
      if constexpr (kSplit) load_b_transposed(x.b_low, 0, key, b_low);
      du.add(a, low, b, b_low);
    }
    du.finish();
    as_factor<kSplit>(du.sum[0], du.sum[1], a, low);
    load_b_transposed(scores.inverse, 0, 0, b);
    if constexpr (kSplit) load_b_transposed(scores.inverse_low, 0, 0, b_low);
    sum.add(a, low, b, b_low);
    sum.finish();
    as_a(sum.sum[0], sum.sum[1], dp);
  }

  // dV^T.
  __device__ __forceinline__ void value_gradient(const StateRows<kN>& d, const unsigned (&dp)[4],
                                                 float (&dv)[2][4]) const {
    const Operands<kN> x = memory.operands(visit);
    const Scores scores = memory.scores();
    unsigned a[4], b[2][2];
#pragma unroll
    for (int i = 0; i < 8; ++i) dv[i / 4][i % 4] = 0.f;
    load_a_transposed(memory.dy(visit), 0, value, a);
    load_b(scores.qk, 0, 0, b);
    multiply_add(dv, a, b);
    load_b(scores.ak, 0, 0, b);
    multiply_add(dv, dp, b);
#pragma unroll
    for (int key = 0; key < kN; key += 16) {
      as_a(d.s[key / 8], d.s[key / 8 + 1], a);
      load_b_transposed(x.k, 0, key, b);
      multiply_add(dv, a, b);
    }
  }

  // Makes of D the gradient of the state before the chunk.
  __device__ __forceinline__ void step_back(const unsigned (&dp)[4], StateRows<kN>& d) const {
    const Operands<kN> x = memory.operands(visit);
    unsigned dy[4], b[2][2];
    load_a_transposed(memory.dy(visit), 0, value, dy);
#pragma unroll
    for (int key = 0; key < kN; key += 16) {
      load_b(x.r, 0, key, b);
      add_to_rows(dy, b, key, d);
      load_b(x.a, 0, key, b);
      add_to_rows(dp, b, key, d);
    }
  }

  // Rows of dv from dV^T, by way of the warp's rows of memory.d(), of which nothing is left.
  __device__ __forceinline__ void store_values(const float (&dv)[2][4], int n_rows, int stride, uint16_t* to) const {
    const Matrix<kN> staged = memory.d();
    store_tile_transposed(dv[0], staged, value, 0);
    store_tile_transposed(dv[1], staged, value + 8, 0);
    __syncwarp();
    const int token = lane_of_thread() / 2, column = lane_of_thread() % 2 * 8;
    if (token < n_rows)
      *reinterpret_cast<uint4*>(to + token * stride + value + column) =
          *reinterpret_cast<const uint4*>(staged.at(value + token, column));
    __syncwarp();
  }
};

// What a walking warp leaves for itself of an interval: states and operands u, 16 bytes a thread at a time.
template <int kN>
struct Kept {
  static constexpr int kStates = kIntervalChunks - 1, kUs = kIntervalChunks - 1, kPieces = kN / 16;
  static constexpr int kBytes = (kStates * kPieces + kUs) * kRoleThreads * sizeof(uint4);

  char* all;  // of all blocks


  __device__ __forceinline__ static void put(uint4* at, const unsigned (&a)[4]) {
    *at = make_uint4(a[0], a[1], a[2], a[3]);
  }
  __device__ __forceinline__ static void get(const uint4* at, unsigned (&a)[4]) {
    const uint4 four = *at;
    a[0] = four.x, a[1] = four.y, a[2] = four.z, a[3] = four.w;
  }
  __device__ __forceinline__ uint4* u(int chunk) const { return piece(kStates * kPieces + chunk); }
  // Of the state after a chunk.
  __device__ __forceinline__ uint4* state(int chunk) const { return piece(chunk * kPieces); }

 private:
  __device__ __forceinline__ uint4* piece(int number) const {
    const int at = number * kRoleThreads + static_cast<int>(threadIdx.x) % kRoleThreads;
    return reinterpret_cast<uint4*>(all + static_cast<int64_t>(blockIdx.x) * kBytes) + at;
  }
};

// ---------------------------------------------------------------------------------------------- assisting warps

// Starts the copies of the n_rows rows of a chunk, of which the first and its head begin at `at`; of dy, n_dy_rows.
template <int kN, bool kSummary>
__device__ __forceinline__ void fetch_inputs(const Memory<kN>& memory, const Inputs& in, int64_t at, int stride,
                                             int values, int n_rows, int n_dy_rows, int visit, bool is_backward,
                                             int thread) {
  const Operands<kN> x = memory.operands(visit);
  fetch_chunk<kN, kRoleThreads>(in.w + at, stride, n_rows, thread, memory.w(visit));
  fetch_chunk<kN, kRoleThreads>(in.k + at, stride, n_rows, thread, x.k);
  fetch_chunk<kN, kRoleThreads>(in.a + at, stride, n_rows, thread, x.a);
  fetch_chunk<kN, kRoleThreads>(in.b + at, stride, n_rows, thread, x.b);
  if constexpr (!kSummary)
    fetch_chunk<kBlockValues, kRoleThreads>(in.v + at + values, stride, n_rows, thread, memory.v(visit));
  if (is_backward) {
    fetch_chunk<kN, kRoleThreads>(in.r + at, stride, n_rows, thread, x.r);
    fetch_chunk<kBlockValues, kRoleThreads>(in.dy + at + values, stride, n_dy_rows, thread, memory.dy(visit));
  }
  cp_async_commit();
}

// The inputs of a chunk on their way in registers, where shared memory has no room for another one.
template <int kN>
struct Incoming {
  template <int kColumns, typename Element>
  struct Rows {
    static constexpr int kEach = 16 / sizeof(Element), kPieces = kColumns / kEach;
    static constexpr int kCount = kChunkTokens * kPieces / kRoleThreads;
    uint4 pieces[kCount];

    // Rows from n_rows on are 0 and not read.
    __device__ __forceinline__ void fetch(const Element* from, int stride, int n_rows, int thread) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int number = i * kRoleThreads + thread, row = number / kPieces, column = number % kPieces * kEach;
        pieces[i] = make_uint4(0, 0, 0, 0);
        if (row < n_rows) pieces[i] = *reinterpret_cast<const uint4*>(from + row * stride + column);
      }
    }
    // to: rows `stride` numbers apart
    __device__ __forceinline__ void put(Element* to, int stride, int thread) const {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int number = i * kRoleThreads + thread, row = number / kPieces, column = number % kPieces * kEach;
        *reinterpret_cast<uint4*>(to + row * stride + column) = pieces[i];
      }
    }
  };

  Rows<kN, uint16_t> r, k, a, b;
  Rows<kN, float> w;
  Rows<kBlockValues, uint16_t> v, dy;

  // As fetch_inputs; of r, v and dy other numbers of rows.
  __device__ __forceinline__ void fetch(const Inputs& in, int64_t at, int stride, int values, int n_rows, int n_r_rows,
                                        int n_v_rows, int n_dy_rows, int thread) {
    r.fetch(in.r + at, stride, n_r_rows, thread);
    w.fetch(in.w + at, stride, n_rows, thread);
    k.fetch(in.k + at, stride, n_rows, thread);
    v.fetch(in.v + at + values, stride, n_v_rows, thread);
    a.fetch(in.a + at, stride, n_rows, thread);
    b.fetch(in.b + at, stride, n_rows, thread);
    dy.fetch(in.dy + at + values, stride, n_dy_rows, thread);
  }

  __device__ __forceinline__ void put(const Memory<kN>& memory, int thread) const {
    const Operands<kN> x = memory.operands(0);
    r.put(x.r.first, Matrix<kN>::kStride, thread);
    w.put(memory.w(0), kN, thread);
    k.put(x.k.first, Matrix<kN>::kStride, thread);
    v.put(memory.v(0).first, Matrix<kBlockValues>::kStride, thread);
    a.put(x.a.first, Matrix<kN>::kStride, thread);
    b.put(x.b.first, Matrix<kN>::kStride, thread);
    dy.put(memory.dy(0).first, Matrix<kBlockValues>::kStride, thread);
  }
};

// The gradients of the scores, each by one of four warps.
template <int kN>
__device__ __forceinline__ void score_gradients(const Memory<kN>& memory, int visit, int warp) {
  float c[2][4];
  multiply_rows(warp < 2 ? memory.dy(visit) : memory.dp(), warp % 2 == 0 ? memory.v(visit) : memory.u(), c);
  if (warp < 2)
    keep_earlier<true>(c);
  else
    keep_earlier<false>(c);
  store_square(c, {memory.d_qk().first + warp * Memory<kN>::kSquare});
}

// x of a lane's neighbours: lanes with even t get four columns of the first tile, the others of the second.
__device__ __forceinline__ float4 four_columns(const float (&x)[2][4], int half) {
  const bool odd = lane_t() % 2 == 1;
  const float own[2] = {odd ? x[1][2 * half] : x[0][2 * half], odd ? x[1][2 * half + 1] : x[0][2 * half + 1]};
  const float given[2] = {odd ? x[0][2 * half] : x[1][2 * half], odd ? x[0][2 * half + 1] : x[1][2 * half + 1]};
  const float taken[2] = {__shfl_xor_sync(kAllLanes, given[0], 1), __shfl_xor_sync(kAllLanes, given[1], 1)};
  return odd ? make_float4(taken[0], taken[1], own[0], own[1]) : make_float4(own[0], own[1], taken[0], taken[1]);
}

// Two tiles of [token, key] to global memory, float32 or bfloat16; `to` is the first token's first of 16 keys.
template <typename Element>
__device__ __forceinline__ void store_keys(const float (&x)[2][4], int n_rows, int stride, Element* to) {
  const int column = lane_t() % 2 * 8 + lane_t() / 2 * 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane_g() + 8 * half;
    const float4 four = four_columns(x, half);
    if (row >= n_rows) continue;
    if constexpr (sizeof(Element) == 4)
      *reinterpret_cast<float4*>(to + row * stride + column) = four;
    else
      *reinterpret_cast<uint2*>(to + row * stride + column) =
          make_uint2(pack_bfloat16(four.x, four.y), pack_bfloat16(four.z, four.w));
  }
}

__device__ __forceinline__ float lower_of(unsigned two) { return __uint_as_float(two << 16); }
__device__ __forceinline__ float upper_of(unsigned two) { return __uint_as_float(two & 0xffff0000u); }

// dr, dw, dk, da, db of 16 keys, or a block's share of them. `to`: where the chunk's first token and the head begin in
// a tensor; part_size: from one share to the next.
template <int kN>
__device__ __forceinline__ void key_gradients(const Memory<kN>& memory, int visit, int key, int n_rows, int stride,
                                              int64_t to, const Outputs& out, float* parts, int64_t part_size) {
  float xr[2][4] = {}, xk[2][4] = {}, xa[2][4] = {}, xb[2][4] = {};  // xk, xb: with sk, sb
  float state[2] = {0.f, 0.f};  // sums over values of S D, of key g of both tiles
#pragma unroll
  for (int value = 0; value < kBlockValues; value += 16) {
    unsigned a[4], s[2][2], d[2][2];
    load_b(memory.s(), value, key, s);
    load_b(memory.d(), value, key, d);
    load_a(memory.dy(visit), 0, value, a);
    multiply_add(xr, a, s);
    load_a(memory.dp(), 0, value, a);
    multiply_add(xa, a, s);
    load_a(memory.v(visit), 0, value, a);
    multiply_add(xk, a, d);
    load_a(memory.u(), 0, value, a);
    multiply_add(xb, a, d);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      state[i / 2] += lower_of(s[i / 2][i % 2]) * lower_of(d[i / 2][i % 2]);
      state[i / 2] += upper_of(s[i / 2][i % 2]) * upper_of(d[i / 2][i % 2]);
    }
  }
  const Operands<kN> x = memory.operands(visit);
  const int g = lane_g(), t = lane_t();
  float later[2][4];  // k~ sk + b~ sb, of which later tokens get the sum
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int tile = i / 2, row = g + i % 2 * 8, column = key + tile * 8 + 2 * t, j = i % 2 * 2;
    const float2 k = read_pair(x.k.at(row, column)), b = read_pair(x.b.at(row, column));
    later[tile][j] = k.x * xk[tile][j] + b.x * xb[tile][j];
    later[tile][j + 1] = k.y * xk[tile][j + 1] + b.y * xb[tile][j + 1];
  }
  {
    unsigned a[4], r_[2][2], k_[2][2], a_[2][2], b_[2][2];
    load_b(x.r, 0, key, r_);
    load_b(x.k, 0, key, k_);
    load_b(x.a, 0, key, a_);
    load_b(x.b, 0, key, b_);
    load_a(memory.d_qk(), 0, 0, a);
    multiply_add(xr, a, k_);
    load_a(memory.d_qb(), 0, 0, a);
    multiply_add(xr, a, b_);
    load_a(memory.d_ak(), 0, 0, a);
    multiply_add(xa, a, k_);
    load_a(memory.d_ab(), 0, 0, a);
    multiply_add(xa, a, b_);
    load_a_transposed(memory.d_qk(), 0, 0, a);
    multiply_add(xk, a, r_);
    load_a_transposed(memory.d_ak(), 0, 0, a);
    multiply_add(xk, a, a_);
    load_a_transposed(memory.d_qb(), 0, 0, a);
    multiply_add(xb, a, r_);
    load_a_transposed(memory.d_ab(), 0, 0, a);
    multiply_add(xb, a, a_);
  }

  float dw[2][4];
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
    state[tile] += __shfl_xor_sync(kAllLanes, state[tile], 1);
    state[tile] += __shfl_xor_sync(kAllLanes, state[tile], 2);
    float own[4], from[4], total[2] = {0.f, 0.f};  // what a token's own step has no part in, sums from a token on
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = g + 8 * half, column = key + 8 * tile + 2 * t;
      const float2 r = read_pair(x.r.at(row, column)), k = read_pair(x.k.at(row, column));
      const float2 a = read_pair(x.a.at(row, column)), b = read_pair(x.b.at(row, column));
      const float2 decay = *reinterpret_cast<const float2*>(x.decay_at(row, column));
      float2 before = make_float2(1.f, 1.f);
      if (row > 0) before = *reinterpret_cast<const float2*>(x.decay_at(row - 1, column));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int j = 2 * half + i;
        const float r_ = i ? r.y : r.x, k_ = i ? k.y : k.x, a_ = i ? a.y : a.x, b_ = i ? b.y : b.x;
        const float grown = i ? decay.y : decay.x, shrunk = __fdividef(1.f, grown);
        own[j] = a_ * xa[tile][j];
        from[j] = (r_ * xr[tile][j] - (k_ * xk[tile][j] + b_ * xb[tile][j])) + own[j];
        total[i] += later[tile][j];
        xr[tile][j] *= grown;
        xa[tile][j] *= i ? before.y : before.x;
        xk[tile][j] *= shrunk;
        xb[tile][j] *= shrunk;
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int distance = 1; distance < 8; distance *= 2) {
        total[i] += __shfl_xor_sync(kAllLanes, total[i], 4 * distance);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float next = __shfl_down_sync(kAllLanes, from[2 * half + i], 4 * distance);
          if (g + distance < 8) from[2 * half + i] += next;
        }
      }
      from[i] += __shfl_sync(kAllLanes, from[2 + i], t);  // all of the later 8 tokens
      total[i] += __shfl_sync(kAllLanes, state[tile], 4 * (2 * t + i));
      dw[tile][i] = (from[i] - own[i]) + total[i];
      dw[tile][2 + i] = (from[2 + i] - own[2 + i]) + total[i];
    }
  }

  if constexpr (kN == kBlockValues) {
    const auto narrow = [&](int which) { return static_cast<uint16_t*>(out.of[which]) + to + key; };
    store_keys(xr, n_rows, stride, narrow(kDr));
    store_keys(dw, n_rows, stride, static_cast<float*>(out.of[kDw]) + to + key);
    store_keys(xk, n_rows, stride, narrow(kDk));
    store_keys(xa, n_rows, stride, narrow(kDa));
    store_keys(xb, n_rows, stride, narrow(kDb));
  } else {
    float* const part = parts + to + key;
    store_keys(xr, n_rows, stride, part + kDr * part_size);
    store_keys(dw, n_rows, stride, part + kDw * part_size);
    store_keys(xk, n_rows, stride, part + kDk * part_size);
    store_keys(xa, n_rows, stride, part + kDa * part_size);
    store_keys(xb, n_rows, stride, part + kDb * part_size);
  }
}

// ---------------------------------------------------------------------------------------------- the kernel

template <int kN>
constexpr int kParts = kN / kBlockValues;

// Blocks on a multiprocessor. Two want 192 KB of its shared memory, which Hopper and Blackwell's large chips have.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 900 || __CUDA_ARCH__ >= 1200)
template <int kN>
constexpr int kResident = 1;
#else
template <int kN>
constexpr int kResident = Memory<kN>::kOverlaps ? 2 : 1;
#endif

// d_ends: gradients of the states after the spans, [slots, H, N, N]. kept_memory: see Kept.
// parts: [kParts, kKeyGradients, T, H, N]. In summary form the blocks of a slot and head are twice as many, the later
// half for P^T; all that is written is `summaries`, [slots, H, 2, N, N], Q and P^T; and checkpoints, d_ends,
// kept_memory and parts are not used.
template <int kN, bool kSplit, bool kSummary>
__global__ void __launch_bounds__(kThreads, kResident<kN>)
    backward_kernel(Heads heads, int segment_tokens, Inputs in, const uint16_t* checkpoints, const float* d_ends,
                    Outputs out, char* kept_memory, float* parts, float* summaries) {
  using Shared = Memory<kN>;
  constexpr int kInterval = kSummary ? 1 : kIntervalChunks;
  using ThisVisit = Visit<kInterval>;
  constexpr bool kOverlaps = Shared::kOverlaps;
  const Span span = span_of_block(heads, kSummary ? 2 * kParts<kN> : kParts<kN>, segment_tokens);
  if (!span.is_used || (kSummary && span.is_first)) return;
  const bool is_transition = kSummary && span.part >= kParts<kN>;
  const int part = span.part % kParts<kN>, values = part * kBlockValues;
  const int warp = static_cast<int>(threadIdx.x) / kWarp % kRoleWarps;
  const Shared memory(shared_memory());
  const int n_chunks = static_cast<int>(span.n_chunks());
  if (threadIdx.x == 0)
    memory.place() = {heads.row(span.first_token, span.head), heads.state(span.first_checkpoint, span.head),
                      span.is_first ? heads.state(span.s, span.head) : -1, n_chunks,
                      static_cast<int>(span.n_tokens - (n_chunks - 1) * int64_t{kChunkTokens})};
  __syncthreads();
  const auto rows_of = [&](int chunk) {
    return chunk + 1 == memory.place().n_chunks ? memory.place().last_rows : kChunkTokens;
  };
  const int stride = heads.H * kN;
  const auto row_of = [&](int chunk) { return memory.place().tokens + int64_t{chunk} * (kChunkTokens * stride); };
  int visit = 0;

  // Both roles come to the same barriers, each in code of its own: so the states are not alive where they are not used.
  if (threadIdx.x < kRoleThreads) {
    const int value = warp * 16;
    StateRows<kN> d;
    if constexpr (kSummary) {
      d.set_diagonal(is_transition ? 1.f : 0.f, values + value);
    } else {
      d.load(d_ends + heads.state(span.slot, span.head), values + value);
    }
    const Kept<kN> kept{kept_memory};
    const auto checkpoint_of = [&](int chunk) {
      return checkpoints + memory.place().checkpoints + int64_t{chunk / kIntervalChunks} * (kN * stride);
    };
    const auto wait_for_operands = [] {
      if constexpr (!kOverlaps)
        for (int i = 0; i < 3; ++i) meet();
    };
    if (kOverlaps && n_chunks > 0)
      for (int i = 0; i < 3; ++i) meet();  // the first chunk is prepared
    const int n_intervals = (n_chunks + kInterval - 1) / kInterval;
    int chunk = (n_intervals - 1) * kInterval;
    while (chunk >= 0) {
      unsigned u[4];
      if constexpr (!kSummary) {
        StateRows<kN> s;
        load_checkpoint(checkpoint_of(chunk), values + value, s);
        for (;; ++chunk, ++visit) {
          const Walk<kN, kSplit> walk{memory, not_before(visit), not_before(value)};
          wait_for_operands();
          walk.removed(s, u);
          // The visit of the last chunk goes on below.
          if ((chunk + 1) % kInterval == 0 || chunk + 1 == memory.place().n_chunks) break;
          kept.put(kept.u(chunk % kInterval), u);
          meet();
          meet();
          walk.advance(u, s);
#pragma unroll
          for (int key = 0; key < kN; key += 16) {
            unsigned a[4];
            as_a(s.s[key / 8], s.s[key / 8 + 1], a);
            kept.put(kept.state(chunk % kInterval) + key / 16 * kRoleThreads, a);
          }
          meet();
          if constexpr (!kOverlaps) meet();
        }
      }
      bool is_new = kSummary, goes_on = true;
      for (; goes_on; is_new = true, --chunk, ++visit) {
        const Walk<kN, kSplit> walk{memory, not_before(visit), not_before(value)};
        if (is_new) wait_for_operands();
        if (!kSummary && is_new) kept.get(kept.u(chunk % kInterval), u);
        unsigned dp[4];
        float dv[2][4];
        walk.decay(d);
        walk.removed_gradient(d, dp);
        meet();
        if constexpr (!kSummary) {
          store_a_transposed(u, memory.u(), value);
          store_a_transposed(dp, memory.dp(), value);
          walk.value_gradient(d, dp, dv);
        }
        meet();
        if constexpr (!kSummary) {
          unsigned s[kN / 16][4];
#pragma unroll
          for (int key = 0; key < kN; key += 16)
            if (chunk % kInterval == 0)
              load_checkpoint_a<kN>(checkpoint_of(chunk), values + value, key, s[key / 16]);
            else
              kept.get(kept.state(chunk % kInterval - 1) + key / 16 * kRoleThreads, s[key / 16]);
          walk.store_values(dv, rows_of(chunk), stride, out.dv + row_of(chunk) + values);
#pragma unroll
          for (int key = 0; key < kN; key += 16) {
            unsigned a[4];
            as_a(d.s[key / 8], d.s[key / 8 + 1], a);
            store_a(a, memory.d(), value, key);
          }
          walk.step_back(dp, d);
#pragma unroll
          for (int key = 0; key < kN; key += 16) store_a(s[key / 16], memory.s(), value, key);
        } else {
          walk.step_back(dp, d);
        }
        goes_on = chunk % kInterval != 0;
        meet();
        if constexpr (!kOverlaps) meet();
      }
      chunk -= kInterval - 1;
    }
    if constexpr (kSummary)
      d.store(summaries + 2 * heads.state(span.slot, span.head) + (is_transition ? kN * kN : 0), values + value);
    else if (memory.place().state >= 0)
      d.store(out.d_state + memory.place().state, values + value);
  } else {
    const int thread = static_cast<int>(threadIdx.x) - kRoleThreads;
    ThisVisit now(n_chunks);
    const auto fetch = [&](const ThisVisit& which, int number) {
      const int chunk = which.chunk(), n_rows = rows_of(chunk);
      fetch_inputs<kN, kSummary>(memory, in, row_of(chunk), stride, values, n_rows, is_transition ? 0 : n_rows, number,
                                 which.is_backward(), not_before(thread));
    };
    const auto scale = [&](int number) {
      scale_chunk<kN, kRoleThreads, kSplit, true>(memory.w(number), memory.operands(number), not_before(thread));
    };
    const auto score = [&](int number) {
      score_chunk<kN, kSplit, true>(memory.operands(number), memory.scores(), memory.scratch(), warp);
    };
    const auto sum_up = [&](int chunk, int number) {
      const int64_t part_size = heads.row(heads.T, 0);
#pragma unroll 1
      for (int key = not_before(warp * 16); key < kN; key += kRoleWarps * 16)
        key_gradients<kN>(memory, not_before(number), key, rows_of(chunk), stride, row_of(chunk), out,
                          parts + part * kKeyGradients * part_size, part_size);
    };
    if constexpr (kOverlaps) {
      if (!now.is_any()) return;
      fetch(now, 0);
      if (now.after(1).is_any()) fetch(now.after(1), 1);
      cp_async_wait<0>();
      meet();
      scale(0);
      meet();
      score(0);
      meet();
      int before = -1;  // the chunk of the visit before, if that went backward
      for (;; now = now.after(1), ++visit) {
        if (!kSummary && before >= 0) sum_up(before, visit - 1);
        if (!now.is_any()) break;
        cp_async_wait<0>();
        meet();
        const bool has_next = now.after(1).is_any();
        if (now.after(2).is_any()) fetch(now.after(2), visit + 2);
        if (has_next) scale(visit + 1);
        meet();
        before = now.is_backward() ? now.chunk() : -1;
        if (!kSummary && before >= 0) score_gradients(memory, not_before(visit), not_before(warp));
        if (has_next) score(visit + 1);
        meet();
      }
    } else {
      Incoming<kN> incoming;
      const auto start = [&](const ThisVisit& which) {
        if (!which.is_any()) return;
        const int chunk = which.chunk(), n_rows = rows_of(chunk), n_back_rows = which.is_backward() ? n_rows : 0;
        incoming.fetch(in, row_of(chunk), stride, values, n_rows, n_back_rows, kSummary ? 0 : n_rows,
                       is_transition ? 0 : n_back_rows, thread);
      };
      start(now);
      for (; now.is_any(); now = now.after(1)) {
        incoming.put(memory, thread);
        meet();
        scale(0);
        meet();
        score(0);
        meet();
        start(now.after(1));
        meet();
        meet();
        const bool has_sums = !kSummary && now.is_backward();
        if (has_sums) score_gradients(memory, 0, warp);
        meet();
        if (has_sums) sum_up(now.chunk(), 0);
        meet();
      }
    }
  }
}

constexpr int kJoinThreads = 256, kJoinRows = 16;

// d_ends of all segments from summaries and the gradients of the final states. A block has kJoinRows values of a head
// of a sequence, a thread one key of some of them.
template <int kN>
__global__ void __launch_bounds__(kJoinThreads)
    join_kernel(Heads heads, int segment_tokens, const float* d_final, const float* summaries, float* d_ends) {
  constexpr int kGroups = kJoinThreads / kN, kRows = kJoinRows / kGroups, kParts = kN / kJoinRows;
  const int block = static_cast<int>(blockIdx.x), row = block % kParts * kJoinRows;
  const int head = block / kParts % heads.H, s = block / kParts / heads.H;
  const int key = static_cast<int>(threadIdx.x) % kN, first = static_cast<int>(threadIdx.x) / kN * kRows;
  const int64_t start = heads.start(s), next = heads.start(s + 1), n_tokens = next < start ? 0 : next - start;
  const int64_t n_segments = n_tokens == 0 ? 1 : (n_tokens + segment_tokens - 1) / segment_tokens;
  const int64_t first_slot = start / segment_tokens + s;
  float* const rows = shared_memory();  // [kJoinRows, kN]
  const int64_t own = static_cast<int64_t>(row + first) * kN + key;

  float x[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) x[i] = d_final[heads.state(s, head) + own + i * kN];
  for (int64_t segment = n_segments - 1;; --segment) {
    const int64_t slot = first_slot + segment;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      d_ends[heads.state(slot, head) + own + i * kN] = x[i];
      rows[(first + i) * kN + key] = x[i];
    }
    if (segment == 0) break;
    __syncthreads();
    const float* const added = summaries + 2 * heads.state(slot, head);
    const float* const transition = added + kN * kN + key;
#pragma unroll
    for (int i = 0; i < kRows; ++i) x[i] = added[own + i * kN];
#pragma unroll 4
    for (int from = 0; from < kN; from += 4) {
      float by[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) by[j] = transition[(from + j) * kN];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const float4 four = *reinterpret_cast<const float4*>(rows + (first + i) * kN + from);
        x[i] += (four.x * by[0] + four.y * by[1]) + (four.z * by[2] + four.w * by[3]);
      }
    }
    __syncthreads();
  }
}

constexpr int kAddThreads = 256;

// Adds up the shares of the blocks of a head; parts: [n_parts, kKeyGradients, n_elements], four elements a thread.
__global__ void __launch_bounds__(kAddThreads)
    add_parts_kernel(const float* parts, int n_parts, int64_t n_elements, Outputs out) {
  const int64_t i = 4 * (static_cast<int64_t>(blockIdx.x) * kAddThreads + threadIdx.x);
  if (i >= n_elements) return;
#pragma unroll
  for (int which = 0; which < kKeyGradients; ++which) {
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
    for (int part = 0; part < n_parts; ++part) {
      const float4 x = *reinterpret_cast<const float4*>(parts + (part * kKeyGradients + which) * n_elements + i);
      sum = make_float4(sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w);
    }
    if (which == kDw)
      *reinterpret_cast<float4*>(static_cast<float*>(out.of[which]) + i) = sum;
    else
      *reinterpret_cast<uint2*>(static_cast<uint16_t*>(out.of[which]) + i) =
          make_uint2(pack_bfloat16(sum.x, sum.y), pack_bfloat16(sum.z, sum.w));
  }
}

// ---------------------------------------------------------------------------------------------- launches

constexpr int kBadValue = 1;    // cudaErrorInvalidValue
constexpr int kSegmentWork = 2;  // with segments, times that without: summaries are two passes of about half the work

bool can_run(const Heads& heads) {
  constexpr int64_t kMost = 0x7fffffff;  // of blocks, and of what is counted in an int
  const int64_t n_blocks = (static_cast<int64_t>(heads.S) + heads.T / kStateTokens) * heads.H * 8;
  const int64_t states_size = int64_t{heads.H} * heads.N * heads.N;
  return heads.dtype == kBFloat16 && (heads.N == 64 || heads.N == 128) && heads.S >= 0 && heads.H >= 0 &&
         heads.T >= 0 && n_blocks <= kMost && states_size <= kMost;
}

int choose_segment_tokens(Segments segments, int S, int64_t T, int H, int N) {
  if (segments == Segments::kNever) return 0;
  if (segments == Segments::kAlways) return kStateTokens;
  return segment_tokens_for(S, T, static_cast<int64_t>(H) * (N / kBlockValues), kSegmentWork);
}

// The parts of the workspace, in bytes from its beginning.
struct Workspace {
  int64_t kept = 0, parts, d_ends, summaries, end;

  Workspace(int segment_tokens, int S, int64_t T, int H, int N) {
    const int64_t slots = count_slots(S, T, segment_tokens), n_parts = N / kBlockValues;
    const int64_t state = static_cast<int64_t>(sizeof(float)) * N * N;
    parts = kept + slots * H * n_parts * (N == 64 ? Kept<64>::kBytes : Kept<128>::kBytes);
    d_ends = parts + (n_parts == 1 ? 0 : n_parts * kKeyGradients * static_cast<int64_t>(sizeof(float)) * T * H * N);
    summaries = d_ends + (segment_tokens == 0 ? 0 : slots * H * state);
    end = summaries + (segment_tokens == 0 ? 0 : 2 * slots * H * state);
  }
};

template <int kN, bool kSplit>
int run(const Heads& heads, int segment_tokens, const Inputs& in, const uint16_t* checkpoints, const float* d_final,
        const Outputs& out, char* workspace, void* stream) {
  constexpr size_t kShared = Memory<kN>::kBytes;
  static_assert(kShared <= kMaxSharedBytesChunked, "no chip may be too small");
  const Workspace at(segment_tokens, heads.S, heads.T, heads.H, kN);
  float* const parts = reinterpret_cast<float*>(workspace + at.parts);
  float* const summaries = reinterpret_cast<float*>(workspace + at.summaries);
  const float* d_ends = d_final;
  const unsigned n_blocks =
      static_cast<unsigned>(count_slots(heads.S, heads.T, segment_tokens) * heads.H * kParts<kN>);
  if (segment_tokens != 0) {
    float* const joined = reinterpret_cast<float*>(workspace + at.d_ends);
    int error = launch(backward_kernel<kN, kSplit, true>, dim3(2 * n_blocks), dim3(kThreads), kShared, stream, heads,
                       segment_tokens, in, nullptr, nullptr, out, nullptr, nullptr, summaries);
    if (error != 0) return error;
    error = launch(join_kernel<kN>, dim3(static_cast<unsigned>(heads.S) * heads.H * (kN / kJoinRows)),
                   dim3(kJoinThreads), kJoinRows * kN * sizeof(float), stream, heads, segment_tokens, d_final,
                   summaries, joined);
    if (error != 0) return error;
    d_ends = joined;
  }
  const int error = launch(backward_kernel<kN, kSplit, false>, dim3(n_blocks), dim3(kThreads), kShared, stream, heads,
                           segment_tokens, in, checkpoints, d_ends, out, workspace + at.kept, parts, nullptr);
  const int64_t n_elements = heads.T * heads.H * kN;
  if (error != 0 || kParts<kN> == 1 || n_elements == 0) return error;
  const int64_t n_add_blocks = (n_elements / 4 + kAddThreads - 1) / kAddThreads;
  return launch(add_parts_kernel, dim3(static_cast<unsigned>(n_add_blocks)), dim3(kAddThreads), 0, stream, parts,
                kParts<kN>, n_elements, out);
}

const uint16_t* halves(const void* x) { return static_cast<const uint16_t*>(x); }

template <bool kSplit>
int backward(Segments segments, const Heads& heads, const Inputs& in, const uint16_t* checkpoints, const float* d_final,
             const Outputs& out, char* workspace, void* stream) {
  if (!can_run(heads)) return kBadValue;
  if (heads.S == 0 || heads.H == 0) return 0;
  const int segment_tokens = choose_segment_tokens(segments, heads.S, heads.T, heads.H, heads.N);
  if (heads.N == 64)
    return run<64, kSplit>(heads, segment_tokens, in, checkpoints, d_final, out, workspace, stream);
  return run<128, kSplit>(heads, segment_tokens, in, checkpoints, d_final, out, workspace, stream);
}

}  // namespace

int64_t rwkv::wkv7_chunked_backward_bytes(Segments segments, int S, int64_t T, int H, int N) {
  return Workspace(choose_segment_tokens(segments, S, T, H, N), S, T, H, N).end;
}

// For every form; arguments are those of rwkv_wkv7_backward. Checkpoints are those of the forward pass of any form.
#define RWKV_FORM(form, segments, split)                                                                              \
  RWKV_EXPORT int rwkv_wkv7_backward##form(                                                                           \
      int dtype, int S, int64_t T, int H, int N, const int64_t* cu_seqlens, const void* r, const float* w,            \
      const void* k, const void* v, const void* a, const void* b, const void* checkpoints, const void* dy,            \
      const float* d_final, void* dr, float* dw, void* dk, void* dv, void* da, void* db, float* d_state,              \
      void* workspace, void* stream) {                                                                                \
    const Inputs in{halves(r), w, halves(k), halves(v), halves(a), halves(b), halves(dy)};                            \
    const Outputs out{{dr, dw, dk, da, db}, static_cast<uint16_t*>(dv), d_state};                                     \
    return backward<split>(segments, {dtype, S, T, H, N, cu_seqlens}, in, halves(checkpoints), d_final, out,          \
                           static_cast<char*>(workspace), stream);                                                    \
  }

RWKV_FORM(_chunked, Segments::kByRule, true)
RWKV_FORM(_chunked_whole, Segments::kNever, true)
RWKV_FORM(_chunked_segments, Segments::kAlways, true)
RWKV_FORM(_chunked_bf16, Segments::kByRule, false)
