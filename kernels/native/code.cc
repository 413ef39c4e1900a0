// The code of one instruction set. It is compiled once for each, with its own flags and its own TARGET and LANES.
#include "attention.h"
#include "project.h"
#include "selection.h"

#define TEXT(x) #x
#define TEXT_OF(x) TEXT(x)

extern const Code NAME_CODE(TARGET) = {TEXT_OF(TARGET), attend, merge, choose, project, dequantise};
