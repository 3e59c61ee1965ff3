// The CPU kernel in a program of its own, for processors that only an emulator runs: reads a call
// from its input, writes back what the call wrote. Input: WindowAttentionArgs as it lies in memory,
// then for each of its pointers but the workspace a number of bytes (int64, -1 for null) and these
// bytes. Output: the same without the structure, after a forward and, with a gradient of qkv, a
// backward.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <vector>

#include "kernels.h"

static void take(void* to, size_t bytes) {
    if (fread(to, 1, bytes, stdin) != bytes) exit(3);
}

int main() {
    WindowAttentionArgs args;
    take(&args, sizeof args);
    constexpr int POINTERS = 20;  // qkv .. grad_exclusion
    std::vector<std::vector<char>> memory(POINTERS);
    int64_t sizes[POINTERS];
    void** const pointers = reinterpret_cast<void**>(&args);
    for (int i = 0; i < POINTERS; ++i) {
        take(&sizes[i], sizeof sizes[i]);
        pointers[i] = nullptr;
        if (sizes[i] < 0) continue;
        memory[i].resize(static_cast<size_t>(sizes[i]) + 1);
        take(memory[i].data(), static_cast<size_t>(sizes[i]));
        pointers[i] = memory[i].data();
    }
    args.workspace = nullptr;
    if (wa_cpu_forward(&args)) return 4;
    std::vector<char> workspace;
    if (args.grad_qkv) {
        workspace.resize(static_cast<size_t>(wa_cpu_workspace(&args, 1)) + 1);
        args.workspace = workspace.data();
        if (wa_cpu_backward(&args)) return 5;
    }
    for (int i = 0; i < POINTERS; ++i) {
        fwrite(&sizes[i], 1, sizeof sizes[i], stdout);
        if (sizes[i] > 0) fwrite(memory[i].data(), 1, static_cast<size_t>(sizes[i]), stdout);
    }
    return 0;
}
