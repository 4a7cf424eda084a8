// SPDX-License-Identifier: Apache-2.0
// Linear on a plain 16-bit or float32 matrix. Each output is the sum of 16 partial
// sums over k, added in one order whatever the rows around it.
#pragma once

#include "../cpu/number.h"

namespace LOWBIT_ISA {

constexpr int DENSE_ROWS = TILE_ROWS < 4 ? 2 : 4, DENSE_CHANNELS = TILE_ROWS < 4 ? 2 : 6;

template <int TYPE>
LOWBIT_INLINE Floats load_weights(const void* p, size_t i) {
  if constexpr (TYPE == FLOAT32) return load_floats(static_cast<const float*>(p) + i);
  const uint16_t* half = static_cast<const uint16_t*>(p) + i;
  if constexpr (TYPE == BFLOAT16) return load_bfloats(half);
  return load_halves(half);
}

LOWBIT_INLINE float add_lanes(Floats x) {
  alignas(64) float lanes[16];
  store_floats(lanes, x);
  for (int h = 8; h > 0; h /= 2) {
    for (int l = 0; l < h; ++l) lanes[l] += lanes[l + h];
  }
  return lanes[0];
}

// x float32 rows of length `padded`, zero beyond k.
template <int TYPE, int ROWS, int CHANNELS>
LOWBIT_INLINE void dense_tile(const float* x, size_t padded, const char* w, size_t k,
                              float* out) {
  Floats sums[ROWS][CHANNELS];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 6
    for (int c = 0; c < CHANNELS; ++c) sums[r][c] = zero_floats();
  }
  const size_t whole = k / 16 * 16;
  for (size_t i = 0; i < whole; i += 16) {
#pragma GCC unroll 6
    for (int c = 0; c < CHANNELS; ++c) {
      const char* p = w + c * k * type_bytes(TYPE);
      __builtin_prefetch(p + i * type_bytes(TYPE) + 1024);
      const Floats weights = load_weights<TYPE>(p, i);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        sums[r][c] = multiply_add(load_floats(x + r * padded + i), weights, sums[r][c]);
      }
    }
  }
  if (whole < k) {
#pragma GCC unroll 6
    for (int c = 0; c < CHANNELS; ++c) {
      alignas(64) char tail[64] = {};
      memcpy(tail, w + (c * k + whole) * type_bytes(TYPE),
             (k - whole) * type_bytes(TYPE));
      const Floats weights = load_weights<TYPE>(tail, 0);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        sums[r][c] =
            multiply_add(load_floats(x + r * padded + whole), weights, sums[r][c]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 6
    for (int c = 0; c < CHANNELS; ++c) {
      out[r * DENSE_CHANNELS + c] = add_lanes(sums[r][c]);
    }
  }
}

template <int TYPE, int ROWS = DENSE_ROWS, int CHANNELS = DENSE_CHANNELS>
LOWBIT_INLINE void any_dense_tile(int rows, int channels, const float* x, size_t padded,
                                  const char* w, size_t k, float* out) {
  if (channels == CHANNELS && rows == ROWS) {
    dense_tile<TYPE, ROWS, CHANNELS>(x, padded, w, k, out);
  } else if constexpr (CHANNELS > 1) {
    // Remainders of channels go one by one.
    if (channels < CHANNELS) {
      for (int c = 0; c < channels; ++c) {
        any_dense_tile<TYPE, ROWS, 1>(rows, 1, x, padded,
                                      w + c * k * type_bytes(TYPE), k, out + c);
      }
    } else if constexpr (ROWS > 1) {
      any_dense_tile<TYPE, ROWS - 1, CHANNELS>(rows, channels, x, padded, w, k, out);
    }
  } else if constexpr (ROWS > 1) {
    any_dense_tile<TYPE, ROWS - 1, CHANNELS>(rows, channels, x, padded, w, k, out);
  }
}

template <int TYPE>
void linear_tiled(const void* x, const void* w, const float* bias, size_t m, size_t n,
                  size_t k, void* out) {
  static thread_local Scratch scratch;
  const size_t padded = (k + 15) / 16 * 16;
  float* const rows = scratch.take<float>(m * padded);
  for (size_t r = 0; r < m; ++r) {
    const char* from = static_cast<const char*>(x) + r * k * type_bytes(TYPE);
    read_floats(from, TYPE, k, rows + r * padded);
    for (size_t i = k; i < padded; ++i) rows[r * padded + i] = 0.0f;
  }
  const size_t tasks = (n + DENSE_CHANNELS - 1) / DENSE_CHANNELS;
#pragma omp parallel for schedule(static)
  for (size_t task = 0; task < tasks; ++task) {
    const size_t channel = task * DENSE_CHANNELS;
    const size_t rest = n - channel;
    const int channels = int(rest < size_t(DENSE_CHANNELS) ? rest : DENSE_CHANNELS);
    const char* p = static_cast<const char*>(w) + channel * k * type_bytes(TYPE);
    for (size_t r = 0; r < m; r += DENSE_ROWS) {
      const int height = int(m - r < size_t(DENSE_ROWS) ? m - r : DENSE_ROWS);
      float tile[DENSE_ROWS * DENSE_CHANNELS];
      any_dense_tile<TYPE>(height, channels, rows + r * padded, padded, p, k, tile);
      for (int i = 0; i < height; ++i) {
        float* line = tile + i * DENSE_CHANNELS;
        for (int c = 0; c < channels; ++c) {
          if (bias != nullptr) line[c] += bias[channel + c];
        }
        write_floats(line, channels, TYPE,
                     static_cast<char*>(out) + ((r + i) * n + channel) * type_bytes(TYPE));
      }
    }
  }
}

}  // namespace LOWBIT_ISA
