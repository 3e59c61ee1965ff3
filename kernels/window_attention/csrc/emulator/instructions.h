// The warp instructions of cuda/port.h in plain C++: what each lane holds follows the fragment
// layouts of the PTX manual. `line`: the caller's source line; lanes that meet in the same
// instruction at different lines have diverged.
#pragma once
#include "device.h"

namespace wa_emu {

inline uint64_t kind_of(int instruction, int line, int detail = 0) {
    return (uint64_t)instruction << 48 | (uint64_t)(uint16_t)detail << 32 | (uint32_t)line;
}
enum { SYNC_WARP = 1, SHUFFLE, MMA, MMA_TF32, LDMATRIX };

struct MmaInput { float* d; const uint32_t* a; uint32_t b0, b1; };

template <typename T> inline float half_of(uint32_t pair, int which) {
    T x;
    x.bits = (uint16_t)(pair >> (16 * which));
    return decode(x);
}

template <int K> inline void multiply(const Rendezvous& r, const float (&a)[16][K],
                                      const float (&b)[K][8]) {
    float c[16][8] = {};
    for (int i = 0; i < 16; ++i)
        for (int k = 0; k < K; ++k)
            for (int j = 0; j < 8; ++j) c[i][j] += a[i][k] * b[k][j];
    for (int lane = 0; lane < WARP; ++lane) {
        float* d = ((const MmaInput*)r.in[lane])->d;
        for (int e = 0; e < 4; ++e) d[e] += c[lane / 4 + e / 2 * 8][lane % 4 * 2 + e % 2];
    }
    counters.mma++;
}

// d (16 x 8, f32) += a (16 x 16) b (16 x 8), T = bf16 or f16
template <typename T> inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                      uint32_t b1, int line) {
    MmaInput input{d, a, b0, b1};
    collective("mma", kind_of(MMA, line), &input, nullptr, [](Rendezvous& r) {
        float left[16][16], right[16][8];
        for (int lane = 0; lane < WARP; ++lane) {
            const MmaInput& m = *(const MmaInput*)r.in[lane];
            const int g = lane / 4, t = lane % 4 * 2;
            for (int h = 0; h < 2; ++h) {
                for (int i = 0; i < 4; ++i)
                    left[g + i % 2 * 8][t + h + i / 2 * 8] = half_of<T>(m.a[i], h);
                right[t + h][g] = half_of<T>(m.b0, h); right[t + h + 8][g] = half_of<T>(m.b1, h);
            }
        }
        multiply<16>(r, left, right);
    });
}

// d (16 x 8, f32) += a (16 x 8) b (8 x 8) of float32 whose 13 low bits the unit ignores
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, int line) {
    MmaInput input{d, a, b0, b1};
    collective("mma_tf32", kind_of(MMA_TF32, line), &input, nullptr, [](Rendezvous& r) {
        auto value = [](uint32_t x) { return bits_float(x & ~0x1fffu); };
        float left[16][8], right[8][8];
        for (int lane = 0; lane < WARP; ++lane) {
            const MmaInput& m = *(const MmaInput*)r.in[lane];
            const int g = lane / 4, t = lane % 4;
            for (int i = 0; i < 4; ++i) left[g + i % 2 * 8][t + i / 2 * 4] = value(m.a[i]);
            right[t][g] = value(m.b0); right[t + 4][g] = value(m.b1);
        }
        multiply<8>(r, left, right);
    });
}

// MATRICES 8 x 8 matrices of 16-bit elements; lane 8 m + i gives the address of row i of matrix m
template <int MATRICES> inline void ldmatrix(uint32_t (&out)[MATRICES], const void* row,
                                             bool transposed, int line) {
    if (block->current % WARP < 8 * MATRICES) check_shared(row, 16, "ldmatrix");
    collective("ldmatrix", kind_of(LDMATRIX, line, MATRICES * 2 + transposed), row, out,
               [transposed](Rendezvous& r) {
                   for (int m = 0; m < MATRICES; ++m) {
                       int of_bank[8] = {},
                           most = 0;  // 8 rows of 16 bytes meet 8 groups of 4 banks
                       for (int i = 0; i < 8; ++i) {
                           bool seen = false;
                           for (int j = 0; j < i; ++j) seen |= r.in[m * 8 + j] == r.in[m * 8 + i];
                           int& count = of_bank[(uintptr_t)r.in[m * 8 + i] / 16 % 8];
                           count += !seen;
                           most = count > most ? count : most;
                       }
                       counters.ldmatrix_wavefronts += (uint64_t)most;
                       for (int lane = 0; lane < WARP; ++lane) {
                           uint32_t pair = 0;
                           for (int h = 0; h < 2; ++h) {
                               const int a = lane / 4, b = lane % 4 * 2 + h;
                               uint16_t bits;
                               memcpy(&bits,
                                      (const char*)r.in[m * 8 + (transposed ? b : a)] +
                                          2 * (transposed ? a : b),
                                      2);
                               pair |= (uint32_t)bits << (16 * h);
                           }
                           ((uint32_t*)r.out[lane])[m] = pair;
                       }
                   }
                   counters.ldmatrix++;
               });
}

struct ShuffleInput { uint32_t value; int from; };
inline uint32_t shuffle(uint32_t value, int from, int line, int detail) {
    ShuffleInput input{value, from};
    uint32_t result = 0;
    collective("shuffle", kind_of(SHUFFLE, line, detail), &input, &result, [](Rendezvous& r) {
        for (int lane = 0; lane < WARP; ++lane) {
            const int source = ((const ShuffleInput*)r.in[lane])->from & (WARP - 1);
            *(uint32_t*)r.out[lane] = ((const ShuffleInput*)r.in[source])->value;
        }
    });
    return result;
}
inline int lane_index() { return block->current % WARP; }

inline void sync_warp(int line) {
    collective("syncwarp", kind_of(SYNC_WARP, line), nullptr, nullptr, [](Rendezvous&) {});
}

// The target holds NaN from here until the group has been waited for: reading it early, or writing
// it over data still in use, shows.
inline void copy_async(void* to, const void* from, int bytes, bool all) {
    check_shared(to, (size_t)bytes, "cp.async");
    if (all && (uintptr_t)from % (size_t)bytes)
        fault("cp.async: global address not aligned to %d bytes", bytes);
    memset(to, 0xff, (size_t)bytes);
    block->self().open.push_back({to, from, all ? bytes : 0, all ? 0 : bytes});
    counters.copies++;
}
inline void copy_commit() {
    auto& f = block->self();
    f.groups.push_back(std::move(f.open));
    f.open.clear();
}
inline void copy_wait(int left) {
    auto& groups = block->self().groups;
    while ((int)groups.size() > left) {
        for (const Copy& c : groups.front()) {
            if (c.bytes) memcpy(c.to, c.from, (size_t)c.bytes);
            if (c.zeros) memset(c.to, 0, (size_t)c.zeros);
        }
        groups.erase(groups.begin());
    }
}

}  // namespace wa_emu
