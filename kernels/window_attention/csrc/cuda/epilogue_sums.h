// Adds up the gradients of the epilogue's factors from the kernels' sums over rows, in a fixed
// order.
#pragma once
#include "epilogue.h"

constexpr int OWN_THREADS = 256;

// A block adds one head's; a thread every OWN_THREADS-th.
static __global__ void __launch_bounds__(OWN_THREADS)
    add_own_sums(const float* sums, float* gradient, int64_t windows, int heads, int tiles) {
    WA_DYN_SMEM(shared);
    float* of_threads = reinterpret_cast<float*>(shared);
    const int head = blockIdx.x, thread = threadIdx.x;
    float sum = 0.f;
    for (int64_t i = thread; i < windows * tiles; i += OWN_THREADS)
        sum += sums[(i / tiles * heads + head) * tiles + i % tiles];
    of_threads[thread] = sum;
    for (int half = OWN_THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (thread < half) of_threads[thread] += of_threads[thread + half];
    }
    if (thread == 0) gradient[head] = of_threads[0];
}

inline int launch_own_sums(const WindowAttentionArgs& a, const OwnSums& sums, int64_t windows,
                           void* stream) {
    float* const gradient[2] = {a.grad_alpha ? a.grad_alpha : a.grad_exclusion, a.grad_beta};
    const float* const from[2] = {sums.own, sums.beta};
    for (int i = 0; i < 2; ++i) {
        if (!from[i]) continue;
        const int code = launch(add_own_sums, dim3(a.heads), dim3(OWN_THREADS), OWN_THREADS * 4,
                                stream, from[i], gradient[i], windows, static_cast<int>(a.heads),
                                sums.tiles);
        if (code) return code;
    }
    return 0;
}
