// Backward, first kernel: a strip of queries of every window of one head. Forms delta (the sum over
// keys of P dP, less the gradient of the row's log-sum-exp), dq, and the gradients of the tables,
// whose N x N entries stay in shared memory over all windows of the block: each is owned by one
// thread, so nothing is atomic.
#pragma once
#include "tiled_epilogue.h"
#include "tiled_pairs.h"
#include "tiled_tables.h"

namespace tiled {

template <typename T, int D, int Mode> struct QueryShared : Shared<Mode> {
    unsigned char *k, *v;            // (resident ? rows : 2 * block, D)
    float4* exchange;  // (groups - 1, strip, D / 8, 32): dq of groups 1 .., where k and v stood
                       // when these are done with
    unsigned char *queries, *grads;  // (16 * strip, D): q and dO; then q takes dq
    float* inverse;                  // (16 * strip,) 1 / |q|
    float2* deltas;                  // (groups, 16 * strip): parts of delta and of the sum of P
    float4* sums[3];                 // (strip, tiles, 2, 32) entries of bias, scale, post
    float* of_warps;                 // (strip * groups,)
    WA_HD QueryShared(Carve& carve, const Args& p) : Shared<Mode>(carve, p) {
        const int keys = (p.resident ? p.rows : 2 * p.block) * Row<T, D>::bytes;
        const int own = p.strip * 16 * Row<T, D>::bytes;
        const int parts = (p.groups - 1) * p.strip * 16 * D * 4;
        k = carve.take<unsigned char>(2 * keys > parts ? 2 * keys : parts);
        v = k + keys;
        exchange = reinterpret_cast<float4*>(k);
        queries = carve.take<unsigned char>(own);
        grads = carve.take<unsigned char>(own);
        inverse = carve.take<float>(p.strip * 16);
        deltas = carve.take<float2>(p.groups > 1 ? p.groups * p.strip * 16 : 0);
        of_warps = carve.take<float>(p.strip * p.groups);
        for (int table = 0; table < 3; ++table)
            sums[table] = carve.take<float4>(p.grads >> table & 1 ? p.strip * p.tiles * 64 : 0);
    }
};

template <typename T, int D, int Mode, bool Epilogue> struct QueryTile {
    const Args& p;
    const QueryShared<T, D, Mode>& shared;
    const Lane<T, D> at;
    float uniform, mask;
    uint64_t seed;
    int tile, group;           // within the strip; among those that share its keys
    int word[2]{};
    const unsigned char* entries[2]{};
    int64_t row[2]{};
    float lse[2]{}, delta[2]{};
    float map_rescale[2]{};  // float only: see Args. The saved log sum exp is rounded, which would
                             // show in all of a row alike
    float map_sum[2]{};        // float only: sum of P
    float of_scale = 0.f;  // this thread's part of the uniform scale's gradient, over all windows
    float of_window = 0.f;     // and over this one
    Left<T, D> q{}, grad{};
    Fragment<D> dq{};

    // What is known before the rows have arrived. first_query: of the strip; first_row: number of
    // the window's first row
    WA_DEVICE void prepare(int first_query, int64_t first_row) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int i = first_query + tile * 16 + (at.lane >> 2) + 8 * r;
            word[r] = shared.word[i];
            entries[r] = entries_of<Mode>(shared, p, word[r]);
            row[r] = first_row + i;
            lse[r] = word[r] & kOutside ? INFINITY : p.a.lse[first_row + i] * Unit<T>::of_natural;
            delta[r] = map_sum[r] = 0.f;
            map_rescale[r] = 1.f;
        }
    }
    WA_DEVICE void start() {
        const int own = tile * 16 * Row<T, D>::bytes;
        q.load(shared.queries + own, at);
        grad.load(shared.grads + own, at);
        of_window = 0.f;
        clear<D>(dq);
    }

    // Phase 0 (delta) or 1 (gradients) over this group's share of keys [first, first + count),
    // whose rows k and v point to.
    template <int Phase, bool Special> WA_DEVICE void keys(const unsigned char* k,
                                                           const unsigned char* v, int first,
                                                           int count) {
#pragma unroll 1
        for (int t = group * 16; t < count; t += p.groups * 16) {
            Pairs x;
            form<Special>(x, k + t * Row<T, D>::bytes, v + t * Row<T, D>::bytes, first + t);
            if (Phase == 0) add_delta(x);
            else add_grads(x, k + t * Row<T, D>::bytes, first + t);
        }
    }
    template <int Phase> WA_DEVICE void phase(const unsigned char* k, const unsigned char* v,
                                              int first, int count, bool special) {
        if (special) keys<Phase, true>(k, v, first, count);
        else keys<Phase, false>(k, v, first, count);
    }

    template <bool Special> WA_DEVICE void form(Pairs& x, const unsigned char* k,
                                                const unsigned char* v, int first) const {
        clear<16>(x.product);
        clear<16>(x.grad);
        q.times_transposed(x.product, k, at);
        grad.times_transposed(x.grad, v, at);
        const int c = (at.lane & 3) * 2;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            const int2 of_keys = *reinterpret_cast<const int2*>(shared.word + first + n * 8 + c);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int key = e & 1 ? of_keys.y : of_keys.x, r = e >> 1;
                const unsigned char* entry = entries[r] - (Special ? key & kBytes : key);
                const bool masked = Special && ((key ^ word[r]) & kRegion);
                const bool outside = Special && (key & kOutside);
                form_map<T, Mode>(x, n, e, entry, uniform, masked, mask, outside, lse[r]);
                if (sizeof(T) == 4) x.map[n][e] *= map_rescale[r];
                x.kept[n][e] = kept_factor<Mode>(shared, p, seed, entry, row[r],
                                                 first + n * 8 + c + (e & 1));
            }
        }
    }

    WA_DEVICE void add_delta(const Pairs& x) {
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                delta[e >> 1] += x.map[n][e] * x.kept[n][e] * x.grad[n][e];
                if (sizeof(T) == 4) map_sum[e >> 1] += x.map[n][e];
            }
    }

    // Adds the tile's part of dq and of the tables' gradients.
    WA_DEVICE void add_grads(Pairs& x, const unsigned char* k, int first) {
        Operand<T> of_dot;
        const float beta = Epilogue && p.a.beta ? p.a.beta[blockIdx.x] : 1.f;
        const int entry = ((tile * p.tiles + first / 16) * 2) * 32 + at.lane;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            float of_bias[4], of_product[4], of_post[4];
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const float kept = Epilogue ? x.kept[n][e] * beta : x.kept[n][e];
                of_bias[e] = x.map[n][e] * (kept * x.grad[n][e] - delta[e >> 1]);
                of_product[e] = of_bias[e] * x.product[n][e];
                of_window += of_product[e];
            }
            if (p.grads & kGradBias) accumulate(shared.sums[0] + entry + n * 32, of_bias);
            if (Mode != kUniform && (p.grads & kGradScale))
                accumulate(shared.sums[1] + entry + n * 32, of_product);
            if (Mode == kFull && (p.grads & kGradPost)) {
                const int c = (at.lane & 3) * 2;
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int j = first + n * 8 + c + (e & 1);
                    const bool keep = p.drop_below == 0 || wa_keep(seed, (uint64_t)row[e >> 1],
                                                                   (uint32_t)j, p.drop_below);
                    of_post[e] = keep ? x.map[n][e] * x.grad[n][e] * p.keep_factor : 0.f;
                    if (Epilogue) of_post[e] *= beta;
                }
                accumulate(shared.sums[2] + entry + n * 32, of_post);
            }
            if (scale_late<T, Mode>) {
                of_dot.set(n, of_bias);
            } else {
#pragma unroll
                for (int e = 0; e < 4; ++e) of_product[e] = of_bias[e] * x.scale[n][e];
                of_dot.set(n, of_product);
            }
        }
        Product<T, D>::add(dq, of_dot, k, at);
    }

    static WA_DEVICE void accumulate(float4* sum, const float (&x)[4]) {
        float4 so_far = *sum;
        so_far.x += x[0];
        so_far.y += x[1];
        so_far.z += x[2];
        so_far.w += x[3];
        *sum = so_far;
    }
};

template <typename T, int D, int Mode, bool Epilogue>
__global__ void __launch_bounds__(query_threads<T, D, Mode, Epilogue>(), 1)
    query_kernel(const Args p) {
    WA_DYN_SMEM(memory);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, head = blockIdx.x;
    Carve carve{memory};
    const QueryShared<T, D, Mode> shared(carve, p);
    fill_shared<T, Mode>(shared, p, head);
    for (int table = 0; table < 3; ++table)
        if (p.grads >> table & 1)
            for (int i = threadIdx.x; i < p.strip * p.tiles * 64; i += blockDim.x)
                shared.sums[table][i] = make_float4(0.f, 0.f, 0.f, 0.f);
    const Heads<T> heads(p, head);
    const T *q = heads.part(p.a.qkv, 0), *k = heads.part(p.a.qkv, 1), *v = heads.part(p.a.qkv, 2);
    const T* grad_out = static_cast<const T*>(p.a.grad_out) + heads.offset;
    const int first_query = blockIdx.z * p.strip * 16;
    const int queries = p.strip * 16 < p.rows - first_query ? p.strip * 16 : p.rows - first_query;
    QueryTile<T, D, Mode, Epilogue> own{p,
                              shared,
                              Lane<T, D>(lane),
                              p.a.scale[head] * Unit<T>::of_natural,
                              p.a.mask_value * Unit<T>::of_natural,
                              p.drop_below ? (uint64_t)*p.a.seed : 0,
                              warp % p.strip,
                              warp / p.strip};
    const float dq_factor = Unit<T>::in_natural * (scale_late<T, Mode> ? own.uniform : 1.f);
    const bool active = own.tile * 16 < queries;
    const int own_row = own.tile * 16 * Row<T, D>::bytes;

    for (int index = blockIdx.y; index < p.total; index += gridDim.y) {
        const Window window(p, index);
        const int64_t first_row = (static_cast<int64_t>(index) * p.a.heads + head) * p.area;
        __syncthreads();  // tables and sums are there, the last window is done with
        fill_window<Mode>(shared, p, window);
        __syncthreads();
        load_rows<T, D>(shared.token + first_query, queries, q, heads.stride, shared.queries,
                        grad_out, heads.width, shared.grads, threadIdx.x, blockDim.x);
        auto fetch_rows = [&](int first, int at) {
            const int count = p.resident || p.rows - first < p.block ? p.rows - first : p.block;
            load_rows<T, D>(shared.token + first, count, k, heads.stride,
                            shared.k + at * Row<T, D>::bytes, v, heads.stride,
                            shared.v + at * Row<T, D>::bytes, threadIdx.x, blockDim.x);
            cp_commit();
            return count;
        };
        auto rows_arrived = [&](int count, int at) {
            if (p.a.cosine)
                normalise_rows<T, D>(shared.k + at * Row<T, D>::bytes, nullptr, count, threadIdx.x,
                                     blockDim.x);
        };
        cp_commit();
        fetch_rows(0, 0);
        if (active) own.prepare(first_query, first_row);
        if (p.a.cosine || p.resident) {
            cp_wait<0>();
            if (p.a.cosine)
                normalise_rows<T, D>(shared.queries, shared.inverse, queries, threadIdx.x,
                                     blockDim.x);
            if (p.resident) rows_arrived(p.rows, 0);
        } else {
            cp_wait<1>();
        }
        if (Epilogue && p.a.exclusion)
            exclude_rows<T, D>(shared.grads, shared.token + first_query, queries, v, heads.stride,
                               p.a.exclusion[head], threadIdx.x, blockDim.x);
        __syncthreads();
        if (active) own.start();
        int turn = 0;
#pragma unroll 1
        for (int phase = 0; phase < 2; ++phase) {
#pragma unroll 1
            for (int first = 0; first < p.rows; first += p.block, ++turn) {
                const int count = p.block < p.rows - first ? p.block : p.rows - first;
                const int at = place_of_block(p, first, turn);
                if (!p.resident) {
                    const int next = first + p.block < p.rows ? first + p.block
                                     : phase == 0             ? 0
                                                              : -1;
                    if (next >= 0) fetch_rows(next, place_of_block(p, next, turn + 1));
                    else cp_commit();
                    cp_wait<1>();
                    rows_arrived(count, at);
                    __syncthreads();
                }
                const unsigned char* k_block = shared.k + at * Row<T, D>::bytes;
                const unsigned char* v_block = shared.v + at * Row<T, D>::bytes;
                if (active && phase == 0)
                    own.template phase<0>(k_block, v_block, first, count, window.special);
                else if (active)
                    own.template phase<1>(k_block, v_block, first, count, window.special);
                if (!p.resident) __syncthreads();
            }
            if (phase == 1) break;
            // delta of a query, summed over the lanes and groups that share it
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                own.delta[r] = sum_of_row(own.delta[r]);
                if (sizeof(T) == 4) own.map_sum[r] = sum_of_row(own.map_sum[r]);
            }
            if (p.groups > 1) {
                const int slot = own.tile * 16 + (lane >> 2);
                if ((lane & 3) == 0)
                    for (int r = 0; r < 2; ++r)
                        shared.deltas[own.group * p.strip * 16 + slot + 8 * r] = make_float2(
                            own.delta[r], own.map_sum[r]);
                __syncthreads();
                for (int r = 0; r < 2; ++r) {
                    own.delta[r] = own.map_sum[r] = 0.f;
                    for (int other = 0; other < p.groups; ++other) {
                        const float2 part = shared.deltas[other * p.strip * 16 + slot + 8 * r];
                        own.delta[r] += part.x;
                        own.map_sum[r] += part.y;
                    }
                }
            }
            float of_tile = 0.f;  // the lane's rows' part of the gradient of beta
            for (int r = 0; r < 2; ++r) {
                const bool inside = active && !(own.word[r] & kOutside);
                const bool writes = inside && own.group == 0 && (lane & 3) == 0;
                if (sizeof(T) == 4) {
                    own.map_rescale[r] = inside ? 1.f / own.map_sum[r] : 1.f;
                    own.delta[r] *= own.map_rescale[r];
                    if (writes) p.map_rescale[own.row[r]] = own.map_rescale[r];
                }
                if (Epilogue && inside) of_tile += own.delta[r];
                if (Epilogue && p.a.beta) own.delta[r] *= p.a.beta[head];
                if (Epilogue && inside && p.a.grad_lse) own.delta[r] -= p.a.grad_lse[own.row[r]];
                if (writes) p.delta[own.row[r]] = own.delta[r];
            }
            if (Epilogue && p.own_sums.beta && active && own.group == 0) {
                const float sum = sum_of_warp(lane & 3 ? 0.f : of_tile);
                if (lane == 0)
                    p.own_sums.beta[p.own_sums.place(index, p.a.heads, head,
                                                     first_query / 16 + own.tile)] = sum;
            }
        }
        own.of_scale += own.of_window;
        if (p.groups > 1) {  // dq of groups 1.. is added to group 0's, in their order
            // keys and values are done with (else the last block has seen to it)
            if (p.resident) __syncthreads();
            const int of_group = p.strip * (D / 8) * 32;
            float4* parts = shared.exchange + own.tile * (D / 8) * 32 + lane;
            if (active && own.group > 0)
#pragma unroll
                for (int n = 0; n < D / 8; ++n)
                    parts[(own.group - 1) * of_group + n * 32] = make_float4(
                        own.dq[n][0], own.dq[n][1], own.dq[n][2], own.dq[n][3]);
            __syncthreads();
            if (active && own.group == 0)
                for (int other = 1; other < p.groups; ++other)
#pragma unroll
                    for (int n = 0; n < D / 8; ++n) {
                        const float4 part = parts[(other - 1) * of_group + n * 32];
                        own.dq[n][0] += part.x;
                        own.dq[n][1] += part.y;
                        own.dq[n][2] += part.z;
                        own.dq[n][3] += part.w;
                    }
        }
        if (active && own.group == 0) {
            unsigned char* rows = shared.queries + own_row;
            if (p.a.cosine) through_norm<T, D>(own.dq, rows, shared.inverse + own.tile * 16, lane);
            __syncwarp();
            store_fragment<T, D>(rows, own.dq, dq_factor, dq_factor, lane);
            __syncwarp();
            write_rows<T, D>(shared.token + first_query + own.tile * 16, rows,
                             heads.part(p.a.grad_qkv, 0), heads.stride, lane);
        }
    }

    cp_wait<0>();
    // this block's sums: of bias, scale and post in turn, each (blocks of a head, heads, T or 1)
    __syncthreads();
    const int64_t blocks = static_cast<int64_t>(gridDim.y) * gridDim.z;
    const int64_t mine = static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y;
    float* to = p.partial;
    for (int table = 0; table < 3; ++table)
        if (p.grads >> table & 1) {
            fold_pairs(p, shared.sums[table], first_query,
                       to + (mine * p.a.heads + head) * p.offsets);
            to += blocks * p.a.heads * p.offsets;
        }
    if (p.grads & kGradUniform) {
        float sum = own.of_scale;
#pragma unroll
        for (int step = 1; step < 32; step <<= 1) sum += __shfl_xor_sync(0xffffffffu, sum, step);
        if (lane == 0) shared.of_warps[warp] = sum;
        __syncthreads();
        if (threadIdx.x == 0) {
            sum = 0.f;
            for (unsigned other = 0; other < blockDim.x / 32; ++other)
                sum += shared.of_warps[other];
            to[mine * p.a.heads + head] = sum;
        }
    }
}

}  // namespace tiled
