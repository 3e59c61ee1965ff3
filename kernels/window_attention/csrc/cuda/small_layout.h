// Where tokens, tiles and pairs sit: shared by the forward and the backward for windows of up to 64
// tokens.
//
// A block of WARPS warps takes one head and a run of windows. Warp w owns rows 16 w .. 16 w + 15 of
// every tile: it loads them, stores them, and holds their scores. Tiles are ROWS x D of 16 bits in
// shared memory, ROWS = 16 WARPS >= N; rows from N on, and padding, are zeros.
#pragma once
#include "epilogue.h"

constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
constexpr float NORM_FLOOR = 1e-12f;  // of cosine attention
constexpr uint32_t ALL = 0xffffffffu;
constexpr int WARP_LANES = 32;
constexpr int MOST_OFFSETS = 225;     // of 64 tokens; (2 * 8 - 1)^2

struct SmallProblem {
    WindowAttentionArgs a;
    int tokens;         // N
    int rows, columns;  // windows down and across an image
    int windows;        // of the batch
    int padded_height, padded_width, offsets, splits;
    uint32_t threshold;                  // of wa_keep
    float keep_scale;                    // 1 / (1 - dropout)
    // backward: (splits, heads, offsets) each, or null
    float *bias_parts, *scale_parts, *post_parts;
    OwnSums own_sums;
};

// Byte of 16-byte chunk `chunk` of row `row` in a tile of rows of D 16-bit numbers, so that
// ldmatrix and row stores meet no bank conflict: at(row, chunk) = at(row, 0) ^ chunk << 4, and row
// + 8 is 8 rows further
template <int D> WA_DEVICE int at(int row, int chunk) {
    constexpr int CHUNKS = D / 8;
    return row * (2 * D) + ((chunk ^ (row / (8 / CHUNKS) & (CHUNKS - 1))) << 4);
}

// A window; the next one is found without dividing.
struct Window {
    int image, row, column;
    bool plain;  // lies in the image as it is: no wrap, so one region, and no padding
    WA_DEVICE Window(const SmallProblem& p, int index) {
        image = index / (p.rows * p.columns);
        const int rest = index - image * p.rows * p.columns;
        row = rest / p.columns; column = rest - row * p.columns;
        plain = is_plain(p);
    }
    WA_DEVICE Window after(const SmallProblem& p) const {
        Window w = *this;
        if (++w.column == p.columns) {
            w.column = 0;
            if (++w.row == p.rows) { w.row = 0; ++w.image; }
        }
        w.plain = w.is_plain(p);
        return w;
    }
    WA_DEVICE int top(const SmallProblem& p) const {
        return row * p.a.window[0] + p.a.shift[0];
    }  // of token (0, 0) before the wrap
    WA_DEVICE int left(const SmallProblem& p) const {
        return column * p.a.window[1] + p.a.shift[1];
    }
    WA_DEVICE bool folded_y(const SmallProblem& p) const {
        return p.a.shift[0] > 0 && row == p.rows - 1;
    }  // holds two regions
    WA_DEVICE bool folded_x(const SmallProblem& p) const {
        return p.a.shift[1] > 0 && column == p.columns - 1;
    }
    WA_DEVICE bool is_plain(const SmallProblem& p) const {
        // no branch
        return (int)(top(p) + p.a.window[0] <= p.a.height) &
               (int)(left(p) + p.a.window[1] <= p.a.width);
    }
    WA_DEVICE bool padded(const SmallProblem& p) const {  // holds padding
        return (p.padded_height > p.a.height && top(p) + p.a.window[0] > p.a.height) ||
               (p.padded_width > p.a.width && left(p) + p.a.window[1] > p.a.width);
    }
    // token of the image at (y, x) of the window, or -1 on padding
    WA_DEVICE int token(const SmallProblem& p, int y, int x) const {
        y += top(p); x += left(p);
        if (y >= p.padded_height) y -= p.padded_height;
        if (x >= p.padded_width) x -= p.padded_width;
        return y < p.a.height && x < p.a.width ? (image * p.a.height + y) * p.a.width + x : -1;
    }
};

// A token's place in the window, for all ROWS rows: its part of the offset, y and x, a byte each.
// In shared memory.
WA_DEVICE uint32_t place_of(const SmallProblem& p, int i) {
    if (i >= p.tokens) return 0u;
    const int y = i / p.a.window[1], x = i - y * p.a.window[1];
    return (uint32_t)(y * (2 * p.a.window[1] - 1) + x) | (uint32_t)y << 8 | (uint32_t)x << 16;
}
WA_DEVICE int place_offset(uint32_t place) { return (int)(place & 255u); }
WA_DEVICE int place_y(uint32_t place) { return (int)(place >> 8 & 255u); }
WA_DEVICE int place_x(uint32_t place) { return (int)(place >> 16); }
// Token of the image at row i of the tiles, or -1: padding, or no token of the window
WA_DEVICE int token_of(const SmallProblem& p, const Window& w, const uint32_t* places, int i) {
    return i < p.tokens ? w.token(p, place_y(places[i]), place_x(places[i])) : -1;
}
// Whether row i of the tiles is a query: a token of the window that is not padding
WA_DEVICE bool is_query(const SmallProblem& p, const Window& w, const uint32_t* places, int i) {
    return i < p.tokens && (w.plain || token_of(p, w, places, i) >= 0);
}
WA_DEVICE int middle(const SmallProblem& p) {
    return (p.a.window[0] - 1) * (2 * p.a.window[1] - 1) + p.a.window[1] - 1;
}

// The rows of a tile that a thread copies: `chunk` of rows first, first + STEP, ...
template <int D> struct CopyRows {
    static constexpr int CHUNKS = D / 8, STEP = WARP_LANES / CHUNKS, SLOTS = 16 / STEP;
    int first, chunk;
    // tokens of the image from token (0, 0) of a plain window; below every token on rows from N on
    int step[SLOTS];
    WA_DEVICE CopyRows(const SmallProblem& p, const uint32_t* places, int warp, int lane)
        : first(warp * 16 + lane / CHUNKS), chunk(lane % CHUNKS) {
#pragma unroll
        for (int i = 0; i < SLOTS; ++i)
            step[i] = row(i) < p.tokens
                          ? place_y(places[row(i)]) * p.a.width + place_x(places[row(i)])
                          : INT32_MIN;
    }
    WA_DEVICE int row(int slot) const { return first + slot * STEP; }
    // token: of the rows in a window; negative where there is none
    WA_DEVICE void find(int (&token)[SLOTS], const SmallProblem& p, const Window& w,
                        const uint32_t* places) const {
        const int start = (w.image * p.a.height + w.top(p)) * p.a.width + w.left(p);
#pragma unroll
        for (int i = 0; i < SLOTS; ++i) token[i] = start + step[i];
        if (w.plain) return;
#pragma unroll
        for (int i = 0; i < SLOTS; ++i) token[i] = token_of(p, w, places, row(i));
    }
};

// Copies this thread's share of q, k, v, and with a gradient of that, into the tiles of one stage
template <typename T, int D, int TILE, bool WITH_GRADIENT>
WA_DEVICE void fetch(const SmallProblem& p, const CopyRows<D>& rows,
                     const int (&token)[CopyRows<D>::SLOTS], int head, unsigned char* stage) {
    const int channels = p.a.heads * D, first = (head * D + rows.chunk * 8) * 2;
    const unsigned char *qkv = static_cast<const unsigned char*>(p.a.qkv) + first,
                        *gradient = static_cast<const unsigned char*>(p.a.grad_out) + first;
#pragma unroll
    for (int i = 0; i < CopyRows<D>::SLOTS; ++i) {
        const bool ok = token[i] >= 0;
        const int64_t safe = ok ? token[i] : 0;
        const T* from = reinterpret_cast<const T*>(qkv + safe * (6 * channels));
        unsigned char* to = stage + at<D>(rows.row(i), rows.chunk);
#pragma unroll
        for (int m = 0; m < 3; ++m) cp16(to + m * TILE, from + m * channels, ok);
        if (WITH_GRADIENT) cp16(to + 3 * TILE, gradient + safe * (2 * channels), ok);
    }
}

// Which of a thread's pairs the shift brought together and which keys are padding: bit 2 n + e for
// columns 8 n + lane % 4 * 2 + e.
template <int NT> struct PairMask {
    // columns in the second region of an axis that is folded: of y in the lower half, of x in the
    // upper
    uint32_t late;
    uint32_t rows;  // bits 0, 1: `row`, `row + 8` in the second region of y; bits 2, 3: of x
    WA_DEVICE PairMask(const SmallProblem& p, const uint32_t* places, int row, int column) {
        const int y = p.a.window[0] - p.a.shift[0], x = p.a.window[1] - p.a.shift[1];
        late = rows = 0u;
#pragma unroll
        for (int b = 0; b < 2 * NT; ++b) {
            const uint32_t place = places[b / 2 * 8 + column + b % 2];
            late |= (uint32_t)(place_y(place) >= y) << b | (uint32_t)(place_x(place) >= x)
                                                               << (16 + b);
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const uint32_t place = places[row + 8 * h];
            rows |= (uint32_t)(place_y(place) >= y) << h | (uint32_t)(place_x(place) >= x)
                                                               << (2 + h);
        }
    }
    WA_DEVICE uint32_t apart(const SmallProblem& p, const Window& w, int half) const {
        const uint32_t other = late ^ ((rows >> half & 1u ? 0xffffu : 0u) |
                                       (rows >> half & 4u ? 0xffff0000u : 0u));
        return (w.folded_y(p) ? other & 0xffffu : 0u) | (w.folded_x(p) ? other >> 16 : 0u);
    }
    WA_DEVICE static uint32_t outside(const SmallProblem& p, const Window& w,
                                      const uint32_t* places, int column) {
        uint32_t bits = 0u;
#pragma unroll
        for (int b = 0; b < 2 * NT; ++b) {
            const uint32_t place = places[b / 2 * 8 + column + b % 2];
            bits |= (uint32_t)(w.token(p, place_y(place), place_x(place)) < 0) << b;
        }
        return bits;
    }
    // Adds the mask to logits
    WA_DEVICE void apply(float (&s)[NT][4], const SmallProblem& p, const Window& w,
                         const uint32_t* places, int column) const {
        if (w.plain) return;
        const bool padded = w.padded(p);
        const uint32_t cut[2] = {apart(p, w, 0), apart(p, w, 1)};
        const uint32_t dead = padded ? outside(p, w, places, column) : 0u;
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int bit = 2 * n + e % 2;
                if (cut[e / 2] >> bit & 1u) s[n][e] += p.a.mask_value;
                if (dead >> bit & 1u) s[n][e] = -INFINITY;
            }
    }
};

// What a lane says to ldmatrix in a tile of rows of D: a row of the first 16 and one of two chunks;
// a row of the first 8 and one of four
template <int D> WA_DEVICE int sixteen_rows(int lane) { return at<D>(lane % 16, lane / 16); }
template <int D> WA_DEVICE int eight_rows(int lane) {
    return at<D>(lane % 8, lane / 8 % (D == 16 ? 2 : 4));
}

// b fragments of mma for the product with rows 8 n .. 8 n + 7 of a tile as columns: k-step i uses
// b[2 i], b[2 i + 1]; first: eight_rows
template <int D> WA_DEVICE void rows_as_columns(uint32_t (&b)[D / 8], const unsigned char* tile,
                                                int n, int first) {
    if constexpr (D == 16) {
        ldsm2(b, tile + n * (16 * D) + first);
    } else {
#pragma unroll
        for (int i = 0; i < D / 32; ++i) {
            uint32_t four[4];
            ldsm4(four, tile + n * (16 * D) + (first ^ i << 6));
#pragma unroll
            for (int j = 0; j < 4; ++j) b[i * 4 + j] = four[j];
        }
    }
}

// out (16 x D) += a (16 x 16) times rows 16 k .. 16 k + 15 of a tile; first: sixteen_rows
template <typename T, int D>
WA_DEVICE void times_rows(float (&out)[D / 8][4], const uint32_t (&a)[4], const unsigned char* tile,
                          int k, int first) {
#pragma unroll
    for (int n = 0; n < D / 16; ++n) {
        uint32_t b[4];
        ldsm4t(b, tile + k * (32 * D) + (first ^ n << 5));
        mma<T>(out[2 * n], a, b[0], b[1]);
        mma<T>(out[2 * n + 1], a, b[2], b[3]);
    }
}

// Two neighbours of a row in a tile of rows of D: elements 8 chunk + column and the next
template <typename T, int D> WA_DEVICE void put2(unsigned char* tile, int row, int chunk,
                                                 int column, float a, float b) {
    *reinterpret_cast<uint32_t*>(tile + at<D>(row, chunk) + column * 2) = pack2<T>(a, b);
}

template <int COUNT> WA_DEVICE void clear(float (&x)[COUNT][4]) {
#pragma unroll
    for (int n = 0; n < COUNT; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) x[n][e] = 0.f;
}

WA_DEVICE float across_quad_sum(float x) {
    x += __shfl_xor_sync(ALL, x, 1);
    return x + __shfl_xor_sync(ALL, x, 2);
}
WA_DEVICE float across_quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(ALL, x, 1));
    return fmaxf(x, __shfl_xor_sync(ALL, x, 2));
}

// One thread a row of q and k: 1 / max(norm, floor), all ones without cosine. inverse: (2, ROWS)
template <typename T, int D> WA_DEVICE void inverse_norm(const SmallProblem& p,
                                                         const unsigned char* tiles, float* inverse,
                                                         int thread) {
    float sum = 0.f;
#pragma unroll
    // tile of k follows that of q: row ROWS + r of both is row r of k
    for (int c = 0; c < D / 8; ++c) {
        const uint4 x = *reinterpret_cast<const uint4*>(tiles + at<D>(thread, c));
        const float2 a = unpack2<T>(x.x);
        const float2 b = unpack2<T>(x.y);
        const float2 g = unpack2<T>(x.z);
        const float2 d = unpack2<T>(x.w);
        sum += a.x * a.x + a.y * a.y + b.x * b.x + b.y * b.y + g.x * g.x + g.y * g.y + d.x * d.x +
               d.y * d.y;
    }
    inverse[thread] = p.a.cosine ? 1.f / fmaxf(sqrtf(sum), NORM_FLOOR) : 1.f;
}
