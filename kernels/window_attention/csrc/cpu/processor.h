// Which instruction sets this build has, which the processor has, and which one is used.
#pragma once
#include "job.h"

namespace wa {

struct Choice {
    const Kernels* kernels;
    const char* refusal;  // why what WINDOW_ATTENTION_CPU_ISA asks for cannot be had, or null
};

// Made once. WINDOW_ATTENTION_CPU_ISA = scalar, avx2, avx512, avx512bf16, amx or amx_emulated
// forces one.
const Choice& chosen();

}  // namespace wa
