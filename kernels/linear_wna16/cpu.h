// SPDX-License-Identifier: Apache-2.0
// Weight-only linear: activations in fixed point, as digits of one byte.
#pragma once

#include "../linear_w4a4/cpu.h"

namespace LOWBIT_ISA {

// linear_wna16/generic.py's integers, x = 65536 d2 + 256 d1 + d0 with signed digits; two
// of them for bfloat16 outputs.
template <int COUNT>
struct FixedPointRows {
  static constexpr int DIGITS = COUNT, FRACTION = 22;
  static constexpr double HALF_MAX = 127 * 256;
  using Total = double;
  const void* x;  // [m, k]
  int type;
  const double* unit;  // [m]; NaN where a token is not finite

  static LOWBIT_INLINE double unit_of(uint32_t peak) {
    if (peak >= 0x7f800000) return double(NOT_A_NUMBER);
    const float largest = float_of(peak);
    if (DIGITS == 3) return power_of_two(exponent_of(largest) - FRACTION);
    return largest < TINY ? 1.0 : double(largest) / HALF_MAX;
  }

  LOWBIT_INLINE void load(size_t token, size_t k, size_t from, size_t columns,
                          int8_t* out, size_t ld) const {
    const char* p = static_cast<const char*>(x) + (token * k + from) * type_bytes(type);
    if (!(unit[token] == unit[token])) return;  // zeros; finish() makes the NaN
    constexpr size_t STEP = 256;
    for (size_t done = 0; done < columns; done += STEP) {
      const size_t n = smaller(STEP, columns - done);
      alignas(64) float values[STEP];
      read_floats(p + done * type_bytes(type), type, n, values);
      const double scale = 1.0 / unit[token];
      for (size_t c = 0; c < n; ++c) {
        const int32_t number = int32_t(round_even(values[c] * scale));
        const int32_t high = (number + 128) >> 8;
        out[done + c] = int8_t(number - 256 * high);
        if constexpr (DIGITS == 2) {
          out[ld + done + c] = int8_t(high);
        } else {
          const int32_t highest = (high + 128) >> 8;
          out[ld + done + c] = int8_t(high - 256 * highest);
          out[2 * ld + done + c] = int8_t(highest);
        }
      }
    }
  }
  LOWBIT_INLINE void add(size_t, const Weight& w, size_t group, size_t ld,
                         size_t channel, int count, const int32_t* sums,
                         const int32_t* digit_sums, bool first, double* total) const {
    const float* ws = w.scale + group * ld + channel;
    const int32_t* zeros = w.zero == nullptr ? nullptr : w.zero + group * ld + channel;
    const uint32_t half = 1u << (w.bits - 1);
    for (int c = 0; c < count; ++c) {
      const uint32_t zero = zeros == nullptr ? half : uint32_t(zeros[c]);
      const auto digit = [&](int d) {
        return double(
            int32_t(uint32_t(sums[d * PANEL + c]) - uint32_t(digit_sums[d]) * zero));
      };
      double sum = digit(0) + 256.0 * digit(1);
      if constexpr (DIGITS == 3) sum += 65536.0 * digit(2);
      const double part = sum * double(ws[c]);
      total[c] = first ? part : total[c] + part;
    }
  }
  LOWBIT_INLINE void finish(size_t token, const float* bias, int count,
                            const double* total, float* out) const {
    const double factor = unit[token];
    for (int c = 0; c < count; ++c) {
      double y = total[c] * factor;
      if (bias != nullptr) y += double(bias[c]);
      out[c] = float(y);
    }
  }
};

template <int BITS, int DIGITS>
void linear_digits(const void* x, int x_type, const Weight& w, size_t m, int type,
                   void* out) {
  static thread_local Scratch scratch;
  double* unit = scratch.take<double>(m);
  for (size_t r = 0; r < m; ++r) {
    const char* row = static_cast<const char*>(x) + r * w.k * type_bytes(x_type);
    uint32_t peak = 0;
    constexpr size_t STEP = 256;
    for (size_t done = 0; done < w.k; done += STEP) {
      const size_t n = smaller(STEP, w.k - done);
      alignas(64) float values[STEP];
      read_floats(row + done * type_bytes(x_type), x_type, n, values);
      for (size_t c = 0; c < n; ++c) {
        const uint32_t size = bits_of(values[c]) & 0x7fffffff;
        peak = size > peak ? size : peak;
      }
    }
    unit[r] = FixedPointRows<DIGITS>::unit_of(peak);
  }
  const FixedPointRows<DIGITS> rows{x, x_type, unit};
  linear<BITS>(rows, w, m, type, out);
}

template <int BITS>
void linear_fixed_point(const void* x, int x_type, const Weight& w, size_t m, int type,
                        void* out) {
  if (type == BFLOAT16) {
    linear_digits<BITS, 2>(x, x_type, w, m, type, out);
  } else {
    linear_digits<BITS, 3>(x, x_type, w, m, type, out);
  }
}

}  // namespace LOWBIT_ISA
