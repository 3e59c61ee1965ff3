// A group of heads of a run of windows: where the tokens are, and the tables spread over pairs.
#pragma once
#include "job.h"
#include "rows.h"
#ifdef WA_TILES
#include "tiles.h"
#endif

namespace wa {
namespace WA_ISA {

constexpr float NEVER = -1e30f;  // added to a logit, takes its key out of the softmax

// Hands out parts of a piece of memory, or with base null only counts.
struct Carver {
    char* base;
    int64_t used;
    template <class T>
    T* take(int64_t count) {
        T* const found = base ? (T*)(base + used) : nullptr;
        used += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
        return found;
    }
};

// The tokens of one window. token: (N,) index among all tokens of all images, or -1 for padding.
struct Window {
    int64_t* token;
    int32_t* region;  // (padded N,) differs between tokens that the roll brought together
    float* padding;   // (padded N,) 0 for keys, NEVER where there is none
    bool special;     // has a pair of two regions, or padding
};

static void find_tokens(const Job* job, int64_t index, int columns, Window* w) {
    const WindowAttentionArgs& a = *job->args;
    const int per_image = job->down * job->across;
    const int within = int(index % per_image);
    const int wy = within / job->across;
    const int wx = within % job->across;
    const int64_t image = index / per_image;
    const int height = job->down * a.window[0], width = job->across * a.window[1];
    const bool last_y = a.shift[0] && wy == job->down - 1;
    const bool last_x = a.shift[1] && wx == job->across - 1;
    w->special = last_y || last_x;
    int i = 0;
    for (int yi = 0; yi < a.window[0]; ++yi) {
        int y = wy * a.window[0] + yi + a.shift[0];
        y -= y >= height ? height : 0;
        const int below = last_y && yi >= a.window[0] - a.shift[0];
        for (int xi = 0; xi < a.window[1]; ++xi, ++i) {
            int x = wx * a.window[1] + xi + a.shift[1];
            x -= x >= width ? width : 0;
            const bool inside = y < a.height && x < a.width;
            w->token[i] = inside ? (image * a.height + y) * a.width + x : -1;
            w->region[i] = 2 * below + (last_x && xi >= a.window[1] - a.shift[1]);
            w->padding[i] = inside ? 0 : NEVER;
            w->special |= !inside;
        }
    }
    for (; i < columns; ++i) w->region[i] = 0, w->padding[i] = NEVER;
}

// A table of one head over pairs: entry (i, j) at at[i * row + j].
struct Dense {
    float* at;
    int64_t row;
};

// Start of the run of table entries for query i and the keys of window row yj, in a table turned
// around, so that it ascends with the key.
static inline int run_start(const WindowAttentionArgs& a, int i, int yj) {
    const int yi = i / a.window[1], xi = i % a.window[1];
    return (yj - yi + a.window[0] - 1) * (2 * a.window[1] - 1) + a.window[1] - 1 - xi;
}

// at[i][j] = factor * table[offset(i, j)][head], `behind` in the columns after N. line: (T,)
// scratch.
static void spread(const Job* job, const float* table, int head, float factor, float behind,
                   int columns, float* line, float* at) {
    const WindowAttentionArgs& a = *job->args;
    for (int t = 0; t < job->offsets; ++t)
        line[job->offsets - 1 - t] = table[int64_t(t) * a.heads + head] * factor;
    for (int i = 0; i < job->area; ++i) {
        float* to = at + int64_t(i) * columns;
        for (int yj = 0; yj < a.window[0]; ++yj, to += a.window[1]) {
            const float* from = line + run_start(a, i, yj);
            for (int x = 0; x < a.window[1]; ++x) to[x] = from[x];
        }
        for (int j = job->area; j < columns; ++j, ++to) *to = behind;
    }
}

// The transpose of `spread`: sums over the pairs of each offset. line: (T,) scratch.
static void collect(const Job* job, const float* at, int columns, double* line, float* sums) {
    const WindowAttentionArgs& a = *job->args;
    for (int t = 0; t < job->offsets; ++t) line[t] = 0;
    for (int i = 0; i < job->area; ++i) {
        const float* from = at + int64_t(i) * columns;
        for (int yj = 0; yj < a.window[0]; ++yj, from += a.window[1]) {
            double* to = line + run_start(a, i, yj);
            for (int x = 0; x < a.window[1]; ++x) to[x] += from[x];
        }
    }
    for (int t = 0; t < job->offsets; ++t) sums[t] = float(line[job->offsets - 1 - t]);
}

// What forward and backward share of one task. `head` is the one at hand.
template <class Unit>
struct Head {
    static constexpr bool PAIRS = Unit::SIZE == 2;
    const Job* job;
    const WindowAttentionArgs& a;
    int first_head, heads;  // of the group: the first one and their number
    int head, next_head;    // at hand, and of what is computed next
    int dim, width, depth, packed;  // channels, padded to vectors; units of a row, padded
    int columns, keys;              // keys, padded; units along the keys
    Window place, next;          // the window at hand, and the one after it
    const Window* ahead;         // where what is computed next lies, or null
    int64_t found;               // index of the window that `next` describes
    Dense scale, bias, post;     // of `head`
    float* tables;               // scale, bias and post of every head of the group
    int64_t scale_size, bias_size, post_size;
    float *masked, *factors, *inverse_q, *inverse_k;

    Head(const Job* j, int group, Carver* c) : job(j), a(*j->args), first_head(group * j->group) {
        heads = int(least(j->group, a.heads - first_head));
        dim = a.head_dim, width = up(dim, 16), depth = dim / Unit::SIZE, packed = up(depth, 16);
        columns = up(job->area, COLUMNS), keys = (job->area + Unit::SIZE - 1) / Unit::SIZE;
        for (Window* w = &place; w; w = w == &place ? &next : nullptr) {
            w->token = c->take<int64_t>(columns);
            w->region = c->take<int32_t>(columns);
            w->padding = c->take<float>(columns);
        }
        found = -1;
        masked = c->take<float>(columns), factors = c->take<float>(columns);
        inverse_q = c->take<float>(columns), inverse_k = c->take<float>(columns);
        const int64_t pairs = int64_t(job->area) * columns;
        scale.row = a.scale_rows == 1 ? 0 : columns;
        bias.row = a.bias ? columns : 0;
        post.row = columns;
        scale_size = a.scale_rows == 1 ? columns : pairs;
        bias_size = a.bias ? pairs : columns;
        post_size = a.post ? pairs : 0;
        tables = c->take<float>((scale_size + bias_size + post_size) * job->group);
        float* const line = c->take<float>(job->offsets);
        if (!c->base) return;
        for (int slot = 0; slot < heads; ++slot) {
            choose(slot);
            if (a.scale_rows == 1)
                for (int n = 0; n < columns; ++n) scale.at[n] = a.scale[head] * LOG2E;
            else spread(job, a.scale, head, LOG2E, 0, columns, line, scale.at);
            if (!a.bias) for (int n = 0; n < columns; ++n) bias.at[n] = n < job->area ? 0 : NEVER;
            else spread(job, a.bias, head, LOG2E, NEVER, columns, line, bias.at);
            if (a.post) spread(job, a.post, head, 1, 0, columns, line, post.at);
        }
    }

    // Takes up head `slot` of the group; behind it comes the next head of this window, or the first
    // of the next window.
    void choose(int slot) {
        head = first_head + slot;
        scale.at = tables + slot * (scale_size + bias_size + post_size);
        bias.at = scale.at + scale_size;
        post.at = bias.at + bias_size;
        const bool last = slot + 1 == heads;
        next_head = last ? first_head : head + 1;
        ahead = !last ? &place : found >= 0 ? &next : nullptr;
    }

    // Finds the tokens of window `index` and of the one behind it.
    void go_to(int64_t index) {
        if (found == index) {
            const Window before = place;
            place = next, next = before;
        } else find_tokens(job, index, columns, &place);
        found = index + 1 < job->windows ? index + 1 : -1;
        if (found >= 0) find_tokens(job, found, columns, &next);
    }

    // Asks the memory for what token i reads of the next head or window and for what it writes of
    // this one: the rows are too far apart for the processor to foresee them. (Inlined by force:
    // the compiler takes a function that only prefetches for one that does nothing.)
    template <class T>
    inline __attribute__((always_inline)) void prefetch(int i, bool backward) const {
        const int64_t bytes = int64_t(dim) * sizeof(T), part = bytes * a.heads;
        if (place.token[i] >= 0) {
            const char* to = (const char*)(backward ? a.grad_qkv : a.out) +
                             (place.token[i] * (backward ? 3 : 1) * a.heads + head) * bytes;
            for (int64_t d = 0; d < bytes; d += 64) {
                __builtin_prefetch(to + d, 1);
                if (backward) {
                    __builtin_prefetch(to + part + d, 1);
                    __builtin_prefetch(to + 2 * part + d, 1);
                }
            }
        }
        if (!ahead || ahead->token[i] < 0) return;
        const char* from = (const char*)a.qkv + (ahead->token[i] * 3 * a.heads + next_head) * bytes;
        const char* grad = (const char*)a.grad_out +
                           (ahead->token[i] * a.heads + next_head) * bytes;
        for (int64_t d = 0; d < bytes; d += 64) {
            __builtin_prefetch(from + d);
            __builtin_prefetch(from + part + d);
            __builtin_prefetch(from + 2 * part + d);
            if (backward) __builtin_prefetch(grad + d);
        }
        if (!backward || !a.exclusion) return;
        const char* result = (const char*)a.out + (ahead->token[i] * a.heads + next_head) * bytes;
        for (int64_t d = 0; d < bytes; d += 64) __builtin_prefetch(result + d);
    }

    // Rows (columns, packed) of part 0, 1 or 2 of qkv, or of grad_out; zeros for padding and behind
    // N.
    template <class T>
    void take(const T* from, int parts, int part, float* to) const {
        from += (int64_t(part) * a.heads + head) * dim;
        const int64_t row = int64_t(parts) * a.heads * dim;
        // rows of one vector, the usual case of bf16
        if (sizeof(T) * Unit::SIZE == 4 && depth == W && packed == W) {
            for (int i = 0; i < job->area; ++i) {
                const int64_t token = place.token[i];
                store(to + i * W, token >= 0 ? load((const float*)(from + token * row)) : vf{});
            }
        } else {
            for (int i = 0; i < job->area; ++i) {
                const int64_t token = place.token[i];
                load_row<Unit, T>(token >= 0 ? from + token * row : nullptr, to + i * packed, dim,
                                  packed);
            }
        }
        if (columns > job->area)
            memset(to + job->area * packed, 0, (columns - job->area) * packed * sizeof(float));
    }

    // Channels d .. d + W - 1 of a packed row.
    static inline vf channels(const float* row, int d) {
        if (!PAIRS) return load(row + d);
        return (vf)(__builtin_convertvector(*(const vh_any*)((const uint16_t*)row + d), vi) << 16);
    }

    static inline void store_channels(float* row, int d, vf x) {
        if (PAIRS) *(vh_any*)((uint16_t*)row + d) = to_bf16(x);
        else store(row + d, x);
    }

    // 1 / max(|x|, 1e-12) of packed rows.
    void invert_norms(const float* rows, float* inverse) const {
        for (int i = 0; i < columns; ++i) {
            vf squares = {};
            for (int d = 0; d < packed; d += W) {
                const vf x = load(rows + i * packed + d);
                if (PAIRS) {
                    const vf even = (vf)((vi)x << 16);
                    const vf odd = (vf)((vi)x & all_int(int32_t(0xffff0000u)));
                    squares += even * even + odd * odd;
                } else squares += x * x;
            }
            const float norm = __builtin_sqrtf(sum(squares));
            inverse[i] = 1 / (norm > 1e-12f || norm != norm ? norm : 1e-12f);
        }
    }

    // The row of the bias for query i of this window, the mask and padding included.
    const float* bias_row(int i) const {
        const float* row = bias.at + i * bias.row;
        if (!place.special) return row;
        const vi own = all_int(place.region[i]);
        const vi mask = (vi)all(a.mask_value * LOG2E);
        for (int n = 0; n < columns; n += W)
            store(masked + n, load(row + n) + (vf)((load_int(place.region + n) != own) & mask) +
                                  load(place.padding + n));
        return masked;
    }

    bool has_factors() const { return a.post || a.dropout > 0; }

    // post * keep / (1 - dropout) for query i of window `index`.
    const float* factors_row(int64_t index, int i, bool with_post) const {
        const float kept = 1 / (1 - a.dropout);
        const uint64_t row = uint64_t((index * a.heads + head) * job->area + i);
        const uint32_t threshold = uint32_t(double(a.dropout) * 4294967296.0);
        for (int j = 0; j < columns; ++j) factors[j] = 1;
        if (a.dropout > 0)
            for (int j = 0; j < job->area; ++j)
                factors[j] = wa_keep(uint64_t(*a.seed), row, uint32_t(j), threshold) ? kept : 0;
        if (a.post && with_post)
            for (int n = 0; n < columns; n += W)
                store(factors + n, load(factors + n) * load(post.at + i * post.row + n));
        return factors;
    }

    // row *= 1 / (|q_i| |k_j|)
    void normalise(float* row, int i) const {
        const vf own = all(inverse_q[i]);
        for (int n = 0; n < columns; n += W)
            store(row + n, load(row + n) * (own * load(inverse_k + n)));
    }

#ifdef WA_TILES
    static constexpr int COLUMNS = PAIRS ? 32 : 16;  // a tile is 16 pairs
#else
    static constexpr int COLUMNS = 16;
#endif
};

}  // namespace WA_ISA
}  // namespace wa
