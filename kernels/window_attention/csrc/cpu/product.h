// Products of small matrices that lie in the first two caches: out[m][n] (+)= sum over k of a[m][k]
// b[k][n], summed in float. A row block of `out` is held in registers; an element of a is
// broadcast, a vector of b is read along n.
#pragma once
#include "vectors.h"

namespace wa {
namespace WA_ISA {

struct Floats {  // a unit is a float
    static constexpr int SIZE = 1;
    static inline vf multiply_add(vf a, vf b, vf c) { return a * b + c; }
};

struct Pairs {  // a unit is two bf16, neighbours along k
    static constexpr int SIZE = 2;
    static inline vf multiply_add(vf a, vf b, vf c) {
#if defined(__AVX512BF16__)
        return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
#else
        const vf a_high = (vf)((vi)a & all_int(int32_t(0xffff0000u))),
                 b_high = (vf)((vi)b & all_int(int32_t(0xffff0000u)));
        return (vf)((vi)a << 16) * (vf)((vi)b << 16) + (a_high * b_high + c);
#endif
    }
};

// Where a[m][k] lies: a + m * row + k * step, in units.
struct Strided {
    const float* at;
    int64_t row, step;
};

template <class Unit, int R, int C>
static inline __attribute__((always_inline)) void block(Strided a, const float* b, int64_t b_row,
                                                        float* out, int64_t out_row, int depth,
                                                        bool add) {
    vf sums[R][C];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) sums[r][c] = add ? load(out + r * out_row + c * W) : vf{};
    const float* left = a.at;
    for (int k = 0; k < depth; ++k, left += a.step, b += b_row) {
        vf right[C];
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) right[c] = load(b + c * W);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const vf x = all(left[r * a.row]);
#pragma GCC unroll 4
            for (int c = 0; c < C; ++c) sums[r][c] = Unit::multiply_add(x, right[c], sums[r][c]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) store(out + r * out_row + c * W, sums[r][c]);
}

template <class Unit, int R, int C>
static void columns(Strided a, const float* b, int64_t b_row, float* out, int64_t out_row, int rows,
                    int depth, bool add) {
    int m = 0;
    for (; m + R <= rows; m += R)
        block<Unit, R, C>({a.at + m * a.row, a.row, a.step}, b, b_row, out + m * out_row, out_row,
                          depth, add);
    if constexpr (R > 1)
        if (m < rows)
            columns<Unit, R / 2, C>({a.at + m * a.row, a.row, a.step}, b, b_row, out + m * out_row,
                                    out_row, rows - m, depth, add);
}

// width: columns of `out`, a multiple of W. Row r of `out` begins at out + r * out_row.
template <class Unit>
static void product(Strided a, const float* b, int64_t b_row, float* out, int64_t out_row, int rows,
                    int width, int depth, bool add) {
    constexpr int WIDE = W == 16 ? 4 : 2;
    int n = 0;
    for (; n + WIDE * W <= width; n += WIDE * W)
        columns<Unit, 6, WIDE>(a, b + n, b_row, out + n, out_row, rows, depth, add);
    if constexpr (WIDE == 4) {
        if (n + 3 * W <= width) {
            columns<Unit, 6, 3>(a, b + n, b_row, out + n, out_row, rows, depth, add);
            n += 3 * W;
        }
        if (n + 2 * W <= width) {
            columns<Unit, 8, 2>(a, b + n, b_row, out + n, out_row, rows, depth, add);
            n += 2 * W;
        }
    }
    if (n < width) columns<Unit, 8, 1>(a, b + n, b_row, out + n, out_row, rows, depth, add);
}

}  // namespace WA_ISA
}  // namespace wa
