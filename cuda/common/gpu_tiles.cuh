// Matrices of bfloat16 in shared memory, and the fragments of gpu_mma.cuh that a warp makes of them or of what it has
// computed. A lane is g = lane / 4, t = lane % 4, as there.
//
// What a product leaves, c[4] of a tile of 16 x 8, has the layout of half an operand: two tiles side by side are an `a`,
// and, read as their transposed, two `b`. So a chain of products stays in registers; between two of them the numbers are
// rounded to bfloat16 (`as_a`), or split in two of it (`as_split_a`), which keeps 16 bits of mantissa:
//   x y = high(x) high(y) + low(x) high(y) + high(x) low(y), where what is left out is 2^-18 of it.

#pragma once

#include "gpu_mma.cuh"

namespace rwkv {

// Rows of kColumns numbers. They lie 8 more apart, so that each begins at a multiple of 16 bytes, and 8 of them, which
// ldmatrix reads at once, in different banks.
template <int kColumns>
struct Matrix {
  static_assert(kColumns % 16 == 0, "fragments are 16 wide");
  static constexpr int kStride = kColumns + 8;
  static constexpr __host__ __device__ int size_of(int rows) { return rows * kStride; }  // in numbers of 2 bytes

  uint16_t* first;

  __device__ __forceinline__ uint16_t* at(int row, int column) const { return first + row * kStride + column; }
};

__device__ __forceinline__ int lane_of_thread() { return static_cast<int>(threadIdx.x % 32); }
__device__ __forceinline__ int lane_g() { return lane_of_thread() / 4; }
__device__ __forceinline__ int lane_t() { return lane_of_thread() % 4; }

// ---------------------------------------------------------------------------------------------- from shared memory

// lane: this thread's; one that the compiler knows nothing of keeps it from computing addresses long before their use.

// a[i][k] = m[row + i][column + k], 16 x 16.
template <int kColumns>
__device__ __forceinline__ void load_a(const Matrix<kColumns>& m, int row, int column, unsigned (&a)[4],
                                       int lane = lane_of_thread()) {
  ldmatrix<4>(a, m.at(row + lane % 16, column + lane / 16 * 8));
}

// a[i][k] = m[row + k][column + i].
template <int kColumns>
__device__ __forceinline__ void load_a_transposed(const Matrix<kColumns>& m, int row, int column, unsigned (&a)[4],
                                                  int lane = lane_of_thread()) {
  ldmatrix_transposed<4>(a, m.at(row + lane % 8 + lane / 16 * 8, column + lane / 8 % 2 * 8));
}

// b[j / 8][k][j % 8] = m[row + k][column + j], two tiles of 16 x 8 side by side.
template <int kColumns>
__device__ __forceinline__ void load_b(const Matrix<kColumns>& m, int row, int column, unsigned (&b)[2][2],
                                       int lane = lane_of_thread()) {
  unsigned x[4];
  ldmatrix_transposed<4>(x, m.at(row + lane % 16, column + lane / 16 * 8));
  b[0][0] = x[0], b[0][1] = x[1], b[1][0] = x[2], b[1][1] = x[3];
}

// b[j / 8][k][j % 8] = m[row + j][column + k].
template <int kColumns>
__device__ __forceinline__ void load_b_transposed(const Matrix<kColumns>& m, int row, int column,
                                                  unsigned (&b)[2][2], int lane = lane_of_thread()) {
  unsigned x[4];
  ldmatrix<4>(x, m.at(row + lane % 8 + lane / 16 * 8, column + lane / 8 % 2 * 8));
  b[0][0] = x[0], b[0][1] = x[1], b[1][0] = x[2], b[1][1] = x[3];
}

// ---------------------------------------------------------------------------------------------- to shared memory

// m[row + i][column + j] = c[i][j], a tile of 16 x 8.
template <int kColumns>
__device__ __forceinline__ void store_tile(const float (&c)[4], const Matrix<kColumns>& m, int row, int column) {
  const int g = lane_g(), t = lane_t();
  *reinterpret_cast<unsigned*>(m.at(row + g, column + 2 * t)) = pack_bfloat16(c[0], c[1]);
  *reinterpret_cast<unsigned*>(m.at(row + g + 8, column + 2 * t)) = pack_bfloat16(c[2], c[3]);
}

// m[row + j][column + i] = c[i][j].
template <int kColumns>
__device__ __forceinline__ void store_tile_transposed(const float (&c)[4], const Matrix<kColumns>& m, int row,
                                                      int column) {
  const int g = lane_g(), t = lane_t();
#pragma unroll
  for (int i = 0; i < 4; ++i)
    *m.at(row + 2 * t + i % 2, column + g + i / 2 * 8) = float_to_bfloat16(c[i]);
}

// ---------------------------------------------------------------------------------------------- in registers

// x and y as a register, and what rounding took from them as another.
__device__ __forceinline__ void pack_split(float x, float y, unsigned& high, unsigned& low) {
  high = pack_bfloat16(x, y);
  low = pack_bfloat16(x - __uint_as_float(high << 16), y - __uint_as_float(high & 0xffff0000u));
}

// a[i][k] of two tiles of results side by side: columns 0 .. 7 in `left`, 8 .. 15 in `right`.
__device__ __forceinline__ void as_a(const float (&left)[4], const float (&right)[4], unsigned (&a)[4]) {
  a[0] = pack_bfloat16(left[0], left[1]);
  a[1] = pack_bfloat16(left[2], left[3]);
  a[2] = pack_bfloat16(right[0], right[1]);
  a[3] = pack_bfloat16(right[2], right[3]);
}

__device__ __forceinline__ void as_split_a(const float (&left)[4], const float (&right)[4], unsigned (&high)[4],
                                           unsigned (&low)[4]) {
  pack_split(left[0], left[1], high[0], low[0]);
  pack_split(left[2], left[3], high[1], low[1]);
  pack_split(right[0], right[1], high[2], low[2]);
  pack_split(right[2], right[3], high[3], low[3]);
}

// The transposed of an operand a, [16, 16]: b[i / 8][k][i % 8] = a[i][k].
__device__ __forceinline__ void as_transposed_b(const unsigned (&a)[4], unsigned (&b)[2][2]) {
  b[0][0] = a[0], b[0][1] = a[2], b[1][0] = a[1], b[1][1] = a[3];
}

// c[0], c[1] += a b, two tiles side by side.
__device__ __forceinline__ void multiply_add(float (&c)[2][4], const unsigned (&a)[4], const unsigned (&b)[2][2]) {
  mma_bfloat16(c[0], a, b[0]);
  mma_bfloat16(c[1], a, b[1]);
}

}  // namespace rwkv
