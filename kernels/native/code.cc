// The code of one instruction set. It is compiled once for each, with its own flags and its own TARGET and LANES.
#include "attention.h"
#include "project.h"
#include "selection.h"

namespace {

// Numbers of any float type, as floats.
void widen(const void* from, int64_t count, Type type, float* to) {
  switch (type) {
    case Type::kBFloat16: return widen_typed((const BFloat16*)from, count, to);
    case Type::kFloat16: return widen_typed((const Float16*)from, count, to);
    default: return widen_typed((const float*)from, count, to);
  }
}

}  // namespace

#ifdef __AMX_BF16__
#include "prefill_tiles.h"
#include "project_tiles.h"
#define BY_TILES project_by_tiles, split_rows, split_rows_bytes, split_slots, attend_queries, prefill_bytes
#else
#define BY_TILES project
#endif

#define TEXT(x) #x
#define TEXT_OF(x) TEXT(x)

extern const Code NAME_CODE(TARGET) = {TEXT_OF(TARGET), widen, attend, merge, choose, dequantise, BY_TILES};
