// Runs mma.sync, ldmatrix and cp.async on the CPU, under the names of common/gpu_mma.cuh; layouts are described there.

#pragma once

#include "emulation.h"

namespace RWKV_HIDDEN rwkv_emulation {

struct Fragments {
  float* c;
  const unsigned *a, *b;
};

// The numbers that kKind has in a register, the lower half first.
enum Kind { kBFloat16Pair, kFloat16Pair, kTf32 };

template <Kind kKind>
float element(const unsigned* registers, int i) {
  if (kKind == kTf32) return bits_as<float>(registers[i] & 0xffffe000);  // tensor cores ignore the other bits
  const uint16_t bits = static_cast<uint16_t>(registers[i / 2] >> i % 2 * 16);
  return kKind == kBFloat16Pair ? rwkv::bfloat16_to_float(bits) : rwkv::float16_to_float(bits);
}

// c += a b for [16, kDepth] and [kDepth, 8]; products are exact in float32, sums are rounded one by one.
template <Kind kKind>
void complete_mma(void* const* lanes, unsigned) {
  constexpr int kDepth = kKind == kTf32 ? 8 : 16;
  float a[16][kDepth], b[kDepth][8], c[16][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const Fragments& own = *static_cast<const Fragments*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) c[g + i / 2 * 8][2 * t + i % 2] = own.c[i];
    if (kKind == kTf32) {
      for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][t + i / 2 * 4] = element<kKind>(own.a, i);
      for (int i = 0; i < 2; ++i) b[t + i * 4][g] = element<kKind>(own.b, i);
    } else {
      for (int i = 0; i < 8; ++i) a[g + i / 2 % 2 * 8][2 * t + i % 2 + i / 4 * 8] = element<kKind>(own.a, i);
      for (int i = 0; i < 4; ++i) b[2 * t + i % 2 + i / 2 * 8][g] = element<kKind>(own.b, i);
    }
  }
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < kDepth; ++k)
      for (int column = 0; column < 8; ++column) c[row][column] += a[row][k] * b[k][column];
  for (int lane = 0; lane < kWarp; ++lane) {
    const Fragments& own = *static_cast<const Fragments*>(lanes[lane]);
    for (int i = 0; i < 4; ++i) own.c[i] = c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
}

template <Kind kKind>
void mma(float* c, const unsigned* a, const unsigned* b) {
  Fragments own{c, a, b};
  collective(~0u, complete_mma<kKind>, &own);
}

inline void need_alignment(const void* address, size_t bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0)
    fail(std::string(what) + " at an address that is not a multiple of " + std::to_string(bytes) + " bytes");
}

inline void need_shared(const void* address, size_t bytes, const char* what) {
  const char* first = static_cast<const char*>(address);
  if (first < machine.shared || first + bytes > machine.shared + machine.shared_bytes)
    fail(std::string(what) + " at byte " + std::to_string(first - machine.shared) + " of " +
         std::to_string(machine.shared_bytes) + " bytes of shared memory");
}

struct Rows {
  unsigned* registers;
  const void* row;
};

template <int kCount, bool kTransposed>
void complete_ldmatrix(void* const* lanes, unsigned) {
  for (int i = 0; i < kCount; ++i) {
    uint16_t matrix[8][8];
    for (int row = 0; row < 8; ++row) {
      const void* from = static_cast<const Rows*>(lanes[8 * i + row])->row;
      need_alignment(from, 16, "ldmatrix");
      need_shared(from, 16, "ldmatrix");
      std::memcpy(matrix[row], from, 16);
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      const int g = lane / 4, t = lane % 4;
      const unsigned lower = kTransposed ? matrix[2 * t][g] : matrix[g][2 * t];
      const unsigned upper = kTransposed ? matrix[2 * t + 1][g] : matrix[g][2 * t + 1];
      static_cast<const Rows*>(lanes[lane])->registers[i] = lower | upper << 16;
    }
  }
}

}  // namespace rwkv_emulation

namespace rwkv {

inline unsigned pack_bfloat16(float lower, float upper) {
  return float_to_bfloat16(lower) | static_cast<unsigned>(float_to_bfloat16(upper)) << 16;
}
inline unsigned pack_float16(float lower, float upper) {
  return float_to_float16(lower) | static_cast<unsigned>(float_to_float16(upper)) << 16;
}

inline unsigned to_tf32(float x) {
  const unsigned bits = __float_as_uint(x);
  if (std::isnan(x)) return 0x7fffffff;
  return std::isinf(x) ? bits : (bits + 0x1000) & 0xffffe000;
}

inline void mma_bfloat16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  rwkv_emulation::mma<rwkv_emulation::kBFloat16Pair>(c, a, b);
}
inline void mma_float16(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  rwkv_emulation::mma<rwkv_emulation::kFloat16Pair>(c, a, b);
}
inline void mma_tf32(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  rwkv_emulation::mma<rwkv_emulation::kTf32>(c, a, b);
}

template <int kCount>
void ldmatrix(unsigned (&registers)[kCount], const void* row) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4, "ldmatrix reads 1, 2 or 4 matrices");
  rwkv_emulation::Rows own{registers, row};
  rwkv_emulation::collective(~0u, rwkv_emulation::complete_ldmatrix<kCount, false>, &own);
}
template <int kCount>
void ldmatrix_transposed(unsigned (&registers)[kCount], const void* row) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4, "ldmatrix reads 1, 2 or 4 matrices");
  rwkv_emulation::Rows own{registers, row};
  rwkv_emulation::collective(~0u, rwkv_emulation::complete_ldmatrix<kCount, true>, &own);
}

// The data arrive in cp_async_wait and at no other time; until then NaN lies there, so that whoever does not wait, or
// still reads what lay there before, gets NaN.
template <int kBytes>
void cp_async(void* shared, const void* global, bool wanted = true) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
  using namespace rwkv_emulation;
  need_alignment(shared, kBytes, "cp.async");
  need_alignment(global, kBytes, "cp.async");
  need_shared(shared, kBytes, "cp.async");
  std::memset(shared, kPoison, kBytes);
  machine.copies[machine.thread].push_back(
      {shared, wanted ? global : nullptr, kBytes, machine.copy_groups[machine.thread]});
}

inline void cp_async_commit() { ++rwkv_emulation::machine.copy_groups[rwkv_emulation::machine.thread]; }

template <int kPending>
void cp_async_wait() {
  using namespace rwkv_emulation;
  std::vector<Copy>& copies = machine.copies[machine.thread];
  const unsigned groups = machine.copy_groups[machine.thread];  // those numbered below are committed
  size_t arrived = 0;
  for (; arrived < copies.size() && copies[arrived].group + kPending < groups; ++arrived) {
    const Copy& copy = copies[arrived];
    if (copy.from)
      std::memcpy(copy.to, copy.from, copy.bytes);
    else
      std::memset(copy.to, 0, copy.bytes);
  }
  copies.erase(copies.begin(), copies.begin() + static_cast<std::ptrdiff_t>(arrived));
}

}  // namespace rwkv
