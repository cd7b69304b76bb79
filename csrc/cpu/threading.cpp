// The pool of the torch-free library: threads that sleep between calls, started on first use. A call made while another
// one holds the pool runs on its own thread alone, which is slower and never waits.
#include "threading.h"

#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

namespace dca::cpu {
namespace {

class ThreadPool {
 public:
  explicit ThreadPool(int32_t num_threads) {
    for (int32_t i = 1; i < num_threads; ++i) threads_.emplace_back([this, i] { loop(i); });
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
      active_ = num_threads;
      running_ = num_threads - 1;
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

void run_on_pool(int32_t num_threads, void (*worker)(int32_t, void*), void* context) {
  static ThreadPool pool(default_size());
  pool.run(num_threads, worker, context);
}

}  // namespace

const Threading& default_threading() {
  static const Threading threading{default_size(), run_on_pool};
  return threading;
}

}  // namespace dca::cpu
