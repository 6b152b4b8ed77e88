// What the forward and the backward pass of the chunked RWKV-7 recurrence share: the preparation of a chunk, all of it
// that does not depend on the state and on the values, and states as the warps of tensor-core kernels hold them.
//
// A chunk has kChunkTokens tokens, i and j below. With G_i = w_1 + .. + w_i, counted from the chunk's start,
//   r~_i = r_i e^G_i,   k~_i = k_i e^-G_i,   b~_i = b_i e^-G_i,   a~_i = a_i e^(G_i - w_i)   (a acts before the decay)
//   Aab = a~ b~^T and Aak = a~ k~^T where j < i;   Aqk = r~ k~^T and Aqb = r~ b~^T where j <= i;   M = (I - Aab)^-1
// no decay is left inside the chunk:
//   U = M (Aak V + a~ S^T),   Y = Aqk V + Aqb U + r~ S^T,   S <- (S + V^T k~ + U^T b~) diag(e^G_16),   S is [value, key]
//
// Domain: log decays w of -3 and above whatever the size of gradients (from 1e-16 on); down to -5 where gradients are not
// much smaller than 1, as the product of the decays of 16 tokens underflows. A model's are from -0.6065 to 0. Where the
// 16 of a chunk add up to less than -87 in some channel, e^G is below what a float32 holds, e^-G is inf, and outputs
// become inf and NaN. What a token has that is inf or NaN reaches all outputs that it should, and those of earlier tokens
// of its chunk.
//
// The preparation by kThreads threads:
//   fetch_chunk of w (float32) and r, k, a, b (bfloat16) as they are; cp_async_wait; barrier
//   scale_chunk, all threads: makes r~, k~, a~, b~ in place; barrier
//   score_chunk, four warps: the matrices of 16 x 16; barrier before others read them
// For each token and key it costs 1.25 exponentials (kN = 64 and 128 threads) and an inverse; in all 4 kN / 8 products
// of 16 x 8 x 16, by four warps; and in one of these 120 products and sums a lane, one after the other, for M.

#pragma once

#include "../common/gpu_chunks.cuh"

namespace rwkv {

// A chunk in shared memory: rows of tokens, kN keys.
template <int kN>
struct Operands {
  Matrix<kN> r, k, a, b;    // as they came, then r~, k~, a~, b~
  Matrix<kN> a_low, b_low;  // what rounding took from a~ and b~; used only where the pass needs them, see scale_chunk
  float* decay;             // e^G of every token, rows as those of a matrix; the same
  float* end_decay;         // e^G of the last one, [kN]

  __device__ __forceinline__ float* decay_at(int token, int key) const {
    return decay + token * Matrix<kN>::kStride + key;
  }
};

// The matrices of a chunk in shared memory, [16, 16]. "low" is what rounding took.
struct Scores {
  static constexpr int kMatrixSize = Matrix<16>::size_of(kChunkTokens);  // in numbers of 2 bytes
  static constexpr __host__ __device__ int size_of(bool is_backward) { return (is_backward ? 7 : 6) * kMatrixSize; }

  Matrix<16> inverse, inverse_low;  // M transposed: [j][i] is M_ij
  Matrix<16> ak, ak_low, qk, qb;    // [i][j] is A_ij
  Matrix<16> qb_low;                // for the backward pass alone

  __device__ __forceinline__ explicit Scores(uint16_t* memory)
      : inverse{memory},
        inverse_low{memory + kMatrixSize},
        ak{memory + 2 * kMatrixSize},
        ak_low{memory + 3 * kMatrixSize},
        qk{memory + 4 * kMatrixSize},
        qb{memory + 5 * kMatrixSize},
        qb_low{memory + 6 * kMatrixSize} {}
};

// ---------------------------------------------------------------------------------------------- scaled operands

__device__ __forceinline__ float2 read_pair(const uint16_t* two) {
  const unsigned bits = *reinterpret_cast<const unsigned*>(two);
  return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
}

__device__ __forceinline__ void write_pair(float x, float y, uint16_t* two) {
  *reinterpret_cast<unsigned*>(two) = pack_bfloat16(x, y);
}

__device__ __forceinline__ void write_split_pair(float x, float y, uint16_t* high, uint16_t* low) {
  pack_split(x, y, *reinterpret_cast<unsigned*>(high), *reinterpret_cast<unsigned*>(low));
}

// Scales r, k, a, b in place, writes end_decay; with kSplit a_low, in the backward pass b_low too; in the backward pass
// `decay`. w: [kChunkTokens, kN], which stays as it is. A thread has two keys of some tokens, and adds up w from the
// chunk's start by itself: always in the order of tokens.
template <int kN, int kThreads, bool kSplit, bool kIsBackward>
__device__ __forceinline__ void scale_chunk(const float* w, const Operands<kN>& x, int thread) {
  constexpr int kPairs = kN / 2, kGroups = kThreads / kPairs, kTokens = kChunkTokens / kGroups;
  static_assert(kThreads % kPairs == 0 && kChunkTokens % kGroups == 0, "threads share out tokens");
  const int column = thread % kPairs * 2, first = thread / kPairs * kTokens;
  float2 sum = make_float2(0.f, 0.f);
#pragma unroll 1
  for (int before = 0; before < first; before += kTokens)
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const float2 step = *reinterpret_cast<const float2*>(w + (before + i) * kN + column);
      sum.x += step.x, sum.y += step.y;
    }
  float2 grown = make_float2(rough_exp(sum.x), rough_exp(sum.y));
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    const int token = first + i;
    const float2 a = read_pair(x.a.at(token, column));
    if constexpr (kSplit)
      write_split_pair(a.x * grown.x, a.y * grown.y, x.a.at(token, column), x.a_low.at(token, column));
    else
      write_pair(a.x * grown.x, a.y * grown.y, x.a.at(token, column));
    const float2 step = *reinterpret_cast<const float2*>(w + token * kN + column);
    sum.x += step.x, sum.y += step.y;
    grown = make_float2(rough_exp(sum.x), rough_exp(sum.y));
    const float2 shrunk = make_float2(rough_inverse(grown.x), rough_inverse(grown.y));
    const float2 r = read_pair(x.r.at(token, column)), k = read_pair(x.k.at(token, column));
    const float2 b = read_pair(x.b.at(token, column));
    write_pair(r.x * grown.x, r.y * grown.y, x.r.at(token, column));
    write_pair(k.x * shrunk.x, k.y * shrunk.y, x.k.at(token, column));
    if constexpr (kSplit && kIsBackward)
      write_split_pair(b.x * shrunk.x, b.y * shrunk.y, x.b.at(token, column), x.b_low.at(token, column));
    else
      write_pair(b.x * shrunk.x, b.y * shrunk.y, x.b.at(token, column));
    if constexpr (kIsBackward) *reinterpret_cast<float2*>(x.decay_at(token, column)) = grown;
  }
  // What a state is multiplied by, chunk after chunk, must be right to its last bit.
  if (first + kTokens == kChunkTokens)
    *reinterpret_cast<float2*>(x.end_decay + column) = make_float2(decay_of(sum.x), decay_of(sum.y));
}

// ---------------------------------------------------------------------------------------------- matrices of 16 x 16

// c[j / 8] = x y^T of the rows of a chunk, two tiles side by side, by a warp.
template <int kN>
__device__ __forceinline__ void multiply_rows(const Matrix<kN>& x, const Matrix<kN>& y, float (&c)[2][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) c[0][i] = 0.f, c[1][i] = 0.f;
#pragma unroll
  for (int key = 0; key < kN; key += 16) {
    unsigned a[4], b[2][2];
    load_a(x, 0, key, a);
    load_b_transposed(y, 0, key, b);
    multiply_add(c, a, b);
  }
}

// Keeps elements whose column is an earlier token than their row, or, with kWithOwn, the same. A selection: what is
// dropped may be inf or NaN.
template <bool kWithOwn>
__device__ __forceinline__ void keep_earlier(float (&c)[2][4]) {
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = lane_g() + i / 2 * 8, column = half * 8 + 2 * lane_t() + i % 2;
      c[half][i] = (kWithOwn ? column <= row : column < row) ? c[half][i] : 0.f;
    }
}

__device__ __forceinline__ void store_square(const float (&c)[2][4], const Matrix<16>& m) {
  store_tile(c[0], m, 0, 0);
  store_tile(c[1], m, 0, 8);
}

__device__ __forceinline__ void store_split_square(const float (&c)[2][4], const Matrix<16>& high,
                                                   const Matrix<16>& low) {
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = lane_g() + i * 8, column = half * 8 + 2 * lane_t();
      write_split_pair(c[half][2 * i], c[half][2 * i + 1], high.at(row, column), low.at(row, column));
    }
}

constexpr int kScratchStride = kChunkTokens + 4;  // columns begin at multiples of 16 bytes, in different banks
constexpr int kScratchFloats = kChunkTokens * kScratchStride;

// M = (I - c)^-1 by substitution in float32, where c is 0 but below its diagonal; by a warp. Leaves it transposed.
// scratch: kScratchFloats, this warp's alone.
template <bool kSplit>
__device__ __forceinline__ void invert(const float (&c)[2][4], float* scratch, const Scores& scores) {
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int i = 0; i < 4; ++i)  // transposed: a column in one piece
      scratch[(half * 8 + 2 * lane_t() + i % 2) * kScratchStride + lane_g() + i / 2 * 8] = c[half][i];
  __syncwarp();
  // Of M, two lanes for each. Not before, or the 16 numbers that M starts from wait in registers for the next chunk.
  const int column = not_before(lane_of_thread()) % kChunkTokens;
  float m[kChunkTokens];
#pragma unroll
  for (int i = 0; i < kChunkTokens; ++i) m[i] = i == column ? 1.f : 0.f;
#pragma unroll
  for (int j = 0; j + 1 < kChunkTokens; ++j)  // m[j] is final; takes it out of the rows below
#pragma unroll
    for (int four = (j + 1) / 4 * 4; four < kChunkTokens; four += 4) {
      const float4 x = *reinterpret_cast<const float4*>(scratch + j * kScratchStride + four);
      if (four > j) m[four] += x.x * m[j];
      if (four + 1 > j) m[four + 1] += x.y * m[j];
      if (four + 2 > j) m[four + 2] += x.z * m[j];
      m[four + 3] += x.w * m[j];
    }
  unsigned high[kChunkTokens / 2], low[kChunkTokens / 2];
#pragma unroll
  for (int i = 0; i < kChunkTokens / 2; ++i) pack_split(m[2 * i], m[2 * i + 1], high[i], low[i]);
  if (lane_of_thread() < kChunkTokens) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      *reinterpret_cast<uint4*>(scores.inverse.at(column, 8 * i)) =
          make_uint4(high[4 * i], high[4 * i + 1], high[4 * i + 2], high[4 * i + 3]);
      if constexpr (kSplit)
        *reinterpret_cast<uint4*>(scores.inverse_low.at(column, 8 * i)) =
            make_uint4(low[4 * i], low[4 * i + 1], low[4 * i + 2], low[4 * i + 3]);
    }
  }
}

// The matrices of a chunk, by four warps, `warp` 0 to 3. Low parts as in scale_chunk: ak_low and inverse_low with
// kSplit, in the backward pass qb_low too. scratch: as in `invert`.
template <int kN, bool kSplit, bool kIsBackward>
__device__ __forceinline__ void score_chunk(const Operands<kN>& x, const Scores& scores, float* scratch, int warp) {
  float c[2][4];
  if (warp == 0) {
    multiply_rows(x.a, x.b, c);
    keep_earlier<false>(c);
    invert<kSplit>(c, scratch, scores);
  } else if (warp == 1) {
    multiply_rows(x.a, x.k, c);
    keep_earlier<false>(c);
    if constexpr (kSplit)
      store_split_square(c, scores.ak, scores.ak_low);
    else
      store_square(c, scores.ak);
  } else if (warp == 2) {
    multiply_rows(x.r, x.k, c);
    keep_earlier<true>(c);
    store_square(c, scores.qk);
  } else if (warp == 3) {
    multiply_rows(x.r, x.b, c);
    keep_earlier<true>(c);
    if constexpr (kSplit && kIsBackward)
      store_split_square(c, scores.qb, scores.qb_low);
    else
      store_square(c, scores.qb);
  }
}

// ---------------------------------------------------------------------------------------------- states

// 16 values (rows) of a state and all its keys, as accumulators of a warp: s[key / 8] is a tile of 16 x 8.
template <int kN>
struct StateRows {
  static constexpr int kTiles = kN / 8;
  float s[kTiles][4];

  // state: [kN, kN] in float32, [value, key]; row: the first of the 16 values.
  __device__ __forceinline__ void load(const float* state, int row) {
    const float* at = state + static_cast<int64_t>(row + lane_g()) * kN + 2 * lane_t();
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const float2 upper = *reinterpret_cast<const float2*>(at + 8 * tile);
      const float2 lower = *reinterpret_cast<const float2*>(at + 8 * tile + 8 * kN);
      s[tile][0] = upper.x, s[tile][1] = upper.y, s[tile][2] = lower.x, s[tile][3] = lower.y;
    }
  }

  __device__ __forceinline__ void store(float* state, int row) const {
    float* at = state + static_cast<int64_t>(row + lane_g()) * kN + 2 * lane_t();
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      *reinterpret_cast<float2*>(at + 8 * tile) = make_float2(s[tile][0], s[tile][1]);
      *reinterpret_cast<float2*>(at + 8 * tile + 8 * kN) = make_float2(s[tile][2], s[tile][3]);
    }
  }

  // x times the identity.
  __device__ __forceinline__ void set_diagonal(float x, int row) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        s[tile][i] = row + lane_g() + i / 2 * 8 == 8 * tile + 2 * lane_t() + i % 2 ? x : 0.f;
  }
};

// A checkpoint is a state rounded to bfloat16, in the order of the fragments that a warp makes of it: first the 16 x 16
// block of values 0 .. 15 and keys 0 .. 15, then of keys 16 .. 31, and so on; in a block the 8 numbers of lane 0, those
// of lane 1, ..; and these 8 are the four registers of the block as operand a. So a lane moves 16 bytes at a time, and
// 32 lanes a piece of 512 bytes.
template <int kN>
__device__ __forceinline__ uint4* checkpoint_block(uint16_t* checkpoint, int row, int key) {
  return reinterpret_cast<uint4*>(checkpoint) + (row / 16 * (kN / 16) + key / 16) * 32 + lane_of_thread();
}

// Operand a of values row .. row + 15 and keys key .. key + 15, both multiples of 16.
template <int kN>
__device__ __forceinline__ void load_checkpoint_a(const uint16_t* checkpoint, int row, int key, unsigned (&a)[4]) {
  const uint4 four = *checkpoint_block<kN>(const_cast<uint16_t*>(checkpoint), row, key);
  a[0] = four.x, a[1] = four.y, a[2] = four.z, a[3] = four.w;
}

template <int kN>
__device__ __forceinline__ void store_checkpoint(const StateRows<kN>& rows, uint16_t* checkpoint, int row) {
#pragma unroll
  for (int key = 0; key < kN; key += 16) {
    unsigned a[4];
    as_a(rows.s[key / 8], rows.s[key / 8 + 1], a);
    *checkpoint_block<kN>(checkpoint, row, key) = make_uint4(a[0], a[1], a[2], a[3]);
  }
}

template <int kN>
__device__ __forceinline__ void load_checkpoint(const uint16_t* checkpoint, int row, StateRows<kN>& rows) {
#pragma unroll
  for (int key = 0; key < kN; key += 16) {
    unsigned a[4];
    load_checkpoint_a<kN>(checkpoint, row, key, a);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float* const tile = rows.s[key / 8 + i / 2];
      tile[i % 2 * 2] = __uint_as_float(a[i] << 16);
      tile[i % 2 * 2 + 1] = __uint_as_float(a[i] & 0xffff0000u);
    }
  }
}

// ---------------------------------------------------------------------------------------------- launches

// Whether sequences are cut into segments.
enum class Segments { kByRule, kNever, kAlways };

// Bytes of the workspace of a backward pass.
__attribute__((visibility("hidden"))) int64_t wkv7_chunked_backward_bytes(Segments segments, int S, int64_t T, int H,
                                                                         int N);

}  // namespace rwkv
