// SPDX-License-Identifier: Apache-2.0
// Integer products of signed bytes with packed unsigned fields.
//
// Weights lie in blocks of 16 channels; along k a block is a run of chunks (see Chunk).
// Byte 4 l + i of step s is column 4 s + i of channel l. Activations are packed alike:
// [columns / 4][rows][4].
#pragma once

#include "vector.h"

namespace LOWBIT_ISA {

// A chunk holds STEPS Bytes of 4 columns each in BYTES bytes; field<S> unpacks one.
template <int BITS>
struct Chunk;

template <>
struct Chunk<8> {
  static constexpr int STEPS = 1, BYTES = 64;
  template <int S>
  static LOWBIT_INLINE Bytes field(const uint8_t* p) {
    return load_bytes(p);
  }
};

template <>
struct Chunk<4> {
  static constexpr int STEPS = 2, BYTES = 64;
  template <int S>
  static LOWBIT_INLINE Bytes field(const uint8_t* p) {
    return mask_bytes<15>(shift_right<4 * S>(load_bytes(p)));
  }
};

template <>
struct Chunk<2> {
  static constexpr int STEPS = 4, BYTES = 64;
  template <int S>
  static LOWBIT_INLINE Bytes field(const uint8_t* p) {
    return mask_bytes<3>(shift_right<2 * S>(load_bytes(p)));
  }
};

// Four low bits of 16 columns, then their two high bits.
template <>
struct Chunk<6> {
  static constexpr int STEPS = 4, BYTES = 192;
  template <int S>
  static LOWBIT_INLINE Bytes field(const uint8_t* p) {
    const Bytes low = Chunk<4>::field<S % 2>(p + 64 * (S / 2));
    return or_bytes(low, mask_bytes<48>(shift<4 - 2 * S>(load_bytes(p + 128))));
  }
};

// Two low bits of 32 columns, then their high bit.
template <>
struct Chunk<3> {
  static constexpr int STEPS = 8, BYTES = 192;
  template <int S>
  static LOWBIT_INLINE Bytes field(const uint8_t* p) {
    const Bytes low = Chunk<2>::field<S % 4>(p + 64 * (S / 4));
    return or_bytes(low, mask_bytes<4>(shift<2 - S>(load_bytes(p + 128))));
  }
};

// Adds the products of a chunk, step by step: a step's fields of all blocks are live
// together, the activations one at a time.
template <int BITS, int ROWS, int BLOCKS, int S = 0>
LOWBIT_INLINE void tile_steps(const int8_t* a, const uint8_t* p, size_t stride,
                              Sums (&sums)[ROWS][BLOCKS]) {
  Bytes fields[BLOCKS];
#pragma GCC unroll 8
  for (int b = 0; b < BLOCKS; ++b) {
    fields[b] = Chunk<BITS>::template field<S>(p + b * stride);
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
    const int32_t four = load_int32(a + 4 * (S * ROWS + r));
#pragma GCC unroll 8
    for (int b = 0; b < BLOCKS; ++b) {
      sums[r][b] = dot<BITS>(sums[r][b], fields[b], four);
    }
  }
  if constexpr (S + 1 < Chunk<BITS>::STEPS) {
    tile_steps<BITS, ROWS, BLOCKS, S + 1>(a, p, stride, sums);
  }
}

// How far ahead weights are fetched, in each block of a tile or in the one stream of
// them; the hardware does not look beyond a page.
constexpr size_t PREFETCH_BYTES = 1024;
constexpr size_t STREAM_PREFETCH_BYTES = 4096;
// Up to here a tile waits for memory.
constexpr int STREAM_ROWS = 3;

// Fields of some chunks to a byte each, in the order of Chunk<8>.
//   w      first chunk of the first block
//   stride bytes from one block to the next
//   out    [blocks][chunks][STEPS] Bytes
template <int BITS, int S = 0>
LOWBIT_INLINE void unpack_chunk(const uint8_t* w, uint8_t* out) {
  store_bytes(out + 64 * S, Chunk<BITS>::template field<S>(w));
  if constexpr (S + 1 < Chunk<BITS>::STEPS) unpack_chunk<BITS, S + 1>(w, out);
}

template <int BITS>
LOWBIT_INLINE void unpack_blocks(const uint8_t* w, size_t stride, size_t blocks,
                                 size_t chunks, uint8_t* out) {
  using C = Chunk<BITS>;
  for (size_t b = 0; b < blocks; ++b) {
    for (size_t c = 0; c < chunks; ++c, out += 64 * C::STEPS) {
      const uint8_t* from = w + b * stride + c * C::BYTES;
      for (int line = 0; line < C::BYTES; line += 64) {
        __builtin_prefetch(from + line + STREAM_PREFETCH_BYTES);
      }
      unpack_chunk<BITS>(from, out);
    }
  }
}

// One register tile: out[r][16 b + l] = sum over columns of a[r] times channel l of
// block b, modulo 2^32.
//   a      packed activations [columns / 4][ROWS][4]
//   w      first chunk of the first block
//   stride bytes from one block to the next
//   out    rows of 16 * TILE_BLOCKS int32
template <int BITS, int ROWS, int BLOCKS>
LOWBIT_INLINE void tile(const int8_t* a, const uint8_t* w, size_t stride,
                        size_t chunks, int32_t* out) {
  using C = Chunk<BITS>;
  // Unrolled everywhere: an index known only at run time would keep sums in memory.
  Sums sums[ROWS][BLOCKS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
    for (int b = 0; b < BLOCKS; ++b) sums[r][b] = zero_sums();
  }
  for (size_t c = 0; c < chunks; ++c) {
    const uint8_t* p = w + c * C::BYTES;
#pragma GCC unroll 8
    for (int b = 0; b < BLOCKS; ++b) {
      for (int line = 0; line < C::BYTES; line += 64) {
        __builtin_prefetch(p + b * stride + line + PREFETCH_BYTES);
      }
    }
    tile_steps<BITS, ROWS, BLOCKS>(a, p, stride, sums);
    a += 4 * C::STEPS * ROWS;
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
    for (int b = 0; b < BLOCKS; ++b) {
      store_sums(out + 16 * (TILE_BLOCKS * r + b), sums[r][b]);
    }
  }
}

// A tile of few rows, which reads weights faster than it multiplies them: block after
// block, so that memory is one stream, with `SIDES` sums a row in flight.
template <int BITS, int ROWS, int BLOCKS>
LOWBIT_INLINE void stream_tile(const int8_t* a, const uint8_t* w, size_t stride,
                               size_t chunks, int32_t* out) {
  using C = Chunk<BITS>;
  constexpr size_t SIDES = ROWS == 1 ? 4 : 2;
  for (int b = 0; b < BLOCKS; ++b) {
    Sums sums[SIDES][ROWS][1];
#pragma GCC unroll 8
    for (size_t side = 0; side < SIDES; ++side) {
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r) sums[side][r][0] = zero_sums();
    }
    const uint8_t* p = w + b * stride;
    const int8_t* columns = a;
    size_t c = 0;
    for (; c + SIDES <= chunks; c += SIDES) {
#pragma GCC unroll 8
      for (size_t side = 0; side < SIDES; ++side) {
        for (int line = 0; line < C::BYTES; line += 64) {
          __builtin_prefetch(p + line + STREAM_PREFETCH_BYTES);
        }
        tile_steps<BITS, ROWS, 1>(columns, p, 0, sums[side]);
        p += C::BYTES;
        columns += 4 * C::STEPS * ROWS;
      }
    }
    for (; c < chunks; ++c, p += C::BYTES, columns += 4 * C::STEPS * ROWS) {
      tile_steps<BITS, ROWS, 1>(columns, p, 0, sums[0]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      Sums sum = sums[0][r][0];
#pragma GCC unroll 8
      for (size_t side = 1; side < SIDES; ++side) sum = add_sums(sum, sums[side][r][0]);
      store_sums(out + 16 * (TILE_BLOCKS * r + b), sum);
    }
  }
}

using Tile = void (*)(const int8_t*, const uint8_t*, size_t, size_t, int32_t*);

template <int BITS, int ROWS, int BLOCKS>
void tile_function(const int8_t* a, const uint8_t* w, size_t stride, size_t chunks,
                   int32_t* out) {
  if constexpr (ROWS <= STREAM_ROWS) {
    stream_tile<BITS, ROWS, BLOCKS>(a, w, stride, chunks, out);
  } else {
    tile<BITS, ROWS, BLOCKS>(a, w, stride, chunks, out);
  }
}

// The tile of a size known at run time: rows in [1, TILE_ROWS], blocks in
// [1, TILE_BLOCKS].
template <int BITS, int ROWS = TILE_ROWS, int BLOCKS = TILE_BLOCKS>
Tile find_tile(int rows, int blocks) {
  if (rows == ROWS && blocks == BLOCKS) return tile_function<BITS, ROWS, BLOCKS>;
  if constexpr (BLOCKS > 1) {
    if (blocks < BLOCKS) return find_tile<BITS, ROWS, BLOCKS - 1>(rows, blocks);
  }
  if constexpr (ROWS > 1) {
    if (rows < ROWS) return find_tile<BITS, ROWS - 1, BLOCKS>(rows, blocks);
  }
  return nullptr;
}

}  // namespace LOWBIT_ISA
