// Runs the tasks of an operator on the caller's threads (Threading) or on the library's own pool.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "dca/params.h"

namespace dca::cpu {

/// The library's own pool; its size is DCA_NUM_THREADS, or the number of processors.
const Threading& default_threading();

inline const Threading& threading_of(const Execution& exec) {
  return exec.threading != nullptr ? *exec.threading : default_threading();
}

/// Calls task(index, worker) for every index in [0, num_tasks); whichever worker is free takes the next one, so put the
/// longest first. Two calls with the same worker never overlap. Tasks must not throw. At most max_workers work at once:
/// waking a thread costs microseconds, which small work does not repay.
template <class Task>
void parallel_tasks(const Threading& threading, int64_t num_tasks, Task&& task, int64_t max_workers = INT32_MAX) {
  struct Shared {
    std::atomic<int64_t> next{0};
    int64_t num_tasks;
    Task* task;
  } shared;
  shared.num_tasks = num_tasks;
  shared.task = &task;
  const auto worker = [](int32_t index, void* context) {
    Shared& s = *static_cast<Shared*>(context);
    for (int64_t i = s.next.fetch_add(1); i < s.num_tasks; i = s.next.fetch_add(1)) (*s.task)(i, index);
  };
  const int32_t num_threads =
      static_cast<int32_t>(std::min({static_cast<int64_t>(threading.num_threads), num_tasks, max_workers}));
  if (num_threads <= 1) {
    worker(0, &shared);
  } else {
    threading.run(num_threads, worker, &shared);
  }
}

}  // namespace dca::cpu
