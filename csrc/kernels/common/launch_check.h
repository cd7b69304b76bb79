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
  const StatusCode code = error == cudaErrorMemoryAllocation ? StatusCode::OutOfMemory : StatusCode::Internal;
  return {code, std::string(what) + ": " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")"};
}

/// Lets `kernel` have more shared memory than the 48 KB of the default, once per device.
template <class Kernel>
Status allow_shared_memory(Kernel* kernel, int bytes, std::atomic<uint64_t>& prepared) {
  int device = 0;
  if (cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return cuda_status("attention", error);
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if ((prepared.load(std::memory_order_relaxed) & bit) != 0) return {};
  const cudaError_t error =
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) prepared.fetch_or(bit, std::memory_order_relaxed);
  return cuda_status("attention", error);
}

/// kernel<<<num_ctas, threads, shared_bytes, stream>>>(args), checked.
template <class Args>
Status launch_kernel(const char* name, void (*kernel)(Args), int64_t num_ctas, int threads, int shared_bytes,
                     void* stream, const Args& args) {
  if (num_ctas > INT_MAX) {
    return {StatusCode::InvalidArgument,
            std::string(name) + ": the batch is too large for one launch; got " + std::to_string(num_ctas) + " tiles"};
  }
  void* arguments[] = {const_cast<Args*>(&args)};
  const cudaError_t error =
      cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(num_ctas)),
                       dim3(static_cast<unsigned>(threads)), arguments, static_cast<size_t>(shared_bytes),
                       static_cast<cudaStream_t>(stream));
  return cuda_status(name, error);
}

}  // namespace dca::cuda
