// Every hardware instruction of the kernels behind a wrapper, once for nvcc and once for the
// emulator (g++ -DWA_EMU).
//
//   WA_DYN_SMEM(name)            the block's dynamic shared memory, 128-byte aligned
//   launch(kernel, grid, block, shared_bytes, stream, args...)
//                                0 or an error code
//   __syncthreads(), sync_some(id, threads), __syncwarp()
//   mma<T>(d, a, b0, b1)         d[16x8] += a[16x16] b[16x8], T = bf16 or f16, f32 sums
//   mma_tf32(d, a, b0, b1)       the same of float32 with 8 columns of a
//   ldsm4(r, row), ldsm2, ldsm4t, ldsm2t
//                                ldmatrix, plain and transposed
//   cp16(to, from, ok), cp4, cp_commit(), cp_wait<LEFT>()
//                                cp.async; zeros where !ok
//   __shfl_xor_sync(~0u, x, mask), __shfl_sync(~0u, x, lane)
//                                x: float or int
//   pack2<T>(a, b), unpack2<T>(pair), to_tf32(x)
//   ex2(x), lg2(x), reciprocal(x), inverse_root(x)
//                                approximations: 2 ulp, denormals flushed
//   forget(x)                    the compiler takes x for new: what depends on it is worked out
//                                again, not kept in registers
//   multiprocessors(), shared_bytes_max()
//                                of the current device; host side
//   WA_DEVICE                    marks a device function
//   WA_CUDA_NAME(forward)        wa_cuda_forward or wa_emu_forward
//
// Lane l of a warp holds of a 16x8 accumulator rows l/4 and l/4 + 8, columns l%4*2 and the next:
// d = {(r,c), (r,c+1), (r+8,c), (r+8,c+1)}.
#pragma once
#include <stdint.h>

#if defined(WA_EMU)
#include <type_traits>

#include "../emulator/instructions.h"

#define WA_DYN_SMEM(name) unsigned char* name = wa_emu::block->shared
#define WA_CUDA_NAME(name) wa_emu_##name
#define WA_DEVICE inline
#define WA_LINE int line = __builtin_LINE()

template <typename... P, typename... A> int launch(void (*kernel)(P...), dim3 grid, dim3 block,
                                                   int shared_bytes, void*, A... args) {
    return wa_emu::launch(grid, block, (size_t)shared_bytes, [=] { kernel(args...); });
}
inline int multiprocessors() { return wa_emu::settings.multiprocessors; }
inline int shared_bytes_max() { return wa_emu::settings.shared_bytes; }

inline void __syncthreads() { wa_emu::barrier(0, (int)blockDim.x); }
inline void forget(int&) {}
inline void sync_some(int id, int threads) { wa_emu::barrier(id, threads); }
inline void __syncwarp(WA_LINE) { wa_emu::sync_warp(line); }
template <typename T> inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                      uint32_t b1, WA_LINE) {
    wa_emu::mma<T>(d, a, b0, b1, line);
}
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, WA_LINE) {
    wa_emu::mma_tf32(d, a, b0, b1, line);
}
inline void ldsm4(uint32_t (&r)[4], const void* row, WA_LINE) {
    wa_emu::ldmatrix<4>(r, row, false, line);
}
inline void ldsm2(uint32_t (&r)[2], const void* row, WA_LINE) {
    wa_emu::ldmatrix<2>(r, row, false, line);
}
inline void ldsm4t(uint32_t (&r)[4], const void* row, WA_LINE) {
    wa_emu::ldmatrix<4>(r, row, true, line);
}
inline void ldsm2t(uint32_t (&r)[2], const void* row, WA_LINE) {
    wa_emu::ldmatrix<2>(r, row, true, line);
}
inline void cp16(void* to, const void* from, bool ok) { wa_emu::copy_async(to, from, 16, ok); }
inline void cp4(void* to, const void* from, bool ok) { wa_emu::copy_async(to, from, 4, ok); }
inline void cp_commit() { wa_emu::copy_commit(); }
template <int LEFT> inline void cp_wait() { wa_emu::copy_wait(LEFT); }
template <typename V> inline V shfl_any(V x, int from, int line, int detail) {
    static_assert(sizeof(V) == 4, "32 bits");
    uint32_t bits;
    memcpy(&bits, &x, 4);
    bits = wa_emu::shuffle(bits, from, line, detail);
    memcpy(&x, &bits, 4);
    return x;
}
template <typename V> inline V __shfl_xor_sync(uint32_t, V x, int mask, WA_LINE) {
    return shfl_any(x, wa_emu::lane_index() ^ mask, line, 64 + mask);
}
template <typename V> inline V __shfl_sync(uint32_t, V x, int from, WA_LINE) {
    return shfl_any(x, from, line, 0);
}
template <typename T> inline uint32_t pack2(float a, float b) {
    T x, y;
    wa_emu::encode(a, x);
    wa_emu::encode(b, y);
    return x.bits | (uint32_t)y.bits << 16;
}
template <typename T> inline float2 unpack2(uint32_t pair) {
    return make_float2(wa_emu::half_of<T>(pair, 0), wa_emu::half_of<T>(pair, 1));
}
inline uint32_t to_tf32(float x) {  // to nearest, ties away from 0
    const uint32_t u = wa_emu::float_bits(x);
    return x - x != 0.f ? u : (u + 0x1000u) & ~0x1fffu;
}
inline float ex2(float x) { float y = exp2f(x); return y < 1.17549435e-38f ? 0.f : y; }
inline float lg2(float x) { return log2f(x); }
inline float reciprocal(float x) { return 1.f / x; }
inline float inverse_root(float x) { return 1.f / sqrtf(x); }

#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <map>
#include <utility>

#define WA_DYN_SMEM(name) extern __shared__ __align__(128) unsigned char name[]
#define WA_CUDA_NAME(name) wa_cuda_##name
#define WA_DEVICE __device__ __forceinline__

typedef __nv_bfloat16 bf16;
typedef __half f16;

// What the runtime was asked before is kept for each thread: its answers cost as much as a launch.
template <typename... P, typename... A> int launch(void (*kernel)(P...), dim3 grid, dim3 block,
                                                   int shared_bytes, void* stream, A... args) {
    if (shared_bytes > 48 * 1024) {
        thread_local std::map<std::pair<const void*, int>, int> allowed;
        int device = 0;
        const cudaError_t asked = cudaGetDevice(&device);
        if (asked != cudaSuccess) return (int)asked;
        int& most = allowed[{(const void*)kernel, device}];
        if (most < shared_bytes) {
            const cudaError_t code = cudaFuncSetAttribute(
                kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
            if (code != cudaSuccess) return (int)code;
            most = shared_bytes;
        }
    }
    kernel<<<grid, block, (size_t)shared_bytes, (cudaStream_t)stream>>>(args...);
    return (int)cudaGetLastError();
}
inline int device_attribute(cudaDeviceAttr which) {
    thread_local std::map<std::pair<int, int>, int> known;
    int device = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return 0;
    int& value = known[{(int)which, device}];
    if (!value && cudaDeviceGetAttribute(&value, which, device) != cudaSuccess) value = 0;
    return value;
}
inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }
inline int shared_bytes_max() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

WA_DEVICE void forget(int& x) { asm volatile("" : "+r"(x)); }
WA_DEVICE void sync_some(int id, int threads) {
    asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}

template <typename T> WA_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1);
#define WA_MMA(T, NAME)                                                                   \
    template <> WA_DEVICE void mma<T>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, \
                                      uint32_t b1) {                                      \
        asm("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME                        \
            ".f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};\n"                   \
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                              \
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));              \
    }
WA_MMA(bf16, "bf16")
WA_MMA(f16, "f16")
#undef WA_MMA
WA_DEVICE void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

WA_DEVICE uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
#define WA_LDSM4(NAME, HOW)                                                                   \
    WA_DEVICE void NAME(uint32_t (&r)[4], const void* row) {                                  \
        asm volatile("ldmatrix.sync.aligned.m8n8.x4" HOW ".shared.b16 {%0,%1,%2,%3}, [%4];\n" \
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])                         \
                     : "r"(shared_address(row))                                               \
                     : "memory");                                                             \
    }
#define WA_LDSM2(NAME, HOW)                                                             \
    WA_DEVICE void NAME(uint32_t (&r)[2], const void* row) {                            \
        asm volatile("ldmatrix.sync.aligned.m8n8.x2" HOW ".shared.b16 {%0,%1}, [%2];\n" \
                     : "=r"(r[0]), "=r"(r[1])                                           \
                     : "r"(shared_address(row))                                         \
                     : "memory");                                                       \
    }
WA_LDSM4(ldsm4, "")
WA_LDSM4(ldsm4t, ".trans")
WA_LDSM2(ldsm2, "")
WA_LDSM2(ldsm2t, ".trans")
#undef WA_LDSM4
#undef WA_LDSM2

WA_DEVICE void cp16(void* to, const void* from, bool ok) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(to)),
                 "l"(from), "r"(ok ? 16 : 0)
                 : "memory");
}
WA_DEVICE void cp4(void* to, const void* from, bool ok) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(shared_address(to)),
                 "l"(from), "r"(ok ? 4 : 0)
                 : "memory");
}
WA_DEVICE void cp_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
template <int LEFT> WA_DEVICE void cp_wait() {
    asm volatile("cp.async.wait_group %0;\n" ::"n"(LEFT) : "memory");
}


template <typename T> WA_DEVICE uint32_t pack2(float a, float b);
template <> WA_DEVICE uint32_t pack2<bf16>(float a, float b) {
    __nv_bfloat162 v = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<uint32_t*>(&v);
}
template <> WA_DEVICE uint32_t pack2<f16>(float a, float b) {
    __half2 v = __floats2half2_rn(a, b);
    return *reinterpret_cast<uint32_t*>(&v);
}
template <typename T> WA_DEVICE float2 unpack2(uint32_t pair);
template <> WA_DEVICE float2 unpack2<bf16>(uint32_t pair) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}
template <> WA_DEVICE float2 unpack2<f16>(uint32_t pair) {
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}
WA_DEVICE uint32_t to_tf32(float x) {
    uint32_t y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
    return y;
}
WA_DEVICE float ex2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
WA_DEVICE float lg2(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
WA_DEVICE float inverse_root(float x) {
    float y;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
WA_DEVICE float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#endif
