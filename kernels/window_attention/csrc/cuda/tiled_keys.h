// Backward, second kernel: dk and dv. One warp works on 16 keys at a time, over all queries of the
// window: the tiles are those of the first kernel transposed, so that P and dS stand in registers
// as the left operand of both products.
#pragma once
#include "tiled_epilogue.h"
#include "tiled_pairs.h"

namespace tiled {

// Two products at a time want many registers a thread: 16 warps on a multiprocessor leave them 128,
// 12 warps 168, 8 warps 255.
constexpr int kKeyThreads = 128;
template <typename T, int D, int Mode, bool Epilogue = false> constexpr int key_blocks() {
    if (Epilogue) return D == 32 && Mode == kUniform ? 3 : 2;
    return D == 64 || (D == 32 && Mode == kFull && sizeof(T) == 2) ? 2 : Mode == kUniform ? 4 : 3;
}

template <typename T, int D, int Mode> struct KeyShared : Shared<Mode> {
    unsigned char *q, *grads;      // (resident ? rows : 2 * block, D): q and dO
    unsigned char *k, *v;          // 16 rows a warp each, which then take dk and dv
    float2* of_query;              // (rows,) log sum exp in Unit, delta
    float* map_rescale;            // (rows,) see Args; float only
    float* inverse;                // 16 a warp: 1 / |k|
    WA_HD KeyShared(Carve& carve, const Args& p, int warps) : Shared<Mode>(carve, p) {
        const int rows = p.resident ? p.rows : 2 * p.block;
        q = carve.take<unsigned char>(rows * Row<T, D>::bytes);
        grads = carve.take<unsigned char>(rows * Row<T, D>::bytes);
        k = carve.take<unsigned char>(warps * 16 * Row<T, D>::bytes);
        v = carve.take<unsigned char>(warps * 16 * Row<T, D>::bytes);
        of_query = carve.take<float2>(p.rows);
        map_rescale = carve.take<float>(sizeof(T) == 4 ? p.rows : 0);
        inverse = carve.take<float>(warps * 16);
    }
};

template <typename T, int D, int Mode, bool Epilogue> struct KeyTile {
    const Args& p;
    const KeyShared<T, D, Mode>& shared;
    int lane;
    float uniform, mask;
    uint64_t seed;
    int64_t first_row = 0;     // of the window, for the dropout
    int first_key = 0;
    int word[2]{};             // of the two keys
    const unsigned char* entries[2]{};
    Left<T, D> k{}, v{};
    Fragment<D> dk{}, dv{};

    WA_DEVICE void start(int first, const unsigned char* rows_k, const unsigned char* rows_v) {
        const Lane<T, D> at(lane);
        k.load(rows_k, at);
        v.load(rows_v, at);
        first_key = first;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            word[r] = shared.word[first + (lane >> 2) + 8 * r];
            entries[r] = entries_before<Mode>(shared, p, word[r]);
        }
        clear<D>(dk);
        clear<D>(dv);
    }

    // Queries [first, first + count) of the window, whose rows q and grads point to.
    template <bool Special> WA_DEVICE void queries(const unsigned char* q,
                                                   const unsigned char* grads, int first,
                                                   int count) {
        int now = lane;
        forget(now);  // where the lane reads is worked out for each block: kept, it would spill
        const Lane<T, D> at(now);
#pragma unroll 1
        for (int t = 0; t < count; t += 16)
            step<Special>(at, q + t * Row<T, D>::bytes, grads + t * Row<T, D>::bytes, first + t);
    }

    template <bool Special> WA_DEVICE void step(const Lane<T, D>& at, const unsigned char* q,
                                                const unsigned char* grads, int first) {
        Pairs x;
        Operand<T> of_value, of_dot;
        clear<16>(x.product);
        clear<16>(x.grad);
        k.times_transposed(x.product, q, at);
        v.times_transposed(x.grad, grads, at);
        const int c = (at.lane & 3) * 2;
        const float beta = Epilogue && p.a.beta ? p.a.beta[blockIdx.x] : 1.f;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            const int i = first + n * 8 + c;
            const int2 of_queries = *reinterpret_cast<const int2*>(shared.word + i);
            // of queries i and i + 1
            const float4 sums = *reinterpret_cast<const float4*>(shared.of_query + i);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int query = e & 1 ? of_queries.y : of_queries.x, r = e >> 1;
                const unsigned char* entry = entries[r] + (Special ? query & kBytes : query);
                const bool masked = Special && ((query ^ word[r]) & kRegion);
                form_map<T, Mode>(x, n, e, entry, uniform, masked, mask, false,
                                  e & 1 ? sums.z : sums.x);
                if (sizeof(T) == 4) x.map[n][e] *= shared.map_rescale[i + (e & 1)];
                const float kept = kept_factor<Mode>(shared, p, seed, entry,
                                                     first_row + i + (e & 1),
                                                     first_key + (at.lane >> 2) + 8 * r);
                const float delta = e & 1 ? sums.w : sums.y;
                const float scaled = Epilogue ? kept * beta : kept;
                x.grad[n][e] = x.map[n][e] * (scaled * x.grad[n][e] - delta);
                if (!scale_late<T, Mode>) x.grad[n][e] *= x.scale[n][e];
                x.map[n][e] *= kept;
            }
            of_value.set(n, x.map[n]);
            of_dot.set(n, x.grad[n]);
        }
        Product<T, D>::add(dv, of_value, grads, at);
        Product<T, D>::add(dk, of_dot, q, at);
    }
};

template <typename T, int D, int Mode, bool Epilogue>
__global__ void __launch_bounds__(kKeyThreads, key_blocks<T, D, Mode, Epilogue>())
    key_kernel(const Args p) {
    WA_DYN_SMEM(memory);
    const int lane = threadIdx.x & 31;
    const int warp = threadIdx.x >> 5;
    const int warps = blockDim.x >> 5;
    const int head = blockIdx.x;
    Carve carve{memory};
    const KeyShared<T, D, Mode> shared(carve, p, warps);
    fill_shared<T, Mode>(shared, p, head);
    const Heads<T> heads(p, head);
    unsigned char* own_k = shared.k + warp * 16 * Row<T, D>::bytes;
    unsigned char* own_v = shared.v + warp * 16 * Row<T, D>::bytes;
    KeyTile<T, D, Mode, Epilogue> own{p,
                            shared,
                            lane,
                            p.a.scale[head] * Unit<T>::of_natural,
                            p.a.mask_value * Unit<T>::of_natural,
                            p.drop_below ? (uint64_t)*p.a.seed : 0};
    const float dk_factor = Unit<T>::in_natural * (scale_late<T, Mode> ? own.uniform : 1.f);

    for (int index = blockIdx.y; index < p.total; index += gridDim.y) {
        const Window window(p, index);
        own.first_row = (static_cast<int64_t>(index) * p.a.heads + head) * p.area;
        __syncthreads();  // the tables are there, the last window is done with
        fill_window<Mode>(shared, p, window);
        __syncthreads();
        auto fetch_rows = [&](int first, int at) {
            const int count = p.resident || p.rows - first < p.block ? p.rows - first : p.block;
            load_rows<T, D>(shared.token + first, count, heads.part(p.a.qkv, 0), heads.stride,
                            shared.q + at * Row<T, D>::bytes,
                            static_cast<const T*>(p.a.grad_out) + heads.offset, heads.width,
                            shared.grads + at * Row<T, D>::bytes, threadIdx.x, blockDim.x);
            cp_commit();
        };
        auto rows_arrived = [&](int first, int count, int at) {
            if (p.a.cosine)
                normalise_rows<T, D>(shared.q + at * Row<T, D>::bytes, nullptr, count, threadIdx.x,
                                     blockDim.x);
            if (Epilogue && p.a.exclusion)
                exclude_rows<T, D>(shared.grads + at * Row<T, D>::bytes, shared.token + first,
                                   count, heads.part(p.a.qkv, 2), heads.stride,
                                   p.a.exclusion[head], threadIdx.x, blockDim.x);
        };
        if (p.resident) fetch_rows(0, 0);
        for (int i = threadIdx.x; i < p.rows; i += blockDim.x) {
            const bool outside = shared.word[i] & kOutside;
            const int64_t row = own.first_row + i;
            shared.of_query[i] = outside ? make_float2(INFINITY, 0.f)
                                         : make_float2(p.a.lse[row] * Unit<T>::of_natural,
                                                       p.delta[row]);
            if (sizeof(T) == 4) shared.map_rescale[i] = outside ? 1.f : p.map_rescale[row];
        }
        if (p.resident) {
            cp_wait<0>();
            rows_arrived(0, p.rows, 0);
        }
        __syncthreads();
        for (int pass = blockIdx.z; pass < p.passes; pass += gridDim.z) {
            const int tile = pass * warps + warp;
            const bool active = tile < p.tiles;
            if (active)
                load_rows<T, D>(shared.token + tile * 16, 16, heads.part(p.a.qkv, 1), heads.stride,
                                own_k, heads.part(p.a.qkv, 2), heads.stride, own_v, lane, 32);
            cp_commit();
            if (!p.resident) fetch_rows(0, 0);
#pragma unroll 1
            for (int first = 0, turn = 0; first < p.rows; first += p.block, ++turn) {
                const int count = p.block < p.rows - first ? p.block : p.rows - first;
                const int at = place_of_block(p, first, turn);
                if (!p.resident) {
                    if (first + p.block < p.rows)
                        fetch_rows(first + p.block, place_of_block(p, first + p.block, turn + 1));
                    else cp_commit();
                    cp_wait<1>();
                    rows_arrived(first, count, at);
                    __syncthreads();
                } else if (first == 0) {
                    cp_wait<0>();
                }
                if (active && first == 0) {
                    if (p.a.cosine)
                        normalise_rows<T, D>(own_k, shared.inverse + warp * 16, 16, lane, 32);
                    __syncwarp();
                    own.start(tile * 16, own_k, own_v);
                }
                const unsigned char* q_block = shared.q + at * Row<T, D>::bytes;
                const unsigned char* grad_block = shared.grads + at * Row<T, D>::bytes;
                if (active && window.special)
                    own.template queries<true>(q_block, grad_block, first, count);
                else if (active) own.template queries<false>(q_block, grad_block, first, count);
                if (!p.resident) __syncthreads();
            }
            if (!active) continue;
            if (p.a.cosine) through_norm<T, D>(own.dk, own_k, shared.inverse + warp * 16, lane);
            if (Epilogue && (p.a.alpha || p.a.exclusion)) {
                const float sum = add_own_gradient<T, D>(own.dv, p, own_v, shared.token + tile * 16,
                                                         own.first_row + tile * 16, head, lane);
                if (p.own_sums.own) {
                    const float all = sum_of_warp(sum);
                    if (lane == 0)
                        p.own_sums.own[p.own_sums.place(index, p.a.heads, head, tile)] = all;
                }
            }
            __syncwarp();
            store_fragment<T, D>(own_k, own.dk, dk_factor, dk_factor, lane);
            store_fragment<T, D>(own_v, own.dv, 1.f, 1.f, lane);
            __syncwarp();
            write_rows<T, D>(shared.token + tile * 16, own_k, heads.part(p.a.grad_qkv, 1),
                             heads.stride, lane);
            write_rows<T, D>(shared.token + tile * 16, own_v, heads.part(p.a.grad_qkv, 2),
                             heads.stride, lane);
            __syncwarp();  // before the next pass brings keys here
        }
    }
    cp_wait<0>();
}

}  // namespace tiled
