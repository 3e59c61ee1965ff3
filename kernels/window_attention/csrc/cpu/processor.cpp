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

unsigned features() {
    unsigned found = 0;
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_cpu_init();
    const auto add = [&](bool has, unsigned feature) { found |= has ? feature : 0; };
#ifdef WA_HAVE_AVX2
    add(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
            __builtin_cpu_supports("f16c"),
        WA_AVX2);
#endif
#ifdef WA_HAVE_AVX512
    add(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"),
        WA_AVX512);
#endif
#ifdef WA_HAVE_AVX512_BF16
    add((found & WA_AVX512) && __builtin_cpu_supports("avx512bf16"), WA_AVX512_BF16);
#endif
#ifdef WA_HAVE_AMX
    add((found & WA_AVX512) && __builtin_cpu_supports("avx512bf16") && may_use_tiles(), WA_TILES);
#endif
    add(__builtin_cpu_is("intel"), WA_INTEL);
#endif
    return found;
}

struct Entry {
    const Kernels* kernels;
    unsigned needs;  // features without which it does not run
    bool automatic;  // taken without being asked for
};

Choice choose(unsigned has, const char* wanted) {
    // the last that runs is the best
    const Entry entries[] = {
        {&kernels_scalar, 0, true},
#ifdef WA_HAVE_AVX2
        {&kernels_avx2, WA_AVX2, true},
#endif
#ifdef WA_HAVE_AVX512
        {&kernels_avx512, WA_AVX512, true},
#endif
#ifdef WA_HAVE_AVX512_BF16
        // Intel's dot products of bf16 take longer than float32 with the conversions around it
        {&kernels_avx512_bf16, WA_AVX512_BF16, !(has & WA_INTEL)},
#endif
#ifdef WA_HAVE_AMX
        {&kernels_amx, WA_TILES, true},
#endif
        {&kernels_amx_emulated, 0, false},
    };
    Choice choice{&kernels_scalar, nullptr};
    if (wanted && *wanted)
        choice.refusal =
            "WINDOW_ATTENTION_CPU_ISA names an instruction set that this build does not have";
    for (const Entry& entry : entries) {
        const bool runs = (has & entry.needs) == entry.needs;
        if (!wanted || !*wanted) {
            if (runs && entry.automatic) choice.kernels = entry.kernels;
        } else if (!strcmp(entry.kernels->name, wanted)) {
            choice.refusal = runs ? nullptr
                                  : "WINDOW_ATTENTION_CPU_ISA names an instruction set that "
                                    "this processor does not have";
            if (runs) choice.kernels = entry.kernels;
        }
    }
    return choice;
}

}  // namespace

const Choice& chosen() {
    static const Choice choice = choose(features(), getenv("WINDOW_ATTENTION_CPU_ISA"));
    return choice;
}

const char* best(unsigned has) { return choose(has, nullptr).kernels->name; }

}  // namespace wa
