// Products of bf16 by tiles of 16 x 16 units (AMX). The four operations on tiles stand behind
// functions, so that a processor without them can run all the rest of this code: WA_TILES_EMULATED.
#pragma once
#include "rows.h"

namespace wa {
namespace WA_ISA {

// Eight tiles of 16 rows of 64 bytes; made before the first product of a thread, gone after the
// last.
#ifdef WA_TILES_EMULATED

struct Tiles {
    static inline thread_local float tile[8][16][16];
    template <int N> static void zero() { memset(tile[N], 0, sizeof tile[N]); }
    template <int N> static void take(const float* from, int64_t row) {
        for (int i = 0; i < 16; ++i) memcpy(tile[N][i], from + i * row, 64);
    }
    template <int N> static void give(float* to, int64_t row) {
        for (int i = 0; i < 16; ++i) memcpy(to + i * row, tile[N][i], 64);
    }
    // C += A B; a unit of A or B is a pair along the summed dimension
    template <int C, int A, int B>
    static void multiply_add() {
        for (int m = 0; m < 16; ++m)
            for (int n = 0; n < 16; n += W) {
                vf total = load(&tile[C][m][n]);
                for (int k = 0; k < 16; ++k)
                    total = Pairs::multiply_add(all(tile[A][m][k]), load(&tile[B][k][n]), total);
                store(&tile[C][m][n], total);
            }
    }
};

#else

struct Tiles {
    Tiles() {
        struct alignas(64) {
            uint8_t palette, start, rest[14];
            uint16_t bytes[16];
            uint8_t rows[16];
        } shape = {};
        shape.palette = 1;
        for (int i = 0; i < 8; ++i) shape.bytes[i] = 64, shape.rows[i] = 16;
        fence(&shape);
        _tile_loadconfig(&shape);
        fence(&shape);
    }
    ~Tiles() { _tile_release(); }
    // The compiler's intrinsics do not all say that they read memory: what is written before must
    // be there, what is written after not yet.
    static void fence(const void* at) { asm volatile("" : : "r"(at) : "memory"); }
    // the intrinsics take literal numbers
#define WA_EACH(N, DO) if constexpr (NUMBER == N) { DO(N); }
#define WA_ALL(DO)                                                                            \
    WA_EACH(0, DO)                                                                            \
    WA_EACH(1, DO) WA_EACH(2, DO) WA_EACH(3, DO) WA_EACH(4, DO) WA_EACH(5, DO) WA_EACH(6, DO) \
        WA_EACH(7, DO)
#define WA_ZERO(N) _tile_zero(N)
#define WA_TAKE(N) _tile_loadd(N, from, row * 4)
#define WA_GIVE(N) _tile_stored(N, to, row * 4)
    template <int NUMBER> static void zero() { WA_ALL(WA_ZERO) }
    template <int NUMBER> static void take(const float* from, int64_t row) {
        fence(from);
        WA_ALL(WA_TAKE) fence(from);
    }
    template <int NUMBER> static void give(float* to, int64_t row) { WA_ALL(WA_GIVE) }
    template <int C, int A, int B>
    static void multiply_add() {
        static_assert(C == (A - 4) * 2 + B - 6, "the sums of tiles 4, 5 times 6, 7 are 0 to 3");
        if constexpr (C == 0) _tile_dpbf16ps(0, 4, 6);
        if constexpr (C == 1) _tile_dpbf16ps(1, 4, 7);
        if constexpr (C == 2) _tile_dpbf16ps(2, 5, 6);
        if constexpr (C == 3) _tile_dpbf16ps(3, 5, 7);
    }
#undef WA_EACH
#undef WA_ALL
#undef WA_ZERO
#undef WA_TAKE
#undef WA_GIVE
};

#endif

// Tile NUMBER = rows m .. m + 15 and units k .. k + 15 of a; units from `depth` on may be anything
// finite where the step is 1, else they are 0.
template <int NUMBER>
static inline void take_left(Strided a, int m, int k, int depth) {
    if (a.step == 1) return Tiles::take<NUMBER>(a.at + m * a.row + k, a.row);
    // a is the transpose of what lies in memory (a.row == 1)
    alignas(64) float lines[256], turned[256];
    for (int i = 0; i < 16; ++i) {
        if (k + i < depth) memcpy(lines + i * 16, a.at + (k + i) * a.step + m, 64);
        else memset(lines + i * 16, 0, 64);
    }
    turn(lines, 16, turned, 16, 16, 16);
    Tiles::take<NUMBER>(turned, 16);
}

// Up to 32 x 32 of `out`: R x C tiles.
template <int R, int C>
static inline void tile_block(Strided a, const float* b, int64_t b_row, float* out, int64_t out_row,
                              int m, int n, int depth, bool add) {
    float* const corner = out + m * out_row + n;
    if (add) {
        Tiles::take<0>(corner, out_row);
        if constexpr (C == 2) Tiles::take<1>(corner + 16, out_row);
        if constexpr (R == 2) Tiles::take<2>(corner + 16 * out_row, out_row);
        if constexpr (R == 2 && C == 2) Tiles::take<3>(corner + 16 * out_row + 16, out_row);
    } else {
        Tiles::zero<0>(), Tiles::zero<1>(), Tiles::zero<2>(), Tiles::zero<3>();
    }
    for (int k = 0; k < depth; k += 16) {
        take_left<4>(a, m, k, depth);
        Tiles::take<6>(b + k * b_row + n, b_row);
        Tiles::multiply_add<0, 4, 6>();
        if constexpr (C == 2) {
            Tiles::take<7>(b + k * b_row + n + 16, b_row);
            Tiles::multiply_add<1, 4, 7>();
        }
        if constexpr (R == 2) take_left<5>(a, m + 16, k, depth), Tiles::multiply_add<2, 5, 6>();
        if constexpr (R == 2 && C == 2) Tiles::multiply_add<3, 5, 7>();
    }
    Tiles::give<0>(corner, out_row);
    if constexpr (C == 2) Tiles::give<1>(corner + 16, out_row);
    if constexpr (R == 2) Tiles::give<2>(corner + 16 * out_row, out_row);
    if constexpr (R == 2 && C == 2) Tiles::give<3>(corner + 16 * out_row + 16, out_row);
}

// As `product`, by tiles: `out` and a have rows up to a multiple of 16, b has finite ones, and a
// row of a has units up to one.
template <>
void product<Pairs>(Strided a, const float* b, int64_t b_row, float* out, int64_t out_row, int rows,
                    int width, int depth, bool add) {
    for (int n = 0; n < width; n += 32)
        for (int m = 0; m < rows; m += 32) {
            const bool two_rows = m + 16 < rows, two_columns = n + 16 < width;
            if (two_rows && two_columns)
                tile_block<2, 2>(a, b, b_row, out, out_row, m, n, depth, add);
            else if (two_rows) tile_block<2, 1>(a, b, b_row, out, out_row, m, n, depth, add);
            else if (two_columns) tile_block<1, 2>(a, b, b_row, out, out_row, m, n, depth, add);
            else tile_block<1, 1>(a, b, b_row, out, out_row, m, n, depth, add);
        }
}

}  // namespace WA_ISA
}  // namespace wa
