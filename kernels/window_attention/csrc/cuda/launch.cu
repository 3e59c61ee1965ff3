// The C interface of args.h for CUDA (and, compiled with the emulator, its twin wa_emu_*): windows
// of up to 64 tokens in 16 bits go to the kernels made for them, all others to the tiled ones.
// Returns 0, WA_UNSUPPORTED, or the device's error code (positive). An empty batch has no output,
// and its gradients of the tables, zeros, are the caller's to write.
#include "port.h"
#include "small.h"
#include "tiled.h"

#define WA_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int WA_UNSUPPORTED = -1;

const char* why_not(const WindowAttentionArgs& a) {
    if (a.dtype != WA_F32 && a.dtype != WA_F16 && a.dtype != WA_BF16)
        return "data types other than float32, float16 and bfloat16 have no CUDA kernel";
    if (a.head_dim != 16 && a.head_dim != 32 && a.head_dim != 64)
        return "the CUDA kernels are compiled for head dimensions 16, 32 and 64";
    if (a.window[0] < 1 || a.window[1] < 1 || a.window[0] * a.window[1] > 576)
        return "the CUDA kernels take windows of 1 to 576 tokens";
    for (int axis = 0; axis < 2; ++axis)
        if (a.shift[axis] < 0 || a.shift[axis] >= a.window[axis])
            return "the shift must be at least 0 and less than the window";
    if (a.scale_rows != 1 && a.scale_rows != (2 * a.window[0] - 1) * (2 * a.window[1] - 1))
        return "the scale must have one row or one for each offset";
    int64_t tokens = a.batch;
    for (int axis = 0; axis < 2; ++axis) tokens *= (axis ? a.width : a.height) + a.window[axis];
    if (tokens >= (int64_t{1} << 31)) return "the CUDA kernels take fewer than 2^31 tokens";
    for (const void* tensor :
         {a.qkv, static_cast<const void*>(a.out), a.grad_out, static_cast<const void*>(a.grad_qkv)})
        if (reinterpret_cast<uintptr_t>(tensor) % 16)
            return "the tensors must start at a multiple of 16 bytes";
    if (!(a.dropout >= 0.f && a.dropout < 1.f)) return "dropout must be in [0, 1)";
    if (!a.alpha != !a.beta || (a.alpha && a.exclusion))
        return "an epilogue has alpha and beta, or exclusion";
    return nullptr;
}

bool is_empty(const WindowAttentionArgs& a) {
    return a.batch < 1 || a.height < 1 || a.width < 1 || a.heads < 1;
}

}  // namespace

WA_EXPORT const char* WA_CUDA_NAME(supports)(const WindowAttentionArgs* a) { return why_not(*a); }

WA_EXPORT int64_t WA_CUDA_NAME(workspace)(const WindowAttentionArgs* a, int backward) {
    if (why_not(*a) || is_empty(*a)) return 0;
    if (!wa_small_supports(a)) return wa_small_workspace(a, backward);
    if (!backward) return 0;
    return a->dtype == WA_F32   ? wa_tiled_workspace_f32(*a)
           : a->dtype == WA_F16 ? wa_tiled_workspace_f16(*a)
                                : wa_tiled_workspace_bf16(*a);
}

#if defined(WA_EMU)
WA_EXPORT int wa_emu_forward(const WindowAttentionArgs* a) {
    void* stream = nullptr;
#else
WA_EXPORT int wa_cuda_forward(const WindowAttentionArgs* a, void* stream) {
#endif
    if (why_not(*a)) return WA_UNSUPPORTED;
    if (is_empty(*a)) return 0;
    if (!wa_small_supports(a)) return wa_small_forward(a, stream);
    return a->dtype == WA_F32   ? wa_tiled_forward_f32(*a, stream)
           : a->dtype == WA_F16 ? wa_tiled_forward_f16(*a, stream)
                                : wa_tiled_forward_bf16(*a, stream);
}

#if defined(WA_EMU)
WA_EXPORT int wa_emu_backward(const WindowAttentionArgs* a) {
    void* stream = nullptr;
#else
WA_EXPORT int wa_cuda_backward(const WindowAttentionArgs* a, void* stream) {
#endif
    if (why_not(*a)) return WA_UNSUPPORTED;
    if (is_empty(*a)) return 0;
    if (!wa_small_supports(a)) return wa_small_backward(a, stream);
    return a->dtype == WA_F32   ? wa_tiled_backward_f32(*a, stream)
           : a->dtype == WA_F16 ? wa_tiled_backward_f16(*a, stream)
                                : wa_tiled_backward_bf16(*a, stream);
}
