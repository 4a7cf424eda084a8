// SPDX-License-Identifier: Apache-2.0
// The clip search of quantize_weight/reference.py.
#pragma once

#include "../hadamard_quantize/cpu.h"

namespace LOWBIT_ISA {

// Squared error of one row on a grid, in double.
LOWBIT_INLINE double squared_error(const Grid& grid, Parameters p, const float* x,
                                   size_t n) {
  const float inverse = 1.0f / p.scale, zero = float(p.zero_point);
  const float low = float(grid.code_min()), high = float(grid.code_max());
  constexpr int PARTS = 16;
  double sums[PARTS] = {};
  const auto error_of = [&](float value) {
    float code = round_even(value * inverse) + zero;
    code = code < low ? low : code;
    code = code > high ? high : code;
    const float error = (code - zero) * p.scale - value;
    return double(error) * double(error);
  };
  size_t i = 0;
  for (; i + PARTS <= n; i += PARTS) {
    for (int l = 0; l < PARTS; ++l) sums[l] += error_of(x[i + l]);
  }
  double total = 0.0;
  for (; i < n; ++i) total += error_of(x[i]);
  for (int l = 0; l < PARTS; ++l) total += sums[l];
  return total;
}

// Each row of x [rows, n] takes the first of the ratios with the smallest error.
inline void quantize_weight(const float* x, size_t rows, size_t n, const Grid& grid,
                            const float* ratios, size_t count, int8_t* codes,
                            float* scale, int32_t* zero_point) {
#pragma omp parallel for schedule(static)
  for (size_t r = 0; r < rows; ++r) {
    const float* row = x + r * n;
    const Range range = range_of(row, n);
    Parameters best = grid_parameters(grid, range, ratios[0]);
    double best_error = -1.0;
    for (size_t i = 0; i < count && range.finite; ++i) {
      const Parameters p = grid_parameters(grid, range, ratios[i]);
      if (!(p.scale == p.scale)) continue;
      const double error = squared_error(grid, p, row, n);
      if (best_error < 0.0 || error < best_error) {
        best_error = error;
        best = p;
      }
    }
    scale[r] = best.scale;
    zero_point[r] = best.zero_point;
    grid_encode(grid, best, row, n, codes + r * n);
  }
}

}  // namespace LOWBIT_ISA
