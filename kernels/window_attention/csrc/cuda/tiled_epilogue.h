// The epilogue of args.h and its gradients in the tiled kernels. What belongs to the lane's two
// rows of a 16-row tile is held in the layout of mma.
#pragma once
#include "epilogue.h"
#include "tiled_window.h"

namespace tiled {

// Elements c and the next of a row in global memory
template <typename T> WA_DEVICE float2 two_of(const T* from) {
    return unpack2<T>(*reinterpret_cast<const uint32_t*>(from));
}
template <> WA_DEVICE float2 two_of<float>(const float* from) {
    return *reinterpret_cast<const float2*>(from);
}

// o times `by`, which is P v, goes through the epilogue, in place; `by` becomes 1. own: the rows'
// values; ratio: r of the exclusive one, else left as it is
template <typename T, int D>
WA_DEVICE void add_own_value(Fragment<D>& o, float (&by)[2], float (&ratio)[2], const Args& p,
                             const unsigned char* own, int head, int lane) {
    const int g = lane >> 2, c = (lane & 3) * 2;
    const float beta = p.a.beta ? p.a.beta[head] : 1.f;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float of_own = p.a.alpha ? p.a.alpha[head] : 0.f;
        if (p.a.exclusion) {
            float along = 0.f, length = 0.f;
#pragma unroll
            for (int n = 0; n < D / 8; ++n) {
                float x, y;
                Element<T, D>::read(own, g + 8 * r, n, c, x, y);
                along += x * o[n][2 * r] + y * o[n][2 * r + 1];
                length += x * x + y * y;
            }
            ratio[r] = sum_of_row(along) * by[r] / fmaxf(sum_of_row(length), LENGTH_FLOOR);
            of_own = -p.a.exclusion[head] * ratio[r];
        }
        by[r] *= beta;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
            float x, y;
            Element<T, D>::read(own, g + 8 * r, n, c, x, y);
            o[n][2 * r] = o[n][2 * r] * by[r] + of_own * x;
            o[n][2 * r + 1] = o[n][2 * r + 1] * by[r] + of_own * y;
        }
        by[r] = 1.f;
    }
}

// The gradient of P v from that of the exclusive epilogue's result, dz: dz - a (dz v) / |v|^2 v, in
// `count` rows, in place. Thread t handles the chunks that load_rows gave it. token: of the rows;
// v: of this head, `stride` elements from token to token. All threads of a warp take part; count
// is a multiple of 16.
template <typename T, int D>
WA_DEVICE void exclude_rows(unsigned char* rows, const int* token, int count, const T* v,
                            int stride, float exclusion, int thread, int threads) {
    using R = Row<T, D>;
    forget(thread);
    const int chunk = thread % R::chunks;
    for (int row = thread / R::chunks; row < count; row += threads / R::chunks) {
        unsigned char* place = rows + R::at(row, chunk);
        const int64_t from = token[row] < 0 ? 0 : token[row];  // dz is 0 where there is no token
        float dz[Chunk<T>::size], own[Chunk<T>::size], along = 0.f, length = 0.f;
        Chunk<T>::read(place, dz);
        Chunk<T>::read(reinterpret_cast<const unsigned char*>(v + from * stride +
                                                              chunk * R::per_chunk),
                       own);
#pragma unroll
        for (int k = 0; k < Chunk<T>::size; ++k) {
            along += own[k] * dz[k];
            length += own[k] * own[k];
        }
#pragma unroll
        for (int step = 1; step < R::chunks; step <<= 1) {
            along += __shfl_xor_sync(0xffffffffu, along, step);
            length += __shfl_xor_sync(0xffffffffu, length, step);
        }
        const float by = exclusion * along / fmaxf(length, LENGTH_FLOOR);
#pragma unroll
        for (int k = 0; k < Chunk<T>::size; ++k) dz[k] -= by * own[k];
        Chunk<T>::write(place, dz);
    }
}

// f, the sum over the rows' queries of P dy, becomes the whole gradient of v; returns this lane's
// part of the sum over the rows of dz v (affine) or -r (dz v) (exclusive). own: the rows' values;
// token: of the rows, negative where there is none; first_row: the tile's, of r
template <typename T, int D>
WA_DEVICE float add_own_gradient(Fragment<D>& f, const Args& p, const unsigned char* own,
                                 const int* token, int64_t first_row, int head, int lane) {
    const int g = lane >> 2, c = (lane & 3) * 2;
    const int width = p.a.heads * D, from = head * D + c;
    float sum = 0.f;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const bool inside = token[g + 8 * r] >= 0;
        const int64_t element = static_cast<int64_t>(inside ? token[g + 8 * r] : 0) * width + from;
        const T* dz = static_cast<const T*>(p.a.grad_out) + element;
        const T* out = static_cast<const T*>(p.a.out) + element;
        float along = 0.f, length = 0.f;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
            float x, y;
            Element<T, D>::read(own, g + 8 * r, n, c, x, y);
            const float2 z = two_of<T>(dz + n * 8);
            along += x * z.x + y * z.y;
            length += x * x + y * y;
        }
        if (p.a.exclusion) {
            const float ratio = inside ? p.a.along[first_row + g + 8 * r] : 0.f;
            sum -= ratio * along;
            const OwnFactors by(p.a.exclusion[head], ratio, sum_of_row(along), sum_of_row(length));
#pragma unroll
            for (int n = 0; n < D / 8; ++n) {
                float x, y;
                Element<T, D>::read(own, g + 8 * r, n, c, x, y);
                const float2 z = two_of<T>(dz + n * 8), o = two_of<T>(out + n * 8);
                f[n][2 * r] += by.gradient * z.x + by.result * o.x + by.own * x;
                f[n][2 * r + 1] += by.gradient * z.y + by.result * o.y + by.own * y;
            }
        } else {
            sum += along;  // 0 where there is no token: its value is
            const float alpha = p.a.alpha[head], beta = p.a.beta[head];
#pragma unroll
            for (int n = 0; n < D / 8; ++n) {
                const float2 z = two_of<T>(dz + n * 8);
                f[n][2 * r] = beta * f[n][2 * r] + alpha * z.x;
                f[n][2 * r + 1] = beta * f[n][2 * r + 1] + alpha * z.y;
            }
        }
    }
    return sum;
}

}  // namespace tiled
