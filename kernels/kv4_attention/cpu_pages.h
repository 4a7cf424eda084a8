// SPDX-License-Identifier: Apache-2.0
// Packed pages unpacked to one code a byte, in the order of the dot products.
//
// K: [16 tokens] blocks of [head_dim / 4][16 tokens][4 elements].
// V: [4 tokens] steps of [blocks][16 elements][4 tokens]. A block covers 16 elements of
// one half of the head; their order is that in which shuffles leave them, and
// value_elements() tells it.
#pragma once

#include "../kv4_store/cpu.h"

namespace LOWBIT_ISA {

typedef uint8_t Quarter __attribute__((vector_size(16)));

LOWBIT_INLINE Quarter load_quarter(const uint8_t* p) {
  Quarter x;
  memcpy(&x, p, 16);
  return x;
}

// Columns of 16 bytes of a row of `half` bytes. The last overlaps the one before when
// 16 does not divide half.
LOWBIT_INLINE size_t columns_of(size_t half) { return (half + 15) / 16; }
LOWBIT_INLINE size_t column_start(size_t half, size_t column) {
  return 16 * column + 16 <= half ? 16 * column : half - 16;
}

// Blocks of V, and the lanes they have.
LOWBIT_INLINE size_t value_blocks(size_t head_dim) {
  return 2 * columns_of(head_dim / 2);
}
constexpr size_t MAX_VALUES = MAX_HEAD_DIM;

#if defined(LOWBIT_AVX512)

// Lane l of the result is at p + l * stride.
LOWBIT_INLINE __m512i load_quarters(const uint8_t* p, size_t stride) {
  const auto at = [&](size_t l) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + l * stride));
  };
  __m512i x = _mm512_castsi128_si512(at(0));
  x = _mm512_inserti32x4(x, at(1), 1);
  x = _mm512_inserti32x4(x, at(2), 2);
  return _mm512_inserti32x4(x, at(3), 3);
}

// Stores the low fields of packed bytes at out and the high ones at out + distance.
LOWBIT_INLINE void store_fields(Bytes packed, uint8_t* out, size_t distance) {
  store_bytes(out, mask_bytes<15>(packed));
  store_bytes(out + distance, mask_bytes<15>(shift_right<4>(packed)));
}

LOWBIT_INLINE void unpack_key_column(const uint8_t* p, size_t half, uint8_t* out) {
  // Lane l of row i is token 4 l + i: a transpose inside lanes leaves them in order.
  __m512i row[4];
  for (int i = 0; i < 4; ++i) row[i] = load_quarters(p + i * half, 4 * half);
  const __m512i a = _mm512_unpacklo_epi32(row[0], row[1]);
  const __m512i b = _mm512_unpackhi_epi32(row[0], row[1]);
  const __m512i c = _mm512_unpacklo_epi32(row[2], row[3]);
  const __m512i d = _mm512_unpackhi_epi32(row[2], row[3]);
  store_fields(_mm512_unpacklo_epi64(a, c), out, 16 * half);
  store_fields(_mm512_unpackhi_epi64(a, c), out + 64, 16 * half);
  store_fields(_mm512_unpacklo_epi64(b, d), out + 128, 16 * half);
  store_fields(_mm512_unpackhi_epi64(b, d), out + 192, 16 * half);
}

// Byte k of lane l of token[i] becomes byte 4 k' + i: elements k' = 4 q + 0..3 of each
// lane in result q.
LOWBIT_INLINE void interleave(const __m512i (&token)[4], __m512i (&out)[4]) {
  const __m512i a = _mm512_unpacklo_epi8(token[0], token[1]);
  const __m512i b = _mm512_unpacklo_epi8(token[2], token[3]);
  const __m512i c = _mm512_unpackhi_epi8(token[0], token[1]);
  const __m512i d = _mm512_unpackhi_epi8(token[2], token[3]);
  out[0] = _mm512_unpacklo_epi16(a, b);
  out[1] = _mm512_unpackhi_epi16(a, b);
  out[2] = _mm512_unpacklo_epi16(c, d);
  out[3] = _mm512_unpackhi_epi16(c, d);
}

LOWBIT_INLINE __m512i load_pair(const uint8_t* low, const uint8_t* high) {
  const __m512i x = _mm512_castsi256_si512(
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(low)));
  return _mm512_inserti64x4(
      x, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(high)), 1);
}

// Four tokens of 32 bytes.
LOWBIT_INLINE void unpack_values_of_32(const uint8_t* p, uint8_t* out) {
  const __m512i even = load_pair(p, p + 64), odd = load_pair(p + 32, p + 96);
  const __m512i low = _mm512_unpacklo_epi8(even, odd);
  const __m512i high = _mm512_unpackhi_epi8(even, odd);
  // Tokens 0 and 1 are in the lower half of each, 2 and 3 in the upper.
  const __m512i a = _mm512_shuffle_i64x2(low, high, 0x44);
  const __m512i b = _mm512_shuffle_i64x2(low, high, 0xee);
  store_fields(_mm512_unpacklo_epi16(a, b), out, 128);
  store_fields(_mm512_unpackhi_epi16(a, b), out + 64, 128);
}

// Four tokens of a multiple of 64 bytes.
LOWBIT_INLINE void unpack_values_of_64(const uint8_t* p, size_t half, uint8_t* out) {
  for (size_t start = 0; start < half; start += 64) {
    __m512i token[4], columns[4];
    for (int i = 0; i < 4; ++i) token[i] = load_bytes(p + i * half + start);
    interleave(token, columns);
    for (int q = 0; q < 4; ++q) {
      store_fields(columns[q], out + 4 * start + 64 * q, 4 * half);
    }
  }
}

// One column of 16 tokens; steps of V are step_stride apart.
LOWBIT_INLINE void unpack_value_column(const uint8_t* p, size_t half, uint8_t* out,
                                       size_t distance, size_t step_stride) {
  __m512i token[4], y[4];
  for (int i = 0; i < 4; ++i) token[i] = load_quarters(p + i * half, 4 * half);
  interleave(token, y);
  // Lane l of each holds tokens 4 l + 0..3.
  const __m512i a = _mm512_shuffle_i32x4(y[0], y[1], 0x44);
  const __m512i b = _mm512_shuffle_i32x4(y[2], y[3], 0x44);
  const __m512i c = _mm512_shuffle_i32x4(y[0], y[1], 0xee);
  const __m512i d = _mm512_shuffle_i32x4(y[2], y[3], 0xee);
  store_fields(_mm512_shuffle_i32x4(a, b, 0x88), out, distance);
  store_fields(_mm512_shuffle_i32x4(a, b, 0xdd), out + step_stride, distance);
  store_fields(_mm512_shuffle_i32x4(c, d, 0x88), out + 2 * step_stride, distance);
  store_fields(_mm512_shuffle_i32x4(c, d, 0xdd), out + 3 * step_stride, distance);
}

// The first of each four consecutive elements in the order of the blocks' lanes.
LOWBIT_INLINE void value_elements(size_t head_dim, uint16_t* first) {
  const size_t half = head_dim / 2, blocks = value_blocks(head_dim);
  for (size_t i = 0; i < 4 * blocks; ++i) {
    const size_t side = i / (2 * blocks), block = i / 4 % (blocks / 2), lane = i % 4;
    size_t at = column_start(half, block) + 4 * lane;
    if (half == 32) at = 16 * (lane % 2) + 8 * (lane / 2) + 4 * block;
    if (half % 64 == 0) at = 64 * (block / 4) + 16 * lane + 4 * (block % 4);
    first[i] = uint16_t(side * half + at);
  }
}

LOWBIT_INLINE void unpack_values(const uint8_t* p, size_t half, uint8_t* out) {
  const size_t columns = columns_of(half), step_stride = 128 * columns;
  if (half == 32) {
    for (int i = 0; i < 4; ++i) unpack_values_of_32(p + 128 * i, out + step_stride * i);
  } else if (half % 64 == 0) {
    for (size_t i = 0; i < 4; ++i) {
      unpack_values_of_64(p + 4 * half * i, half, out + step_stride * i);
    }
  } else {
    for (size_t c = 0; c < columns; ++c) {
      unpack_value_column(p + column_start(half, c), half, out + 64 * c, 64 * columns,
                          step_stride);
    }
  }
}

#else

LOWBIT_INLINE void store_quarter_fields(Quarter packed, uint8_t* out, size_t distance) {
  const Quarter low = packed & 15, high = packed >> 4;
  memcpy(out, &low, 16);
  memcpy(out + distance, &high, 16);
}

LOWBIT_INLINE Quarter words_low(Quarter a, Quarter b) {
  return __builtin_shufflevector(a, b, 0, 1, 16, 17, 2, 3, 18, 19, 4, 5, 20, 21, 6, 7,
                                 22, 23);
}
LOWBIT_INLINE Quarter words_high(Quarter a, Quarter b) {
  return __builtin_shufflevector(a, b, 8, 9, 24, 25, 10, 11, 26, 27, 12, 13, 28, 29, 14,
                                 15, 30, 31);
}
LOWBIT_INLINE Quarter bytes_low(Quarter a, Quarter b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22,
                                 7, 23);
}
LOWBIT_INLINE Quarter bytes_high(Quarter a, Quarter b) {
  return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14,
                                 30, 15, 31);
}
LOWBIT_INLINE Quarter dwords_low(Quarter a, Quarter b) {
  return __builtin_shufflevector(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21,
                                 22, 23);
}
LOWBIT_INLINE Quarter dwords_high(Quarter a, Quarter b) {
  return __builtin_shufflevector(a, b, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28,
                                 29, 30, 31);
}
LOWBIT_INLINE Quarter qwords_low(Quarter a, Quarter b) {
  return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21,
                                 22, 23);
}
LOWBIT_INLINE Quarter qwords_high(Quarter a, Quarter b) {
  return __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28,
                                 29, 30, 31);
}

LOWBIT_INLINE void unpack_key_column(const uint8_t* p, size_t half, uint8_t* out) {
  for (size_t l = 0; l < 4; ++l) {
    Quarter row[4];
    for (size_t i = 0; i < 4; ++i) row[i] = load_quarter(p + (4 * l + i) * half);
    const Quarter a = dwords_low(row[0], row[1]), b = dwords_high(row[0], row[1]);
    const Quarter c = dwords_low(row[2], row[3]), d = dwords_high(row[2], row[3]);
    uint8_t* to = out + 16 * l;
    store_quarter_fields(qwords_low(a, c), to, 16 * half);
    store_quarter_fields(qwords_high(a, c), to + 64, 16 * half);
    store_quarter_fields(qwords_low(b, d), to + 128, 16 * half);
    store_quarter_fields(qwords_high(b, d), to + 192, 16 * half);
  }
}

LOWBIT_INLINE void unpack_values(const uint8_t* p, size_t half, uint8_t* out) {
  const size_t columns = columns_of(half), distance = 64 * columns;
  for (size_t step = 0; step < 4; ++step) {
    for (size_t c = 0; c < columns; ++c) {
      const uint8_t* from = p + 4 * step * half + column_start(half, c);
      Quarter token[4];
      for (size_t i = 0; i < 4; ++i) token[i] = load_quarter(from + i * half);
      const Quarter a = bytes_low(token[0], token[1]);
      const Quarter b = bytes_low(token[2], token[3]);
      const Quarter e = bytes_high(token[0], token[1]);
      const Quarter f = bytes_high(token[2], token[3]);
      uint8_t* to = out + 2 * distance * step + 64 * c;
      store_quarter_fields(words_low(a, b), to, distance);
      store_quarter_fields(words_high(a, b), to + 16, distance);
      store_quarter_fields(words_low(e, f), to + 32, distance);
      store_quarter_fields(words_high(e, f), to + 48, distance);
    }
  }
}

LOWBIT_INLINE void value_elements(size_t head_dim, uint16_t* first) {
  const size_t half = head_dim / 2, blocks = value_blocks(head_dim);
  for (size_t i = 0; i < 4 * blocks; ++i) {
    const size_t side = i / (2 * blocks), block = i / 4 % (blocks / 2);
    first[i] = uint16_t(side * half + column_start(half, block) + 4 * (i % 4));
  }
}

#endif

// 16 tokens of half bytes each.
LOWBIT_INLINE void unpack_keys(const uint8_t* p, size_t half, uint8_t* out) {
  for (size_t c = 0; c < columns_of(half); ++c) {
    const size_t start = column_start(half, c);
    unpack_key_column(p + start, half, out + 16 * start);
  }
}

}  // namespace LOWBIT_ISA
