// Tasks handed to threads in whatever order; what a task does must not depend on it.
#pragma once
#include <stdint.h>

namespace wa {

// Runs body(0 .. count - 1, of). False where a task called report_failure.
bool run_tasks(int64_t count, int threads, void (*body)(int64_t, void*), void* of);

// From within a task: it could not do its work.
void report_failure();

// At least `bytes` of memory aligned to 64 that belong to this thread until its next call; null
// where there is none.
void* scratch_of_thread(int64_t bytes);

}  // namespace wa
