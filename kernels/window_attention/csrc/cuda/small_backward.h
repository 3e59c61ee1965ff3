// Backward for windows of up to 64 tokens: dq, dk, dv of every window, and the sums over a block's windows of the gradients of the tables.
//
//   G = dO vᵀ,  G' = G keep post,  dS = P (G' - Σ_j P G'),  dv = (P keep post)ᵀ dO,  dq = (dS w) k,  dk = (dS w)ᵀ q
//   d bias = Σ dS,  d weight = Σ dS (q kᵀ),  d post = Σ P G keep
// P comes from the forward's log-sum-exp. A warp computes 16 query rows of dS and P keep post, leaves both in shared memory in 16 bits, and
// takes 16 key rows of them transposed for dk and dv. Every thread sums its own pairs over the windows, in registers or in its own words of
// shared memory; at the end each table entry is summed by one thread in fixed order. small_reduce.h adds the blocks. No atomics: equal
// runs, equal bits.
#pragma once
#include "small_gradients.h"

template <class K> __global__ void __launch_bounds__(K::THREADS, K::BLOCKS) small_backward(const SmallProblem p) {
    using T = typename K::T;
    constexpr int D = K::D, NT = K::NT, ROWS = K::ROWS;
    WA_DYN_SMEM(shared);
    unsigned char *pairs_p = shared + K::P, *pairs_ds = shared + K::DS;  // (ROWS, ROWS) of T
    uint32_t* places = reinterpret_cast<uint32_t*>(shared + K::PLACES);
    float* norms = reinterpret_cast<float*>(shared + K::NORMS);
    int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, row = warp * 16 + lane / 4, column = lane % 4 * 2;
    const int head = blockIdx.x, heads = p.a.heads, fragment = warp * NT * 32 + lane;

    const int last = (int)((int64_t)p.windows * (blockIdx.y + 1) / p.splits);
    int index = (int)((int64_t)p.windows * blockIdx.y / p.splits);
    Window window(p, index);
    float4* bias_fragments = reinterpret_cast<float4*>(shared + K::TABLES) + fragment;  // LEAN
    float4* weight_fragments = bias_fragments + K::WARPS * NT * 32;
    float* bias_table = reinterpret_cast<float*>(shared + K::TABLES);  // not LEAN
    float *weight_table = bias_table + K::TABLE / 4, *post_table = weight_table + K::TABLE / 4;
    float4* sums = reinterpret_cast<float4*>(shared + K::SUMS);
    float4* bias_sums = p.bias_parts ? sums + fragment : nullptr;
    if (p.bias_parts) sums += K::WARPS * NT * 32;
    float4* weight_sums = p.weight_parts ? sums + fragment : nullptr;
    if (p.weight_parts) sums += K::WARPS * NT * 32;
    float4* post_sums = p.post_parts ? sums + fragment : nullptr;

    if (thread < ROWS) places[thread] = place_of(p, thread);
    __syncthreads();
    CopyRows<D> here(warp, lane);
    here.find(p, window, places);
    CopyRows<D> there = here;  // of the next window
    fetch<T, D, K::TILE, true>(p, here, head, shared);
    cp_commit();
    const PairMask<NT> mask(p, places, row, column);
    const int from[2] = {place_offset(places[row]) + middle(p), place_offset(places[row + 8]) + middle(p)};
    const float uniform = p.a.weight[head];
    if (K::LEAN) {
        for (int n = 0; n < NT; ++n) {
            float b[4], w[4];
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int key = n * 8 + column + e % 2, offset = key < p.tokens ? from[e / 2] - place_offset(places[key]) : middle(p);
                b[e] = key >= p.tokens ? -INFINITY : p.a.bias ? p.a.bias[offset * heads + head] * LOG2E : 0.f;
                w[e] = p.a.weight_rows > 1 ? p.a.weight[offset * heads + head] : uniform;
            }
            bias_fragments[n * 32] = make_float4(b[0], b[1], b[2], b[3]);
            if (K::W) weight_fragments[n * 32] = make_float4(w[0], w[1], w[2], w[3]);
        }
    } else {
        for (int t = thread; t < p.offsets; t += K::THREADS) {
            bias_table[t] = p.a.bias ? p.a.bias[t * heads + head] * LOG2E : 0.f;
            weight_table[t] = p.a.weight_rows > 1 ? p.a.weight[t * heads + head] : uniform;
            post_table[t] = p.a.post ? p.a.post[t * heads + head] : 1.f;
        }
        const float4 zero = make_float4(0.f, 0.f, 0.f, 0.f);
        for (int n = 0; n < NT; ++n) {
            if (bias_sums) bias_sums[n * 32] = zero;
            if (weight_sums) weight_sums[n * 32] = zero;
            if (post_sums) post_sums[n * 32] = zero;
        }
    }
    if (NT % 2) {  // the last chunk of columns is read as part of a k-step and holds no pair
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            put2<T, ROWS>(pairs_ds, row + 8 * h, NT, column, 0.f, 0.f);
            put2<T, ROWS>(pairs_p, row + 8 * h, NT, column, 0.f, 0.f);
        }
    }
    float bias_sum[K::LEAN ? NT : 1][4], weight_sum[K::LEAN && K::W ? NT : 1][4], one_weight_sum = 0.f;
    clear(bias_sum);
    clear(weight_sum);
    const uint64_t seed = !K::LEAN && p.threshold ? (uint64_t)*p.a.seed : 0u;

    for (int stage = 0; index < last; ++index, stage ^= K::STAGES - 1) {
        unsigned char *q = shared + stage * K::STAGE, *k = q + K::TILE, *v = k + K::TILE, *dout = v + K::TILE;
        forget(lane);  // addresses in shared memory: kept over the windows they would spill
        forget(row);
        if (!K::LEAN) forget(column);
        cp_wait<0>();
        __syncthreads();
        if (K::STAGES > 1 && index + 1 < last) {
            there.find(p, window.after(p), places);
            fetch<T, D, K::TILE, true>(p, there, head, shared + (stage ^ 1) * K::STAGE);
            cp_commit();
        }

        const int64_t base = ((int64_t)index * heads + head) * p.tokens;
        float lse[2];  // infinite on rows that are no query: their P is 0
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            lse[h] = is_query(p, window, places, row + 8 * h) ? p.a.lse[base + row + 8 * h] * LOG2E : INFINITY;
        }
        if (K::COSINE) {
            inverse_norm<T, D>(p, q, norms, thread);
            __syncthreads();
        }

        // s: q kᵀ, x: the logits in units of log 2, then P; this warp's 16 rows
        float s[NT][4], x[NT][4], g[NT][4];
        clear(s);
        uint32_t a[D / 16][4];
#pragma unroll
        for (int i = 0; i < D / 16; ++i) ldsm4(a[i], q + at<D>(warp * 16 + lane % 16, i * 2 + lane / 16));
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            uint32_t b[D / 8];
            rows_as_columns<D>(b, k, n, lane);
#pragma unroll
            for (int i = 0; i < D / 16; ++i) mma<T>(s[n], a[i], b[2 * i], b[2 * i + 1]);
            const uint2 keys = *reinterpret_cast<const uint2*>(places + n * 8 + column);
            const float4 t = K::LEAN ? bias_fragments[n * 32] : gather(bias_table, from, keys);
            float4 w = make_float4(uniform, uniform, uniform, uniform);
            if (K::W) w = K::LEAN ? weight_fragments[n * 32] : gather(weight_table, from, keys);
            if (K::COSINE) {
                const float2 key_norm = *reinterpret_cast<const float2*>(norms + ROWS + n * 8 + column);
                const float n0 = norms[row], n1 = norms[row + 8];
                s[n][0] *= n0 * key_norm.x; s[n][1] *= n0 * key_norm.y; s[n][2] *= n1 * key_norm.x; s[n][3] *= n1 * key_norm.y;
            }
            x[n][0] = s[n][0] * (w.x * LOG2E) + t.x; x[n][1] = s[n][1] * (w.y * LOG2E) + t.y;
            x[n][2] = s[n][2] * (w.z * LOG2E) + t.z; x[n][3] = s[n][3] * (w.w * LOG2E) + t.w;
            if (!K::LEAN) {
#pragma unroll
                for (int e = 0; e < 4; ++e) if (n * 8 + column + e % 2 >= p.tokens) x[n][e] = -INFINITY;
            }
        }
        mask.apply(x, p, window, places, column);
#pragma unroll
        for (int n = 0; n < NT; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) x[n][e] = ex2(x[n][e] - lse[e / 2]);

        // g: G, then G'; P keep post to shared memory
        float inner[2] = {0.f, 0.f};
        clear(g);
#pragma unroll
        for (int i = 0; i < D / 16; ++i) ldsm4(a[i], dout + at<D>(warp * 16 + lane % 16, i * 2 + lane / 16));
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            uint32_t b[D / 8];
            rows_as_columns<D>(b, v, n, lane);
#pragma unroll
            for (int i = 0; i < D / 16; ++i) mma<T>(g[n], a[i], b[2 * i], b[2 * i + 1]);
            float kept[4] = {x[n][0], x[n][1], x[n][2], x[n][3]};
            if (!K::LEAN && (p.threshold || p.a.post)) {
                float4 f = make_float4(1.f, 1.f, 1.f, 1.f);
                if (p.a.post) f = gather(post_table, from, *reinterpret_cast<const uint2*>(places + n * 8 + column));
                const float by[4] = {f.x, f.y, f.z, f.w};
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const uint32_t key = (uint32_t)(n * 8 + column + e % 2);
                    const bool keep = !p.threshold || wa_keep(seed, (uint64_t)(base + row + e / 2 * 8), key, p.threshold);
                    g[n][e] *= keep ? p.keep_scale : 0.f;
                    kept[e] *= keep ? by[e] * p.keep_scale : 0.f;
                }
                if (post_sums) {
                    float4 t = post_sums[n * 32];
                    t.x += x[n][0] * g[n][0]; t.y += x[n][1] * g[n][1]; t.z += x[n][2] * g[n][2]; t.w += x[n][3] * g[n][3];
                    post_sums[n * 32] = t;
                }
#pragma unroll
                for (int e = 0; e < 4; ++e) g[n][e] *= by[e];
            }
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                inner[h] += x[n][2 * h] * g[n][2 * h] + x[n][2 * h + 1] * g[n][2 * h + 1];
                put2<T, ROWS>(pairs_p, row + 8 * h, n, column, kept[2 * h], kept[2 * h + 1]);
            }
        }
        inner[0] = across_quad_sum(inner[0]);
        inner[1] = across_quad_sum(inner[1]);

        // x: dS; dS w to shared memory
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            float4 w = make_float4(uniform, uniform, uniform, uniform);
            const uint2 keys = *reinterpret_cast<const uint2*>(places + n * 8 + column);
            if (K::W) w = K::LEAN ? weight_fragments[n * 32] : gather(weight_table, from, keys);
            const float by[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                x[n][e] *= g[n][e] - inner[e / 2];
                if (K::LEAN) bias_sum[K::LEAN ? n : 0][e] += x[n][e];
                if (K::LEAN && K::W) weight_sum[K::LEAN && K::W ? n : 0][e] += x[n][e] * s[n][e];
                if (K::ONE_WEIGHT_SUM) one_weight_sum += x[n][e] * s[n][e];
            }
            if (bias_sums && !K::LEAN) {
                float4 t = bias_sums[n * 32];
                t.x += x[n][0]; t.y += x[n][1]; t.z += x[n][2]; t.w += x[n][3];
                bias_sums[n * 32] = t;
            }
            if (weight_sums && !K::LEAN) {
                float4 t = weight_sums[n * 32];
                t.x += x[n][0] * s[n][0]; t.y += x[n][1] * s[n][1]; t.z += x[n][2] * s[n][2]; t.w += x[n][3] * s[n][3];
                weight_sums[n * 32] = t;
            }
#pragma unroll
            for (int h = 0; h < 2; ++h)
                put2<T, ROWS>(pairs_ds, row + 8 * h, n, column, x[n][2 * h] * by[2 * h], x[n][2 * h + 1] * by[2 * h + 1]);
        }
        __syncthreads();  // all rows of P and dS are there, and nobody needs the raw q and k any more
        if (K::COSINE && p.a.cosine) {
            normalise<T, D>(q, norms, thread);
            __syncthreads();
        }

        float dq[D / 8][4], dk[D / 8][4], dv[D / 8][4];
        clear(dq);
        clear(dk);
        clear(dv);
#pragma unroll 1
        for (int i = 0; i < K::WARPS; ++i) {
            uint32_t rows[4];
            ldsm4(rows, pairs_ds + at<ROWS>(warp * 16 + lane % 16, i * 2 + lane / 16));
            times_rows<T, D>(dq, rows, k, i, lane);
            const int query = i * 16 + lane % 8 + lane / 16 * 8, chunk = warp * 2 + lane / 8 % 2;
            ldsm4t(rows, pairs_ds + at<ROWS>(query, chunk));
            times_rows<T, D>(dk, rows, q, i, lane);
            ldsm4t(rows, pairs_p + at<ROWS>(query, chunk));
            times_rows<T, D>(dv, rows, dout, i, lane);
        }
        __syncthreads();  // nobody reads other warps' rows any more
        put_rows<T, D, K::COSINE>(dq, q, row, column, norms, p.a.cosine);
        put_rows<T, D, K::COSINE>(dk, k, row, column, norms + ROWS, p.a.cosine);
        put_rows<T, D, false>(dv, v, row, column, nullptr, false);
        __syncwarp();
#pragma unroll
        for (int i = 0; i < CopyRows<D>::SLOTS; ++i) {
            if (here.token[i] < 0) continue;
            const int channels = heads * D;
            T* to = static_cast<T*>(p.a.grad_qkv) + (int64_t)here.token[i] * (3 * channels) + head * D + here.chunk * 8;
#pragma unroll
            for (int m = 0; m < 3; ++m) {
                const unsigned char* word = q + m * K::TILE + at<D>(here.row(i), here.chunk);
                *reinterpret_cast<uint4*>(to + m * channels) = *reinterpret_cast<const uint4*>(word);
            }
        }
        window = window.after(p);
        if (K::STAGES > 1) here = there;
        if (K::STAGES == 1 && index + 1 < last) {
            __syncwarp();  // a warp's copies touch its own rows only, and those have been stored
            here.find(p, window, places);
            fetch<T, D, K::TILE, true>(p, here, head, shared);
            cp_commit();
        }
    }

    // the sums of this block, table by table, in its slot of the partial sums
    const int64_t slot = ((int64_t)blockIdx.y * heads + head) * p.offsets;
    if (!K::LEAN) {
        __syncthreads();
        if (p.bias_parts) sum_by_offset<K>(p, reinterpret_cast<float*>(bias_sums - fragment), p.bias_parts + slot, thread);
        if (p.weight_parts) sum_by_offset<K>(p, reinterpret_cast<float*>(weight_sums - fragment), p.weight_parts + slot, thread);
        if (p.post_parts) sum_by_offset<K>(p, reinterpret_cast<float*>(post_sums - fragment), p.post_parts + slot, thread);
        return;
    }
    float4* staged = reinterpret_cast<float4*>(shared) + fragment;
    __syncthreads();
    if (p.bias_parts) {
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            const int m = K::LEAN ? n : 0;
            staged[n * 32] = make_float4(bias_sum[m][0], bias_sum[m][1], bias_sum[m][2], bias_sum[m][3]);
        }
        __syncthreads();
        sum_by_offset<K>(p, reinterpret_cast<float*>(shared), p.bias_parts + slot, thread);
        __syncthreads();
    }
    if (K::W && p.weight_parts) {
#pragma unroll
        for (int n = 0; n < NT; ++n) {
            const int m = K::LEAN && K::W ? n : 0;
            staged[n * 32] = make_float4(weight_sum[m][0], weight_sum[m][1], weight_sum[m][2], weight_sum[m][3]);
        }
        __syncthreads();
        sum_by_offset<K>(p, reinterpret_cast<float*>(shared), p.weight_parts + slot, thread);
    }
    if (K::ONE_WEIGHT_SUM && p.weight_parts) {  // one number: entry 0 of the slot, the others 0
        float* all = reinterpret_cast<float*>(shared);
        all[thread] = one_weight_sum;
        __syncthreads();
        for (int t = thread; t < p.offsets; t += K::THREADS) {
            float sum = 0.f;
            if (t == 0) for (int i = 0; i < K::THREADS; ++i) sum += all[i];
            p.weight_parts[slot + t] = sum;
        }
    }
}
