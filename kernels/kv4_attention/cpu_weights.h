// SPDX-License-Identifier: Apache-2.0
// Steps 2 and 3 of kv4_attention/generic.py between the two products of bytes: scores,
// powers, and the codes of the weights of one split.
#pragma once

#include "cpu_math.h"
#include "cpu_pages.h"

namespace LOWBIT_ISA {

constexpr size_t MAX_ROWS = 32;    // of a task
constexpr size_t MAX_SPLIT = 512;  // split_size() is less for pages of at most SPLIT
constexpr size_t CHUNK = 64;       // tokens of which codes are packed together
constexpr float WEIGHT_MAX = 65535.0f, TOTAL_UNIT = 0x1p-22f;
constexpr int32_t CENTRE = 8;
constexpr float MINUS_INFINITY = -__builtin_inff();

// What is known of a row after some splits, or of one split.
struct State {
  float peak, total;
};

// Scales and zeros of the tokens of a split, a number of whole CHUNKs. k_zero and
// v_steps are less CENTRE. All are 0 for tokens that no row sees and for bad ones,
// which make a row NaN.
struct Tokens {
  alignas(64) float k_scale[MAX_SPLIT];
  float k_zero[MAX_SPLIT], v_scale[MAX_SPLIT];
  float v_zero[MAX_SPLIT];     // as it is read
  int32_t v_steps[MAX_SPLIT];  // 64 times the zero
  int16_t v_words[MAX_SPLIT];  // the same, in the order of encode_row_words()
  bool words_fit;
  bool any_bad;
  bool bad[MAX_SPLIT];
};

// The bits of halves are looked at as integers.
constexpr size_t HALVES = VECTOR_BYTES < 32 ? 8 : 16;
typedef uint16_t Halves __attribute__((vector_size(2 * HALVES)));
constexpr uint16_t HALF_INFINITY = 0x7c00, HALF_1024 = 0x6400, HALF_500 = 0x5fd0;

LOWBIT_INLINE Halves load_bits(const uint8_t* p) {
  Halves x;
  memcpy(&x, p, sizeof x);
  return x;
}
// Bit 15 is set where x is not a positive finite number.
LOWBIT_INLINE Halves bad_scale(Halves x) {
  x -= 1;
  return x | (x + uint16_t(0x8000 - (HALF_INFINITY - 1)));
}
// Bit 15 is set where x is larger in magnitude than a bound, or NaN.
LOWBIT_INLINE Halves beyond(Halves x, uint16_t bound) {
  return (x & 0x7fff) + uint16_t(0x7fff - bound);
}
LOWBIT_INLINE bool any_marked(Halves x) {
  uint64_t words[HALVES / 4], all = 0;
  memcpy(words, &x, sizeof x);
  for (const uint64_t word : words) all |= word;
  return (all & 0x8000800080008000) != 0;
}

// What has been seen of the halves of some tokens.
struct Marks {
  Halves bad, wide;
};

// 16 tokens, of which page is the first's place in the plane of K's scales.
LOWBIT_INLINE void read_parameters(const uint8_t* page, const PagePlanes& at,
                                   Tokens& p, size_t token, Marks& marks) {
  const uint8_t* const k_scale = page;
  const uint8_t* const k_zero = page + (at.k_zero - at.k_scale);
  const uint8_t* const v_scale = page + (at.v_scale - at.k_scale);
  const uint8_t* const v_zero = page + (at.v_zero - at.k_scale);
  const auto read = [](const uint8_t* from, float* to) {
    uint16_t halves[16];
    memcpy(halves, from, sizeof halves);
    store_floats(to, load_halves(halves));
  };
  read(k_scale, p.k_scale + token);
  read(k_zero, p.k_zero + token);
  read(v_scale, p.v_scale + token);
  read(v_zero, p.v_zero + token);
  for (size_t i = 0; i < 32; i += sizeof(Halves)) {
    marks.bad |= bad_scale(load_bits(k_scale + i)) | bad_scale(load_bits(v_scale + i));
    marks.bad |= beyond(load_bits(k_zero + i), HALF_1024);
    marks.bad |= beyond(load_bits(v_zero + i), HALF_1024);
    marks.wide |= beyond(load_bits(v_zero + i), HALF_500);
  }
}

// Clears the parameters of bad tokens, and of those outside of [low, high).
inline void clear_parameters(Tokens& p, size_t low, size_t high, size_t tokens) {
  for (size_t t = 0; t < tokens; ++t) {
    const auto scale = [](float x) { return x > 0.0f && x <= KV_SCALE_MAX; };
    const auto zero = [](float x) { return x >= -KV_MAX_ZERO && x <= KV_MAX_ZERO; };
    const bool good = scale(p.k_scale[t]) && scale(p.v_scale[t]) &&
                      zero(p.k_zero[t]) && zero(p.v_zero[t]);
    const bool live = t >= low && t < high;
    p.bad[t] = live && !good;
    p.any_bad |= p.bad[t];
    if (live && good) continue;
    p.k_scale[t] = p.v_scale[t] = 0.0f;
    p.k_zero[t] = p.v_zero[t] = CENTRE;
  }
}

// Settles the parameters that were read for a number of tokens.
inline void finish_parameters(Tokens& p, const Marks& marks, size_t low,
                              size_t high, size_t tokens) {
  p.any_bad = false;
  const bool partial = low > 0 || high < tokens;
  if (partial || any_marked(marks.bad)) clear_parameters(p, low, high, tokens);
  // Cleared ones may have been wide: the flag then only costs time.
  p.words_fit = !any_marked(marks.wide);
  for (size_t t = 0; t < tokens; t += WIDTH) {
    store_lanes(p.k_zero + t, load_lanes(p.k_zero + t) - float(CENTRE));
    const FloatLanes steps = (load_lanes(p.v_zero + t) - float(CENTRE)) * KV_ZERO_STEPS;
    store_lanes(p.v_steps + t, __builtin_convertvector(steps, IntLanes));
  }
#if defined(LOWBIT_AVX512)
  for (size_t t = 0; t < tokens; t += 32) {
    const __m512i a = _mm512_loadu_si512(p.v_steps + t);
    const __m512i b = _mm512_loadu_si512(p.v_steps + t + 16);
    _mm512_storeu_si512(p.v_words + t, _mm512_packs_epi32(a, b));
  }
#endif
}

// Base-2 scores of products, in place, and the largest.
LOWBIT_INLINE float score_row(const Tokens& p, int32_t* products, size_t begin,
                              size_t end, float code_sum, float factor, bool capped,
                              float cap) {
  FloatLanes most = all_lanes(MINUS_INFINITY);
  for (size_t t = begin; t < end; t += WIDTH) {
    const FloatLanes c = convert(load_lanes(products + t));
    const FloatLanes zero = load_lanes(p.k_zero + t) * code_sum;
    const FloatLanes score = (c - zero) * load_lanes(p.k_scale + t) * factor;
    most = larger(most, score);
    store_lanes(products + t, bits_of(score));
  }
  if (!capped) return largest(most);
  most = all_lanes(MINUS_INFINITY);
  for (size_t t = begin; t < end; t += WIDTH) {
    const FloatLanes score = tanh(floats_of(load_lanes(products + t))) * cap;
    most = larger(most, score);
    store_lanes(products + t, bits_of(score));
  }
  return largest(most);
}

// Hides the scores of [begin, end) outside of [low, high); the largest of the others.
inline float hide_row(int32_t* scores, size_t begin, size_t end, size_t low,
                      size_t high) {
  const int32_t hidden = int32_t(bits_of(MINUS_INFINITY));
  for (size_t t = begin; t < low; ++t) scores[t] = hidden;
  for (size_t t = high; t < end; ++t) scores[t] = hidden;
  FloatLanes most = all_lanes(MINUS_INFINITY);
  for (size_t t = begin; t < end; t += WIDTH) {
    most = larger(most, floats_of(load_lanes(scores + t)));
  }
  return largest(most);
}

// Weights of scores, in place, the largest of them, and their total.
//
// Powers below 2^MIN_POWER may be anything that small: with scales in [2^-24, 2^16)
// their weights are below 2^-8 codes, and they add nothing to the total. So the
// result of exp2() is not needed where it is subnormal or 0.
LOWBIT_INLINE float weigh_row(const Tokens& p, int32_t* scores, size_t begin,
                              size_t end, float peak, float* total) {
  constexpr float MIN_POWER = -64.0f;
  FloatLanes most = all_lanes(0.0f);
  IntLanes sums = {};
  for (size_t t = begin; t < end; t += WIDTH) {
    const FloatLanes x = floats_of(load_lanes(scores + t)) - peak;
    const Parts parts = parts_of(larger(x, all_lanes(MIN_POWER)));
    // Normal, so that the exponent can be added to it.
    const FloatLanes power =
        floats_of(bits_of(parts.excess + 1.0f) + parts.exponent);
    // Added to 2, a number up to 1 is rounded to 2^-22 and is in the low bits.
    sums += bits_of(power + 2.0f);
    const FloatLanes weight = power * load_lanes(p.v_scale + t);
    most = larger(most, weight);
    store_lanes(scores + t, bits_of(weight));
  }
  // Modulo 2^32.
  const uint32_t twos = uint32_t(end - begin) * 0x40000000u;
  *total = float(int32_t(uint32_t(sum(sums)) - twos)) * TOTAL_UNIT;
  return largest(most);
}

// Sums over the codes of a row's weights.
struct WeightSums {
  int32_t codes;
  int64_t zeros;  // of codes times v_steps
};

LOWBIT_INLINE WeightSums encode_row(const Tokens& p, const int32_t* weights,
                                    size_t begin, size_t end, float inverse,
                                    int8_t* high_digits, int8_t* low_digits) {
  typedef int8_t ByteLanes __attribute__((vector_size(WIDTH)));
  IntLanes codes = {}, high_zeros = {}, low_zeros = {};
  for (size_t t = begin; t < end; t += WIDTH) {
    const FloatLanes weight = floats_of(load_lanes(weights + t));
    const IntLanes code = bits_of(weight * inverse + ROUND) - ROUND_BITS;
    const IntLanes low = code & 255, high = code >> 8;
    const ByteLanes low_bytes = __builtin_convertvector(low, ByteLanes);
    const ByteLanes high_bytes = __builtin_convertvector(high, ByteLanes);
    memcpy(low_digits + t, &low_bytes, sizeof low_bytes);
    memcpy(high_digits + t, &high_bytes, sizeof high_bytes);
    const IntLanes steps = load_lanes(p.v_steps + t);
    codes += code;
    // Below 2^31: 255 * 2^16.02 in each of 480 / WIDTH terms of a lane.
    low_zeros += low * steps;
    high_zeros += high * steps;
  }
  int64_t zeros = 0;
  for (size_t l = 0; l < WIDTH; ++l) {
    zeros += 256 * int64_t(high_zeros[l]) + low_zeros[l];
  }
  return {sum(codes), zeros};
}

#if defined(LOWBIT_AVX512)
// As encode_row, where v_words fit.
LOWBIT_INLINE WeightSums encode_row_words(const Tokens& p, const int32_t* weights,
                                          size_t begin, size_t end, float inverse,
                                          int8_t* high_digits, int8_t* low_digits) {
  const __m512 factor = _mm512_set1_ps(inverse);
  const __m512i byte = _mm512_set1_epi16(255), ones = _mm512_set1_epi8(1);
  // Packing leaves four tokens of each of four vectors in a lane.
  const __m512i order =
      _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  __m512i high_codes = zero_sums(), low_codes = high_codes;
  __m512i high_zeros = high_codes, low_zeros = high_codes;
  for (size_t t = begin; t < end; t += 64) {
    __m512i high[2], low[2];
#pragma GCC unroll 2
    for (size_t i = 0; i < 2; ++i) {
      const auto code = [&](size_t at) {
        const __m512 weight = _mm512_loadu_ps(weights + t + at);
        return _mm512_cvtps_epi32(_mm512_mul_ps(weight, factor));
      };
      const __m512i words = _mm512_packus_epi32(code(32 * i), code(32 * i + 16));
      const __m512i steps = _mm512_loadu_si512(p.v_words + t + 32 * i);
      low[i] = _mm512_and_si512(words, byte);
      high[i] = _mm512_srli_epi16(words, 8);
      low_zeros = _mm512_dpwssd_epi32(low_zeros, low[i], steps);
      high_zeros = _mm512_dpwssd_epi32(high_zeros, high[i], steps);
    }
    const __m512i h = _mm512_packus_epi16(high[0], high[1]);
    const __m512i l = _mm512_packus_epi16(low[0], low[1]);
    high_codes = _mm512_dpbusd_epi32(high_codes, h, ones);
    low_codes = _mm512_dpbusd_epi32(low_codes, l, ones);
    _mm512_storeu_si512(high_digits + t, _mm512_permutexvar_epi32(order, h));
    _mm512_storeu_si512(low_digits + t, _mm512_permutexvar_epi32(order, l));
  }
  const auto widen = [](__m512i x) {
    return _mm512_add_epi64(_mm512_cvtepi32_epi64(_mm512_castsi512_si256(x)),
                            _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(x, 1)));
  };
  const __m512i codes = _mm512_add_epi32(_mm512_slli_epi32(high_codes, 8), low_codes);
  const __m512i zeros =
      _mm512_add_epi64(_mm512_slli_epi64(widen(high_zeros), 8), widen(low_zeros));
  return {_mm512_reduce_add_epi32(codes), _mm512_reduce_add_epi64(zeros)};
}
#endif

}  // namespace LOWBIT_ISA
