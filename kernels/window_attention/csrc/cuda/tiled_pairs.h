// What the two backward kernels do with a 16 x 16 tile of pairs: the map P again from the saved log sum exp, the gradients of S and of the
// tables.
#pragma once
#include "tiled_window.h"

namespace tiled {

// One tile, in a fragment's layout.
struct Pairs {
    Fragment<16> map;       // P, before post and dropout; 0 for padding
    Fragment<16> kept;      // post * dropout: what P is multiplied by before v
    Fragment<16> product;   // q . k
    Fragment<16> weight;    // in Unit
    Fragment<16> grad;      // of the entry of the map that v sees: dO . v
};

// Entry [n][e] of the tile: `offset` is the pair's row of the tables, lse the query's in Unit (infinite where the query is padding).
template <typename T, int Mode>
WA_DEVICE void form_map(Pairs& x, int n, int e, const Shared<Mode>& shared, const Args& p, float uniform, int offset, bool masked,
                        bool outside, float lse) {
    float s = logit<Mode>(shared, uniform, x.product[n][e], offset, x.weight[n][e]);
    s = masked ? s + p.a.mask_value * Unit<T>::of_natural : s;
    s = outside ? -INFINITY : s;
    x.map[n][e] = Unit<T>::exponential(s - lse);
}

// post * dropout of an entry; 1 where the kernel has neither.
template <int Mode>
WA_DEVICE float kept_factor(const Shared<Mode>& shared, const Args& p, uint64_t seed, int offset, int64_t query_row, int key) {
    if (Mode != kFull) return 1.f;
    const float post = shared.post[offset];
    return p.drop_below == 0 ? post : wa_keep(seed, (uint64_t)query_row, (uint32_t)key, p.drop_below) ? post * p.keep_factor : 0.f;
}

// Alternating use of two blocks of rows, or all rows resident: where rows [first, first + block) lie.
WA_DEVICE int place_of_block(const Args& p, int first, int turn) { return p.resident ? first : turn % 2 * p.block; }

}  // namespace tiled
