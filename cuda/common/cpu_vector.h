// Vectors for the CPU kernels: GCC/Clang vector extensions, as wide as the instruction set that is compiled for.
//
// Everything here is written once for 4, 8 or 16 lanes; the compiler chooses the instructions.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace rwkv {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
// Accumulators that fit in the registers beside their operands: 32 registers with AVX-512 and on ARM, else 16.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRowTile = 8;
#else
constexpr int kRowTile = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes), may_alias));
typedef float UnalignedVec __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes), may_alias));

inline Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
inline void store(float* p, Vec x) { *reinterpret_cast<UnalignedVec*>(p) = x; }
inline Vec spread(float x) { return x - Vec{}; }

// Number of floats, rounded up to whole vectors.
inline int padded(int n) { return (n + kLanes - 1) / kLanes * kLanes; }

// exp(x), relative error about 1e-7; 0 below -87.3, so that no result is denormal. NaN stays NaN.
inline Vec exp(Vec x) {
  const Vec lowest = spread(-87.3f), highest = spread(88.3f), shift = spread(12582912.f);  // 1.5 * 2^23 rounds
  const IntVec is_zero = x < lowest;
  x = x < lowest ? lowest : x;
  x = x > highest ? highest : x;
  const Vec shifted = x * 1.44269504f + shift;
  const Vec n = shifted - shift;
  const Vec r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec p = spread(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r * r + r) + 1.f;
  const IntVec power = ((IntVec)shifted - (IntVec)shift + 127) << 23;
  return is_zero ? Vec{} : p * (Vec)power;
}

template <int... I>
inline Vec select(Vec x, Vec y, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(x, y, I...);
#else
  return __builtin_shuffle(x, y, IntVec{I...});
#endif
}

// Lane l of the result is lane index(l) of (x, y) taken together; F is that index function.
template <typename F, int... I>
inline Vec shuffle(Vec x, Vec y, std::integer_sequence<int, I...>) {
  return select(x, y, std::integer_sequence<int, F::index(I)...>{});
}

template <int kParity>
struct EveryOther {
  static constexpr int index(int lane) { return 2 * lane + kParity; }
};
template <int kStride>
struct LowBlocks {
  static constexpr int index(int lane) { return lane & kStride ? kLanes + lane - kStride : lane; }
};
template <int kStride>
struct HighBlocks {
  static constexpr int index(int lane) { return lane & kStride ? kLanes + lane : lane + kStride; }
};

using AllLanes = std::make_integer_sequence<int, kLanes>;

// Sums of kLanes vectors: lane i of the result is the sum of x[i]. Destroys x.
inline Vec sum_each(Vec* x) {
#pragma GCC unroll 4
  for (int count = kLanes / 2; count >= 1; count /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < count; ++i)
      x[i] = shuffle<EveryOther<0>>(x[2 * i], x[2 * i + 1], AllLanes{}) +
             shuffle<EveryOther<1>>(x[2 * i], x[2 * i + 1], AllLanes{});
  return x[0];
}

template <int kStride>
inline void swap_blocks(Vec* x) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & kStride) continue;
    const Vec low = shuffle<LowBlocks<kStride>>(x[i], x[i + kStride], AllLanes{});
    const Vec high = shuffle<HighBlocks<kStride>>(x[i], x[i + kStride], AllLanes{});
    x[i] = low;
    x[i + kStride] = high;
  }
}

// Transposes the square of kLanes vectors in place.
inline void transpose(Vec* x) {
  swap_blocks<1>(x);
  swap_blocks<2>(x);
  if constexpr (kLanes >= 8) swap_blocks<4>(x);
  if constexpr (kLanes >= 16) swap_blocks<8>(x);
}

// While it lives, this thread takes denormal numbers for 0: strong decays make many, and each costs 100 cycles.
class DenormalsAreZero {
 public:
#if defined(__SSE__)
  DenormalsAreZero() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~DenormalsAreZero() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#endif
};

// Memory of a thread that lasts from call to call: fresh pages would cost more than the smaller kernels.
inline float* thread_workspace(size_t n_floats) {
  struct Buffer {
    float* data = nullptr;
    size_t size = 0;
    ~Buffer() { std::free(data); }
  };
  static thread_local Buffer buffer;
  if (buffer.size < n_floats) {
    std::free(buffer.data);
    const size_t bytes = (n_floats * sizeof(float) + 63) / 64 * 64;
    buffer.data = static_cast<float*>(std::aligned_alloc(64, bytes));
    if (buffer.data == nullptr) std::abort();
    buffer.size = n_floats;
  }
  return buffer.data;
}

}  // namespace rwkv
