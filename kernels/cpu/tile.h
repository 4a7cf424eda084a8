// SPDX-License-Identifier: Apache-2.0
// Integer products of signed bytes with packed unsigned fields.
//
// Weights lie in blocks of 16 channels; along k each block is a row of chunks, and a
// chunk of COLUMNS<BITS> columns takes 8 * BITS * COLUMNS / 4 ... bytes: see Chunk.
// Byte 4 l + i of a Bytes is column 4 s + i of channel l. Activations are packed
// alike: [columns / 4][rows][4].
#pragma once

#include "vector.h"

namespace LOWBIT_ISA {

// How a chunk of packed fields of BITS turns into STEPS Bytes of 4 columns each.
template <int BITS>
struct Chunk;

template <>
struct Chunk<8> {
  static constexpr int STEPS = 1, BYTES = 64;
  static LOWBIT_INLINE void unpack(const uint8_t* p, Bytes* out) { out[0] = load_bytes(p); }
};

template <>
struct Chunk<4> {
  static constexpr int STEPS = 2, BYTES = 64;
  static LOWBIT_INLINE void unpack(const uint8_t* p, Bytes* out) {
    const Bytes x = load_bytes(p);
    out[0] = mask_bytes<15>(x);
    out[1] = mask_bytes<15>(shift_right<4>(x));
  }
};

template <>
struct Chunk<2> {
  static constexpr int STEPS = 4, BYTES = 64;
  static LOWBIT_INLINE void unpack(const uint8_t* p, Bytes* out) {
    const Bytes x = load_bytes(p);
    out[0] = mask_bytes<3>(x);
    out[1] = mask_bytes<3>(shift_right<2>(x));
    out[2] = mask_bytes<3>(shift_right<4>(x));
    out[3] = mask_bytes<3>(shift_right<6>(x));
  }
};

// Four low bits of 16 columns, then their two high bits.
template <>
struct Chunk<6> {
  static constexpr int STEPS = 4, BYTES = 192;
  static LOWBIT_INLINE void unpack(const uint8_t* p, Bytes* out) {
    Chunk<4>::unpack(p, out);
    Chunk<4>::unpack(p + 64, out + 2);
    const Bytes x = load_bytes(p + 128);
    out[0] = or_bytes(out[0], mask_bytes<48>(shift_left<4>(x)));
    out[1] = or_bytes(out[1], mask_bytes<48>(shift_left<2>(x)));
    out[2] = or_bytes(out[2], mask_bytes<48>(x));
    out[3] = or_bytes(out[3], mask_bytes<48>(shift_right<2>(x)));
  }
};

// Two low bits of 32 columns, then their high bit.
template <>
struct Chunk<3> {
  static constexpr int STEPS = 8, BYTES = 192;
  static LOWBIT_INLINE void unpack(const uint8_t* p, Bytes* out) {
    Chunk<2>::unpack(p, out);
    Chunk<2>::unpack(p + 64, out + 4);
    const Bytes x = load_bytes(p + 128);
    out[0] = or_bytes(out[0], mask_bytes<4>(shift_left<2>(x)));
    out[1] = or_bytes(out[1], mask_bytes<4>(shift_left<1>(x)));
    out[2] = or_bytes(out[2], mask_bytes<4>(x));
    out[3] = or_bytes(out[3], mask_bytes<4>(shift_right<1>(x)));
    out[4] = or_bytes(out[4], mask_bytes<4>(shift_right<2>(x)));
    out[5] = or_bytes(out[5], mask_bytes<4>(shift_right<3>(x)));
    out[6] = or_bytes(out[6], mask_bytes<4>(shift_right<4>(x)));
    out[7] = or_bytes(out[7], mask_bytes<4>(shift_right<5>(x)));
  }
};

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
  Sums sums[ROWS][BLOCKS];
  for (int r = 0; r < ROWS; ++r) {
    for (int b = 0; b < BLOCKS; ++b) sums[r][b] = zero_sums();
  }
  for (size_t c = 0; c < chunks; ++c) {
#pragma GCC unroll 8
    for (int b = 0; b < BLOCKS; ++b) {
      const uint8_t* p = w + b * stride + c * C::BYTES;
      // One page ahead: the hardware prefetcher stops at its end.
      __builtin_prefetch(p + 1024);
      Bytes fields[C::STEPS];
      C::unpack(p, fields);
#pragma GCC unroll 8
      for (int s = 0; s < C::STEPS; ++s) {
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
          sums[r][b] =
              dot<BITS>(sums[r][b], fields[s], load_int32(a + 4 * (s * ROWS + r)));
        }
      }
    }
    a += 4 * C::STEPS * ROWS;
  }
  for (int r = 0; r < ROWS; ++r) {
    for (int b = 0; b < BLOCKS; ++b) {
      store_sums(out + 16 * (TILE_BLOCKS * r + b), sums[r][b]);
    }
  }
}

// Unpack a block's chunks to one byte a field, the layout of Chunk<8>.
template <int BITS>
LOWBIT_INLINE void unpack_block(const uint8_t* w, size_t chunks, uint8_t* out) {
  using C = Chunk<BITS>;
  for (size_t c = 0; c < chunks; ++c) {
    Bytes fields[C::STEPS];
    C::unpack(w + c * C::BYTES, fields);
    for (int s = 0; s < C::STEPS; ++s) store_bytes(out + 64 * s, fields[s]);
    out += 64 * C::STEPS;
  }
}

using Tile = void (*)(const int8_t*, const uint8_t*, size_t, size_t, int32_t*);

template <int BITS, int ROWS, int BLOCKS>
void tile_function(const int8_t* a, const uint8_t* w, size_t stride, size_t chunks,
                   int32_t* out) {
  tile<BITS, ROWS, BLOCKS>(a, w, stride, chunks, out);
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
