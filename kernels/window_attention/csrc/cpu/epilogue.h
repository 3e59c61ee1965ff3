// The epilogues of args.h on rows of one head: forward, and from the gradient dZ of their result,
// with c = rowsum(dZ v), m = max(|v|^2, 1e-8) and r = along,
//
//   affine      dO = beta dZ
//               dv += alpha dZ
//               d alpha = sum c
//               d beta = sum P factors (dZ vᵀ)
//   exclusive   dO = dZ - exclusion c/m v
//               dv += -exclusion (r dZ + c/m (O - 2 r v)), without the last term where |v|^2 < 1e-8
//               d exclusion = -sum r c
//
// where O = out + exclusion r v. beta stands outside of all products (backward.h), because it may
// be 0. Values and gradients are packed rows (Head::packed).
#pragma once
#include "windows.h"

namespace wa {
namespace WA_ISA {

constexpr float LEAST_SQUARE = 1e-8f;  // of |v|^2

// row = alpha value + beta row
template <class Unit>
static inline void mix(const Head<Unit>& head, float alpha, const float* value, float beta,
                       float* row) {
    for (int d = 0; d < head.width; d += W)
        store(row + d, all(alpha) * head.channels(value, d) + all(beta) * load(row + d));
}

// row = factor * row without `exclusion` of what lies along the value. Returns r.
template <class Unit>
static inline float exclude(const Head<Unit>& head, float exclusion, const float* value,
                            float factor, float* row) {
    vf products = {}, squares = {};
    for (int d = 0; d < head.width; d += W) {
        const vf own = head.channels(value, d), y = load(row + d) * all(factor);
        store(row + d, y);
        products += y * own, squares += own * own;
    }
    const float square = sum(squares);
    const float ratio = sum(products) / (square > LEAST_SQUARE ? square : LEAST_SQUARE);
    const vf taken = all(exclusion * ratio);
    for (int d = 0; d < head.width; d += W)
        store(row + d, load(row + d) - taken * head.channels(value, d));
    return ratio;
}

// sum c over the rows of a window
template <class Unit>
static inline float multiply_rows(const Head<Unit>& head, const float* grads, const float* values) {
    vf total = {};
    for (int64_t at = 0; at < int64_t(head.job->area) * head.packed; at += head.packed)
        for (int d = 0; d < head.width; d += W)
            total += head.channels(grads + at, d) * head.channels(values + at, d);
    return sum(total);
}

// Of one token: turns `grad` from dZ into dO, and writes what v gets besides to `own`; result: its
// row of out. Returns its part of d exclusion.
template <class Unit>
static inline float exclude_backward(const Head<Unit>& head, float exclusion, float ratio,
                                     const float* value, const float* result, float* grad,
                                     float* own) {
    vf products = {}, squares = {};
    for (int d = 0; d < head.width; d += W) {
        const vf v = head.channels(value, d);
        products += v * head.channels(grad, d), squares += v * v;
    }
    const float square = sum(squares), product = sum(products);
    const bool large = square > LEAST_SQUARE;
    const vf share = all(exclusion * (product / (large ? square : LEAST_SQUARE)));
    const vf taken = all(exclusion * ratio);
    const vf back = all(exclusion * ratio - (large ? 2 * ratio : 0));
    for (int d = 0; d < head.width; d += W) {
        const vf v = head.channels(value, d), z = head.channels(grad, d);
        store(own + d, -taken * z - share * (load(result + d) + back * v));
        head.store_channels(grad, d, z - share * v);
    }
    return -ratio * product;
}

}  // namespace WA_ISA
}  // namespace wa
