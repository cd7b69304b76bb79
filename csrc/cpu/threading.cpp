// The pool of the torch-free library: threads that sleep between calls, started on first use. A call made while another
// one holds the pool runs on its own thread alone, which is slower and never waits.
#include "threading.h"

#include <pthread.h>

#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace dca::cpu {
namespace {

class ThreadPool {
 public:
  /// Or as many threads as the system lets it have.
  explicit ThreadPool(int32_t num_threads) {
    threads_.reserve(static_cast<size_t>(num_threads));
    try {
      for (int32_t i = 1; i < num_threads; ++i) threads_.emplace_back([this, i] { loop(i); });
    } catch (const std::system_error&) {
      // No thread more: the call's own and those that there are do the work.
    }
  }

  ~ThreadPool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }

  void run(int32_t num_threads, void (*worker)(int32_t, void*), void* context) {
    std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
    if (!owner.owns_lock()) {
      for (int32_t i = 0; i < num_threads; ++i) worker(i, context);
      return;
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      worker_ = worker;
      context_ = context;
      active_ = std::min(num_threads, static_cast<int32_t>(threads_.size()) + 1);
      running_ = active_ - 1;
      ++generation_;
    }
    wake_.notify_all();
    worker(0, context);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });
  }

 private:
  void loop(int32_t index) {
    uint64_t seen = 0;
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex_);
      wake_.wait(lock, [&] { return stopping_ || generation_ != seen; });
      if (stopping_) return;
      seen = generation_;
      if (index >= active_) continue;
      const auto worker = worker_;
      void* const context = context_;
      lock.unlock();
      worker(index, context);
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex owner_;  // held by the call that uses the pool
  std::mutex mutex_;  // guards everything below
  std::condition_variable wake_;
  std::condition_variable done_;
  void (*worker_)(int32_t, void*) = nullptr;
  void* context_ = nullptr;
  int32_t active_ = 0;
  int32_t running_ = 0;
  uint64_t generation_ = 0;
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

int32_t choose_num_threads() {
  if (const char* text = std::getenv("DCA_NUM_THREADS")) {
    const int value = std::atoi(text);
    if (value >= 1) return value;
  }
  const unsigned processors = std::thread::hardware_concurrency();
  return processors > 0 ? static_cast<int32_t>(processors) : 1;
}

int32_t default_size() {
  static const int32_t size = choose_num_threads();
  return size;
}

/// The pool of this process. fork() copies the object without its threads: the child leaves it alone and starts one of
/// its own.
class PoolOfProcess {
 public:
  PoolOfProcess() {
    pthread_atfork(nullptr, nullptr, [] { current().store(nullptr); });
  }
  ~PoolOfProcess() { delete current().exchange(nullptr); }

  ThreadPool& get() {
    if (ThreadPool* const pool = current().load()) return *pool;
    auto fresh = std::make_unique<ThreadPool>(default_size());
    ThreadPool* first = nullptr;
    if (!current().compare_exchange_strong(first, fresh.get())) return *first;  // another call was faster
    return *fresh.release();
  }

 private:
  static std::atomic<ThreadPool*>& current() {
    static std::atomic<ThreadPool*> pool{nullptr};
    return pool;
  }
};

void run_on_pool(int32_t num_threads, void (*worker)(int32_t, void*), void* context) {
  static PoolOfProcess pool;
  pool.get().run(num_threads, worker, context);
}

}  // namespace

const Threading& default_threading() {
  static const Threading threading{default_size(), run_on_pool};
  return threading;
}

}  // namespace dca::cpu
