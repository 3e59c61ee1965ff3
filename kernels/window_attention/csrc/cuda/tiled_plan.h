// How the work is spread: warps of a block, rows in shared memory, blocks of the grid. Chosen from
// the shape and the device alone, so that the same call always sums in the same order.
#pragma once
#include <algorithm>
#include <array>
#include <map>

#include "tiled_forward.h"
#include "tiled_keys.h"
#include "tiled_queries.h"

namespace tiled {

struct Plan {
    Args p;
    dim3 grid, block;
    int bytes;
};

inline Divisor divisor(int by) {
    int shift = 0;
    while ((int64_t{1} << shift) < by) ++shift;
    return {static_cast<uint32_t>((((uint64_t{1} << shift) - by) << 32) / by + 1), shift};
}

inline Args describe(const WindowAttentionArgs& a) {
    Args p{};
    p.a = a;
    for (int axis = 0; axis < 2; ++axis) {
        const int length = axis ? a.width : a.height;
        p.padded[axis] = (length + a.window[axis] - 1) / a.window[axis] * a.window[axis];
    }
    p.across = p.padded[1] / a.window[1];
    p.windows = p.across * (p.padded[0] / a.window[0]);
    p.by_windows = divisor(p.windows);
    p.by_across = divisor(p.across);
    p.total = p.windows * a.batch;
    p.area = a.window[0] * a.window[1];
    p.tiles = (p.area + 15) / 16;
    p.rows = p.tiles * 16;
    p.offsets = (2 * a.window[0] - 1) * (2 * a.window[1] - 1);
    p.drop_below = static_cast<uint32_t>(static_cast<double>(a.dropout) * 4294967296.0);
    p.keep_factor = static_cast<float>(1.0 / (1.0 - static_cast<double>(a.dropout)));
    return p;
}

// Make(a), or what it returned for a call of the same shape on such a device: planning takes longer
// than a launch. For each thread.
template <auto Make> auto remembered(const WindowAttentionArgs& a) -> decltype(Make(a)) {
    using Shape = std::array<int, 20>;
    thread_local std::map<Shape, decltype(Make(a))> known;
    const Shape shape{a.batch,
                      a.height,
                      a.width,
                      a.heads,
                      a.head_dim,
                      a.window[0],
                      a.window[1],
                      a.shift[0],
                      a.shift[1],
                      a.scale_rows,
                      a.cosine,
                      a.dtype,
                      a.post != nullptr,
                      a.dropout > 0.f,
                      a.grad_bias != nullptr,
                      a.grad_scale != nullptr,
                      a.grad_post != nullptr,
                      has_epilogue(a),
                      multiprocessors(),
                      shared_bytes_max()};
    const auto found = known.find(shape);
    if (found != known.end()) return found->second;
    if (known.size() >= 1024) known.clear();  // grids of ever new sizes
    return known[shape] = Make(a);
}

// A remembered plan for the tensors of this call.
inline Plan for_call(Plan plan, const WindowAttentionArgs& a) {
    const Args now = describe(a);
    plan.p.a = a;
    plan.p.drop_below = now.drop_below;
    plan.p.keep_factor = now.keep_factor;
    return plan;
}

inline int mode_of(const WindowAttentionArgs& a) {
    return a.post || a.dropout > 0.f ? kFull : a.scale_rows == 1 ? kUniform : kTable;
}

// Blocks of `bytes` of shared memory and `threads` threads that one multiprocessor holds, by an
// estimate of `registers` each.
inline int blocks_per_multiprocessor(int bytes, int threads, int registers) {
    return std::max(
        1, std::min((shared_bytes_max() + 1024) / (bytes + 1024), 65536 / (threads * registers)));
}

// Blocks of up to `most` rows, a multiple of `unit`, as even as they can be.
inline int even_block(int rows, int most, int unit) {
    const int count = (rows + most - 1) / most;
    return std::min(most, ((rows + count - 1) / count + unit - 1) / unit * unit);
}

// The best of the choices that fit: as many warps at work as 16 a multiprocessor, few of them idle,
// keys resident.
struct Best {
    double score = 0.0;
    Args p{};
    int warps = 0, bytes = 0, per_multiprocessor = 0;
    void consider(const Args& candidate, int warps_now, int bytes_now, int registers, double busy) {
        if (bytes_now > shared_bytes_max()) return;
        const int blocks = blocks_per_multiprocessor(bytes_now, warps_now * 32, registers);
        const double now = std::min(16, blocks * warps_now) * busy *
                           (candidate.resident ? 1.25 : 1.0) * (1.0 + 0.002 * candidate.block);
        if (now <= score) return;
        take(candidate, warps_now, bytes_now, blocks, now);
    }
    void consider_work(const Args& candidate, int warps_now, int bytes_now, int blocks,
                       double work) {
        if (1.0 / work > score) take(candidate, warps_now, bytes_now, blocks, 1.0 / work);
    }
    void take(const Args& candidate, int warps_now, int bytes_now, int blocks, double now) {
        score = now;
        p = candidate;
        warps = warps_now;
        bytes = bytes_now;
        per_multiprocessor = blocks;
    }
};

// Spreads the windows over the grid's y, `apart` blocks (grid z) working on each. The
// number of shares is that at which the blocks' turns on the multiprocessors take the least time,
// where what a block does once takes that of `once` windows.
inline Plan spread(const Best& best, int apart, double once) {
    const int64_t heads = best.p.a.heads;
    const int64_t total = best.p.total;
    const int64_t places = static_cast<int64_t>(multiprocessors()) * best.per_multiprocessor;
    int64_t chosen = 1;
    double least = 0.0;
    for (int64_t shares = 1;
         shares <= std::min<int64_t>({total, 65535, 16 * places / (heads * apart) + 1}); ++shares) {
        const int64_t each = (total + shares - 1) / shares;
        const int64_t blocks = heads * apart * ((total + each - 1) / each);
        const double time = static_cast<double>((blocks + places - 1) / places) *
                            (static_cast<double>(each) + once);
        if (shares > 1 && time >= least) continue;
        least = time;
        chosen = shares;
    }
    const int64_t each = (total + chosen - 1) / chosen;
    return {best.p, dim3(best.p.a.heads, static_cast<unsigned>((total + each - 1) / each), apart),
            dim3(best.warps * 32), best.bytes};
}

template <typename Carved> int bytes_of(const Args& p) {
    Carve carve{nullptr};
    Carved counted(carve, p);
    (void)counted;
    return carve.used;
}
template <typename Carved> int bytes_of(const Args& p, int warps) {
    Carve carve{nullptr};
    Carved counted(carve, p, warps);
    (void)counted;
    return carve.used;
}

// Forward, and keys: every warp works on a tile of its own at a time. Bytes 0 where nothing fits.
template <typename Carved> Plan plan_passes(Args p, int most_warps, int registers) {
    Best best;
    for (int most : {kForwardBlock, kForwardBlock / 2, 16})
        for (p.resident = 1; p.resident >= 0; --p.resident)
            for (int warps = std::min(most_warps, p.tiles); warps >= 1; --warps) {
                p.block = even_block(p.rows, most, 16);
                p.passes = (p.tiles + warps - 1) / warps;
                best.consider(p, warps, bytes_of<Carved>(p, warps), registers,
                              static_cast<double>(p.tiles) / (p.passes * warps));
            }
    if (!best.bytes) return Plan{p, dim3(), dim3(), 0};
    // few windows: several blocks share one
    const int64_t alone = int64_t{best.p.total} * best.p.a.heads;
    const int64_t wanted = static_cast<int64_t>(multiprocessors()) * best.per_multiprocessor;
    const int apart = static_cast<int>(
        std::min<int64_t>(best.p.passes, std::max<int64_t>(1, wanted / alone)));
    return spread(best, apart, 0.25);
}

// Queries: `strip` tiles of a window, `groups` warps on each. The one of least work, in
// instructions of a thread for all strips of a window: pairs, and bringing keys and queries, over
// the warps that a multiprocessor has at work; a block waits at its barriers.
template <typename T, typename Carved> Plan plan_queries(Args p, int registers, int most_threads) {
    Best best;
    const int tables = (p.grads & kGradBias ? 1 : 0) + (p.grads & kGradScale ? 1 : 0) +
                       (p.grads & kGradPost ? 1 : 0);
    const double of_pair = sizeof(T) == 4 ? 150.0 : 26.0 + 5.0 * tables;
    const double of_row = p.a.head_dim * sizeof(T) / 16.0 * (45.0 + (p.a.cosine ? 50.0 : 0.0));
    for (int most : {0, 64, 32, 16})  // rows of keys brought at a time; 0: all, and they stay
        for (p.strip = std::min(4, p.tiles); p.strip >= 1; --p.strip)
            for (p.groups = 1; p.groups * p.strip * 32 <= most_threads && p.groups <= p.tiles;
                 ++p.groups) {
                p.resident = most == 0;
                p.block = p.resident
                              ? p.rows
                              : even_block(p.rows, std::max(most, 16 * p.groups), 16 * p.groups);
                const int warps = p.strip * p.groups, bytes = bytes_of<Carved>(p);
                if (bytes > shared_bytes_max()) continue;
                const int blocks = blocks_per_multiprocessor(bytes, warps * 32, registers);
                const int strips = (p.tiles + p.strip - 1) / p.strip;
                const int steps = (p.tiles + p.groups - 1) / p.groups;
                const int turns = p.resident ? 1 : 2 * ((p.rows + p.block - 1) / p.block);
                const double pairs = 16.0 * 16.0 * warps * steps * of_pair;  // of idle warps too
                const double rows = of_row * (p.rows * (p.resident ? 1 : 2) + p.strip * 16);
                const double waits = (blocks > 1 ? 2000.0 : 6000.0) * turns;
                best.consider_work(
                    p, warps, bytes, blocks,
                    strips * ((pairs + rows) / std::min(16, blocks * warps) / 32 + waits / blocks));
            }
    if (!best.bytes) return Plan{p, dim3(), dim3(), 0};
    return spread(best, (best.p.tiles + best.p.strip - 1) / best.p.strip, 1.0);
}

}  // namespace tiled
