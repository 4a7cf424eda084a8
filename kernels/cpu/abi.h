// SPDX-License-Identifier: Apache-2.0
// The functions of one instruction set; entry.cpp exports those of the best one.
// Arguments are those of the operators of the same name, checked in Python.
#pragma once

#include <cstddef>
#include <cstdint>

struct LowbitTransform {
  int64_t order, stride, core;
  const int8_t* table;
  int64_t transpose;
  double norm;
};

struct LowbitWeight {
  int64_t n, k, groups, bits;
  const uint8_t* fields;
  const float* scale;
  const int32_t* zero;
  const int32_t* sum;
};

struct LowbitStore {
  const void* key;
  const void* value;
  int64_t key_strides[2], value_strides[2];  // elements, of tokens and heads
  int64_t type, tokens;
  uint8_t* cache;
  int64_t num_blocks, num_kv_heads, block_size, head_dim;
  int64_t block_stride, head_stride;  // bytes
  const int64_t* slot_mapping;
};

struct LowbitAttention {
  const void* query;
  int64_t query_strides[2];
  int64_t type;
  const uint8_t* cache;
  int64_t num_blocks, num_kv_heads, block_size, head_dim;
  int64_t block_stride, head_stride;
  const int32_t* block_table;
  int64_t table_stride, table_width;
  const int32_t* starts;    // num_seqs + 1
  const int32_t* seq_lens;  // num_seqs
  int64_t num_seqs, num_heads;
  int64_t window;  // tokens that a position sees
  float score_factor, cap_factor;
  int64_t capped;
  const float* sinks;  // num_heads, or null
  void* out;           // contiguous
};

struct LowbitFunctions {
  void (*hadamard)(const LowbitTransform*, const void* x, int type,
                   const float* input_scale, int64_t m, int64_t n, float* y);
  void (*hadamard_quantize)(const LowbitTransform*, const void* x, int type,
                            const float* input_scale, int64_t m, int64_t n, int bits,
                            int symmetric, float clip_ratio, int64_t groups,
                            int8_t* codes, float* scale, int32_t* zero_point);
  void (*pack_weight)(const LowbitWeight*, const int8_t* codes, uint8_t* out);
  // A token has one scale and zero point, or one for each group of the weight.
  void (*linear_w4a4)(const LowbitWeight*, const float* bias, const int8_t* codes,
                      const float* scale, const int32_t* zero_point, int64_t scales,
                      int64_t m, int type, void* out);
  void (*linear_wna16)(const LowbitWeight*, const float* bias, const void* x,
                       int x_type, int64_t m, int type, void* out);
  void (*linear_tiled)(const void* x, const void* w, const float* bias, int64_t m,
                       int64_t n, int64_t k, int type, void* out);
  void (*quantize_weight)(const float* x, int64_t rows, int64_t n, int bits,
                          int symmetric, const float* ratios, int64_t count,
                          int8_t* codes, float* scale, int32_t* zero_point);
  // Without a transform for null. These return 0 where a slot or page does not exist.
  int (*kv4_store)(const LowbitStore*, const LowbitTransform*);
  int (*kv4_attention)(const LowbitAttention*, const LowbitTransform*);
  void (*linear_packed)(const LowbitTransform*, const float* input_scale,
                        const LowbitWeight*, const float* bias, const void* x,
                        int x_type, int64_t m, int activation_bits, int symmetric,
                        float clip_ratio, int64_t groups, int type, void* out);
};
