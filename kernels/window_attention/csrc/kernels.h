// The functions that a device offers, called by binding.cpp. All return at once with a nonzero code
// where they fail, and never print.
#pragma once
#include <stdint.h>

#include "args.h"
#include "gelu.h"

#ifdef __cplusplus
extern "C" {
#endif

// Null where the kernel can do these arguments (of a pointer, only whether it is null counts), else
// one clause that says why not.
const char* wa_cpu_supports(const WindowAttentionArgs* args);
const char* wa_cuda_supports(const WindowAttentionArgs* args);

// Bytes of scratch that the forward (backward = 0) or the backward (1) wants in args->workspace; 0
// is none.
int64_t wa_cpu_workspace(const WindowAttentionArgs* args, int backward);
int64_t wa_cuda_workspace(const WindowAttentionArgs* args, int backward);

int wa_cpu_forward(const WindowAttentionArgs* args);
int wa_cpu_backward(const WindowAttentionArgs* args);

// The blocks of rows that a GELU is cut into, whatever the number of threads.
int64_t wa_cpu_gelu_blocks(int64_t rows, int64_t width);
int wa_cpu_gelu(const GeluArgs* args, int backward);

// Lets the CPU kernel use a pool of threads that exists: run(count, body, of) calls body(begin,
// end, of) on pieces of [0, count), at best each in a thread of its own. Without it the kernel
// makes its own threads.
void wa_cpu_set_parallel_for(void (*run)(int64_t count,
                                         void (*body)(int64_t begin, int64_t end, void* of),
                                         void* of));

// stream: a cudaStream_t of the current device; the work is queued on it, nothing waits.
int wa_cuda_forward(const WindowAttentionArgs* args, void* stream);
int wa_cuda_backward(const WindowAttentionArgs* args, void* stream);

#ifdef __cplusplus
}
#endif
