#include "cuda_machine.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <optional>
#include <stdexcept>

#include "cuda_ceilings.h"
#include "cuda_memory.h"
#include "cuda_status.h"

namespace dca::bench {
namespace {

double attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  require_cuda(cudaDeviceGetAttribute(&value, which, device), "asking for the device's properties");
  return value;
}

std::string cuda_version(int number) { return std::to_string(number / 1000) + "." + std::to_string(number / 10 % 100); }

/// What a call puts on the stream, as a graph that can be replayed.
class RecordedCall {
 public:
  RecordedCall(const std::function<Status()>& call, cudaStream_t stream) {
    require_cuda(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capturing a graph");
    const Status status = call();
    // The capture ends whatever the call said, else the stream stays unusable.
    const cudaError_t error = cudaStreamEndCapture(stream, &graph_);
    require(status);
    require_cuda(error, "capturing a graph");
    require_cuda(cudaGraphInstantiateWithFlags(&executable_, graph_, 0), "instantiating a graph");
    require_cuda(cudaGraphUpload(executable_, stream), "uploading a graph");
  }
  ~RecordedCall() {
    if (executable_ != nullptr) (void)cudaGraphExecDestroy(executable_);
    if (graph_ != nullptr) (void)cudaGraphDestroy(graph_);
  }
  RecordedCall(const RecordedCall&) = delete;
  RecordedCall& operator=(const RecordedCall&) = delete;

  void replay(cudaStream_t stream) const { require_cuda(cudaGraphLaunch(executable_, stream), "replaying a graph"); }

 private:
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t executable_ = nullptr;
};

class CudaMachine : public Machine {
 public:
  explicit CudaMachine(const Options& options)
      : repeat_(options.repeat),
        warmup_(options.warmup),
        graph_(options.timing == Timing::Graph),
        copy_bytes_(static_cast<size_t>(options.copy_mib) << 20) {
    require_cuda(cudaGetDevice(&device_), "asking for the device");
    require_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "creating a stream");
    require_cuda(cudaEventCreate(&start_), "creating an event");
    require_cuda(cudaEventCreate(&stop_), "creating an event");
    // Four times the cache, so that little of what was in it survives whatever the replacement policy.
    flush_bytes_ = std::max<size_t>(4 * static_cast<size_t>(attribute(cudaDevAttrL2CacheSize, device_)), 64u << 20);
    flush_ = allocate(flush_bytes_);
    require_cuda(cudaMemset(flush_.get(), 0, flush_bytes_), "clearing the flush buffer");
  }
  ~CudaMachine() override {
    (void)cudaEventDestroy(start_);
    (void)cudaEventDestroy(stop_);
    (void)cudaStreamDestroy(stream_);
  }
  CudaMachine(const CudaMachine&) = delete;
  CudaMachine& operator=(const CudaMachine&) = delete;

  Execution execution() const override {
    Execution exec;
    exec.device = Device::Cuda;
    exec.stream = stream_;
    return exec;
  }

  std::string name() const override {
    cudaDeviceProp properties{};
    require_cuda(cudaGetDeviceProperties(&properties, device_), "asking for the device's name");
    return properties.name;
  }

  std::vector<Fact> facts() const override {
    int driver = 0, runtime = 0;
    require_cuda(cudaDriverGetVersion(&driver), "asking for the driver's version");
    require_cuda(cudaRuntimeGetVersion(&runtime), "asking for the runtime's version");
    size_t free_bytes = 0, total_bytes = 0;
    require_cuda(cudaMemGetInfo(&free_bytes, &total_bytes), "asking for the device's memory");
    const int major = static_cast<int>(attribute(cudaDevAttrComputeCapabilityMajor, device_));
    const int minor = static_cast<int>(attribute(cudaDevAttrComputeCapabilityMinor, device_));
    std::vector<Fact> facts = {
        {"compute_capability", std::to_string(major) + "." + std::to_string(minor)},
        {"multiprocessors", attribute(cudaDevAttrMultiProcessorCount, device_)},
        {"l2_mib", attribute(cudaDevAttrL2CacheSize, device_) / 0x1p20},
        {"memory_gib", static_cast<double>(total_bytes) / 0x1p30},
        {"sm_clock_max_mhz", attribute(cudaDevAttrClockRate, device_) / 1e3},
        {"memory_clock_max_mhz", attribute(cudaDevAttrMemoryClockRate, device_) / 1e3},
        {"cuda_driver", cuda_version(driver)},
        {"cuda_runtime", cuda_version(runtime)},
        {"cuda_architectures", std::string(build_info().cuda_architectures)},
        {"timing", std::string(graph_ ? "graph" : "events")},
        {"flushed_mib", static_cast<double>(flush_bytes_) / 0x1p20},
    };
    if (copy_rate_) facts.emplace_back("copied_mib", copy_rate_->copied_bytes / 0x1p20);
    if (sm_clock_mhz_ > 0.0) facts.emplace_back("sm_clock_mhz_under_load", sm_clock_mhz_);
    return facts;
  }

  std::shared_ptr<void> allocate(size_t bytes) const override {
    void* memory = nullptr;
    require_cuda(cudaMalloc(&memory, std::max<size_t>(bytes, 1)), "allocating device memory");
    return {memory, [](void* p) { (void)cudaFree(p); }};
  }

  void copy_to_host(void* to, const void* from, size_t bytes) const override {
    require_cuda(cudaStreamSynchronize(stream_), "waiting for the device");
    require_cuda(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost), "copying to the host");
  }

  void copy_from_host(void* to, const void* from, size_t bytes) const override {
    require_cuda(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice), "copying to the device");
    // A copy from pageable memory may return before its last part is in place, and stream_ does not wait for it.
    require_cuda(cudaDeviceSynchronize(), "copying to the device");
  }

  void fill_random(void* data, DType dtype, int64_t count, uint64_t seed) const override {
    fill_uniform(data, dtype, count, seed, stream_);
  }

  std::vector<double> time_runs(const std::function<Status()>& call) override {
    require(call());  // loads the kernels, which a capture must not
    require_cuda(cudaStreamSynchronize(stream_), "running the operator");
    std::optional<RecordedCall> recorded;
    if (graph_) recorded.emplace(call, stream_);
    std::vector<double> seconds;
    for (int64_t run = -warmup_; run < repeat_; ++run) {
      // While the device reads the flush buffer, the host queues the rest: no gap between start and the kernels.
      read_through(flush_.get(), flush_bytes_, stream_);
      require_cuda(cudaEventRecord(start_, stream_), "recording an event");
      if (recorded) {
        recorded->replay(stream_);
      } else {
        require(call());
      }
      require_cuda(cudaEventRecord(stop_, stream_), "recording an event");
      require_cuda(cudaEventSynchronize(stop_), "running the operator");
      float milliseconds = 0.0f;
      require_cuda(cudaEventElapsedTime(&milliseconds, start_, stop_), "reading an event");
      if (run >= 0) seconds.push_back(1e-3 * static_cast<double>(milliseconds));
    }
    return seconds;
  }

  Ceiling arithmetic_ceiling(DType dtype) override {
    const MatrixRate rate = measure_mma_rate(dtype, stream_);
    sm_clock_mhz_ = std::round(rate.sm_clock_mhz);
    return {rate.flop_per_second, "mma.sync from registers"};
  }

  Ceiling read_ceiling(const Buffers&) override { return memory_ceiling(); }
  Ceiling copy_ceiling(const Buffers&, const Buffers&) override { return memory_ceiling(); }

 private:
  Ceiling memory_ceiling() {
    copy_rate_ = measure_copy_rate(copy_bytes_, stream_);
    char name[64];
    std::snprintf(name, sizeof name, "read and written by a copy of %.2f GiB", copy_rate_->copied_bytes / 0x1p30);
    return {copy_rate_->bytes_per_second, name};
  }

  int64_t repeat_;
  int64_t warmup_;
  bool graph_;
  size_t copy_bytes_;
  int device_ = 0;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t start_ = nullptr;
  cudaEvent_t stop_ = nullptr;
  size_t flush_bytes_ = 0;
  std::shared_ptr<void> flush_;
  std::optional<CopyRate> copy_rate_;
  double sm_clock_mhz_ = 0.0;
};

}  // namespace

std::unique_ptr<Machine> open_cuda(const Options& options) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || count == 0) {
    const char* why = error != cudaSuccess ? cudaGetErrorString(error) : "the driver reports none";
    throw std::invalid_argument(std::string("--device=cuda needs a CUDA device, and there is none: ") + why);
  }
  return std::make_unique<CudaMachine>(options);
}

}  // namespace dca::bench
