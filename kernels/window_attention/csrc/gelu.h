// What the CPU kernel of a GELU between two linear layers receives: y = x Φ(x) with x = before +
// bias, Φ the normal distribution.
#pragma once
#include <stdint.h>

typedef struct GeluArgs {
    // (rows, width), contiguous: forward of `act_dtype`, backward of `kept_dtype`
    const void* before;
    const float* bias;    // (width), or null for 0
    void* kept;           // forward: `before` once more, of `kept_dtype`, or null
    // y of `act_dtype`, written by both; may be the memory of a `before` of the same dtype
    void* act;
    // backward
    void* grad;           // (rows, width) of `act_dtype`: the gradient of y, replaced by that of x
    float* grad_bias;     // (width,): the sums of the gradient of x
    float* partial;       // scratch, (wa_cpu_gelu_blocks(rows, width), width)
    int64_t rows, width;
    // WA_F32, WA_F16, WA_BF16; kept_dtype is act_dtype, or act_dtype is WA_F32
    int32_t kept_dtype;
    int32_t act_dtype;
    int32_t threads;
} GeluArgs;
