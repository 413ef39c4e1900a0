// A weight matrix times many rows, by a matrix unit: weights on the left and rows on the right, each split into parts.
#pragma once

#include "project.h"
#include "tiles.h"

namespace {

static_assert(kBlock == kDepth && LANES == kSide, "a block of weights is a row of a tile");
constexpr int64_t kPanel = 1 << 20;  // bytes of weights that are split before they are multiplied

INLINE int32_t blocks_of(const ProjectWork& work) { return (work.D + kBlock - 1) / kBlock; }

// Groups of 16 rows, and for each block of a group three tiles [pair, row, 2].
int64_t split_rows_bytes(const ProjectWork& work) {
  return (work.rows + kSide - 1) / kSide * blocks_of(work) * kParts * kTile;
}

// One group of x. A row behind the last one is the last one again.
void split_rows(const ProjectWork& work, int32_t group, char* to) {
  const int32_t blocks = blocks_of(work);
  alignas(64) char tiles[kParts * kTile];
  for (int32_t b = 0; b < blocks; ++b) {
    const int32_t here = work.D - b * kBlock;
    for (int32_t n = 0; n < kSide; ++n) {
      const int32_t row = group * kSide + n < work.rows ? group * kSide + n : work.rows - 1;
      const float* x = work.x + (int64_t)row * work.D + b * kBlock;
      const Floats low = here >= LANES ? load(x) : load_some(x, here);
      const Floats high = here >= kBlock ? load(x + LANES) : here > LANES ? load_some(x + LANES, here - LANES) : zeros();
      split_block(low, high, tiles + n * 64);
    }
    for (int i = 0; i < kParts; ++i) transpose(tiles + i * kTile, 64, to + ((group * blocks + b) * kParts + i) * kTile);
  }
}

// The weights of one feature, as floats with zeros behind them up to a whole block.
void load_weights(const ProjectWork& work, int64_t feature, float* to) {
  const int32_t D = work.D;
  switch (work.type) {
    case Type::kBFloat16: widen_typed((const BFloat16*)work.weights + feature * D, D, to); break;
    case Type::kFloat16: widen_typed((const Float16*)work.weights + feature * D, D, to); break;
    case Type::kFloat32: memcpy(to, (const float*)work.weights + feature * D, D * sizeof(float)); break;
    default: {  // in blocks
      ProjectWork one = work;
      const int64_t of_scales = feature * (D / kBlock) * sizeof(Float16);
      one.weights = (const char*)work.weights + feature * (work.type == Type::kNibbles ? D / 2 : D);
      one.scales = (const char*)work.scales + of_scales;
      if (work.minima) one.minima = (const char*)work.minima + of_scales;
      one.first = 0, one.last = 1, one.y = to;
      dequantise(one);
    }
  }
  memset(to + D, 0, (blocks_of(work) * kBlock - D) * sizeof(float));
}

// For each block of 16 features three tiles [feature, 32]. A feature behind the last one is the last one again.
void split_weights(const ProjectWork& work, int32_t first, float* rows, char* to) {
  const int32_t blocks = blocks_of(work), width = blocks * kBlock;
  for (int f = 0; f < kSide; ++f) load_weights(work, first + f < work.last ? first + f : work.last - 1, rows + f * width);
  for (int32_t b = 0; b < blocks; ++b) {
    for (int f = 0; f < kSide; ++f) {
      const float* of_block = rows + f * width + b * kBlock;
      split_block(load(of_block), load(of_block + LANES), to + b * kParts * kTile + f * 64);
    }
  }
}

// Weights are split in panels that stay in a core's cache, and each panel meets all rows.
void project_split(const ProjectWork& work) {
  const int32_t blocks = blocks_of(work), groups = (work.rows + kSide - 1) / kSide;
  const int64_t bytes = blocks * kParts * kTile;
  const int32_t most = kPanel / bytes > 2 ? kPanel / bytes / 2 * 2 : 2;  // groups of features
  char* const weights = room_for(most * bytes + kSide * blocks * kBlock * sizeof(float));
  alignas(64) float sums[2 * kSide][2 * kSide];
  alignas(64) Floats turned[kSide];
  configure_tiles();
  for (int32_t first = work.first; first < work.last; first += most * kSide) {
    const int32_t rest = (work.last - first + kSide - 1) / kSide, here = rest < most ? rest : most;
    for (int i = 0; i < here; ++i) {
      split_weights(work, first + i * kSide, (float*)(weights + most * bytes), weights + i * bytes);
    }
    for (int32_t group = 0; group < groups; group += 2) {
      for (int i = 0; i < here; i += 2) {
        const Pair left{weights + i * bytes, i + 1 < here ? bytes : 0, parts_of(work.type)};
        const Pair right{work.split + group * bytes, group + 1 < groups ? bytes : 0, parts_of(work.x_type)};
        multiply_splits(left, right, blocks);
        store_products(sums[0], 2 * kSide);
        for (int tile = 0; tile < 4; ++tile) {
          const int32_t feature = first + (i + tile / 2) * kSide, row = (group + tile % 2) * kSide;
          const int32_t count = work.last - feature < kSide ? work.last - feature : kSide;
          if (count <= 0) continue;
          transpose(&sums[tile / 2 * kSide][tile % 2 * kSide], sizeof sums[0], turned);
          float* y = work.y + (int64_t)row * work.features + feature;
          for (int n = 0; n < kSide && row + n < work.rows; ++n, y += work.features) {
            count == kSide ? store(y, turned[n]) : store_some(y, turned[n], count);
          }
        }
      }
    }
  }
  _tile_release();
}

void project_by_tiles(const ProjectWork& work) { work.split ? project_split(work) : project(work); }

}  // namespace
