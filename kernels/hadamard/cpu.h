// SPDX-License-Identifier: Apache-2.0
// The transform of hadamard/generic.py: sums of 30-bit fixed point are exact in
// double, so any order of additions gives the same float32.
#pragma once

#include "../cpu/number.h"

namespace LOWBIT_ISA {

constexpr int FRACTION_BITS = 30;
constexpr int LANES = VECTOR_BYTES / 8;
typedef double Doubles __attribute__((vector_size(VECTOR_BYTES)));
typedef int64_t Lanes __attribute__((vector_size(VECTOR_BYTES)));

// H = core (x) Sylvester(power), order = core * power.
struct Transform {
  size_t order;
  size_t stride;        // elements between neighbours of one transform
  const int8_t* table;  // [core, core] of +1 and -1, null when core is 1
  size_t core;
  bool transpose;
  double norm;  // order^-1/2
};

// Stages of distance 1, 2, ... below LANES, inside each vector.
LOWBIT_INLINE void butterflies_in_lanes(double* a, size_t n) {
  for (size_t i = 0; i < n; i += LANES) {
    Doubles x;
    memcpy(&x, a + i, sizeof x);
#pragma GCC unroll 3
    for (int h = 1; h < LANES; h *= 2) {
      Lanes partner;
      Doubles sign;
      for (int l = 0; l < LANES; ++l) {
        partner[l] = l ^ h;
        sign[l] = l & h ? -1.0 : 1.0;
      }
      x = x * sign + __builtin_shuffle(x, partner);
    }
    memcpy(a + i, &x, sizeof x);
  }
}

// Sylvester transform along the first dimension of a[power][inner].
LOWBIT_INLINE void sylvester(double* a, size_t power, size_t inner) {
  const size_t n = power * inner;
  size_t h = inner;
  if (inner == 1 && power >= size_t(LANES)) {
    butterflies_in_lanes(a, n);
    h = LANES;
  }
  for (; h < n; h *= 2) {
    for (size_t i = 0; i < n; i += 2 * h) {
      double* __restrict__ low = a + i;
      double* __restrict__ high = a + i + h;
      for (size_t j = 0; j < h; ++j) {
        const double u = low[j], v = high[j];
        low[j] = u + v;
        high[j] = u - v;
      }
    }
  }
}

// out[i] = sum over k of sign(i, k) a[k], each a run of `width` doubles.
LOWBIT_INLINE void multiply_core(const Transform& t, const double* a, size_t width,
                                 double* out) {
  for (size_t i = 0; i < t.core; ++i) {
    double* __restrict__ row = out + i * width;
    for (size_t j = 0; j < width; ++j) row[j] = 0.0;
    for (size_t k = 0; k < t.core; ++k) {
      const double sign = t.table[t.transpose ? k * t.core + i : i * t.core + k];
      const double* __restrict__ from = a + k * width;
      for (size_t j = 0; j < width; ++j) row[j] += sign * from[j];
    }
  }
}

LOWBIT_INLINE size_t transform_scratch(const Transform& t) {
  return (2 * t.order + 2) * t.stride;
}

// One row of n floats, y may be x. work has transform_scratch doubles.
LOWBIT_INLINE void transform_row(const Transform& t, const float* x, size_t n,
                                 double* work, float* y) {
  const size_t block = t.order * t.stride, power = t.order / t.core;
  double* other = work + block;
  double* inverse = other + block;
  double* factor = inverse + t.stride;
  for (size_t start = 0; start < n; start += block) {
    const float* from = x + start;
    bool finite = true;
    for (size_t s = 0; s < t.stride; ++s) {
      uint32_t peak = 0;
      for (size_t i = 0; i < t.order; ++i) {
        const uint32_t size = bits_of(from[i * t.stride + s]) & 0x7fffffff;
        peak = size > peak ? size : peak;
      }
      const bool usable = peak < 0x7f800000;
      const int exponent =
          (usable ? exponent_of(float_of(peak)) : 0) - FRACTION_BITS;
      inverse[s] = power_of_two(-exponent);
      factor[s] = usable ? power_of_two(exponent) * t.norm : NOT_A_NUMBER;
      finite &= usable;
    }
    if (t.stride == 1) {
      const double scale = inverse[0];
      for (size_t i = 0; i < block; ++i) work[i] = round_even(from[i] * scale);
    } else {
      for (size_t i = 0; i < t.order; ++i) {
        for (size_t s = 0; s < t.stride; ++s) {
          work[i * t.stride + s] = round_even(from[i * t.stride + s] * inverse[s]);
        }
      }
    }
    const size_t run = power * t.stride;
    for (size_t k = 0; k < t.core; ++k) sylvester(work + k * run, power, t.stride);
    double* sums = work;
    if (t.core > 1) {
      multiply_core(t, work, run, other);
      sums = other;
    }
    float* to = y + start;
    if (t.stride == 1) {
      const double scale = factor[0];
      for (size_t i = 0; i < block; ++i) to[i] = float(sums[i] * scale);
    } else {
      for (size_t i = 0; i < t.order; ++i) {
        for (size_t s = 0; s < t.stride; ++s) {
          to[i * t.stride + s] = float(sums[i * t.stride + s] * factor[s]);
        }
      }
    }
    if (!finite) {
      // Rounding an Inf or NaN may have left a number behind.
      for (size_t s = 0; s < t.stride; ++s) {
        if (factor[s] == factor[s]) continue;
        for (size_t i = 0; i < t.order; ++i) to[i * t.stride + s] = NOT_A_NUMBER;
      }
    }
  }
}

// y = H (input_scale * x), float32; order 1 only scales.
LOWBIT_INLINE void scale_and_transform(const Transform& t, const void* x, int type,
                                       const float* input_scale, size_t n,
                                       double* work, float* y) {
  read_floats(x, type, n, y);
  if (input_scale != nullptr) {
    for (size_t i = 0; i < n; ++i) y[i] *= input_scale[i];
  }
  if (t.order > 1) transform_row(t, y, n, work, y);
}

inline void hadamard(const Transform& t, const void* x, int type,
                     const float* input_scale, size_t m, size_t n, float* y) {
#pragma omp parallel if (m > 1)
  {
    static thread_local Scratch scratch;
    double* work = scratch.take<double>(transform_scratch(t));
#pragma omp for schedule(static)
    for (size_t r = 0; r < m; ++r) {
      const char* from = static_cast<const char*>(x) + r * n * type_bytes(type);
      scale_and_transform(t, from, type, input_scale, n, work, y + r * n);
    }
  }
}

}  // namespace LOWBIT_ISA
