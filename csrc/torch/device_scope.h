// Where an operator runs: torch's current device and stream for CUDA tensors, torch's thread pool for CPU tensors.
#pragma once

#include <dlfcn.h>

#include <torch/csrc/stable/accelerator.h>

#include <optional>

#include "tensor_args.h"

namespace dca::torch_ops {

/// Makes the device of a tensor the current one for as long as it lives.
class DeviceScope {
 public:
  explicit DeviceScope(const Tensor& q) {
    threading_ = {static_cast<int32_t>(torch::stable::get_num_threads()), run_on_torch_threads};
    execution_.threading = &threading_;
    if (q.is_cpu()) return;
    guard_.emplace(q.get_device_index());
    execution_.device = Device::Cuda;
    execution_.stream = current_stream(q.get_device_index());
  }
  DeviceScope(const DeviceScope&) = delete;

  const Execution& execution() const { return execution_; }

 private:
  static void run_on_torch_threads(int32_t num_threads, void (*worker)(int32_t, void*), void* context) {
    // torch gives each of its threads one range of indices; each range may hold several workers.
    torch::stable::parallel_for(0, num_threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) worker(static_cast<int32_t>(i), context);
    });
  }

  // The function is in libtorch_cuda, which a CPU build of torch has not: linking to it would tie one binary to one
  // kind of torch. Whoever made a CUDA tensor has loaded that library.
  static void* current_stream(int32_t device_index) {
    using GetStream = int32_t (*)(int32_t, void**);
    static const GetStream get_stream = [] {
      constexpr const char* kName = "aoti_torch_get_current_cuda_stream";
      void* function = dlsym(RTLD_DEFAULT, kName);
      if (function == nullptr) {
        if (void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD)) function = dlsym(library, kName);
      }
      return reinterpret_cast<GetStream>(function);
    }();
    void* stream = nullptr;
    if (get_stream == nullptr || get_stream(device_index, &stream) != 0) {
      throw std::runtime_error("torch's current CUDA stream could not be found: is this torch built with CUDA?");
    }
    return stream;
  }

  Threading threading_;
  Execution execution_;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

}  // namespace dca::torch_ops
