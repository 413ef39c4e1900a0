// Decode attention over some slots of one key/value head, for all query heads that read them.
#pragma once

#include "lanes.h"

namespace {

// Starts to fetch rows that are read after number i. The first line of a row brings its neighbour too.
template <class T>
INLINE void fetch(const AttendWork& work, const T* rows, const float* scales, int32_t i) {
  const int64_t far = work.slots[i + kFar];
  __builtin_prefetch(rows + far * work.H);
  if (scales) __builtin_prefetch(scales + far);
  const char* row = (const char*)(rows + (int64_t)work.slots[i + kAhead] * work.H);
  for (int64_t byte = 64; byte < (int64_t)(work.H * sizeof(T)); byte += 64) __builtin_prefetch(row + byte);
}

// Scores of the heads [g, g + HEADS) with every slot. A key is read once, four keys at a time.
template <class T, int HEADS>
void score(const AttendWork& work, int g, float scale) {
  const T* keys = (const T*)work.keys;
  const int32_t H = work.H, whole = H / LANES * LANES, rest = H - whole;
  const float* q = work.q + g * H;
  float* scores = work.scores + (int64_t)g * work.stride;
  for (int32_t i = 0; i < work.count; i += 4) {
    const T* rows[4];
    Quad factors = Quad{} + scale;
    UNROLL for (int k = 0; k < 4; ++k) {
      const int64_t slot = work.slots[i + k];
      rows[k] = keys + slot * H;
      if (work.key_scales) factors[k] *= work.key_scales[slot];
    }
    for (int k = 0; k < 4; ++k) fetch(work, keys, work.key_scales, i + k);
    Floats totals[HEADS][4];
    UNROLL for (int n = 0; n < HEADS; ++n) {
      UNROLL for (int k = 0; k < 4; ++k) totals[n][k] = zeros();
    }
    for (int32_t h = 0; h < whole; h += LANES) {
      Floats part[4];
      UNROLL for (int k = 0; k < 4; ++k) part[k] = load(rows[k] + h);
      UNROLL for (int n = 0; n < HEADS; ++n) {
        const Floats of_query = load(q + n * H + h);
        UNROLL for (int k = 0; k < 4; ++k) totals[n][k] += part[k] * of_query;
      }
    }
    if (rest) {
      UNROLL for (int n = 0; n < HEADS; ++n) {
        const Floats of_query = load_some(q + n * H + whole, rest);
        UNROLL for (int k = 0; k < 4; ++k) totals[n][k] += load_some(rows[k] + whole, rest) * of_query;
      }
    }
    UNROLL for (int n = 0; n < HEADS; ++n) {
      const Quad four = sums(totals[n][0], totals[n][1], totals[n][2], totals[n][3]) * factors;
      memcpy(scores + (int64_t)n * work.stride + i, &four, sizeof four);
    }
  }
}

// The scores of one head become weights: exp(score - peak).
void weigh(float* scores, int32_t count, float* stats) {
  float total = 0;
  int32_t i = 0;
  Floats best = all(-INFINITY), scored = zeros(), summed = zeros();
  for (; i + LANES <= count; i += LANES) {
    const Floats x = load(scores + i);
    best = larger(x, best);
    scored += x;
  }
  float peak = largest(best), total_score = sum(scored);
  for (; i < count; ++i) {
    peak = scores[i] > peak ? scores[i] : peak;
    total_score += scores[i];
  }
  for (i = 0; i + LANES <= count; i += LANES) {
    const Floats weight = exponential(load(scores + i) - peak);
    store(scores + i, weight);
    summed += weight;
  }
  if (i < count) {
    float some[LANES];
    store(some, exponential(load_some(scores + i, count - i) - peak));
    memcpy(scores + i, some, (count - i) * sizeof(float));
    for (int32_t k = 0; k < count - i; ++k) total += some[k];
  }
  stats[0] = peak, stats[1] = total + sum(summed), stats[2] = total_score;
}

// Weighted sums of values, for the heads [g, g + HEADS) and VECTORS vectors from h on.
template <class T, int HEADS, int VECTORS>
void add_values(const AttendWork& work, int g, int32_t h) {
  const T* values = (const T*)work.values + h;
  const float* weights = work.scores + (int64_t)g * work.stride;
  Floats sums[HEADS][VECTORS];
  UNROLL for (int n = 0; n < HEADS; ++n) {
    UNROLL for (int v = 0; v < VECTORS; ++v) sums[n][v] = zeros();
  }
  for (int32_t i = 0; i < work.count; ++i) {
    const T* row = values + (int64_t)work.slots[i] * work.H;
    if (h == 0) fetch(work, (const T*)work.values, work.value_scales, i);
    Floats value[VECTORS];
    UNROLL for (int v = 0; v < VECTORS; ++v) value[v] = load(row + v * LANES);
    UNROLL for (int n = 0; n < HEADS; ++n) {
      const Floats weight = all(weights[(int64_t)n * work.stride + i]);
      UNROLL for (int v = 0; v < VECTORS; ++v) sums[n][v] += weight * value[v];
    }
  }
  UNROLL for (int n = 0; n < HEADS; ++n) {
    UNROLL for (int v = 0; v < VECTORS; ++v) store(work.out + (g + n) * work.H + h + v * LANES, sums[n][v]);
  }
}

template <class T, int HEADS>
void add_rest_of_values(const AttendWork& work, int g, int32_t h) {
  const int32_t rest = work.H - h;
  const float* weights = work.scores + (int64_t)g * work.stride;
  Floats sums[HEADS];
  UNROLL for (int n = 0; n < HEADS; ++n) sums[n] = zeros();
  for (int32_t i = 0; i < work.count; ++i) {
    const Floats value = load_some((const T*)work.values + (int64_t)work.slots[i] * work.H + h, rest);
    UNROLL for (int n = 0; n < HEADS; ++n) sums[n] += value * weights[(int64_t)n * work.stride + i];
  }
  UNROLL for (int n = 0; n < HEADS; ++n) store_some(work.out + (g + n) * work.H + h, sums[n], rest);
}

// Four heads at most are computed together, because a CPU has too few registers for more.
template <class T, int HEADS>
void attend_heads(const AttendWork& work, int g) {
  constexpr int kVectors = LANES == 16 ? 4 : 2;
  score<T, HEADS>(work, g, 1 / sqrtf((float)work.H));
  float* const scores = work.scores + (int64_t)g * work.stride;
  for (int n = 0; n < HEADS; ++n) weigh(scores + (int64_t)n * work.stride, work.count, work.stats + 3 * (g + n));
  for (int32_t i = 0; work.value_scales && i < work.count; ++i) {
    const float of_slot = work.value_scales[work.slots[i]];
    for (int n = 0; n < HEADS; ++n) scores[(int64_t)n * work.stride + i] *= of_slot;
  }
  int32_t h = 0;
  for (; h + kVectors * LANES <= work.H; h += kVectors * LANES) add_values<T, HEADS, kVectors>(work, g, h);
  for (; h + LANES <= work.H; h += LANES) add_values<T, HEADS, 1>(work, g, h);
  if (h < work.H) add_rest_of_values<T, HEADS>(work, g, h);
}

template <class T>
void attend_typed(const AttendWork& work) {
  int g = 0;
  for (; work.G - g > 4; g += 4) attend_heads<T, 4>(work, g);
  switch (work.G - g) {
    case 1: return attend_heads<T, 1>(work, g);
    case 2: return attend_heads<T, 2>(work, g);
    case 3: return attend_heads<T, 3>(work, g);
    default: return attend_heads<T, 4>(work, g);
  }
}

void attend(const AttendWork& work) {
  switch (work.type) {
    case Type::kBFloat16: return attend_typed<BFloat16>(work);
    case Type::kFloat16: return attend_typed<Float16>(work);
    case Type::kBytes: return attend_typed<int8_t>(work);
    default: return attend_typed<float>(work);
  }
}

template <class T>
float dot(const float* q, const T* key, int32_t H) {
  Floats total = zeros();
  int32_t h = 0;
  for (; h + LANES <= H; h += LANES) total += load(q + h) * load(key + h);
  if (h < H) total += load_some(q + h, H - h) * load_some(key + h, H - h);
  return sum(total);
}

constexpr float kMasked = -1e30f;  // the upper bound of a head without a tail

INLINE float clip(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

// kernels/tail.py defines the tail and names the terms.
template <class T>
void add_tail(const MergeWork& work, float log_total, float mean_score) {
  const T *keys = (const T*)work.tail_keys, *values = (const T*)work.tail_values;
  const int32_t H = work.H;
  const float scale = 1 / sqrtf((float)H), *terms = work.terms, *shifts = terms + 6;
  float weight = terms[0] + dot(work.q, keys, H) * scale + terms[1] * log_total + terms[2] * mean_score;
  weight = clip(weight, terms[3], terms[4]) + logf((float)(work.num_seen - work.num_read));
  const float share = 1 / (1 + expf(log_total - weight));
  for (int32_t h = 0; h < H; ++h) work.result[h] *= 1 + share * (terms[5] - 1);
  for (int32_t i = 0; i <= work.rank; ++i) {
    const float feature =
        i == 0 ? 1.0f : clip(dot(work.q, keys + (int64_t)i * H, H) * scale - shifts[i - 1], -2.5f, 2.5f);
    for (int32_t h = 0; h < H; ++h) work.result[h] += share * feature * to_float(values[(int64_t)i * H + h]);
  }
}

void merge(const MergeWork& work) {
  const bool reads = work.num_read > 0;  // else the tail, if there is one, stands for everything
  float peak = reads ? -INFINITY : kMasked, total = reads ? 0 : 1, total_score = 0;
  for (int32_t part = 0; reads && part < work.parts; ++part) {
    const float of_part = work.stats[(int64_t)part * work.stats_stride];
    peak = of_part > peak ? of_part : peak;
  }
  memset(work.result, 0, work.H * sizeof(float));
  for (int32_t part = 0; reads && part < work.parts; ++part) {
    const float *stats = work.stats + (int64_t)part * work.stats_stride, *out = work.out + (int64_t)part * work.out_stride;
    const float factor = stats[0] == peak ? 1.0f : expf(stats[0] - peak);
    total += factor * stats[1];
    total_score += stats[2];
    for (int32_t h = 0; h < work.H; ++h) work.result[h] += factor * out[h];
  }
  for (int32_t h = 0; h < work.H; ++h) work.result[h] /= total;
  const float log_total = peak + logf(total), mean_score = reads ? total_score / work.num_read : 0;
  if (work.found) work.found[0] = log_total, work.found[1] = mean_score;
  if (work.rank < 0 || work.num_read >= work.num_seen || work.terms[4] <= kMasked) return;
  switch (work.type) {
    case Type::kBFloat16: return add_tail<BFloat16>(work, log_total, mean_score);
    case Type::kFloat16: return add_tail<Float16>(work, log_total, mean_score);
    default: return add_tail<float>(work, log_total, mean_score);
  }
}

}  // namespace
