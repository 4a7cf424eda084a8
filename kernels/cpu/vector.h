// SPDX-License-Identifier: Apache-2.0
// The few vector operations that compilers do not find by themselves, per ISA.
//
// A Bytes holds 64 unsigned bytes, a Sums 16 int32, a Floats 16 floats: byte 4 l + i
// belongs to lane l.
// Everything else in these kernels is plain loops that vectorize.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(LOWBIT_AVX512) || defined(LOWBIT_AVX2)
#include <immintrin.h>
#endif

#define LOWBIT_INLINE inline __attribute__((always_inline))

namespace LOWBIT_ISA {

// Rows and 16-channel blocks of one register tile.
#if defined(LOWBIT_AVX512)
constexpr int TILE_ROWS = 6, TILE_BLOCKS = 4, VECTOR_BYTES = 64;
#elif defined(LOWBIT_AVX2)
constexpr int TILE_ROWS = 3, TILE_BLOCKS = 2, VECTOR_BYTES = 32;
#else
constexpr int TILE_ROWS = 3, TILE_BLOCKS = 2, VECTOR_BYTES = 16;
#endif

LOWBIT_INLINE int32_t load_int32(const int8_t* p) {
  int32_t value;
  memcpy(&value, p, 4);
  return value;
}

#if defined(LOWBIT_AVX512)

using Bytes = __m512i;
using Sums = __m512i;

LOWBIT_INLINE Bytes load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
LOWBIT_INLINE void store_bytes(uint8_t* p, Bytes x) { _mm512_storeu_si512(p, x); }
LOWBIT_INLINE Sums zero_sums() { return _mm512_setzero_si512(); }
LOWBIT_INLINE Sums add_sums(Sums a, Sums b) { return _mm512_add_epi32(a, b); }
LOWBIT_INLINE void store_sums(int32_t* p, Sums x) { _mm512_storeu_si512(p, x); }

template <int MASK>
LOWBIT_INLINE Bytes mask_bytes(Bytes x) {
  return _mm512_and_si512(x, _mm512_set1_epi8(MASK));
}
LOWBIT_INLINE Bytes or_bytes(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }

// Shifts move bits between the bytes of a pair: mask afterwards.
template <int COUNT>
LOWBIT_INLINE Bytes shift_right(Bytes x) {
  return _mm512_srli_epi16(x, COUNT);
}
template <int COUNT>
LOWBIT_INLINE Bytes shift_left(Bytes x) {
  return _mm512_slli_epi16(x, COUNT);
}

// sums[l] += sum over i < 4 of w[4 l + i] * a.byte[i], w unsigned and a signed.
// FIELD bounds w: below 2^FIELD.
template <int FIELD>
LOWBIT_INLINE Sums dot(Sums sums, Bytes w, int32_t a) {
  return _mm512_dpbusd_epi32(sums, w, _mm512_set1_epi32(a));
}

using Floats = __m512;

LOWBIT_INLINE Floats zero_floats() { return _mm512_setzero_ps(); }
LOWBIT_INLINE Floats load_floats(const float* p) { return _mm512_loadu_ps(p); }
LOWBIT_INLINE void store_floats(float* p, Floats x) { _mm512_storeu_ps(p, x); }
LOWBIT_INLINE Floats load_bfloats(const uint16_t* p) {
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
LOWBIT_INLINE Floats load_halves(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
// a * b + c, rounded once where the machine can.
LOWBIT_INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
  return _mm512_fmadd_ps(a, b, c);
}

#elif defined(LOWBIT_AVX2)

struct Bytes {
  __m256i low, high;
};
using Sums = Bytes;

LOWBIT_INLINE __m256i load_half(const void* p) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
}
LOWBIT_INLINE void store_half(void* p, __m256i x) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), x);
}
LOWBIT_INLINE Bytes load_bytes(const uint8_t* p) {
  return {load_half(p), load_half(p + 32)};
}
LOWBIT_INLINE void store_bytes(uint8_t* p, Bytes x) {
  store_half(p, x.low);
  store_half(p + 32, x.high);
}
LOWBIT_INLINE Sums zero_sums() {
  return {_mm256_setzero_si256(), _mm256_setzero_si256()};
}
LOWBIT_INLINE Sums add_sums(Sums a, Sums b) {
  return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)};
}
LOWBIT_INLINE void store_sums(int32_t* p, Sums x) {
  store_half(p, x.low);
  store_half(p + 8, x.high);
}

template <int MASK>
LOWBIT_INLINE Bytes mask_bytes(Bytes x) {
  const __m256i mask = _mm256_set1_epi8(MASK);
  return {_mm256_and_si256(x.low, mask), _mm256_and_si256(x.high, mask)};
}
LOWBIT_INLINE Bytes or_bytes(Bytes a, Bytes b) {
  return {_mm256_or_si256(a.low, b.low), _mm256_or_si256(a.high, b.high)};
}
template <int COUNT>
LOWBIT_INLINE Bytes shift_right(Bytes x) {
  return {_mm256_srli_epi16(x.low, COUNT), _mm256_srli_epi16(x.high, COUNT)};
}
template <int COUNT>
LOWBIT_INLINE Bytes shift_left(Bytes x) {
  return {_mm256_slli_epi16(x.low, COUNT), _mm256_slli_epi16(x.high, COUNT)};
}

// vpmaddubsw saturates at 16 bits: two products of 8-bit fields would not fit, so
// those go as two nibbles.
template <int FIELD>
LOWBIT_INLINE __m256i dot_half(__m256i sums, __m256i w, __m256i a) {
  const __m256i ones = _mm256_set1_epi16(1);
  if constexpr (FIELD < 8) {
    const __m256i pairs = _mm256_maddubs_epi16(w, a);
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, ones));
  } else {
    const __m256i nibble = _mm256_set1_epi8(15);
    const __m256i low = _mm256_and_si256(w, nibble);
    const __m256i high = _mm256_and_si256(_mm256_srli_epi16(w, 4), nibble);
    const __m256i l = _mm256_madd_epi16(_mm256_maddubs_epi16(low, a), ones);
    const __m256i h =
        _mm256_madd_epi16(_mm256_maddubs_epi16(high, a), _mm256_set1_epi16(16));
    return _mm256_add_epi32(sums, _mm256_add_epi32(l, h));
  }
}
template <int FIELD>
LOWBIT_INLINE Sums dot(Sums sums, Bytes w, int32_t a) {
  const __m256i wide = _mm256_set1_epi32(a);
  return {dot_half<FIELD>(sums.low, w.low, wide),
          dot_half<FIELD>(sums.high, w.high, wide)};
}

struct Floats {
  __m256 low, high;
};

LOWBIT_INLINE Floats zero_floats() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
LOWBIT_INLINE Floats load_floats(const float* p) {
  return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
}
LOWBIT_INLINE void store_floats(float* p, Floats x) {
  _mm256_storeu_ps(p, x.low);
  _mm256_storeu_ps(p + 8, x.high);
}
LOWBIT_INLINE __m128i load_eight(const uint16_t* p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}
LOWBIT_INLINE __m256 widen_bfloats(__m128i x) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}
LOWBIT_INLINE Floats load_bfloats(const uint16_t* p) {
  return {widen_bfloats(load_eight(p)), widen_bfloats(load_eight(p + 8))};
}
LOWBIT_INLINE Floats load_halves(const uint16_t* p) {
  return {_mm256_cvtph_ps(load_eight(p)), _mm256_cvtph_ps(load_eight(p + 8))};
}
LOWBIT_INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}

#else

struct Bytes {
  uint8_t at[64];
};
struct Sums {
  int32_t at[16];
};

LOWBIT_INLINE Bytes load_bytes(const uint8_t* p) {
  Bytes x;
  memcpy(x.at, p, 64);
  return x;
}
LOWBIT_INLINE void store_bytes(uint8_t* p, Bytes x) { memcpy(p, x.at, 64); }
LOWBIT_INLINE Sums zero_sums() { return {}; }
LOWBIT_INLINE Sums add_sums(Sums a, Sums b) {
  for (int l = 0; l < 16; ++l) a.at[l] = int32_t(uint32_t(a.at[l]) + uint32_t(b.at[l]));
  return a;
}
LOWBIT_INLINE void store_sums(int32_t* p, Sums x) { memcpy(p, x.at, 64); }

template <int MASK>
LOWBIT_INLINE Bytes mask_bytes(Bytes x) {
  for (int i = 0; i < 64; ++i) x.at[i] &= MASK;
  return x;
}
LOWBIT_INLINE Bytes or_bytes(Bytes a, Bytes b) {
  for (int i = 0; i < 64; ++i) a.at[i] |= b.at[i];
  return a;
}
template <int COUNT>
LOWBIT_INLINE Bytes shift_right(Bytes x) {
  for (int i = 0; i < 64; ++i) x.at[i] = uint8_t(x.at[i] >> COUNT);
  return x;
}
template <int COUNT>
LOWBIT_INLINE Bytes shift_left(Bytes x) {
  for (int i = 0; i < 64; ++i) x.at[i] = uint8_t(x.at[i] << COUNT);
  return x;
}
template <int FIELD>
LOWBIT_INLINE Sums dot(Sums sums, Bytes w, int32_t a) {
  for (int l = 0; l < 16; ++l) {
    int32_t sum = 0;
    for (int i = 0; i < 4; ++i) {
      // Bytes in memory order, as the vector versions take them.
      sum += w.at[4 * l + i] * int8_t(uint32_t(a) >> (8 * i));
    }
    sums.at[l] = int32_t(uint32_t(sums.at[l]) + uint32_t(sum));
  }
  return sums;
}

struct Floats {
  float at[16];
};

LOWBIT_INLINE Floats zero_floats() { return {}; }
LOWBIT_INLINE Floats load_floats(const float* p) {
  Floats x;
  memcpy(x.at, p, 64);
  return x;
}
LOWBIT_INLINE void store_floats(float* p, Floats x) { memcpy(p, x.at, 64); }
LOWBIT_INLINE Floats load_bfloats(const uint16_t* p) {
  uint32_t wide[16];
  for (int l = 0; l < 16; ++l) wide[l] = uint32_t(p[l]) << 16;
  Floats x;
  memcpy(x.at, wide, 64);
  return x;
}
LOWBIT_INLINE Floats load_halves(const uint16_t* p) {
  _Float16 narrow[16];
  memcpy(narrow, p, 32);
  Floats x;
  for (int l = 0; l < 16; ++l) x.at[l] = float(narrow[l]);
  return x;
}
LOWBIT_INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
  for (int l = 0; l < 16; ++l) c.at[l] += a.at[l] * b.at[l];
  return c;
}

#endif

// Left by COUNT, or right when it is negative.
template <int COUNT>
LOWBIT_INLINE Bytes shift(Bytes x) {
  if constexpr (COUNT >= 0) {
    return shift_left<COUNT>(x);
  } else {
    return shift_right<-COUNT>(x);
  }
}

}  // namespace LOWBIT_ISA
