// CUDA's vocabulary for a host compiler: qualifiers, built-in variables, vector and 16-bit types,
// as far as the kernels use them. Shared memory is dynamic only (WA_DYN_SMEM in cuda/port.h), so
// that its size is checked and its content poisoned.
#pragma once
#include <cmath>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define threadIdx (dim3((unsigned)wa_emu::block->current))
#define blockIdx (wa_emu::block->block_index)
#define blockDim (wa_emu::block->block_size)
#define gridDim (wa_emu::block->grid_size)

typedef void* cudaStream_t;
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline int2 make_int2(int x, int y) { return {x, y}; }
static inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
static inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
    return {x, y, z, w};
}

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

namespace wa_emu {

inline uint32_t float_bits(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
inline float bits_float(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }

inline float decode(bf16 x) { return bits_float((uint32_t)x.bits << 16); }
inline void encode(float x, bf16& y) {  // to nearest, ties to even
    uint32_t u = float_bits(x);
    y.bits = x != x ? 0x7fff : (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

inline float decode_half(uint16_t bits) {
    const uint32_t exponent = bits >> 10 & 31, fraction = bits & 1023;
    float x = ldexpf((float)(exponent ? 1024 + fraction : fraction),
                     exponent ? (int)exponent - 25 : -24);
    if (exponent == 31) x = fraction ? NAN : INFINITY;
    return bits >> 15 ? -x : x;
}
struct HalfTable {
    float value[65536];
    HalfTable() {
        for (int i = 0; i < 65536; ++i) value[i] = decode_half((uint16_t)i);
    }
};
inline float decode(f16 x) { static const HalfTable table; return table.value[x.bits]; }
inline void encode(float x, f16& y) {  // to nearest, ties to even, denormal numbers kept
    const uint32_t u = float_bits(x), sign = u >> 16 & 0x8000;
    const float size = fabsf(x);
    if (x != x) { y.bits = 0x7fff; return; }
    if (size >= 65520.f) { y.bits = (uint16_t)(sign | 0x7c00); return; }
    if (size < 6.103515625e-05f) {
        y.bits = (uint16_t)(sign | (uint32_t)nearbyintf(size * 16777216.f));
        return;
    }
    const uint32_t v = (u & 0x7fffffff) - (112u << 23);
    y.bits = (uint16_t)(sign | ((v + 0xfff + ((v >> 13) & 1)) >> 13));
}

// Faults unless [p, p + bytes) is aligned and lies in the block's shared memory.
inline void check_shared(const void* p, size_t bytes, const char* what) {
    const unsigned char *at = (const unsigned char*)p, *low = block->shared;
    if ((uintptr_t)p % bytes) fault("%s: address not aligned to %d bytes", what, (int)bytes);
    if (at < low || at + bytes > low + block->shared_size)
        fault("%s: %ld bytes beyond the start of %d of shared memory", what, (long)(at - low),
              (int)block->shared_size);
}

}  // namespace wa_emu
