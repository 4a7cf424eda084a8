// SPDX-License-Identifier: Apache-2.0
// Float types, rounding and scratch memory.
//
// Compiled without contraction of a * b + c and without reassociation: each
// operation rounds as it does in torch, so codes are equal bit for bit.
#pragma once

#include <cstdlib>

#include "vector.h"

namespace LOWBIT_ISA {

// The dtypes of activations and outputs; kernels/cpu/library.py has the same numbers.
enum Type : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

LOWBIT_INLINE size_t type_bytes(int type) { return type == FLOAT32 ? 4 : 2; }

LOWBIT_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
LOWBIT_INLINE float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
LOWBIT_INLINE bool is_finite(float x) { return (bits_of(x) & 0x7f800000) != 0x7f800000; }

constexpr float NOT_A_NUMBER = __builtin_nanf("");
constexpr float TINY = 0x1p-100f;  // grid.py's

// To nearest, ties to even, for |x| < 2^22 (float) and 2^51 (double).
LOWBIT_INLINE float round_even(float x) { return (x + 12582912.0f) - 12582912.0f; }
LOWBIT_INLINE double round_even(double x) {
  return (x + 6755399441055744.0) - 6755399441055744.0;
}

// 2^exponent for exponents of normal doubles.
LOWBIT_INLINE double power_of_two(int exponent) {
  const uint64_t bits = uint64_t(exponent + 1023) << 52;
  double x;
  memcpy(&x, &bits, 8);
  return x;
}

// frexp's exponent of a finite magnitude; 0 for 0.
LOWBIT_INLINE int exponent_of(float magnitude) {
  if (magnitude == 0.0f) return 0;
  const double wide = magnitude;  // subnormal floats are normal doubles
  uint64_t bits;
  memcpy(&bits, &wide, 8);
  return int(bits >> 52 & 0x7ff) - 1022;
}

LOWBIT_INLINE void read_floats(const void* x, int type, size_t n, float* out) {
  if (type == FLOAT32) {
    memcpy(out, x, 4 * n);
  } else if (type == BFLOAT16) {
    const uint16_t* p = static_cast<const uint16_t*>(x);
    for (size_t i = 0; i < n; ++i) out[i] = float_of(uint32_t(p[i]) << 16);
  } else {
    const _Float16* p = static_cast<const _Float16*>(x);
    for (size_t i = 0; i < n; ++i) out[i] = float(p[i]);
  }
}

LOWBIT_INLINE void write_floats(const float* x, size_t n, int type, void* out) {
  if (type == FLOAT32) {
    memcpy(out, x, 4 * n);
  } else if (type == BFLOAT16) {
    uint16_t* p = static_cast<uint16_t*>(out);
    for (size_t i = 0; i < n; ++i) {
      const uint32_t bits = bits_of(x[i]);
      const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
      p[i] = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : uint16_t(rounded);
    }
  } else {
    _Float16* p = static_cast<_Float16*>(out);
    for (size_t i = 0; i < n; ++i) p[i] = _Float16(x[i]);
  }
}

// The smallest and largest of finite floats, and whether all were finite.
struct Range {
  float low, high;
  bool finite;
  float peak() const { return high > -low ? high : -low; }
};

LOWBIT_INLINE Range range_of(const float* x, size_t n) {
  // As integers in the order of the floats: integer reductions vectorize.
  int32_t low = INT32_MAX, high = INT32_MIN, magnitude = 0;
  for (size_t i = 0; i < n; ++i) {
    const int32_t bits = int32_t(bits_of(x[i]));
    const int32_t key = bits ^ (bits >> 31 & 0x7fffffff);
    low = key < low ? key : low;
    high = key > high ? key : high;
    const int32_t size = bits & 0x7fffffff;
    magnitude = size > magnitude ? size : magnitude;
  }
  const auto back = [](int32_t key) {
    return float_of(uint32_t(key ^ (key >> 31 & 0x7fffffff)));
  };
  return {back(low), back(high), magnitude < 0x7f800000};
}

// Memory of one thread that is kept from call to call.
class Scratch {
 public:
  ~Scratch() { free(data_); }
  // Uninitialised, aligned to a cache line; the previous contents are lost.
  template <class T>
  T* take(size_t count) {
    const size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
    if (bytes > size_) {
      free(data_);
      data_ = aligned_alloc(64, bytes);
      size_ = data_ == nullptr ? 0 : bytes;
      if (data_ == nullptr) abort();  // 64-byte multiples of a few MiB at most
    }
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace LOWBIT_ISA
