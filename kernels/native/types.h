// The types of cached numbers, and what a piece of work is told; shared by the handlers and the code of each CPU.
#pragma once

#include <stdint.h>

#include <new>

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Nibbles are two 4-bit codes a byte. Bytes are unsigned as codes of labels, and signed as weights, keys and values.
enum class Type : int32_t { kFloat32, kBFloat16, kFloat16, kBytes, kNibbles };

constexpr std::align_val_t kAlignment{64};      // of tiles in memory
constexpr int32_t kSide = 16;                   // rows of a tile of a matrix unit, and of a group
constexpr int32_t kQueries = 32, kSlots = 128;  // of a block in prefill attention
constexpr int32_t kMostBlocks = 8;              // of queries that take turns at the same slots
constexpr int32_t kAhead = 16, kFar = 32;  // slots whose rows are fetched before they are needed, and their first bytes
constexpr int32_t kPadding = kFar + 4;

// Attention of the G query heads of one list over some slots of one key/value head.
struct AttendWork {
  const float* q;     // [G, H]
  const void* keys;   // [S, H] in `type`
  const void* values;
  Type type;
  const float *key_scales, *value_scales;  // [S], what the numbers of a slot are multiplied by; null for floats
  const int32_t* slots;  // [count + kPadding], the slots that are read, and any slots at the end
  int32_t count, stride;
  int32_t G, H;
  float* scores;  // scratch [G, stride]; the stride is the count, rounded up to whole fours
  float* out;     // [G, H]: the sum of exp(score - peak) * value
  float* stats;   // [G, 3]: peak, the sum of exp(score - peak), the sum of the scores
};

// The attention of one head, put together from parts, each as `AttendWork` leaves it; and the head's tail.
struct MergeWork {
  const float* q;  // [H]
  const float *out, *stats;  // of the first part
  int32_t parts, out_stride, stats_stride, H;
  int32_t rank;  // of the tail; -1 without one
  const void *tail_keys, *tail_values;  // [1 + rank, H] in `type`
  const float* terms;                   // [6 + rank]
  Type type;
  int32_t num_read, num_seen;
  float* result;  // [H]
  float* found;   // [2]: the log of the sum of exp(score), and the mean score; null if nobody asks
};

// The choice of one list by the scores of its G query heads.
struct SelectWork {
  const float* query;  // [G, R]
  const void* labels;  // [rows, S] codes in `type`; or [S, R] keys
  const void* scales;  // [2, S] in `scale_type` of labels, [S] floats of keys; null if they are not quantised
  Type type, scale_type;
  bool by_keys;
  float scale;  // of scores by keys
  int32_t G, R;
  int64_t S;
  int32_t first, last, num_allowed, C;
  bool dilate;
  float* scratch;  // [(G + 1) * (last - first + 32) + G * (R + 1)]
  int32_t* list;   // [C]
};

// A weight matrix [features, D] times rows of x, for the features [first, last).
struct ProjectWork {
  const float* x;                   // [rows, D]
  const void* weights;              // [features, D] in `type`
  const void *scales, *minima;      // float16 [features, D / 32]; null for floats; minima may be null for codes too
  Type type;
  int32_t rows, D, features, first, last;
  float* y;  // [rows, features]; for `dequantise` [features, D]
  const char* split;  // x as `Code::split_rows` leaves it; null where `project` takes x itself
  Type x_type;        // whose numbers x has
};

// Prefill attention of the G query heads of one key/value head, for T new tokens of one row.
struct PrefillWork {
  const float* q;  // [T, N, H], from the first head of the group on
  const void *keys, *values;               // [S, H] in `type`
  const float *key_scales, *value_scales;  // as for `AttendWork`
  Type type;
  int32_t T, N, G, H;
  int32_t start, window;  // the position of the first token; -1 for no window
  int32_t first, last;    // slots that some token sees
  char* split;            // `prefill_bytes`, which `split_slots` fills
  float* out;             // like q
  float* log_total;       // [G, T]: the log of what each softmax divides by
};

// What is compiled for each instruction set.
struct Code {
  const char* name;
  void (*widen)(const void* from, int64_t count, Type type, float* to);
  void (*attend)(const AttendWork&);
  void (*merge)(const MergeWork&);
  void (*choose)(const SelectWork&);
  void (*dequantise)(const ProjectWork&);
  void (*project)(const ProjectWork&);
  // Null where `project` takes x itself. Else it wants many rows of x as `split_rows` leaves them, a group a call.
  void (*split_rows)(const ProjectWork&, int32_t group, char* to);
  int64_t (*split_rows_bytes)(const ProjectWork&);
  // Null where there is no prefill: splits a block of slots, and then attends with some blocks of queries.
  void (*split_slots)(const PrefillWork&, int32_t block);
  void (*attend_queries)(const PrefillWork&, int32_t block, int32_t count);
  int64_t (*prefill_bytes)(const PrefillWork&);
};

#define PASTE(a, b) a##b
#define NAME_CODE(target) PASTE(code_for_, target)
extern const Code code_for_amx, code_for_avx512, code_for_avx2, code_for_any;
