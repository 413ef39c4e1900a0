// Products of float matrices by the matrix unit of Intel's server CPUs (AMX).
//
// The unit multiplies bfloat16 numbers exactly, and adds in float32. A float is the sum of three bfloat16 numbers of
// eight bits each: high + middle + low. So the product of two floats is that of their parts. Six products of parts make
// it up; the other three are as small as what float32 rounds away. An infinite number becomes NaN.
#pragma once

#include <immintrin.h>

#include "lanes.h"

namespace {

constexpr int kParts = 3;                      // of a float
constexpr int kDepth = 32;                     // bfloat16 numbers in a row of a tile
constexpr int64_t kTile = kSide * kDepth * 2;  // bytes of a tile

// Room for bytes, aligned for tiles; a thread keeps it for its next call.
INLINE char* room_for(int64_t bytes) {
  static thread_local struct Room {
    char* bytes = nullptr;
    int64_t size = 0;
    ~Room() { operator delete[](bytes, kAlignment); }
  } room;
  if (room.size < bytes) {
    operator delete[](room.bytes, kAlignment);
    room.bytes = nullptr, room.size = 0;
    room.bytes = (char*)operator new[](bytes, kAlignment);
    room.size = bytes;
  }
  return room.bytes;
}

// 32 floats as three rows of bfloat16 numbers, one in a tile of each part. A bfloat16 number is the upper half of a
// float, so each part is what the parts before it have left, cut off. Numbers i and 16 + i become a pair.
INLINE void split_block(Floats low, Floats high, char* to) {
  UNROLL for (int i = 0; i < kParts; ++i) {
    const Words of_low = bits_of<Words>(low) & 0xffff0000, of_high = bits_of<Words>(high) & 0xffff0000;
    const Words pairs = of_low >> 16 | of_high;
    memcpy(to + i * kTile, &pairs, sizeof pairs);
    low -= bits_of<Floats>(of_low), high -= bits_of<Floats>(of_high);
  }
}

// The transpose of 16 rows of 16 numbers of 32 bits. Rows lie `apart` bytes apart, columns become rows of 64 bytes.
INLINE void transpose(const void* from, int64_t apart, void* to) {
  for (int column = 0; column < kSide; column += 4) {
    __m512i rows[4];
    UNROLL for (int i = 0; i < 4; ++i) {
      const auto four = [&](int row) {
        return _mm_load_si128((const __m128i*)((const char*)from + row * apart + column * 4));
      };
      __m512i row = _mm512_castsi128_si512(four(i));
      row = _mm512_inserti32x4(row, four(4 + i), 1);
      row = _mm512_inserti32x4(row, four(8 + i), 2);
      rows[i] = _mm512_inserti32x4(row, four(12 + i), 3);
    }
    const __m512i a = _mm512_unpacklo_epi32(rows[0], rows[1]), b = _mm512_unpacklo_epi32(rows[2], rows[3]);
    const __m512i c = _mm512_unpackhi_epi32(rows[0], rows[1]), d = _mm512_unpackhi_epi32(rows[2], rows[3]);
    __m512i* const columns = (__m512i*)((char*)to + column * 64);
    columns[0] = _mm512_unpacklo_epi64(a, b), columns[1] = _mm512_unpackhi_epi64(a, b);
    columns[2] = _mm512_unpacklo_epi64(c, d), columns[3] = _mm512_unpackhi_epi64(c, d);
  }
}

// The tiles: 0 to 3 have sums, 4 and 5 a part of two left matrices, 6 and 7 a part of two right ones.
INLINE void configure_tiles() {
  // A constant, because some versions of gcc do not know that the instruction reads all of it.
  alignas(64) static constexpr struct {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } tiles;
  _tile_loadconfig(&tiles);
}

INLINE void load_left(const char* left, int64_t next, int part) {
  _tile_loadd(4, left + part * kTile, 64);
  _tile_loadd(5, left + next + part * kTile, 64);
}
INLINE void multiply_right(const char* right, int64_t next, int part) {
  _tile_loadd(6, right + part * kTile, 64);
  _tile_loadd(7, right + next + part * kTile, 64);
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// Two matrices of one side, of which the second lies so far behind the first. Each is a row of blocks, and each block
// its parts: tiles [row, 32] on the left, and [pair, column, 2] on the right. Parts beyond `parts` are zeros.
struct Pair {
  const char* first;
  int64_t next;
  int parts;
};

// How many bfloat16 numbers add up to a number of a type.
INLINE int parts_of(Type type) { return type == Type::kBFloat16 ? 1 : type == Type::kFloat16 ? 2 : kParts; }

// Products of two left matrices with two right ones. The small products are added up first, in all blocks: each addition
// rounds as finely as its sum is small.
INLINE void multiply_splits(Pair left, Pair right, int32_t blocks) {
  __asm__ volatile("" ::: "memory");  // some versions of gcc do not know that tiles read what was written before
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const int64_t size = kParts * kTile, end = blocks * size;
  for (int64_t at = 0; at < end; at += size) {
    for (int part = 0; part < left.parts; ++part) {
      const int first = part == 0;
      if (first >= right.parts) continue;
      load_left(left.first + at, left.next, part);
      for (int other = first; other < right.parts && part + other < kParts; ++other) {
        multiply_right(right.first + at, right.next, other);
      }
    }
  }
  for (int64_t at = 0; at < end; at += size) {
    load_left(left.first + at, left.next, 0);
    multiply_right(right.first + at, right.next, 0);
  }
}

// The four products: [2 left, 16 rows] by [2 right, 16 columns], in rows so far `apart`.
INLINE void store_products(float* to, int64_t apart) {
  _tile_stored(0, to, apart * sizeof(float));
  _tile_stored(1, to + kSide, apart * sizeof(float));
  _tile_stored(2, to + kSide * apart, apart * sizeof(float));
  _tile_stored(3, to + kSide * apart + kSide, apart * sizeof(float));
}

}  // namespace
