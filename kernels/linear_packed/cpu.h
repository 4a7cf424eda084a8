// SPDX-License-Identifier: Apache-2.0
// A whole quantized linear: transform, quantization and product.
#pragma once

#include "../hadamard_quantize/cpu.h"
#include "../linear_wna16/cpu.h"

namespace LOWBIT_ISA {

template <int BITS>
void linear_packed(const Transform& t, const float* input_scale, const Weight& w,
                   const void* x, int x_type, size_t m, const Grid& grid,
                   size_t groups, int type, void* out) {
  static thread_local Scratch values, scales, zeros;
  if (grid.bits == 16) {
    if (t.order > 1 || input_scale != nullptr) {
      float* y = values.take<float>(m * w.k);
      hadamard(t, x, x_type, input_scale, m, w.k, y);
      x = y;
      x_type = FLOAT32;
    }
    linear_fixed_point<BITS>(x, x_type, w, m, type, out);
    return;
  }
  int8_t* codes = values.take<int8_t>(m * w.k);
  float* scale = scales.take<float>(m * groups);
  int32_t* zero_point = zeros.take<int32_t>(m * groups);
  hadamard_quantize(t, x, x_type, input_scale, m, w.k, grid, groups, codes, scale,
                    zero_point);
  const IntegerRows rows{codes, scale, zero_point, groups};
  linear<BITS>(rows, w, m, type, out);
}

}  // namespace LOWBIT_ISA
