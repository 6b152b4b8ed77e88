// The forward pass of the RWKV-7 recurrence on tensor cores, chunk by chunk; wkv7_chunked.cuh has the formulas.
//
// Layout: r, k, v, a, b, y [T, H, N] in bfloat16, w (log decay) in float32, with the tokens of all S sequences one after
// another; states [S, H, N, N] in float32, [value, key]; all contiguous and at multiples of 16 bytes. N is 64 or 128.
//
// Parallel split: a block takes 64 values of a head (all of them, or half) through the tokens of a sequence, or of a
// segment of one. Four of its warps walk: each owns 16 values of the state with all their keys, in float32, as the
// accumulators of the products that change it. Values are the rows of all that such a warp computes,
//   rhs^T = S a~^T + V^T Aak^T,  U^T = rhs^T M^T,  Y^T = S r~^T + V^T Aqk^T + U^T Aqb^T,  S <- (S + V^T k~ + U^T b~) e^G
// so that what a product leaves is an operand of the next where it lies, and warps need nothing of each other. The other
// warps, four where N is 64, eight where it is 128, prepare the next chunk meanwhile, and start copies of those that
// follow. There are two barriers a chunk: between scaled operands and the matrices made of them, and between chunks.
//
// Segments: few long sequences leave a chip idle. Then each is cut, and its segments walk side by side, three times:
// what a segment makes of a state S is S P + K, where K comes of a walk from zero and P of a walk from the identity
// without values; `join_kernel` computes the states between segments from these, one after the other, in float32; and
// the third walk, from these, is the ordinary one. So this form does three times the work (preparation included).
//
// Precision: with kSplit, operands of rhs and U are pairs of bfloat16, high and low (gpu_tiles.cuh); all others are
// rounded to bfloat16, and all sums are in float32.
//
// What a chunk costs (N = 64, split), in instructions of a warp on sm_90: one that walks 330, of which 62 are products of
// 16 x 8 x 16 and 27 loads of fragments; one that prepares 270 for scaled operands, and then 330 for the inverse or 140
// for another matrix and the copies. So a chunk keeps the four schedulers of a multiprocessor busy for 800 cycles, while
// the longest chain of what waits for each other is estimated at 1,000: two blocks are resident to hide that. They have
// 57 KB on their way from memory, two chunks each. A token of a head takes 1,024 bytes (N = 64: r, k, v, a, b, w, y) and
// 128 of checkpoints.
//
// Memory of a block, N = 64 / 128:
//   shared, bytes       split 77,056 / 98,816, plain 72,448 / 90,112
//   threads             256 / 384
//   registers           at most 128 / 168: two blocks / one on a multiprocessor; no spills from sm_80 to sm_120
// Workspace: with segments 2 N N floats for each of (T / segment + S) H; else none.

#include "wkv7_chunked.cuh"

namespace {

using namespace rwkv;

// w is the logarithm of the decay.
struct Inputs {
  const uint16_t* r;
  const float* w;
  const uint16_t *k, *v, *a, *b;
};

constexpr int kValues = 64;  // of a block
constexpr int kWalkThreads = kValues / 16 * kWarp;

template <int kN>
struct Block {
  static constexpr int kPrepareThreads = 2 * kN, kThreads = kWalkThreads + kPrepareThreads;
  static constexpr int kParts = kN / kValues;      // blocks that share the values of a head
  static constexpr int kStages = kN == 64 ? 4 : 3;  // chunks in shared memory: walked, prepared, and on their way
  static constexpr int kResident = kN == 64 ? 2 : 1;  // blocks on a multiprocessor
};

// ---------------------------------------------------------------------------------------------- shared memory

// Chunk c is at place c modulo the number of places.
template <int kN, bool kSplit>
struct Memory {
  static constexpr int kStages = Block<kN>::kStages;
  // In numbers of 2 bytes.
  static constexpr int kRows = Matrix<kN>::size_of(kChunkTokens), kValueRows = Matrix<kValues>::size_of(kChunkTokens);
  static constexpr int kChunk = 4 * kRows + kValueRows;
  static constexpr int kLow = kStages * kChunk;
  static constexpr int kScores = kLow + (kSplit ? 2 * kRows : 0);
  static constexpr int kOutputs = kScores + 2 * Scores::size_of(false);
  static constexpr int kOutput = Matrix<16>::size_of(kChunkTokens);  // of a warp
  static constexpr int kHalves = kOutputs + kValues / 16 * kOutput;
  // In floats.
  static constexpr int kDecays = (kStages - 1) * kChunkTokens * kN;  // those of the chunk that is walked are used up
  static constexpr int kFloats = kDecays + 2 * kN + kScratchFloats;
  static constexpr size_t kBytes = kHalves * sizeof(uint16_t) + kFloats * sizeof(float);

  uint16_t* halves;
  float* floats;

  __device__ __forceinline__ explicit Memory(float* memory)
      : halves(reinterpret_cast<uint16_t*>(memory)), floats(reinterpret_cast<float*>(halves + kHalves)) {}

  __device__ __forceinline__ Operands<kN> operands(int chunk) const {
    uint16_t* const first = halves + chunk % kStages * kChunk;
    return {{first},
            {first + kRows},
            {first + 2 * kRows},
            {first + 3 * kRows},
            {halves + kLow + chunk % 2 * kRows},
            {nullptr},
            nullptr,
            floats + kDecays + chunk % 2 * kN};
  }
  __device__ __forceinline__ Matrix<kValues> values(int chunk) const {
    return {halves + chunk % kStages * kChunk + 4 * kRows};
  }
  __device__ __forceinline__ float* decays(int chunk) const {
    return floats + chunk % (kStages - 1) * (kChunkTokens * kN);
  }
  __device__ __forceinline__ Scores scores(int chunk) const {
    return Scores(halves + kScores + chunk % 2 * Scores::size_of(false));
  }
  __device__ __forceinline__ Matrix<16> output(int warp) const { return {halves + kOutputs + warp * kOutput}; }
  __device__ __forceinline__ float* scratch() const { return floats + kDecays + 2 * kN; }
};

// ---------------------------------------------------------------------------------------------- a chunk

// What a warp has of a chunk, tokens as columns.
struct Columns {
  unsigned values[4];        // V^T
  float rhs[2][4], y[2][4];  // rhs^T and Y^T
};

// The first half of a chunk: all that needs the state before it. row: the warp's first value, counted in the block.
template <int kN, bool kSplit, bool kHasOutputs>
__device__ __forceinline__ void read_state(const StateRows<kN>& state, const Operands<kN>& x, const Scores& scores,
                                           const Matrix<kValues>& values, int row, Columns& columns) {
  float small[2][4];  // what low parts add, apart: shorter chains of sums
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int i = 0; i < 4; ++i) columns.rhs[half][i] = columns.y[half][i] = small[half][i] = 0.f;
#pragma unroll
  for (int key = 0; key < kN; key += 16) {
    unsigned high[4], low[4], b[2][2];
    if constexpr (kSplit)
      as_split_a(state.s[key / 8], state.s[key / 8 + 1], high, low);
    else
      as_a(state.s[key / 8], state.s[key / 8 + 1], high);
    load_b_transposed(x.a, 0, key, b);
    multiply_add(columns.rhs, high, b);
    if constexpr (kSplit) {
      multiply_add(small, low, b);
      load_b_transposed(x.a_low, 0, key, b);
      multiply_add(small, high, b);
    }
    if constexpr (kHasOutputs) {
      load_b_transposed(x.r, 0, key, b);
      multiply_add(columns.y, high, b);
    }
  }
  unsigned b[2][2];
  load_a_transposed(values, 0, row, columns.values);
  load_b_transposed(scores.ak, 0, 0, b);
  multiply_add(columns.rhs, columns.values, b);
  if constexpr (kSplit) {
    load_b_transposed(scores.ak_low, 0, 0, b);
    multiply_add(small, columns.values, b);
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < 4; ++i) columns.rhs[half][i] += small[half][i];
  }
  if constexpr (kHasOutputs) {
    load_b_transposed(scores.qk, 0, 0, b);
    multiply_add(columns.y, columns.values, b);
  }
}

// The second half: completes Y^T and takes the state over the chunk.
template <int kN, bool kSplit, bool kHasOutputs>
__device__ __forceinline__ void change_state(StateRows<kN>& state, const Operands<kN>& x, const Scores& scores,
                                             Columns& columns) {
  unsigned high[4], low[4], b[2][2];
  float u[2][4] = {}, small[2][4] = {};
  load_b(scores.inverse, 0, 0, b);
  if constexpr (kSplit) {
    as_split_a(columns.rhs[0], columns.rhs[1], high, low);
    multiply_add(u, high, b);
    multiply_add(small, low, b);
    load_b(scores.inverse_low, 0, 0, b);
    multiply_add(small, high, b);
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < 4; ++i) u[half][i] += small[half][i];
  } else {
    as_a(columns.rhs[0], columns.rhs[1], high);
    multiply_add(u, high, b);
  }
  as_a(u[0], u[1], high);
#pragma unroll
  for (int key = 0; key < kN; key += 16) {
    float(&tiles)[2][4] = *reinterpret_cast<float(*)[2][4]>(state.s[key / 8]);
    load_b(x.k, 0, key, b);
    multiply_add(tiles, columns.values, b);
    load_b(x.b, 0, key, b);
    multiply_add(tiles, high, b);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float2 decay = *reinterpret_cast<const float2*>(x.end_decay + key + 8 * half + 2 * lane_t());
      tiles[half][0] *= decay.x, tiles[half][1] *= decay.y, tiles[half][2] *= decay.x, tiles[half][3] *= decay.y;
    }
  }
  if constexpr (kHasOutputs) {
    load_b_transposed(scores.qb, 0, 0, b);
    multiply_add(columns.y, high, b);
  }
}

// Writes Y^T of a warp, through its own shared memory, as rows of 16 values, `y` being the first of the chunk.
__device__ __forceinline__ void write_outputs(const float (&columns)[2][4], const Matrix<16>& rows, int64_t stride,
                                              int n_tokens, uint16_t* y) {
  store_tile_transposed(columns[0], rows, 0, 0);
  store_tile_transposed(columns[1], rows, 8, 0);
  __syncwarp();
  const int token = lane_of_thread() / 2, value = lane_of_thread() % 2 * 8;
  if (token < n_tokens)
    *reinterpret_cast<uint4*>(y + token * stride + value) = *reinterpret_cast<const uint4*>(rows.at(token, value));
}

// ---------------------------------------------------------------------------------------------- a span

__device__ __forceinline__ bool is_walker() { return static_cast<int>(threadIdx.x) < kWalkThreads; }

// Rows of a chunk that there are.
__device__ __forceinline__ int rows_of_chunk(const Span& span, int chunk) {
  const int64_t left = span.n_tokens - static_cast<int64_t>(chunk) * kChunkTokens;
  return left < kChunkTokens ? static_cast<int>(left) : kChunkTokens;
}

// The chunks of a span, by the threads that prepare. Without has_values all of v is zero.
template <int kN, bool kSplit>
__device__ __forceinline__ void prepare(const Heads& heads, const Inputs& in, const Span& span, int first_value,
                                        bool has_values) {
  constexpr int kStages = Block<kN>::kStages, kPrepareThreads = Block<kN>::kPrepareThreads;
  const Memory<kN, kSplit> memory(shared_memory());
  const int thread = static_cast<int>((threadIdx.x - kWalkThreads) % kPrepareThreads), warp = thread / kWarp;
  const int n_chunks = static_cast<int>(span.n_chunks());
  const int64_t first = heads.row(span.first_token, span.head), stride = heads.row_stride();

  // The six inputs are copied by the last warps, each one or two of them: the first warp has a system to solve.
  constexpr int kEach = kN == 64 ? 2 : 1, kFirst = kPrepareThreads / kWarp - 6 / kEach;
  const auto fetch = [&](int chunk) {
    if (chunk < n_chunks) {
      const int64_t at = first + chunk * kChunkTokens * stride;
      const int n_rows = rows_of_chunk(span, chunk), lane = lane_of_thread();
      const auto is_mine = [&](int number) { return warp == kFirst + number / kEach; };
      const Operands<kN> x = memory.operands(chunk);
      if (is_mine(0)) fetch_chunk<kN, kWarp>(in.r + at, stride, n_rows, lane, x.r);
      if (is_mine(1)) fetch_chunk<kN, kWarp>(in.k + at, stride, n_rows, lane, x.k);
      if (is_mine(2)) fetch_chunk<kN, kWarp>(in.a + at, stride, n_rows, lane, x.a);
      if (is_mine(3)) fetch_chunk<kN, kWarp>(in.b + at, stride, n_rows, lane, x.b);
      if (is_mine(4))
        fetch_chunk<kValues, kWarp>(in.v + at + first_value, stride, has_values ? n_rows : 0, lane,
                                    memory.values(chunk));
      if (is_mine(5)) fetch_chunk<kN, kWarp>(in.w + at, stride, n_rows, lane, memory.decays(chunk));
    }
    cp_async_commit();  // also of nothing: groups are counted
  };

  for (int chunk = 0; chunk < kStages - 2; ++chunk) fetch(chunk);
  cp_async_wait<kStages - 3>();
  meet();
#pragma unroll 1
  for (int chunk = 0; chunk <= n_chunks; ++chunk) {  // while the one before it is walked
    // With only one chunk on its way, it has to set out at once; else while the first warp is busy alone.
    constexpr bool kEarly = kStages == 3;
    if constexpr (kEarly) fetch(chunk + kStages - 2);
    if (chunk < n_chunks)
      scale_chunk<kN, kPrepareThreads, kSplit, false>(memory.decays(chunk), memory.operands(chunk), thread);
    meet();
    if (chunk < n_chunks)
      score_chunk<kN, kSplit, false>(memory.operands(chunk), memory.scores(chunk), memory.scratch(), warp);
    if constexpr (!kEarly) fetch(chunk + kStages - 2);
    cp_async_wait<kStages - 3>();
    meet();
  }
}

// Where a warp writes: its 16 values of the first token, and its block of the first checkpoint or null.
struct Outputs {
  uint16_t *y, *checkpoint;
};

// Takes the state of a warp over the chunks of a span, meeting the threads that prepare at the same barriers: a barrier
// counts warps, wherever they come to it. Only with kHasOutputs is anything written; `out` then ends at what would be
// written next.
template <int kN, bool kSplit, bool kHasOutputs>
__device__ __forceinline__ void walk(const Heads& heads, const Span& span, StateRows<kN>& state, Outputs& out) {
  const Memory<kN, kSplit> memory(shared_memory());
  const int warp = static_cast<int>(threadIdx.x / kWarp), n_chunks = static_cast<int>(span.n_chunks());
  const int n_last_rows = rows_of_chunk(span, n_chunks - 1);
  const int64_t stride = heads.row_stride();

  for (int i = 0; i < 3; ++i) meet();  // the first chunk is there
#pragma unroll 1
  for (int chunk = 0; chunk < n_chunks; ++chunk) {
    if constexpr (kHasOutputs)
      if (out.checkpoint != nullptr && chunk % (kStateTokens / kChunkTokens) == 0) {
        store_checkpoint(state, out.checkpoint, 0);
        out.checkpoint += heads.state(1, 0);
      }
    Columns columns;
    read_state<kN, kSplit, kHasOutputs>(state, memory.operands(chunk), memory.scores(chunk), memory.values(chunk),
                                        warp * 16, columns);
    meet();
    change_state<kN, kSplit, kHasOutputs>(state, memory.operands(chunk), memory.scores(chunk), columns);
    if constexpr (kHasOutputs) {
      write_outputs(columns.y, memory.output(warp), stride, chunk + 1 < n_chunks ? kChunkTokens : n_last_rows, out.y);
      out.y += kChunkTokens * stride;
    }
    meet();
  }
}

// ---------------------------------------------------------------------------------------------- kernels

// segment_tokens: 0 where sequences stay whole. joined: states after all segments but the last of each sequence,
// [slots, H, N, N]. checkpoints may be null.
template <int kN, bool kSplit>
__global__ void __launch_bounds__(Block<kN>::kThreads, Block<kN>::kResident)
    forward_kernel(Heads heads, Inputs in, int segment_tokens, const float* state, const float* joined, uint16_t* y,
                   float* final_state, uint16_t* checkpoints) {
  const Span span = span_of_block(heads, Block<kN>::kParts, segment_tokens);
  if (!span.is_used) return;
  const int first_value = span.part * kValues;
  if (!is_walker()) {
    prepare<kN, kSplit>(heads, in, span, first_value, true);
    return;
  }
  const int row = first_value + static_cast<int>(threadIdx.x / kWarp) * 16;
  StateRows<kN> rows;
  rows.load(span.is_first ? state + heads.state(span.s, span.head) : joined + heads.state(span.slot - 1, span.head),
            row);
  Outputs out{y + heads.row(span.first_token, span.head) + row, nullptr};
  if (checkpoints != nullptr) out.checkpoint = checkpoints + heads.state(span.first_checkpoint, span.head) + row * kN;
  walk<kN, kSplit, true>(heads, span, rows, out);
  // The same span, found again: there are no registers to keep it in.
  const Span walked = span_of_block(heads, Block<kN>::kParts, not_before(segment_tokens));
  if (!walked.is_last) return;
  const int64_t end = walked.first_token + walked.n_tokens;
  rows.store(final_state + heads.state(walked.s, walked.head), row);
  // A sequence may have room for one more checkpoint than it has use for.
  const int64_t n_checkpoints = (walked.n_tokens + kStateTokens - 1) / kStateTokens;
  if (checkpoints == nullptr || walked.first_checkpoint + n_checkpoints > end / kStateTokens + walked.s) return;
  rows.set_diagonal(0.f, row);
  store_checkpoint(rows, out.checkpoint, 0);
}

// K and P of every segment that another one follows, [slots, H, N, N]; of the first segment of a sequence K alone, which
// is the state after it. A head has twice as many blocks as in the forward pass, for K first.
template <int kN, bool kSplit>
__global__ void __launch_bounds__(Block<kN>::kThreads, Block<kN>::kResident)
    summarize_kernel(Heads heads, Inputs in, int segment_tokens, const float* state, float* k, float* p) {
  const Span span = span_of_block(heads, 2 * Block<kN>::kParts, segment_tokens);
  const bool is_p = span.part >= Block<kN>::kParts;
  if (!span.is_used || span.is_last || (span.is_first && is_p)) return;
  const int first_value = span.part % Block<kN>::kParts * kValues;
  if (!is_walker()) {
    prepare<kN, kSplit>(heads, in, span, first_value, !is_p);
    return;
  }
  const int row = first_value + static_cast<int>(threadIdx.x / kWarp) * 16;
  StateRows<kN> rows;
  if (span.is_first)
    rows.load(state + heads.state(span.s, span.head), row);
  else
    rows.set_diagonal(is_p ? 1.f : 0.f, row);
  Outputs none{nullptr, nullptr};
  walk<kN, kSplit, false>(heads, span, rows, none);
  rows.store((is_p ? p : k) + heads.state(span.slot, span.head), row);
}

constexpr int kJoinRows = 8;  // values of a block
constexpr int kJoinThreadRows = 4;

// Makes of K of every segment the state after it, from the first on. A thread has 4 values of a key.
template <int kN>
__global__ void __launch_bounds__(kJoinRows / kJoinThreadRows * kN)
    join_kernel(Heads heads, int segment_tokens, float* k, const float* p) {
  constexpr int kParts = kN / kJoinRows;
  const int block = static_cast<int>(blockIdx.x), part = block % kParts, head = block / kParts % heads.H;
  const int s = block / kParts / heads.H;
  const int64_t start = heads.start(s), n_tokens = heads.start(s + 1) - start, first_slot = start / segment_tokens + s;
  const int key = static_cast<int>(threadIdx.x % kN), first = static_cast<int>(threadIdx.x / kN) * kJoinThreadRows;
  float* const x = shared_memory() + first * kN;  // the state's rows, [kJoinRows, kN]; these are the thread's

  float sums[kJoinThreadRows];
  for (int64_t number = 0; (number + 1) * segment_tokens < n_tokens; ++number) {
    const int64_t at = heads.state(first_slot + number, head);
    float* const to = k + at + (part * kJoinRows + first) * kN + key;
#pragma unroll
    for (int row = 0; row < kJoinThreadRows; ++row) sums[row] = to[row * kN];
    if (number > 0) {
      const float* const from = p + at + key;
#pragma unroll 4
      for (int i = 0; i < kN; i += 4) {
        float four[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) four[j] = from[(i + j) * kN];
#pragma unroll
        for (int row = 0; row < kJoinThreadRows; ++row) {
          const float4 y = *reinterpret_cast<const float4*>(x + row * kN + i);
          sums[row] += (y.x * four[0] + y.y * four[1]) + (y.z * four[2] + y.w * four[3]);
        }
      }
#pragma unroll
      for (int row = 0; row < kJoinThreadRows; ++row) to[row * kN] = sums[row];
      __syncthreads();  // the state has been read
    }
#pragma unroll
    for (int row = 0; row < kJoinThreadRows; ++row) x[row * kN + key] = sums[row];
    __syncthreads();
  }
}

// ---------------------------------------------------------------------------------------------- launches

constexpr int kBadValue = 1;  // cudaErrorInvalidValue

// A segment costs a walk for K, one for P and one for y, all about the same.
constexpr int64_t kSegmentWork = 3;

int segment_tokens_of(Segments segments, int S, int64_t T, int H, int N) {
  if (segments == Segments::kNever) return 0;
  if (segments == Segments::kAlways) return kStateTokens;
  return segment_tokens_for(S, T, static_cast<int64_t>(H) * (N / kValues), kSegmentWork);
}

// Numbers of one of the two results of `summarize_kernel`.
int64_t summary_size(const Heads& heads, int segment_tokens) {
  return segment_tokens == 0 ? 0 : count_slots(heads.S, heads.T, segment_tokens) * heads.H * heads.N * heads.N;
}

bool can_run(const Heads& heads, int segment_tokens) {
  if (heads.dtype != kBFloat16 || (heads.N != 64 && heads.N != 128)) return false;
  if (heads.S < 0 || heads.H < 0 || heads.T < 0) return false;
  const int64_t most_blocks = heads.N / kJoinRows * static_cast<int64_t>(heads.H);
  return count_slots(heads.S, heads.T, segment_tokens) * most_blocks <= 0x7fffffff;
}

template <int kN, bool kSplit>
int run(const Heads& heads, const Inputs& in, int segment_tokens, const float* state, uint16_t* y, float* final_state,
        uint16_t* checkpoints, float* workspace, void* stream) {
  constexpr size_t kShared = Memory<kN, kSplit>::kBytes;
  static_assert(kShared <= kMaxSharedBytesChunked, "no chip may be too small");
  const dim3 block(Block<kN>::kThreads), join_block(kJoinRows / kJoinThreadRows * kN);
  const unsigned n_heads = static_cast<unsigned>(heads.S) * heads.H;
  const unsigned n_blocks =
      static_cast<unsigned>(count_slots(heads.S, heads.T, segment_tokens)) * heads.H * Block<kN>::kParts;
  float *const k = workspace, *const p = workspace + summary_size(heads, segment_tokens);
  if (segment_tokens != 0) {
    int error = launch(summarize_kernel<kN, kSplit>, dim3(2 * n_blocks), block, kShared, stream, heads, in,
                       segment_tokens, state, k, p);
    if (error != 0) return error;
    error = launch(join_kernel<kN>, dim3(n_heads * (kN / kJoinRows)), join_block, kJoinRows * kN * sizeof(float), stream,
                   heads, segment_tokens, k, p);
    if (error != 0) return error;
  }
  return launch(forward_kernel<kN, kSplit>, dim3(n_blocks), block, kShared, stream, heads, in, segment_tokens, state, k,
                y, final_state, checkpoints);
}

int64_t workspace_bytes(Segments segments, int is_backward, int S, int64_t T, int H, int N) {
  if (S == 0 || H == 0 || (N != 64 && N != 128)) return 0;
  if (is_backward) return wkv7_chunked_backward_bytes(segments, S, T, H, N);
  const Heads heads{kBFloat16, S, T, H, N, nullptr};
  return 2 * sizeof(float) * summary_size(heads, segment_tokens_of(segments, S, T, H, N));
}

template <bool kSplit>
int forward(Segments segments, int dtype, int S, int64_t T, int H, int N, const int64_t* cu_seqlens, const void* r,
            const float* w, const void* k, const void* v, const void* a, const void* b, const float* state, void* y,
            float* final_state, void* checkpoints, void* workspace, void* stream) {
  const Heads heads{dtype, S, T, H, N, cu_seqlens};
  if (S == 0 || H == 0) return can_run(heads, 0) ? 0 : kBadValue;
  const int segment_tokens = segment_tokens_of(segments, S, T, H, N);
  if (!can_run(heads, segment_tokens)) return kBadValue;
  const auto halves = [](const void* x) { return static_cast<const uint16_t*>(x); };
  const Inputs in{halves(r), w, halves(k), halves(v), halves(a), halves(b)};
  uint16_t* const y_halves = static_cast<uint16_t*>(y);
  uint16_t* const kept = static_cast<uint16_t*>(checkpoints);
  float* const work = static_cast<float*>(workspace);
  if (N == 64) return run<64, kSplit>(heads, in, segment_tokens, state, y_halves, final_state, kept, work, stream);
  return run<128, kSplit>(heads, in, segment_tokens, state, y_halves, final_state, kept, work, stream);
}

}  // namespace

// Tokens from one checkpoint to the next; checkpoints are [T / this + S, H, N, N] in bfloat16, in an order of their own.
RWKV_EXPORT int rwkv_wkv7_checkpoint_tokens_chunked() { return kStateTokens; }

// For every form: bytes of the workspace of a call, with 0 it may be null; and the forward pass, where checkpoints may be
// null if no backward pass follows.
#define RWKV_FORM(form, segments, split)                                                                              \
  RWKV_EXPORT int64_t rwkv_wkv7_workspace_bytes##form(int is_backward, int S, int64_t T, int H, int N) {              \
    return workspace_bytes(segments, is_backward, S, T, H, N);                                                        \
  }                                                                                                                   \
  RWKV_EXPORT int rwkv_wkv7_forward##form(int dtype, int S, int64_t T, int H, int N, const int64_t* cu_seqlens,       \
                                          const void* r, const float* w, const void* k, const void* v, const void* a, \
                                          const void* b, const float* state, void* y, float* final_state,             \
                                          void* checkpoints, void* workspace, void* stream) {                         \
    return forward<split>(segments, dtype, S, T, H, N, cu_seqlens, r, w, k, v, a, b, state, y, final_state,           \
                          checkpoints, workspace, stream);                                                            \
  }

RWKV_FORM(_chunked, Segments::kByRule, true)
RWKV_FORM(_chunked_whole, Segments::kNever, true)
RWKV_FORM(_chunked_segments, Segments::kAlways, true)
RWKV_FORM(_chunked_bf16, Segments::kByRule, false)
