// Host side of the tiled kernels for one data type: picks the instance, plans it, launches it.
#pragma once
#include "epilogue_sums.h"
#include "tiled.h"
#include "tiled_plan.h"

namespace tiled {

constexpr int kNothingFits = 1;  // cudaErrorInvalidValue: shared memory of this device is too small

// Where the backward's scratch lies. Tables whose sums do not fit side by side are summed in
// several runs of the query kernel.
struct Runs {
    Plan plan[3];
    int count = 0;
    int64_t partial = 0;  // floats of the largest
};

inline int64_t queries_of(const Args& p) { return int64_t{p.total} * p.a.heads * p.area; }
inline int64_t blocks_of_head(const Plan& plan) {
    return static_cast<int64_t>(plan.grid.y) * plan.grid.z;
}
inline int64_t floats_of(const Plan& plan) {
    int64_t rows = 0;
    for (int bit = 0; bit < 3; ++bit) rows += plan.p.grads >> bit & 1 ? plan.p.offsets : 0;
    rows += plan.p.grads & kGradUniform ? 1 : 0;
    return blocks_of_head(plan) * plan.p.a.heads * rows;
}

template <typename T, int D, int Mode> struct Kernels {
    static constexpr int registers = blocks_wanted<T, D, Mode>() == 2 ? 128 : 255;
    static constexpr int key_registers = 65536 / (kKeyThreads * key_blocks<T, D, Mode>());
    using Forward = ForwardShared<T, D, Mode>;
    using Queries = QueryShared<T, D, Mode>;
    using Keys = KeyShared<T, D, Mode>;

    static Plan plan_forward(const WindowAttentionArgs& a) {
        return plan_passes<Forward>(describe(a), kMaxThreads / 32, registers);
    }
    static Plan plan_keys(const WindowAttentionArgs& a) {
        return plan_passes<Keys>(describe(a), kKeyThreads / 32, key_registers);
    }

    static int forward(const WindowAttentionArgs& a, void* stream) {
        const Plan plan = for_call(remembered<plan_forward>(a), a);
        const auto kernel = has_epilogue(a) ? forward_kernel<T, D, Mode, true>
                                            : forward_kernel<T, D, Mode, false>;
        return plan.bytes ? launch(kernel, plan.grid, plan.block, plan.bytes, stream, plan.p)
                          : kNothingFits;
    }

    static Runs plan_runs(const WindowAttentionArgs& a) {
        Args p = describe(a);
        const int uniform = a.grad_scale && a.scale_rows == 1 ? kGradUniform : 0;
        const int pairs = (a.grad_bias ? kGradBias : 0) |
                          (a.grad_scale && !uniform ? kGradScale : 0) |
                          (a.grad_post ? kGradPost : 0);
        Runs runs;
        p.grads = pairs | uniform;
        const bool epilogue = has_epilogue(a);
        const int each = epilogue ? 255 : registers;
        const int threads = epilogue ? query_threads<T, D, Mode, true>()
                                     : query_threads<T, D, Mode, false>();
        runs.plan[0] = plan_queries<T, Queries>(p, each, threads);
        if (runs.plan[0].bytes) {
            runs.count = 1;
        } else {
            for (int bit = 0; bit < 3; ++bit)
                if (pairs >> bit & 1) {
                    p.grads = 1 << bit | (runs.count == 0 ? uniform : 0);
                    runs.plan[runs.count] = plan_queries<T, Queries>(p, each, threads);
                    if (!runs.plan[runs.count++].bytes) return Runs{};
                }
        }
        for (int run = 0; run < runs.count; ++run)
            runs.partial = std::max(runs.partial, floats_of(runs.plan[run]));
        return runs;
    }

    static int64_t workspace(const WindowAttentionArgs& a) {
        const Args p = describe(a);
        return (queries_of(p) * (sizeof(T) == 4 ? 2 : 1) + own_sums_count(a, p.total) +
                remembered<plan_runs>(a).partial) *
               4;
    }

    static int sum_tables(const Plan& plan, void* stream) {
        const WindowAttentionArgs& a = plan.p.a;
        float* const grads[4] = {a.grad_bias, a.grad_scale, a.grad_post, a.grad_scale};
        const float* from = plan.p.partial;
        for (int bit = 0; bit < 4; ++bit) {
            if (!(plan.p.grads >> bit & 1)) continue;
            const int rows = bit == 3 ? 1 : plan.p.offsets;
            const int code = launch(sum_blocks_kernel, dim3((a.heads * rows + 255) / 256),
                                    dim3(256), 0, stream, from, grads[bit], blocks_of_head(plan),
                                    static_cast<int>(a.heads), rows);
            if (code) return code;
            from += blocks_of_head(plan) * a.heads * rows;
        }
        return 0;
    }

    static int backward(const WindowAttentionArgs& a, void* stream) {
        Runs runs = remembered<plan_runs>(a);
        Plan keys = for_call(remembered<plan_keys>(a), a);
        if (!runs.count || !keys.bytes) return kNothingFits;
        const bool epilogue = has_epilogue(a);
        const auto queries = epilogue ? query_kernel<T, D, Mode, true>
                                      : query_kernel<T, D, Mode, false>;
        const auto of_keys = epilogue ? key_kernel<T, D, Mode, true>
                                      : key_kernel<T, D, Mode, false>;
        float* const delta = static_cast<float*>(a.workspace);
        float* const map_rescale = sizeof(T) == 4 ? delta + queries_of(keys.p) : nullptr;
        float* const own = delta + queries_of(keys.p) * (map_rescale ? 2 : 1);
        keys.p.own_sums = own_sums(a, keys.p.total, own);
        for (int run = 0; run < runs.count; ++run) {
            Plan plan = for_call(runs.plan[run], a);
            plan.p.delta = delta;
            plan.p.map_rescale = map_rescale;
            plan.p.own_sums = keys.p.own_sums;
            plan.p.partial = own + own_sums_count(a, keys.p.total);
            int code = launch(queries, plan.grid, plan.block, plan.bytes, stream, plan.p);
            if (!code) code = sum_tables(plan, stream);
            if (code) return code;
        }
        keys.p.delta = delta;
        keys.p.map_rescale = map_rescale;
        const int code = launch(of_keys, keys.grid, keys.block, keys.bytes, stream, keys.p);
        return code ? code : launch_own_sums(a, keys.p.own_sums, keys.p.total, stream);
    }
};

// Calls `use` with the instance for these arguments. Only head dimension 32 in 16 bits has kernels
// without the terms that are seldom used.
template <typename T, typename Use> auto with_kernels(const WindowAttentionArgs& a, Use use) {
    const int mode = mode_of(a);
    if constexpr (sizeof(T) == 2) {
        if (a.head_dim == 32 && mode == kUniform) return use(Kernels<T, 32, kUniform>{});
        if (a.head_dim == 32 && mode == kTable) return use(Kernels<T, 32, kTable>{});
    }
    if (a.head_dim == 16) return use(Kernels<T, 16, kFull>{});
    return a.head_dim == 32 ? use(Kernels<T, 32, kFull>{}) : use(Kernels<T, 64, kFull>{});
}

}  // namespace tiled

#define WA_TILED_FOR(NAME, T)                                                                     \
    int wa_tiled_forward_##NAME(const WindowAttentionArgs& a, void* stream) {                     \
        return tiled::with_kernels<T>(a,                                                          \
                                      [&](auto kernels) { return kernels.forward(a, stream); });  \
    }                                                                                             \
    int wa_tiled_backward_##NAME(const WindowAttentionArgs& a, void* stream) {                    \
        return tiled::with_kernels<T>(a,                                                          \
                                      [&](auto kernels) { return kernels.backward(a, stream); }); \
    }                                                                                             \
    int64_t wa_tiled_workspace_##NAME(const WindowAttentionArgs& a) {                             \
        return tiled::with_kernels<T>(a, [&](auto kernels) { return kernels.workspace(a); });     \
    }
