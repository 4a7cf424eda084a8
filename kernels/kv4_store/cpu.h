// SPDX-License-Identifier: Apache-2.0
// Writing K and V into packed pages, byte for byte as kv4_store/reference.py.
#pragma once

#include "../cpu/abi.h"
#include "../hadamard_quantize/cpu.h"

namespace LOWBIT_ISA {

constexpr int MAX_HEAD_DIM = 256;
constexpr float KV_SCALE_MIN = 0x1p-24f, KV_SCALE_MAX = 65504.0f;
constexpr float KV_MAX_ZERO = 1024.0f, KV_ZERO_STEPS = 64.0f;
constexpr int KV_LEVELS = 15;

// The first byte of each plane of a page; see kv4_store/layout.py.
struct PagePlanes {
  size_t k_codes, v_codes, k_scale, k_zero, v_scale, v_zero;
};

LOWBIT_INLINE PagePlanes page_planes(size_t block_size, size_t head_dim) {
  const size_t codes = block_size * head_dim / 2, halves = block_size * 2;
  const size_t k_scale = 2 * codes;
  return {0,
          codes,
          k_scale,
          k_scale + halves,
          k_scale + 2 * halves,
          k_scale + 3 * halves};
}

struct KVParameters {
  _Float16 scale, zero;
};

LOWBIT_INLINE float clamp(float x, float low, float high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}

// kv_parameters of grid.py for a row with this range.
LOWBIT_INLINE KVParameters kv_parameters(Range range) {
  const float peak = range.peak();
  const float spread = (range.high * 0.5f - range.low * 0.5f) / (KV_LEVELS * 0.5f);
  const float least = peak / KV_MAX_ZERO;
  float scale = spread > least ? spread : least;
  if (range.low == range.high) scale = peak;
  if (peak < TINY) scale = 1.0f;
  if (!range.finite || !is_finite(scale)) {
    return {_Float16(NOT_A_NUMBER), _Float16(NOT_A_NUMBER)};
  }
  const _Float16 stored = _Float16(clamp(scale, KV_SCALE_MIN, KV_SCALE_MAX));
  if (peak < TINY) return {stored, _Float16(0.0f)};
  const float zero = clamp(-range.low * (1.0f / float(stored)), -KV_MAX_ZERO, KV_MAX_ZERO);
  return {stored, _Float16(round_even(zero * KV_ZERO_STEPS) / KV_ZERO_STEPS)};
}

// kv_encode and pack_nibbles of one row.
LOWBIT_INLINE void kv_encode(const float* x, size_t n, KVParameters p, uint8_t* out) {
  const float scale = float(p.scale), zero = float(p.zero);
  if (!(scale == scale)) {
    memset(out, 0, n / 2);
    return;
  }
  const float inverse = 1.0f / scale;
  // Clamped first, which gives the same codes: the bounds are integers.
  const auto code = [&](float v) {
    return uint8_t(int32_t(round_even(clamp(v * inverse + zero, 0.0f, KV_LEVELS))));
  };
  const float* high = x + n / 2;
  for (size_t i = 0; i < n / 2; ++i) out[i] = uint8_t(code(x[i]) | code(high[i]) << 4);
}

// Rotates, quantizes and writes one head of K or V; codes, scale and zero are the
// places of its token in the page.
LOWBIT_INLINE void store_head(const Transform* t, const void* x, int type, size_t n,
                              double* work, uint8_t* codes, uint8_t* scale,
                              uint8_t* zero) {
  float row[MAX_HEAD_DIM];
  read_floats(x, type, n, row);
  if (t != nullptr) transform_row(*t, row, n, work, row);
  const KVParameters p = kv_parameters(range_of(row, n));
  memcpy(scale, &p.scale, 2);
  memcpy(zero, &p.zero, 2);
  kv_encode(row, n, p, codes);
}

// Returns whether every slot exists; those that do are written in any case.
inline bool kv4_store(const LowbitStore& s, const Transform* t) {
  const PagePlanes at = page_planes(size_t(s.block_size), size_t(s.head_dim));
  const size_t bytes = type_bytes(s.type), half = size_t(s.head_dim) / 2;
  const int64_t rows = s.tokens * s.num_kv_heads;
  bool valid = true;
#pragma omp parallel if (rows > 64)
  {
    static thread_local Scratch scratch;
    double* work = scratch.take<double>(t == nullptr ? 1 : transform_scratch(*t));
#pragma omp for schedule(static) reduction(&& : valid)
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t token = row / s.num_kv_heads, head = row % s.num_kv_heads;
      const int64_t slot = s.slot_mapping[token];
      if (slot < 0) continue;
      if (slot >= s.num_blocks * s.block_size) {
        valid = false;
        continue;
      }
      const size_t offset = size_t(slot % s.block_size);
      uint8_t* page =
          s.cache + slot / s.block_size * s.block_stride + head * s.head_stride;
      const auto source = [&](const void* x, const int64_t* strides) {
        return static_cast<const char*>(x) +
               (token * strides[0] + head * strides[1]) * int64_t(bytes);
      };
      store_head(t, source(s.key, s.key_strides), s.type, 2 * half, work,
                 page + at.k_codes + offset * half, page + at.k_scale + 2 * offset,
                 page + at.k_zero + 2 * offset);
      store_head(nullptr, source(s.value, s.value_strides), s.type, 2 * half, work,
                 page + at.v_codes + offset * half, page + at.v_scale + 2 * offset,
                 page + at.v_zero + 2 * offset);
    }
  }
  return valid;
}

}  // namespace LOWBIT_ISA
