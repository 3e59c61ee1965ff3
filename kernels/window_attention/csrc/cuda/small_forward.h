// Forward for windows of up to 64 tokens: a block keeps one head's scale and bias fragments in
// registers and walks over windows.
//
// The next window is on its way (cp.async, two stages) while one is worked on. A warp computes 16
// rows of S, of P and of O, all keys at once, so the softmax needs no second pass; O leaves through
// the rows of q, which only this warp reads.
#pragma once
#include "small_epilogue.h"

// W: scale table (else one number a head). COSINE: norms. EXTRA: factor after the softmax, dropout.
// EPILOGUE: that of args.h. All serve arguments without them too.
template <typename T_, int D_, int NT_, bool W_, bool COSINE_, bool EXTRA_, bool EPILOGUE_ = false>
struct ForwardKind {
    using T = T_;
    static constexpr int D = D_;
    static constexpr int NT = NT_;
    static constexpr int WARPS = (NT + 1) / 2;
    static constexpr int ROWS = 16 * WARPS;
    static constexpr int THREADS = 32 * WARPS;
    static constexpr int TILE = ROWS * D * 2, STAGE = 3 * TILE;
    static constexpr bool W = W_, COSINE = COSINE_, EXTRA = EXTRA_;
    static constexpr bool EPILOGUE = EPILOGUE_;
    using WithEpilogue = ForwardKind<T_, D_, NT_, W_, COSINE_, EXTRA_, true>;
    // a multiprocessor, as far as registers go
    static constexpr int BLOCKS = EXTRA ? 1 : W && EPILOGUE ? 2 : W || EPILOGUE || NT == 8 ? 3 : 4;
    static constexpr int PLACES = 2 * STAGE;
    static constexpr int NORMS = PLACES + ROWS * 4;
    static constexpr int POST = NORMS + (COSINE ? 2 * ROWS * 4 : 0);
    static constexpr int SHARED = POST + (EXTRA ? (MOST_OFFSETS + 3) / 4 * 16 : 0);
};

template <class K> __global__ void __launch_bounds__(K::THREADS, K::BLOCKS)
    small_forward(const SmallProblem p) {
    using T = typename K::T;
    constexpr int D = K::D, NT = K::NT;
    WA_DYN_SMEM(shared);
    uint32_t* places = reinterpret_cast<uint32_t*>(shared + K::PLACES);
    float* norms = reinterpret_cast<float*>(shared + K::NORMS);
    float* post = reinterpret_cast<float*>(shared + K::POST);
    const int thread = threadIdx.x;
    const int lane = thread & 31;
    const int warp = thread >> 5;
    const int head = blockIdx.x;
    const int heads = p.a.heads;
    const int row = warp * 16 + lane / 4, column = lane % 4 * 2;

    const int last = (int)((int64_t)p.windows * (blockIdx.y + 1) / p.splits);
    int index = (int)((int64_t)p.windows * blockIdx.y / p.splits);
    Window window(p, index);
    if (thread < K::ROWS) places[thread] = place_of(p, thread);
    __syncthreads();
    const CopyRows<D> rows(p, places, warp, lane);
    // tokens of this window and of the next
    int here[CopyRows<D>::SLOTS];
    int there[CopyRows<D>::SLOTS] = {};
    rows.find(here, p, window, places);
    fetch<T, D, K::TILE, false>(p, rows, here, head, shared);
    cp_commit();
    if (K::EXTRA && p.a.post)
        for (int t = thread; t < p.offsets; t += K::THREADS) post[t] = p.a.post[t * heads + head];
    __syncthreads();
    const PairMask<NT> mask(p, places, row, column);
    const int from[2] = {place_offset(places[row]) + middle(p),
                         place_offset(places[row + 8]) + middle(p)};
    float bias[NT][4], scale[K::W ? NT : 1][4];
    const float uniform = p.a.scale[head];
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int key = n * 8 + column + e % 2;
            const int offset = key < p.tokens ? from[e / 2] - place_offset(places[key]) : middle(p);
            bias[n][e] = key >= p.tokens ? -INFINITY
                         : p.a.bias      ? p.a.bias[offset * heads + head]
                                         : 0.f;
            if (K::W) scale[n][e] = p.a.scale_rows > 1 ? p.a.scale[offset * heads + head] : uniform;
        }
    const uint64_t seed = K::EXTRA && p.threshold ? (uint64_t)*p.a.seed : 0u;

    for (int stage = 0; index < last; ++index, stage ^= 1) {
        unsigned char *q = shared + stage * K::STAGE, *k = q + K::TILE, *v = k + K::TILE;
        cp_wait<0>();
        __syncthreads();  // all of this window is here, and nobody reads the other stage any more
        if (index + 1 < last) {
            rows.find(there, p, window.after(p), places);
            fetch<T, D, K::TILE, false>(p, rows, there, head, shared + (stage ^ 1) * K::STAGE);
            cp_commit();
        }
        if (K::COSINE) {
            inverse_norm<T, D>(p, q, norms, thread);
            __syncthreads();
        }

        uint32_t a[D / 16][4];
#pragma unroll
        for (int i = 0; i < D / 16; ++i)
            ldsm4(a[i], q + at<D>(warp * 16 + lane % 16, i * 2 + lane / 16));
        float s[NT][4];
        clear(s);
        const float norm[2] = {K::COSINE ? norms[row] : 1.f, K::COSINE ? norms[row + 8] : 1.f};
        // without W the row's norm is left to the scale
        const float of_row[2] = {uniform * norm[0], uniform * norm[1]};
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            uint32_t b[D / 8];
            rows_as_columns<D>(b, k, n, eight_rows<D>(lane));
#pragma unroll
            for (int i = 0; i < D / 16; ++i) mma<T>(s[n], a[i], b[2 * i], b[2 * i + 1]);
            float2 key_norm = make_float2(1.f, 1.f);
            if (K::COSINE)
                key_norm = *reinterpret_cast<const float2*>(norms + K::ROWS + n * 8 + column);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                if (K::COSINE)
                    s[n][e] *= (e % 2 ? key_norm.y : key_norm.x) * (K::W ? norm[e / 2] : 1.f);
                s[n][e] = s[n][e] * (K::W ? scale[K::W ? n : 0][e] : of_row[e / 2]) + bias[n][e];
            }
        }
        mask.apply(s, p, window, places, column);

        float row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {0.f, 0.f};
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) row_max[e / 2] = fmaxf(row_max[e / 2], s[n][e]);
        row_max[0] = across_quad_max(row_max[0]);
        row_max[1] = across_quad_max(row_max[1]);
        const float shift[2] = {row_max[0] * LOG2E, row_max[1] * LOG2E};
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                s[n][e] = ex2(s[n][e] * LOG2E - shift[e / 2]);
                row_sum[e / 2] += s[n][e];
            }
        row_sum[0] = across_quad_sum(row_sum[0]);
        row_sum[1] = across_quad_sum(row_sum[1]);
        const int64_t base = ((int64_t)index * heads + head) * p.tokens;
        if (K::EXTRA && (p.a.post || p.threshold)) {
#pragma unroll
            for (int n = 0; n < NT; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int key = n * 8 + column + e % 2;
                    if (key >= p.tokens || row + e / 2 * 8 >= p.tokens) continue;
                    if (p.a.post) s[n][e] *= post[from[e / 2] - place_offset(places[key])];
                    if (p.threshold && !wa_keep(seed, (uint64_t)(base + row + e / 2 * 8),
                                                (uint32_t)key, p.threshold))
                        s[n][e] = 0.f;
                }
        }

        float out[D / 8][4];
        clear(out);
#pragma unroll
        for (int i = 0; i < (NT + 1) / 2; ++i) {
            const bool whole = 2 * i + 1 < NT;
            constexpr int LAST = NT - 1;
            const uint32_t x[4] = {
                pack2<T>(s[2 * i][0], s[2 * i][1]), pack2<T>(s[2 * i][2], s[2 * i][3]),
                whole ? pack2<T>(s[whole ? 2 * i + 1 : LAST][0], s[whole ? 2 * i + 1 : LAST][1])
                      : 0u,
                whole ? pack2<T>(s[whole ? 2 * i + 1 : LAST][2], s[whole ? 2 * i + 1 : LAST][3])
                      : 0u};
            times_rows<T, D>(out, x, v, i, sixteen_rows<D>(lane));
        }

        const float keep_scale = K::EXTRA ? p.keep_scale : 1.f;
        float by[2] = {keep_scale * reciprocal(row_sum[0]), keep_scale * reciprocal(row_sum[1])};
        if (K::EPILOGUE && (p.a.alpha || p.a.exclusion)) {
            float ratio[2];
            add_own_value<T, D>(out, by, ratio, p, v, row, column, head);
            if (p.a.along && lane % 4 == 0)
#pragma unroll
                for (int h = 0; h < 2; ++h)
                    if (is_query(p, window, places, row + 8 * h))
                        p.a.along[base + row + 8 * h] = ratio[h];
        }
        __syncwarp();  // every lane has read its rows of q
#pragma unroll
        for (int n = 0; n < D / 8; ++n)
#pragma unroll
            for (int h = 0; h < 2; ++h)
                put2<T, D>(q, row + 8 * h, n, column, out[n][2 * h] * by[h],
                           out[n][2 * h + 1] * by[h]);
        __syncwarp();
#pragma unroll
        for (int i = 0; i < CopyRows<D>::SLOTS; ++i) {
            if (here[i] < 0) continue;
            T* to = static_cast<T*>(p.a.out) + ((int64_t)here[i] * heads + head) * D +
                    rows.chunk * 8;
            *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(
                q + at<D>(rows.row(i), rows.chunk));
        }
        if (p.a.lse && lane % 4 == 0) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                if (is_query(p, window, places, row + 8 * h))
                    p.a.lse[base + row + 8 * h] = row_max[h] + lg2(row_sum[h]) * LN2;
            }
        }
        window = window.after(p);
#pragma unroll
        for (int i = 0; i < CopyRows<D>::SLOTS; ++i) here[i] = there[i];
    }
}
