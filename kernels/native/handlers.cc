// What XLA calls: the operations of kernels/api.py on a CPU, as handlers of XLA's foreign function interface.
//
// The arguments' shapes are checked. Slots, plans and lengths that point outside the arrays read and write nothing.
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <string_view>
#include <vector>

#include "parallel.h"
#include "types.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kPiecesPerThread = 4;
// From how many rows on a projection is computed by a matrix unit, and how many of them at once, so that they stay in a
// core's cache.
constexpr int32_t kManyRows = 32, kSplitRows = 512;
// Slots that one piece of attention reads at most, of a list and of a range. They do not depend on the number of threads.
constexpr int32_t kListPart = 512, kRangePart = 1024;
constexpr int32_t kStreams = 8;  // in which a range is read

#if defined(__x86_64__)
// Whether the CPU has a matrix unit for bfloat16, and the system gives it to this process when asked.
bool has_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;  // AMX-BF16, AMX-TILE
#if defined(__linux__)
  constexpr int kAskForState = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
#else
  return false;
#endif
}
#endif

// The best code that this CPU runs, or the best of at most the instructions that the environment names (for tests).
const Code& code() {
  static const Code& chosen = []() -> const Code& {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const char* const named = std::getenv("HSHARE_JAX_INSTRUCTIONS");
    const std::string_view most = named ? named : "amx";
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    const bool takes_avx512 = has_avx512 && (most == "amx" || most == "avx512");
    if (takes_avx512 && most == "amx" && has_amx()) return code_for_amx;
    if (takes_avx512) return code_for_avx512;
    if (has_avx2 && most != "any") return code_for_avx2;
#endif
    return code_for_any;
  }();
  return chosen;
}

std::optional<Type> float_type(ffi::DataType type) {
  switch (type) {
    case ffi::F32: return Type::kFloat32;
    case ffi::BF16: return Type::kBFloat16;
    case ffi::F16: return Type::kFloat16;
    default: return std::nullopt;
  }
}

// The type of cached keys and values.
std::optional<Type> row_type(ffi::DataType type) { return type == ffi::S8 ? Type::kBytes : float_type(type); }

int64_t size_of(Type type) {
  switch (type) {
    case Type::kFloat32: return 4;
    case Type::kBFloat16: case Type::kFloat16: return 2;
    default: return 1;
  }
}

const char* at(const ffi::AnyBuffer& array, int64_t number, Type type) {
  return static_cast<const char*>(array.untyped_data()) + number * size_of(type);
}

// Rounds to the nearest number of the type, ties to even.
void narrow(float x, void* to, int64_t i, Type type) {
  if (type == Type::kFloat32) {
    static_cast<float*>(to)[i] = x;
    return;
  }
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  uint32_t half;
  if (type == Type::kBFloat16) {
    half = std::isnan(x) ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  } else {
    const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (std::isnan(x)) {
      half = 0x7e00;
    } else if (magnitude >= 0x477ff000) {  // rounds beyond the largest number
      half = 0x7c00;
    } else if (magnitude < 0x38800000) {  // below the exponents
      half = static_cast<uint32_t>(std::nearbyint(std::fabs(x) * 0x1p24f));
    } else {
      half = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
    }
    half |= sign;
  }
  static_cast<uint16_t*>(to)[i] = static_cast<uint16_t>(half);
}

std::vector<float> widened(const ffi::AnyBuffer& array, Type type) {
  std::vector<float> wide(array.element_count());
  code().widen(array.untyped_data(), wide.size(), type, wide.data());
  return wide;
}

// Rounds all floats to numbers of the type.
void narrow_all(ffi::ThreadPool& pool, const std::vector<float>& from, void* to, Type type) {
  constexpr int64_t kPiece = 1 << 13;
  const int64_t count = from.size();
  in_parallel(pool, (count + kPiece - 1) / kPiece, [&](int64_t piece) {
    for (int64_t i = piece * kPiece; i < std::min(count, (piece + 1) * kPiece); ++i) narrow(from[i], to, i, type);
  });
}

ffi::Error wrong(const std::string& what) { return ffi::Error::InvalidArgument("hshare_jax: " + what); }

template <class Array>
bool has_shape(const Array& array, std::initializer_list<int64_t> shape) {
  const auto dimensions = array.dimensions();
  return std::equal(dimensions.begin(), dimensions.end(), shape.begin(), shape.end());
}

// The result of a handler that changes an argument in place.
template <class Array>
char* changed(const Array& argument, ffi::Result<Array>& result) {
  void* const out = result->untyped_data();
  if (out != argument.untyped_data()) memcpy(out, argument.untyped_data(), argument.size_bytes());
  return static_cast<char*>(out);
}

constexpr const char* kCacheRule =
    "q must be [B, N, H] and the cache [B, K, S, H], in float32, bfloat16 or float16, or in int8 with scales [B, K, S]";

constexpr const char* kPrefillRule =
    "q must be [B, T, N, H], the cache as for decoding, starts [B], and the results like q and [B, N, T]";

// Memory that is aligned for tiles.
struct Free {
  void operator()(char* bytes) const { operator delete[](bytes, kAlignment); }
};
using Room = std::unique_ptr<char[], Free>;
Room room_of(int64_t bytes) { return Room(static_cast<char*>(operator new[](bytes, kAlignment))); }

// What one list reads.
struct Reads {
  const int32_t* slots;  // null: all slots in [first, first + count)
  int32_t first, count;

  int32_t num_parts() const {
    const int32_t most = slots ? kListPart : kRangePart;
    return std::max(1, (count + most - 1) / most);
  }

  // The slots of a part, in the order in which they are read, and then the last one again. A range is read as streams
  // that take turns: a CPU fetches several streams by itself while it computes, and for a single one it waits.
  void copy_slots(int32_t skipped, int32_t part, int32_t* to) const {
    const int32_t length = part / kStreams, start = first + skipped;
    if (slots) {
      std::copy_n(slots + skipped, part, to);
    } else {
      for (int32_t i = 0, at = 0; i < length; ++i) {
        for (int32_t stream = 0; stream < kStreams; ++stream) to[at++] = start + stream * length + i;
      }
      for (int32_t i = kStreams * length; i < part; ++i) to[i] = start + i;
    }
    std::fill_n(to + part, kPadding, part ? to[part - 1] : 0);
  }
};

// Attention of every list over what it reads.
struct Attention {
  static constexpr int64_t kFound = 3;  // further numbers of `split_decode`, behind the attention of each head
  ffi::AnyBuffer q, keys, values;
  Type q_type, type, tail_type = Type::kFloat32;
  int64_t B, N, H, K, S, J;
  const float *key_scales = nullptr, *value_scales = nullptr;  // [B, K, S] of numbers in 8 bits
  const ffi::AnyBuffer *tail_keys = nullptr, *tail_values = nullptr;
  const float* terms = nullptr;
  int64_t rank = -1;
  int64_t parts_of_row = 1;  // 2 where each list's reads are followed by what it leaves, and both are told

  // The first two of the further arguments are scales if the numbers have 8 bits.
  static std::optional<Attention> of(ffi::AnyBuffer q, ffi::AnyBuffer keys, ffi::AnyBuffer values, int64_t J,
                                     const ffi::RemainingArgs& further) {
    const auto q_type = float_type(q.element_type()), type = row_type(keys.element_type());
    if (!q_type || !type || q.dimensions().size() != 3 || keys.dimensions().size() != 4) return std::nullopt;
    const int64_t B = q.dimensions()[0], N = q.dimensions()[1], H = q.dimensions()[2];
    const int64_t K = keys.dimensions()[1], S = keys.dimensions()[2];
    J = J < 0 ? K : J;
    if (!has_shape(keys, {B, K, S, H}) || !has_shape(values, {B, K, S, H}) || K < 1 || J < K || J % K || N < J || N % J) {
      return std::nullopt;
    }
    if (values.element_type() != keys.element_type() || S > INT32_MAX) return std::nullopt;
    Attention attention{q, keys, values, *q_type, *type, Type::kFloat32, B, N, H, K, S, J};
    if (*type == Type::kBytes) {
      const auto of_keys = further.get<ffi::Buffer<ffi::F32>>(0), of_values = further.get<ffi::Buffer<ffi::F32>>(1);
      if (!of_keys || !of_values || !has_shape(*of_keys, {B, K, S}) || !has_shape(*of_values, {B, K, S})) {
        return std::nullopt;
      }
      attention.key_scales = of_keys->typed_data(), attention.value_scales = of_values->typed_data();
    }
    return attention;
  }

  // `reads` [B, parts_of_row, J]; `num_seen` [B] slots that a row sees. A row that reads all slots in a range has no
  // tail.
  void run(ffi::ThreadPool& pool, const std::vector<Reads>& reads, const std::vector<int32_t>& num_seen, void* out) const {
    const int64_t G = N / J;
    const std::vector<float> wide = widened(q, q_type);
    const int64_t lists = B * parts_of_row * J;
    std::vector<int64_t> begin(lists + 1, 0);  // the first part of each list
    for (int64_t i = 0; i < lists; ++i) begin[i + 1] = begin[i] + reads[i].num_parts();
    const int64_t parts = begin.back();
    std::vector<int32_t> list_of(parts);
    for (int64_t i = 0; i < lists; ++i) std::fill(&list_of[begin[i]], &list_of[begin[i]] + (begin[i + 1] - begin[i]), i);
    const std::unique_ptr<float[]> sums(new float[parts * G * (H + 3)]);
    float *of_parts = sums.get(), *stats = of_parts + parts * G * H;
    const std::unique_ptr<std::atomic<int64_t>[]> left(new std::atomic<int64_t>[lists]);
    for (int64_t i = 0; i < lists; ++i) left[i] = begin[i + 1] - begin[i];
    in_parallel(pool, parts, [&](int64_t part) {
      const int64_t i = list_of[part], row = i / J, b = row / parts_of_row, j = i % J, k = j / (J / K);
      const Reads& of_list = reads[i];
      const int32_t most = (of_list.count + of_list.num_parts() - 1) / of_list.num_parts();
      const int32_t skipped = std::min(static_cast<int32_t>(part - begin[i]) * most, of_list.count);
      static thread_local std::vector<float> scores;
      static thread_local std::vector<int32_t> slots;
      AttendWork work{};
      work.count = std::min(most, of_list.count - skipped), work.stride = (work.count + 3) / 4 * 4;
      slots.resize(kRangePart + kPadding);
      of_list.copy_slots(skipped, work.count, slots.data());
      work.q = &wide[(b * N + j * G) * H];
      work.keys = at(keys, (b * K + k) * S * H, type);
      work.values = at(values, (b * K + k) * S * H, type);
      work.type = type;
      if (key_scales) work.key_scales = key_scales + (b * K + k) * S, work.value_scales = value_scales + (b * K + k) * S;
      work.slots = slots.data();
      work.G = G, work.H = H;
      scores.resize(G * kRangePart);
      work.scores = scores.data();
      work.out = of_parts + part * G * H;
      work.stats = stats + part * G * 3;
      code().attend(work);
      // Whoever finishes a list's last part puts the parts together, in their order.
      if (left[i].fetch_sub(1, std::memory_order_acq_rel) > 1) return;
      std::vector<float> result(H);
      for (int64_t g = 0; g < G; ++g) {
        const int64_t n = j * G + g;
        MergeWork merge{};
        merge.q = &wide[(b * N + n) * H];
        merge.out = of_parts + (begin[i] * G + g) * H, merge.out_stride = G * H;
        merge.stats = stats + (begin[i] * G + g) * 3, merge.stats_stride = G * 3;
        merge.parts = begin[i + 1] - begin[i];
        merge.H = H, merge.type = tail_type, merge.rank = -1;
        if (terms && of_list.slots) {
          merge.rank = rank;
          merge.tail_keys = at(*tail_keys, (b * N + n) * (1 + rank) * H, tail_type);
          merge.tail_values = at(*tail_values, (b * N + n) * (1 + rank) * H, tail_type);
          merge.terms = terms + (b * N + n) * (6 + rank);
        }
        merge.num_read = of_list.count, merge.num_seen = num_seen[b];
        merge.result = result.data();
        if (parts_of_row == 2) {
          float* const told = static_cast<float*>(out) + (row * N + n) * (H + kFound);
          merge.result = told, merge.found = told + H;
          told[H + 2] = of_list.count;
        }
        code().merge(merge);
        if (parts_of_row == 2) continue;
        for (int64_t h = 0; h < H; ++h) narrow(result[h], out, (b * N + n) * H + h, q_type);
      }
    });
  }
};

// The slots that a row of this length sees.
Reads seen(int64_t length, int64_t S, int64_t window) {
  const int64_t last = std::clamp<int64_t>(length, 0, S);
  const int64_t first = window < 0 ? 0 : std::clamp<int64_t>(length - window, 0, last);
  return {nullptr, static_cast<int32_t>(first), static_cast<int32_t>(last - first)};
}

ffi::Error dense_decode(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer keys, ffi::AnyBuffer values,
                        ffi::Buffer<ffi::S32> lengths, ffi::RemainingArgs scales, ffi::Result<ffi::AnyBuffer> out,
                        int64_t window) {
  const auto attention = Attention::of(q, keys, values, -1, scales);
  if (!attention) return wrong(kCacheRule);
  if (!has_shape(lengths, {attention->B})) return wrong("lengths must be [B]");
  std::vector<Reads> reads;
  for (int64_t b = 0; b < attention->B; ++b) {
    reads.insert(reads.end(), attention->J, seen(lengths.typed_data()[b], attention->S, window));
  }
  attention->run(pool, reads, std::vector<int32_t>(attention->B, 0), out->untyped_data());
  return ffi::Error::Success();
}

ffi::Error sparse_decode(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer keys, ffi::AnyBuffer values,
                         ffi::Buffer<ffi::S32> lists, ffi::Buffer<ffi::S32> source, ffi::Buffer<ffi::S32> lengths,
                         ffi::Buffer<ffi::S32> recent_start, ffi::RemainingArgs further, ffi::Result<ffi::AnyBuffer> out,
                         int64_t layer, int64_t num_sinks, int64_t max_recent, int64_t window, int64_t min_length) {
  if (source.dimensions().size() != 3 || lists.dimensions().size() != 4) return wrong("lists or source have no plan");
  auto attention = Attention::of(q, keys, values, source.dimensions()[2], further);
  if (!attention) return wrong(kCacheRule);
  const int64_t B = attention->B, J = attention->J, N = attention->N, S = attention->S, C = lists.dimensions()[3];
  const int64_t layers = source.dimensions()[1], L = lists.dimensions()[0];
  if (!has_shape(lists, {L, B, J, C}) || !has_shape(source, {B, layers, J}) || !has_shape(lengths, {B}) ||
      !has_shape(recent_start, {B}) || layer < 0 || layer >= layers) {
    return wrong("lists must be [L, B, J, C], source [B, L, J], lengths and recent_start [B]");
  }
  std::optional<ffi::AnyBuffer> tail_keys, tail_values;
  const size_t first = attention->key_scales ? 2 : 0;  // of the tail, which follows the scales
  if (further.size() != first && further.size() != first + 3) return wrong("a tail has three arrays");
  if (further.size() > first) {
    const auto of_keys = further.get<ffi::AnyBuffer>(first), of_values = further.get<ffi::AnyBuffer>(first + 1);
    const auto terms = further.get<ffi::Buffer<ffi::F32>>(first + 2);
    if (!of_keys || !of_values || !terms) return wrong("the tail's terms must be float32");
    tail_keys = *of_keys, tail_values = *of_values;
    const int64_t rank = terms->dimensions().back() - 6;
    const auto tail_type = float_type(tail_keys->element_type());
    if (!tail_type || (!attention->key_scales && *tail_type != attention->type) || rank < 0 ||
        !has_shape(*terms, {B, N, 6 + rank}) || !has_shape(*tail_keys, {B, N, 1 + rank, attention->H}) ||
        !has_shape(*tail_values, {B, N, 1 + rank, attention->H}) ||
        tail_values->element_type() != tail_keys->element_type()) {
      return wrong("the tail must be [B, N, 1 + rank, H] in the cache's floats, its terms [B, N, 6 + rank]");
    }
    attention->tail_type = *tail_type, attention->tail_keys = &*tail_keys, attention->tail_values = &*tail_values;
    attention->terms = terms->typed_data(), attention->rank = rank;
  }
  num_sinks = std::clamp<int64_t>(num_sinks, 0, S), max_recent = std::clamp<int64_t>(max_recent, 0, S);
  const int64_t most = num_sinks + C + max_recent;
  const std::unique_ptr<int32_t[]> slots(new int32_t[B * J * most]);
  std::vector<Reads> reads;
  std::vector<int32_t> num_seen;
  for (int64_t b = 0; b < B; ++b) {
    const int64_t length = lengths.typed_data()[b], start = recent_start.typed_data()[b];
    const Reads all = seen(length, S, window);
    const int64_t first = all.first, last = first + all.count;
    num_seen.push_back(all.count);
    for (int64_t j = 0; j < J; ++j) {
      if (length < min_length) {
        reads.push_back(all);
        continue;
      }
      int32_t *to = &slots[(b * J + j) * most], *const begin = to;
      for (int64_t slot = first; slot < std::min({num_sinks, start, S}); ++slot) *to++ = slot;
      const int64_t unit = source.typed_data()[(b * layers + layer) * J + j];
      if (unit >= 0 && unit < L * J) {
        const int32_t* listed = lists.typed_data() + ((unit / J * B + b) * J + unit % J) * C;
        for (int64_t c = 0; c < C; ++c) {
          if (listed[c] >= first && listed[c] < S) *to++ = listed[c];
        }
      }
      for (int64_t slot = std::max(start, first); slot < std::min(last, start + max_recent); ++slot) *to++ = slot;
      reads.push_back({begin, 0, static_cast<int32_t>(to - begin)});
    }
  }
  attention->run(pool, reads, num_seen, out->untyped_data());
  return ffi::Error::Success();
}

// What each list reads and what it leaves of the slots that its row sees: for each head the attention over them, the log
// of the sum of their exponentiated scores, the mean score, and how many they are.
ffi::Error split_decode(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer keys, ffi::AnyBuffer values,
                        ffi::Buffer<ffi::S32> listed, ffi::Buffer<ffi::S32> lengths, ffi::Buffer<ffi::S32> recent_start,
                        ffi::RemainingArgs scales, ffi::Result<ffi::Buffer<ffi::F32>> out, int64_t num_sinks,
                        int64_t window) {
  if (listed.dimensions().size() != 3) return wrong("listed must be [B, J, C]");
  auto attention = Attention::of(q, keys, values, listed.dimensions()[1], scales);
  if (!attention) return wrong(kCacheRule);
  const int64_t B = attention->B, J = attention->J, S = attention->S, C = listed.dimensions()[2];
  if (!has_shape(listed, {B, J, C}) || !has_shape(lengths, {B}) || !has_shape(recent_start, {B}) ||
      !has_shape(*out, {B, 2, attention->N, attention->H + Attention::kFound})) {
    return wrong("listed must be [B, J, C], lengths and recent_start [B], the result [B, 2, N, H + 3]");
  }
  attention->parts_of_row = 2;
  const std::unique_ptr<int32_t[]> slots(new int32_t[B * J * S]);
  std::vector<Reads> reads(B * 2 * J);
  in_parallel(pool, B * J, [&](int64_t i) {
    const int64_t b = i / J, j = i % J, start = recent_start.typed_data()[b];
    const Reads all = seen(lengths.typed_data()[b], S, window);
    const int64_t first = all.first, last = first + all.count;
    static thread_local std::vector<char> is_read;
    is_read.assign(S, false);
    std::fill_n(is_read.begin(), std::clamp<int64_t>(std::min(num_sinks, start), 0, S), true);
    std::fill(is_read.begin() + std::clamp<int64_t>(start, 0, S), is_read.end(), true);
    for (const int32_t* slot = listed.typed_data() + i * C; slot < listed.typed_data() + (i + 1) * C; ++slot) {
      if (*slot >= 0 && *slot < S) is_read[*slot] = true;
    }
    const int32_t num_read = std::count(is_read.begin() + first, is_read.begin() + last, true);
    int32_t *of_read = &slots[i * S], *of_rest = of_read + num_read;
    reads[b * 2 * J + j] = {of_read, 0, num_read};
    reads[(b * 2 + 1) * J + j] = {of_rest, 0, all.count - num_read};
    for (int64_t slot = first; slot < last; ++slot) *(is_read[slot] ? of_read : of_rest)++ = slot;
  });
  attention->run(pool, reads, std::vector<int32_t>(B, 0), out->untyped_data());
  return ffi::Error::Success();
}

// Causal attention of many new tokens, on a CPU with a matrix unit.
ffi::Error prefill_attention(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer keys, ffi::AnyBuffer values,
                             ffi::Buffer<ffi::S32> starts, ffi::RemainingArgs scales, ffi::Result<ffi::AnyBuffer> out,
                             ffi::Result<ffi::Buffer<ffi::F32>> log_total, int64_t window) {
  if (!code().attend_queries) return wrong("prefill attention needs a CPU with AMX");
  const auto q_type = float_type(q.element_type()), type = row_type(keys.element_type());
  if (!q_type || !type || q.dimensions().size() != 4 || keys.dimensions().size() != 4) return wrong(kPrefillRule);
  const int64_t B = q.dimensions()[0], T = q.dimensions()[1], N = q.dimensions()[2], H = q.dimensions()[3];
  const int64_t K = keys.dimensions()[1], S = keys.dimensions()[2];
  if (!has_shape(keys, {B, K, S, H}) || !has_shape(values, {B, K, S, H}) || K < 1 || N < K || N % K || S > INT32_MAX / 2 ||
      T * N > INT32_MAX / 2 || values.element_type() != keys.element_type() || !has_shape(starts, {B}) ||
      !has_shape(*log_total, {B, N, T})) {
    return wrong(kPrefillRule);
  }
  const float *key_scales = nullptr, *value_scales = nullptr;
  if (*type == Type::kBytes) {
    const auto of_keys = scales.get<ffi::Buffer<ffi::F32>>(0), of_values = scales.get<ffi::Buffer<ffi::F32>>(1);
    if (!of_keys || !of_values || !has_shape(*of_keys, {B, K, S}) || !has_shape(*of_values, {B, K, S})) {
      return wrong(kPrefillRule);
    }
    key_scales = of_keys->typed_data(), value_scales = of_values->typed_data();
  }
  const bool is_float = *q_type == Type::kFloat32;
  std::vector<float> wide, result;
  if (!is_float) wide = widened(q, *q_type), result.resize(wide.size());
  const float* const from = is_float ? static_cast<const float*>(q.untyped_data()) : wide.data();
  float* const to = is_float ? static_cast<float*>(out->untyped_data()) : result.data();
  for (int64_t i = 0; i < B * K; ++i) {
    const int64_t b = i / K, G = N / K, start = std::clamp<int64_t>(starts.typed_data()[b], -1, S);
    PrefillWork work{};
    work.q = from + b * T * N * H + i % K * G * H;
    work.keys = at(keys, i * S * H, *type), work.values = at(values, i * S * H, *type), work.type = *type;
    if (key_scales) work.key_scales = key_scales + i * S, work.value_scales = value_scales + i * S;
    work.T = T, work.N = N, work.G = G, work.H = H;
    work.start = start, work.window = std::min<int64_t>(window, INT32_MAX / 2);
    work.last = std::clamp<int64_t>(start + T, 0, S);
    work.first = window < 0 ? 0 : std::clamp<int64_t>(start - window + 1, 0, work.last);
    work.out = to + b * T * N * H + i % K * G * H;
    work.log_total = log_total->typed_data() + (b * N + i % K * G) * T;
    const Room room = room_of(code().prefill_bytes(work));
    work.split = room.get();
    const int64_t slot_blocks = (work.last - work.first + kSlots - 1) / kSlots;
    in_parallel(pool, slot_blocks, [&](int64_t block) { code().split_slots(work, block); });
    const int64_t blocks = (T * G + kQueries - 1) / kQueries, threads = std::max<int64_t>(pool.num_threads(), 1);
    const int64_t together = std::clamp<int64_t>(blocks / (3 * threads), 1, kMostBlocks);
    in_parallel(pool, (blocks + together - 1) / together, [&](int64_t i) {
      code().attend_queries(work, i * together, std::min(together, blocks - i * together));
    });
  }
  narrow_all(pool, result, out->untyped_data(), *q_type);
  return ffi::Error::Success();
}

// Chooses the lists of one layer, in place.
ffi::Error choose_tokens(ffi::ThreadPool pool, ffi::Buffer<ffi::S32> lists, ffi::AnyBuffer query, ffi::AnyBuffer labels,
                         ffi::Buffer<ffi::S32> source, ffi::Buffer<ffi::PRED> is_due, ffi::Buffer<ffi::S32> first,
                         ffi::Buffer<ffi::S32> last, ffi::Buffer<ffi::S32> num_allowed, ffi::RemainingArgs scales,
                         ffi::Result<ffi::Buffer<ffi::S32>> out, int64_t layer, bool by_keys, bool dilate) {
  const auto shape = lists.dimensions();
  if (shape.size() != 4 || source.dimensions().size() != 3 || query.dimensions().size() != 3 ||
      labels.dimensions().size() != 4) {
    return wrong("lists must be [L, B, J, C], source [B, L, J], queries [B, N, R], labels and keys of four dimensions");
  }
  const int64_t L = shape[0], B = shape[1], J = shape[2], C = shape[3], layers = source.dimensions()[1];
  const int64_t N = query.dimensions()[1], R = query.dimensions()[2], K = labels.dimensions()[1];
  const int64_t rows = labels.dimensions()[2], S = by_keys ? rows : labels.dimensions()[3];
  if (!has_shape(query, {B, N, R}) || !has_shape(source, {B, layers, J}) || !has_shape(is_due, {B}) ||
      !has_shape(first, {B}) || !has_shape(last, {B}) || !has_shape(num_allowed, {B}) || layer < 0 || layer >= L ||
      layer >= layers || labels.dimensions()[0] != B || K < 1 || J < K || J % K || N < J || N % J || S > INT32_MAX) {
    return wrong("the shapes of lists, queries, labels and plan do not fit each other");
  }
  const auto query_type = float_type(query.element_type());
  const bool has_codes = labels.element_type() == ffi::U8, has_int8_keys = by_keys && labels.element_type() == ffi::S8;
  const auto type = has_codes       ? std::optional(rows < R ? Type::kNibbles : Type::kBytes)
                    : has_int8_keys ? std::optional(Type::kBytes)
                                    : float_type(labels.element_type());
  if (!query_type || !type) return wrong("queries and labels must be float32, bfloat16 or float16, or labels uint8");
  const int64_t expected = by_keys ? S : *type == Type::kNibbles ? (R + 1) / 2 : R;
  if (rows != expected || (by_keys && (has_codes || labels.dimensions()[3] != R))) return wrong("R differs");
  std::optional<ffi::AnyBuffer> of_codes;
  std::optional<Type> scale_type = Type::kFloat32;
  if (has_codes) {
    const auto given = scales.get<ffi::AnyBuffer>(0);
    if (!given || !has_shape(*given, {B, K, 2, S})) return wrong("codes need scales [B, K, 2, S]");
    of_codes = *given, scale_type = float_type(given->element_type());
    if (!scale_type) return wrong("scales must be float32, bfloat16 or float16");
  }
  const float* key_scales = nullptr;
  if (has_int8_keys) {
    const auto given = scales.get<ffi::Buffer<ffi::F32>>(0);
    if (!given || !has_shape(*given, {B, K, S})) return wrong("keys of 8 bits need scales [B, K, S]");
    key_scales = given->typed_data();
  }
  int32_t* const lists_out = reinterpret_cast<int32_t*>(changed(lists, out));
  std::vector<int64_t> chosen;
  for (int64_t i = 0; i < B * J; ++i) {
    if (is_due.typed_data()[i / J] && source.typed_data()[(i / J * layers + layer) * J + i % J] == layer * J + i % J) {
      chosen.push_back(i);
    }
  }
  if (chosen.empty()) return ffi::Error::Success();
  const int64_t G = N / J;
  const std::vector<float> wide = widened(query, *query_type);
  in_parallel(pool, chosen.size(), [&](int64_t piece) {
    const int64_t i = chosen[piece], b = i / J, j = i % J, k = j / (J / K);
    static thread_local std::vector<float> scratch;
    SelectWork work{};
    work.query = &wide[(b * N + j * G) * R];
    work.labels = at(labels, (b * K + k) * labels.dimensions()[2] * labels.dimensions()[3], *type);
    if (of_codes) work.scales = at(*of_codes, (b * K + k) * 2 * S, *scale_type);
    if (key_scales) work.scales = key_scales + (b * K + k) * S;
    work.type = *type, work.scale_type = *scale_type;
    work.by_keys = by_keys;
    work.scale = 1 / std::sqrt(static_cast<float>(R));
    work.G = G, work.R = R, work.S = S, work.C = C;
    work.first = std::clamp<int64_t>(first.typed_data()[b], 0, S);
    work.last = std::clamp<int64_t>(last.typed_data()[b], work.first, S);
    work.num_allowed = num_allowed.typed_data()[b];
    work.dilate = dilate;
    scratch.resize((G + 1) * (work.last - work.first + 32) + G * (R + 1));
    work.scratch = scratch.data();
    work.list = lists_out + ((layer * B + b) * J + j) * C;
    code().choose(work);
  });
  return ffi::Error::Success();
}

// Writes rows of new tokens into two arrays of the cache, in place: keys and values, or the scales of their rows.
ffi::Error append_tokens(ffi::AnyBuffer keys, ffi::AnyBuffer values, ffi::AnyBuffer k, ffi::AnyBuffer v,
                         ffi::Buffer<ffi::S32> slots, ffi::Result<ffi::AnyBuffer> keys_out,
                         ffi::Result<ffi::AnyBuffer> values_out) {
  const auto type = row_type(keys.element_type());
  const size_t rank = keys.dimensions().size();
  if (!type || (rank != 3 && rank != 4) || slots.dimensions().size() != 2) {
    return wrong("the cache must be [B, K, S, H] or [B, K, S], in float32, bfloat16, float16 or int8, and slots [B, T]");
  }
  const int64_t B = keys.dimensions()[0], K = keys.dimensions()[1], S = keys.dimensions()[2];
  const int64_t H = rank == 4 ? keys.dimensions()[3] : 1, T = slots.dimensions()[1];
  const auto differs = [&](const ffi::AnyBuffer& array, int64_t second, int64_t third) {
    const bool fits = rank == 4 ? has_shape(array, {B, second, third, H}) : has_shape(array, {B, second, third});
    return !fits || array.element_type() != keys.element_type();
  };
  if (differs(values, K, S)) return wrong("values differ");
  if (differs(k, T, K) || differs(v, T, K)) return wrong("new tokens must be [B, T, K, H] in the dtype of the cache");
  if (!has_shape(slots, {B, T})) return wrong("slots must be [B, T]");
  char *const to_keys = changed(keys, keys_out), *const to_values = changed(values, values_out);
  const int64_t bytes = H * size_of(*type);
  for (int64_t i = 0; i < B * T; ++i) {
    const int64_t slot = slots.typed_data()[i];
    if (slot < 0 || slot >= S) continue;
    for (int64_t head = 0; head < K; ++head) {
      const int64_t to = ((i / T * K + head) * S + slot) * bytes, from = (i * K + head) * H;
      memcpy(to_keys + to, at(k, from, *type), bytes);
      memcpy(to_values + to, at(v, from, *type), bytes);
    }
  }
  return ffi::Error::Success();
}

// Makes the labels of new keys as `labels.make_labels` does, and writes them among the cache's, in place. With 0 bits
// labels are the channels themselves.
ffi::Error append_labels(ffi::AnyBuffer codes, ffi::AnyBuffer k, ffi::Buffer<ffi::S32> channels,
                         ffi::Buffer<ffi::S32> slots, ffi::RemainingArgs scales, ffi::Result<ffi::AnyBuffer> codes_out,
                         ffi::RemainingRets scales_out, int64_t layer, int64_t bits) {
  const auto type = float_type(k.element_type());
  if (!type || k.dimensions().size() != 4 || codes.dimensions().size() != 4 || channels.dimensions().size() != 4) {
    return wrong("keys must be [B, T, K, H], in float32, bfloat16 or float16, labels and channels of four dimensions");
  }
  const int64_t B = k.dimensions()[0], T = k.dimensions()[1], K = k.dimensions()[2], H = k.dimensions()[3];
  const int64_t L = channels.dimensions()[1], R = channels.dimensions()[3], S = codes.dimensions()[3];
  const int64_t half = (R + 1) / 2, rows = bits == 4 ? half : R;
  if (!has_shape(codes, {B, K, rows, S}) || !has_shape(channels, {B, L, K, R}) || !has_shape(slots, {B, T}) ||
      layer < 0 || layer >= L || R < 1 || (bits != 0 && bits != 4 && bits != 8) ||
      codes.element_type() != (bits ? ffi::U8 : k.element_type())) {
    return wrong("the labels' shape or dtype does not fit the keys, their channels and bits");
  }
  char *const to_codes = changed(codes, codes_out), *to_scales = nullptr;
  if (bits) {
    const auto given = scales.get<ffi::AnyBuffer>(0);
    auto out = scales_out.get<ffi::AnyBuffer>(0);
    if (!given || !out || !has_shape(*given, {B, K, 2, S}) || given->element_type() != k.element_type()) {
      return wrong("codes need scales [B, K, 2, S] in the dtype of the keys");
    }
    to_scales = changed(*given, *out);
  }
  const std::vector<float> wide = widened(k, *type);
  std::vector<float> label(R);
  std::vector<uint8_t> whole(2 * half, 0);
  for (int64_t i = 0; i < B * T * K; ++i) {
    const int64_t token = i / K, of_head = token / T * K + i % K, slot = slots.typed_data()[token];
    if (slot < 0 || slot >= S) continue;
    const int32_t* const of_label = channels.typed_data() + ((token / T * L + layer) * K + i % K) * R;
    float least = INFINITY, most = -INFINITY;  // or NaN, if there is one
    for (int64_t r = 0; r < R; ++r) {
      const float x = of_label[r] < 0 || of_label[r] >= H ? NAN : wide[i * H + of_label[r]];
      least = std::isnan(x) || x < least ? x : least, most = std::isnan(x) || x > most ? x : most;
      label[r] = x;
    }
    if (!bits) {
      for (int64_t r = 0; r < R; ++r) narrow(label[r], to_codes, (of_head * R + r) * S + slot, *type);
      continue;
    }
    const float highest = (1 << bits) - 1;
    const int64_t at_offset = of_head * 2 * S + slot, at_step = at_offset + S;
    narrow(least, to_scales, at_offset, *type);
    narrow((most - least) * (1 / highest), to_scales, at_step, *type);
    float step;  // the one that the dtype can hold
    code().widen(to_scales + at_step * size_of(*type), 1, *type, &step);
    const float inverse = 1 / (step > 0 ? step : 1);
    for (int64_t r = 0; r < R; ++r) {
      const float x = (label[r] - least) * inverse;
      const float inside = x > 0 ? std::min(x, highest) : 0;          // not NaN
      whole[r] = static_cast<uint8_t>((inside + 0x1p23f) - 0x1p23f);  // adding it rounds to whole numbers
    }
    for (int64_t r = 0; r < rows; ++r) {
      to_codes[(of_head * rows + r) * S + slot] = bits == 4 ? whole[r] | whole[half + r] << 4 : whole[r];
    }
  }
  return ffi::Error::Success();
}

// What `project` and `dequantise` share: the weights and their scales.
std::optional<ProjectWork> weights_of(const ffi::AnyBuffer& weights, const ffi::RemainingArgs& scales) {
  if (weights.dimensions().size() != 2) return std::nullopt;
  ProjectWork work{};
  const int64_t features = weights.dimensions()[0], width = weights.dimensions()[1];
  const bool has_codes = weights.element_type() == ffi::U8 || weights.element_type() == ffi::S8;
  const auto type = weights.element_type() == ffi::U8   ? std::optional(Type::kNibbles)
                    : weights.element_type() == ffi::S8 ? std::optional(Type::kBytes)
                                                        : float_type(weights.element_type());
  if (!type || features > INT32_MAX || width > INT32_MAX / 2) return std::nullopt;
  work.D = *type == Type::kNibbles ? 2 * width : width;
  work.features = features, work.weights = weights.untyped_data(), work.type = *type;
  if (has_codes != (scales.size() > 0) || scales.size() > 2 || (has_codes && work.D % 32)) return std::nullopt;
  for (size_t i = 0; i < scales.size(); ++i) {
    const auto array = scales.get<ffi::Buffer<ffi::F16>>(i);
    if (!array || !has_shape(*array, {features, work.D / 32})) return std::nullopt;
    (i == 0 ? work.scales : work.minima) = array->untyped_data();
  }
  return work;
}

// Features of one piece of work: few pieces, because memory is read fastest in long runs, and whole pairs of tiles.
int32_t piece_of(int32_t features, ffi::ThreadPool& pool) {
  const int64_t pieces = kPiecesPerThread * std::max<int64_t>(pool.num_threads(), 1);
  return ((features + pieces - 1) / pieces + 2 * kSide - 1) / (2 * kSide) * (2 * kSide);
}

ffi::Error project(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer weights, ffi::RemainingArgs scales,
                   ffi::Result<ffi::AnyBuffer> out) {
  const auto work = weights_of(weights, scales);
  const auto type = float_type(x.element_type());
  if (!work || !type || x.dimensions().size() != 2 || x.dimensions()[1] != work->D) {
    return wrong("x must be [rows, D], the weights [features, D] of floats or of codes with scales for each 32");
  }
  const int32_t rows = x.dimensions()[0];
  std::vector<float> wide, result;
  if (*type != Type::kFloat32) wide = widened(x, *type), result.resize(int64_t{rows} * work->features);
  float* const y = *type == Type::kFloat32 ? static_cast<float*>(out->untyped_data()) : result.data();
  const bool splits = code().split_rows && rows >= kManyRows && work->D > 0;
  const int32_t most = splits ? kSplitRows : rows, size = piece_of(work->features, pool);
  for (int32_t row = 0; row < rows; row += most) {
    ProjectWork some = *work;
    some.x = (*type == Type::kFloat32 ? static_cast<const float*>(x.untyped_data()) : wide.data()) + int64_t{row} * work->D;
    some.x_type = *type, some.rows = std::min(most, rows - row), some.y = y + int64_t{row} * work->features;
    Room room;
    if (splits) {
      room = room_of(code().split_rows_bytes(some));
      const int32_t groups = (some.rows + kSide - 1) / kSide;
      in_parallel(pool, groups, [&](int64_t group) { code().split_rows(some, group, room.get()); });
      some.split = room.get();
    }
    in_parallel(pool, (work->features + size - 1) / size, [&](int64_t piece) {
      ProjectWork part = some;
      part.first = piece * size, part.last = std::min(part.first + size, work->features);
      code().project(part);
    });
  }
  narrow_all(pool, result, out->untyped_data(), *type);
  return ffi::Error::Success();
}

ffi::Error dequantise(ffi::ThreadPool pool, ffi::AnyBuffer weights, ffi::RemainingArgs scales,
                      ffi::Result<ffi::Buffer<ffi::F32>> out) {
  const auto work = weights_of(weights, scales);
  if (!work || !work->scales || !has_shape(*out, {work->features, work->D})) return wrong("weights must be codes");
  const int32_t size = piece_of(work->features, pool);
  in_parallel(pool, (work->features + size - 1) / size, [&](int64_t piece) {
    ProjectWork part = *work;
    part.y = out->typed_data();
    part.first = piece * size, part.last = std::min(part.first + size, work->features);
    code().dequantise(part);
  });
  return ffi::Error::Success();
}

}  // namespace

#pragma GCC visibility push(default)  // all else stays inside the library

extern "C" const char* hshare_instructions() { return code().name; }

XLA_FFI_DEFINE_HANDLER_SYMBOL(hshare_dense_decode, dense_decode,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("window"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(hshare_sparse_decode, sparse_decode,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("layer")
                                  .Attr<int64_t>("num_sinks")
                                  .Attr<int64_t>("max_recent")
                                  .Attr<int64_t>("window")
                                  .Attr<int64_t>("min_length"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(hshare_split_decode, split_decode,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("num_sinks")
                                  .Attr<int64_t>("window"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(hshare_prefill_attention, prefill_attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("window"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(hshare_select, choose_tokens,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Attr<int64_t>("layer")
                                  .Attr<bool>("by_keys")
                                  .Attr<bool>("dilate"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(hshare_append_tokens, append_tokens,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(hshare_append_labels, append_labels,
                              ffi::Ffi::Bind()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .RemainingRets()
                                  .Attr<int64_t>("layer")
                                  .Attr<int64_t>("bits"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(hshare_project, project,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(hshare_dequantise, dequantise,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::Buffer<ffi::F32>>());

#pragma GCC visibility pop
