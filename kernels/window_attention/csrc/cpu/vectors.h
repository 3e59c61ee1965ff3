// Vectors of the widest kind that the flags of this translation unit allow: 16, 8 or 4 floats. A
// unit of a product is 32 bits wide: a float, or (in `Pairs`) two neighbouring bf16 numbers of the
// summed dimension.
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace wa {
namespace WA_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef float vf_any __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t vi_any __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint16_t vh __attribute__((vector_size(2 * W)));
typedef uint16_t vh_any __attribute__((vector_size(2 * W), aligned(2), may_alias));

static inline vf load(const float* p) { return *(const vf_any*)p; }
static inline void store(float* p, vf x) { *(vf_any*)p = x; }
static inline vi load_int(const int32_t* p) { return *(const vi_any*)p; }
static inline vf all(float x) { return x - vf{}; }
static inline vi all_int(int32_t x) { return x - vi{}; }

// The larger one; b where either is not a number.
static inline vf larger(vf a, vf b) {
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
    return (vf)_mm_max_ps((__m128)a, (__m128)b);
#else
    return a > b ? a : b;
#endif
}

static inline float largest(vf x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)x);
#else
    float m = x[0];
    for (int i = 1; i < W; ++i) m = m > x[i] ? m : x[i];
    return m;
#endif
}

static inline float sum(vf x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#else
    for (int half = W / 2; half; half /= 2)
        for (int i = 0; i < half; ++i) x[i] += x[i + half];
    return x[0];
#endif
}

// 2^x for x <= 127, at least 2^-100: x is split into an integer and a rest in [-0.5, 0.5], for
// which a polynomial stands that was fitted to the least relative error (degree 6: 2e-9, degree 4:
// 4e-6). Not a number stays so.
template <bool EXACT>
static inline vf exp2v(vf x) {
    x = larger(all(-100.0f), x);
#if defined(__AVX512F__)
    const vf whole = (vf)_mm512_roundscale_ps((__m512)x,
                                              _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
             f = x - whole;
#else
    const vf shifted = x + all(12582912.0f);  // 1.5 * 2^23: the integer stands in the low bits
    const vf f = x - (shifted - all(12582912.0f));
#endif
    vf p;
    if (EXACT) {
        p = ((all(0.00015345811f) * f + all(0.0013399931f)) * f + all(0.009618489f)) * f +
            all(0.055503286f);
        p = ((p * f + all(0.24022646f)) * f + all(0.6931472f)) * f + all(1.0f);
    } else {
        p = (((all(0.009570101f) * f + all(0.05591786f)) * f + all(0.24024744f)) * f +
             all(0.6931218f)) *
                f +
            all(0.9999993f);
    }
#if defined(__AVX512F__)
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)whole);
#else
    return (vf)((vi)p + ((vi)shifted << 23));
#endif
}

// log2 of positive finite numbers that are not subnormal: with x = 2^n m, m in [sqrt(1/2),
// sqrt(2)), and s = (m - 1) / (m + 1), it is n + 2 / ln 2 (s + s^3 / 3 + s^5 / 5 + ...), of which
// the first term left out is below 2e-9.
static inline vf log2v(vf x) {
    const vi n = ((vi)x - all_int(0x3f3504f3)) >> 23;
    const vf m = (vf)((vi)x - (n << 23)), s = (m - all(1.0f)) / (m + all(1.0f)), t = s * s;
    const vf series = (((all(0.32059890f) * t + all(0.41219858f)) * t + all(0.57707802f)) * t +
                       all(0.96179669f)) *
                          t +
                      all(2.8853901f);
    const vf found = __builtin_convertvector(n, vf) + series * s;
    return x == x ? found : x;
}

}  // namespace WA_ISA
}  // namespace wa
