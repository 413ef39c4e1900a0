// Prefill attention by a matrix unit: a block of queries of one key/value head at a time, over blocks of the slots that
// they see (FlashAttention-2, arXiv 2307.08691).
#pragma once

#include "tiles.h"

namespace {

constexpr float kUnseen = -1e30f;  // the score of a slot that a query does not see
static_assert(kQueries == 2 * kSide && kSlots % (2 * kSide) == 0, "two tiles are multiplied with two");

// Keys are split as [slots / 16, H / 32, part] of tiles [pair of channels, slot, 2], and values behind them as
// [H / 16, slots / 32, part] of tiles [pair of slots, channel, 2]. Slots and channels are rounded up to whole blocks.
struct SplitSizes {
  int32_t key_blocks, value_groups;  // H / 32 and H / 16
  int64_t slot_blocks;               // slots / 32
  int64_t key_bytes, value_bytes;    // of 16 slots, and of 16 channels

  explicit SplitSizes(const PrefillWork& work)
      : key_blocks((work.H + kDepth - 1) / kDepth),
        value_groups((work.H + kSide - 1) / kSide),
        slot_blocks((work.last - work.first + kSlots - 1) / kSlots * (kSlots / kDepth)),
        key_bytes(key_blocks * kParts * kTile),
        value_bytes(slot_blocks * kParts * kTile) {}
  int32_t channels() const { return (value_groups + 1) / 2 * 2 * kSide; }  // of a result, rounded up to two tiles
  int64_t keys() const { return 2 * slot_blocks * key_bytes; }
  int64_t bytes() const { return keys() + value_groups * value_bytes; }
};

int64_t prefill_bytes(const PrefillWork& work) { return SplitSizes(work).bytes(); }

// 32 slots of keys or values as floats [32, width], with zeros for slots and channels that there are not.
template <class T>
void load_slots(const PrefillWork& work, const void* from, const float* scales, int32_t first, int32_t width,
                float* to) {
  memset(to, 0, kDepth * width * sizeof(float));
  for (int n = 0; n < kDepth && first + n < work.last; ++n) {
    const int64_t slot = first + n;
    float* const row = to + n * width;
    widen_typed((const T*)from + slot * work.H, work.H, row);
    for (int32_t h = 0; scales && h < work.H; ++h) row[h] *= scales[slot];
  }
}

void load_slots(const PrefillWork& work, const void* from, const float* scales, int32_t first, int32_t width,
                float* to) {
  switch (work.type) {
    case Type::kBFloat16: return load_slots<BFloat16>(work, from, scales, first, width, to);
    case Type::kFloat16: return load_slots<Float16>(work, from, scales, first, width, to);
    case Type::kBytes: return load_slots<int8_t>(work, from, scales, first, width, to);
    default: return load_slots<float>(work, from, scales, first, width, to);
  }
}

// Splits keys and values of 32 slots.
void split_some_slots(const PrefillWork& work, int32_t block) {
  const SplitSizes sizes(work);
  const int32_t width = sizes.key_blocks * kDepth, first = work.first + block * kDepth;
  float* const rows = (float*)room_for(kDepth * width * sizeof(float));
  alignas(64) char tiles[kParts * kTile];
  load_slots(work, work.keys, work.key_scales, first, width, rows);
  for (int group = 0; group < 2; ++group) {
    char* const to = work.split + (2 * block + group) * sizes.key_bytes;
    for (int32_t b = 0; b < sizes.key_blocks; ++b) {
      for (int n = 0; n < kSide; ++n) {
        const float* row = rows + (group * kSide + n) * width + b * kDepth;
        split_block(load(row), load(row + LANES), tiles + n * 64);
      }
      for (int i = 0; i < kParts; ++i) transpose(tiles + i * kTile, 64, to + (b * kParts + i) * kTile);
    }
  }
  load_slots(work, work.values, work.value_scales, first, width, rows);
  for (int32_t group = 0; group < sizes.value_groups; ++group) {
    char* const to = work.split + sizes.keys() + group * sizes.value_bytes + block * kParts * kTile;
    for (int pair = 0; pair < kSide; ++pair) {
      const float* row = rows + pair * width + group * kSide;
      split_block(load(row), load(row + kSide * width), to + pair * 64);
    }
  }
}

void split_slots(const PrefillWork& work, int32_t block) {
  for (int i = 0; i < kSlots / kDepth; ++i) split_some_slots(work, kSlots / kDepth * block + i);
}

// 32 queries, and what they have read so far. Query i of a head is that of token i / G and of head i % G of the group.
struct Queries {
  char* split;  // [2, H / 32, part] of tiles [query, 32]
  float* out;   // [32, channels], the sum of exp(score - peak) * value
  float peak[kQueries], total[kQueries];
  int32_t position[kQueries];
};

// Room for the products of a block of slots, which queries use in turn.
struct Scratch {
  alignas(64) float scores[kQueries][kSlots];
  float shrink[kQueries];
  char* weights;    // [2, slots / 32, part] of tiles [query, 32]
  float* products;  // [32, channels]
};

void load_queries(const PrefillWork& work, const SplitSizes& sizes, int32_t first, Queries* to) {
  const int32_t H = work.H, count = work.T * work.G;
  const float scale = 1 / sqrtf((float)H);
  for (int n = 0; n < kQueries; ++n) {
    const int32_t i = first + n < count ? first + n : count - 1, token = i / work.G;
    const float* query = work.q + ((int64_t)token * work.N + i % work.G) * H;
    to->position[n] = work.start + token, to->peak[n] = kUnseen, to->total[n] = 0;
    for (int32_t b = 0; b < sizes.key_blocks; ++b) {
      Floats half[2];
      for (int k = 0; k < 2; ++k) {
        const int32_t h = b * kDepth + k * kSide, left = H - h;
        half[k] = left >= kSide ? load(query + h) : left > 0 ? load_some(query + h, left) : zeros();
      }
      char* const tile = to->split + (n / kSide * sizes.key_blocks + b) * kParts * kTile;
      split_block(half[0] * scale, half[1] * scale, tile + n % kSide * 64);
    }
  }
  memset(to->out, 0, kQueries * sizes.channels() * sizeof(float));
}

// Scores become weights exp(score - peak), with the peak so far.
INLINE void weigh(const PrefillWork& work, int32_t first, Queries* queries, Scratch* scratch) {
  const int32_t lowest = queries->position[0], highest = queries->position[kQueries - 1], window = work.window;
  const bool all_see = first + kSlots - 1 <= lowest && first + kSlots <= work.last &&
                       (window < 0 || first > highest - window);
  Ints numbers;
  for (int k = 0; k < LANES; ++k) numbers[k] = k;
  for (int n = 0; n < kQueries; ++n) {
    float* const scores = scratch->scores[n];
    Floats best = all(kUnseen);
    for (int s = 0; s < kSlots; s += LANES) {
      if (!all_see) {
        const Ints slot = numbers + (first + s);
        Ints is_seen = (slot <= queries->position[n]) & (slot < work.last);
        if (window >= 0) is_seen &= slot > queries->position[n] - window;
        store(scores + s, pick(is_seen, load(scores + s), all(kUnseen)));
      }
      best = larger(load(scores + s), best);
    }
    const float found = largest(best), peak = found > queries->peak[n] ? found : queries->peak[n];
    scratch->shrink[n] = expf(queries->peak[n] - peak);
    queries->peak[n] = peak;
    Floats summed = zeros();
    for (int s = 0; s < kSlots; s += kDepth) {
      const Floats low = exponential(load(scores + s) - peak), high = exponential(load(scores + s + LANES) - peak);
      summed += low + high;
      char* const tile = scratch->weights + (n / kSide * (kSlots / kDepth) + s / kDepth) * kParts * kTile;
      split_block(low, high, tile + n % kSide * 64);
    }
    queries->total[n] = queries->total[n] * scratch->shrink[n] + sum(summed);
  }
}

// Attention of 32 queries to the slots [first, first + 128) beside what they have read before.
void attend_slots(const PrefillWork& work, const SplitSizes& sizes, int32_t first, Queries* queries, Scratch* scratch) {
  const int64_t block = (first - work.first) / kDepth;  // of 32 slots
  const char* const keys = work.split + 2 * block * sizes.key_bytes;
  const char* const values = work.split + sizes.keys() + block * kParts * kTile;
  for (int s = 0; s < kSlots; s += 2 * kSide) {
    const Pair of_keys{keys + s / kSide * sizes.key_bytes, sizes.key_bytes, parts_of(work.type)};
    multiply_splits({queries->split, sizes.key_bytes, kParts}, of_keys, sizes.key_blocks);
    store_products(&scratch->scores[0][s], kSlots);
  }
  weigh(work, first, queries, scratch);
  const int32_t channels = sizes.channels();
  for (int32_t group = 0; group < sizes.value_groups; group += 2) {
    const int64_t next = group + 1 < sizes.value_groups ? sizes.value_bytes : 0;
    const Pair of_values{values + group * sizes.value_bytes, next, parts_of(work.type)};
    multiply_splits({scratch->weights, kSlots / kDepth * kParts * kTile, kParts}, of_values, kSlots / kDepth);
    store_products(scratch->products + group * kSide, channels);
  }
  for (int n = 0; n < kQueries; ++n) {
    for (int32_t h = n * channels; h < (n + 1) * channels; h += LANES) {
      store(queries->out + h, load(queries->out + h) * scratch->shrink[n] + load(scratch->products + h));
    }
  }
}

// Attention of the head's queries [32 * block, 32 * (block + count)), `count` being at most kMostBlocks. They take turns at
// each block of slots, so that a core reads it from its own cache but once.
void attend_queries(const PrefillWork& work, int32_t block, int32_t count) {
  const SplitSizes sizes(work);
  const int64_t split = 2 * sizes.key_bytes, out = kQueries * sizes.channels() * sizeof(float);
  const int64_t weights = 2 * (kSlots / kDepth) * kParts * kTile;
  char* room = room_for(count * (split + out) + weights + out);
  Scratch scratch;
  scratch.weights = room, scratch.products = (float*)(room + weights);
  room += weights + out;
  Queries queries[kMostBlocks];
  for (int32_t i = 0; i < count; ++i, room += split + out) {
    queries[i].split = room, queries[i].out = (float*)(room + split);
    load_queries(work, sizes, (block + i) * kQueries, &queries[i]);
  }
  configure_tiles();
  for (int32_t first = work.first; first < work.last; first += kSlots) {
    for (int32_t i = 0; i < count; ++i) {
      const int32_t lowest = queries[i].position[0], highest = queries[i].position[kQueries - 1];
      const bool is_seen = first <= highest && (work.window < 0 || first + kSlots > lowest - work.window + 1);
      if (is_seen) attend_slots(work, sizes, first, &queries[i], &scratch);
    }
  }
  _tile_release();
  for (int32_t n = 0; n < count * kQueries && block * kQueries + n < work.T * work.G; ++n) {
    const Queries& of_query = queries[n / kQueries];
    const int32_t i = block * kQueries + n, token = i / work.G, g = i % work.G, row = n % kQueries;
    const float total = of_query.total[row] == 0 ? 1 : of_query.total[row];  // 0 if no block was read
    float* const to = work.out + ((int64_t)token * work.N + g) * work.H;
    for (int32_t h = 0; h < work.H; ++h) to[h] = of_query.out[row * sizes.channels() + h] / total;
    work.log_total[(int64_t)g * work.T + token] = of_query.peak[row] + logf(total);
  }
}

}  // namespace
