// torch's own, over the lean ATen.h, without the headers that only register operators.
#pragma once
#define SPECGEN_WITHOUT_LIBRARY
#include_next <torch/types.h>
#undef SPECGEN_WITHOUT_LIBRARY
