// Chooses and launches the kernels for windows of up to 64 tokens.
#include "small.h"

#include "epilogue_sums.h"
#include "small_launch.h"
#include "small_reduce.h"

// WA_SMALL_FEW narrows a build for tests to bf16 and head dim 32.
namespace {

constexpr int MOST_SPLITS = 65535;  // of a grid's y

// Blocks that a multiprocessor holds at a time, going by registers: all blocks of a launch run at
// once, so none is left over for the end
int blocks_at_a_time(const SmallProblem& p, bool backward) {
    const bool table = p.a.scale_rows > 1;
    if (!is_lean(p)) return 2;
    const bool epilogue = has_epilogue(p.a);
    if (!backward)
        return table && epilogue ? 2 : table || p.tokens > 56 || epilogue ? 3 : 4;
    return table || p.a.cosine || p.a.grad_scale || has_epilogue(p.a) ? 2 : 3;
}

SmallProblem problem_of(const WindowAttentionArgs& a, bool backward) {
    SmallProblem p{};
    p.a = a;
    p.tokens = a.window[0] * a.window[1];
    p.rows = (a.height + a.window[0] - 1) / a.window[0];
    p.columns = (a.width + a.window[1] - 1) / a.window[1];
    p.windows = a.batch * p.rows * p.columns;
    p.padded_height = p.rows * a.window[0];
    p.padded_width = p.columns * a.window[1];
    p.offsets = (2 * a.window[0] - 1) * (2 * a.window[1] - 1);
    p.threshold = a.seed && a.dropout > 0.f ? (uint32_t)((double)a.dropout * 4294967296.0) : 0u;
    p.keep_scale = p.threshold ? 1.f / (1.f - a.dropout) : 1.f;
    p.splits = multiprocessors() * blocks_at_a_time(p, backward) / a.heads;
    if (p.splits < 1) p.splits = 1;
    if (p.splits > p.windows) p.splits = p.windows;
    if (p.splits > MOST_SPLITS) p.splits = MOST_SPLITS;
    if (backward) {
        float* parts = static_cast<float*>(a.workspace);
        const int64_t size = (int64_t)p.splits * a.heads * p.offsets;
        if (a.grad_bias) { p.bias_parts = parts; parts += size; }
        if (a.grad_scale) { p.scale_parts = parts; parts += size; }
        if (a.grad_post) { p.post_parts = parts; parts += size; }
        p.own_sums = own_sums(a, p.windows, parts);
    }
    return p;
}

int run_any(const SmallProblem& p, bool backward, void* stream) {
#if !defined(WA_SMALL_FEW)
    if (p.a.dtype == WA_F16) return run_small_f16(p, backward, stream);
#endif
    return run_small_bf16(p, backward, stream);
}

template <int D> int general_backward_bytes(const SmallProblem& p) {
    return p.tokens <= 32 ? GeneralBackward<bf16, D, 4>::shared(p.a)
                          : GeneralBackward<bf16, D, 8>::shared(p.a);
}
// of shared memory; no more for the lean kernels than any device of sm_80 and later has
int backward_bytes(const SmallProblem& p) {
    if (is_lean(p)) return 0;
    if (p.a.head_dim == 16) return general_backward_bytes<16>(p);
    return p.a.head_dim == 32 ? general_backward_bytes<32>(p) : general_backward_bytes<64>(p);
}

}  // namespace

const char* wa_small_supports(const WindowAttentionArgs* args) {
    const WindowAttentionArgs& a = *args;
    if (a.dtype != WA_F16 && a.dtype != WA_BF16)
        return "the kernels for small windows take fp16 and bf16 only";
    if (a.head_dim != 16 && a.head_dim != 32 && a.head_dim != 64)
        return "head_dim is not 16, 32 or 64";
    if (a.window[0] < 1 || a.window[1] < 1 || a.window[0] * a.window[1] > 64)
        return "a window of the small kernels has 1 to 64 tokens";
    if (a.shift[0] < 0 || a.shift[1] < 0 || a.shift[0] >= a.window[0] || a.shift[1] >= a.window[1])
        return "shift is not in [0, window)";
    if (a.batch < 1 || a.height < 1 || a.width < 1 || a.heads < 1)
        return "an empty grid, batch or number of heads";
    if ((int64_t)a.batch * (a.height + a.window[0]) * (a.width + a.window[1]) > INT32_MAX)
        return "more than 2^31 tokens";
    if (a.dropout > 0.f && !a.seed) return "dropout needs a seed";
    const uintptr_t places[] = {(uintptr_t)a.qkv, (uintptr_t)a.out, (uintptr_t)a.grad_out,
                                (uintptr_t)a.grad_qkv};
    for (const uintptr_t place : places)
        if (place % 16) return "a tensor is not aligned to 16 bytes";
    if (a.grad_qkv && backward_bytes(problem_of(a, true)) > shared_bytes_max())
        return "the device has too little shared memory for all these gradients at once";
    return nullptr;
}

int wa_small_forward(const WindowAttentionArgs* args, void* stream) {
    return run_any(problem_of(*args, false), false, stream);
}

int wa_small_backward(const WindowAttentionArgs* args, void* stream) {
    const SmallProblem p = problem_of(*args, true);
    int code = run_any(p, true, stream);
    if (!code) code = launch_own_sums(p.a, p.own_sums, p.windows, stream);
    if (code || !(p.bias_parts || p.scale_parts || p.post_parts)) return code;
    SmallTables t{};
    t.parts[0] = p.bias_parts; t.parts[1] = p.scale_parts; t.parts[2] = p.post_parts;
    t.gradient[0] = p.a.grad_bias; t.gradient[1] = p.a.grad_scale; t.gradient[2] = p.a.grad_post;
    t.single[1] = p.a.scale_rows == 1;
    t.splits = p.splits; t.heads = p.a.heads; t.offsets = p.offsets;
    const int parts = (p.offsets + REDUCE_WIDTH - 1) / REDUCE_WIDTH;
    return launch(small_reduce, dim3(p.a.heads, 3, parts), dim3(REDUCE_THREADS), REDUCE_THREADS * 4,
                  stream, t);
}

int64_t wa_small_workspace(const WindowAttentionArgs* args, int backward) {
    if (!backward) return 0;
    const SmallProblem p = problem_of(*args, true);
    const int tables = (args->grad_bias != nullptr) + (args->grad_scale != nullptr) +
                       (args->grad_post != nullptr);
    return ((int64_t)tables * p.splits * p.a.heads * p.offsets +
            own_sums_count(*args, p.windows)) * 4;
}
