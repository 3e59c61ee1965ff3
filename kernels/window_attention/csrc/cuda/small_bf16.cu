// bf16 instances of the kernels for windows of up to 64 tokens
#include "small_launch.h"

int run_small_bf16(const SmallProblem& p, bool backward, void* stream) {
    return run_small<bf16>(p, backward, stream);
}
