// The launches of small.cu under C names, for tests that build these kernels alone with the
// emulator.
#include "../cuda/small.h"
#define WA_EXPORT extern "C" __attribute__((visibility("default")))

WA_EXPORT const char* wa_emu_small_supports(const WindowAttentionArgs* args) {
    return wa_small_supports(args);
}
WA_EXPORT int wa_emu_small_forward(const WindowAttentionArgs* args) {
    return wa_small_forward(args, nullptr);
}
WA_EXPORT int wa_emu_small_backward(const WindowAttentionArgs* args) {
    return wa_small_backward(args, nullptr);
}
WA_EXPORT int64_t wa_emu_small_workspace(const WindowAttentionArgs* args, int backward) {
    return wa_small_workspace(args, backward);
}
