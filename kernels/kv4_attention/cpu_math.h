// SPDX-License-Identifier: Apache-2.0
// The arithmetic of kv4_attention/exponential.py, and products of bytes in two digits.
#pragma once

#include <utility>

#include "../cpu/number.h"

namespace LOWBIT_ISA {

constexpr size_t WIDTH = VECTOR_BYTES / 4;
typedef float FloatLanes __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t IntLanes __attribute__((vector_size(VECTOR_BYTES)));

LOWBIT_INLINE FloatLanes load_lanes(const float* p) {
  FloatLanes x;
  memcpy(&x, p, sizeof x);
  return x;
}
LOWBIT_INLINE IntLanes load_lanes(const int32_t* p) {
  IntLanes x;
  memcpy(&x, p, sizeof x);
  return x;
}
LOWBIT_INLINE void store_lanes(float* p, FloatLanes x) { memcpy(p, &x, sizeof x); }
LOWBIT_INLINE void store_lanes(int32_t* p, IntLanes x) { memcpy(p, &x, sizeof x); }
LOWBIT_INLINE FloatLanes all_lanes(float x) { return FloatLanes{} + x; }
LOWBIT_INLINE IntLanes bits_of(FloatLanes x) { return (IntLanes)x; }
LOWBIT_INLINE FloatLanes floats_of(IntLanes bits) { return (FloatLanes)bits; }
LOWBIT_INLINE FloatLanes convert(IntLanes x) {
  return __builtin_convertvector(x, FloatLanes);
}

// Neither is NaN. The compiler does not use the instruction by itself: it would treat
// NaN and -0 otherwise than a comparison does.
LOWBIT_INLINE FloatLanes larger(FloatLanes a, FloatLanes b) {
#if defined(LOWBIT_AVX512)
  return (FloatLanes)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(LOWBIT_AVX2)
  return (FloatLanes)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
LOWBIT_INLINE float larger(float a, float b) { return a > b ? a : b; }

// The lanes of x, each exchanged with the one H away.
template <size_t H, class T, size_t... L>
LOWBIT_INLINE T exchange(T x, std::index_sequence<L...>) {
  return __builtin_shufflevector(x, x, (L ^ H)...);
}
template <size_t H = WIDTH / 2>
LOWBIT_INLINE float largest(FloatLanes x) {
  if constexpr (H == 0) return x[0];
  else return largest<H / 2>(larger(x, exchange<H>(x, std::make_index_sequence<WIDTH>())));
}
template <size_t H = WIDTH / 2>
LOWBIT_INLINE int32_t sum(IntLanes x) {
  if constexpr (H == 0) return x[0];
  else return sum<H / 2>(x + exchange<H>(x, std::make_index_sequence<WIDTH>()));
}

// Adding it rounds to an integer, ties to even, which the low bits then hold.
constexpr float ROUND = 12582912.0f;
constexpr int32_t ROUND_BITS = 0x4b400000;

constexpr float C5 = 0.00133006054f, C4 = 0.00966969132f, C3 = 0.0555055849f,
                C2 = 0.240222827f, C1 = 0.693147182f;
constexpr float ZERO_EXPONENT = -127.0f, TANH_LIMIT = 10.0f, TWO_LOG2_E = 2.88539004f;

// x = n + r: excess is 2^r - 1; exponent is n where a float has its exponent.
struct Parts {
  FloatLanes excess;
  IntLanes exponent;
  FloatLanes power() const { return floats_of(exponent + (127 << 23)); }
};

LOWBIT_INLINE Parts parts_of(FloatLanes x) {
  const FloatLanes t = x + ROUND;
  const FloatLanes r = x - (t - ROUND);
  FloatLanes excess = r * C5;
  excess = (excess + C4) * r;
  excess = (excess + C3) * r;
  excess = (excess + C2) * r;
  excess = (excess + C1) * r;
  return {excess, bits_of(t) << 23};
}

LOWBIT_INLINE FloatLanes exp2(FloatLanes x) {
  const Parts p = parts_of(larger(x, all_lanes(ZERO_EXPONENT)));
  return (p.excess + 1.0f) * p.power();
}
LOWBIT_INLINE float exp2(float x) { return exp2(all_lanes(x))[0]; }

LOWBIT_INLINE FloatLanes tanh(FloatLanes x) {
  const int32_t sign = INT32_MIN;
  const FloatLanes size = floats_of(bits_of(x) & ~sign);
  const FloatLanes limit = all_lanes(TANH_LIMIT);
  const Parts p = parts_of((size < limit ? size : limit) * TWO_LOG2_E);
  const FloatLanes power = p.power();
  const FloatLanes f = p.excess * power + (power - 1.0f);
  return floats_of(bits_of(f / (f + 2.0f)) | (bits_of(x) & sign));
}

// sums[l] += sum over i < 4 of fields[4 l + i] * bytes.byte[i]: 4-bit fields times
// signed bytes (queries) or unsigned ones (weights).
template <bool QUERIES>
LOWBIT_INLINE Sums dot_digit(Sums sums, Bytes fields, int32_t bytes) {
  if constexpr (QUERIES) {
    return dot<4>(sums, fields, bytes);
  } else {
#if defined(LOWBIT_AVX512)
    return _mm512_dpbusd_epi32(sums, _mm512_set1_epi32(bytes), fields);
#elif defined(LOWBIT_AVX2)
    const __m256i ones = _mm256_set1_epi16(1), wide = _mm256_set1_epi32(bytes);
    const __m256i low = _mm256_maddubs_epi16(wide, fields.low);
    const __m256i high = _mm256_maddubs_epi16(wide, fields.high);
    return {_mm256_add_epi32(sums.low, _mm256_madd_epi16(low, ones)),
            _mm256_add_epi32(sums.high, _mm256_madd_epi16(high, ones))};
#else
    for (int l = 0; l < 16; ++l) {
      for (int i = 0; i < 4; ++i) {
        sums.at[l] += fields.at[4 * l + i] * int(uint32_t(bytes) >> (8 * i) & 255);
      }
    }
    return sums;
#endif
  }
}

// 256 * high + low, plus start or what is at p.
template <bool ADD>
LOWBIT_INLINE void store_number(int32_t* p, Sums high, Sums low, int32_t start) {
#if defined(LOWBIT_AVX512)
  const __m512i more = ADD ? _mm512_loadu_si512(p) : _mm512_set1_epi32(start);
  const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
  store_sums(p, _mm512_add_epi32(sum, more));
#elif defined(LOWBIT_AVX2)
  const __m256i wide = _mm256_set1_epi32(start);
  const __m256i a = _mm256_add_epi32(_mm256_slli_epi32(high.low, 8), low.low);
  const __m256i b = _mm256_add_epi32(_mm256_slli_epi32(high.high, 8), low.high);
  store_half(p, _mm256_add_epi32(a, ADD ? load_half(p) : wide));
  store_half(p + 8, _mm256_add_epi32(b, ADD ? load_half(p + 8) : wide));
#else
  for (int l = 0; l < 16; ++l) {
    p[l] = high.at[l] * 256 + low.at[l] + (ADD ? p[l] : start);
  }
#endif
}

// Numbers of two digits times 4-bit fields:
// out[r][16 b + l] = start[r] + sum over steps s and i < 4 of
//     (256 * digits[r][0][4 s + i] + digits[r][1][4 s + i]) * fields(b, s)[4 l + i]
//   digits   [ROWS][2][COLUMNS]: queries, signed, or weights, unsigned
//   fields   64 bytes at fields + b * block_stride + s * step_stride
//   start    for queries; products of weights are added to what is in out
//   out      rows of out_stride int32
template <bool QUERIES, size_t COLUMNS, int ROWS, int BLOCKS>
void multiply_tile(const int8_t* digits, const uint8_t* fields, size_t block_stride,
                   size_t step_stride, size_t steps, const int32_t* start,
                   int32_t* out, size_t out_stride) {
  Sums high[ROWS][BLOCKS], low[ROWS][BLOCKS];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS * BLOCKS; ++i) {
    high[i / BLOCKS][i % BLOCKS] = low[i / BLOCKS][i % BLOCKS] = zero_sums();
  }
  for (size_t s = 0; s < steps; ++s) {
    Bytes field[BLOCKS];
#pragma GCC unroll 8
    for (int b = 0; b < BLOCKS; ++b) field[b] = load_bytes(fields + b * block_stride);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const int8_t* row = digits + 2 * r * COLUMNS;
      const int32_t h = load_int32(row), l = load_int32(row + COLUMNS);
#pragma GCC unroll 8
      for (int b = 0; b < BLOCKS; ++b) {
        high[r][b] = dot_digit<QUERIES>(high[r][b], field[b], h);
        low[r][b] = dot_digit<QUERIES>(low[r][b], field[b], l);
      }
    }
    fields += step_stride;
    digits += 4;
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
    const int32_t first = QUERIES ? start[r] : 0;
#pragma GCC unroll 8
    for (int b = 0; b < BLOCKS; ++b) {
      store_number<!QUERIES>(out + r * out_stride + 16 * b, high[r][b], low[r][b],
                             first);
    }
  }
}

// Rows and blocks of one register tile, by the number of rows that are left.
#if defined(LOWBIT_AVX512)
constexpr int DIGIT_ROWS = 4;
constexpr int digit_blocks(int rows) { return rows == 1 ? 8 : rows == 2 ? 4 : 2; }
#else
constexpr int DIGIT_ROWS = 2;
constexpr int digit_blocks(int rows) { return rows == 1 ? 2 : 1; }
#endif

template <bool QUERIES, size_t COLUMNS, int ROWS, int BLOCKS = digit_blocks(ROWS)>
LOWBIT_INLINE void multiply_rows(const int8_t* digits, const uint8_t* fields,
                                 size_t block_stride, size_t step_stride, size_t steps,
                                 size_t blocks, const int32_t* start, int32_t* out,
                                 size_t out_stride) {
  for (; blocks >= BLOCKS; blocks -= BLOCKS) {
    multiply_tile<QUERIES, COLUMNS, ROWS, BLOCKS>(
        digits, fields, block_stride, step_stride, steps, start, out, out_stride);
    fields += BLOCKS * block_stride;
    out += 16 * BLOCKS;
  }
  if constexpr (BLOCKS > 1) {
    multiply_rows<QUERIES, COLUMNS, ROWS, BLOCKS / 2>(digits, fields, block_stride,
                                                     step_stride, steps, blocks, start,
                                                     out, out_stride);
  }
}

// As multiply_tile, for any number of rows and blocks.
template <bool QUERIES, size_t COLUMNS, int ROWS = DIGIT_ROWS>
LOWBIT_INLINE void multiply_digits(const int8_t* digits, const uint8_t* fields,
                                   size_t block_stride, size_t step_stride,
                                   size_t steps, size_t rows, size_t blocks,
                                   const int32_t* start, int32_t* out,
                                   size_t out_stride) {
  for (; rows >= ROWS; rows -= ROWS) {
    multiply_rows<QUERIES, COLUMNS, ROWS>(digits, fields, block_stride, step_stride,
                                         steps, blocks, start, out, out_stride);
    digits += 2 * ROWS * COLUMNS;
    if constexpr (QUERIES) start += ROWS;
    out += ROWS * out_stride;
  }
  if constexpr (ROWS > 1) {
    multiply_digits<QUERIES, COLUMNS, ROWS - 1>(digits, fields, block_stride,
                                               step_stride, steps, rows, blocks, start,
                                               out, out_stride);
  }
}

}  // namespace LOWBIT_ISA
