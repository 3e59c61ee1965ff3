// Rows of a window in shared memory, and products of 16 x 16 tiles of them by one warp: tensor
// cores for 16-bit types, FMA for float.
//
// A fragment is the accumulator layout of mma.sync: f[n][e] of lane l is row (l >> 2) + 8 (e >> 1),
// column 8 n + 2 (l & 3) + (e & 1). Rows are D elements long, in 16-byte chunks whose order is
// permuted by row so that eight rows of one chunk hit all the banks once.
#pragma once
#include "port.h"

namespace tiled {

// f[columns / 8][4]
template <int Columns> using Fragment = float[Columns / 8][4];

template <int Columns> WA_DEVICE void clear(Fragment<Columns>& f) {
#pragma unroll
    for (int n = 0; n < Columns / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) f[n][e] = 0.f;
}

template <typename T, int D> struct Row {
    static constexpr int bytes = D * static_cast<int>(sizeof(T));
    static constexpr int chunks = bytes / 16;
    static constexpr int per_chunk = D / chunks;
    static constexpr int shift = bytes >= 128 ? 0 : bytes == 64 ? 1 : 2;
    static constexpr int mask = (chunks < 8 ? chunks : 8) - 1;
    // Byte offset of a 16-byte chunk; `row` may be relative to any multiple of 8.
    static WA_DEVICE int at(int row, int chunk) {
        return row * bytes + ((chunk ^ ((row >> shift) & mask)) << 4);
    }
};

// One chunk as floats, and back.
template <typename T> struct Chunk {
    static constexpr int size = 8;
    static WA_DEVICE void read(const unsigned char* from, float (&x)[8]) {
        const uint4 raw = *reinterpret_cast<const uint4*>(from);
        const float2 a = unpack2<T>(raw.x);
        const float2 b = unpack2<T>(raw.y);
        const float2 c = unpack2<T>(raw.z);
        const float2 d = unpack2<T>(raw.w);
        x[0] = a.x; x[1] = a.y; x[2] = b.x; x[3] = b.y;
        x[4] = c.x; x[5] = c.y; x[6] = d.x; x[7] = d.y;
    }
    static WA_DEVICE void write(unsigned char* to, const float (&x)[8]) {
        *reinterpret_cast<uint4*>(to) = make_uint4(pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]),
                                                   pack2<T>(x[4], x[5]), pack2<T>(x[6], x[7]));
    }
};
template <> struct Chunk<float> {
    static constexpr int size = 4;
    static WA_DEVICE void read(const unsigned char* from, float (&x)[4]) {
        const float4 raw = *reinterpret_cast<const float4*>(from);
        x[0] = raw.x; x[1] = raw.y; x[2] = raw.z; x[3] = raw.w;
    }
    static WA_DEVICE void write(unsigned char* to, const float (&x)[4]) {
        *reinterpret_cast<float4*>(to) = make_float4(x[0], x[1], x[2], x[3]);
    }
};

// float2 neighbouring elements of a row, dimensions 8 n + c and the next, c even.
template <typename T, int D> struct Element {
    static WA_DEVICE void read(const unsigned char* rows, int row, int n, int c, float& x,
                               float& y) {
        const float2 pair = unpack2<T>(
            *reinterpret_cast<const uint32_t*>(rows + Row<T, D>::at(row, n) + c * 2));
        x = pair.x;
        y = pair.y;
    }
    static WA_DEVICE void write(unsigned char* rows, int row, int n, int c, float x, float y) {
        *reinterpret_cast<uint32_t*>(rows + Row<T, D>::at(row, n) + c * 2) = pack2<T>(x, y);
    }
};
template <int D> struct Element<float, D> {
    static WA_DEVICE int at(int row, int n, int c) {
        return Row<float, D>::at(row, 2 * n + (c >> 2)) + (c & 3) * 4;
    }
    static WA_DEVICE void read(const unsigned char* rows, int row, int n, int c, float& x,
                               float& y) {
        const float2 raw = *reinterpret_cast<const float2*>(rows + at(row, n, c));
        x = raw.x;
        y = raw.y;
    }
    static WA_DEVICE void write(unsigned char* rows, int row, int n, int c, float x, float y) {
        *reinterpret_cast<float2*>(rows + at(row, n, c)) = make_float2(x, y);
    }
};

// Writes f (16 x D) times a factor for each of the lane's two rows into 16 rows of shared memory.
template <typename T, int D>
WA_DEVICE void store_fragment(unsigned char* rows, const Fragment<D>& f, float factor0,
                              float factor1, int lane) {
    const int g = lane >> 2, c = (lane & 3) * 2;
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
        Element<T, D>::write(rows, g, n, c, f[n][0] * factor0, f[n][1] * factor0);
        Element<T, D>::write(rows, g + 8, n, c, f[n][2] * factor1, f[n][3] * factor1);
    }
}

// Where this lane reads the first 16 columns of 16 rows as the right operand of a product, in bytes
// from the first row: worked out once, since the order of chunks repeats every 8 rows. Columns 16 k
// and on: ^ (k << 5).
template <typename T, int D> struct Lane {
    // of the product with the rows transposed, with the rows as they are
    int lane;
    int transposed;
    int plain;
    WA_DEVICE explicit Lane(int lane)
        : lane(lane), transposed(Row<T, D>::at((lane & 7) + (lane >> 4) * 8, (lane >> 3) & 1)),
          plain(Row<T, D>::at(lane & 15, lane >> 4)) {}
};
template <int D> struct Lane<float, D> {
    int lane;
    WA_DEVICE explicit Lane(int lane) : lane(lane) {}
};

// The left operand of a product: 16 rows, kept in registers where the tensor cores read them from
// there. `rows`: the first of 16 rows, at a multiple of 16.
template <typename T, int D> struct Left {
    uint32_t a[D / 16][4];
    WA_DEVICE void load(const unsigned char* rows, const Lane<T, D>& at) {
#pragma unroll
        for (int k = 0; k < D / 16; ++k) ldsm4(a[k], rows + (at.plain ^ k << 5));
    }
    // s += left (16 x D) times the rows transposed
    WA_DEVICE void times_transposed(Fragment<16>& s, const unsigned char* rows,
                                    const Lane<T, D>& at) const {
#pragma unroll
        for (int k = 0; k < D / 16; ++k) {
            uint32_t b[4];
            ldsm4(b, rows + (at.transposed ^ k << 5));
            mma<T>(s[0], a[k], b[0], b[1]);
            mma<T>(s[1], a[k], b[2], b[3]);
        }
    }
};
template <int D> struct Left<float, D> {
    const unsigned char* left;
    WA_DEVICE void load(const unsigned char* rows, const Lane<float, D>&) { left = rows; }
    WA_DEVICE void times_transposed(Fragment<16>& s, const unsigned char* rows,
                                    const Lane<float, D>& at) const {
        const int g = at.lane >> 2, c = (at.lane & 3) * 2;
#pragma unroll 2
        for (int chunk = 0; chunk < D / 4; ++chunk) {
            const float4 a0 = *reinterpret_cast<const float4*>(left + Row<float, D>::at(g, chunk));
            const float4 a1 = *reinterpret_cast<const float4*>(left +
                                                               Row<float, D>::at(g + 8, chunk));
#pragma unroll
            for (int n = 0; n < 2; ++n)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const float4 b = *reinterpret_cast<const float4*>(
                        rows + Row<float, D>::at(n * 8 + c + e, chunk));
                    s[n][e] += a0.x * b.x + a0.y * b.y + a0.z * b.z + a0.w * b.w;
                    s[n][e + 2] += a1.x * b.x + a1.y * b.y + a1.z * b.z + a1.w * b.w;
                }
        }
    }
};

// A 16 x 16 tile as the left operand of a product with rows, set one half (8 columns) at a time.
template <typename T> struct Operand {
    uint32_t a[4];
    WA_DEVICE void set(int n, const float (&x)[4]) {
        a[2 * n] = pack2<T>(x[0], x[1]);
        a[2 * n + 1] = pack2<T>(x[2], x[3]);
    }
};
template <> struct Operand<float> {
    Fragment<16> p;
    WA_DEVICE void set(int n, const float (&x)[4]) {
#pragma unroll
        for (int e = 0; e < 4; ++e) p[n][e] = x[e];
    }
};

// o (16 x D) += tile (16 x 16) times 16 rows
template <typename T, int D> struct Product {
    static WA_DEVICE void add(Fragment<D>& o, const Operand<T>& tile, const unsigned char* rows,
                              const Lane<T, D>& at) {
#pragma unroll
        for (int n = 0; n < D / 16; ++n) {
            uint32_t b[4];
            ldsm4t(b, rows + (at.plain ^ n << 5));
            mma<T>(o[n * 2], tile.a, b[0], b[1]);
            mma<T>(o[n * 2 + 1], tile.a, b[2], b[3]);
        }
    }
};
template <int D> struct Product<float, D> {
    static WA_DEVICE void add(Fragment<D>& o, const Operand<float>& tile, const unsigned char* rows,
                              const Lane<float, D>& at) {
        const int lane = at.lane, c = (lane & 3) * 2;
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e)
#pragma unroll 1
                // of the four lanes that share a row, the one that holds column `key`
                for (int owner = 0; owner < 4; ++owner) {
                    const int key = n * 8 + owner * 2 + e;
                    const float p0 = __shfl_sync(0xffffffffu, tile.p[n][e], (lane & ~3) | owner);
                    const float p1 = __shfl_sync(0xffffffffu, tile.p[n][e + 2],
                                                 (lane & ~3) | owner);
#pragma unroll
                    for (int d = 0; d < D / 8; ++d) {
                        float x, y;
                        Element<float, D>::read(rows, key, d, c, x, y);
                        o[d][0] += p0 * x;
                        o[d][1] += p0 * y;
                        o[d][2] += p1 * x;
                        o[d][3] += p1 * y;
                    }
                }
    }
};

// 1 / max(norm, 1e-12) from the sum of squares
template <typename T> WA_DEVICE float inverse_norm(float squares) {
    return sizeof(T) == 4 ? 1.f / fmaxf(sqrtf(squares), 1e-12f)
                          : inverse_root(fmaxf(squares, 1e-24f));
}

// Divides `count` rows by their norms (at least 1e-12). Thread t handles the chunks that load_rows
// gave it, so its own copies are enough. inverse: (count,) 1 / norm, or null. All threads of a warp
// take part; count is a multiple of 16.
template <typename T, int D>
WA_DEVICE void normalise_rows(unsigned char* rows, float* inverse, int count, int thread,
                              int threads) {
    using R = Row<T, D>;
    forget(thread);
    const int chunk = thread % R::chunks;
    for (int row = thread / R::chunks; row < count; row += threads / R::chunks) {
        unsigned char* place = rows + R::at(row, chunk);
        float x[Chunk<T>::size], sum = 0.f;
        Chunk<T>::read(place, x);
#pragma unroll
        for (int k = 0; k < Chunk<T>::size; ++k) sum += x[k] * x[k];
#pragma unroll
        for (int step = 1; step < R::chunks; step <<= 1)
            sum += __shfl_xor_sync(0xffffffffu, sum, step);
        const float reciprocal_norm = inverse_norm<T>(sum);
#pragma unroll
        for (int k = 0; k < Chunk<T>::size; ++k) x[k] *= reciprocal_norm;
        Chunk<T>::write(place, x);
        if (inverse && chunk == 0) inverse[row] = reciprocal_norm;
    }
}

// Sum over the four lanes that share the rows of a fragment; every lane gets it.
WA_DEVICE float sum_of_row(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Gradient through x / max(|x|, 1e-12), in place: f = inverse * (f - unit (unit . f)); unit: the 16
// normalised rows. Below the bound the norm is a constant and the second term falls away.
template <typename T, int D>
WA_DEVICE void through_norm(Fragment<D>& f, const unsigned char* unit, const float* inverse,
                            int lane) {
    const int g = lane >> 2, c = (lane & 3) * 2;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float along = 0.f;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
            float x, y;
            Element<T, D>::read(unit, g + 8 * r, n, c, x, y);
            along += x * f[n][2 * r] + y * f[n][2 * r + 1];
        }
        const float reciprocal_norm = inverse[g + 8 * r];
        along = sum_of_row(along);
        along = reciprocal_norm < 0.99e12f ? along : 0.f;  // up to the rounding of the inverse
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
            float x, y;
            Element<T, D>::read(unit, g + 8 * r, n, c, x, y);
            f[n][2 * r] = reciprocal_norm * (f[n][2 * r] - x * along);
            f[n][2 * r + 1] = reciprocal_norm * (f[n][2 * r + 1] - y * along);
        }
    }
}

}  // namespace tiled
