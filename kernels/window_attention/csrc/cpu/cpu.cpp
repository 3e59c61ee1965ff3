// Entry points of the CPU kernel (kernels.h): chooses the instruction set, cuts the work into
// tasks, sums what they leave.
#include "../kernels.h"

#include <stdlib.h>
#include <string.h>

#include "denormals.h"
#include "job.h"
#include "processor.h"
#include "threads.h"

namespace {

using wa::Job;
using wa::Kernels;

int ceiling(int count, int of) { return (count + of - 1) / of; }

// The heads of a token lie together in memory, so a task takes several, as far as their tables stay
// in the second-level cache and every thread still finds a few tasks.
void group_heads(Job* job, int backward) {
    const WindowAttentionArgs& a = *job->args;
    const int tables = (a.scale_rows > 1) + (a.bias != nullptr) + (a.post != nullptr);
    const int64_t bytes = int64_t(4) * job->area * (job->area + 15) * tables * (backward ? 2 : 1);
    const int64_t cache = 320 << 10;
    int64_t most = bytes ? cache / bytes : a.heads;
    if (a.threads > 1) most = wa::least(most, a.heads * int64_t(job->runs) / (4 * a.threads));
    job->groups = ceiling(a.heads, most < 1 ? 1 : int(wa::least(most, a.heads)));
    job->group = ceiling(a.heads, job->groups);
    job->groups = ceiling(a.heads, job->group);
}

Job make_job(const WindowAttentionArgs* a, int backward) {
    Job job{};
    job.args = a;
    job.down = ceiling(a->height, a->window[0]), job.across = ceiling(a->width, a->window[1]);
    job.area = a->window[0] * a->window[1];
    job.offsets = (2 * a->window[0] - 1) * (2 * a->window[1] - 1);
    job.windows = int64_t(a->batch) * job.down * job.across;
    // the tables are spread once per task: many small windows in one, few large ones
    job.run = job.area >= 1024 ? 1 : 1024 / job.area < 16 ? 1024 / job.area : 16;
    job.runs = int((job.windows + job.run - 1) / job.run);
    group_heads(&job, backward);
    if (backward) {
        job.partial = static_cast<float*>(a->workspace);
        job.partial_size = (a->grad_scale ? a->scale_rows : 0) + (a->grad_bias ? job.offsets : 0) +
                           (a->grad_post ? job.offsets : 0) + (a->grad_alpha != nullptr) +
                           (a->grad_beta != nullptr) + (a->grad_exclusion != nullptr);
    }
    return job;
}

struct Call {
    const Job* job;
    const Kernels* kernels;
    int backward;
    int64_t scratch;
};

void run_task(int64_t task, void* of) {
    const Call& call = *static_cast<const Call*>(of);
    // they vary fastest: the rows of one token lie together in memory
    const int groups = call.job->groups;
    void* scratch = wa::scratch_of_thread(call.scratch);
    if (!scratch) return wa::report_failure();
    const wa::FlushDenormals flush;
    (call.backward ? call.kernels->backward : call.kernels->forward)(call.job, int(task % groups),
                                                                     int(task / groups), scratch);
}

// Adds the runs of one head in their order.
void sum_head(int64_t head, void* of) {
    const Job& job = *static_cast<const Call*>(of)->job;
    const WindowAttentionArgs& a = *job.args;
    const float* from = job.partial + head * job.runs * job.partial_size;
    float* const tables[6] = {a.grad_scale, a.grad_bias, a.grad_post,
                              a.grad_alpha, a.grad_beta, a.grad_exclusion};
    const int rows[6] = {a.scale_rows, job.offsets, job.offsets, 1, 1, 1};
    for (int which = 0; which < 6; ++which) {
        if (!tables[which]) continue;
        for (int t = 0; t < rows[which]; ++t) {
            double total = 0;
            for (int run = 0; run < job.runs; ++run)
                total += from[int64_t(run) * job.partial_size + t];
            tables[which][int64_t(t) * a.heads + head] = float(total);
        }
        from += rows[which];
    }
}

struct GeluCall {
    const GeluArgs* args;
    const Kernels* kernels;
    int backward;
};

void run_gelu(int64_t block, void* of) {
    const GeluCall& call = *static_cast<const GeluCall*>(of);
    const wa::FlushDenormals flush;
    call.kernels->gelu(call.args, block, call.backward);
}

int run(const WindowAttentionArgs* a, int backward) {
    if (wa_cpu_supports(a)) return 1;
    const Job job = make_job(a, backward);
    const Kernels* kernels = wa::chosen().kernels;
    Call call{&job, kernels, backward, kernels->scratch(&job, backward)};
    if (!wa::run_tasks(int64_t(job.runs) * job.groups, a->threads, run_task, &call)) return 2;
    if (job.partial_size) wa::run_tasks(a->heads, a->threads, sum_head, &call);
    return 0;
}

}  // namespace

extern "C" {

const char* wa_cpu_supports(const WindowAttentionArgs* a) {
    if (const char* refusal = wa::chosen().refusal) return refusal;
    if (a->dtype != WA_F32 && a->dtype != WA_F16 && a->dtype != WA_BF16)
        return "the dtype is not float32, float16 or bfloat16";
    if (a->head_dim < 8 || a->head_dim % 8 || a->head_dim > 256)
        return "the head dimension is not a multiple of 8 up to 256";
    if (a->window[0] < 1 || a->window[1] < 1 || a->window[0] > 32 || a->window[1] > 32)
        return "a side of the window is not in 1 .. 32";
    for (int axis = 0; axis < 2; ++axis)
        if (a->shift[axis] < 0 || a->shift[axis] >= a->window[axis])
            return "the shift is not in 0 .. window - 1";
    const int offsets = (2 * a->window[0] - 1) * (2 * a->window[1] - 1);
    if (a->scale_rows != 1 && a->scale_rows != offsets)
        return "the scale has neither one row nor one for each offset";
    if (!(a->dropout >= 0 && a->dropout < 1)) return "the dropout is not in [0, 1)";
    if (!a->alpha != !a->beta) return "alpha and beta of an affine epilogue come together";
    if (a->alpha && a->exclusion) return "the epilogue is affine or exclusive, not both";
    return nullptr;
}

int64_t wa_cpu_workspace(const WindowAttentionArgs* a, int backward) {
    if (!backward) return 0;
    const Job job = make_job(a, backward);
    return int64_t(a->heads) * job.runs * job.partial_size * int64_t(sizeof(float));
}

int wa_cpu_forward(const WindowAttentionArgs* a) { return run(a, 0); }
int wa_cpu_backward(const WindowAttentionArgs* a) { return run(a, 1); }

int64_t wa_cpu_gelu_blocks(int64_t rows, int64_t width) {
    const int64_t step = width > 0 ? wa::rows_of_block(width) : 1;
    return (rows + step - 1) / step;
}

int wa_cpu_gelu(const GeluArgs* a, int backward) {
    if (wa::chosen().refusal) return 1;
    const int64_t blocks = wa_cpu_gelu_blocks(a->rows, a->width);
    GeluCall call{a, wa::chosen().kernels, backward};
    if (a->width > 0 && !wa::run_tasks(blocks, a->threads, run_gelu, &call)) return 2;
    if (!backward) return 0;
    for (int64_t c = 0; c < a->width; ++c) a->grad_bias[c] = 0;
    for (int64_t block = 0; block < blocks; ++block)
        for (int64_t c = 0; c < a->width; ++c) a->grad_bias[c] += a->partial[block * a->width + c];
    return 0;
}

const char* wa_cpu_instructions(void) { return wa::chosen().kernels->name; }
const char* wa_cpu_best(unsigned features) { return wa::best(features); }

}  // extern "C"
