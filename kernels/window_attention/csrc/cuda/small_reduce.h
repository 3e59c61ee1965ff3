// Adds the blocks' partial sums of the table gradients, in fixed order.
#pragma once
#include "small_layout.h"

struct SmallTables {
    const float* parts[3];  // (splits, heads, offsets) each, or null
    float* gradient[3];     // (offsets, heads), or (1, heads) where `single`
    bool single[3];         // one number a head: the sum over its offsets
    int splits, heads, offsets;
};

// A block adds up REDUCE_WIDTH offsets of a head, REDUCE_SLICES threads each: a thread takes every
// REDUCE_SLICES-th split. Where `single`, its blocks but the first have nothing to do.
constexpr int REDUCE_WIDTH = 32, REDUCE_SLICES = 8, REDUCE_THREADS = REDUCE_WIDTH * REDUCE_SLICES;

__global__ static void __launch_bounds__(REDUCE_THREADS) small_reduce(const SmallTables t) {
    WA_DYN_SMEM(shared);
    float* sums = reinterpret_cast<float*>(shared);  // (REDUCE_SLICES, REDUCE_WIDTH)
    const int head = blockIdx.x, table = blockIdx.y, thread = threadIdx.x,
              slice = thread / REDUCE_WIDTH;
    // a choice among three, since an array of arguments indexed at run time would be copied to
    // local memory
    const float* parts = table == 0 ? t.parts[0] : table == 1 ? t.parts[1] : t.parts[2];
    float* gradient = table == 0 ? t.gradient[0] : table == 1 ? t.gradient[1] : t.gradient[2];
    const bool single = table == 0 ? t.single[0] : table == 1 ? t.single[1] : t.single[2];
    const int first = blockIdx.z * REDUCE_WIDTH, offset = first + thread % REDUCE_WIDTH;
    if (!parts || (single && first > 0)) return;
    float sum = 0.f;
    for (int o = offset; o < t.offsets; o += single ? REDUCE_WIDTH : t.offsets) {
        const float* from = parts + (int64_t)head * t.offsets + o;
#pragma unroll 4
        for (int s = slice; s < t.splits; s += REDUCE_SLICES)
            sum += from[(int64_t)s * t.heads * t.offsets];
    }
    sums[thread] = sum;
    for (int half = REDUCE_THREADS / 2; half >= (single ? 1 : REDUCE_WIDTH); half /= 2) {
        __syncthreads();
        if (thread < half) sums[thread] += sums[thread + half];
    }
    if (single && thread == 0) gradient[head] = sums[0];
    if (!single && thread < REDUCE_WIDTH && offset < t.offsets)
        gradient[offset * t.heads + head] = sums[thread];
}
