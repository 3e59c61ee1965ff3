// Parts of the backward for windows of up to 64 tokens: variants and their shared memory, sums over pairs, the way through x / |x|.
#pragma once
#include "small_layout.h"

// LEAN: tables as fragments in shared memory, sums in registers, two stages; no post-softmax weight, no dropout.
// Otherwise: tables as they are and sums in shared memory, one stage; does everything.
template <typename T_, int D_, int NT_, bool W_, bool COSINE_, bool LEAN_> struct BackwardKind {
    using T = T_;
    static constexpr int D = D_, NT = NT_, WARPS = (NT + 1) / 2, ROWS = 16 * WARPS, THREADS = 32 * WARPS;
    static constexpr int TILE = ROWS * D * 2, STAGE = 4 * TILE, STAGES = LEAN_ ? 2 : 1;
    static constexpr bool W = W_, COSINE = COSINE_, LEAN = LEAN_, ONE_WEIGHT_SUM = LEAN && COSINE && !W;
    static constexpr int BLOCKS = LEAN && !W && !COSINE ? 3 : LEAN ? 2 : 1;  // a multiprocessor, as far as registers go
    static constexpr int PAIRS = ROWS * ROWS * 2, FRAGMENTS = WARPS * NT * 32 * 16, TABLE = (MOST_OFFSETS + 3) / 4 * 16;
    static constexpr int P = STAGES * STAGE, DS = P + PAIRS, PLACES = DS + PAIRS, NORMS = PLACES + ROWS * 4;
    static constexpr int TABLES = NORMS + (COSINE ? 2 * ROWS * 4 : 0);          // bias, weight, post
    static constexpr int SUMS = TABLES + (LEAN ? (W ? 2 : 1) * FRAGMENTS : 3 * TABLE);
    static_assert(!LEAN || P >= FRAGMENTS, "the stages hold a fragment-ordered matrix at the end");
    static int shared(const WindowAttentionArgs& a) {
        const int tables = (a.grad_bias != nullptr) + (a.grad_weight != nullptr) + (a.grad_post != nullptr);
        return SUMS + (LEAN ? 0 : tables * FRAGMENTS);
    }
};

// Four numbers of a table at this thread's pairs of columns 8 n ..: `from` is the rows' part of the offset
WA_DEVICE float4 gather(const float* table, const int (&from)[2], uint2 keys) {
    const int a = place_offset(keys.x), b = place_offset(keys.y);
    return make_float4(table[from[0] - a], table[from[0] - b], table[from[1] - a], table[from[1] - b]);
}

// (offsets) sums over the pairs of each offset of a matrix in fragment order; one thread an entry, pairs by rising query
template <class K> WA_DEVICE void sum_by_offset(const SmallProblem& p, const float* pairs, float* out, int thread) {
    const int height = p.a.window[0], width = p.a.window[1];
    for (int t = thread; t < p.offsets; t += K::THREADS) {
        const int dy = t / (2 * width - 1) - (height - 1), dx = t % (2 * width - 1) - (width - 1);
        float sum = 0.f;
        for (int y = dy > 0 ? dy : 0; y < height && y - dy < height; ++y)
            for (int x = dx > 0 ? dx : 0; x < width && x - dx < width; ++x) {
                const int i = y * width + x, j = i - dy * width - dx;
                sum += pairs[(((i / 16 * K::NT + j / 8) * 32 + i % 8 * 4 + j % 8 / 2) * 2 + i % 16 / 8) * 2 + j % 2];
            }
        out[t] = sum;
    }
}

template <typename T> WA_DEVICE uint32_t times(uint32_t pair, float by) {
    const float2 x = unpack2<T>(pair);
    return pack2<T>(x.x * by, x.y * by);
}
// Rounds the rows of q and k to unit length in place, as the gradients through x / |x| need them: one thread a row of both tiles
template <typename T, int D> WA_DEVICE void normalise(unsigned char* tiles, const float* inverse, int thread) {
    const float by = inverse[thread];
#pragma unroll
    for (int c = 0; c < D / 8; ++c) {
        uint4* word = reinterpret_cast<uint4*>(tiles + at<D>(thread, c));
        *word = make_uint4(times<T>(word->x, by), times<T>(word->y, by), times<T>(word->z, by), times<T>(word->w, by));
    }
}

// Writes rows `row` and `row + 8` of a gradient into this warp's rows of a tile. With COSINE the tile holds the unit vectors u, and the
// gradient goes through x / |x|: (g - u (u·g)) / |x|; below the floor of the norm x is only scaled.
template <typename T, int D, bool COSINE>
WA_DEVICE void put_rows(float (&g)[D / 8][4], unsigned char* tile, int row, int column, const float* inverse, bool cosine) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        unsigned char* words[D / 8];
#pragma unroll
        for (int n = 0; n < D / 8; ++n) words[n] = tile + at<D>(row + 8 * h, n) + column * 2;
        if (COSINE && cosine) {
            float along = 0.f;
#pragma unroll
            for (int n = 0; n < D / 8; ++n) {
                const float2 u = unpack2<T>(*reinterpret_cast<const uint32_t*>(words[n]));
                along += u.x * g[n][2 * h] + u.y * g[n][2 * h + 1];
            }
            along = across_quad_sum(along);
            const float by = inverse[row + 8 * h];
            if (by >= 0.99f / NORM_FLOOR) along = 0.f;
#pragma unroll
            for (int n = 0; n < D / 8; ++n) {
                const float2 u = unpack2<T>(*reinterpret_cast<const uint32_t*>(words[n]));
                g[n][2 * h] = (g[n][2 * h] - u.x * along) * by;
                g[n][2 * h + 1] = (g[n][2 * h + 1] - u.y * along) * by;
            }
        }
#pragma unroll
        for (int n = 0; n < D / 8; ++n) *reinterpret_cast<uint32_t*>(words[n]) = pack2<T>(g[n][2 * h], g[n][2 * h + 1]);
    }
}
