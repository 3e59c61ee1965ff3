// Runs the threads of one CUDA block on one host thread: a fibre per CUDA thread, resumed in random
// order.
//
// A fibre leaves the host thread only where CUDA lets another thread overtake it: at a barrier or a
// warp collective. Which ready fibre goes on is drawn anew each time, so code that leans on an
// order nobody promised gives a wrong answer under some seed. What goes wrong ends the launch with
// a message (Faults): nothing is printed, nothing aborts.
#pragma once
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace wa_emu {

constexpr int WARP = 32, MAX_NAMED_BARRIERS = 16;
constexpr size_t STACK_BYTES = 256 << 10;
constexpr size_t MAX_SHARED_BYTES = 232448;  // what a block may ask for on sm_90
constexpr uint64_t STACK_MARK = 0x57ac4ed5ull * 0x9E3779B97F4A7C15ull;

// What a test can ask for and read back; process-wide, see emulator.cpp for the C functions.
struct Settings {
    uint64_t seed = 0;
    int multiprocessors = 2;
    int shared_bytes = MAX_SHARED_BYTES;
};
struct Counters {
    uint64_t switches, barriers, collectives, mma, ldmatrix, ldmatrix_wavefronts, copies, launches;
};
inline Settings settings;
inline thread_local Counters counters{};
inline thread_local std::string fault_message;

struct Random {  // xorshift64*, seeded through one step of splitmix64 so that seeds 0, 1, 2 differ
    uint64_t state;
    explicit Random(uint64_t seed = 0) {
        const uint64_t z = seed + 0x9E3779B97F4A7C15ull;
        state = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull | 1;
    }
    uint32_t below(uint32_t n) {
        state ^= state >> 12; state ^= state << 25; state ^= state >> 27;
        return (uint32_t)(((state * 0x2545F4914F6CDD1Dull) >> 32) * n >> 32);
    }
};

struct Copy { void* to; const void* from; int bytes, zeros; };  // one cp.async under way
struct Fiber {
#if defined(__x86_64__)
    void* stack_pointer = nullptr;
#else
    ucontext_t context;
#endif
    std::unique_ptr<char[]> stack;
    int index = 0;
    bool done = false;
    const char* waits_for = nullptr;  // null while ready
    std::vector<std::vector<Copy>> groups;
    std::vector<Copy> open;
};
struct Rendezvous {  // of the 32 lanes of a warp
    const void* in[WARP];
    void* out[WARP];
    uint64_t kind[WARP];
    int arrived = 0;
};
struct Barrier { std::vector<int> waiting; int expected = 0; };

struct Block {
    std::vector<Fiber> fibers;
    std::vector<Rendezvous> warps;
    std::vector<int> ready;
    Barrier barriers[MAX_NAMED_BARRIERS];
    std::vector<unsigned char> shared_bytes;
    unsigned char* shared = nullptr;
    size_t shared_size = 0;
    int threads = 0, current = 0;
    // of one warp: it waits for all others where it can, or runs ahead of them
    enum { EVEN, LATE, EARLY } pace = EVEN;
    int odd_warp = 0, odd_ready = 0;         // which; how many of `ready` are its
    bool failed = false;
    dim3 block_index, block_size, grid_size;
    std::function<void()> body;
    Random random;
#if defined(__x86_64__)
    void* main_stack_pointer = nullptr;
#else
    ucontext_t main_context;
#endif
    Fiber& self() { return fibers[current]; }
};
inline thread_local Block* block = nullptr;

#if defined(__x86_64__)
// System V: a call may change all registers but these six; so may a fibre
extern "C" __attribute__((naked, noinline, used)) inline void wa_emu_switch(void** /*save*/,
                                                                            void* /*load*/) {
    asm volatile("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
                 "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
                 "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
inline void to_main() { wa_emu_switch(&block->self().stack_pointer, block->main_stack_pointer); }
inline void to_fiber(Fiber& f) { wa_emu_switch(&block->main_stack_pointer, f.stack_pointer); }
#else
inline void to_main() { swapcontext(&block->self().context, &block->main_context); }
inline void to_fiber(Fiber& f) { swapcontext(&block->main_context, &f.context); }
#endif

// Ends the launch from inside a fibre: the block's other fibres are never resumed.
[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fault(const char* format, ...) {
    char text[256], where[96];
    va_list list; va_start(list, format); vsnprintf(text, sizeof(text), format, list); va_end(list);
    const Block& b = *block;
    snprintf(where, sizeof(where), " (thread %d, block %u,%u)", b.fibers[b.current].index,
             b.block_index.x, b.block_index.y);
    fault_message = std::string(text) + where;
    block->failed = true;
    for (;;) to_main();
}

inline void wait(const char* reason) { block->self().waits_for = reason; to_main(); }
inline void make_ready(int index) {
    block->ready.push_back(index);
    block->odd_ready += index / WARP == block->odd_warp;
}
inline void wake(int index) { block->fibers[index].waits_for = nullptr; make_ready(index); }

// Takes one of those that are ready, at random as far as the pace leaves a choice.
inline int next_ready() {
    Block& b = *block;
    const int count = (int)b.ready.size();
    int pick = (int)b.random.below((uint32_t)count);
    if (b.pace != Block::EVEN && b.odd_ready > 0 && b.odd_ready < count)
        while ((b.ready[pick] / WARP == b.odd_warp) != (b.pace == Block::EARLY))
            pick = (pick + 1) % count;
    const int index = b.ready[pick];
    b.ready[pick] = b.ready.back(); b.ready.pop_back();
    b.odd_ready -= index / WARP == b.odd_warp;
    return index;
}

inline void fiber_main() {
    block->body();
    Fiber& f = block->self();
    if (!f.open.empty()) fault("cp.async never committed");
    for (const auto& group : f.groups) if (!group.empty()) fault("cp.async never waited for");
    f.done = true;
    for (;;) to_main();
}

inline void prepare(Fiber& f, int index) {
    if (!f.stack) f.stack.reset(new char[STACK_BYTES]);
    f.index = index; f.done = false; f.waits_for = nullptr; f.groups.clear(); f.open.clear();
    memcpy(f.stack.get(), &STACK_MARK, sizeof(STACK_MARK));
#if defined(__x86_64__)
    void** top = (void**)(((uintptr_t)f.stack.get() + STACK_BYTES) & ~(uintptr_t)15);
    // "returned into" with the stack 8 off 16, as after a call
    *--top = nullptr; *--top = (void*)&fiber_main;
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    f.stack_pointer = top;
#else
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = STACK_BYTES;
    f.context.uc_link = nullptr;
    makecontext(&f.context, (void (*)())fiber_main, 0);
#endif
}

// bar.sync id, expected: all threads of the block for __syncthreads
inline void barrier(int id, int expected) {
    Barrier& b = block->barriers[id];
    if (b.waiting.empty()) b.expected = expected;
    if (b.expected != expected)
        fault("barrier %d entered with %d and with %d threads", id, b.expected, expected);
    if ((int)b.waiting.size() + 1 < expected) {
        b.waiting.push_back(block->current);
        wait("barrier");
        return;
    }
    for (int i : b.waiting) wake(i);
    b.waiting.clear();
    counters.barriers++;
}

// The lanes of a warp meet; the last one there does the work of all. kind: what is done and where,
// and must be one for the warp.
template <typename F> inline void collective(const char* name, uint64_t kind, const void* in,
                                             void* out, F work) {
    const int warp = block->current / WARP, lane = block->current % WARP;
    Rendezvous& r = block->warps[warp];
    r.in[lane] = in; r.out[lane] = out; r.kind[lane] = kind;
    if (++r.arrived < WARP) { wait(name); return; }
    for (int i = 0; i < WARP; ++i)
        if (r.kind[i] != kind)
            fault("divergent warp collective: lane %d is at %s, lane %d elsewhere", lane, name, i);
    work(r);
    r.arrived = 0;
    counters.collectives++;
    for (int i = 0; i < WARP; ++i) if (i != lane) wake(warp * WARP + i);
}

inline bool refuse(const char* why) { fault_message = why; return false; }

inline bool run_block() {
    Block& b = *block;
    b.failed = false;
    for (auto& bar : b.barriers) bar.waiting.clear();
    for (auto& w : b.warps) w.arrived = 0;
    memset(b.shared, 0xff, b.shared_size);  // NaN in every float type
    b.ready.clear();
    b.pace = (decltype(b.pace))b.random.below(3);
    b.odd_warp = (int)b.random.below((uint32_t)b.warps.size());
    b.odd_ready = 0;
    for (int i = 0; i < b.threads; ++i) { prepare(b.fibers[i], i); make_ready(i); }
    while (!b.ready.empty()) {
        b.current = next_ready();
        counters.switches++;
        to_fiber(b.self());
        if (b.failed) return false;
        if (memcmp(b.self().stack.get(), &STACK_MARK, sizeof(STACK_MARK)) != 0)
            return refuse("stack of a thread overflowed");
    }
    for (int i = 0; i < b.threads; ++i)
        if (!b.fibers[i].done) {
            int waiting = 0;
            for (const Fiber& f : b.fibers) waiting += !f.done;
            fault_message = "deadlock: " + std::to_string(waiting) + " of " +
                            std::to_string(b.threads) + " threads wait, thread " +
                            std::to_string(i) + " at " + b.fibers[i].waits_for;
            return false;
        }
    return true;
}

// Runs `body` for every thread of every block, the blocks one after another in random order. 0, or
// 1 with fault_message set.
inline int launch(dim3 grid, dim3 size, size_t shared, std::function<void()> body) {
    static thread_local Block own;
    if (block) return !refuse("launch from inside a kernel");
    if (size.x % WARP || size.x > 1024 || size.y != 1 || size.z != 1)
        return !refuse("block size is not whole warps in x, or above 1024");
    if (shared > (size_t)settings.shared_bytes)
        return !refuse("more shared memory than a block may have");
    if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535)
        return !refuse("grid size out of range");
    fault_message.clear();
    counters.launches++;
    block = &own;
    own.threads = (int)size.x; own.fibers.resize(size.x); own.warps.resize(size.x / WARP);
    own.block_size = size;
    own.grid_size = grid;
    own.body = std::move(body);
    own.random = Random(settings.seed);
    own.shared_size = shared;
    own.shared_bytes.assign(shared + 128, 0);
    own.shared_bytes.shrink_to_fit();
    own.shared = (unsigned char*)(((uintptr_t)own.shared_bytes.data() + 127) & ~(uintptr_t)127);
    const uint32_t blocks = grid.x * grid.y * grid.z;
    std::vector<uint32_t> order(blocks);
    for (uint32_t i = 0; i < blocks; ++i) {
        uint32_t j = own.random.below(i + 1);
        order[i] = order[j];
        order[j] = i;
    }
    bool fine = true;
    for (uint32_t i = 0; i < blocks && fine; ++i) {
        own.block_index = dim3(order[i] % grid.x, order[i] / grid.x % grid.y,
                               order[i] / grid.x / grid.y);
        fine = run_block();
    }
    block = nullptr;
    return fine ? 0 : 1;
}

}  // namespace wa_emu
