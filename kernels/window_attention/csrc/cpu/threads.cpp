#include "threads.h"

#include <stdlib.h>

#include <atomic>
#include <thread>
#include <vector>

namespace {

using ParallelFor = void (*)(int64_t count, void (*body)(int64_t begin, int64_t end, void*), void*);
std::atomic<ParallelFor> parallel_for{nullptr};

struct Tasks {
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    int64_t count;
    void (*body)(int64_t, void*);
    void* of;
};

thread_local Tasks* current = nullptr;

void work(Tasks& tasks) {
    Tasks* const outer = current;
    current = &tasks;
    for (int64_t task; (task = tasks.next.fetch_add(1, std::memory_order_relaxed)) < tasks.count;)
        tasks.body(task, tasks.of);
    current = outer;
}

void work_of_pool(int64_t begin, int64_t end, void* tasks) {
    for (; begin < end; ++begin) work(*static_cast<Tasks*>(tasks));
}

struct Scratch {
    void* memory = nullptr;
    int64_t size = 0;
    ~Scratch() { free(memory); }
};

}  // namespace

namespace wa {

bool run_tasks(int64_t count, int threads, void (*body)(int64_t, void*), void* of) {
    Tasks tasks;
    tasks.count = count, tasks.body = body, tasks.of = of;
    if (threads > count) threads = static_cast<int>(count);
    if (threads <= 1) {
        work(tasks);
    } else if (const ParallelFor pool = parallel_for) {
        pool(threads, work_of_pool, &tasks);
    } else {
        std::vector<std::thread> others;
        try {
            for (int i = 1; i < threads; ++i) others.emplace_back(work, std::ref(tasks));
        } catch (...) {
            // fewer threads than asked for do the same work
        }
        work(tasks);
        for (std::thread& thread : others) thread.join();
    }
    return !tasks.failed;
}

void report_failure() {
    if (current) current->failed = true;
}

void* scratch_of_thread(int64_t bytes) {
    thread_local Scratch scratch;
    if (scratch.size < bytes) {
        free(scratch.memory);
        scratch.size = 0;
        scratch.memory = aligned_alloc(64, static_cast<size_t>((bytes + 63) / 64 * 64));
        if (scratch.memory) scratch.size = bytes;
    }
    return scratch.memory;
}

}  // namespace wa

// Lets a host that has a pool of threads lend it: run(count, body, of) calls body on ranges that
// cover 0 .. count - 1.
extern "C" void wa_cpu_set_parallel_for(void (*run)(int64_t count,
                                                    void (*body)(int64_t begin, int64_t end, void*),
                                                    void*)) {
    parallel_for = run;
}
