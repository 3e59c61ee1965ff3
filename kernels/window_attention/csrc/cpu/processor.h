// Which instruction sets this build has, which the processor has, and which one is used.
#pragma once
#include "job.h"

namespace wa {

// What a processor has, as far as the choice depends on it. WA_TILES: AMX, and the system lets this
// process have its tiles.
enum : unsigned { WA_AVX2 = 1, WA_AVX512 = 2, WA_AVX512_BF16 = 4, WA_TILES = 8, WA_INTEL = 16 };

struct Choice {
    const Kernels* kernels;
    const char* refusal;  // why what WINDOW_ATTENTION_CPU_ISA asks for cannot be had, or null
};

// Made once. WINDOW_ATTENTION_CPU_ISA = scalar, avx2, avx512, avx512bf16, amx or amx_emulated
// forces one.
const Choice& chosen();

// The name of what a processor with these features uses.
const char* best(unsigned features);

}  // namespace wa
