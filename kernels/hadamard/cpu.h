// SPDX-License-Identifier: Apache-2.0
// The transform of hadamard/generic.py: sums of 30-bit fixed point are exact in
// double, so any order of additions gives the same float32.
#pragma once

#include <utility>

#include "../cpu/number.h"

namespace LOWBIT_ISA {

constexpr int FRACTION_BITS = 30;
constexpr int LANES = VECTOR_BYTES / 8;
typedef double Doubles __attribute__((vector_size(VECTOR_BYTES)));

// H = core (x) Sylvester(power), order = core * power.
struct Transform {
  size_t order;
  size_t stride;        // elements between neighbours of one transform
  const int8_t* table;  // [core, core] of +1 and -1, null when core is 1
  size_t core;
  bool transpose;
  double norm;  // order^-1/2
};

// One stage of butterflies between lanes H apart.
template <int H, size_t... L>
LOWBIT_INLINE Doubles butterfly(Doubles x, std::index_sequence<L...>) {
  const Doubles sign = {(L & H ? -1.0 : 1.0)...};
  return x * sign + __builtin_shufflevector(x, x, (L ^ H)...);
}

// Stages of distance 1, 2, ... below LANES, inside each vector.
LOWBIT_INLINE void butterflies_in_lanes(double* a, size_t n) {
  constexpr auto lanes = std::make_index_sequence<LANES>();
  for (size_t i = 0; i < n; i += LANES) {
    Doubles x;
    memcpy(&x, a + i, sizeof x);
    x = butterfly<1>(x, lanes);
    if constexpr (LANES > 2) x = butterfly<2>(x, lanes);
    if constexpr (LANES > 4) x = butterfly<4>(x, lanes);
    memcpy(a + i, &x, sizeof x);
  }
}

// STAGES stages of distance h, 2 h, ... on whole vectors, held in registers between.
template <int STAGES>
LOWBIT_INLINE void butterflies(double* a, size_t n, size_t h) {
  constexpr size_t POINTS = 1 << STAGES;
  for (size_t i = 0; i < n; i += POINTS * h) {
    for (size_t j = i; j < i + h; j += LANES) {
      Doubles x[POINTS];
#pragma GCC unroll 8
      for (size_t p = 0; p < POINTS; ++p) memcpy(&x[p], a + j + p * h, sizeof x[p]);
#pragma GCC unroll 3
      for (size_t bit = 1; bit < POINTS; bit *= 2) {
#pragma GCC unroll 8
        for (size_t p = 0; p < POINTS; ++p) {
          if (p & bit) continue;
          const Doubles u = x[p], v = x[p | bit];
          x[p] = u + v;
          x[p | bit] = u - v;
        }
      }
#pragma GCC unroll 8
      for (size_t p = 0; p < POINTS; ++p) memcpy(a + j + p * h, &x[p], sizeof x[p]);
    }
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
  if (h % LANES == 0) {
    for (; 8 * h <= n; h *= 8) butterflies<3>(a, n, h);
    if (4 * h == n) butterflies<2>(a, n, h);
    if (2 * h == n) butterflies<1>(a, n, h);
    return;
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

LOWBIT_INLINE uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

// The factors to fixed point and back of a block with this largest magnitude; the
// second is NaN, and so the whole result, when that is an Inf or NaN.
LOWBIT_INLINE void fixed_point_factors(const Transform& t, uint32_t peak,
                                       double* inverse, double* factor) {
  const bool finite = peak < 0x7f800000;
  const int exponent = (finite ? exponent_of(float_of(peak)) : 0) - FRACTION_BITS;
  *inverse = finite ? power_of_two(-exponent) : 0.0;
  *factor = finite ? power_of_two(exponent) * t.norm : double(NOT_A_NUMBER);
}

// Butterflies and core of one block in work; the sums are in what is returned.
LOWBIT_INLINE double* transform_block(const Transform& t, double* work, double* other) {
  const size_t power = t.order / t.core, run = power * t.stride;
  for (size_t k = 0; k < t.core; ++k) sylvester(work + k * run, power, t.stride);
  if (t.core == 1) return work;
  multiply_core(t, work, run, other);
  return other;
}

LOWBIT_INLINE void transform_dense_block(const Transform& t, const float* x,
                                         double* work, float* y) {
  uint32_t peak = 0;
  for (size_t i = 0; i < t.order; ++i) peak = larger(bits_of(x[i]) & 0x7fffffff, peak);
  double inverse, factor;
  fixed_point_factors(t, peak, &inverse, &factor);
  for (size_t i = 0; i < t.order; ++i) work[i] = round_even(double(x[i]) * inverse);
  const double* sums = transform_block(t, work, work + t.order);
  for (size_t i = 0; i < t.order; ++i) y[i] = float(sums[i] * factor);
}

LOWBIT_INLINE void transform_strided_block(const Transform& t, const float* x,
                                           double* work, float* y) {
  const size_t stride = t.stride;
  double* inverse = work + 2 * t.order * stride;
  double* factor = inverse + stride;
  for (size_t s = 0; s < stride; ++s) {
    uint32_t peak = 0;
    for (size_t i = 0; i < t.order; ++i) {
      peak = larger(bits_of(x[i * stride + s]) & 0x7fffffff, peak);
    }
    fixed_point_factors(t, peak, inverse + s, factor + s);
  }
  for (size_t i = 0; i < t.order; ++i) {
    for (size_t s = 0; s < stride; ++s) {
      work[i * stride + s] = round_even(double(x[i * stride + s]) * inverse[s]);
    }
  }
  const double* sums = transform_block(t, work, work + t.order * stride);
  for (size_t i = 0; i < t.order; ++i) {
    for (size_t s = 0; s < stride; ++s) {
      y[i * stride + s] = float(sums[i * stride + s] * factor[s]);
    }
  }
}

// One row of n floats, y may be x. work has transform_scratch doubles.
LOWBIT_INLINE void transform_row(const Transform& t, const float* x, size_t n,
                                 double* work, float* y) {
  const size_t block = t.order * t.stride;
  for (size_t start = 0; start < n; start += block) {
    if (t.stride == 1) {
      transform_dense_block(t, x + start, work, y + start);
    } else {
      transform_strided_block(t, x + start, work, y + start);
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
