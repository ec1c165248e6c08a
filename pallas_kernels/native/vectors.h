// bf16 and float32 in the widest registers that the CPU multiplies bf16 in.
#pragma once

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define NATIVE_AVX512
#include "avx512.h"
#else
#include "avx2.h"
#endif
