// The backward pass of RWKV-6 and RWKV-5 on tensor cores. Formulas, levels and the products p(i, j) of decays:
// gpu_chunked_linear_attention.cuh. Here they are those of one chunk, tokens 0 .. 15, with S the state before it, G the
// gradient of the state behind it, and dA = dy V^T, [16, 16]:
//
//   r'_i = r_i p(0, i-1),   k'_j = k_j p(j+1, 15),   decay = p(0, 15)
//   dV = A^T dy + k' G^T,   G <- G diag(decay) + dy^T r'
//   dr_i = p(0, i-1) (S^T dy_i) + sum over levels of p(m, i-1) O_i, for i with the level's bit,  + u k_i dA_ii
//   dk_j = p(j+1, 15) (G^T v_j) + sum over levels of p(j+1, m-1) O_j, for j without it,          + u r_j dA_jj
//   O = M X, with X the rows of the level, R or K, and M, symmetric, dA of the level's pairs: both dA K and dA^T R
//   dw_t = sum of R O over i > t in t's rows of a level with its bit, sum of K O over j < t in those without it,
//          sum_{i > t} of r'_i (S^T dy_i), sum_{j < t} of k'_j (G^T v_j), and decay times the sum over values of S G
//   du = sum of r_i k_i dA_ii
// So a gradient of w is a sum of what passes through that decay: nothing is subtracted, nothing divided by a decay,
// and a token's own bonus is no part of it. R, K, r', k' are there the numbers rounded to bfloat16 that the tensor
// cores had.
//
// A block takes 64 keys and all values of a head (N = 128: two blocks a head, whose shares of dV `add_values_kernel`
// adds) back through the chunks of a span, with 4 warps. A warp has 16 keys, and N / 4 values, of which it keeps G in
// registers, as float32. Between barriers it works for the one or the other:
//   keys     decays, R and K of the levels, this warp's share of A, which is a sum over keys; dA, and what the levels
//            give to dr, dk, dw; r', k'
//   barrier
//   values   dV; G to shared memory as bfloat16, [value, key]; then G before the chunk
//   barrier
//   keys     S^T dy, G^T v, and the sum over values of S G, which is the diagonal of S^T G; dr, dk, dw
// What is of keys is transposed, [key, token], and a lane has 2 keys of 4 tokens (`Lane`). So R, K and M are operands
// as they are computed, and products of decays and sums of dw over tokens are shuffles of 4 lanes.
//
// The states come from the checkpoints. Before the chunks from one checkpoint to the next are taken back, the state
// goes forward through them, with a barrier each, and those between are left in shared memory, as bfloat16, 3 at once
// (N = 128: 2, so that half of the way is gone twice). r, w and k of the chunk that comes next are fetched as soon as
// this one's are read, v and dy into a second buffer.
//
// Segments. G of a segment's start is linear in that of its end, G_start = G_end diag(exp(sum of w)) + Q, with Q the G
// that a pass from zero ends with. `gradient_change_kernel` finds Q of all segments but the first ones side by side,
// `join_gradients_kernel` goes back through the segments of each sequence and leaves the G that each ends with in place
// of Q, and then `backward_kernel` takes all segments from there. What each has for du, and RWKV-5's dw,
// `add_segments_kernel` adds in their order.
//
// What a chunk costs. mma of 16 x 8 x 16 for each of 4 warps: N / 4 for dA, 15 for the levels, N / 64 (2 + 8 + 8) for
// dV and G, 3 N / 8 for what goes through the states: 73 for N = 64, 131 for N = 128; and N / 8 to go forward.
// Exponentials: 8 for each thread, and 8 forward. Shared memory in KB, for N = 64 and 128: RWKV-6 73 and 99, RWKV-5 70
// and 96; gradient_change_kernel 18 and 22, 14 and 18. 168 registers and 3 blocks a multiprocessor, where it has the
// memory, or 255 and 2. Workspace: N = 128: 2 T H N floats; with segments N N + 2 N (RWKV-5: 3 N) floats for each head
// of each slot (gpu_chunks.cuh).

#pragma once

#include "gpu_chunked_linear_attention.cuh"

namespace rwkv::chunked::back {

constexpr int kBlockKeys = 64;
constexpr int kWarps = kBlockKeys / 16;
constexpr int kThreads = kWarps * kWarp;
constexpr int kChunksOfState = kStateTokens / kChunkTokens;
constexpr int kDecayStride = kBlockKeys + 4;  // of w in shared memory: other tokens and keys are in other banks

// Where gradients go. Those of u, and of w in RWKV-5, are [rows, H, N]: a row for each sequence or, with segments,
// slot. v_parts: [2, T, H, N], where N is 128 instead of v.
struct Gradients {
  uint16_t* r;
  float* w;
  uint16_t *k, *v;
  float* u;
  float* v_parts;
};

// ---------------------------------------------------------------------------------------------- a lane's part

// A lane has of [16 keys, 16 tokens] what an operand `a` has: [i][c] is of key g + 8 (i % 2) and token 8 (i / 2) + 2t
// + c, as pairs of bfloat16 in 4 registers or as 4 x 2 floats. Results of products, two tiles side by side, have it as
// [i / 2][2 (i % 2) + c].
struct Lane {
  int number, g, t;
  bool bit1, bit2;  // whether the lane's tokens have the bits of level 1 and of level 2; i / 2 is that of level 3

  __device__ __forceinline__ explicit Lane(int lane)
      : number(lane), g(lane >> 2), t(lane & 3), bit1((lane & 1) != 0), bit2((lane & 2) != 0) {}
};

__device__ __forceinline__ float lower_of(unsigned pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float upper_of(unsigned pair) { return __uint_as_float(pair & 0xffff0000u); }

// x f, rounded.
__device__ __forceinline__ unsigned scale_pair(unsigned x, const float (&f)[2]) {
  return pack_bfloat16(lower_of(x) * f[0], upper_of(x) * f[1]);
}

__device__ __forceinline__ float from_lane(float x, int lane) { return __shfl_sync(kAllLanes, x, lane); }
__device__ __forceinline__ float from_other(float x, int flipped) { return __shfl_xor_sync(kAllLanes, x, flipped); }

// The products p of a lane's keys and tokens.
struct Decays {
  float own[4][2];             // of the tokens alone
  float other_two[4];          // of the other 2 of the same 4 tokens
  float earlier[4], later[4];  // of those of the same 8 tokens before the lane's two, and of those behind them
  float sum[2];                // of w of all tokens, of keys g and g + 8

  __device__ __forceinline__ Decays(const Lane& lane, const float (&w)[4][2]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      own[i][0] = __expf(w[i][0]);
      own[i][1] = __expf(w[i][1]);
      const float two = own[i][0] * own[i][1];
      other_two[i] = from_other(two, 1);
      const float four = two * other_two[i], other_four = from_other(four, 2);
      earlier[i] = (lane.bit1 ? other_two[i] : 1.f) * (lane.bit2 ? other_four : 1.f);
      later[i] = (lane.bit1 ? 1.f : other_two[i]) * (lane.bit2 ? 1.f : other_four);
    }
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float all = (w[c][0] + w[c][1]) + (w[2 + c][0] + w[2 + c][1]);
      all += from_other(all, 1);
      all += from_other(all, 2);
      sum[c] = all;
    }
  }

  // Of the tokens' rows of a level.
  template <int kLevel>
  __device__ __forceinline__ void of_level(const Lane& lane, int i, float (&f)[2]) const {
    if constexpr (kLevel == 1) {
      f[0] = lane.bit1 ? 1.f : own[i][1];
      f[1] = lane.bit1 ? own[i][0] : 1.f;
    } else if constexpr (kLevel == 2) {
      const float others = lane.bit1 == lane.bit2 ? other_two[i] : 1.f;
      f[0] = lane.bit2 ? others : others * own[i][1];
      f[1] = lane.bit2 ? others * own[i][0] : others;
    } else {
      static_assert(kLevel == 3, "rows of level 0 have no factors");
      f[0] = i / 2 == 1 ? earlier[i] : later[i] * own[i][1];
      f[1] = i / 2 == 1 ? earlier[i] * own[i][0] : later[i];
    }
  }
  // p(0, 15), of keys g and g + 8: from the sum, because a decay near 1 that is rounded at each of thousands of tokens
  // would be wrong after them.
  __device__ __forceinline__ float whole(int i) const { return decay_of(sum[i]); }
  // Of all of the 8 tokens.
  __device__ __forceinline__ float eight(int i) const { return (earlier[i] * own[i][0]) * (own[i][1] * later[i]); }
  // p from the start of the chunk to the token before, and from the token behind to the end.
  __device__ __forceinline__ float from_start(int i, int c) const {
    const float two = i / 2 == 0 ? earlier[i] : earlier[i] * eight(i % 2);
    return c == 0 ? two : two * own[i][0];
  }
  __device__ __forceinline__ float to_end(int i, int c) const {
    const float two = i / 2 == 1 ? later[i] : later[i] * eight(2 + i);
    return c == 1 ? two : two * own[i][1];
  }
};

// ---------------------------------------------------------------------------------------------- shared memory

// Where a span's tokens and what belongs to it are. In shared memory, because they are needed too seldom for registers.
struct Places {
  int64_t token;       // the head's row of the span's first token, in r, v and their like
  int64_t keys;        // in that row, the block's keys
  int64_t checkpoint;  // the first one, from the block's keys on
  int64_t d_state;     // the same of d_state; -1 where the span is not the first of its sequence
  int64_t sum;         // the block's keys in du, and in RWKV-5's dw
  int64_t values;      // as token, in v_parts
  int64_t zero;        // 0, which the compiler does not know
  int n_chunks, last_rows;  // last_rows: tokens of the last chunk

  template <int kN>
  __device__ __forceinline__ static Places of(const Heads& heads, const Span& span) {
    const int first_key = span.part * kBlockKeys;
    Places places;
    places.token = (span.first_token * heads.H + span.head) * kN;
    places.keys = places.token + first_key;
    places.checkpoint = heads.state(span.first_checkpoint, span.head) + first_key;
    places.d_state = span.is_first ? heads.state(span.s, span.head) + first_key : -1;
    places.sum = (span.slot * heads.H + span.head) * kN + first_key;
    places.zero = 0;
    places.values = places.token + span.part * heads.T * heads.row_stride();
    places.n_chunks = static_cast<int>(span.n_chunks());
    places.last_rows = static_cast<int>(span.n_tokens - static_cast<int64_t>(places.n_chunks - 1) * kChunkTokens);
    return places;
  }
  __device__ __forceinline__ int rows(int chunk) const { return chunk == n_chunks - 1 ? last_rows : kChunkTokens; }
};

template <int kN>
struct Block {
  static constexpr int kParts = kN / kBlockKeys;
  static constexpr int kTiles = kN / 16 / kWarps;  // of 16 values, of a warp
  static constexpr int kResident = kN == 64 ? 3 : 2;  // on a multiprocessor
  // Chunks that are taken back after each way forward, and states that are in shared memory then. That of the first of
  // all chunks is the checkpoint itself, and comes when there is room.
  static constexpr int kTogether = kN == 64 ? kChunksOfState : 2;
  static constexpr int kStates = kN == 64 ? kChunksOfState - 1 : 2;
};

// kStateAlone: without what only `backward_kernel` needs.
template <int kN, bool kStatic, bool kStateAlone>
struct Memory {
  static constexpr int kKeyRows = Matrix<kBlockKeys>::size_of(kChunkTokens);
  static constexpr int kValueRows = Matrix<kN>::size_of(kChunkTokens);
  static constexpr int kScaled = Matrix<kChunkTokens>::size_of(kBlockKeys);
  static constexpr int kState = Matrix<kBlockKeys>::size_of(kN);
  static constexpr int kDecayFloats = kStatic ? 0 : kChunkTokens * kDecayStride;
  static constexpr int kShareFloats = kStateAlone ? 0 : kWarps * 6 * kWarp;
  static constexpr int kWaitingFloats = 16 * kThreads;
  static constexpr int kSumFloats = kStateAlone ? 0 : kWaitingFloats + (kStatic ? 4 : 2) * kThreads;
  static constexpr int kPlaceFloats = sizeof(Places) / sizeof(float);
  static_assert(sizeof(Places) % 16 == 0, "what follows is read 16 bytes at a time");
  static constexpr int kFloats = kPlaceFloats + 4 * kBlockKeys + kDecayFloats + kShareFloats + kSumFloats;
  static constexpr int kNumbers =
      kStateAlone ? 2 * kScaled + kKeyRows + 2 * kValueRows
                  : 2 * kScaled + 2 * kKeyRows + 4 * kValueRows + (1 + Block<kN>::kStates) * kState;
  static constexpr size_t kBytes = kFloats * sizeof(float) + kNumbers * sizeof(uint16_t);
  static_assert(kBytes <= kMaxSharedBytesChunked, "more than every chip has");

  float* const first;

  __device__ __forceinline__ Places& places() const { return *reinterpret_cast<Places*>(first); }
  __device__ __forceinline__ float* decay(int turn) const { return first + kPlaceFloats + turn * kBlockKeys; }  // [64]
  __device__ __forceinline__ float* u() const { return decay(2); }      // [64]
  __device__ __forceinline__ float* own_w() const { return decay(3); }  // [64], RWKV-5's
  __device__ __forceinline__ float* w() const { return decay(4); }      // [16, kDecayStride], RWKV-6's
  __device__ __forceinline__ float* share(int warp) const { return w() + kDecayFloats + warp * 6 * kWarp; }  // `Share`
  // A thread's numbers that wait for what comes through the states: level 3's rows times their gradients, as put_aside
  // leaves them, and 2 kThreads further on `Sums::w`.
  __device__ __forceinline__ float4* waiting(int thread) const {
    return reinterpret_cast<float4*>(share(kWarps)) + thread;
  }
  // What a thread sums over all tokens, of keys g and g + 8: du, and RWKV-5's dw.
  __device__ __forceinline__ float2* du(int thread) const {
    return reinterpret_cast<float2*>(share(kWarps) + kWaitingFloats) + thread;
  }
  __device__ __forceinline__ float2* dw(int thread) const { return du(thread) + kThreads; }
  // r' and k' of this chunk, [key, token]; on the way forward k' in turns. A warp's 16 rows of both are its scratch.
  __device__ __forceinline__ Matrix<kChunkTokens> scaled(int which) const { return {numbers() + which * kScaled}; }
  __device__ __forceinline__ Matrix<kBlockKeys> x(int which) const {  // r and k, [token, key]; kStateAlone: r
    return {numbers() + 2 * kScaled + which * kKeyRows};
  }
  __device__ __forceinline__ Matrix<kN> values(int which) const {  // v in turns, then dy in turns; kStateAlone: dy
    return {x(kStateAlone ? 1 : 2).first + which * kValueRows};
  }
  __device__ __forceinline__ Matrix<kBlockKeys> gradient() const { return {values(4).first}; }
  __device__ __forceinline__ Matrix<kBlockKeys> state(int chunk) const {
    return {values(4).first + (1 + chunk % kChunksOfState % Block<kN>::kStates) * kState};
  }

 private:
  __device__ __forceinline__ uint16_t* numbers() const { return reinterpret_cast<uint16_t*>(first + kFloats); }
};

// ---------------------------------------------------------------------------------------------- a warp's keys

__device__ __forceinline__ void put_decays(const Lane& lane, int first_key, const Decays& decays, float* to) {
  to[first_key + lane.g] = decays.whole(0);  // all lanes with these keys: the same number
  to[first_key + lane.g + 8] = decays.whole(1);
}

// w of a lane's keys and tokens. own: RWKV-5's, [64], of which n_rows tokens are there.
template <bool kStatic>
__device__ __forceinline__ void read_decays(const float* w, const float* own, int n_rows, const Lane& lane,
                                            int first_key, float (&x)[4][2]) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int token = 8 * (i / 2) + 2 * lane.t + c;
      if constexpr (kStatic)
        x[i][c] = token < n_rows ? own[first_key + lane.g + 8 * (i % 2)] : 0.f;
      else
        x[i][c] = w[token * kDecayStride + first_key + lane.g + 8 * (i % 2)];
    }
}

// m[row + key][token] = an operand a of [key, token].
__device__ __forceinline__ void put_operand(const unsigned (&a)[4], const Lane& lane, const Matrix<kChunkTokens>& m,
                                            int row) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
    *reinterpret_cast<unsigned*>(m.at(row + lane.g + 8 * (i % 2), 8 * (i / 2) + 2 * lane.t)) = a[i];
}
// The lane's part of it again.
__device__ __forceinline__ void take_operand(const Lane& lane, const Matrix<kChunkTokens>& m, int row,
                                             unsigned (&a)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
    a[i] = *reinterpret_cast<const unsigned*>(m.at(row + lane.g + 8 * (i % 2), 8 * (i / 2) + 2 * lane.t));
}

// The level of a pair of tokens is that of the highest bit in which their numbers differ.
__device__ __forceinline__ int level_of(int difference) { return difference >= 4 ? 2 : difference >= 2 ? 1 : 0; }

// What a lane gathers of dr, dk, dw.
struct Sums {
  float r[4][2], k[4][2], w[4][2];
};

// This warp's share of A^T, [j, i], the sum over its keys, as a product leaves it: row g and columns 2t and 2t + 1 of
// the two blocks of 8 x 8 on the diagonal. The one above is of level 3 alone, which puts it into shared memory itself;
// the one below is 0. Begins with A_ii: bonus, of tokens g and g + 8, of which those in lanes with t = g / 2 are used.
struct Share {
  float first[2], last[2];

  __device__ __forceinline__ Share(const Lane& lane, const float (&bonus)[2]) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const bool is_own = lane.g == 2 * lane.t + e;
      first[e] = is_own ? bonus[0] : 0.f;
      last[e] = is_own ? bonus[1] : 0.f;
    }
  }
  // 4 numbers for each lane; 2 for each, of the block above, lie behind them.
  __device__ __forceinline__ void put(const Lane& lane, float* to) const {
    *reinterpret_cast<float4*>(to + 4 * lane.number) = make_float4(first[0], first[1], last[0], last[1]);
  }
};

// A^T of a level, of this warp's keys. Its rows, [key, token], begin at `row` in scratch. to: this warp's share in
// memory.
template <int kLevel>
__device__ __forceinline__ void multiply_level(const Lane& lane, const Matrix<kChunkTokens>& scratch, int row,
                                               Share& share, float* to) {
  unsigned tokens[4], keys[2][2];
  load_a_transposed(scratch, row, 0, tokens, lane.number);  // [token, key]
  as_transposed_b(tokens, keys);
  if constexpr (kLevel == 3) {
    float c[4] = {};
    mma_bfloat16(c, tokens, keys[1]);
    *reinterpret_cast<float2*>(to + 4 * kWarp + 2 * lane.number) = make_float2(c[0], c[1]);
  } else {
    float c[2][4] = {};
    multiply_add(c, tokens, keys);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int column = 2 * lane.t + e;
      const bool is_here = column > lane.g && level_of(lane.g ^ column) == kLevel;
      share.first[e] = is_here ? c[0][e] : share.first[e];
      share.last[e] = is_here ? c[1][2 + e] : share.last[e];
    }
  }
}

__device__ __forceinline__ void put_aside(const float (&x)[4][2], float4* to) {
  to[0] = make_float4(x[0][0], x[0][1], x[1][0], x[1][1]);
  to[kThreads] = make_float4(x[2][0], x[2][1], x[3][0], x[3][1]);
}
__device__ __forceinline__ void take_back(const float4* from, float (&x)[4][2]) {
  const float4 first = from[0], second = from[kThreads];
  x[0][0] = first.x, x[0][1] = first.y, x[1][0] = first.z, x[1][1] = first.w;
  x[2][0] = second.x, x[2][1] = second.y, x[3][0] = second.z, x[3][1] = second.w;
}

// What a level gives to the gradients. x: its rows; d_pairs: dA as multiply_outputs leaves it; waiting: as in `Memory`.
template <int kLevel>
__device__ __forceinline__ void add_level(const Lane& lane, const unsigned (&x)[4], const Decays& decays,
                                          const unsigned (&d_pairs)[2][2], Sums& sums, float4* waiting) {
  float out[2][4] = {};
  if constexpr (kLevel == 3) {  // tokens 0 .. 7 with tokens 8 .. 15
    mma_bfloat16(out[0], x, {0u, d_pairs[0][1]});
    mma_bfloat16(out[1], x, {d_pairs[1][0], 0u});
  } else {
    const int difference = lane.g ^ (2 * lane.t);
    const unsigned whole = kLevel > 0 ? 0xffffffffu : difference == 0 ? 0xffff0000u : 0x0000ffffu;
    const unsigned mask = level_of(difference) == kLevel ? whole : 0u;
    mma_bfloat16(out[0], x, {d_pairs[0][0] & mask, 0u});
    mma_bfloat16(out[1], x, {0u, d_pairs[1][1] & mask});
  }
  const bool has_bit = kLevel == 2 ? lane.bit2 : lane.bit1;
  [[maybe_unused]] float for_later[4][2];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float o[2] = {out[i / 2][2 * (i % 2)], out[i / 2][2 * (i % 2) + 1]};
    if constexpr (kLevel == 0) {
      sums.k[i][0] += o[0];
      sums.r[i][1] += o[1];
    } else {
      float f[2];
      decays.of_level<kLevel>(lane, i, f);
      const float z[2] = {lower_of(x[i]) * o[0], upper_of(x[i]) * o[1]};
      // Rows with the bit pass through the decays before them, those without it through those behind them.
      if constexpr (kLevel == 3) {
        for_later[i][0] = z[0], for_later[i][1] = z[1];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          sums.r[i][c] += i / 2 == 1 ? f[c] * o[c] : 0.f;
          sums.k[i][c] += i / 2 == 1 ? 0.f : f[c] * o[c];
        }
      } else {
        if constexpr (kLevel == 2) {
          const float others = from_other(z[0] + z[1], 1), all = lane.bit1 != lane.bit2 ? others : 0.f;
          sums.w[i][0] += all;
          sums.w[i][1] += all;
        }
        if (has_bit) {
          sums.r[i][0] += f[0] * o[0];
          sums.r[i][1] += f[1] * o[1];
          sums.w[i][0] += z[1];
        } else {
          sums.k[i][0] += f[0] * o[0];
          sums.k[i][1] += f[1] * o[1];
          sums.w[i][1] += z[0];
        }
      }
    }
  }
  if constexpr (kLevel == 3) put_aside(for_later, waiting);
}

// Both of a level, of which the rows are made here.
template <int kLevel>
__device__ __forceinline__ void take_level(const Lane& lane, const unsigned (&r)[4], const unsigned (&k)[4],
                                           const Decays& decays, const unsigned (&d_pairs)[2][2],
                                           const Matrix<kChunkTokens>& scratch, int row, Share& share, float* to,
                                           Sums& sums, float4* waiting) {
  unsigned x[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (kLevel == 0) {
      x[i] = (k[i] & 0x0000ffffu) | (r[i] & 0xffff0000u);
    } else {
      const bool has_bit = kLevel == 3 ? i / 2 == 1 : kLevel == 2 ? lane.bit2 : lane.bit1;
      float f[2];
      decays.of_level<kLevel>(lane, i, f);
      x[i] = scale_pair(has_bit ? r[i] : k[i], f);
    }
  }
  put_operand(x, lane, scratch, row);
  __syncwarp();
  multiply_level<kLevel>(lane, scratch, row, share, to);
  add_level<kLevel>(lane, x, decays, d_pairs, sums, waiting);
}

// b[j / 8][i][j % 8] = A[i][j], the sum of all warps' shares.
template <typename Memory>
__device__ __forceinline__ void load_attention(const Lane& lane, const Memory& memory, unsigned (&b)[2][2]) {
  float left[4] = {}, right[4] = {};
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) {
    const float* const share = memory.share(warp);
    const float4 four = *reinterpret_cast<const float4*>(share + 4 * lane.number);
    const float2 two = *reinterpret_cast<const float2*>(share + 4 * kWarp + 2 * lane.number);
    left[0] += four.x, left[1] += four.y;
    right[0] += two.x, right[1] += two.y, right[2] += four.z, right[3] += four.w;
  }
  unsigned a[4];
  as_a(left, right, a);
  as_transposed_b(a, b);
}

// Sums over keys of r u k of tokens g and g + 8, for lanes with t = g / 2.
__device__ __forceinline__ void sum_bonus(const Lane& lane, const float (&products)[4][2], const float (&u)[2],
                                          float (&bonus)[2]) {
  float sums[2][2];  // [8 tokens][which]
#pragma unroll
  for (int q = 0; q < 2; ++q)
#pragma unroll
    for (int c = 0; c < 2; ++c) sums[q][c] = u[0] * products[2 * q][c] + u[1] * products[2 * q + 1][c];
  // Over lanes of other keys, each time half of the sums: a lane is left with token 8 (g / 2 % 2) + 2t + g % 2.
  const bool odd = (lane.g & 1) != 0, upper = (lane.g & 2) != 0;
  float half[2];
#pragma unroll
  for (int q = 0; q < 2; ++q)
    half[q] = (odd ? sums[q][1] : sums[q][0]) + from_other(odd ? sums[q][0] : sums[q][1], 4);
  float sum = (upper ? half[1] : half[0]) + from_other(upper ? half[0] : half[1], 8);
  sum += from_other(sum, 16);
  const int from = 4 * (lane.g & 1) + lane.t;
  bonus[0] = from_lane(sum, from);
  bonus[1] = from_lane(sum, from + 8);
}

// dA, symmetric: b[i / 8][j][i % 8] = dy_i v_j where i > j, else dy_j v_i. own: dA_ii of the lane's tokens.
template <int kN>
__device__ __forceinline__ void multiply_outputs(const Lane& lane, const Matrix<kN>& v, const Matrix<kN>& dy,
                                                 unsigned (&b)[2][2], float (&own)[2][2]) {
  float below[2][4] = {}, above[2][4] = {};
#pragma unroll
  for (int value = 0; value < kN; value += 16) {
    unsigned x[4], y[4], as_b[2][2];
    load_a(v, 0, value, x, lane.number);
    load_a(dy, 0, value, y, lane.number);
    as_transposed_b(x, as_b);
    multiply_add(below, y, as_b);
    as_transposed_b(y, as_b);
    multiply_add(above, x, as_b);
  }
  const int from = 9 * lane.t;  // token 2t is in row 2t, lane 4 (2t) + t; the next one a row further on
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    own[0][c] = from_lane(below[0][c], from + 4 * c);
    own[1][c] = from_lane(below[1][2 + c], from + 4 * c);
  }
  float left[4], right[4];
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const bool is_below = lane.g > 2 * lane.t + e;
    left[e] = is_below ? below[0][e] : above[0][e];
    left[2 + e] = below[0][2 + e];
    right[e] = above[1][e];
    right[2 + e] = is_below ? below[1][2 + e] : above[1][2 + e];
  }
  unsigned a[4];
  as_a(left, right, a);
  as_transposed_b(a, b);
}

// w = dw, but for what passes through the whole chunk. z_r, z_k: r' and k' times S^T dy and G^T v; waiting: as in
// `Memory`.
__device__ __forceinline__ void sum_decays(const Lane& lane, const float (&z_r)[4][2], const float (&z_k)[4][2],
                                           const float4* waiting, float (&w)[4][2]) {
  float level3[4][2];
  take_back(waiting, level3);
  take_back(waiting + 2 * kThreads, w);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const bool later = i / 2 == 1;  // with the bit of level 3
    float before[2], behind[2];  // of this and later tokens to those before; of this and earlier ones to those behind
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      before[c] = later ? z_r[i][c] + level3[i][c] : z_r[i][c];
      behind[c] = later ? z_k[i][c] : z_k[i][c] + level3[i][c];
    }
    const float two_before = before[0] + before[1], two_behind = behind[0] + behind[1];
    const float near = from_other(lane.bit1 ? two_before : two_behind, 1);
    float four = lane.bit2 ? two_before : two_behind;
    four += from_other(four, 1);
    const float far = from_other(four, 2);
    w[i][0] += before[1] + (near + far);
    w[i][1] += behind[0] + (near + far);
  }
#pragma unroll
  for (int c = 0; c < 2; ++c) {  // of the other 8 tokens
    float before = z_r[2 + c][0] + z_r[2 + c][1], behind = z_k[c][0] + z_k[c][1];
    before += from_other(before, 1);
    behind += from_other(behind, 1);
    before += from_other(before, 2);
    behind += from_other(behind, 2);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      w[c][e] += before;
      w[2 + c][e] += behind;
    }
  }
}

// ---------------------------------------------------------------------------------------------- a warp's values

// A state or the gradient of one: of a warp's kTiles times 16 values and the block's keys, in tiles of 8 keys.
template <int kTiles>
struct State {
  float x[kTiles][kBlockKeys / 8][4];

  // `state`: of the head and the block's first key, [kN, kN], float32.
  template <int kN>
  __device__ __forceinline__ void load(const Lane& lane, const float* state, int value) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int tile = 0; tile < kBlockKeys / 8; ++tile)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float2 two = *reinterpret_cast<const float2*>(
              state + (value + 16 * m + lane.g + 8 * i) * kN + 8 * tile + 2 * lane.t);
          x[m][tile][2 * i] = two.x, x[m][tile][2 * i + 1] = two.y;
        }
  }
  template <int kN>
  __device__ __forceinline__ void store(const Lane& lane, float* state, int value) const {
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int tile = 0; tile < kBlockKeys / 8; ++tile)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          *reinterpret_cast<float2*>(state + (value + 16 * m + lane.g + 8 * i) * kN + 8 * tile + 2 * lane.t) =
              make_float2(x[m][tile][2 * i], x[m][tile][2 * i + 1]);
  }
  template <int kN>
  __device__ __forceinline__ void load_checkpoint(const Lane& lane, const uint16_t* state, int value) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int tile = 0; tile < kBlockKeys / 8; ++tile)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const unsigned two = *reinterpret_cast<const unsigned*>(
              state + (value + 16 * m + lane.g + 8 * i) * kN + 8 * tile + 2 * lane.t);
          x[m][tile][2 * i] = lower_of(two), x[m][tile][2 * i + 1] = upper_of(two);
        }
  }
  __device__ __forceinline__ void put(const Lane& lane, const Matrix<kBlockKeys>& to, int value) const {
#pragma unroll
    for (int m = 0; m < kTiles; ++m)
#pragma unroll
      for (int tile = 0; tile < kBlockKeys / 8; ++tile)
#pragma unroll
        for (int i = 0; i < 2; ++i)
          *reinterpret_cast<unsigned*>(to.at(value + 16 * m + lane.g + 8 * i, 8 * tile + 2 * lane.t)) =
              pack_bfloat16(x[m][tile][2 * i], x[m][tile][2 * i + 1]);
  }

  // x = x diag(decay) + values^T scaled^T, with values [token, value] and scaled [key, token].
  template <int kN>
  __device__ __forceinline__ void advance(const Lane& lane, const float* decay, const Matrix<kN>& values, int value,
                                          const Matrix<kChunkTokens>& scaled) {
    unsigned a[kTiles][4];
#pragma unroll
    for (int m = 0; m < kTiles; ++m) load_a_transposed(values, 0, value + 16 * m, a[m], lane.number);
#pragma unroll
    for (int tile = 0; tile < kBlockKeys / 8; tile += 2) {
      unsigned b[2][2];
      load_b_transposed(scaled, 8 * tile, 0, b, lane.number);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float2 two = *reinterpret_cast<const float2*>(decay + 8 * (tile + i) + 2 * lane.t);
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          float(&own)[4] = x[m][tile + i];
          own[0] *= two.x, own[1] *= two.y, own[2] *= two.x, own[3] *= two.y;
          mma_bfloat16(own, a[m], b[i]);
        }
      }
    }
  }
};

// ---------------------------------------------------------------------------------------------- the kernel

// Starts the copies of a chunk: of this warp's keys of x, y and w, which no other warp reads, and, for all warps, of
// all values of v and dy. What is null is left out.
template <bool kStatic, int kN>
__device__ __forceinline__ void fetch(const Places& places, int stride, int chunk, const uint16_t* x,
                                      const Matrix<kBlockKeys>& to_x, const uint16_t* y, const Matrix<kBlockKeys>& to_y,
                                      const float* w, float* to_w, const uint16_t* v, const Matrix<kN>& to_v,
                                      const uint16_t* dy, const Matrix<kN>& to_dy) {
  const int64_t ahead = static_cast<int64_t>(chunk) * (kChunkTokens * stride);
  const int rows = places.rows(chunk);
  const unsigned thread = threadIdx.x ^ static_cast<unsigned>(places.zero), lane = thread % kWarp;
  const int first_key = static_cast<int>(thread / kWarp) * 16;
  const int64_t at = places.token + ahead, at_keys = places.keys + first_key + ahead;
  {
    const int row = static_cast<int>(lane / 2), column = static_cast<int>(lane % 2) * 8;
    const bool wanted = row < rows;
    const int from = wanted ? row * stride + column : 0;
    cp_async<16>(to_x.at(row, first_key + column), x + at_keys + from, wanted);
    if (y != nullptr) cp_async<16>(to_y.at(row, first_key + column), y + at_keys + from, wanted);
  }
  if constexpr (!kStatic) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = static_cast<int>(lane / 4) + 8 * i, column = static_cast<int>(lane % 4) * 4;
      const bool wanted = row < rows;
      cp_async<16>(to_w + row * kDecayStride + first_key + column, w + at_keys + (wanted ? row * stride + column : 0),
                   wanted);
    }
  }
  constexpr int kPieces = kN / 8, kRowsAtOnce = kThreads / kPieces;
#pragma unroll
  for (int i = 0; i < kChunkTokens / kRowsAtOnce; ++i) {
    const int row = static_cast<int>(thread / kPieces) + i * kRowsAtOnce;
    const int column = static_cast<int>(thread % kPieces) * 8;
    const bool wanted = row < rows;
    const int from = wanted ? row * stride + column : 0;
    cp_async<16>(to_v.at(row, column), v + at + from, wanted);
    if (dy != nullptr) cp_async<16>(to_dy.at(row, column), dy + at + from, wanted);
  }
}

// A thread's part of a block. Each phase of a chunk makes its own, by way of a number that the compiler does not know:
// else it would compute all addresses of all phases before the first chunk, and has no registers to keep them.
template <int kTiles>
struct Place {
  const int thread, warp, first_key, value;  // the warp's first key and value, in the block
  const Lane lane;

  __device__ __forceinline__ explicit Place(const Places& places)
      : Place(threadIdx.x ^ static_cast<unsigned>(places.zero)) {}
  __device__ __forceinline__ explicit Place(unsigned thread)
      : thread(static_cast<int>(thread)),
        warp(static_cast<int>(thread / kWarp)),
        first_key(16 * warp),
        value(kTiles * first_key),
        lane(static_cast<int>(thread % kWarp)) {}
};

// Stores [16 keys, 16 tokens] of a warp as rows of 16 numbers, by way of 16 rows of scratch from `row` on. to: of
// token 0.
template <int kColumns>
__device__ __forceinline__ void store_rows(const Lane& lane, const unsigned (&x)[4], const Matrix<kColumns>& scratch,
                                           int row, uint16_t* to, int stride, int n_rows) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int token = 8 * (i / 2) + 2 * lane.t, key = lane.g + 8 * (i % 2);
    *scratch.at(row + token, key) = static_cast<uint16_t>(x[i]);
    *scratch.at(row + token + 1, key) = static_cast<uint16_t>(x[i] >> 16);
  }
  __syncwarp();
  const int token = lane.number >> 1, column = (lane.number & 1) * 8;
  if (token < n_rows)
    *reinterpret_cast<uint4*>(to + token * stride + column) =
        *reinterpret_cast<const uint4*>(scratch.at(row + token, column));
}

// Stores [16 kTiles values, 16 tokens] of a warp. to: the first value of token 0.
template <int kTiles>
__device__ __forceinline__ void put_values(const float (&x)[kTiles][2][4], int n_rows, int stride, float* to) {
  const Lane lane(not_before(lane_of_thread()));
#pragma unroll
  for (int q = 0; q < 2; ++q)
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int token = 8 * q + 2 * lane.t + c;
      if (token >= n_rows) continue;
      float* const row = to + token * stride + lane.g;
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        row[16 * m] = x[m][q][c];
        row[16 * m + 8] = x[m][q][2 + c];
      }
    }
}

// What the phases of a chunk have in common.
template <int kN, bool kStatic>
struct Pass {
  static constexpr int kTiles = Block<kN>::kTiles;

  const Memory<kN, kStatic, false> memory;
  const Places& places;
  const Inputs& in;
  const uint16_t *checkpoints, *dy;
  const Gradients& out;
  const int H, stride;  // stride: from token to token

  __device__ __forceinline__ int64_t ahead(int chunk) const {
    return static_cast<int64_t>(chunk) * (kChunkTokens * stride);
  }
  __device__ __forceinline__ const uint16_t* checkpoint_of(int chunk) const {
    return checkpoints + places.checkpoint + static_cast<int64_t>(chunk / kChunksOfState) * H * (kN * kN);
  }
  __device__ __forceinline__ void start(int chunk, bool goes_back, int turn) const {
    fetch<kStatic, kN>(places, stride, chunk, in.k, memory.x(1), goes_back ? in.r : nullptr, memory.x(0), in.w,
                       memory.w(), in.v, memory.values(turn), goes_back ? dy : nullptr, memory.values(2 + turn));
  }

  // Leaves the states before the chunks that are taken back next, from `last` on, in shared memory, but for that of a
  // checkpoint. What `last` needs of memory is there then, for all warps.
  __device__ __forceinline__ void go_forward(int last, int& turn) const {
    int chunk = last / kChunksOfState * kChunksOfState;
    State<kTiles> s;
    {
      const Place<kTiles> here(places);
      s.template load_checkpoint<kN>(here.lane, checkpoint_of(chunk), here.value);
    }
#pragma unroll 1
    for (; chunk < last; ++chunk, turn ^= 1) {
      cp_async_wait<0>();
      __syncwarp();
      const Place<kTiles> here(places);
      const Matrix<kChunkTokens> scaled = memory.scaled(chunk % 2);
      {
        float w[4][2];
        unsigned k[4];
        load_a_transposed(memory.x(1), 0, here.first_key, k, here.lane.number);
        read_decays<kStatic>(memory.w(), memory.own_w(), places.rows(chunk), here.lane, here.first_key, w);
        const Decays decays(here.lane, w);
#pragma unroll
        for (int i = 0; i < 4; ++i) k[i] = scale_pair(k[i], {decays.to_end(i, 0), decays.to_end(i, 1)});
        put_operand(k, here.lane, scaled, here.first_key);
        put_decays(here.lane, here.first_key, decays, memory.decay(turn));
      }
      __syncthreads();
      start(chunk + 1, chunk + 1 == last, turn ^ 1);
      cp_async_commit();
      s.template advance<kN>(here.lane, memory.decay(turn), memory.values(turn), here.value, scaled);
      if (chunk + 1 >= last / Block<kN>::kTogether * Block<kN>::kTogether)
        s.put(here.lane, memory.state(chunk + 1), here.value);
    }
    cp_async_wait<0>();
    __syncthreads();  // nobody reads what is scaled any more
  }

  // All that does not depend on the states, up to a barrier.
  __device__ __forceinline__ Decays prepare(int chunk, int turn, Sums& sums) const {
    const Matrix<kChunkTokens> scratch[2] = {memory.scaled(0), memory.scaled(1)};
    const Place<kTiles> here(places);
    unsigned r[4], k[4];
    float w[4][2];
    load_a_transposed(memory.x(0), 0, here.first_key, r, here.lane.number);
    load_a_transposed(memory.x(1), 0, here.first_key, k, here.lane.number);
    read_decays<kStatic>(memory.w(), memory.own_w(), places.rows(chunk), here.lane, here.first_key, w);
    const Decays decays(here.lane, w);
    put_decays(here.lane, here.first_key, decays, memory.decay(turn));
    {
      unsigned d_pairs[2][2];
      float own[2][2], bonus[2], products[4][2];
      const float u[2] = {memory.u()[here.first_key + here.lane.g], memory.u()[here.first_key + here.lane.g + 8]};
      multiply_outputs(here.lane, memory.values(turn), memory.values(2 + turn), d_pairs, own);
      float2 du = *memory.du(here.thread);
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float of_r = c == 0 ? lower_of(r[i]) : upper_of(r[i]);
          const float of_k = c == 0 ? lower_of(k[i]) : upper_of(k[i]);
          const float of_own = u[i % 2] * own[i / 2][c];
          sums.r[i][c] = of_k * of_own;
          sums.k[i][c] = of_r * of_own;
          sums.w[i][c] = 0.f;
          products[i][c] = of_r * of_k;
          (i % 2 == 0 ? du.x : du.y) += products[i][c] * own[i / 2][c];
        }
      *memory.du(here.thread) = du;
      sum_bonus(here.lane, products, u, bonus);
      Share share(here.lane, bonus);
      float* const to = memory.share(here.warp);
      float4* const waiting = memory.waiting(here.thread);
      take_level<2>(here.lane, r, k, decays, d_pairs, scratch[0], here.first_key, share, to, sums, waiting);
      take_level<1>(here.lane, r, k, decays, d_pairs, scratch[1], here.first_key, share, to, sums, waiting);
      take_level<0>(here.lane, r, k, decays, d_pairs, scratch[0], here.first_key, share, to, sums, waiting);
      share.put(here.lane, to);
      take_level<3>(here.lane, r, k, decays, d_pairs, scratch[1], here.first_key, share, to, sums, waiting);
      __syncwarp();
      put_aside(sums.w, waiting + 2 * kThreads);
      // Never: the assembler would put off the sums until they are needed, and what they are made of takes more
      // registers than they do.
      if (places.zero != 0) {
        put_aside(sums.r, waiting);
        put_aside(sums.k, waiting);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      r[i] = scale_pair(r[i], {decays.from_start(i, 0), decays.from_start(i, 1)});
      k[i] = scale_pair(k[i], {decays.to_end(i, 0), decays.to_end(i, 1)});
    }
    put_operand(r, here.lane, scratch[0], here.first_key);
    put_operand(k, here.lane, scratch[1], here.first_key);
    return decays;
  }

  // Starts the copy of this warp's values of a checkpoint to where the states of the others are.
  __device__ __forceinline__ void fetch_checkpoint(int chunk) const {
    constexpr int kPieces = kBlockKeys / 8;  // of 16 bytes, in a row
    const Place<kTiles> here(places);
    const uint16_t* const checkpoint = checkpoint_of(not_before(chunk));
    const int first_row = here.value + here.lane.number / kPieces, column = here.lane.number % kPieces * 8;
#pragma unroll
    for (int i = 0; i < 16 * kTiles * kPieces / kWarp; ++i) {
      const int row = first_row + i * (kWarp / kPieces);
      cp_async<16>(memory.state(chunk).at(row, column), checkpoint + row * kN + column);
    }
  }

  // dV, and g from the gradient of the state behind the chunk, which it leaves for all warps, to that before it.
  __device__ __forceinline__ void take_back(int chunk, int turn, State<kTiles>& g) const {
    const Place<kTiles> here(places);
    const Matrix<kN> d_outputs = memory.values(2 + turn);
    float dv[kTiles][2][4] = {};  // [value, token]
    unsigned a[4], b[2][2];
    load_attention(here.lane, memory, b);
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      load_a_transposed(d_outputs, 0, here.value + 16 * m, a, here.lane.number);
      multiply_add(dv[m], a, b);
    }
#pragma unroll
    for (int tile = 0; tile < kBlockKeys / 8; tile += 2) {
      load_b(memory.scaled(1), 8 * tile, 0, b, here.lane.number);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        as_a(g.x[m][tile], g.x[m][tile + 1], a);
        multiply_add(dv[m], a, b);
      }
    }
    if constexpr (Block<kN>::kParts == 1) {
      static_assert(Block<kN>::kParts > 1 || kTiles == 1, "16 values of a warp");
      as_a(dv[0][0], dv[0][1], a);
      store_rows(here.lane, a, memory.gradient(), here.value,
                 out.v + places.token + here.value + ahead(not_before(chunk)), stride, places.rows(chunk));
    } else {
      put_values<kTiles>(dv, places.rows(chunk), stride,
                         out.v_parts + places.values + here.value + ahead(not_before(chunk)));
    }
    __syncwarp();  // dV is read, and the gradient may come there
    g.put(here.lane, memory.gradient(), here.value);
    g.template advance<kN>(here.lane, memory.decay(turn), d_outputs, here.value, memory.scaled(0));
  }

  // What goes through the states; then dr, dk, dw are done.
  __device__ __forceinline__ void finish(int chunk, int turn, const Decays& decays, const Sums& sums) const {
    const Place<kTiles> here(places);
    const Matrix<kN> v = memory.values(turn), d_outputs = memory.values(2 + turn);
    float of_r[2][4] = {}, of_k[2][4] = {}, of_states[2][4] = {};
#pragma unroll
    for (int from = 0; from < kN; from += 16) {
      unsigned s[4], g[4], b[2][2];
      load_a_transposed(memory.state(chunk), from, here.first_key, s, here.lane.number);
      load_b_transposed(d_outputs, 0, from, b, here.lane.number);
      multiply_add(of_r, s, b);
      load_a_transposed(memory.gradient(), from, here.first_key, g, here.lane.number);
      load_b_transposed(v, 0, from, b, here.lane.number);
      multiply_add(of_k, g, b);
      as_transposed_b(g, b);
      multiply_add(of_states, s, b);
    }
    unsigned scaled_r[4], scaled_k[4], packed[4];
    take_operand(here.lane, memory.scaled(0), here.first_key, scaled_r);
    take_operand(here.lane, memory.scaled(1), here.first_key, scaled_k);
    __syncwarp();
    const int rows = places.rows(not_before(chunk));
    const int64_t at_keys = places.keys + here.first_key + ahead(not_before(chunk));
    float z_r[4][2], z_k[4][2], w[4][2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float x[2] = {of_r[i / 2][2 * (i % 2)], of_r[i / 2][2 * (i % 2) + 1]};
      z_r[i][0] = lower_of(scaled_r[i]) * x[0];
      z_r[i][1] = upper_of(scaled_r[i]) * x[1];
      packed[i] = pack_bfloat16(sums.r[i][0] + decays.from_start(i, 0) * x[0],
                                sums.r[i][1] + decays.from_start(i, 1) * x[1]);
    }
    store_rows(here.lane, packed, memory.scaled(0), here.first_key, out.r + at_keys, stride, rows);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float x[2] = {of_k[i / 2][2 * (i % 2)], of_k[i / 2][2 * (i % 2) + 1]};
      z_k[i][0] = lower_of(scaled_k[i]) * x[0];
      z_k[i][1] = upper_of(scaled_k[i]) * x[1];
      packed[i] =
          pack_bfloat16(sums.k[i][0] + decays.to_end(i, 0) * x[0], sums.k[i][1] + decays.to_end(i, 1) * x[1]);
    }
    store_rows(here.lane, packed, memory.scaled(1), here.first_key, out.k + at_keys, stride, rows);
    sum_decays(here.lane, z_r, z_k, memory.waiting(here.thread), w);

    // The diagonal: of key g in row g, column g % 8, so in the lane of that row with t = g / 2.
    const int from = 4 * here.lane.g + here.lane.g / 2;
    const bool odd = here.lane.g % 2 != 0;
    const float* const decay = memory.decay(turn) + here.first_key + here.lane.g;
    const float through[2] = {decay[0] * from_lane(odd ? of_states[0][1] : of_states[0][0], from),
                              decay[8] * from_lane(odd ? of_states[1][3] : of_states[1][2], from)};
    float2 dw = make_float2(0.f, 0.f);
    if constexpr (kStatic) dw = *memory.dw(here.thread);
#pragma unroll
    for (int q = 0; q < 2; ++q)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int token = 8 * q + 2 * here.lane.t + c;
        if (token >= rows) continue;
        const float x[2] = {w[2 * q][c] + through[0], w[2 * q + 1][c] + through[1]};
        if constexpr (kStatic) {
          dw.x += x[0];
          dw.y += x[1];
        } else {
          float* const to = out.w + at_keys + token * stride + here.lane.g;
          to[0] = x[0];
          to[8] = x[1];
        }
      }
    if constexpr (kStatic) *memory.dw(here.thread) = dw;
  }
};

// Block (slot * H + head) * kParts + part has 64 keys of a head of a span. d_ends: the gradients of the states behind
// the spans, of each sequence or slot.
template <int kN, bool kStatic>
__global__ void __launch_bounds__(kThreads, Block<kN>::kResident)
    backward_kernel(Heads heads, int segment_tokens, Inputs in, const uint16_t* checkpoints, const uint16_t* dy,
                    const float* d_ends, Gradients out, float* d_state) {
  constexpr int kTiles = Block<kN>::kTiles;
  const Span span = span_of_block(heads, Block<kN>::kParts, segment_tokens);
  if (!span.is_used) return;
  const Memory<kN, kStatic, false> memory{shared_memory()};
  if (threadIdx.x < kBlockKeys) {
    const int of_head = span.head * kN + span.part * kBlockKeys + static_cast<int>(threadIdx.x);
    memory.u()[threadIdx.x] = in.u[of_head];
    if (kStatic) memory.own_w()[threadIdx.x] = in.w[of_head];
  }
  const Places& places = memory.places();
  if (threadIdx.x == 0) memory.places() = Places::of<kN>(heads, span);
  __syncthreads();

  State<kTiles> g;
  {
    const Place<kTiles> here(places);
    *memory.du(here.thread) = make_float2(0.f, 0.f);
    if (kStatic) *memory.dw(here.thread) = make_float2(0.f, 0.f);
    g.template load<kN>(here.lane, d_ends + heads.state(span.slot, span.head) + span.part * kBlockKeys, here.value);
  }
  const Pass<kN, kStatic> pass{memory, places, in, checkpoints, dy, out, heads.H, heads.H * kN};
  int last = places.n_chunks - 1, turn = 0;
  if (last >= 0) pass.start(last / kChunksOfState * kChunksOfState, last % kChunksOfState == 0, turn);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();

#pragma unroll 1
  while (last >= 0) {
    if (last % kChunksOfState != 0) pass.go_forward(last, turn);
#pragma unroll 1
    for (bool goes_on = true; goes_on; turn ^= 1) {
      const int chunk = last--;
      goes_on = chunk % Block<kN>::kTogether != 0;
      __syncwarp();
      Sums sums;
      const Decays decays = pass.prepare(chunk, turn, sums);
      __syncthreads();

      if (chunk % kChunksOfState == 0) pass.fetch_checkpoint(chunk);
      if (chunk > 0) pass.start(goes_on ? chunk - 1 : (chunk - 1) / kChunksOfState * kChunksOfState, goes_on, turn ^ 1);
      cp_async_commit();
      pass.take_back(chunk, turn + static_cast<int>(places.zero), g);
      cp_async_wait<0>();
      __syncthreads();

      pass.finish(chunk, turn + static_cast<int>(places.zero), decays, sums);
    }
  }

  const Place<kTiles> here(places);
  if (places.d_state >= 0) g.template store<kN>(here.lane, d_state + places.d_state, here.value);
  const auto put_sum = [&](float2 sum, float* to) {
    sum.x += from_other(sum.x, 1);
    sum.y += from_other(sum.y, 1);
    sum.x += from_other(sum.x, 2);
    sum.y += from_other(sum.y, 2);
    if (here.lane.t != 0) return;
    to[places.sum + here.first_key + here.lane.g] = sum.x;
    to[places.sum + here.first_key + here.lane.g + 8] = sum.y;
  };
  put_sum(*memory.du(here.thread), out.u);
  if constexpr (kStatic) put_sum(*memory.dw(here.thread), out.w);
}

// ---------------------------------------------------------------------------------------------- segments

// The gradient of the state before each segment but the first one of a sequence, from zero behind it, to changes,
// [slots, H, N, N], and the sum of its w to totals, [slots, H, N].
template <int kN, bool kStatic>
__global__ void __launch_bounds__(kThreads, 4)
    gradient_change_kernel(Heads heads, int segment_tokens, Inputs in, const uint16_t* dy, float* changes,
                           float* totals) {
  constexpr int kTiles = Block<kN>::kTiles;
  using Memory = Memory<kN, kStatic, true>;
  const Span span = span_of_block(heads, Block<kN>::kParts, segment_tokens);
  if (!span.is_used || span.is_first) return;
  const Memory memory{shared_memory()};
  const Lane lane(lane_of_thread());
  const int warp = static_cast<int>(threadIdx.x) / kWarp, first_key = 16 * warp, value = 16 * kTiles * warp;
  const Places& places = memory.places();
  if (threadIdx.x == 0) memory.places() = Places::of<kN>(heads, span);
  if (kStatic && threadIdx.x < kBlockKeys)
    memory.own_w()[threadIdx.x] = in.w[span.head * kN + span.part * kBlockKeys + static_cast<int>(threadIdx.x)];
  __syncthreads();

  const auto start = [&](int chunk, int turn) {
    fetch<kStatic, kN>(places, heads.H * kN, chunk, in.r, memory.x(0), nullptr, memory.x(0), in.w, memory.w(), dy,
                       memory.values(turn), nullptr, memory.values(turn));
  };

  float total[2] = {};
  State<kTiles> g = {};
  const int last = places.n_chunks - 1;
  start(last, last % 2);
  cp_async_commit();
#pragma unroll 1
  for (int chunk = last; chunk >= 0; --chunk) {
    const int turn = chunk % 2;
    cp_async_wait<0>();
    __syncwarp();
    float w[4][2];
    unsigned r[4];
    load_a_transposed(memory.x(0), 0, first_key, r);
    read_decays<kStatic>(memory.w(), memory.own_w(), places.rows(chunk), lane, first_key, w);
    const Decays decays(lane, w);
#pragma unroll
    for (int i = 0; i < 4; ++i) r[i] = scale_pair(r[i], {decays.from_start(i, 0), decays.from_start(i, 1)});
    put_operand(r, lane, memory.scaled(turn), first_key);
    put_decays(lane, first_key, decays, memory.decay(turn));
    total[0] += decays.sum[0];
    total[1] += decays.sum[1];
    __syncthreads();
    if (chunk > 0) start(chunk - 1, turn ^ 1);
    cp_async_commit();
    g.template advance<kN>(lane, memory.decay(turn), memory.values(turn), value, memory.scaled(turn));
  }
  g.template store<kN>(lane, changes + heads.state(span.slot, span.head) + span.part * kBlockKeys, value);
  const int64_t at = places.sum + first_key + lane.g;
#pragma unroll
  for (int c = 0; c < 2; ++c)
    if (lane.t == 0) totals[at + 8 * c] = total[c];
}

// The slots that a sequence's segments have.
struct Slots {
  int64_t first, count;

  __device__ Slots(const Heads& heads, int s, int segment_tokens) {
    const int64_t start = heads.start(s), n_tokens = heads.start(s + 1) - start;
    first = start / segment_tokens + s;
    count = n_tokens <= 0 ? 1 : (n_tokens + segment_tokens - 1) / segment_tokens;
  }
};

constexpr int kJoinThreads = 256;
constexpr int kJoinElements = 4 * kJoinThreads;  // of a state, that a block has

// Puts the gradient of the state behind each segment in place of what `gradient_change_kernel` left in changes. Block
// (s * H + head) * pieces + piece, a thread 4 neighbouring keys.
template <int kN>
__global__ void __launch_bounds__(kJoinThreads)
    join_gradients_kernel(Heads heads, int segment_tokens, const float* d_final, float* changes, const float* totals) {
  constexpr int kPieces = kN * kN / kJoinElements;
  const int64_t block = blockIdx.x;
  const int element = static_cast<int>(block % kPieces) * kJoinElements + static_cast<int>(threadIdx.x) * 4;
  const int head = static_cast<int>(block / kPieces % heads.H), s = static_cast<int>(block / kPieces / heads.H);
  const Slots slots(heads, s, segment_tokens);
  float4 now = *reinterpret_cast<const float4*>(d_final + heads.state(s, head) + element);
  for (int64_t slot = slots.first + slots.count - 1; slot > slots.first; --slot) {
    float4* const at = reinterpret_cast<float4*>(changes + heads.state(slot, head) + element);
    const float4 change = *at;
    const float4 log = *reinterpret_cast<const float4*>(totals + (slot * heads.H + head) * kN + element % kN);
    *at = now;
    now.x = now.x * decay_of(log.x) + change.x;
    now.y = now.y * decay_of(log.y) + change.y;
    now.z = now.z * decay_of(log.z) + change.z;
    now.w = now.w * decay_of(log.w) + change.w;
  }
  *reinterpret_cast<float4*>(changes + heads.state(slots.first, head) + element) = now;
}

// sums[s, head, key] = the sum of parts, [slots, H, N], over the slots of sequence s, in their order.
__global__ void __launch_bounds__(kJoinThreads)
    add_segments_kernel(Heads heads, int segment_tokens, const float* parts, float* sums) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kJoinThreads + threadIdx.x, row = heads.row_stride();
  if (i >= heads.S * row) return;
  const Slots slots(heads, static_cast<int>(i / row), segment_tokens);
  float sum = 0.f;
  for (int64_t slot = slots.first; slot < slots.first + slots.count; ++slot) sum += parts[slot * row + i % row];
  sums[i] = sum;
}

// dv = parts[0] + parts[1], each of `count` numbers; a thread adds 4.
__global__ void __launch_bounds__(kJoinThreads) add_values_kernel(const float* parts, int64_t count, uint16_t* dv) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kJoinThreads + threadIdx.x) * 4;
  if (i >= count) return;
  const float4 x = *reinterpret_cast<const float4*>(parts + i);
  const float4 y = *reinterpret_cast<const float4*>(parts + count + i);
  *reinterpret_cast<uint2*>(dv + i) =
      make_uint2(pack_bfloat16(x.x + y.x, x.y + y.y), pack_bfloat16(x.z + y.z, x.w + y.w));
}

// ---------------------------------------------------------------------------------------------- from the host

// With segments, the gradients behind them are found first: a third of a pass and more.
constexpr int64_t kSegmentsWork = 2;

inline int64_t parts_of(int N) { return N / kBlockKeys; }

inline int segment_tokens_of(Form form, int S, int64_t T, int H, int N) {
  return chunked::segment_tokens_of(form, S, T, H * parts_of(N), kSegmentsWork);
}

// Where the workspace has what, in floats.
struct Workspace {
  int64_t changes = 0, totals = 0, u = 0, w = 0, v = 0, end = 0;

  Workspace(bool is_static, int segment_tokens, int S, int64_t T, int H, int N) {
    const int64_t rows = segment_tokens == 0 ? 0 : count_slots(S, T, segment_tokens) * H * N;
    totals = changes + rows * N;
    u = totals + rows;
    w = u + rows;
    v = w + (is_static ? rows : 0);
    end = v + (parts_of(N) > 1 ? parts_of(N) * T * H * N : 0);
  }
};

template <bool kStatic>
int64_t workspace_bytes(Form form, int S, int64_t T, int H, int N) {
  const Workspace places(kStatic, back::segment_tokens_of(form, S, T, H, N), S, T, H, N);
  return places.end * static_cast<int64_t>(sizeof(float));
}

inline unsigned blocks_for(int64_t count, int64_t of_block) {
  return static_cast<unsigned>((count + of_block - 1) / of_block);
}

// dr, dk, dv are bfloat16; `out` has no v_parts.
template <bool kStatic>
int backward(Form form, const Heads& heads, const Inputs& in, const void* checkpoints, const void* dy,
             const float* d_final, const Gradients& out, float* d_state, void* workspace, void* stream) {
  if (!can_run(heads)) return kBadValue;
  if (heads.S == 0 || heads.H == 0) return 0;
  const int S = heads.S, H = heads.H, N = heads.N, segment_tokens = back::segment_tokens_of(form, S, heads.T, H, N);
  const bool has_segments = segment_tokens != 0;
  const int64_t n_blocks = count_slots(S, heads.T, segment_tokens) * H * parts_of(N);
  const int64_t n_values = heads.T * H * N, n_joins = static_cast<int64_t>(S) * H * N * N / kJoinElements;
  constexpr int64_t kMostBlocks = 0x7fffffff;
  if (n_blocks > kMostBlocks || n_joins > kMostBlocks || n_values / kJoinElements >= kMostBlocks ||
      static_cast<int64_t>(kChunkTokens) * H * N > 0x7fffffff)
    return kBadValue;
  const dim3 grid(static_cast<unsigned>(n_blocks));

  return for_chunked_head_size(N, [&](auto size) {
    constexpr int kN = decltype(size)::value;
    float* const memory = static_cast<float*>(workspace);
    const Workspace at(kStatic, segment_tokens, S, heads.T, H, N);
    const uint16_t* const d_outputs = static_cast<const uint16_t*>(dy);
    Gradients written = out;
    written.v_parts = memory + at.v;
    const float* d_ends = d_final;
    int code = 0;
    if (has_segments) {
      written.u = memory + at.u;
      if (kStatic) written.w = memory + at.w;
      d_ends = memory + at.changes;
      code = launch(gradient_change_kernel<kN, kStatic>, grid, dim3(kThreads), Memory<kN, kStatic, true>::kBytes,
                    stream, heads, segment_tokens, in, d_outputs, memory + at.changes, memory + at.totals);
      if (code == 0)
        code = launch(join_gradients_kernel<kN>, dim3(static_cast<unsigned>(n_joins)), dim3(kJoinThreads), 0, stream,
                      heads, segment_tokens, d_final, memory + at.changes, memory + at.totals);
    }
    if (code == 0)
      code = launch(backward_kernel<kN, kStatic>, grid, dim3(kThreads), Memory<kN, kStatic, false>::kBytes, stream,
                    heads, segment_tokens, in, static_cast<const uint16_t*>(checkpoints), d_outputs, d_ends, written,
                    d_state);
    const dim3 adding(blocks_for(static_cast<int64_t>(S) * H * N, kJoinThreads));
    if (code == 0 && has_segments)
      code = launch(add_segments_kernel, adding, dim3(kJoinThreads), 0, stream, heads, segment_tokens, written.u,
                    out.u);
    if (code == 0 && has_segments && kStatic)
      code = launch(add_segments_kernel, adding, dim3(kJoinThreads), 0, stream, heads, segment_tokens, written.w,
                    out.w);
    if (code == 0 && Block<kN>::kParts > 1 && n_values > 0)
      code = launch(add_values_kernel, dim3(blocks_for(n_values, kJoinElements)), dim3(kJoinThreads), 0, stream,
                    written.v_parts, n_values, out.v);
    return code;
  });
}

}  // namespace rwkv::chunked::back
