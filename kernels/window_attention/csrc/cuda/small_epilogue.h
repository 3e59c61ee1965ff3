// The epilogue of args.h and its gradients for windows of up to 64 tokens. A token's own value is
// its row of the tile of v; what belongs to `row` and `row + 8` is held in the layout of mma.
#pragma once
#include "epilogue.h"
#include "small_layout.h"

// Elements `column` and the next of each chunk of row `row + 8 h` of a tile, or of a token in
// global memory; first: at<D>(row, 0) + column * 2
template <int D> WA_DEVICE uint32_t pair_of_tile(const unsigned char* tile, int first, int h,
                                                 int n) {
    return *reinterpret_cast<const uint32_t*>(tile + (first ^ n << 4) + h * (8 * D * 2));
}
template <int D> WA_DEVICE uint32_t pair_of_token(const SmallProblem& p, const void* tensor,
                                                  int token, int head, int n, int column) {
    if (token < 0) return 0u;
    const int64_t element = ((int64_t)token * p.a.heads + head) * D + n * 8 + column;
    return *reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(tensor) + element);
}

// out times `by`, which is P v, goes through the epilogue, in place; `by` becomes 1. ratio: r of
// the exclusive one, else left as it is
template <typename T, int D>
WA_DEVICE void add_own_value(float (&out)[D / 8][4], float (&by)[2], float (&ratio)[2],
                             const SmallProblem& p, const unsigned char* v, int row, int column,
                             int head) {
    const int first = at<D>(row, 0) + column * 2;
    const float beta = p.a.beta ? p.a.beta[head] : 1.f;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        float of_own = p.a.alpha ? p.a.alpha[head] : 0.f;
        if (p.a.exclusion) {
            float along = 0.f, length = 0.f;
#pragma unroll
            for (int n = 0; n < D / 8; ++n) {
                const float2 x = unpack2<T>(pair_of_tile<D>(v, first, h, n));
                along += x.x * out[n][2 * h] + x.y * out[n][2 * h + 1];
                length += x.x * x.x + x.y * x.y;
            }
            ratio[h] = across_quad_sum(along) * by[h] /
                       fmaxf(across_quad_sum(length), LENGTH_FLOOR);
            of_own = -p.a.exclusion[head] * ratio[h];
        }
        by[h] *= beta;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
            const float2 x = unpack2<T>(pair_of_tile<D>(v, first, h, n));
            out[n][2 * h] = out[n][2 * h] * by[h] + of_own * x.x;
            out[n][2 * h + 1] = out[n][2 * h + 1] * by[h] + of_own * x.y;
        }
        by[h] = 1.f;
    }
}

// The gradient of P v from that of the exclusive epilogue's result, dz: dz - a (dz v) / |v|^2 v, in
// place. On the chunks that this thread has copied itself.
template <typename T, int D>
WA_DEVICE void exclude_rows(unsigned char* gradient, const unsigned char* v,
                            const CopyRows<D>& rows, float exclusion) {
#pragma unroll
    for (int i = 0; i < CopyRows<D>::SLOTS; ++i) {
        const int place = at<D>(rows.row(i), rows.chunk);
        const uint4 x = *reinterpret_cast<const uint4*>(v + place);
        const uint4 g = *reinterpret_cast<const uint4*>(gradient + place);
        const float2 own[4] = {unpack2<T>(x.x), unpack2<T>(x.y), unpack2<T>(x.z), unpack2<T>(x.w)};
        const float2 dz[4] = {unpack2<T>(g.x), unpack2<T>(g.y), unpack2<T>(g.z), unpack2<T>(g.w)};
        float along = 0.f, length = 0.f;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            along += own[j].x * dz[j].x + own[j].y * dz[j].y;
            length += own[j].x * own[j].x + own[j].y * own[j].y;
        }
#pragma unroll
        for (int step = 1; step < CopyRows<D>::CHUNKS; step <<= 1) {
            along += __shfl_xor_sync(ALL, along, step);
            length += __shfl_xor_sync(ALL, length, step);
        }
        const float by = exclusion * along / fmaxf(length, LENGTH_FLOOR);
        uint32_t dy[4];
#pragma unroll
        for (int j = 0; j < 4; ++j)
            dy[j] = pack2<T>(dz[j].x - by * own[j].x, dz[j].y - by * own[j].y);
        *reinterpret_cast<uint4*>(gradient + place) = make_uint4(dy[0], dy[1], dy[2], dy[3]);
    }
}

// g, the sum over the rows' queries of P dy, becomes the whole gradient of v; returns this thread's
// part of the sum over the rows of dz v (affine) or -r (dz v) (exclusive). token: of the rows,
// negative where there is none; first_row: the window's, of r
template <typename T, int D>
WA_DEVICE float add_own_gradient(float (&g)[D / 8][4], const SmallProblem& p,
                                 const unsigned char* v, const int (&token)[2],
                                 int64_t first_row, int row, int column, int head) {
    const int first = at<D>(row, 0) + column * 2;
    float sum = 0.f;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        float2 dz[D / 8];
        float along = 0.f, length = 0.f;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
            const float2 x = unpack2<T>(pair_of_tile<D>(v, first, h, n));
            dz[n] = unpack2<T>(pair_of_token<D>(p, p.a.grad_out, token[h], head, n, column));
            along += x.x * dz[n].x + x.y * dz[n].y;
            length += x.x * x.x + x.y * x.y;
        }
        if (p.a.exclusion) {
            const float ratio = token[h] < 0 ? 0.f : p.a.along[first_row + row + 8 * h];
            sum -= ratio * along;
            const OwnFactors by(p.a.exclusion[head], ratio, across_quad_sum(along),
                                across_quad_sum(length));
#pragma unroll
            for (int n = 0; n < D / 8; ++n) {
                const float2 x = unpack2<T>(pair_of_tile<D>(v, first, h, n));
                const float2 z = unpack2<T>(
                    pair_of_token<D>(p, p.a.out, token[h], head, n, column));
                g[n][2 * h] += by.gradient * dz[n].x + by.result * z.x + by.own * x.x;
                g[n][2 * h + 1] += by.gradient * dz[n].y + by.result * z.y + by.own * x.y;
            }
        } else {
            sum += along;
            const float alpha = p.a.alpha[head], beta = p.a.beta[head];
#pragma unroll
            for (int n = 0; n < D / 8; ++n) {
                g[n][2 * h] = beta * g[n][2 * h] + alpha * dz[n].x;
                g[n][2 * h + 1] = beta * g[n][2 * h + 1] + alpha * dz[n].y;
            }
        }
    }
    return sum;
}
