// Windows of up to 64 tokens: what launch.cu calls. Compiled by nvcc, or by a host compiler with
// the emulator.
//
// fp16 and bf16; head dims 16, 32, 64; any window sides with a product <= 64; everything args.h
// describes. All return at once on `stream`: no allocation, no synchronisation.
#pragma once
#include "../args.h"

// Null, or why these arguments are not for these kernels; also asks the current device for its
// shared memory.
const char* wa_small_supports(const WindowAttentionArgs* args);
// 0, or the error code of a launch.
int wa_small_forward(const WindowAttentionArgs* args, void* stream);
int wa_small_backward(const WindowAttentionArgs* args, void* stream);
// Bytes of args->workspace, for the current device; 0 for none.
int64_t wa_small_workspace(const WindowAttentionArgs* args, int backward);
