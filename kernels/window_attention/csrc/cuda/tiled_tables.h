// Sums of the tables' gradients: over the pairs of a strip in one block, then over the blocks. No
// atomics, and a fixed order.
#pragma once
#include "tiled_window.h"

namespace tiled {

// This block's sum of each table entry over the pairs of its strip, in a fixed order. sums: as in
// QueryShared, complete.
WA_DEVICE void fold_pairs(const Args& p, const float4* sums, int first, float* to) {
    const int height = p.a.window[0], width = p.a.window[1], across = 2 * width - 1;
    const int last = first + p.strip * 16 < p.area ? first + p.strip * 16 : p.area;
    const float* entries = reinterpret_cast<const float*>(sums);
    for (int t = threadIdx.x; t < p.offsets; t += blockDim.x) {
        const int dy = t / across - (height - 1), dx = t % across - (width - 1);
        const int y_first = first / width > dy ? first / width : dy, x_first = dx > 0 ? dx : 0;
        float sum = 0.f;
        for (int y = y_first; y < height && y - dy < height && y * width < last; ++y)
            for (int x = x_first; x < width && x - dx < width; ++x) {
                const int i = y * width + x - first, j = (y - dy) * width + x - dx;
                if (i < 0 || i + first >= last) continue;
                const int tile = (i >> 4) * p.tiles + (j >> 4);
                const int lane = (i & 7) * 4 + ((j & 7) >> 1);
                const int e = ((i >> 3) & 1) * 2 + (j & 1);
                sum += entries[((tile * 2 + ((j >> 3) & 1)) * 32 + lane) * 4 + e];
            }
        to[t] = sum;
    }
}

// grad (rows, heads) = sum over blocks of partial (blocks, heads, rows), in their order.
static __global__ void __launch_bounds__(256)
    sum_blocks_kernel(const float* partial, float* grad, int64_t blocks, int heads, int rows) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const int64_t each = static_cast<int64_t>(heads) * rows;
    if (i >= each) return;
    float sum = 0.f;
#pragma unroll 16
    for (int64_t block = 0; block < blocks; ++block) sum += partial[block * each + i];
    grad[i % rows * heads + i / rows] = sum;
}

}  // namespace tiled
