// Forward: one warp works on 16 queries at a time, online softmax over blocks of up to 64 keys.
// Keys and values of the window stay in shared memory where they fit, else two blocks of them take
// turns.
#pragma once
#include "tiled_epilogue.h"

namespace tiled {

constexpr int kForwardBlock = 64;

template <typename T, int D, int Mode> struct ForwardShared : Shared<Mode> {
    unsigned char *k, *v, *queries;  // (resident ? rows : 2 * block, D) each; 16 rows a warp
    WA_HD ForwardShared(Carve& carve, const Args& p, int warps) : Shared<Mode>(carve, p) {
        const int rows = p.resident ? p.rows : 2 * p.block;
        k = carve.take<unsigned char>(rows * Row<T, D>::bytes);
        v = carve.take<unsigned char>(rows * Row<T, D>::bytes);
        queries = carve.take<unsigned char>(warps * 16 * Row<T, D>::bytes);
    }
};

// Running softmax of the lane's two rows, and the sum of values that it weighs.
template <typename T, int D, int Mode> struct Attend {
    const Args& p;
    const ForwardShared<T, D, Mode>& shared;
    int lane;
    float uniform;             // scale in Unit
    uint64_t seed;
    int word[2]{};             // words of the two queries
    const unsigned char* entries[2]{};
    int64_t row[2]{};          // their numbers for the dropout
    float row_max[2]{};        // largest logit so far
    float row_sum[2]{};        // sum of exponentials relative to it
    Left<T, D> q{};
    Fragment<D> o{};

    WA_DEVICE void start(int first, int64_t first_row) {
        clear<D>(o);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int i = (lane >> 2) + 8 * r;
            word[r] = shared.word[first + i];
            entries[r] = entries_of<Mode>(shared, p, word[r]);
            row[r] = first_row + first + i;
            row_max[r] = -1e30f;
            row_sum[r] = 0.f;
        }
    }

    // Keys [first, first + count) of the window, whose rows k and v point to.
    template <bool Special> WA_DEVICE void keys(const unsigned char* k, const unsigned char* v,
                                                int first, int count) {
        int now = lane;
        forget(now);  // where the lane reads is worked out for each block: kept, it would spill
        const Lane<T, D> at(now);
        if (count == 64) return some<4, Special>(at, k, v, first);
        if (count == 48) return some<3, Special>(at, k, v, first);
#pragma unroll 1
        for (int t = 0; t < count; t += 16)
            some<1, Special>(at, k + t * Row<T, D>::bytes, v + t * Row<T, D>::bytes, first + t);
    }

    // The same for 16 Tiles of them.
    template <int Tiles, bool Special>
    WA_DEVICE void some(const Lane<T, D>& at, const unsigned char* k, const unsigned char* v,
                        int first) {
        float s[Tiles][2][4], new_max[2] = {row_max[0], row_max[1]};
        const int* words = shared.word + first + (at.lane & 3) * 2;
        const float mask = p.a.mask_value * Unit<T>::of_natural;
#pragma unroll
        for (int t = 0; t < Tiles; ++t) {
            clear<16>(s[t]);
            q.times_transposed(s[t], k + t * 16 * Row<T, D>::bytes, at);
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                const int2 of_keys = *reinterpret_cast<const int2*>(words + t * 16 + n * 8);
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int key = e & 1 ? of_keys.y : of_keys.x, r = e >> 1;
                    float scale;
                    float x = logit<Mode>(entries[r] - (Special ? key & kBytes : key), uniform,
                                          s[t][n][e], scale);
                    if (Special) {
                        if ((key ^ word[r]) & kRegion) x += mask;
                        if (key & kOutside) x = -INFINITY;
                    }
                    s[t][n][e] = x;
                    new_max[r] = fmaxf(new_max[r], x);
                }
            }
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            new_max[r] = fmaxf(new_max[r], __shfl_xor_sync(0xffffffffu, new_max[r], 1));
            new_max[r] = fmaxf(new_max[r], __shfl_xor_sync(0xffffffffu, new_max[r], 2));
            const float softmax_rescale = Unit<T>::exponential(row_max[r] - new_max[r]);
            row_max[r] = new_max[r];
            row_sum[r] *= softmax_rescale;
#pragma unroll
            for (int n = 0; n < D / 8; ++n) {
                o[n][2 * r] *= softmax_rescale;
                o[n][2 * r + 1] *= softmax_rescale;
            }
        }
#pragma unroll
        for (int t = 0; t < Tiles; ++t) {
#pragma unroll
            for (int n = 0; n < 2; ++n)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const float x = Unit<T>::exponential(s[t][n][e] - row_max[e >> 1]);
                    row_sum[e >> 1] += x;
                    s[t][n][e] = x;
                }
            if (Mode == kFull) after_softmax(s[t], first + t * 16);
            Operand<T> tile;
            tile.set(0, s[t][0]);
            tile.set(1, s[t][1]);
            Product<T, D>::add(o, tile, v + t * 16 * Row<T, D>::bytes, at);
        }
    }

    // The factor after the softmax and the dropout, which the sum of exponentials does not see.
    WA_DEVICE void after_softmax(Fragment<16>& x, int first) {
        const int c = (lane & 3) * 2;
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int j = first + n * 8 + c + (e & 1);
                x[n][e] *= post_of<Mode>(shared, entries[e >> 1] - (shared.word[j] & kBytes));
                if (p.drop_below)
                    x[n][e] = wa_keep(seed, (uint64_t)row[e >> 1], (uint32_t)j, p.drop_below)
                                  ? x[n][e] * p.keep_factor
                                  : 0.f;
            }
    }
};

template <typename T, int D, int Mode, bool Epilogue>
__global__ void __launch_bounds__(kMaxThreads, Epilogue ? 1 : blocks_wanted<T, D, Mode>())
    forward_kernel(const Args p) {
    WA_DYN_SMEM(memory);
    const int lane = threadIdx.x & 31;
    const int warp = threadIdx.x >> 5;
    const int warps = blockDim.x >> 5;
    const int head = blockIdx.x;
    Carve carve{memory};
    const ForwardShared<T, D, Mode> shared(carve, p, warps);
    fill_shared<T, Mode>(shared, p, head);
    const Heads<T> heads(p, head);
    const T *q = heads.part(p.a.qkv, 0), *k = heads.part(p.a.qkv, 1), *v = heads.part(p.a.qkv, 2);
    unsigned char* own = shared.queries + warp * 16 * Row<T, D>::bytes;
    Attend<T, D, Mode> attend{p, shared, lane, p.a.scale[head] * Unit<T>::of_natural,
                              p.drop_below ? (uint64_t)*p.a.seed : 0};

    for (int index = blockIdx.y; index < p.total; index += gridDim.y) {
        const Window window(p, index);
        const int64_t first_row = (static_cast<int64_t>(index) * p.a.heads + head) * p.area;
        __syncthreads();  // the tables are there, the last window is done with
        fill_window<Mode>(shared, p, window);
        __syncthreads();
        auto fetch_rows = [&](int first, int count, int at) {
            load_rows<T, D>(shared.token + first, count, k, heads.stride,
                            shared.k + at * Row<T, D>::bytes, v, heads.stride,
                            shared.v + at * Row<T, D>::bytes, threadIdx.x, blockDim.x);
            cp_commit();
        };
        auto rows_arrived = [&](int count, int at) {
            if (p.a.cosine)
                normalise_rows<T, D>(shared.k + at * Row<T, D>::bytes, nullptr, count, threadIdx.x,
                                     blockDim.x);
        };
        if (p.resident) {
            fetch_rows(0, p.rows, 0);
            cp_wait<0>();
            rows_arrived(p.rows, 0);
        }
        __syncthreads();
        for (int pass = blockIdx.z; pass < p.passes; pass += gridDim.z) {
            const int tile = pass * warps + warp;
            const bool active = tile < p.tiles;
            // q alone
            if (active)
                load_rows<T, D>(shared.token + tile * 16, 16, q, heads.stride, own, q, 0, nullptr,
                                lane, 32);
            cp_commit();
            if (!p.resident) fetch_rows(0, p.block < p.rows ? p.block : p.rows, 0);
            if (active) attend.start(tile * 16, first_row);
#pragma unroll 1
            for (int first = 0; first < p.rows; first += p.block) {
                const int count = p.block < p.rows - first ? p.block : p.rows - first;
                const int at = p.resident ? first : first / p.block % 2 * p.block;
                const int next = first + p.block;
                if (!p.resident) {
                    if (next < p.rows)
                        fetch_rows(next, p.block < p.rows - next ? p.block : p.rows - next,
                                   p.block - at);
                    else cp_commit();
                    cp_wait<1>();
                    rows_arrived(count, at);
                    __syncthreads();
                } else if (first == 0) {
                    cp_wait<0>();
                }
                if (active && first == 0) {
                    if (p.a.cosine) normalise_rows<T, D>(own, nullptr, 16, lane, 32);
                    __syncwarp();
                    attend.q.load(own, Lane<T, D>(lane));
                }
                const unsigned char* k_block = shared.k + at * Row<T, D>::bytes;
                const unsigned char* v_block = shared.v + at * Row<T, D>::bytes;
                if (active && window.special)
                    attend.template keys<true>(k_block, v_block, first, count);
                else if (active) attend.template keys<false>(k_block, v_block, first, count);
                if (!p.resident) __syncthreads();
            }
            if (!active) continue;
            float total[2], by[2];
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                total[r] = sum_of_row(attend.row_sum[r]);
                by[r] = 1.f / total[r];
                const int i = tile * 16 + (lane >> 2) + 8 * r;
                if (p.a.lse && (lane & 3) == 0 && !(attend.word[r] & kOutside))
                    p.a.lse[first_row + i] = (attend.row_max[r] + Unit<T>::logarithm(total[r])) *
                                             Unit<T>::in_natural;
            }
            __syncwarp();  // the queries' rows are read, and take the output
            if (Epilogue) {  // by way of the values
                load_rows<T, D>(shared.token + tile * 16, 16, v, heads.stride, own, v, 0, nullptr,
                                lane, 32);
                cp_commit();
                cp_wait<0>();
                __syncwarp();
                float ratio[2];
                add_own_value<T, D>(attend.o, by, ratio, p, own, head, lane);
#pragma unroll
                for (int r = 0; r < 2; ++r)
                    if (p.a.along && (lane & 3) == 0 && !(attend.word[r] & kOutside))
                        p.a.along[first_row + tile * 16 + (lane >> 2) + 8 * r] = ratio[r];
            }
            store_fragment<T, D>(own, attend.o, by[0], by[1], lane);
            __syncwarp();
            write_rows<T, D>(shared.token + tile * 16, own, static_cast<T*>(p.a.out) + heads.offset,
                             heads.width, lane);
            __syncwarp();  // before the next pass brings queries here
        }
    }
    cp_wait<0>();
}

}  // namespace tiled
