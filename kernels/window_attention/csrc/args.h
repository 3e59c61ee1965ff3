// What every kernel of window attention receives: one plain struct, the same for the CPU, for CUDA
// and for CUDA emulated on the CPU.
//
//   S = (q kᵀ) * scale[offset, head] + bias[offset, head] + mask
//   P = softmax(S) * post[offset, head]
//   O = dropout(P) v
//
// An epilogue gives the result of a token something of its own value, of either kind:
//
//   affine      out_i = alpha[head] v_i + beta[head] O_i
//   exclusive   out_i = O_i - exclusion[head] r_i v_i,   r_i = (O_i v_i) / max(|v_i|^2, 1e-8)
//
// Cosine attention: q and k are divided by max(|q|, 1e-12) and max(|k|, 1e-12) first.
//
// Grid of height x width tokens, padded at its end to whole windows and rolled up and left by
// `shift` by address only. Padding takes no part: it is no key, and its queries are not written.
// Pairs the roll brought together get `mask_value` added. Window token i has row i / window[1] and
// column i % window[1]; the offset row of query i and key j, one of
// T = (2 window[0] - 1)(2 window[1] - 1), is
//
//   (yi - yj + window[0] - 1) * (2 window[1] - 1) + xi - xj + window[1] - 1
#pragma once
#include <stdint.h>

enum { WA_F32 = 0, WA_F16 = 1, WA_BF16 = 2 };

typedef struct WindowAttentionArgs {
    const void* qkv;        // (batch, height, width, 3, heads, head_dim), contiguous, of `dtype`
    const float* scale;     // (scale_rows, heads), scale_rows = T or 1
    const float* bias;      // (T, heads) or null
    const float* post;      // (T, heads) or null
    const float* alpha;     // (heads) or null: no affine epilogue; beta likewise, together with it
    const float* beta;
    const float* exclusion; // (heads) or null; not together with alpha and beta
    const int64_t* seed;    // one number in the kernel's own memory, or null without dropout
    void* out;              // (batch, height, width, heads, head_dim) of `dtype`
    // (batch, windows, heads, N): log-sum-exp of a query's S; null in inference; not written for
    // padding
    float* lse;
    float* along;           // like lse: r_i of the exclusive epilogue; null in inference and without
    // backward: all of the above as in the forward (out is read for the exclusive epilogue alone),
    // and
    const void* grad_out;   // like out
    const float* grad_lse;  // like lse, or null; what it holds for padding is not read
    void* grad_qkv;         // like qkv; every element is written
    float* grad_scale;      // (scale_rows, heads) or null; written, not added to
    float* grad_bias;       // (T, heads) or null
    float* grad_post;       // (T, heads) or null
    float* grad_alpha;      // (heads) or null; this and the next two as the tables' gradients
    float* grad_beta;       // (heads) or null
    float* grad_exclusion;  // (heads) or null
    void* workspace;        // scratch of the size that the kernel's *_workspace says, or null
    int32_t batch, height, width, heads, head_dim;
    int32_t window[2], shift[2];
    int32_t scale_rows;
    int32_t cosine;         // 0 or 1
    int32_t dtype;          // WA_F32, WA_F16, WA_BF16
    int32_t threads;        // CPU only: threads to use, at least 1
    float mask_value;
    float dropout;          // probability of dropping an entry of P, in [0, 1)
} WindowAttentionArgs;

// An entry of P is dropped where wa_keep is 0: a pure function, so that the backward forms the same
// mask, on every device. Mixing steps of the MurmurHash3 finaliser (public domain constants).
// row: ((image * windows + window) * heads + head) * N + query.
#ifdef __CUDACC__
#define WA_HD __host__ __device__
#else
#define WA_HD
#endif
WA_HD static inline uint32_t wa_hash(uint64_t seed, uint64_t row, uint32_t key) {
    uint64_t x = seed ^ (row * 0x9E3779B97F4A7C15ull + (uint64_t)key * 0xD1B54A32D192ED03ull);
    x ^= x >> 33; x *= 0xff51afd7ed558ccdull;
    x ^= x >> 33; x *= 0xc4ceb9fe1a85ec53ull;
    x ^= x >> 33;
    return (uint32_t)(x >> 32);
}
// threshold = dropout * 2^32, rounded down
WA_HD static inline uint32_t wa_keep(uint64_t seed, uint64_t row, uint32_t key,
                                     uint32_t threshold) {
    return wa_hash(seed, row, key) >= threshold;
}
