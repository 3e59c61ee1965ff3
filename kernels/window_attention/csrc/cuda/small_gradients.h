// Parts of the backward for windows of up to 64 tokens: variants and their shared memory, sums over
// pairs, the way through x / |x|.
#pragma once
#include <type_traits>

#include "small_epilogue.h"

// LEAN: tables as fragments in shared memory, sums in registers, two stages; no factor after the
// softmax, no dropout. Otherwise: tables as they are and sums in shared memory, one stage; does
// everything. EPILOGUE: that of args.h, and the gradient of the
// log-sum-exp; serves arguments without them.
template <typename T_, int D_, int NT_, bool W_, bool COSINE_, bool LEAN_, bool EPILOGUE_ = false>
struct BackwardKind {
    using T = T_;
    static constexpr int D = D_;
    static constexpr int NT = NT_;
    static constexpr int WARPS = (NT + 1) / 2;
    static constexpr int ROWS = 16 * WARPS;
    static constexpr int THREADS = 32 * WARPS;
    static constexpr int TILE = ROWS * D * 2, STAGE = 4 * TILE, STAGES = LEAN_ ? 2 : 1;
    static constexpr bool W = W_;
    static constexpr bool COSINE = COSINE_;
    static constexpr bool LEAN = LEAN_;
    static constexpr bool EPILOGUE = EPILOGUE_;
    using WithEpilogue = BackwardKind<T_, D_, NT_, W_, COSINE_, LEAN_, true>;
    static constexpr bool ONE_SCALE_SUM = LEAN && COSINE && !W;
    // the scale is left to the rows of dq and dk, which are scaled anyway; only in bf16, since dS
    // without it may be too small for fp16
    static constexpr bool LATE_SCALE = COSINE && !W && std::is_same<T, bf16>::value;
    // a multiprocessor, as far as registers go
    static constexpr int BLOCKS = LEAN && !W && !COSINE && !EPILOGUE ? 3 : LEAN ? 2 : 1;
    static constexpr int PAIRS = ROWS * ROWS * 2;
    static constexpr int FRAGMENTS = WARPS * NT * 32 * 16;
    static constexpr int TABLE = (MOST_OFFSETS + 3) / 4 * 16;
    static constexpr int P = STAGES * STAGE;
    static constexpr int DS = P + PAIRS;
    static constexpr int PLACES = DS + PAIRS;
    static constexpr int NORMS = PLACES + ROWS * 4;
    static constexpr int TABLES = NORMS + (COSINE ? 2 * ROWS * 4 : 0);          // bias, scale, post
    static constexpr int SUMS = TABLES + (LEAN ? (W ? 2 : 1) * FRAGMENTS : 3 * TABLE);
    static_assert(!LEAN || P >= FRAGMENTS, "the stages hold a fragment-ordered matrix at the end");
    static int shared(const WindowAttentionArgs& a) {
        const int tables = (a.grad_bias != nullptr) + (a.grad_scale != nullptr) +
                           (a.grad_post != nullptr);
        return SUMS + (LEAN ? 0 : tables * FRAGMENTS);
    }
};

// Four numbers of a table at this thread's pairs of columns 8 n ..: `from` is the rows' part of the
// offset
WA_DEVICE float4 gather(const float* table, const int (&from)[2], uint2 keys) {
    const int a = place_offset(keys.x), b = place_offset(keys.y);
    return make_float4(table[from[0] - a], table[from[0] - b], table[from[1] - a],
                       table[from[1] - b]);
}

// (offsets) sums over the pairs of each offset of a matrix in fragment order; one thread an entry,
// pairs by rising query
template <class K> WA_DEVICE void sum_by_offset(const SmallProblem& p, const float* pairs,
                                                float* out, int thread,
                                                float factor = 1.f) {
    const int height = p.a.window[0], width = p.a.window[1];
    for (int t = thread; t < p.offsets; t += K::THREADS) {
        const int dy = t / (2 * width - 1) - (height - 1), dx = t % (2 * width - 1) - (width - 1);
        float sum = 0.f;
        for (int y = dy > 0 ? dy : 0; y < height && y - dy < height; ++y)
            for (int x = dx > 0 ? dx : 0; x < width && x - dx < width; ++x) {
                const int i = y * width + x, j = i - dy * width - dx;
                sum += pairs[(((i / 16 * K::NT + j / 8) * 32 + i % 8 * 4 + j % 8 / 2) * 2 +
                              i % 16 / 8) *
                                 2 +
                             j % 2];
            }
        out[t] = sum * factor;
    }
}

template <typename T> WA_DEVICE uint32_t times(uint32_t pair, float by) {
    const float2 x = unpack2<T>(pair);
    return pack2<T>(x.x * by, x.y * by);
}
// Rounds the rows of q and k to unit length in place, as the gradients through x / |x| need them:
// one thread a row of both tiles
template <typename T, int D> WA_DEVICE void normalise(unsigned char* tiles, const float* inverse,
                                                      int thread) {
    const float by = inverse[thread];
#pragma unroll
    for (int c = 0; c < D / 8; ++c) {
        uint4* word = reinterpret_cast<uint4*>(tiles + at<D>(thread, c));
        *word = make_uint4(times<T>(word->x, by), times<T>(word->y, by), times<T>(word->z, by),
                           times<T>(word->w, by));
    }
}

// out: 16 rows of a tile, from `rows` on, times all rows of another; first: sixteen_rows and
// eight_rows
template <typename T, int D, int NT>
WA_DEVICE void rows_with_rows(float (&out)[NT][4], const unsigned char* rows, int first,
                              const unsigned char* columns, int first_column) {
    uint32_t a[D / 16][4];
    clear(out);
#pragma unroll
    for (int i = 0; i < D / 16; ++i) ldsm4(a[i], rows + (first ^ i << 5));
#pragma unroll
    for (int n = 0; n < NT; ++n) {
        uint32_t b[D / 8];
        rows_as_columns<D>(b, columns, n, first_column);
#pragma unroll
        for (int i = 0; i < D / 16; ++i) mma<T>(out[n], a[i], b[2 * i], b[2 * i + 1]);
    }
}

// What `from`, laid out like the log-sum-exp, holds for rows `row` and `row + 8` of a window, its
// row 0 being there; `otherwise` on rows that are no query
WA_DEVICE void read_rows(float (&x)[2], const SmallProblem& p, const Window& w,
                         const uint32_t* places, const float* from, int row, float otherwise) {
    bool query[2] = {row < p.tokens, row + 8 < p.tokens};
    if (!w.plain) {
#pragma unroll
        for (int h = 0; h < 2; ++h) query[h] = is_query(p, w, places, row + 8 * h);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) x[h] = query[h] ? from[row + 8 * h] : otherwise;
}
// Log-sum-exp; infinite on rows that are no query: their P is 0
WA_DEVICE void read_lse(float (&lse)[2], const SmallProblem& p, const Window& w,
                        const uint32_t* places, const float* from, int row) {
    read_rows(lse, p, w, places, from, row, INFINITY);
}

// Writes rows `row` and `row + 8` of a gradient into this warp's rows of a tile. With COSINE the
// tile `units` holds the unit vectors u, and the gradient goes through x / |x|, times `scale`: (g -
// u (u·g)) / |x|; below the floor of the norm x is only scaled.
template <typename T, int D, bool COSINE>
WA_DEVICE void put_rows(float (&g)[D / 8][4], unsigned char* tile, const unsigned char* units,
                        int row, int column, const float* inverse, bool cosine, float scale) {
    const int first = at<D>(row, 0) + column * 2;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        constexpr int HALF = 8 * D * 2;
        if (COSINE && cosine) {
            float along = 0.f, more = 0.f;
#pragma unroll
            for (int n = 0; n < D / 8; ++n) {
                const float2 u = unpack2<T>(
                    *reinterpret_cast<const uint32_t*>(units + (first ^ n << 4) + h * HALF));
                along += u.x * g[n][2 * h];
                more += u.y * g[n][2 * h + 1];
            }
            along += more;
            along = across_quad_sum(along);
            float by = inverse[row + 8 * h];
            if (by >= 0.99f / NORM_FLOOR) along = 0.f;
            by *= scale;
#pragma unroll
            for (int n = 0; n < D / 8; ++n) {
                const float2 u = unpack2<T>(
                    *reinterpret_cast<const uint32_t*>(units + (first ^ n << 4) + h * HALF));
                g[n][2 * h] = (g[n][2 * h] - u.x * along) * by;
                g[n][2 * h + 1] = (g[n][2 * h + 1] - u.y * along) * by;
            }
        }
#pragma unroll
        for (int n = 0; n < D / 8; ++n)
            *reinterpret_cast<uint32_t*>(tile + (first ^ n << 4) + h * HALF) = pack2<T>(
                g[n][2 * h], g[n][2 * h + 1]);
    }
}
