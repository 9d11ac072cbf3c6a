// No include guard: the first time may be from torch/types.h, the second from a source that registers operators.
#ifndef SPECGEN_WITHOUT_LIBRARY
#include_next <torch/library.h>
#endif
