// SPDX-License-Identifier: Apache-2.0
// Attention over packed pages, bit for bit the arithmetic of kv4_attention/generic.py.
//
// A task is a block of query rows of one sequence and one KV head, all of which read
// the same pages. It goes through the splits of its context; what is unpacked of a
// split is multiplied with all rows while it is in the nearest cache.
#pragma once

#include <omp.h>

#include "cpu_weights.h"

namespace LOWBIT_ISA {

constexpr int64_t SPLIT = 256;
constexpr float QUERY_MAX = 32512.0f, FACTOR_LIMIT = 0x1p64f;
// Blocks of 16 tokens that are unpacked at a time.
constexpr size_t UNPACKED = 8;

struct Task {
  int64_t sequence, kv_head;
  int64_t first_row;  // of the sequence's rows times the heads of a group
  int64_t rows;
  int64_t first_split, splits;
};

// What a thread needs for a task.
struct Work {
  alignas(64) int8_t query_digits[MAX_ROWS][2][MAX_HEAD_DIM];
  float factor[MAX_ROWS], code_sum[MAX_ROWS];
  int32_t query_start[MAX_ROWS];
  int64_t first[MAX_ROWS], end[MAX_ROWS];  // visible tokens
  bool poisoned[MAX_ROWS];
  // One split.
  Tokens tokens;
  const uint8_t* page[MAX_SPLIT / 16];
  size_t offset[MAX_SPLIT / 16];  // of the first token in its page
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
  w.factor[r] = scale * x.a.score_factor;
  w.poisoned[r] = !range.finite || !(w.factor[r] < FACTOR_LIMIT) ||
                  !(w.factor[r] > -FACTOR_LIMIT);
  // Zeros in place of what is not a number: the row is computed with the others.
  const float inverse = w.poisoned[r] ? 0.0f : 1.0f / scale;
  if (w.poisoned[r]) w.factor[r] = 0.0f;
  int32_t sum = 0;
  for (size_t i = 0; i < n; ++i) {
    const float value = w.poisoned[r] ? 0.0f : row[i] * inverse;
    const int32_t code = int32_t(round_even(value));
    const int32_t high = (code + 128) >> 8;
    w.query_digits[r][0][i] = int8_t(high);
    w.query_digits[r][1][i] = int8_t(code - 256 * high);
    sum += code;
  }
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
    w.state[r] = {MINUS_INFINITY, 0.0f};
    memset(w.values[r], 0, 4 * x.value_lanes);
  }
}

// Finds the pages of a split's blocks. Returns whether they exist.
LOWBIT_INLINE bool find_pages(const Attention& x, const Task& task, Work& w,
                              int64_t origin, size_t blocks) {
  const LowbitAttention& a = x.a;
  const int32_t* table = a.block_table + task.sequence * a.table_stride;
  for (size_t b = 0; b < blocks; ++b) {
    const int64_t token = origin + 16 * int64_t(b), column = token / a.block_size;
    const int64_t block = column < a.table_width ? table[column] : -1;
    if (block < 0 || block >= a.num_blocks) return false;
    w.page[b] = a.cache + block * a.block_stride + task.kv_head * a.head_stride;
    w.offset[b] = size_t(token % a.block_size);
  }
  return true;
}

LOWBIT_INLINE void multiply_keys(const Attention& x, Work& w, size_t rows,
                                 size_t blocks) {
  const size_t block_bytes = 32 * x.half;
  for (size_t first = 0; first < blocks; first += UNPACKED) {
    const size_t count = blocks - first < UNPACKED ? blocks - first : UNPACKED;
    for (size_t b = 0; b < count; ++b) {
      const uint8_t* codes = w.page[first + b] + x.at.k_codes;
      unpack_keys(codes + w.offset[first + b] * x.half, x.half,
                  w.fields + block_bytes * b);
    }
    multiply_digits<true, MAX_HEAD_DIM>(w.query_digits[0][0], w.fields, block_bytes, 64,
                                        x.half / 2, rows, count, w.query_start,
                                        w.products[0] + 16 * first, MAX_SPLIT);
  }
}

LOWBIT_INLINE void multiply_values(const Attention& x, Work& w, size_t rows,
                                   size_t blocks) {
  const size_t step_bytes = 4 * x.value_lanes;
  for (size_t r = 0; r < rows; ++r) memset(w.value_sums[r], 0, step_bytes);
  for (size_t first = 0; first < blocks; first += UNPACKED) {
    const size_t count = blocks - first < UNPACKED ? blocks - first : UNPACKED;
    for (size_t b = 0; b < count; ++b) {
      const uint8_t* codes = w.page[first + b] + x.at.v_codes;
      unpack_values(codes + w.offset[first + b] * x.half, x.half,
                    w.fields + 4 * step_bytes * b);
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
    if (!p.any_bad) continue;
    for (size_t t = v.low; t < v.high; ++t) w.poisoned[r] |= p.bad[t];
  }
  for (size_t r = 0; r < rows; ++r) {
    const Visible& v = visible[r];
    w.largest_weight[r] = weigh_row(p, w.products[r], v.begin, v.end, w.split[r].peak,
                                    &w.split[r].total);
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

// One split of a task, into w.split, w.sums, w.unit and w.value_sums. Returns whether
// its pages exist.
inline bool attend_split(const Attention& x, const Task& task, Work& w, int64_t split) {
  const size_t rows = size_t(task.rows);
  // Tokens that some row sees, and the first of their blocks.
  const int64_t begin = split * x.split_size, stop = begin + x.split_size;
  const int64_t low = w.first[0] > begin ? w.first[0] : begin;
  const int64_t high = w.end[rows - 1] < stop ? w.end[rows - 1] : stop;
  const int64_t origin = low / 16 * 16;
  const size_t blocks = size_t(high - origin + 15) / 16;
  const size_t tokens = (16 * blocks + CHUNK - 1) / CHUNK * CHUNK;
  if (!find_pages(x, task, w, origin, blocks)) return false;

  Marks marks = {};
  for (size_t b = 0; b < blocks; ++b) {
    const uint8_t* scales = w.page[b] + x.at.k_scale + 2 * w.offset[b];
    read_parameters(scales, x.at, w.tokens, 16 * b, marks);
  }
  finish_parameters(w.tokens, marks, size_t(low - origin), size_t(high - origin),
                    tokens);
  multiply_keys(x, w, rows, blocks);
  Visible visible[MAX_ROWS];
  for (size_t r = 0; r < rows; ++r) {
    const int64_t first = w.first[r] > low ? w.first[r] : low;
    const int64_t end = w.end[r] < high ? w.end[r] : high;
    if (first < end) {
      const size_t f = size_t(first - origin), e = size_t(end - origin);
      visible[r] = {f, e, f / CHUNK * CHUNK, (e + CHUNK - 1) / CHUNK * CHUNK};
    } else {
      visible[r] = {0, 0, 0, 0};
    }
  }
  find_weights(x, w, visible, rows, tokens);
  multiply_values(x, w, rows, blocks);
  return true;
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

inline void end_task(const Attention& x, const Task& task, const Work& w) {
  const LowbitAttention& a = x.a;
  const size_t n = size_t(a.head_dim), bytes = type_bytes(int(a.type));
  float row[MAX_VALUES];
  for (size_t r = 0; r < size_t(task.rows); ++r) {
    for (size_t i = 0; i < x.value_lanes; ++i) {
      const float value = w.values[r][i] / w.state[r].total;
      row[x.elements[i / 4] + i % 4] = w.poisoned[r] ? NOT_A_NUMBER : value;
    }
    const int64_t flat = task.first_row + int64_t(r);
    const int64_t token = a.starts[task.sequence] + flat / x.group;
    const int64_t head = task.kv_head * x.group + flat % x.group;
    const size_t at = size_t(token * a.num_heads + head) * n;
    write_floats(row, n, int(a.type), static_cast<char*>(a.out) + at * bytes);
  }
}

inline bool run_task(const Attention& x, const Task& task, Work& w, double* scratch) {
  begin_task(x, task, w, scratch);
  for (int64_t split = 0; split < task.splits; ++split) {
    if (!attend_split(x, task, w, task.first_split + split)) return false;
    for (size_t r = 0; r < size_t(task.rows); ++r) {
      float* values = reinterpret_cast<float*>(w.value_sums[r]);
      split_values(x, w, r, values);
      merge(x, w.state[r], w.values[r], w.split[r], values);
    }
  }
  end_task(x, task, w);
  return true;
}

// The tasks of a call; counts only where tasks is null.
inline int64_t list_tasks(const Attention& x, Task* tasks) {
  const LowbitAttention& a = x.a;
  int64_t count = 0;
  for (int64_t s = 0; s < a.num_seqs; ++s) {
    const int64_t rows = x.query_len(s) * x.group;
    for (int64_t row = 0; row < rows; row += MAX_ROWS) {
      const int64_t left = rows - row, most = MAX_ROWS;
      Task task = {s, 0, row, left < most ? left : most, 0, 0};
      const int64_t first = x.first_visible(x.position(task, row));
      const int64_t end = x.position(task, row + task.rows - 1) + 1;
      task.first_split = first / x.split_size;
      task.splits = (end + x.split_size - 1) / x.split_size - task.first_split;
      for (; task.kv_head < a.num_kv_heads; ++task.kv_head) {
        if (tasks != nullptr) tasks[count] = task;
        ++count;
      }
    }
  }
  return count;
}

// Returns whether all pages exist.
inline bool kv4_attention(const LowbitAttention& a, const Transform* t) {
  const Attention x(a, t);
  static thread_local Scratch list;
  const int64_t count = list_tasks(x, nullptr);
  Task* tasks = list.take<Task>(size_t(count));
  list_tasks(x, tasks);
  bool valid = true;
#pragma omp parallel if (count > 1)
  {
    static thread_local Scratch work, doubles;
    Work& w = *work.take<Work>(1);
    double* scratch = doubles.take<double>(t == nullptr ? 1 : transform_scratch(*t));
    // The last rows of a prompt see the most: first.
#pragma omp for schedule(dynamic, 1) reduction(&& : valid)
    for (int64_t i = count - 1; i >= 0; --i) {
      valid = run_task(x, tasks[i], w, scratch) && valid;
    }
  }
  return valid;
}

}  // namespace LOWBIT_ISA
