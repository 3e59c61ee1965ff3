// Rows of tokens: from the tensors into packed matrices of units, from sums in float back into the
// tensors, and the turns in between.
#pragma once
#include "product.h"

namespace wa {
namespace WA_ISA {

struct Bf16 { uint16_t bits; };
struct Half { uint16_t bits; };

static inline int32_t bits_of(float x) { int32_t i; memcpy(&i, &x, 4); return i; }
static inline float float_of(uint32_t i) { float x; memcpy(&x, &i, 4); return x; }

// Rounded to the nearest bf16, ties to even, in the high half of each lane; the low half is
// whatever.
static inline vi rounded(vf x) {
    const vi bits = (vi)x;
    const vi up = bits + (((bits >> 16) & all_int(1)) + all_int(0x7fff));
    return x == x ? up : all_int(0x7fc00000);
}

static inline vh to_bf16(vf x) {
#if defined(__AVX512BF16__)
    return (vh)_mm512_cvtneps_pbh((__m512)x);
#else
    return __builtin_convertvector((rounded(x) >> 16) & all_int(0xffff), vh);
#endif
}

#if defined(__AVX512BF16__)
// 16 + 16 bf16 -> one of each per lane, the first in the low half.
static inline vf interleave(__m512i x) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9,
                                           24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1,
                                           16, 0);
    return (vf)_mm512_permutexvar_epi16(order, x);
}
#endif

// One unit of `Pairs` per lane: low from a, high from b.
static inline vf pair(vf a, vf b) {
#if defined(__AVX512BF16__)
    return interleave((__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
#else
    return (vf)(((rounded(a) >> 16) & all_int(0xffff)) |
                (rounded(b) & all_int(int32_t(0xffff0000u))));
#endif
}

// As above; also leaves the bf16 of a in `rows` and those of b `step` numbers behind.
static inline vf pair(vf a, vf b, uint16_t* rows, int64_t step) {
#if defined(__AVX512BF16__)
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
    _mm256_storeu_si256((__m256i*)rows, _mm512_castsi512_si256(both));
    _mm256_storeu_si256((__m256i*)(rows + step), _mm512_extracti64x4_epi64(both, 1));
    return interleave(both);
#else
    *(vh_any*)rows = to_bf16(a), *(vh_any*)(rows + step) = to_bf16(b);
    return pair(a, b);
#endif
}

static inline float wide(float x) { return x; }
static inline float wide(Bf16 x) { return float_of(uint32_t(x.bits) << 16); }
static inline float wide(Half x) {
    const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
    if (rest >= 0x7c00) return float_of(sign | 0x7f800000u | (rest & 0x3ff) << 13);
    // Subnormal: in steps of 2^-24, from the integer. As bits of a float32 they would be subnormal
    // there too, and read as 0 where the caller has the processor take such operands as 0.
    const float magnitude =
        rest < 0x400 ? float(rest) * 5.9604644775390625e-8f : float_of((rest << 13) + 0x38000000u);
    return float_of(sign | uint32_t(bits_of(magnitude)));
}

static inline void narrow(float x, float& to) { to = x; }
static inline void narrow(float x, Bf16& to) {
    const uint32_t bits = uint32_t(bits_of(x));
    to.bits = x == x ? uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) : uint16_t(0x7fc0);
}
static inline void narrow(float x, Half& to) {
    const uint32_t bits = uint32_t(bits_of(x));
    const uint32_t sign = (bits >> 16) & 0x8000;
    const uint32_t rest = bits & 0x7fffffff;
    if (rest >= 0x7f800001u) to.bits = uint16_t(sign | 0x7e00);
    else if (rest >= 0x477ff000u) to.bits = uint16_t(sign | 0x7c00);  // 65520 and more
    else if (rest < 0x38800000u)  // subnormal: in steps of 2^-24
        to.bits = uint16_t(sign | uint32_t(bits_of(float_of(rest) + 0.5f) - bits_of(0.5f)));
    else to.bits = uint16_t(sign | ((rest - 0x38000000u + 0xfff + ((rest >> 13) & 1)) >> 13));
}

// dim numbers, or zeros for null, into `width` units, zeros behind.
template <class Unit, class T>
static inline void load_row(const T* from, float* to, int dim, int width) {
    if (!from) {
        for (int d = 0; d < width; d += W) store(to + d, vf{});
        return;
    }
    const int used = dim / Unit::SIZE;
    if constexpr (sizeof(T) * Unit::SIZE == 4) {
        if (used % W == 0)
            for (int d = 0; d < used; d += W) store(to + d, load((const float*)from + d));
        else memcpy(to, from, used * 4);
    } else {
        int d = 0;
#if defined(__AVX512F__)
        for (; d + W <= used; d += W) {
            const __m256i bits = _mm256_loadu_si256((const __m256i*)(from + d));
            if constexpr (__is_same(T, Half)) store(to + d, (vf)_mm512_cvtph_ps(bits));
            else store(to + d, (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
        }
#elif defined(__AVX2__)
        for (; d + W <= used; d += W) {
            const __m128i bits = _mm_loadu_si128((const __m128i*)(from + d));
            if constexpr (__is_same(T, Half)) store(to + d, (vf)_mm256_cvtph_ps(bits));
            else store(to + d, (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
        }
#endif
        for (; d < used; ++d) to[d] = wide(from[d]);
    }
    for (int d = used; d < width; ++d) to[d] = 0;
}

// factor * (from - along * other), rounded; other may be null.
template <class T>
static inline void store_row(const float* from, float factor, T* to, int dim) {
    int d = 0;
    for (; d + W <= dim; d += W) {
        const vf x = load(from + d) * all(factor);
        if constexpr (__is_same(T, float)) store(to + d, x);
        else if constexpr (__is_same(T, Bf16)) *(vh_any*)(to + d) = to_bf16(x);
#if defined(__AVX512F__)
        else
            _mm256_storeu_si256((__m256i*)(to + d),
                                _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
        else
            _mm_storeu_si128((__m128i*)(to + d),
                             _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
        else for (int i = 0; i < W; ++i) narrow(x[i], to[d + i]);
#endif
    }
    for (; d < dim; ++d) narrow(from[d] * factor, to[d]);
}

#if defined(__AVX512F__)
// 16 x 16 lanes of 32 bits.
static inline void turn_block(const float* from, int64_t from_row, float* to, int64_t to_row) {
    __m512i r[16], t[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(from + i * from_row);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        const int at = i / 4 * 8 + i % 4;
        t[at] = _mm512_shuffle_i32x4(r[at], r[at + 4], 0x88);
        t[at + 4] = _mm512_shuffle_i32x4(r[at], r[at + 4], 0xdd);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        _mm512_storeu_si512(to + i * to_row, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
        _mm512_storeu_si512(to + (i + 8) * to_row, _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd));
    }
}
#endif

// (rows, columns) -> (columns, rows), both multiples of 16.
static inline void turn(const float* from, int64_t from_row, float* to, int64_t to_row, int rows,
                        int columns) {
#if defined(__AVX512F__)
    for (int i = 0; i < rows; i += 16)
        for (int j = 0; j < columns; j += 16)
            turn_block(from + i * from_row + j, from_row, to + j * to_row + i, to_row);
#else
    for (int i = 0; i < rows; i += 4)
        for (int j = 0; j < columns; ++j)
            for (int r = 0; r < 4; ++r) to[j * to_row + i + r] = from[(i + r) * from_row + j];
#endif
}

// (rows, width) of bf16 -> (rows / 2, width) of units: what stood one above the other becomes a
// pair. row: units between rows of `from`.
static inline void pair_rows(const float* from, int64_t row, float* to, int rows, int width) {
#if defined(__AVX512F__)
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40,
                                         8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    for (int i = 0; i < rows; i += 2)
        for (int d = 0; d < width; d += 16) {
            const __m512i a = _mm512_castsi256_si512(
                _mm256_loadu_si256((const __m256i*)(from + i * row + d / 2)));
            const __m512i b = _mm512_castsi256_si512(
                _mm256_loadu_si256((const __m256i*)(from + (i + 1) * row + d / 2)));
            _mm512_storeu_si512(to + i / 2 * width + d, _mm512_permutex2var_epi16(a, low, b));
        }
#else
    for (int i = 0; i < rows; i += 2)
        for (int d = 0; d < width; d += 2) {
            uint32_t a, b, pairs[2];
            memcpy(&a, from + i * row + d / 2, 4), memcpy(&b, from + (i + 1) * row + d / 2, 4);
            pairs[0] = (a & 0xffffu) | b << 16, pairs[1] = a >> 16 | (b & 0xffff0000u);
            memcpy(to + i / 2 * width + d, pairs, 8);
        }
#endif
}

}  // namespace WA_ISA
}  // namespace wa
