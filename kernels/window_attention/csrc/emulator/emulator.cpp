// The emulator's settings, for tests that load the emulated kernels through their C interface.
#include "instructions.h"

#define WA_EXPORT extern "C" __attribute__((visibility("default")))

// Seed of the order in which threads and blocks run, from the next launch on.
WA_EXPORT void wa_emu_set_seed(uint64_t seed) { wa_emu::settings.seed = seed; }
// What the kernels see as the number of multiprocessors: decides over how many blocks the windows
// of a head are spread.
WA_EXPORT void wa_emu_set_multiprocessors(int count) { wa_emu::settings.multiprocessors = count; }
// Bytes of shared memory a block may have (sm_80: 166912, sm_86, sm_89 and sm_120: 101376, sm_90
// and sm_100: 232448).
WA_EXPORT void wa_emu_set_shared_bytes(int bytes) { wa_emu::settings.shared_bytes = bytes; }
// What ended this thread's last launch, or an empty text.
WA_EXPORT const char* wa_emu_fault() { return wa_emu::fault_message.c_str(); }
// This thread's counters since the last call: switches, barriers, warp collectives, mma, ldmatrix
// and its wavefronts, cp.async, launches.
WA_EXPORT void wa_emu_take_counters(uint64_t (&out)[8]) {
    static_assert(sizeof(wa_emu::Counters) == sizeof(out), "one number a field");
    memcpy(out, &wa_emu::counters, sizeof(out));
    wa_emu::counters = {};
}
