// SPDX-License-Identifier: Apache-2.0
// All operators for one instruction set: compiled once for each, with LOWBIT_ISA
// naming the namespace and LOWBIT_AVX512 or LOWBIT_AVX2 defined.
// Nothing here may use templates of the standard library: the linker keeps one copy
// of those, perhaps the one with instructions that this machine lacks.
#include "../kv4_attention/cpu.h"
#include "../linear_packed/cpu.h"
#include "../linear_tiled/cpu.h"
#include "../linear_wna16/cpu.h"
#include "../quantize_weight/cpu.h"
#include "abi.h"

namespace LOWBIT_ISA {

namespace {

Transform transform_of(const LowbitTransform* t) {
  return {size_t(t->order), size_t(t->stride), t->table,
          size_t(t->core),  t->transpose != 0, t->norm};
}

Weight weight_of(const LowbitWeight* w, const float* bias) {
  return {size_t(w->n), size_t(w->k), size_t(w->groups), int(w->bits),
          w->fields,    w->scale,     w->zero,           w->sum,
          bias};
}

// Calls f.template operator()<BITS>() for the width at run time.
template <class F>
void for_bits(int64_t bits, const F& f) {
  switch (bits) {
    case 2: return f.template run<2>();
    case 3: return f.template run<3>();
    case 4: return f.template run<4>();
    case 6: return f.template run<6>();
    case 8: return f.template run<8>();
  }
}

void run_hadamard(const LowbitTransform* t, const void* x, int type,
                  const float* input_scale, int64_t m, int64_t n, float* y) {
  hadamard(transform_of(t), x, type, input_scale, size_t(m), size_t(n), y);
}

void run_hadamard_quantize(const LowbitTransform* t, const void* x, int type,
                           const float* input_scale, int64_t m, int64_t n, int bits,
                           int symmetric, float clip_ratio, int64_t groups,
                           int8_t* codes, float* scale, int32_t* zero_point) {
  hadamard_quantize(transform_of(t), x, type, input_scale, size_t(m), size_t(n),
                    Grid{bits, symmetric != 0, false, clip_ratio}, size_t(groups),
                    codes, scale, zero_point);
}

struct Pack {
  const Weight w;
  const int8_t* codes;
  uint8_t* out;
  template <int BITS>
  void run() const {
    pack_weight<BITS>(codes, w, out);
  }
};

void run_pack_weight(const LowbitWeight* w, const int8_t* codes, uint8_t* out) {
  for_bits(w->bits, Pack{weight_of(w, nullptr), codes, out});
}

struct Integer {
  const Weight w;
  const IntegerRows& rows;
  size_t m;
  int type;
  void* out;
  template <int BITS>
  void run() const {
    linear<BITS>(rows, w, m, type, out);
  }
};

void run_linear_w4a4(const LowbitWeight* w, const float* bias, const int8_t* codes,
                     const float* scale, const int32_t* zero_point, int64_t scales,
                     int64_t m, int type, void* out) {
  const IntegerRows rows{codes, scale, zero_point, size_t(scales)};
  for_bits(w->bits, Integer{weight_of(w, bias), rows, size_t(m), type, out});
}

struct FixedPoint {
  const Weight w;
  const void* x;
  int x_type;
  size_t m;
  int type;
  void* out;
  template <int BITS>
  void run() const {
    linear_fixed_point<BITS>(x, x_type, w, m, type, out);
  }
};

void run_linear_wna16(const LowbitWeight* w, const float* bias, const void* x,
                      int x_type, int64_t m, int type, void* out) {
  for_bits(w->bits, FixedPoint{weight_of(w, bias), x, x_type, size_t(m), type, out});
}

void run_linear_tiled(const void* x, const void* w, const float* bias, int64_t m,
                      int64_t n, int64_t k, int type, void* out) {
  const auto run = type == FLOAT32    ? linear_tiled<FLOAT32>
                   : type == BFLOAT16 ? linear_tiled<BFLOAT16>
                                      : linear_tiled<FLOAT16>;
  run(x, w, bias, size_t(m), size_t(n), size_t(k), out);
}

void run_quantize_weight(const float* x, int64_t rows, int64_t n, int bits,
                         int symmetric, const float* ratios, int64_t count,
                         int8_t* codes, float* scale, int32_t* zero_point) {
  quantize_weight(x, size_t(rows), size_t(n), Grid{bits, symmetric != 0, false, 1.0f}, ratios,
                  size_t(count), codes, scale, zero_point);
}

int run_kv4_store(const LowbitStore* s, const LowbitTransform* t) {
  if (t == nullptr) return kv4_store(*s, nullptr);
  const Transform transform = transform_of(t);
  return kv4_store(*s, &transform);
}

int run_kv4_attention(const LowbitAttention* a, const LowbitTransform* t) {
  if (t == nullptr) return kv4_attention(*a, nullptr);
  const Transform transform = transform_of(t);
  return kv4_attention(*a, &transform);
}

struct Whole {
  const Transform t;
  const float* input_scale;
  const Weight w;
  const void* x;
  int x_type;
  size_t m;
  Grid activations;
  size_t groups;
  int type;
  void* out;
  template <int BITS>
  void run() const {
    linear_packed<BITS>(t, input_scale, w, x, x_type, m, activations, groups, type,
                        out);
  }
};

void run_linear_packed(const LowbitTransform* t, const float* input_scale,
                       const LowbitWeight* w, const float* bias, const void* x,
                       int x_type, int64_t m, int activation_bits, int symmetric,
                       float clip_ratio, int64_t groups, int type, void* out) {
  for_bits(w->bits,
           Whole{transform_of(t), input_scale, weight_of(w, bias), x, x_type, size_t(m),
                 Grid{activation_bits, symmetric != 0, false, clip_ratio},
                 size_t(groups), type, out});
}

}  // namespace

extern const LowbitFunctions functions;
const LowbitFunctions functions = {
    run_hadamard,     run_hadamard_quantize, run_pack_weight,     run_linear_w4a4,
    run_linear_wna16, run_linear_tiled,      run_quantize_weight, run_kv4_store,
    run_kv4_attention, run_linear_packed,
};

}  // namespace LOWBIT_ISA
