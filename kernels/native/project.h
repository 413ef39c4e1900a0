// A weight matrix times a few rows. The weights are floats, or numbers of 4 or 8 bits in blocks that share a scale.
#pragma once

#include "lanes.h"

namespace {

constexpr int kBlock = 32;  // neighbouring weights of a row that share a scale
constexpr int kRows = LANES == 16 ? 8 : 4;  // rows that are multiplied together: as many as the registers hold

// FEATURES rows of float weights, from `feature` on and so far `apart`, with ROWS rows of x. They lie far apart because a
// CPU fetches several streams by itself while it computes; of a single one it would wait for the memory.
template <class T, int ROWS, int FEATURES>
void multiply(const ProjectWork& work, const float* x, int32_t feature, int32_t apart, float* y) {
  const T* weights = (const T*)work.weights + (int64_t)feature * work.D;
  const int32_t D = work.D, whole = D / LANES * LANES;
  Floats sums_of[FEATURES][ROWS];
  for (int f = 0; f < FEATURES; ++f) {
    for (int r = 0; r < ROWS; ++r) sums_of[f][r] = zeros();
  }
  for (int32_t d = 0; d < whole; d += LANES) {
    Floats weight[FEATURES];
    for (int f = 0; f < FEATURES; ++f) {
      weight[f] = load(weights + (int64_t)f * apart * D + d);
      __builtin_prefetch(weights + ((int64_t)f * apart + 1) * D + d);  // of the next feature
    }
    for (int r = 0; r < ROWS; ++r) {
      const Floats of_row = load(x + (int64_t)r * D + d);
      for (int f = 0; f < FEATURES; ++f) sums_of[f][r] += weight[f] * of_row;
    }
  }
  if (whole < D) {
    for (int f = 0; f < FEATURES; ++f) {
      const Floats weight = load_some(weights + (int64_t)f * apart * D + whole, D - whole);
      for (int r = 0; r < ROWS; ++r) sums_of[f][r] += weight * load_some(x + (int64_t)r * D + whole, D - whole);
    }
  }
  for (int f = 0; f < FEATURES; ++f) {
    for (int r = 0; r < ROWS; ++r) y[(int64_t)r * work.features + feature + f * apart] = sum(sums_of[f][r]);
  }
}

// The weights of one block, code * scale + minimum, from its codes.
struct Nibbles {  // a byte holds the code of place i in its low bits, that of place 16 + i in its high bits
  static constexpr int kBytes = kBlock / 2;
};
struct Int8 {
  static constexpr int kBytes = kBlock;
};
INLINE void load_block(Nibbles, const uint8_t* codes, float scale, float minimum, Floats* weights) {
#if LANES == 16
  // There are sixteen weights at most, so a code picks its weight from a vector of them. Only its low bits count.
  const __m512 of_codes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512 of_block = (__m512)((Floats)of_codes * scale + minimum);
  const __m512i wide = _mm512_cvtepu8_epi32((__m128i)read<Sixteen>(codes));
  weights[0] = (Floats)_mm512_permutexvar_ps(wide, of_block);
  weights[1] = (Floats)_mm512_permutexvar_ps(_mm512_srli_epi32(wide, 4), of_block);
#else
  const Sixteen bytes = read<Sixteen>(codes);
  widen_sixteen(bytes & 15, weights);
  widen_sixteen(bytes >> 4, weights + 16 / LANES);
  for (int p = 0; p < kBlock / LANES; ++p) weights[p] = weights[p] * scale + minimum;
#endif
}
INLINE void load_block(Int8, const uint8_t* codes, float scale, float minimum, Floats* weights) {
  for (int half = 0; half < 2; ++half) {
    Floats* to = weights + half * (16 / LANES);
#if LANES == 16
    to[0] = (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)read<Sixteen>(codes + 16 * half)));
#else
    widen_sixteen(read<Sixteen>(codes + 16 * half) ^ 0x80, to);  // from [-128, 127] to [0, 255]
    for (int p = 0; p < 16 / LANES; ++p) to[p] -= 128.0f;
#endif
  }
  for (int p = 0; p < kBlock / LANES; ++p) weights[p] = weights[p] * scale + minimum;
}

// Scales and minima of up to LANES blocks of one feature, as floats.
struct Scales {
  float scale[LANES], minimum[LANES];
};
INLINE void load_scales(const ProjectWork& work, int64_t first, int32_t count, Scales* to) {
  store(to->scale, load_some((const Float16*)work.scales + first, count));
  store(to->minimum, work.minima ? load_some((const Float16*)work.minima + first, count) : zeros());
}

// The same with weights in blocks.
template <class Codes, int ROWS, int FEATURES>
void multiply_blocks(const ProjectWork& work, const float* x, int32_t feature, int32_t apart, float* y) {
  const uint8_t* weights = (const uint8_t*)work.weights;
  const int32_t blocks = work.D / kBlock;
  Floats sums_of[FEATURES][ROWS];
  for (int f = 0; f < FEATURES; ++f) {
    for (int r = 0; r < ROWS; ++r) sums_of[f][r] = zeros();
  }
  for (int32_t start = 0; start < blocks; start += LANES) {
    const int32_t here = blocks - start < LANES ? blocks - start : LANES;
    Scales scales[FEATURES];
    for (int f = 0; f < FEATURES; ++f) load_scales(work, (int64_t)(feature + f * apart) * blocks + start, here, &scales[f]);
    for (int32_t b = 0; b < here; ++b) {
      Floats weight[FEATURES][kBlock / LANES];
      for (int f = 0; f < FEATURES; ++f) {
        const uint8_t* codes = weights + ((int64_t)(feature + f * apart) * blocks + start + b) * Codes::kBytes;
        load_block(Codes{}, codes, scales[f].scale[b], scales[f].minimum[b], weight[f]);
        __builtin_prefetch(codes + (int64_t)blocks * Codes::kBytes);  // of the next feature
      }
      for (int r = 0; r < ROWS; ++r) {
        const float* of_row = x + (int64_t)r * work.D + (start + b) * kBlock;
        for (int p = 0; p < kBlock / LANES; ++p) {
          Floats part = load(of_row + p * LANES);
          KEEP(part);
          for (int f = 0; f < FEATURES; ++f) sums_of[f][r] += weight[f][p] * part;
        }
      }
    }
  }
  for (int f = 0; f < FEATURES; ++f) {
    for (int r = 0; r < ROWS; ++r) y[(int64_t)r * work.features + feature + f * apart] = sum(sums_of[f][r]);
  }
}

template <int ROWS, int FEATURES>
void multiply_typed(const ProjectWork& work, const float* x, int32_t feature, int32_t apart, float* y) {
  switch (work.type) {
    case Type::kBFloat16: return multiply<BFloat16, ROWS, FEATURES>(work, x, feature, apart, y);
    case Type::kFloat16: return multiply<Float16, ROWS, FEATURES>(work, x, feature, apart, y);
    case Type::kFloat32: return multiply<float, ROWS, FEATURES>(work, x, feature, apart, y);
    case Type::kBytes: return multiply_blocks<Int8, ROWS, FEATURES>(work, x, feature, apart, y);
    case Type::kNibbles: return multiply_blocks<Nibbles, ROWS, FEATURES>(work, x, feature, apart, y);
  }
}

template <int ROWS>
void multiply_features(const ProjectWork& work, const float* x, float* y) {
  constexpr int kFeatures = ROWS == 1 ? 4 : ROWS == 8 ? 3 : 2;
  const int32_t apart = (work.last - work.first) / kFeatures, end = work.first + kFeatures * apart;
  for (int32_t i = 0; i < apart; ++i) multiply_typed<ROWS, kFeatures>(work, x, work.first + i, apart, y);
  for (int32_t feature = end; feature < work.last; ++feature) multiply_typed<ROWS, 1>(work, x, feature, 1, y);
}

void project(const ProjectWork& work) {
  int32_t row = 0;
  for (; row + kRows <= work.rows; row += kRows) {
    multiply_features<kRows>(work, work.x + (int64_t)row * work.D, work.y + (int64_t)row * work.features);
  }
  for (; row + 2 <= work.rows; row += 2) {
    multiply_features<2>(work, work.x + (int64_t)row * work.D, work.y + (int64_t)row * work.features);
  }
  if (row < work.rows) multiply_features<1>(work, work.x + (int64_t)row * work.D, work.y + (int64_t)row * work.features);
}

// The weights of the features [first, last), as floats.
template <class Codes>
void dequantise_blocks(const ProjectWork& work) {
  const int32_t blocks = work.D / kBlock;
  for (int64_t feature = work.first; feature < work.last; ++feature) {
    for (int32_t start = 0; start < blocks; start += LANES) {
      const int32_t here = blocks - start < LANES ? blocks - start : LANES;
      Scales scales;
      load_scales(work, feature * blocks + start, here, &scales);
      for (int32_t b = 0; b < here; ++b) {
        const int64_t block = feature * blocks + start + b;
        const uint8_t* codes = (const uint8_t*)work.weights + block * Codes::kBytes;
        Floats weights[kBlock / LANES];
        load_block(Codes{}, codes, scales.scale[b], scales.minimum[b], weights);
        for (int p = 0; p < kBlock / LANES; ++p) store(work.y + block * kBlock + p * LANES, weights[p]);
      }
    }
  }
}

void dequantise(const ProjectWork& work) {
  work.type == Type::kNibbles ? dequantise_blocks<Nibbles>(work) : dequantise_blocks<Int8>(work);
}

}  // namespace
