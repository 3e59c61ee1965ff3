// Backward, second kernel: dk and dv. One warp works on 16 keys at a time, over all queries of the window: the tiles are those of the
// first kernel transposed, so that P and dS stand in registers as the left operand of both products.
#pragma once
#include "tiled_pairs.h"

namespace tiled {

// Two products at a time want more than 128 registers a thread: 12 warps on a multiprocessor leave them 168, 8 warps 255.
constexpr int kKeyThreads = 128;
constexpr int key_blocks(int head_dim) { return head_dim < 64 ? 3 : 2; }

template <typename T, int D, int Mode> struct KeyShared : Shared<Mode> {
    unsigned char *q, *grads;      // (resident ? rows : 2 * block, D): q and dO
    unsigned char *k, *v;          // 16 rows a warp each, which then take dk and dv
    float2* of_query;              // (rows,) log sum exp in Unit, delta
    float* factor;                 // (rows,) see Args; float only
    float* inverse;                // 16 a warp: 1 / |k|
    WA_HD KeyShared(Carve& carve, const Args& p, int warps) : Shared<Mode>(carve, p) {
        const int rows = p.resident ? p.rows : 2 * p.block;
        q = carve.take<unsigned char>(rows * Row<T, D>::bytes);
        grads = carve.take<unsigned char>(rows * Row<T, D>::bytes);
        k = carve.take<unsigned char>(warps * 16 * Row<T, D>::bytes);
        v = carve.take<unsigned char>(warps * 16 * Row<T, D>::bytes);
        of_query = carve.take<float2>(p.rows);
        factor = carve.take<float>(sizeof(T) == 4 ? p.rows : 0);
        inverse = carve.take<float>(warps * 16);
    }
};

template <typename T, int D, int Mode> struct KeyTile {
    const Args& p;
    const KeyShared<T, D, Mode>& shared;
    float uniform;
    uint64_t seed;
    int lane;
    int64_t first_row = 0;     // of the window, for the dropout
    int first_key = 0;
    int word[2]{};             // of the two keys
    Fragment<D> dk{}, dv{};

    // Queries [first, first + 16) of the window, at row `at` of q and grads.
    WA_DEVICE void step(const Left<T, D>& k, const Left<T, D>& v, const unsigned char* q, const unsigned char* grads, int at, int first,
                        bool special) {
        Pairs x;
        Operand<T> of_value, of_dot;
        clear<16>(x.product);
        clear<16>(x.grad);
        k.times_transposed(x.product, q, at, lane);
        v.times_transposed(x.grad, grads, at, lane);
        const int c = (lane & 3) * 2, centre = centre_of(p);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            const int i = first + n * 8 + c;
            const int2 of_queries = *reinterpret_cast<const int2*>(shared.word + i);
            const float4 sums = *reinterpret_cast<const float4*>(shared.of_query + i);  // of queries i and i + 1
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int query = e & 1 ? of_queries.y : of_queries.x, r = e >> 1;
                const int offset = (query & kOffset) - (word[r] & kOffset) + centre;
                form_map<T, Mode>(x, n, e, shared, p, uniform, offset, special && ((query ^ word[r]) & kRegion), false,
                                  e & 1 ? sums.z : sums.x);
                if (sizeof(T) == 4) x.map[n][e] *= shared.factor[i + (e & 1)];
                const float kept = kept_factor<Mode>(shared, p, seed, offset, first_row + i + (e & 1), first_key + (lane >> 2) + 8 * r);
                const float delta = e & 1 ? sums.w : sums.y;
                x.grad[n][e] = x.map[n][e] * (kept * x.grad[n][e] - delta) * x.weight[n][e];
                x.map[n][e] *= kept;
            }
            of_value.set(n, x.map[n]);
            of_dot.set(n, x.grad[n]);
        }
        Product<T, D>::add(dv, of_value, grads, at, lane);
        Product<T, D>::add(dk, of_dot, q, at, lane);
    }
};

template <typename T, int D, int Mode> __global__ void __launch_bounds__(kKeyThreads, key_blocks(D)) key_kernel(const Args p) {
    WA_DYN_SMEM(memory);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5, head = blockIdx.x;
    Carve carve{memory};
    const KeyShared<T, D, Mode> shared(carve, p, warps);
    fill_shared<T, Mode>(shared, p, head);
    const Heads<T> heads(p, head);
    unsigned char *own_k = shared.k + warp * 16 * Row<T, D>::bytes, *own_v = shared.v + warp * 16 * Row<T, D>::bytes;
    KeyTile<T, D, Mode> own{p, shared, p.a.weight[head] * Unit<T>::of_natural, p.drop_below ? (uint64_t)*p.a.seed : 0, lane};

    for (int index = blockIdx.y; index < p.total; index += gridDim.y) {
        const Window window(p, index);
        own.first_row = (static_cast<int64_t>(index) * p.a.heads + head) * p.area;
        __syncthreads();  // the tables are there, the last window is done with
        for (int i = threadIdx.x; i < p.rows; i += blockDim.x) {
            const int word = window.word(p, shared.place[i]);
            shared.word[i] = word;
            const int64_t row = own.first_row + i;
            shared.of_query[i] =
                word & kOutside ? make_float2(INFINITY, 0.f) : make_float2(p.a.lse[row] * Unit<T>::of_natural, p.delta[row]);
            if (sizeof(T) == 4) shared.factor[i] = word & kOutside ? 1.f : p.factor[row];
        }
        auto bring = [&](int first, int at) {
            const int count = p.resident || p.rows - first < p.block ? p.rows - first : p.block;
            load_rows<T, D>(p, window, shared.place, first, count, heads.part(p.a.qkv, 0), heads.stride, shared.q + at * Row<T, D>::bytes,
                            static_cast<const T*>(p.a.grad_out) + heads.offset, heads.width, shared.grads + at * Row<T, D>::bytes,
                            threadIdx.x, blockDim.x);
            cp_commit();
        };
        auto arrived = [&](int count, int at) {
            if (p.a.cosine) normalise_rows<T, D>(shared.q + at * Row<T, D>::bytes, nullptr, count, threadIdx.x, blockDim.x);
        };
        if (p.resident) {
            bring(0, 0);
            cp_wait<0>();
            arrived(p.rows, 0);
        }
        __syncthreads();
        for (int pass = blockIdx.z; pass < p.passes; pass += gridDim.z) {
            const int tile = pass * warps + warp;
            const bool active = tile < p.tiles;
            Left<T, D> left_k, left_v;
            if (active)
                load_rows<T, D>(p, window, shared.place, tile * 16, 16, heads.part(p.a.qkv, 1), heads.stride, own_k, heads.part(p.a.qkv, 2),
                                heads.stride, own_v, lane, 32);
            cp_commit();
            if (!p.resident) bring(0, 0);
#pragma unroll 1
            for (int first = 0, turn = 0; first < p.rows; first += p.block, ++turn) {
                const int count = p.block < p.rows - first ? p.block : p.rows - first, at = place_of_block(p, first, turn);
                if (!p.resident) {
                    if (first + p.block < p.rows) bring(first + p.block, place_of_block(p, first + p.block, turn + 1));
                    else cp_commit();
                    cp_wait<1>();
                    arrived(count, at);
                    __syncthreads();
                } else if (first == 0) {
                    cp_wait<0>();
                }
                if (active && first == 0) {
                    if (p.a.cosine) normalise_rows<T, D>(own_k, shared.inverse + warp * 16, 16, lane, 32);
                    __syncwarp();
                    left_k.load(own_k, lane);
                    left_v.load(own_v, lane);
                    own.first_key = tile * 16;
#pragma unroll
                    for (int r = 0; r < 2; ++r) own.word[r] = shared.word[tile * 16 + (lane >> 2) + 8 * r];
                    clear<D>(own.dk);
                    clear<D>(own.dv);
                }
                const unsigned char *q_block = shared.q + at * Row<T, D>::bytes, *grad_block = shared.grads + at * Row<T, D>::bytes;
                if (active)
#pragma unroll 1
                    for (int step = 0; step < count; step += 16)
                        own.step(left_k, left_v, q_block, grad_block, step, first + step, window.special);
                if (!p.resident) __syncthreads();
            }
            if (!active) continue;
            if (p.a.cosine) through_norm<T, D>(own.dk, own_k, shared.inverse + warp * 16, lane);
            __syncwarp();
            store_fragment<T, D>(own_k, own.dk, Unit<T>::in_natural, Unit<T>::in_natural, lane);
            store_fragment<T, D>(own_v, own.dv, 1.f, 1.f, lane);
            __syncwarp();
            write_rows<T, D>(p, window, shared.place, tile * 16, own_k, heads.part(p.a.grad_qkv, 1), heads.stride, lane);
            write_rows<T, D>(p, window, shared.place, tile * 16, own_v, heads.part(p.a.grad_qkv, 2), heads.stride, lane);
            __syncwarp();  // before the next pass brings keys here
        }
    }
    cp_wait<0>();
}

}  // namespace tiled
