// SPDX-License-Identifier: Apache-2.0
// Linear layers on packed weights. Integer activations are one row of bytes a token;
// weight-only layers have three, the digits of a 22-bit fixed-point number.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include "../cpu/number.h"
#include "../cpu/tile.h"

namespace LOWBIT_ISA {

constexpr int PANEL = 16 * TILE_BLOCKS;  // channels of one register tile

// A packed weight: blocks of 16 channels, in them groups, in them chunks. Arrays of
// [groups][blocks * 16] run along the channels.
struct Weight {
  size_t n, k, groups;
  int bits;
  const uint8_t* fields;
  const float* scale;
  const int32_t* zero;  // field that means 0, null when it is 2^(bits-1) everywhere
  const int32_t* sum;   // of (field - zero) over the columns of a group
  const float* bias;    // [n] or null
};

LOWBIT_INLINE size_t round_up(size_t x, size_t unit) { return (x + unit - 1) / unit * unit; }
LOWBIT_INLINE size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

template <int BITS>
struct Geometry {
  using C = Chunk<BITS>;
  explicit Geometry(const Weight& w)
      : columns(w.k / w.groups),
        chunks(round_up(columns, 4 * C::STEPS) / (4 * C::STEPS)),
        padded(chunks * 4 * C::STEPS),
        group_bytes(chunks * C::BYTES),
        block_bytes(w.groups * group_bytes),
        blocks(round_up(w.n, 16) / 16) {}
  size_t columns;      // of a group
  size_t chunks;       // of a group
  size_t padded;       // columns of those chunks
  size_t group_bytes;  // of a block
  size_t block_bytes;
  size_t blocks;
};

// codes int8 [n, k] of one block to its chunks; columns beyond a group are zero.
template <int BITS>
LOWBIT_INLINE void pack_block(const int8_t* codes, size_t rows, const Weight& w,
                              uint8_t* out) {
  const Geometry<BITS> g(w);
  constexpr int STEPS = Chunk<BITS>::STEPS;
  memset(out, 0, g.block_bytes);
  for (size_t row = 0; row < rows; ++row) {
    for (size_t column = 0; column < w.k; ++column) {
      const unsigned field = unsigned(codes[row * w.k + column] + (1 << (BITS - 1)));
      const size_t group = column / g.columns, place = column % g.columns;
      const size_t chunk = place / (4 * STEPS), step = place % (4 * STEPS) / 4;
      uint8_t* p = out + group * g.group_bytes + chunk * Chunk<BITS>::BYTES +
                   4 * row + place % 4;
      if constexpr (BITS == 8) {
        *p = uint8_t(field);
      } else if constexpr (BITS == 4) {
        *p |= uint8_t(field << (4 * step));
      } else if constexpr (BITS == 2) {
        *p |= uint8_t(field << (2 * step));
      } else if constexpr (BITS == 6) {
        p[64 * (step / 2)] |= uint8_t((field & 15) << (4 * (step % 2)));
        p[128] |= uint8_t((field >> 4) << (2 * step));
      } else {
        p[64 * (step / 4)] |= uint8_t((field & 3) << (2 * (step % 4)));
        p[128] |= uint8_t((field >> 2) << step);
      }
    }
  }
}

template <int BITS>
void pack_weight(const int8_t* codes, const Weight& w, uint8_t* out) {
  const Geometry<BITS> g(w);
#pragma omp parallel for schedule(static)
  for (size_t b = 0; b < g.blocks; ++b) {
    pack_block<BITS>(codes + 16 * b * w.k, smaller(16, w.n - 16 * b), w,
                     out + b * g.block_bytes);
  }
}

// Activations as bytes: writes `DIGITS` rows of `columns` bytes for a token's group.
struct IntegerRows {
  static constexpr int DIGITS = 1;
  using Total = float;
  const int8_t* codes;        // [m, k]
  const float* scale;         // [m, scales]
  const int32_t* zero_point;  // [m, scales]
  size_t scales;              // of a token: 1, or one for each group of the weight

  LOWBIT_INLINE void load(size_t token, size_t k, size_t from, size_t columns,
                          int8_t* out, size_t) const {
    memcpy(out, codes + token * k + from, columns);
  }
  // What a group adds to a token's outputs; sums and digit_sums have DIGITS rows.
  LOWBIT_INLINE void add(size_t token, const Weight& w, size_t group, size_t ld,
                         size_t channel, int count, const int32_t* sums,
                         const int32_t* digit_sums, bool first, float* total) const {
    const float* ws = w.scale + group * ld + channel;
    const int32_t* sum = w.sum + group * ld + channel;
    const size_t at = token * scales + (scales == 1 ? 0 : group);
    const uint32_t az = uint32_t(zero_point[at]);
    // Times 1, exactly, where finish() scales.
    const float factor = scales == 1 ? 1.0f : scale[at];
    const uint32_t column_sum = uint32_t(digit_sums[0]);
    if (w.zero == nullptr) {
      const uint32_t shift = column_sum << (w.bits - 1);
      for (int c = 0; c < count; ++c) {
        const uint32_t acc = uint32_t(sums[c]) - shift - az * uint32_t(sum[c]);
        const float part = float(int32_t(acc)) * ws[c] * factor;
        total[c] = first ? part : total[c] + part;
      }
    } else {
      const int32_t* zero = w.zero + group * ld + channel;
      for (int c = 0; c < count; ++c) {
        const uint32_t acc = uint32_t(sums[c]) - column_sum * uint32_t(zero[c]) -
                             az * uint32_t(sum[c]);
        const float part = float(int32_t(acc)) * ws[c] * factor;
        total[c] = first ? part : total[c] + part;
      }
    }
  }
  LOWBIT_INLINE void finish(size_t token, const float* bias, int count, float* total,
                            float* out) const {
    const float factor = scales == 1 ? scale[token] : 1.0f;
    for (int c = 0; c < count; ++c) out[c] = total[c] * factor;
    if (bias != nullptr) {
      for (int c = 0; c < count; ++c) out[c] += bias[c];
    }
  }
};

// Tokens of tile `t`: as even as tiles of at most `most` tokens can be.
struct Tiling {
  Tiling(size_t tokens, size_t most)
      : m(tokens), tiles((tokens + most - 1) / most) {}
  size_t begin(size_t t) const { return t * m / tiles; }
  size_t m, tiles;
};

template <int BITS, class Rows>
LOWBIT_INLINE void pack_tile(const Rows& rows, const Weight& w,
                             const Geometry<BITS>& g, size_t token, size_t tokens,
                             int8_t* line, int8_t* bytes, int32_t* sums) {
  const size_t height = tokens * Rows::DIGITS;
  for (size_t i = 0; i < tokens; ++i) {
    for (size_t group = 0; group < w.groups; ++group) {
      memset(line, 0, g.padded * Rows::DIGITS);
      rows.load(token + i, w.k, group * g.columns, g.columns, line, g.padded);
      for (int d = 0; d < Rows::DIGITS; ++d) {
        const size_t row = i * Rows::DIGITS + d;
        const int8_t* from = line + d * g.padded;
        int32_t sum = 0;
        for (size_t c = 0; c < g.padded; ++c) sum += from[c];
        sums[row * w.groups + group] = sum;
        int8_t* to = bytes + group * g.padded * height + 4 * row;
        for (size_t c = 0; c < g.padded; c += 4) memcpy(to + c * height, from + c, 4);
      }
    }
  }
}

LOWBIT_INLINE int thread_count() {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

// Rows of activations that a core keeps in its second-level cache.
constexpr size_t CACHED_ACTIVATIONS = 512 << 10;
// Columns of a panel that all tiles read before the next are fetched: they stay in the
// nearest caches. One tile reads a single stream.
constexpr size_t SECTION_COLUMNS = 2048;

// From so many tiles on, a section's fields are unpacked once for all of them. Products
// of bytes must cost no more than those of the fields.
constexpr size_t UNPACK_TILES = 8;
constexpr bool UNPACKS = VECTOR_BYTES == 64;

// Packed activations of some tokens: of a tile [groups][columns / 4][rows][4].
struct PackedRows {
  const int8_t* bytes;
  const int32_t* sums;  // [rows][groups]
};

// The tiles [first, last) times the channels of `blocks` blocks from `block` on; see
// linear_w4a4/reference.py for the order of roundings.
template <int BITS, class Rows>
void multiply_panel(const Rows& rows, const PackedRows& packed, const Weight& w,
                    const Tiling& tiling, size_t first, size_t last, size_t block,
                    size_t blocks, int type, void* out) {
  constexpr size_t STEPS = Chunk<BITS>::STEPS, TOKENS = TILE_ROWS / Rows::DIGITS;
  constexpr size_t SUMS = TILE_ROWS * PANEL, TOTALS = TOKENS * PANEL;
  using Total = typename Rows::Total;
  const Geometry<BITS> g(w);
  const size_t width = w.groups * g.padded, tiles = last - first;
  const Tiling sections(g.chunks, tiles > 1 ? SECTION_COLUMNS / (4 * STEPS) : g.chunks);
  const bool unpacks = UNPACKS && BITS < 8 && tiles >= UNPACK_TILES;
  static thread_local Scratch product_scratch, total_scratch, byte_scratch;
  int32_t* const products = product_scratch.take<int32_t>(tiles * SUMS);
  Total* const totals = total_scratch.take<Total>(tiles * TOTALS);
  uint8_t* const bytes =
      unpacks ? byte_scratch.take<uint8_t>(SECTION_COLUMNS * PANEL) : nullptr;
  const size_t channel = 16 * block;
  const int count = int(16 * blocks);

  for (size_t part = 0; part < w.groups * sections.tiles; ++part) {
    const size_t group = part / sections.tiles, section = part % sections.tiles;
    const size_t begin = sections.begin(section);
    const size_t chunks = sections.begin(section + 1) - begin;
    const size_t column = group * g.padded + 4 * STEPS * begin;
    const uint8_t* fields = w.fields + block * g.block_bytes + group * g.group_bytes +
                            begin * Chunk<BITS>::BYTES;
    if (unpacks) unpack_blocks<BITS>(fields, g.block_bytes, blocks, chunks, bytes);
    for (size_t t = first; t < last; ++t) {
      const size_t token = tiling.begin(t), tokens = tiling.begin(t + 1) - token;
      const size_t height = tokens * Rows::DIGITS;
      const auto compute = [&](const int8_t* a, int32_t* to) {
        const int rows_of = int(height), blocks_of = int(blocks);
        if (unpacks) {
          find_tile<8>(rows_of, blocks_of)(a, bytes, chunks * STEPS * 64,
                                           chunks * STEPS, to);
        } else {
          find_tile<BITS>(rows_of, blocks_of)(a, fields, g.block_bytes, chunks, to);
        }
      };
      const int8_t* a = packed.bytes + token * Rows::DIGITS * width + column * height;
      int32_t* const sums = products + (t - first) * SUMS;
      if (section == 0) {
        compute(a, sums);
      } else {
        alignas(64) int32_t more[SUMS];
        compute(a, more);
        for (size_t i = 0; i < height * PANEL; ++i) {
          sums[i] = int32_t(uint32_t(sums[i]) + uint32_t(more[i]));
        }
      }
      if (section + 1 < sections.tiles) continue;
      for (size_t i = 0; i < tokens; ++i) {
        int32_t of_digits[Rows::DIGITS];
        for (size_t d = 0; d < Rows::DIGITS; ++d) {
          const size_t row = (token + i) * Rows::DIGITS + d;
          of_digits[d] = packed.sums[row * w.groups + group];
        }
        rows.add(token + i, w, group, 16 * g.blocks, channel, count,
                 sums + i * Rows::DIGITS * PANEL, of_digits, group == 0,
                 totals + (t - first) * TOTALS + i * PANEL);
      }
    }
  }
  const size_t live = smaller(size_t(count), w.n - channel);
  for (size_t t = first; t < last; ++t) {
    for (size_t token = tiling.begin(t); token < tiling.begin(t + 1); ++token) {
      alignas(64) float result[PANEL];
      rows.finish(token, w.bias == nullptr ? nullptr : w.bias + channel, int(live),
                  totals + (t - first) * TOTALS + (token - tiling.begin(t)) * PANEL,
                  result);
      write_floats(result, live, type,
                   static_cast<char*>(out) + (token * w.n + channel) * type_bytes(type));
    }
  }
}

// out[m, n] = rows x weight.
template <int BITS, class Rows>
void linear(const Rows& rows, const Weight& w, size_t m, int type, void* out) {
  const Geometry<BITS> g(w);
  const Tiling tiling(m, TILE_ROWS / Rows::DIGITS);
  const size_t width = w.groups * g.padded;  // bytes of a packed row
  static thread_local Scratch byte_scratch, sum_scratch;
  int8_t* const bytes = byte_scratch.take<int8_t>(m * Rows::DIGITS * width);
  int32_t* const sums = sum_scratch.take<int32_t>(m * Rows::DIGITS * w.groups);

  // Few channels for many threads: narrower panels.
  const size_t threads = size_t(thread_count());
  size_t panel = smaller(TILE_BLOCKS, (g.blocks + threads - 1) / threads);
  panel = panel == 0 ? 1 : panel;
  const size_t panels = (g.blocks + panel - 1) / panel;
  const size_t section = TILE_ROWS * smaller(width, SECTION_COLUMNS);
  const size_t chunk = CACHED_ACTIVATIONS / section;
  // Of even size: each is a task, and a thread gets as many of one as of another.
  const Tiling chunking(tiling.tiles, chunk);

#pragma omp parallel
  {
    static thread_local Scratch line_scratch;
    int8_t* const line = line_scratch.take<int8_t>(g.padded * Rows::DIGITS);
#pragma omp for schedule(static)
    for (size_t t = 0; t < tiling.tiles; ++t) {
      const size_t token = tiling.begin(t);
      pack_tile<BITS>(rows, w, g, token, tiling.begin(t + 1) - token, line,
                      bytes + token * Rows::DIGITS * width,
                      sums + token * Rows::DIGITS * w.groups);
    }
#pragma omp for schedule(static)
    for (size_t task = 0; task < panels * chunking.tiles; ++task) {
      const size_t block = task % panels * panel;
      multiply_panel<BITS>(rows, {bytes, sums}, w, tiling,
                           chunking.begin(task / panels),
                           chunking.begin(task / panels + 1), block,
                           smaller(panel, g.blocks - block), type, out);
    }
  }
}

}  // namespace LOWBIT_ISA
