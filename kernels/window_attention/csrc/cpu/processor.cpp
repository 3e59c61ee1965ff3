#include "processor.h"

#include <stdlib.h>
#include <string.h>
#if defined(WA_HAVE_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace wa {

extern const Kernels kernels_scalar, kernels_amx_emulated;
#ifdef WA_HAVE_AVX2
extern const Kernels kernels_avx2;
#endif
#ifdef WA_HAVE_AVX512
extern const Kernels kernels_avx512;
#endif
#ifdef WA_HAVE_AVX512_BF16
extern const Kernels kernels_avx512_bf16;
#endif

#ifdef WA_HAVE_AMX
extern const Kernels kernels_amx;
#endif

namespace {

#ifdef WA_HAVE_AMX
// The processor multiplies tiles of bf16, and the system lets this process have the eight kilobytes
// of tiles, which it must ask for.
bool may_use_tiles() {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
    constexpr long ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}
#endif

struct Entry {
    const Kernels* kernels;
    bool runs;       // on this processor
    bool automatic;  // taken without being asked for
};

Choice choose() {
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
#endif
    // the last that runs is the best
    const Entry entries[] = {
        {&kernels_scalar, true, true},
#ifdef WA_HAVE_AVX2
        {&kernels_avx2,
         __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c"),
         true},
#endif
#ifdef WA_HAVE_AVX512
        {&kernels_avx512,
         __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"),
         true},
#endif
#ifdef WA_HAVE_AVX512_BF16
        {&kernels_avx512_bf16,
         __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"),
         true},
#endif
#ifdef WA_HAVE_AMX
        {&kernels_amx,
         __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
             may_use_tiles(),
         true},
#endif
        {&kernels_amx_emulated, true, false},
    };
    const char* wanted = getenv("WINDOW_ATTENTION_CPU_ISA");
    Choice choice{&kernels_scalar, nullptr};
    if (wanted && *wanted)
        choice.refusal =
            "WINDOW_ATTENTION_CPU_ISA names an instruction set that this build does not have";
    for (const Entry& entry : entries) {
        if (!wanted || !*wanted) {
            if (entry.runs && entry.automatic) choice.kernels = entry.kernels;
        } else if (!strcmp(entry.kernels->name, wanted)) {
            choice.refusal = entry.runs ? nullptr
                                        : "WINDOW_ATTENTION_CPU_ISA names an instruction set that "
                                          "this processor does not have";
            if (entry.runs) choice.kernels = entry.kernels;
        }
    }
    return choice;
}

}  // namespace

const Choice& chosen() {
    static const Choice choice = choose();
    return choice;
}

}  // namespace wa
