// Adds the blocks' partial sums of the table gradients, in fixed order.
#pragma once
#include "small_layout.h"

struct SmallTables {
    const float* parts[3];  // (splits, heads, offsets) each, or null
    float* gradient[3];     // (offsets, heads), or (1, heads) where `single`
    bool single[3];         // one number a head: the sum over its offsets
    int splits, heads, offsets;
};

constexpr int REDUCE_THREADS = 256;

__global__ static void __launch_bounds__(REDUCE_THREADS) small_reduce(const SmallTables t) {
    WA_DYN_SMEM(shared);
    float* sums = reinterpret_cast<float*>(shared);
    const int head = blockIdx.x, table = blockIdx.y, thread = threadIdx.x;
    // a choice among three, since an array of arguments indexed at run time would be copied to local memory
    const float* parts = table == 0 ? t.parts[0] : table == 1 ? t.parts[1] : t.parts[2];
    float* gradient = table == 0 ? t.gradient[0] : table == 1 ? t.gradient[1] : t.gradient[2];
    const bool single = table == 0 ? t.single[0] : table == 1 ? t.single[1] : t.single[2];
    if (!parts) return;
    float all = 0.f;
    for (int o = thread; o < t.offsets; o += REDUCE_THREADS) {
        float sum = 0.f;
        for (int s = 0; s < t.splits; ++s) sum += parts[((int64_t)s * t.heads + head) * t.offsets + o];
        if (single) all += sum;
        else gradient[o * t.heads + head] = sum;
    }
    if (!single) return;
    sums[thread] = all;
    for (int half = REDUCE_THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (thread < half) sums[thread] += sums[thread + half];
    }
    if (thread == 0) gradient[head] = sums[0];
}
