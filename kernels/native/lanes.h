// Vectors of LANES floats, in the compiler's vector extensions: one source for AVX-512, AVX2 and every other CPU.
//
// This header and those that include it are compiled once for each instruction set. All their functions have internal
// linkage, and they use no template of the standard library: the linker keeps one copy of such a template, and might
// keep the one that other CPUs cannot run.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if LANES > 4
#include <immintrin.h>
#endif

#include "types.h"

#define INLINE static inline __attribute__((always_inline))
#ifdef __clang__  // a loop over an array of vectors is unrolled, so that the vectors stay in registers
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
// Loads a vector once: compilers would load it again for each sum that it is added to.
#if LANES == 16
#define KEEP(vector) __asm__("" : "+v"(vector))
#elif LANES == 8
#define KEEP(vector) __asm__("" : "+x"(vector))
#else
#define KEEP(vector) (void)(vector)
#endif

namespace {

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));

template <class To, class From>
INLINE To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <class Vector, class T>
INLINE Vector read(const T* from) {
  Vector to;
  memcpy(&to, from, sizeof to);
  return to;
}

INLINE Floats zeros() { return Floats{}; }
INLINE Floats all(float x) { return Floats{} + x; }
INLINE Floats pick(Ints where, Floats yes, Floats no) {
  return bits_of<Floats>((where & bits_of<Ints>(yes)) | (~where & bits_of<Ints>(no)));
}
INLINE Floats larger(Floats a, Floats b) { return pick(a > b, a, b); }

INLINE Floats to_floats(Halves halves, BFloat16) {
  return bits_of<Floats>(__builtin_convertvector(halves, Words) << 16);
}
INLINE Floats to_floats(Halves halves, Float16) {
#if LANES == 16
  return (Floats)_mm512_cvtph_ps((__m256i)halves);
#elif LANES == 8
  return (Floats)_mm256_cvtph_ps((__m128i)halves);
#else
  const Words wide = __builtin_convertvector(halves, Words), magnitude = wide & 0x7fff;
  const Floats normal = bits_of<Floats>((magnitude << 13) + (112u << 23));
  const Floats small = __builtin_convertvector(bits_of<Ints>(magnitude), Floats) * 0x1p-24f;  // below the exponents
  const Floats infinite = bits_of<Floats>((magnitude << 13) | 0x7f800000u);
  const Floats x = pick(magnitude >= 0x7c00, infinite, pick(magnitude < 0x400, small, normal));
  return bits_of<Floats>(bits_of<Words>(x) | (wide & 0x8000) << 16);
#endif
}

// Compilers widen bytes in several steps, or one by one, so the instructions are named where there are any.
INLINE Floats to_floats(Bytes bytes) {
#if LANES == 16
  return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32((__m128i)bytes));
#elif LANES == 8
  return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bits_of<int64_t>(bytes))));
#else
  return __builtin_convertvector(bits_of<Ints>(__builtin_convertvector(__builtin_convertvector(bytes, Halves), Words)), Floats);
#endif
}

INLINE Floats to_signed_floats(Bytes bytes) {
#if LANES == 16
  return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)bytes));
#else
  return to_floats(bytes ^ 0x80) - 128.0f;  // from [-128, 127] to [0, 255] and back
#endif
}

// The low and the high four bits of each byte, as floats.
INLINE void widen_nibbles(Bytes bytes, Floats* low, Floats* high) {
#if LANES == 16
  const __m512i wide = _mm512_cvtepu8_epi32((__m128i)bytes);
  const __m512 of_codes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  *low = (Floats)_mm512_permutexvar_ps(wide, of_codes);  // which counts the low bits alone
  *high = (Floats)_mm512_permutexvar_ps(_mm512_srli_epi32(wide, 4), of_codes);
#else
  *low = to_floats(bytes & 15), *high = to_floats(bytes >> 4);
#endif
}

// Sixteen bytes as floats, in 16 / LANES vectors.
typedef uint8_t Sixteen __attribute__((vector_size(16)));
INLINE void widen_sixteen(Sixteen bytes, Floats* to) {
#if LANES == 16
  to[0] = to_floats(bytes);
#elif LANES == 8
  to[0] = (Floats)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32((__m128i)bytes));
  to[1] = (Floats)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128((__m128i)bytes, 8)));
#else
  typedef uint16_t Halves16 __attribute__((vector_size(32)));
  typedef int32_t Ints16 __attribute__((vector_size(64)));
  const Ints16 wide = __builtin_convertvector(__builtin_convertvector(bytes, Halves16), Ints16);
  for (int p = 0; p < 4; ++p) to[p] = __builtin_convertvector(read<Ints>((const int32_t*)&wide + 4 * p), Floats);
#endif
}

// LANES numbers, as floats.
INLINE Floats load(const float* from) { return read<Floats>(from); }
INLINE Floats load(const BFloat16* from) { return to_floats(read<Halves>(from), BFloat16{}); }
INLINE Floats load(const Float16* from) { return to_floats(read<Halves>(from), Float16{}); }
INLINE Floats load(const uint8_t* from) { return to_floats(read<Bytes>(from)); }
INLINE Floats load(const int8_t* from) { return to_signed_floats(read<Bytes>(from)); }

// The first `count` of LANES numbers, and zeros behind them. No byte behind the numbers is read.
INLINE Floats read_some(const float* from, int64_t count) {
#if LANES == 16
  return (Floats)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), from);
#else
  Floats to = zeros();
  memcpy(&to, from, count * sizeof(float));
  return to;
#endif
}
template <class Half>
INLINE Halves read_some(const Half* from, int64_t count) {
#if LANES == 16
  return (Halves)_mm256_maskz_loadu_epi16((__mmask16)((1u << count) - 1), from);
#else
  Halves to = Halves{};
  memcpy(&to, from, count * sizeof(Half));
  return to;
#endif
}
INLINE Bytes read_some(const uint8_t* from, int64_t count) {
#if LANES == 16
  return (Bytes)_mm_maskz_loadu_epi8((__mmask16)((1u << count) - 1), from);
#else
  Bytes to = Bytes{};
  memcpy(&to, from, count);
  return to;
#endif
}
INLINE Floats load_some(const float* from, int64_t count) { return read_some(from, count); }
INLINE Floats load_some(const BFloat16* from, int64_t count) { return to_floats(read_some(from, count), BFloat16{}); }
INLINE Floats load_some(const Float16* from, int64_t count) { return to_floats(read_some(from, count), Float16{}); }
INLINE Floats load_some(const uint8_t* from, int64_t count) { return to_floats(read_some(from, count)); }
INLINE Floats load_some(const int8_t* from, int64_t count) {
  return to_signed_floats(read_some((const uint8_t*)from, count));
}

INLINE void store(float* to, Floats x) { memcpy(to, &x, sizeof x); }
INLINE void store_some(float* to, Floats x, int64_t count) { memcpy(to, &x, count * sizeof(float)); }

typedef float Quad __attribute__((vector_size(16)));

// A quad whose sum is the sum of the lanes.
INLINE Quad folded(Floats x) {
#if LANES == 16  // compilers would write the vector to memory and read its quads back
  const __m256 eight = _mm512_castps512_ps256((__m512)x) + _mm512_extractf32x8_ps((__m512)x, 1);
  return (Quad)(_mm256_castps256_ps128(eight) + _mm256_extractf128_ps(eight, 1));
#else
  Quad parts[LANES / 4];
  memcpy(parts, &x, sizeof parts);
  return LANES == 8 ? parts[0] + parts[LANES / 4 - 1] : parts[0];
#endif
}

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t QuadInts __attribute__((vector_size(16)));
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, QuadInts{__VA_ARGS__})
#endif

INLINE float sum(Floats x) {
  const Quad quad = folded(x);
  return (quad[0] + quad[1]) + (quad[2] + quad[3]);
}

// The sums of four vectors.
INLINE Quad sums(Floats a, Floats b, Floats c, Floats d) {
#if LANES == 16
  // Each line halves what is left of a vector, and puts two of the halves together.
  const __m512 ab = _mm512_shuffle_f32x4((__m512)a, (__m512)b, 0x44) + _mm512_shuffle_f32x4((__m512)a, (__m512)b, 0xee);
  const __m512 cd = _mm512_shuffle_f32x4((__m512)c, (__m512)d, 0x44) + _mm512_shuffle_f32x4((__m512)c, (__m512)d, 0xee);
  const __m512 quads = _mm512_shuffle_f32x4(ab, cd, 0x88) + _mm512_shuffle_f32x4(ab, cd, 0xdd);
  const __m512 pairs = quads + _mm512_permute_ps(quads, 0xb1), singles = pairs + _mm512_permute_ps(pairs, 0x4e);
  const __m512i first_of_quad = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
  return (Quad)_mm512_castps512_ps128(_mm512_permutexvar_ps(first_of_quad, singles));
#else
  const Quad p = folded(a), q = folded(b), r = folded(c), s = folded(d);
  const Quad first = SHUFFLE(p, q, 0, 4, 1, 5) + SHUFFLE(p, q, 2, 6, 3, 7);
  const Quad second = SHUFFLE(r, s, 0, 4, 1, 5) + SHUFFLE(r, s, 2, 6, 3, 7);
  return SHUFFLE(first, second, 0, 1, 4, 5) + SHUFFLE(first, second, 2, 3, 6, 7);
#endif
}

INLINE int32_t total(Ints x) {
  int32_t sum = 0;
  for (int i = 0; i < LANES; ++i) sum += x[i];
  return sum;
}

INLINE float largest(Floats x) {
#if LANES == 16
  return _mm512_reduce_max_ps((__m512)x);
#else
  float best = x[0];
  for (int i = 1; i < LANES; ++i) best = x[i] > best ? x[i] : best;
  return best;
#endif
}

// e to the power x within two units in the last place, for x <= 88; zero where the result would be below 1e-38. NaN
// stays NaN.
INLINE Floats exponential(Floats x) {
  const Floats magic = all(12582912.0f);  // adding it rounds to whole numbers
  const Floats whole = (x * 1.44269504f + magic) - magic;
  const Floats rest = x - whole * 0.693359375f - whole * -2.12194440e-4f;
  Floats y = all(1.9875691500e-4f);
  y = y * rest + 1.3981999507e-3f;
  y = y * rest + 8.3334519073e-3f;
  y = y * rest + 4.1665795894e-2f;
  y = y * rest + 1.6666665459e-1f;
  y = y * rest + 5.0000001201e-1f;
  y = y * rest * rest + rest + 1.0f;
  const Ints power = __builtin_convertvector(pick(x > -87.0f, whole, zeros()), Ints);
  y = y * bits_of<Floats>((power + 127) << 23);
  return pick(x <= -87.0f, zeros(), y);
}

template <class T>
INLINE float to_float(T x) {
  return load_some(&x, 1)[0];
}

// Numbers as floats.
template <class T>
void widen_typed(const T* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store(to + i, load(from + i));
  if (i < count) store_some(to + i, load_some(from + i, count - i), count - i);
}

}  // namespace
