// What both families of kernels share of the epilogue of args.h: the gradient that a token's own
// value has from it beside attention's, and the sums of the gradients of its factors. With
//
//   c_i = dz_i v_i     (dz: the gradient of the result)     m_i = max(|v_i|^2, 1e-8)
//   delta'_i = sum_j P_ij keep post (dz_i v_j)
//
// it is
//
//   affine      dy = beta dz    dv_i += alpha dz_i    d alpha = sum c_i    d beta = sum delta'_i
//   exclusive   dy = dz - a (c / m) v    d a = -sum r_i c_i
//               dv_i += -a r_i dz_i - a (c_i / m_i) (y_i - 2 r_i v_i), y_i = out_i + a r_i v_i;
//               where |v_i|^2 <= 1e-8 the floor is a constant, and 2 r_i v_i falls away
//
// dS is beta P (dP' - delta') in the affine one, so no gradient is divided by beta, which may be 0.
#pragma once
#include "../args.h"
#include "port.h"

constexpr float LENGTH_FLOOR = 1e-8f;  // of |v|^2

// Whether a kernel has more to do than attention alone: the epilogue, or the gradient of the
// log-sum-exp. The kernels compiled for that serve arguments without either too.
inline bool has_epilogue(const WindowAttentionArgs& a) {
    return a.alpha || a.exclusion || a.grad_lse;
}

// What dz_i, out_i and v_i are multiplied by in the exclusive epilogue's own gradient of v_i
struct OwnFactors {
    float gradient, result, own;
    WA_DEVICE OwnFactors(float exclusion, float ratio, float along, float length) {
        gradient = -exclusion * ratio;
        result = -exclusion * along / fmaxf(length, LENGTH_FLOOR);
        own = result * ratio * (exclusion - (length > LENGTH_FLOOR ? 2.f : 0.f));
    }
};

// Sum over a warp of a number of each lane, in a fixed order; every lane gets it
WA_DEVICE float sum_of_warp(float x) {
#pragma unroll
    for (int step = 1; step < 32; step <<= 1) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}

// The gradients of the factors leave the kernels as sums over 16 rows each: (windows of the batch,
// heads, ceil(N / 16)) floats for the own value's factor, then, affine, as many for beta's.
struct OwnSums {
    float *own, *beta;     // in the workspace, or null
    int tiles;
    WA_DEVICE int64_t place(int window, int heads, int head, int tile) const {
        return ((int64_t)window * heads + head) * tiles + tile;
    }
};
inline int64_t own_sums_count(const WindowAttentionArgs& a, int64_t windows) {
    const int tiles = (a.window[0] * a.window[1] + 15) / 16;
    return (a.grad_alpha || a.grad_exclusion ? windows * a.heads * tiles : 0) +
           (a.grad_beta ? windows * a.heads * tiles : 0);
}
inline OwnSums own_sums(const WindowAttentionArgs& a, int64_t windows, float* from) {
    OwnSums sums{nullptr, nullptr, (a.window[0] * a.window[1] + 15) / 16};
    if (a.grad_alpha || a.grad_exclusion) {
        sums.own = from;
        from += windows * a.heads * sums.tiles;
    }
    if (a.grad_beta) sums.beta = from;
    return sums;
}
