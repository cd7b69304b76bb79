// Launches whose errors become a Status.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <climits>
#include <cstdint>
#include <string>

#include "dca/dca.h"

namespace dca::cuda {

inline Status cuda_status(const char* what, cudaError_t error) {
  if (error == cudaSuccess) return {};
  cudaGetLastError();  // it has been reported: whoever looks next must not find it
  const StatusCode code = error == cudaErrorMemoryAllocation ? StatusCode::OutOfMemory : StatusCode::Internal;
  return {code, std::string(what) + ": " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")"};
}

/// kernel<<<num_ctas, threads, shared_bytes, stream>>>(args), checked. `early`: it may start while the kernel before it
/// in the stream ends (programmatic dependent launch).
template <class Args>
Status launch_kernel(const char* name, void (*kernel)(Args), int64_t num_ctas, int threads, int shared_bytes,
                     void* stream, const Args& args, bool early = false) {
  if (num_ctas > INT_MAX) {
    return {StatusCode::InvalidArgument,
            std::string(name) + ": the batch is too large for one launch; got " + std::to_string(num_ctas) + " tiles"};
  }
  void* arguments[] = {const_cast<Args*>(&args)};
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(num_ctas));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  if (early) {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  return cuda_status(name, cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), arguments));
}

/// The same for an attention kernel, which wants more shared memory than the 48 KB that a kernel has unasked.
template <auto kKernel, class Args>
Status launch_attention_kernel(int64_t num_ctas, int threads, int shared_bytes, void* stream, const Args& args) {
  static std::atomic<uint64_t> prepared{0};  // devices, by bit, on which the kernel may have it
  int device = 0;
  if (cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return cuda_status("attention", error);
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if ((prepared.load(std::memory_order_relaxed) & bit) == 0) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kKernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return cuda_status("attention", error);
    prepared.fetch_or(bit, std::memory_order_relaxed);
  }
  return launch_kernel("attention", kKernel, num_ctas, threads, shared_bytes, stream, args);
}

}  // namespace dca::cuda
