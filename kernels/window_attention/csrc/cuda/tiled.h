// Window attention for windows of up to 576 tokens, in float, half and bfloat16: what the
// dispatcher sees. Codes: 0, or the device's error.
#pragma once
#include "../args.h"

#define WA_TILED(TYPE)                                                                 \
    int wa_tiled_forward_##TYPE(const WindowAttentionArgs& a, void* stream);           \
    int wa_tiled_backward_##TYPE(const WindowAttentionArgs& a, void* stream);          \
    int64_t wa_tiled_workspace_##TYPE(const WindowAttentionArgs& a); /* backward */
WA_TILED(f16)
WA_TILED(bf16)
WA_TILED(f32)
#undef WA_TILED
