// The functions of one instruction set; its file defines WA_ISA (namespace), WA_NAME, and
// WA_MULTIPLIES_BF16 if it multiplies bf16 itself.
#pragma once
#include "backward.h"
#include "gelu.h"

namespace wa {
namespace WA_ISA {

#ifdef WA_MULTIPLIES_BF16
using UnitOfBf16 = Pairs;
#else
using UnitOfBf16 = Floats;
#endif

template <template <class> class Pass, class Unit>
static int64_t measure(const Job* job) {
    Carver carver{nullptr, 0};
    Pass<Unit> pass(job, 0, &carver);
    return carver.used;
}

static int64_t scratch(const Job* job, int backward) {
    if (job->args->dtype == WA_BF16)
        return backward ? measure<Backward, UnitOfBf16>(job) : measure<Forward, UnitOfBf16>(job);
    return backward ? measure<Backward, Floats>(job) : measure<Forward, Floats>(job);
}

template <template <class> class Pass>
static void task(const Job* job, int group, int run, void* memory) {
    Carver carver{(char*)memory, 0};
#ifdef WA_TILES
    [[maybe_unused]] const Tiles tiles;
#endif
    if (job->args->dtype == WA_BF16) Pass<UnitOfBf16>(job, group, &carver).template run<Bf16>(run);
    else if (job->args->dtype == WA_F16) Pass<Floats>(job, group, &carver).template run<Half>(run);
    else Pass<Floats>(job, group, &carver).template run<float>(run);
}

}  // namespace WA_ISA

extern const Kernels WA_KERNELS = {WA_NAME, WA_ISA::scratch, WA_ISA::task<WA_ISA::Forward>,
                                   WA_ISA::task<WA_ISA::Backward>, WA_ISA::gelu};

}  // namespace wa
