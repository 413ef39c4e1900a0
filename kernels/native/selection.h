// The choice of critical tokens: scores of the slots that compete, their weights, and the list of the highest weights.
#pragma once

#include "lanes.h"

namespace {

constexpr int kMostHeads = 4;  // heads that are scored together

// Scores of the heads [g, g + HEADS) by labels in rows [R, S]: floats, or codes of one byte, or two codes a byte.
template <class T, int HEADS, bool NIBBLES>
void score_labels(const SelectWork& work, int g, const float* query, float* scores, int64_t stride) {
  const T* labels = (const T*)work.labels;
  const int32_t rows = NIBBLES ? (work.R + 1) / 2 : work.R, count = work.last - work.first;
  for (int32_t i = 0; i < count; i += LANES) {
    const int32_t here = count - i < LANES ? count - i : LANES;
    const T* column = labels + work.first + i;
    Floats sums[HEADS];
    for (int n = 0; n < HEADS; ++n) sums[n] = zeros();
    for (int32_t r = 0; r < rows; ++r) {
      const T* from = column + r * work.S;
      if constexpr (NIBBLES) {
        Floats low, high;
        widen_nibbles(here == LANES ? read<Bytes>(from) : read_some(from, here), &low, &high);
        for (int n = 0; n < HEADS; ++n) {
          const float* of_head = query + (g + n) * 2 * rows;
          sums[n] += low * of_head[r];
          sums[n] += high * of_head[rows + r];
        }
      } else {
        const Floats label = here == LANES ? load(from) : load_some(from, here);
        for (int n = 0; n < HEADS; ++n) sums[n] += label * query[(g + n) * rows + r];
      }
    }
    for (int n = 0; n < HEADS; ++n) store(scores + (g + n) * stride + i, sums[n]);
  }
}

template <class T, bool NIBBLES>
void score_all_labels(const SelectWork& work, const float* query, float* scores, int64_t stride) {
  int g = 0;
  for (; work.G - g >= kMostHeads; g += kMostHeads) score_labels<T, kMostHeads, NIBBLES>(work, g, query, scores, stride);
  switch (work.G - g) {
    case 3: return score_labels<T, 3, NIBBLES>(work, g, query, scores, stride);
    case 2: return score_labels<T, 2, NIBBLES>(work, g, query, scores, stride);
    case 1: return score_labels<T, 1, NIBBLES>(work, g, query, scores, stride);
  }
}

// A score by codes c becomes the score by labels offset + step * c.
template <class T>
void unquantise(const SelectWork& work, float* scores, int64_t stride) {
  const T *offsets = (const T*)work.scales + work.first, *steps = offsets + work.S;
  const int32_t count = work.last - work.first;
  for (int g = 0; g < work.G; ++g) {
    float total = 0, *of_head = scores + g * stride;
    for (int32_t r = 0; r < work.R; ++r) total += work.query[g * work.R + r];
    for (int32_t i = 0; i < count; i += LANES) {
      const int32_t here = count - i < LANES ? count - i : LANES;
      const Floats offset = here == LANES ? load(offsets + i) : load_some(offsets + i, here);
      const Floats step = here == LANES ? load(steps + i) : load_some(steps + i, here);
      store(of_head + i, load(of_head + i) * step + offset * total);
    }
  }
}

template <class T>
void score_keys(const SelectWork& work, float* scores, int64_t stride) {
  const int32_t H = work.R, whole = H / LANES * LANES;
  const float* const scales = (const float*)work.scales;  // of keys in 8 bits
  for (int32_t i = 0; i < work.last - work.first; ++i) {
    const T* key = (const T*)work.labels + (int64_t)(work.first + i) * H;
    for (int g = 0; g < work.G; ++g) {
      const float* q = work.query + g * H;
      Floats total = zeros();
      for (int32_t h = 0; h < whole; h += LANES) total += load(key + h) * load(q + h);
      if (whole < H) total += load_some(key + whole, H - whole) * load_some(q + whole, H - whole);
      scores[g * stride + i] = sum(total) * work.scale * (scales ? scales[work.first + i] : 1);
    }
  }
}

void score_slots(const SelectWork& work, const float* query, float* scores, int64_t stride) {
  if (work.by_keys) {
    switch (work.type) {
      case Type::kBFloat16: return score_keys<BFloat16>(work, scores, stride);
      case Type::kFloat16: return score_keys<Float16>(work, scores, stride);
      case Type::kBytes: return score_keys<int8_t>(work, scores, stride);
      default: return score_keys<float>(work, scores, stride);
    }
  }
  switch (work.type) {
    case Type::kBFloat16: return score_all_labels<BFloat16, false>(work, query, scores, stride);
    case Type::kFloat16: return score_all_labels<Float16, false>(work, query, scores, stride);
    case Type::kFloat32: return score_all_labels<float, false>(work, query, scores, stride);
    case Type::kBytes: score_all_labels<uint8_t, false>(work, query, scores, stride); break;
    case Type::kNibbles: score_all_labels<uint8_t, true>(work, query, scores, stride); break;
  }
  switch (work.scale_type) {
    case Type::kBFloat16: return unquantise<BFloat16>(work, scores, stride);
    case Type::kFloat16: return unquantise<Float16>(work, scores, stride);
    default: return unquantise<float>(work, scores, stride);
  }
}

// Adds the softmax of one head's scores to the weights. Scores and weights have room for whole vectors.
void add_softmax(float* scores, float* weights, int32_t count) {
  Floats best = all(-INFINITY), summed = zeros();
  for (int32_t i = count; i % LANES; ++i) scores[i] = -INFINITY;
  for (int32_t i = 0; i < count; i += LANES) best = larger(load(scores + i), best);
  const float peak = largest(best);
  for (int32_t i = 0; i < count; i += LANES) {
    const Floats weight = exponential(load(scores + i) - peak);
    store(scores + i, weight);
    summed += weight;
  }
  const float factor = 1 / sum(summed);
  for (int32_t i = 0; i < count; i += LANES) store(weights + i, load(weights + i) + load(scores + i) * factor);
}

// Lists the slots of the `wanted` highest weights, ascending; ties go to the lower slot. Weights are not NaN.
void list_highest(const float* weights, int32_t* order, int32_t count, int32_t wanted, int32_t first, int32_t* list) {
  // Whole numbers in the order of the weights: sign and magnitude become two's complement, and both zeros are one.
  for (int32_t i = 0; i < count; i += LANES) {
    const Ints bits = read<Ints>(weights + i);
    const Ints flipped = bits_of<Ints>(0x80000000u - bits_of<Words>(bits));
    const Ints is_negative = bits < 0, ordered = (is_negative & flipped) | (~is_negative & bits);
    memcpy(order + i, &ordered, sizeof ordered);
  }
  for (int32_t i = count; i % LANES; ++i) order[i] = INT32_MIN;  // the place of no weight
  // The wanted-highest number, bit by bit: the greatest that at least `wanted` numbers reach.
  int64_t threshold = INT32_MIN;
  for (int bit = 31; bit >= 0; --bit) {
    const int64_t higher = threshold + (int64_t{1} << bit);
    const int32_t limit = (int32_t)higher;
    Ints reached = Ints{};
    for (int32_t i = 0; i < count; i += LANES) reached -= read<Ints>(order + i) >= limit;
    const int32_t num_reached = total(reached);
    if (num_reached >= wanted) threshold = higher;
    if (num_reached == wanted) break;
  }
  const int32_t least = (int32_t)threshold;
  Ints above = Ints{};
  for (int32_t i = 0; i < count; i += LANES) above -= read<Ints>(order + i) > least;
  int32_t room = wanted - total(above);  // for slots tied at the threshold
  int32_t at = 0;
#if LANES == 16
  const __m512i step = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int32_t i = 0; i < count && at < wanted; i += LANES) {
    const __m512i here = _mm512_loadu_si512(order + i);
    uint32_t chosen = _mm512_cmpgt_epi32_mask(here, _mm512_set1_epi32(least));
    uint32_t tied = _mm512_cmpeq_epi32_mask(here, _mm512_set1_epi32(least));
    for (; tied && room > 0; tied &= tied - 1, --room) chosen |= tied & -tied;
    if (!chosen) continue;
    const int32_t number = __builtin_popcount(chosen);  // packed in a register, because some CPUs pack into memory slowly
    const __m512i packed = _mm512_maskz_compress_epi32(chosen, _mm512_add_epi32(_mm512_set1_epi32(first + i), step));
    _mm512_mask_storeu_epi32(list + at, (1u << number) - 1, packed);
    at += number;
  }
#else
  for (int32_t i = 0; i < count && at < wanted; ++i) {
    const int32_t is_tied = (order[i] == least) & (room > 0);
    room -= is_tied;
    list[at] = first + i;
    at += (order[i] > least) | is_tied;
  }
#endif
}

void choose(const SelectWork& work) {
  const int32_t count = work.last > work.first ? work.last - work.first : 0;
  int32_t wanted = work.num_allowed < work.C ? work.num_allowed : work.C;
  wanted = wanted < 0 ? 0 : wanted < count ? wanted : count;
  if (wanted == count) {  // no score decides
    for (int32_t i = 0; i < wanted; ++i) work.list[i] = work.first + i;
  } else if (wanted > 0) {
    const int64_t stride = count + 2 * LANES;
    float *scores = work.scratch, *weights = scores + work.G * stride, *padded = weights + stride;
    // Two codes share a byte, so an odd number of channels leaves half a byte, whose channel weighs nothing.
    const int32_t half = (work.R + 1) / 2;
    const float* query = work.query;
    if (work.type == Type::kNibbles) {
      for (int g = 0; g < work.G; ++g) {
        for (int32_t r = 0; r < 2 * half; ++r) padded[g * 2 * half + r] = r < work.R ? query[g * work.R + r] : 0;
      }
      query = padded;
    }
    score_slots(work, query, scores, stride);
    if (work.G == 1) {
      weights = scores;
    } else {
      memset(weights, 0, stride * sizeof(float));
      for (int g = 0; g < work.G; ++g) add_softmax(scores + g * stride, weights, count);
    }
    if (work.dilate) {
      for (int32_t i = count - 1; i > 0; --i) weights[i] = weights[i] > weights[i - 1] ? weights[i] : weights[i - 1];
    }
    list_highest(weights, (int32_t*)weights, count, wanted, work.first, work.list);
  }
  for (int32_t i = wanted; i < work.C; ++i) work.list[i] = -1;
}

}  // namespace
