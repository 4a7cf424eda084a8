// SPDX-License-Identifier: Apache-2.0
// Attention over packed pages, bit for bit the arithmetic of kv4_attention/generic.py.
//
// A task is a block of query rows of one sequence and one KV head, all of which read
// the same pages. It goes through the splits of its context; what is unpacked of a
// split is multiplied with all rows while it is in the nearest cache.
#pragma once

#include <omp.h>

#include "cpu_split.h"

namespace LOWBIT_ISA {

LOWBIT_INLINE void write_row(const Attention& x, const Task& task, size_t r,
                             State state, const float* values) {
  const LowbitAttention& a = x.a;
  const size_t n = size_t(a.head_dim), bytes = type_bytes(int(a.type));
  const int64_t flat = task.first_row + int64_t(r);
  const int64_t token = a.starts[task.sequence] + flat / x.group;
  const int64_t head = task.kv_head * x.group + flat % x.group;
  const float keep = a.sinks == nullptr ? 1.0f : add_sink(state, a.sinks[head]);
  float row[MAX_VALUES];
  for (size_t i = 0; i < x.value_lanes; ++i) {
    row[x.elements[i / 4] + i % 4] = values[i] * keep / state.total;
  }
  const size_t at = size_t(token * a.num_heads + head) * n;
  write_floats(row, n, int(a.type), static_cast<char*>(a.out) + at * bytes);
}

// Runs `count` splits of a task and calls done(split) after each, when the split's
// results are in w. Returns whether all pages exist.
template <class F>
LOWBIT_INLINE bool run_splits(const Attention& x, const Task& task, Work& w,
                              int64_t first, int64_t count, const F& done) {
  Span* span = &w.spans[0];
  Span* next = &w.spans[1];
  if (count > 0 && !find_span(x, task, w, first, *span)) return false;
  for (int64_t split = first; split < first + count; ++split) {
    next->blocks = 0;
    if (split + 1 < first + count && !find_span(x, task, w, split + 1, *next)) {
      return false;
    }
    attend_split(x, w, *span, *next, size_t(task.rows));
    done(split);
    Span* const old = span;
    span = next;
    next = old;
  }
  return true;
}

inline bool run_task(const Attention& x, const Task& task, Work& w, double* scratch) {
  begin_task(x, task, w, scratch);
  const size_t rows = size_t(task.rows);
  for (size_t r = 0; r < rows; ++r) {
    w.state[r] = {MINUS_INFINITY, 0.0f};
    memset(w.values[r], 0, 4 * x.value_lanes);
  }
  const auto merge_rows = [&](int64_t) {
    for (size_t r = 0; r < rows; ++r) {
      float* values = reinterpret_cast<float*>(w.value_sums[r]);
      split_values(x, w, r, values);
      merge(x, w.state[r], w.values[r], w.split[r], values);
    }
  };
  if (!run_splits(x, task, w, task.first_split, task.splits, merge_rows)) return false;
  for (size_t r = 0; r < rows; ++r) write_row(x, task, r, w.state[r], w.values[r]);
  return true;
}

// Some splits of a task that several threads share; their results go to memory and are
// merged in order when all are there, so that the bits stay the same.
constexpr int64_t MIN_PIECE = 2;  // splits: each piece encodes its queries again
struct Piece {
  int64_t task, first_split, splits;
};

// Floats of the results of one row and one split: a State and the values.
LOWBIT_INLINE size_t result_floats(const Attention& x) { return 2 + x.value_lanes; }

inline bool run_piece(const Attention& x, const Task& task, const Piece& piece,
                      Work& w, double* scratch, float* results) {
  begin_task(x, task, w, scratch);
  const size_t stride = result_floats(x), rows = size_t(task.rows);
  const auto keep_rows = [&](int64_t split) {
    float* out = results + size_t(split - task.first_split) * rows * stride;
    for (size_t r = 0; r < rows; ++r) {
      memcpy(out + r * stride, &w.split[r], sizeof(State));
      split_values(x, w, r, out + r * stride + 2);
    }
  };
  return run_splits(x, task, w, piece.first_split, piece.splits, keep_rows);
}

inline void merge_pieces(const Attention& x, const Task& task, size_t r,
                         const float* results) {
  const size_t stride = result_floats(x), rows = size_t(task.rows);
  alignas(64) float values[MAX_VALUES] = {};
  State state = {MINUS_INFINITY, 0.0f};
  for (size_t i = 0; i < size_t(task.splits); ++i) {
    const float* result = results + (i * rows + r) * stride;
    State split;
    memcpy(&split, result, sizeof split);
    merge(x, state, values, split, result + 2);
  }
  write_row(x, task, r, state, values);
}

// The tasks of a call; counts only where tasks is null.
inline int64_t list_tasks(const Attention& x, Task* tasks) {
  const LowbitAttention& a = x.a;
  int64_t count = 0;
  for (int64_t s = 0; s < a.num_seqs; ++s) {
    const int64_t rows = x.query_len(s) * x.group;
    for (int64_t row = 0; row < rows; row += MAX_ROWS) {
      const int64_t left = rows - row, most = MAX_ROWS;
      Task task = {s, 0, row, left < most ? left : most, 0, 0, -1};
      const int64_t first = x.first_visible(x.position(task, row));
      const int64_t end = x.position(task, row + task.rows - 1) + 1;
      task.first_split = first / x.split_size;
      // None for rows before the sequence begins, which see nothing.
      const int64_t stop = (end + x.split_size - 1) / x.split_size;
      task.splits = stop > task.first_split ? stop - task.first_split : 0;
      for (; task.kv_head < a.num_kv_heads; ++task.kv_head) {
        if (tasks != nullptr) tasks[count] = task;
        ++count;
      }
    }
  }
  return count;
}

// Cuts tasks of more than `most` splits into pieces, and finds a place for their
// results. Returns the number of pieces, which are counted only where pieces is null.
inline int64_t list_pieces(const Attention& x, Task* tasks, int64_t count, int64_t most,
                           Piece* pieces, int64_t* floats) {
  int64_t number = 0;
  *floats = 0;
  const auto add = [&](const Piece& piece) {
    if (pieces != nullptr) pieces[number] = piece;
    ++number;
  };
  for (int64_t i = 0; i < count; ++i) {
    Task& task = tasks[i];
    if (task.splits <= most) {
      add({i, task.first_split, task.splits});
      continue;
    }
    task.results = *floats;
    *floats += task.splits * task.rows * int64_t(result_floats(x));
    for (int64_t done = 0; done < task.splits; done += most) {
      const int64_t left = task.splits - done;
      add({i, task.first_split + done, left < most ? left : most});
    }
  }
  return number;
}

// Returns whether all pages exist.
inline bool kv4_attention(const LowbitAttention& a, const Transform* t) {
  const Attention x(a, t);
  static thread_local Scratch task_memory, piece_memory, result_memory;
  const int64_t count = list_tasks(x, nullptr);
  Task* tasks = task_memory.take<Task>(size_t(count));
  list_tasks(x, tasks);
  // About four pieces a thread: the last to end wastes little.
  const int64_t threads = omp_get_max_threads();
  int64_t total = 0, floats = 0;
  for (int64_t i = 0; i < count; ++i) total += tasks[i].splits;
  const int64_t share = total / (4 * threads) + 1;
  const int64_t most = threads == 1 ? total : share < MIN_PIECE ? MIN_PIECE : share;
  const int64_t number = list_pieces(x, tasks, count, most, nullptr, &floats);
  Piece* pieces = piece_memory.take<Piece>(size_t(number));
  list_pieces(x, tasks, count, most, pieces, &floats);
  float* results = result_memory.take<float>(size_t(floats));
  bool valid = true;
#pragma omp parallel if (number > 1)
  {
    static thread_local Scratch work, doubles;
    Work& w = *work.take<Work>(1);
    double* scratch = doubles.take<double>(t == nullptr ? 1 : transform_scratch(*t));
    // The last rows of a prompt see the most: first.
#pragma omp for schedule(dynamic, 1) reduction(&& : valid)
    for (int64_t i = number - 1; i >= 0; --i) {
      const Task& task = tasks[pieces[i].task];
      const bool found =
          task.results < 0
              ? run_task(x, task, w, scratch)
              : run_piece(x, task, pieces[i], w, scratch, results + task.results);
      valid = valid && found;
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < count; ++i) {
      const Task& task = tasks[i];
      if (task.results < 0 || !valid) continue;
      for (size_t r = 0; r < size_t(task.rows); ++r) {
        merge_pieces(x, task, r, results + task.results);
      }
    }
  }
  return valid;
}

}  // namespace LOWBIT_ISA
