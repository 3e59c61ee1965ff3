// While an object of this lives, results below the smallest normal float32 become 0 on this thread.
// The mask of -100 leaves entries of the map near 1e-30; times a small gradient they are subnormal,
// and x86 takes many times longer over such numbers. Operands are left as they are: subnormal
// float16 numbers are exact on their way through float32.
#pragma once
#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace wa {

struct FlushDenormals {
#if defined(__SSE2__)
    const unsigned before = _mm_getcsr();
    FlushDenormals() { _mm_setcsr(before | 0x8000u); }
    ~FlushDenormals() { _mm_setcsr(before); }
#else
    FlushDenormals() {}  // elsewhere they cost little
#endif
    FlushDenormals(const FlushDenormals&) = delete;
    FlushDenormals& operator=(const FlushDenormals&) = delete;
};

}  // namespace wa
