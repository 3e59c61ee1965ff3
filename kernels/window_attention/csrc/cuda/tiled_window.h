// What the tiled kernels share: their arguments, where a window's tokens lie, the tables in shared
// memory, the terms of a pair.
#pragma once
#include <type_traits>

#include "epilogue.h"
#include "tiled_tile.h"

namespace tiled {

// Logits are held in units in which the exponential is cheap (log2 e times the natural ones) or,
// for float, in natural units, whose rounding is smaller.
template <typename T> struct Unit {
    static constexpr float of_natural = 1.4426950408889634f, in_natural = 0.6931471805599453f;
    static WA_DEVICE float exponential(float x) { return ex2(x); }
    static WA_DEVICE float logarithm(float x) { return lg2(x); }
};
template <> struct Unit<float> {
    static constexpr float of_natural = 1.f, in_natural = 1.f;
    static WA_DEVICE float exponential(float x) { return expf(x); }
    static WA_DEVICE float logarithm(float x) { return logf(x); }
};
// Which terms a kernel is compiled for. kUniform: one scale per head, bias. kTable: scale table,
// bias. kFull: any scale, bias, post, dropout.
enum Terms { kUniform = 0, kTable = 1, kFull = 2 };
// Threads of the forward's blocks, and how many blocks are to share a multiprocessor: two leave 128
// registers a thread, which these instances can do with. They can also be one block of twice as
// many threads, as the queries' blocks may be.
constexpr int kMaxThreads = 256;
template <typename T, int D, int Mode> constexpr int blocks_wanted() {
    return (D == 32 && Mode != kFull) || (D == 16 && sizeof(T) == 2) ? 2 : 1;
}
template <typename T, int D, int Mode, bool Epilogue> constexpr int query_threads() {
    return kMaxThreads * (Epilogue ? 1 : blocks_wanted<T, D, Mode>());
}
// Tables whose gradients are summed pair by pair (kPairs: an N x N strip of each in shared memory);
// the uniform scale's is one number.
enum Grads { kGradBias = 1, kGradScale = 2, kGradPost = 4, kPairs = 7, kGradUniform = 8 };

// Quotients of numbers below 2^31 by one that the host knows: n / d = (floor(n m / 2^32) + n) / 2^s
// with 2^s >= d, m = 2^32 (2^s - d) / d + 1.
struct Divisor {
    uint32_t multiplier;
    int shift;
    WA_DEVICE int quotient(int n) const {
        return static_cast<int>(
            (static_cast<uint32_t>(static_cast<uint64_t>(static_cast<uint32_t>(n)) * multiplier >>
                                   32) +
             n) >>
            shift);
    }
};

struct Args {
    WindowAttentionArgs a;
    int total;                 // windows of the batch
    int windows, across;       // windows of an image, of a row of windows
    Divisor by_windows, by_across;
    int padded[2];
    int area, tiles, rows;     // N; 16-row tiles of a window; 16 * tiles
    int offsets;               // T
    int block;                 // rows brought into shared memory at a time, a multiple of 16
    int resident;              // 1: all rows of the window stay there; 0: two blocks in turn
    int passes;                // forward and keys: each warp's tiles of a window
    // queries: tiles of a block's strip; warps that share the keys of a tile
    int strip;
    int groups;
    int grads;                 // queries: mask of Grads
    // (total, heads, N), from the query kernel to the key kernel: sum over j of P dP; float only:
    // what P is to
    float* delta;
    float* map_rescale;
                               // be multiplied by for rows that sum to 1
    float* partial;  // this table's sums of each block: (blocks of a head, heads, T or 1), per bit
                     // of `grads` in turn
    OwnSums own_sums;          // of the epilogue
    uint32_t drop_below;       // an entry is dropped where its hash is below
    float keep_factor;         // 1 / (1 - dropout)
};

// Hands out pieces of shared memory; with a null base it only counts.
struct Carve {
    unsigned char* base;
    int used = 0;
    template <typename V> WA_HD V* take(int count) {
        V* piece = reinterpret_cast<V*>(base + used);
        used += (count * static_cast<int>(sizeof(V)) + 127) / 128 * 128;
        return piece;
    }
};

// Of each window position: packed coordinates (row << 16 | column, or -1 past the end), its token
// in one window (-1: none), and its word for one window: bytes from the entry of position 0 in bits
// 0-15, region of the shift in bits 16-17, bit 18 where it is no token of the image. In a window
// that is not special a word is its bytes alone.
constexpr int kRegion = 3 << 16, kOutside = 1 << 18, kBytes = 0xffff;

template <int Mode> struct Shared {
    // bias; scale and bias: in Unit
    using Entry = std::conditional_t<Mode == kUniform, float, float2>;
    Entry* entries;            // (T,)
    float* post;               // (T,) factor after the softmax
    int *place, *token, *word; // (rows,)
    WA_HD Shared(Carve& carve, const Args& p) {
        entries = carve.take<Entry>(p.offsets);
        post = Mode == kFull ? carve.take<float>(p.offsets) : nullptr;
        place = carve.take<int>(p.rows);
        token = carve.take<int>(p.rows);
        word = carve.take<int>(p.rows);
    }
};

// Fills the tables and places; the caller puts a barrier before they are read.
template <typename T, int Mode> WA_DEVICE void fill_shared(const Shared<Mode>& shared,
                                                           const Args& p, int head) {
    const WindowAttentionArgs& a = p.a;
    for (int t = threadIdx.x; t < p.offsets; t += blockDim.x) {
        const float b = a.bias ? a.bias[t * a.heads + head] * Unit<T>::of_natural : 0.f;
        if constexpr (Mode == kUniform) shared.entries[t] = b;
        else
            shared.entries[t] = make_float2(
                a.scale[(a.scale_rows == 1 ? 0 : t) * a.heads + head] * Unit<T>::of_natural, b);
        if (Mode == kFull) shared.post[t] = a.post ? a.post[t * a.heads + head] : 1.f;
    }
    for (int i = threadIdx.x; i < p.rows; i += blockDim.x)
        shared.place[i] = i < p.area ? (i / a.window[1]) << 16 | i % a.window[1] : -1;
}

// One window of the batch.
struct Window {
    int first;                 // the image's first token
    int y0, x0;                // token of position 0 before wrapping
    bool edge_y, edge_x;       // holds tokens of two regions along that axis
    bool special;              // some pairs are masked or excluded
    WA_DEVICE Window(const Args& p, int index) {
        const WindowAttentionArgs& a = p.a;
        const int image = p.by_windows.quotient(index), of_image = index - image * p.windows;
        const int down = p.by_across.quotient(of_image), across = of_image - down * p.across;
        first = image * a.height * a.width;
        y0 = down * a.window[0] + a.shift[0];
        x0 = across * a.window[1] + a.shift[1];
        edge_y = a.shift[0] > 0 && (down + 1) * a.window[0] == p.padded[0];
        edge_x = a.shift[1] > 0 && across + 1 == p.across;
        const bool pads_y = p.padded[0] != a.height && y0 + a.window[0] > a.height;
        const bool pads_x = p.padded[1] != a.width && x0 + a.window[1] > a.width;
        special = edge_y || edge_x || pads_y || pads_x || p.rows != p.area;
    }
    // Number of the token at a place, or -1 where it is padding.
    WA_DEVICE int token(const Args& p, int place) const {
        int y = y0 + (place >> 16), x = x0 + (place & 0xffff);
        y -= y >= p.padded[0] ? p.padded[0] : 0;
        x -= x >= p.padded[1] ? p.padded[1] : 0;
        return place < 0 || y >= p.a.height || x >= p.a.width ? -1 : first + y * p.a.width + x;
    }
    WA_DEVICE int word(const Args& p, int place, int token, int bytes) const {
        if (place < 0) return kOutside;
        const int y = place >> 16, x = place & 0xffff;
        int word = (y * (2 * p.a.window[1] - 1) + x) * bytes;
        if (edge_y && y >= p.a.window[0] - p.a.shift[0]) word |= 1 << 16;
        if (edge_x && x >= p.a.window[1] - p.a.shift[1]) word |= 2 << 16;
        return token < 0 ? word | kOutside : word;
    }
};

// Fills tokens and words of a window; the caller puts a barrier before they are read.
template <int Mode> WA_DEVICE void fill_window(const Shared<Mode>& shared, const Args& p,
                                               const Window& window) {
    for (int i = threadIdx.x; i < p.rows; i += blockDim.x) {
        const int place = shared.place[i], token = window.token(p, place);
        shared.token[i] = token;
        shared.word[i] = window.word(p, place, token, sizeof(*shared.entries));
    }
}

// The table as a query sees it: the entry of a pair lies a key's bytes before it.
template <int Mode> WA_DEVICE const unsigned char* entries_of(const Shared<Mode>& shared,
                                                              const Args& p, int word) {
    // of a pair at relative offset 0
    const int centre = (p.a.window[0] - 1) * (2 * p.a.window[1] - 1) + p.a.window[1] - 1;
    return reinterpret_cast<const unsigned char*>(shared.entries + centre) + (word & kBytes);
}
// The same for a key, to which a query's bytes are added.
template <int Mode> WA_DEVICE const unsigned char* entries_before(const Shared<Mode>& shared,
                                                                  const Args& p, int word) {
    return entries_of<Mode>(shared, p, 0) - (word & kBytes);
}

// S of a pair in Unit, before the mask; `scale` gets the factor of q . k in Unit.
template <int Mode> WA_DEVICE float logit(const unsigned char* entry, float uniform, float dot,
                                          float& scale) {
    if constexpr (Mode == kUniform) {
        scale = uniform;
        return dot * uniform + *reinterpret_cast<const float*>(entry);
    } else {
        const float2 both = *reinterpret_cast<const float2*>(entry);
        scale = both.x;
        return dot * both.x + both.y;
    }
}

// The factor after the softmax that belongs to an entry.
template <int Mode> WA_DEVICE float post_of(const Shared<Mode>& shared,
                                            const unsigned char* entry) {
    return shared
        .post[reinterpret_cast<const typename Shared<Mode>::Entry*>(entry) - shared.entries];
}

// Starts the copies of `count` rows of two packed tensors into shared memory; padding becomes 0.
// All of T: stride and from in elements. token: of the rows. to1 null: the first tensor alone.
template <typename T, int D>
WA_DEVICE void load_rows(const int* token, int count, const T* from0, int stride0,
                         unsigned char* to0, const T* from1, int stride1, unsigned char* to1,
                         int thread, int threads) {
    using R = Row<T, D>;
    // nothing that follows from it is kept from call to call, where registers are short
    forget(thread);
    const int chunk = thread % R::chunks;
    from0 += chunk * R::per_chunk;
    from1 += chunk * R::per_chunk;
#pragma unroll 2
    for (int row = thread / R::chunks; row < count; row += threads / R::chunks) {
        const int from = token[row], at = R::at(row, chunk);
        const int64_t safe = from < 0 ? 0 : from;
        cp16(to0 + at, from0 + safe * stride0, from >= 0);
        if (to1) cp16(to1 + at, from1 + safe * stride1, from >= 0);
    }
}

// Writes 16 rows from shared memory to their tokens, by one warp.
template <typename T, int D> WA_DEVICE void write_rows(const int* token, const unsigned char* rows,
                                                       T* to, int stride, int lane) {
    using R = Row<T, D>;
    forget(lane);
    const int chunk = lane % R::chunks;
    to += chunk * R::per_chunk;
#pragma unroll
    for (int i = 0; i < R::chunks / 2; ++i) {
        const int row = lane / R::chunks + i * (32 / R::chunks), of_row = token[row];
        if (of_row >= 0)
            *reinterpret_cast<uint4*>(to + static_cast<int64_t>(of_row) * stride) =
                *reinterpret_cast<const uint4*>(rows + R::at(row, chunk));
    }
}

// The packed projections of one head: part 0 is q, 1 k, 2 v.
template <typename T> struct Heads {
    int stride;  // elements from token to token of qkv
    int width;   // heads * head_dim
    int offset;  // of this head
    WA_DEVICE Heads(const Args& p, int head)
        : stride(3 * p.a.heads * p.a.head_dim),
          width(p.a.heads * p.a.head_dim),
          offset(head * p.a.head_dim) {}
    WA_DEVICE const T* part(const void* qkv, int which) const {
        return static_cast<const T*>(qkv) + which * width + offset;
    }
    WA_DEVICE T* part(void* qkv, int which) const {
        return static_cast<T*>(qkv) + which * width + offset;
    }
};

}  // namespace tiled
