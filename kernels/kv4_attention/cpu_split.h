// SPDX-License-Identifier: Apache-2.0
// One split of a block of query rows: steps 1 and 3 of kv4_attention/generic.py, and
// what its rows become, steps 4 and 5.
#pragma once

#include "cpu_weights.h"

namespace LOWBIT_ISA {

constexpr int64_t SPLIT = 256;
constexpr float QUERY_MAX = 32512.0f, FACTOR_LIMIT = 0x1p64f, LOG2_E = 1.44269504f;
// Blocks of 16 tokens that are unpacked at a time.
constexpr size_t UNPACKED = 8;

struct Task {
  int64_t sequence, kv_head;
  int64_t first_row;  // of the sequence's rows times the heads of a group
  int64_t rows;
  int64_t first_split, splits;
  int64_t results;  // where shared results are, or -1: one thread does it all
};

// Where the tokens are that some row of a task sees in one split.
struct Span {
  int64_t low, high, origin;  // the tokens, and the first of their blocks
  size_t blocks;              // of 16 tokens
  const uint8_t* page[MAX_SPLIT / 16];
  size_t offset[MAX_SPLIT / 16];  // of a block's first token in its page
};

// What a thread needs for a task.
struct Work {
  alignas(64) int8_t query_digits[MAX_ROWS][2][MAX_HEAD_DIM];
  float factor[MAX_ROWS], code_sum[MAX_ROWS];
  int32_t query_start[MAX_ROWS];
  int64_t first[MAX_ROWS], end[MAX_ROWS];  // visible tokens
  bool poisoned[MAX_ROWS];                 // a query that makes the row NaN
  // One split.
  Tokens tokens;
  Span spans[2];  // this split's and the next one's
  alignas(64) uint8_t fields[16 * UNPACKED * MAX_HEAD_DIM];
  alignas(64) int32_t products[MAX_ROWS][MAX_SPLIT];  // then scores, then weights
  alignas(64) int8_t weight_digits[MAX_ROWS][2][MAX_SPLIT];
  float largest_weight[MAX_ROWS];
  State split[MAX_ROWS];
  WeightSums sums[MAX_ROWS];
  float unit[MAX_ROWS];
  alignas(64) int32_t value_sums[MAX_ROWS][MAX_VALUES];
  // The rows so far; values in the order of value_elements().
  State state[MAX_ROWS];
  alignas(64) float values[MAX_ROWS][MAX_VALUES];
};

// Everything that is the same for all tasks.
struct Attention {
  const LowbitAttention& a;
  const Transform* transform;
  int64_t group, split_size;
  PagePlanes at;
  size_t half, value_lanes;
  uint16_t elements[MAX_VALUES / 4];

  Attention(const LowbitAttention& arguments, const Transform* t)
      : a(arguments),
        transform(t),
        group(arguments.num_heads / arguments.num_kv_heads),
        split_size((SPLIT + arguments.block_size - 1) / arguments.block_size *
                   arguments.block_size),
        at(page_planes(size_t(arguments.block_size), size_t(arguments.head_dim))),
        half(size_t(arguments.head_dim) / 2),
        value_lanes(16 * value_blocks(size_t(arguments.head_dim))) {
    value_elements(size_t(a.head_dim), elements);
  }

  int64_t query_len(int64_t sequence) const {
    return a.starts[sequence + 1] - a.starts[sequence];
  }
  // Position of the token of a row, and the tokens that it sees.
  int64_t position(const Task& task, int64_t row) const {
    return a.seq_lens[task.sequence] - query_len(task.sequence) + row / group;
  }
  int64_t first_visible(int64_t position) const {
    const int64_t first = position - a.window + 1;
    return first > 0 ? first : 0;
  }
};

// Step 1 of generic.py for one row.
LOWBIT_INLINE void encode_query(const Attention& x, const void* query, double* scratch,
                                Work& w, size_t r) {
  const size_t n = size_t(x.a.head_dim);
  float row[MAX_HEAD_DIM];
  read_floats(query, int(x.a.type), n, row);
  if (x.transform != nullptr) transform_row(*x.transform, row, n, scratch, row);
  const Range range = range_of(row, n);
  const float peak = range.peak();
  const float scale = peak < TINY ? 1.0f : peak / QUERY_MAX;
  const float factor = scale * x.a.score_factor;
  const bool usable = range.finite && factor < FACTOR_LIMIT && factor > -FACTOR_LIMIT;
  // Zeros in place of what is not a number: the row is computed with the others.
  if (!usable) memset(row, 0, sizeof row);
  const float inverse = usable ? 1.0f / scale : 0.0f;
  int8_t* high_digits = w.query_digits[r][0];
  int8_t* low_digits = w.query_digits[r][1];
  int32_t sum = 0;
  for (size_t i = 0; i < n; ++i) {
    const int32_t code = int32_t(round_even(row[i] * inverse));
    const int32_t high = (code + 128) >> 8;
    high_digits[i] = int8_t(high);
    low_digits[i] = int8_t(code - 256 * high);
    sum += code;
  }
  w.poisoned[r] = !usable;
  w.factor[r] = usable ? factor : 0.0f;
  w.code_sum[r] = float(sum);
  w.query_start[r] = -CENTRE * sum;
}

inline void begin_task(const Attention& x, const Task& task, Work& w, double* scratch) {
  const LowbitAttention& a = x.a;
  for (size_t r = 0; r < size_t(task.rows); ++r) {
    const int64_t row = task.first_row + int64_t(r);
    const int64_t token = a.starts[task.sequence] + row / x.group;
    const int64_t head = task.kv_head * x.group + row % x.group;
    const int64_t at = token * a.query_strides[0] + head * a.query_strides[1];
    const char* query = static_cast<const char*>(a.query);
    encode_query(x, query + at * int64_t(type_bytes(int(a.type))), scratch, w, r);
    const int64_t position = x.position(task, row);
    w.first[r] = x.first_visible(position);
    w.end[r] = position + 1;
  }
}

// The span of a split. Returns whether its pages exist.
LOWBIT_INLINE bool find_span(const Attention& x, const Task& task, const Work& w,
                             int64_t split, Span& span) {
  const LowbitAttention& a = x.a;
  const int64_t begin = split * x.split_size, stop = begin + x.split_size;
  const int64_t first = w.first[0], end = w.end[task.rows - 1];
  span.low = first > begin ? first : begin;
  span.high = end < stop ? end : stop;
  span.origin = span.low / 16 * 16;
  span.blocks = size_t(span.high - span.origin + 15) / 16;
  const int32_t* table = a.block_table + task.sequence * a.table_stride;
  for (size_t b = 0; b < span.blocks; ++b) {
    const int64_t token = span.origin + 16 * int64_t(b);
    const int64_t column = token / a.block_size;
    const int64_t block = column < a.table_width ? table[column] : -1;
    if (block < 0 || block >= a.num_blocks) return false;
    span.page[b] = a.cache + block * a.block_stride + task.kv_head * a.head_stride;
    span.offset[b] = size_t(token % a.block_size);
  }
  return true;
}

LOWBIT_INLINE void prefetch(const uint8_t* p, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
  __builtin_prefetch(p + bytes - 1, 0, 2);
}

// Fetches the codes of a block that is needed one split later, and its parameters.
LOWBIT_INLINE void prefetch_block(const Attention& x, const Span& span, size_t b,
                                  size_t codes, size_t scale, size_t zero) {
  if (b >= span.blocks) return;
  const uint8_t* page = span.page[b];
  prefetch(page + codes + span.offset[b] * x.half, 16 * x.half);
  prefetch(page + scale + 2 * span.offset[b], 32);
  prefetch(page + zero + 2 * span.offset[b], 32);
}

LOWBIT_INLINE void multiply_keys(const Attention& x, Work& w, const Span& span,
                                 const Span& next, size_t rows) {
  const size_t block_bytes = 32 * x.half;
  for (size_t first = 0; first < span.blocks; first += UNPACKED) {
    const size_t left = span.blocks - first, count = left < UNPACKED ? left : UNPACKED;
    for (size_t b = first; b < first + count; ++b) {
      prefetch_block(x, next, b, x.at.k_codes, x.at.k_scale, x.at.k_zero);
      unpack_keys(span.page[b] + x.at.k_codes + span.offset[b] * x.half, x.half,
                  w.fields + block_bytes * (b - first));
    }
    multiply_digits<true, MAX_HEAD_DIM>(w.query_digits[0][0], w.fields, block_bytes, 64,
                                        x.half / 2, rows, count, w.query_start,
                                        w.products[0] + 16 * first, MAX_SPLIT);
  }
}

LOWBIT_INLINE void multiply_values(const Attention& x, Work& w, const Span& span,
                                   const Span& next, size_t rows) {
  const size_t step_bytes = 4 * x.value_lanes;
  for (size_t r = 0; r < rows; ++r) memset(w.value_sums[r], 0, step_bytes);
  for (size_t first = 0; first < span.blocks; first += UNPACKED) {
    const size_t left = span.blocks - first, count = left < UNPACKED ? left : UNPACKED;
    for (size_t b = first; b < first + count; ++b) {
      prefetch_block(x, next, b, x.at.v_codes, x.at.v_scale, x.at.v_zero);
      unpack_values(span.page[b] + x.at.v_codes + span.offset[b] * x.half, x.half,
                    w.fields + 4 * step_bytes * (b - first));
    }
    multiply_digits<false, MAX_SPLIT>(w.weight_digits[0][0] + 16 * first, w.fields, 64,
                                      step_bytes, 4 * count, rows, x.value_lanes / 16,
                                      nullptr, w.value_sums[0], MAX_VALUES);
  }
}

// Tokens [low, high) of a split that a row sees, none when low is high, and the whole
// chunks around them.
struct Visible {
  size_t low, high, begin, end;
};

// From products to the digits of the weights of all rows, one phase after the other:
// rows are independent, so that one's latencies hide behind the next one's work.
LOWBIT_INLINE void find_weights(const Attention& x, Work& w, const Visible* visible,
                                size_t rows, size_t tokens) {
  const Tokens& p = w.tokens;
  for (size_t r = 0; r < rows; ++r) {
    const Visible& v = visible[r];
    w.split[r] = {MINUS_INFINITY, 0.0f};
    if (v.low == v.high) continue;
    float peak = score_row(p, w.products[r], v.begin, v.end, w.code_sum[r],
                           w.factor[r], x.a.capped != 0, x.a.cap_factor);
    if (v.low > v.begin || v.high < v.end) {
      peak = hide_row(w.products[r], v.begin, v.end, v.low, v.high);
    }
    w.split[r].peak = peak;
  }
  for (size_t r = 0; r < rows; ++r) {
    const Visible& v = visible[r];
    w.largest_weight[r] = weigh_row(p, w.products[r], v.begin, v.end, w.split[r].peak,
                                    &w.split[r].total);
    bool poisoned = w.poisoned[r];
    for (size_t t = v.low; p.any_bad && t < v.high; ++t) poisoned |= p.bad[t];
    if (poisoned) w.split[r].total = NOT_A_NUMBER;
  }
  for (size_t r = 0; r < rows; ++r) {
    const Visible& v = visible[r];
    const float most = w.largest_weight[r];
    w.unit[r] = most < TINY ? 1.0f : most / WEIGHT_MAX;
    const float inverse = 1.0f / w.unit[r];
    int8_t(&digits)[2][MAX_SPLIT] = w.weight_digits[r];
    for (int i = 0; i < 2 && v.end - v.begin < tokens; ++i) {
      memset(digits[i], 0, v.begin);
      memset(digits[i] + v.end, 0, tokens - v.end);
    }
#if defined(LOWBIT_AVX512)
    if (p.words_fit) {
      w.sums[r] = encode_row_words(p, w.products[r], v.begin, v.end, inverse, digits[0],
                                   digits[1]);
      continue;
    }
#endif
    w.sums[r] = encode_row(p, w.products[r], v.begin, v.end, inverse, digits[0],
                           digits[1]);
  }
}

// One split of a task, into w.split, w.sums, w.unit and w.value_sums.
inline void attend_split(const Attention& x, Work& w, const Span& span,
                         const Span& next, size_t rows) {
  const size_t tokens = (16 * span.blocks + CHUNK - 1) / CHUNK * CHUNK;
  Marks marks = {};
  for (size_t b = 0; b < span.blocks; ++b) {
    const uint8_t* scales = span.page[b] + x.at.k_scale + 2 * span.offset[b];
    read_parameters(scales, x.at, w.tokens, 16 * b, marks);
  }
  finish_parameters(w.tokens, marks, size_t(span.low - span.origin),
                    size_t(span.high - span.origin), tokens);
  multiply_keys(x, w, span, next, rows);
  Visible visible[MAX_ROWS];
  for (size_t r = 0; r < rows; ++r) {
    const int64_t first = w.first[r] > span.low ? w.first[r] : span.low;
    const int64_t end = w.end[r] < span.high ? w.end[r] : span.high;
    visible[r] = {0, 0, 0, 0};
    if (first >= end) continue;
    const size_t low = size_t(first - span.origin), high = size_t(end - span.origin);
    visible[r] = {low, high, low / CHUNK * CHUNK, (high + CHUNK - 1) / CHUNK * CHUNK};
  }
  find_weights(x, w, visible, rows, tokens);
  multiply_values(x, w, span, next, rows);
}

// The last line of step 3 for one row. out may be the sums.
LOWBIT_INLINE void split_values(const Attention& x, const Work& w, size_t r,
                                float* out) {
  const int32_t centre = -CENTRE * w.sums[r].codes;
  const float zeros = float(double(w.sums[r].zeros) / double(KV_ZERO_STEPS));
  for (size_t i = 0; i < x.value_lanes; i += WIDTH) {
    const FloatLanes sum = convert(load_lanes(w.value_sums[r] + i) + centre);
    store_lanes(out + i, (sum - zeros) * w.unit[r]);
  }
}

// Step 4 for one row and one split.
LOWBIT_INLINE void merge(const Attention& x, State& state, float* values,
                         const State& split, const float* split_values) {
  if (split.peak == MINUS_INFINITY) return;
  const float peak = larger(state.peak, split.peak);
  const float keep = exp2(state.peak - peak), take = exp2(split.peak - peak);
  for (size_t i = 0; i < x.value_lanes; i += WIDTH) {
    const FloatLanes old = load_lanes(values + i) * keep;
    store_lanes(values + i, old + load_lanes(split_values + i) * take);
  }
  state = {peak, state.total * keep + split.total * take};
}

// Step 5 for one row, whose state has all splits: adds to the total, and returns the
// factor on the values.
LOWBIT_INLINE float add_sink(State& state, float sink) {
  const float sink_peak = sink * LOG2_E;
  if (sink_peak == MINUS_INFINITY) return 1.0f;
  if (!is_finite(sink_peak)) return NOT_A_NUMBER;
  const float peak = larger(state.peak, sink_peak);
  const float keep = exp2(state.peak - peak);
  state = {peak, state.total * keep + exp2(sink_peak - peak)};
  return keep;
}

}  // namespace LOWBIT_ISA
