#include "cpu_machine.h"

#include <chrono>
#include <cstring>
#include <fstream>
#include <new>

#include "ceilings.h"
#include "reference.h"

namespace dca::bench {
namespace {

class CpuMachine : public Machine {
 public:
  explicit CpuMachine(const Options& options) : repeat_(options.repeat), warmup_(options.warmup) {}

  Execution execution() const override { return {}; }

  std::string name() const override {
    std::ifstream cpuinfo("/proc/cpuinfo");
    for (std::string line; std::getline(cpuinfo, line);) {
      const size_t colon = line.find(": ");
      if (line.rfind("model name", 0) == 0 && colon != std::string::npos) return line.substr(colon + 2);
    }
    return "unknown";
  }

  std::vector<Fact> facts() const override { return {}; }

  std::shared_ptr<void> allocate(size_t bytes) const override {
    // From a cache line's start, as torch's tensors are: else vectors of 64 bytes would straddle two lines each.
    constexpr auto kCacheLine = std::align_val_t{64};
    auto* const memory = static_cast<char*>(operator new(bytes, kCacheLine));
    std::memset(memory, 0, bytes);  // so that no timed run meets a page that the system has yet to provide
    return {memory, [=](void* p) { operator delete(p, kCacheLine); }};
  }

  void copy_to_host(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
  void copy_from_host(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }

  void fill_random(void* data, DType dtype, int64_t count, uint64_t seed) const override {
    const double largest = dtype == DType::Int8 ? 127.0 : 1.0;
    uint64_t state = seed;  // a plain generator, since buffers have up to 10^9 elements
    for (int64_t i = 0; i < count; ++i) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      const double uniform = static_cast<double>(static_cast<int64_t>(state >> 11)) * 0x1p-52 - 1.0;
      reference::write(data, dtype, i, largest * uniform);
    }
  }

  std::vector<double> time_runs(const std::function<Status()>& call) override {
    std::vector<double> seconds;
    for (int64_t run = -warmup_; run < repeat_; ++run) {
      const auto start = std::chrono::steady_clock::now();
      require(call());
      const auto end = std::chrono::steady_clock::now();
      if (run >= 0) seconds.push_back(std::chrono::duration<double>(end - start).count());
    }
    return seconds;
  }

  // Pairs of bfloat16 can pass the peak of fp32.
  Ceiling arithmetic_ceiling([[maybe_unused]] DType dtype) override {
#if defined(DCA_BENCH_HAS_AMX)
    if (dtype == DType::BFloat16 && kernels_use_amx()) return {measure_amx_peak(threads()), "AMX bf16 peak"};
#endif
    return {measure_fma_peak(threads()), "fp32 FMA peak"};
  }

  Ceiling read_ceiling(const Buffers& buffers) override {
    return {measure_read_bandwidth(buffers, threads()), "reading the same buffers"};
  }

  Ceiling copy_ceiling(const Buffers& from, const Buffers& to) override {
    return {measure_copy_bandwidth(from, to, threads()), "copying buffers of that size"};
  }

 private:
  static int threads() { return build_info().cpu_threads; }

  int64_t repeat_;
  int64_t warmup_;
};

}  // namespace

std::unique_ptr<Machine> open_cpu(const Options& options) { return std::make_unique<CpuMachine>(options); }

}  // namespace dca::bench
