// Backward for windows of up to 64 tokens: dq, dk, dv of every window, and the sums over a block's
// windows of the gradients of the tables.
//
//   G = dO vᵀ
//   G' = G keep post
//   dS = P (G' - Σ_j P G' + d lse)
//   dv = (P keep post)ᵀ dO
//   dq = (dS w) k
//   dk = (dS w)ᵀ q
//   d bias = Σ dS
//   d scale = Σ dS (q kᵀ)
//   d post = Σ P G keep
//
// With an epilogue (epilogue.h) dO is the gradient of P v, and dv has a part of its own; in the
// affine one dO stays that of the result, and dS, dv and d post are multiplied by beta.
//
// P comes from the forward's log-sum-exp, read a window ahead. A warp computes 16 query rows of dS
// and P keep post, takes dq from its own registers, leaves both in shared memory in 16 bits, and
// takes 16 key rows of them transposed for dk and dv. The three leave one after another through the
// warp's rows of v. Every thread sums its own pairs over the windows, in registers or in its own
// words of shared memory; at the end each table entry is summed by one thread in fixed order.
// small_reduce.h adds the blocks. No atomics: equal runs, equal bits.
#pragma once
#include "small_gradients.h"

template <class K> __global__ void __launch_bounds__(K::THREADS, K::BLOCKS)
    small_backward(const SmallProblem p) {
    using T = typename K::T;
    // HALF: bytes from a row of the pairs to row + 8
    constexpr int D = K::D;
    constexpr int NT = K::NT;
    constexpr int ROWS = K::ROWS;
    constexpr int HALF = 8 * ROWS * 2;
    WA_DYN_SMEM(shared);
    unsigned char *pairs_p = shared + K::P, *pairs_ds = shared + K::DS;  // (ROWS, ROWS) of T
    uint32_t* places = reinterpret_cast<uint32_t*>(shared + K::PLACES);
    float* norms = reinterpret_cast<float*>(shared + K::NORMS);
    int thread = threadIdx.x;
    int lane = thread & 31;
    int warp = thread >> 5 & (K::WARPS - 1);
    int row = warp * 16 + lane / 4;
    int column = lane % 4 * 2;
    const int head = blockIdx.x, heads = p.a.heads, fragment = warp * NT * 32 + lane;

    const int last = (int)((int64_t)p.windows * (blockIdx.y + 1) / p.splits);
    int index = (int)((int64_t)p.windows * blockIdx.y / p.splits);
    Window window(p, index);
    float4* bias_fragments = reinterpret_cast<float4*>(shared + K::TABLES) + fragment;  // LEAN
    float4* scale_fragments = bias_fragments + K::WARPS * NT * 32;
    float* bias_table = reinterpret_cast<float*>(shared + K::TABLES);  // not LEAN
    float *scale_table = bias_table + K::TABLE / 4, *post_table = scale_table + K::TABLE / 4;
    float4* sums = reinterpret_cast<float4*>(shared + K::SUMS);
    float4* bias_sums = p.bias_parts ? sums + fragment : nullptr;
    if (p.bias_parts) sums += K::WARPS * NT * 32;
    float4* scale_sums = p.scale_parts ? sums + fragment : nullptr;
    if (p.scale_parts) sums += K::WARPS * NT * 32;
    float4* post_sums = p.post_parts ? sums + fragment : nullptr;

    if (thread < ROWS) places[thread] = place_of(p, thread);
    __syncthreads();
    const CopyRows<D> rows(p, places, warp, lane);
    int here[CopyRows<D>::SLOTS];  // tokens of this window
    rows.find(here, p, window, places);
    fetch<T, D, K::TILE, true>(p, rows, here, head, shared);
    cp_commit();
    const float* row_sums = p.a.lse + ((int64_t)index * heads + head) * p.tokens;
    float lse[2];  // of the window at hand: read before its turn comes
    read_lse(lse, p, window, places, row_sums, row);
    const PairMask<NT> mask(p, places, row, column);
    const int from[2] = {place_offset(places[row]) + middle(p),
                         place_offset(places[row + 8]) + middle(p)};
    const float uniform = p.a.scale[head], late_scale = K::LATE_SCALE ? uniform : 1.f;
    const bool cosine = K::COSINE && (K::LEAN || p.a.cosine);
    if (K::LEAN) {
        for (int n = 0; n < NT; ++n) {
            float b[4], w[4];
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int key = n * 8 + column + e % 2;
                const int offset = key < p.tokens ? from[e / 2] - place_offset(places[key])
                                                  : middle(p);
                b[e] = key >= p.tokens ? -INFINITY
                       : p.a.bias      ? p.a.bias[offset * heads + head]
                                       : 0.f;
                w[e] = p.a.scale_rows > 1 ? p.a.scale[offset * heads + head] : uniform;
            }
            bias_fragments[n * 32] = make_float4(b[0], b[1], b[2], b[3]);
            if (K::W) scale_fragments[n * 32] = make_float4(w[0], w[1], w[2], w[3]);
        }
    } else {
        for (int t = thread; t < p.offsets; t += K::THREADS) {
            bias_table[t] = p.a.bias ? p.a.bias[t * heads + head] : 0.f;
            scale_table[t] = p.a.scale_rows > 1 ? p.a.scale[t * heads + head] : uniform;
            post_table[t] = p.a.post ? p.a.post[t * heads + head] : 1.f;
        }
        const float4 zero = make_float4(0.f, 0.f, 0.f, 0.f);
        for (int n = 0; n < NT; ++n) {
            if (bias_sums) bias_sums[n * 32] = zero;
            if (scale_sums) scale_sums[n * 32] = zero;
            if (post_sums) post_sums[n * 32] = zero;
        }
    }
    float bias_sum[K::LEAN ? NT : 1][4];
    float scale_sum[K::LEAN && K::W ? NT : 1][4];
    float one_scale_sum = 0.f;
    clear(bias_sum);
    clear(scale_sum);
    const uint64_t seed = !K::LEAN && p.threshold ? (uint64_t)*p.a.seed : 0u;

    for (int stage = 0; index < last; ++index, stage ^= K::STAGES - 1) {
        forget(lane);  // addresses in shared memory: kept over the windows they would spill
        lane &= 31;
        row = warp * 16 + lane / 4;
        if (!K::LEAN) column = lane % 4 * 2;
        int eight = eight_rows<D>(lane), sixteen = sixteen_rows<D>(lane);
        int pair = at<ROWS>(row, 0) + column * 2;  // of the pairs: this thread's `row`, chunk 0
        // of the pairs: this warp's keys of 16 queries
        int across = at<ROWS>(lane % 8 + lane / 16 * 8, warp * 2 + lane / 8 % 2);
        forget(eight);  // so that what is added to these is part of an instruction
        forget(sixteen);
        forget(across);
        unsigned char* q = shared + stage * K::STAGE;
        unsigned char* k = q + K::TILE;
        unsigned char* v = k + K::TILE;
        unsigned char* dout = v + K::TILE;
        cp_wait<0>();
        if (K::EPILOGUE && p.a.exclusion)
            exclude_rows<T, D>(dout, v, rows, p.a.exclusion[head]);
        __syncthreads();
        if (K::STAGES > 1 && index + 1 < last) {
            int there[CopyRows<D>::SLOTS];
            rows.find(there, p, window.after(p), places);
            fetch<T, D, K::TILE, true>(p, rows, there, head, shared + (stage ^ 1) * K::STAGE);
            cp_commit();
        }
        if (K::COSINE) inverse_norm<T, D>(p, q, norms, thread);

        // s: q kᵀ, x: the logits, by the same roundings as in the forward, then P; this warp's 16
        // rows
        float s[NT][4], x[NT][4], g[NT][4];
        rows_with_rows<T, D>(s, q + warp * (32 * D), sixteen, k, eight);
        float norm[2] = {1.f, 1.f};
        if (K::COSINE) {
            __syncthreads();  // all norms are there, and nobody needs the raw q and k any more
            norm[0] = norms[row];
            norm[1] = norms[row + 8];
            if (cosine) normalise<T, D>(q, norms, thread);
        }
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            const uint2 keys = *reinterpret_cast<const uint2*>(places + n * 8 + column);
            const float4 t = K::LEAN ? bias_fragments[n * 32] : gather(bias_table, from, keys);
            float4 w = make_float4(uniform * norm[0], uniform * norm[0], uniform * norm[1],
                                   uniform * norm[1]);
            if (K::W) w = K::LEAN ? scale_fragments[n * 32] : gather(scale_table, from, keys);
            if (K::COSINE) {  // without W the row's norm is left to the scale
                const float2 key_norm = *reinterpret_cast<const float2*>(norms + ROWS + n * 8 +
                                                                         column);
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    s[n][e] *= (e % 2 ? key_norm.y : key_norm.x) * (K::W ? norm[e / 2] : 1.f);
            }
            x[n][0] = s[n][0] * w.x + t.x; x[n][1] = s[n][1] * w.y + t.y;
            x[n][2] = s[n][2] * w.z + t.z; x[n][3] = s[n][3] * w.w + t.w;
            if (!K::LEAN) {
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    if (n * 8 + column + e % 2 >= p.tokens) x[n][e] = -INFINITY;
            }
        }
        mask.apply(x, p, window, places, column);
        const float shift[2] = {lse[0] * LOG2E, lse[1] * LOG2E};
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) x[n][e] = ex2(x[n][e] * LOG2E - shift[e / 2]);

        rows_with_rows<T, D>(g, dout + warp * (32 * D), sixteen, v, eight);
        // g: G, then G'; P keep post to shared memory
        float part[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            float kept[4] = {x[n][0], x[n][1], x[n][2], x[n][3]};
            if (!K::LEAN && (p.threshold || p.a.post)) {
                const int64_t base = ((int64_t)index * heads + head) * p.tokens;
                float4 f = make_float4(1.f, 1.f, 1.f, 1.f);
                if (p.a.post)
                    f = gather(post_table, from,
                               *reinterpret_cast<const uint2*>(places + n * 8 + column));
                const float by[4] = {f.x, f.y, f.z, f.w};
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const uint32_t key = (uint32_t)(n * 8 + column + e % 2);
                    const bool keep = !p.threshold ||
                                      wa_keep(seed, (uint64_t)(base + row + e / 2 * 8), key,
                                              p.threshold);
                    g[n][e] *= keep ? p.keep_scale : 0.f;
                    kept[e] *= keep ? by[e] * p.keep_scale : 0.f;
                }
                if (post_sums) {
                    float4 t = post_sums[n * 32];
                    t.x += x[n][0] * g[n][0];
                    t.y += x[n][1] * g[n][1];
                    t.z += x[n][2] * g[n][2];
                    t.w += x[n][3] * g[n][3];
                    post_sums[n * 32] = t;
                }
#pragma unroll
                for (int e = 0; e < 4; ++e) g[n][e] *= by[e];
            }
#pragma unroll
            for (int e = 0; e < 4; ++e) part[e] += x[n][e] * g[n][e];
#pragma unroll
            for (int h = 0; h < 2; ++h)
                *reinterpret_cast<uint32_t*>(pairs_p + (pair ^ n << 4) + h * HALF) = pack2<T>(
                    kept[2 * h], kept[2 * h + 1]);
        }
        float inner[2] = {across_quad_sum(part[0] + part[1]), across_quad_sum(part[2] + part[3])};
        const float beta = K::EPILOGUE && p.a.beta ? p.a.beta[head] : 1.f;
        int own_token[2] = {};
        if (K::EPILOGUE) {
            if (p.own_sums.beta && warp < p.own_sums.tiles) {
                const float sum = sum_of_warp(lane % 4 ? 0.f : inner[0] + inner[1]);
                if (lane == 0) p.own_sums.beta[p.own_sums.place(index, heads, head, warp)] = sum;
            }
            float of_lse[2] = {};
            if (p.a.grad_lse)
                read_rows(of_lse, p, window, places,
                          p.a.grad_lse + ((int64_t)index * heads + head) * p.tokens, row, 0.f);
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                inner[h] = beta * inner[h] - of_lse[h];
                own_token[h] = token_of(p, window, places, row + 8 * h);
            }
        }

        // x: dS; dS w to shared memory, and kept in pairs of 16 bits
        uint32_t ds[2 * K::WARPS][2];
        float with_s[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            const float flat = K::LATE_SCALE ? 1.f : uniform;
            float4 w = make_float4(flat, flat, flat, flat);
            const uint2 keys = *reinterpret_cast<const uint2*>(places + n * 8 + column);
            if (K::W) w = K::LEAN ? scale_fragments[n * 32] : gather(scale_table, from, keys);
            const float by[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                x[n][e] *= (K::EPILOGUE ? beta * g[n][e] : g[n][e]) - inner[e / 2];
                if (K::LEAN) bias_sum[K::LEAN ? n : 0][e] += x[n][e];
                if (K::LEAN && K::W) scale_sum[K::LEAN && K::W ? n : 0][e] += x[n][e] * s[n][e];
                if (K::ONE_SCALE_SUM) with_s[e] += x[n][e] * s[n][e];
            }
            if (bias_sums && !K::LEAN) {
                float4 t = bias_sums[n * 32];
                t.x += x[n][0]; t.y += x[n][1]; t.z += x[n][2]; t.w += x[n][3];
                bias_sums[n * 32] = t;
            }
            if (scale_sums && !K::LEAN) {
                float4 t = scale_sums[n * 32];
                t.x += x[n][0] * s[n][0];
                t.y += x[n][1] * s[n][1];
                t.z += x[n][2] * s[n][2];
                t.w += x[n][3] * s[n][3];
                scale_sums[n * 32] = t;
            }
#pragma unroll
            for (int h = 0; h < 2; ++h)
                ds[n][h] = pack2<T>(x[n][2 * h] * by[2 * h], x[n][2 * h + 1] * by[2 * h + 1]);
        }
#pragma unroll
        for (int n = 0; n < NT; ++n)  // apart, since no read would be moved up past a store
#pragma unroll
            for (int h = 0; h < 2; ++h)
                *reinterpret_cast<uint32_t*>(pairs_ds + (pair ^ n << 4) + h * HALF) = ds[n][h];
        // part of a k-step, but no pairs
        if (NT % 2) ds[2 * K::WARPS - 1][0] = ds[2 * K::WARPS - 1][1] = 0u;
        if (K::ONE_SCALE_SUM)
            one_scale_sum += (with_s[0] + with_s[1]) * norm[0] + (with_s[2] + with_s[3]) * norm[1];
        window = window.after(p);
        row_sums += heads * p.tokens;
        // well before it is needed
        if (index + 1 < last) read_lse(lse, p, window, places, row_sums, row);
        __syncthreads();  // all rows of P and dS and all unit vectors are there

        float gradient[3][D / 8][4];  // of this warp's rows of q, k and v
#pragma unroll
        for (int m = 0; m < 3; ++m) clear(gradient[m]);
#pragma unroll
        for (int i = 0; i < K::WARPS; ++i) {
            const uint32_t of_rows[4] = {ds[2 * i][0], ds[2 * i][1], ds[2 * i + 1][0],
                                         ds[2 * i + 1][1]};
            times_rows<T, D>(gradient[0], of_rows, k, i, sixteen);
            uint32_t of_keys[4];
            ldsm4t(of_keys, pairs_ds + across + i * (32 * ROWS));
            times_rows<T, D>(gradient[1], of_keys, q, i, sixteen);
            ldsm4t(of_keys, pairs_p + across + i * (32 * ROWS));
            times_rows<T, D>(gradient[2], of_keys, dout, i, sixteen);
        }
        if (K::EPILOGUE && (p.a.alpha || p.a.exclusion)) {
            const float sum = add_own_gradient<T, D>(
                gradient[2], p, v, own_token, ((int64_t)index * heads + head) * p.tokens, row,
                column, head);
            if (p.own_sums.own && warp < p.own_sums.tiles) {
                const float all = sum_of_warp(sum);
                if (lane == 0) p.own_sums.own[p.own_sums.place(index, heads, head, warp)] = all;
            }
        }
        uint4 words[3][CopyRows<D>::SLOTS];
        unsigned char* way_out = v;  // nobody else reads this warp's rows of it any more
#pragma unroll
        for (int m = 0; m < 3; ++m) {
            if (m > 0) __syncwarp();
            const unsigned char* units = q + m * K::TILE;
            if (m < 2)
                put_rows<T, D, K::COSINE>(gradient[m], way_out, units, row, column,
                                          norms + m * ROWS, cosine, late_scale);
            else
                put_rows<T, D, false>(gradient[m], way_out, nullptr, row, column, nullptr, false,
                                      1.f);
            __syncwarp();
#pragma unroll
            for (int i = 0; i < CopyRows<D>::SLOTS; ++i)
                words[m][i] = *reinterpret_cast<const uint4*>(way_out +
                                                              at<D>(rows.row(i), rows.chunk));
        }
#pragma unroll
        for (int i = 0; i < CopyRows<D>::SLOTS; ++i) {
            if (here[i] < 0) continue;
            const int chunks = heads * (D / 8);
            uint4* to = static_cast<uint4*>(p.a.grad_qkv) + (int64_t)here[i] * (3 * chunks) +
                        head * (D / 8) + rows.chunk;
#pragma unroll
            for (int m = 0; m < 3; ++m) to[m * chunks] = words[m][i];
        }
        if (index + 1 < last) {
            rows.find(here, p, window, places);
            if (K::STAGES == 1) {
                __syncthreads();  // nobody reads other warps' rows any more
                fetch<T, D, K::TILE, true>(p, rows, here, head, shared);
                cp_commit();
            }
        }
    }

    // the sums of this block, table by table, in its slot of the partial sums
    const int64_t slot = ((int64_t)blockIdx.y * heads + head) * p.offsets;
    if (!K::LEAN) {
        __syncthreads();
        if (p.bias_parts)
            sum_by_offset<K>(p, reinterpret_cast<float*>(bias_sums - fragment), p.bias_parts + slot,
                             thread);
        if (p.scale_parts)
            sum_by_offset<K>(p, reinterpret_cast<float*>(scale_sums - fragment),
                             p.scale_parts + slot, thread);
        if (p.post_parts)
            sum_by_offset<K>(p, reinterpret_cast<float*>(post_sums - fragment), p.post_parts + slot,
                             thread, K::EPILOGUE && p.a.beta ? p.a.beta[head] : 1.f);
        return;
    }
    float4* staged = reinterpret_cast<float4*>(shared) + fragment;
    __syncthreads();
    if (p.bias_parts) {
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            const int m = K::LEAN ? n : 0;
            staged[n * 32] = make_float4(bias_sum[m][0], bias_sum[m][1], bias_sum[m][2],
                                         bias_sum[m][3]);
        }
        __syncthreads();
        sum_by_offset<K>(p, reinterpret_cast<float*>(shared), p.bias_parts + slot, thread);
        __syncthreads();
    }
    if (K::W && p.scale_parts) {
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            const int m = K::LEAN && K::W ? n : 0;
            staged[n * 32] = make_float4(scale_sum[m][0], scale_sum[m][1], scale_sum[m][2],
                                         scale_sum[m][3]);
        }
        __syncthreads();
        sum_by_offset<K>(p, reinterpret_cast<float*>(shared), p.scale_parts + slot, thread);
    }
    if (K::ONE_SCALE_SUM && p.scale_parts) {  // one number: entry 0 of the slot, the others 0
        float* all = reinterpret_cast<float*>(shared);
        for (int apart = 16; apart > 0; apart /= 2)
            one_scale_sum += __shfl_xor_sync(ALL, one_scale_sum, apart);
        if (lane == 0) all[warp] = one_scale_sum;
        __syncthreads();
        for (int t = thread; t < p.offsets; t += K::THREADS) {
            float sum = 0.f;
            if (t == 0) for (int i = 0; i < K::WARPS; ++i) sum += all[i];
            p.scale_parts[slot + t] = sum;
        }
    }
}
