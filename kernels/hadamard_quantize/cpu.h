// SPDX-License-Identifier: Apache-2.0
// The integer grids of grid.py, and activations quantized on them.
#pragma once

#include "../hadamard/cpu.h"

namespace LOWBIT_ISA {

struct Grid {
  int bits;
  bool symmetric, full_range;
  float clip_ratio;
  int code_min() const { return -(1 << (bits - 1)) + (symmetric && !full_range); }
  int code_max() const { return (1 << (bits - 1)) - 1; }
};

struct Parameters {
  float scale;
  int32_t zero_point;
};

// IntGrid.parameters of a row with this range.
LOWBIT_INLINE Parameters grid_parameters(const Grid& grid, Range range,
                                         float clip_ratio) {
  const float peak = range.peak();
  const float low = range.low < 0.0f ? range.low : 0.0f;
  const float high = range.high > 0.0f ? range.high : 0.0f;
  float scale;
  if (grid.symmetric) {
    scale = peak * clip_ratio / float(grid.code_max());
  } else {
    const float half_levels = float(grid.code_max() - grid.code_min()) * 0.5f;
    scale = (high * 0.5f - low * 0.5f) * clip_ratio / half_levels;
  }
  if (range.low == range.high) scale = peak;
  if (peak < TINY) scale = 1.0f;
  if (!range.finite || !is_finite(scale)) scale = NOT_A_NUMBER;
  int32_t zero_point = 0;
  if (!grid.symmetric) {
    zero_point = grid.code_min();
    if (scale == scale) {
      zero_point -= int32_t(round_even(low * clip_ratio * (1.0f / scale)));
    }
  }
  return {scale, zero_point};
}

// IntGrid.encode of one row.
LOWBIT_INLINE void grid_encode(const Grid& grid, Parameters p, const float* x,
                               size_t n, int8_t* codes) {
  if (!(p.scale == p.scale)) {
    memset(codes, 0, n);
    return;
  }
  const float inverse = 1.0f / p.scale, zero = float(p.zero_point);
  const float low = float(grid.code_min()), high = float(grid.code_max());
  for (size_t i = 0; i < n; ++i) {
    float code = round_even(x[i] * inverse) + zero;
    code = code < low ? low : code;
    code = code > high ? high : code;
    codes[i] = int8_t(int32_t(code));
  }
}

// scale and zero_point are [m, groups], of as many equal parts of a row.
inline void hadamard_quantize(const Transform& t, const void* x, int type,
                              const float* input_scale, size_t m, size_t n,
                              const Grid& grid, size_t groups, int8_t* codes,
                              float* scale, int32_t* zero_point) {
  const size_t size = n / groups;
#pragma omp parallel if (m > 1)
  {
    static thread_local Scratch doubles, floats;
    double* work = doubles.take<double>(transform_scratch(t));
    float* row = floats.take<float>(n);
#pragma omp for schedule(static)
    for (size_t r = 0; r < m; ++r) {
      const char* from = static_cast<const char*>(x) + r * n * type_bytes(type);
      scale_and_transform(t, from, type, input_scale, n, work, row);
      for (size_t g = 0; g < groups; ++g) {
        const float* values = row + g * size;
        const Parameters p =
            grid_parameters(grid, range_of(values, size), grid.clip_ratio);
        scale[r * groups + g] = p.scale;
        zero_point[r * groups + g] = p.zero_point;
        grid_encode(grid, p, values, size, codes + r * n + g * size);
      }
    }
  }
}

}  // namespace LOWBIT_ISA
