// One call as the kernels of every instruction set see it, and the table of functions that each
// instruction set fills. The files that include this are compiled with different processor flags:
// no templates of the standard library here, because the linker would keep one of their copies for
// all.
#pragma once
#include <stdint.h>

#include "../args.h"
#include "../gelu.h"

namespace wa {

constexpr float LOG2E = 1.44269504088896341f, LN2 = 0.693147180559945309f;

// Work is cut into tasks, one per group of heads and run of windows. Sums are kept per head and
// run, so no result depends on the groups.
struct Job {
    const WindowAttentionArgs* args;
    int down, across;   // windows per image, down and across
    int area, offsets;  // N, T
    int runs, run;      // runs of windows per head; windows in a run
    int groups, group;  // groups of heads; heads in a group, in the last one perhaps fewer
    int64_t windows;    // in all images
    // backward: (heads, runs, partial_size) sums of the gradients of scale, bias, post, alpha, beta
    // and exclusion as far as asked for
    float* partial;
    int partial_size;
};

struct Kernels {
    const char* name;
    // bytes of scratch, aligned to 64, that one task needs
    int64_t (*scratch)(const Job*, int backward);
    void (*forward)(const Job*, int group, int run, void* scratch);
    void (*backward)(const Job*, int group, int run, void* scratch);
    void (*gelu)(const GeluArgs*, int64_t block, int backward);
};

// Rows of a GELU worked on in one task: about 48 thousand numbers.
static inline int64_t rows_of_block(int64_t width) { return width >= 49152 ? 1 : 49152 / width; }

static inline int up(int count, int multiple) {
    return (count + multiple - 1) / multiple * multiple;
}
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace wa
