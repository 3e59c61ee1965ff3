// What the two backward kernels do with a 16 x 16 tile of pairs: the map P again from the saved log
// sum exp, the gradients of S and of the tables.
#pragma once
#include "tiled_window.h"

namespace tiled {

// One tile, in a fragment's layout.
struct Pairs {
    Fragment<16> map;       // P, before post and dropout; 0 for padding
    Fragment<16> kept;      // post * dropout: what P is multiplied by before v
    Fragment<16> product;   // q . k
    Fragment<16> scale;    // in Unit
    Fragment<16> grad;      // of the entry of the map that v sees: dO . v
};

// Entry [n][e] of the tile: `entry` is the pair's of the tables, lse the query's in Unit (infinite
// where the query is padding), mask the mask's value in Unit.
template <typename T, int Mode>
WA_DEVICE void form_map(Pairs& x, int n, int e, const unsigned char* entry, float uniform,
                        bool masked, float mask, bool outside, float lse) {
    float s = logit<Mode>(entry, uniform, x.product[n][e], x.scale[n][e]);
    s = masked ? s + mask : s;
    s = outside ? -INFINITY : s;
    x.map[n][e] = Unit<T>::exponential(s - lse);
}

// post * dropout of an entry; 1 where the kernel has neither.
template <int Mode>
WA_DEVICE float kept_factor(const Shared<Mode>& shared, const Args& p, uint64_t seed,
                            const unsigned char* entry, int64_t query_row, int key) {
    if constexpr (Mode != kFull) return 1.f;
    const float post = post_of<Mode>(shared, entry);
    return p.drop_below == 0                                                 ? post
           : wa_keep(seed, (uint64_t)query_row, (uint32_t)key, p.drop_below) ? post * p.keep_factor
                                                                             : 0.f;
}

// Where the scale is one number, dq and dk are multiplied by it at their end. Not in float16, whose
// small numbers that could cost.
template <typename T, int Mode> constexpr bool scale_late = Mode == kUniform &&
                                                            std::is_same_v<T, bf16>;

// Alternating use of two blocks of rows, or all rows resident: where rows [first, first + block)
// lie.
WA_DEVICE int place_of_block(const Args& p, int first, int turn) {
    return p.resident ? first : turn % 2 * p.block;
}

}  // namespace tiled
