// Programmatic dependent launch, on Hopper and newer: a kernel takes its place while the one before it in the stream
// ends, and waits for it by itself.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>

namespace dca::cuda {

/// Waits until the kernel before this one in the stream is complete, for kernels that are launched early.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// Lets a kernel that is launched early take its place once all CTAs have come here.
__device__ __forceinline__ void admit_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

/// Whether a kernel of this build waits by itself for the kernel before it in the stream, as kernels do that begin with
/// wait_for_previous_kernel() and were compiled for compute capability 9.0 or newer. That depends on the device, which
/// is asked once: `known` has two bits for each of the first 32.
template <class Kernel>
bool waits_by_itself(Kernel* kernel, std::atomic<uint64_t>& known) {
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  const uint64_t asked = device < 32 ? uint64_t{1} << (2 * device) : 0;
  const uint64_t waits = asked << 1;
  if (const uint64_t answers = known.load(std::memory_order_relaxed); (answers & asked) != 0) {
    return (answers & waits) != 0;
  }
  cudaFuncAttributes attributes{};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
  const bool answer = error == cudaSuccess && attributes.ptxVersion >= 90;
  known.fetch_or(answer ? asked | waits : asked, std::memory_order_relaxed);
  return answer;
}

}  // namespace dca::cuda
