// Small kernels for the emulator's own tests: each instruction against its definition, each planted
// fault.
#include "../cuda/port.h"

#define WA_EXPORT extern "C" __attribute__((visibility("default")))

// d (16 x 8) = a (16 x K) b (K x 8) through shared memory and ldmatrix; b is given row-major and
// read transposed
template <typename T> __global__ void product(const T* a, const T* b, float* d) {
    WA_DYN_SMEM(shared);
    T* left = reinterpret_cast<T*>(shared);  // 16 x 16
    T* right = left + 256;                   // 16 x 8
    const int lane = threadIdx.x;
    for (int i = lane; i < 256; i += 32) left[i] = a[i];
    for (int i = lane; i < 128; i += 32) right[i] = b[i];
    __syncwarp();
    uint32_t x[4], y[2];
    ldsm4(x, left + lane % 16 * 16 + lane / 16 * 8);
    ldsm2t(y, right + lane % 16 * 8);
    float sum[4] = {0.f, 0.f, 0.f, 0.f};
    mma<T>(sum, x, y[0], y[1]);
    for (int e = 0; e < 4; ++e) d[(lane / 4 + e / 2 * 8) * 8 + lane % 4 * 2 + e % 2] = sum[e];
}

// the same with b (8 x 16) as rows of its columns, read without transposing
template <typename T> __global__ void product_of_rows(const T* a, const T* b, float* d) {
    WA_DYN_SMEM(shared);
    T* left = reinterpret_cast<T*>(shared);
    T* right = left + 256;
    const int lane = threadIdx.x;
    for (int i = lane; i < 256; i += 32) left[i] = a[i];
    for (int i = lane; i < 128; i += 32) right[i] = b[i];
    __syncwarp();
    uint32_t x[4], y[2];
    // left holds a transposed
    ldsm4t(x, left + (lane % 8 + lane / 16 * 8) * 16 + lane / 8 % 2 * 8);
    ldsm2(y, right + lane % 8 * 16 + lane / 8 % 2 * 8);
    float sum[4] = {1.f, 1.f, 1.f, 1.f};
    mma<T>(sum, x, y[0], y[1]);
    for (int e = 0; e < 4; ++e) d[(lane / 4 + e / 2 * 8) * 8 + lane % 4 * 2 + e % 2] = sum[e];
}

__global__ void product_tf32(const float* a, const float* b, float* d) {  // a 16 x 8, b 8 x 8
    const int g = threadIdx.x / 4, t = threadIdx.x % 4;
    const uint32_t x[4] = {to_tf32(a[g * 8 + t]), to_tf32(a[(g + 8) * 8 + t]),
                           to_tf32(a[g * 8 + t + 4]), to_tf32(a[(g + 8) * 8 + t + 4])};
    float sum[4] = {0.f, 0.f, 0.f, 0.f};
    mma_tf32(sum, x, to_tf32(b[t * 8 + g]), to_tf32(b[(t + 4) * 8 + g]));
    for (int e = 0; e < 4; ++e) d[(g + e / 2 * 8) * 8 + t * 2 + e % 2] = sum[e];
}

WA_EXPORT int check_product(const void* a, const void* b, float* d, int is_bf16, int of_rows) {
    const dim3 one(1), warp(32);
    if (is_bf16)
        return launch(of_rows ? product_of_rows<bf16> : product<bf16>, one, warp, 768, nullptr,
                      (const bf16*)a, (const bf16*)b, d);
    return launch(of_rows ? product_of_rows<f16> : product<f16>, one, warp, 768, nullptr,
                  (const f16*)a, (const f16*)b, d);
}
WA_EXPORT int check_product_tf32(const float* a, const float* b, float* d) {
    return launch(product_tf32, dim3(1), dim3(32), 0, nullptr, a, b, d);
}

// out[i] = in[i]'s neighbour in the other warp, handed over through shared memory
enum {
    FINE,
    NO_WAIT,
    NO_BARRIER,
    ONE_WARP_FEWER,
    DIVERGENT,
    LEFT_OPEN,
    OUT_OF_BOUNDS,
    MISALIGNED,
    HALF_A_WARP,
    UNWRITTEN
};
__global__ void hand_over(const float* in, float* out, int fault) {
    WA_DYN_SMEM(shared);
    float* buffer = reinterpret_cast<float*>(shared);
    const int i = threadIdx.x;
    cp4(buffer + i + (fault == OUT_OF_BOUNDS ? 1 : 0), in + i, fault != UNWRITTEN);
    if (fault != LEFT_OPEN) cp_commit();
    if (fault != NO_WAIT) cp_wait<0>();
    if (fault != NO_BARRIER && !(fault == ONE_WARP_FEWER && i < 32)) __syncthreads();
    float x = buffer[i ^ 32];
    if (fault == DIVERGENT) {
        if (i % 32 < 16) x = __shfl_xor_sync(~0u, x, 1);
        else x = __shfl_xor_sync(~0u, x, 2);
    }
    if (fault == HALF_A_WARP && i % 32 < 16) __syncwarp();
    if (fault == MISALIGNED) { uint32_t r[4]; ldsm4(r, shared + 4); }
    if (fault == NO_WAIT) cp_wait<0>();
    out[i] = x;
}
WA_EXPORT int check_hand_over(const float* in, float* out, int fault) {
    return launch(hand_over, dim3(1), dim3(64), 256, nullptr, in, out, fault);
}

// out[0]: of the lane ^ 5; out[1]: of lane 3
__global__ void shuffles(const float* in, float* out) {
    out[threadIdx.x] = __shfl_xor_sync(~0u, in[threadIdx.x], 5);
    out[32 + threadIdx.x] = __shfl_sync(~0u, in[threadIdx.x], 3);
}
WA_EXPORT int check_shuffles(const float* in, float* out) {
    return launch(shuffles, dim3(1), dim3(32), 0, nullptr, in, out);
}

// the order in which threads come past, over 3 blocks of 2 warps
__global__ void who(int* order, int* next) {
    __syncthreads();
    order[(*next)++] = (int)(blockIdx.x * blockDim.x + threadIdx.x);
}
WA_EXPORT int check_order(int* order, int* next) {
    return launch(who, dim3(3), dim3(64), 0, nullptr, order, next);
}

template <typename T> __global__ void round_trip(const float* in, float* out) {
    const float2 pair = unpack2<T>(pack2<T>(in[2 * threadIdx.x], in[2 * threadIdx.x + 1]));
    out[2 * threadIdx.x] = pair.x; out[2 * threadIdx.x + 1] = pair.y;
}
WA_EXPORT int check_round_trip(const float* in, float* out, int is_bf16) {  // 64 numbers
    return launch(is_bf16 ? round_trip<bf16> : round_trip<f16>, dim3(1), dim3(32), 0, nullptr, in,
                  out);
}

__global__ void halves(int* out) {  // two named barriers, one for each pair of warps
    WA_DYN_SMEM(shared);
    int* buffer = reinterpret_cast<int*>(shared);
    const int i = threadIdx.x, half = i / 64;
    buffer[i] = i;
    sync_some(1 + half, 64);
    out[i] = buffer[half * 64 + (i + 32) % 64];
}
WA_EXPORT int check_halves(int* out) {
    return launch(halves, dim3(1), dim3(128), 512, nullptr, out);
}

__global__ void read_rows(int stride) {  // 8 rows of 16 bytes, `stride` apart: how many wavefronts
    WA_DYN_SMEM(shared);
    uint32_t r[4];
    ldsm4(r, shared + threadIdx.x % 8 * stride);
}
WA_EXPORT int check_read_rows(int stride) {
    return launch(read_rows, dim3(1), dim3(32), 4096, nullptr, stride);
}
