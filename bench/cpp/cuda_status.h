// Errors of the CUDA runtime as exceptions.
#pragma once

#include <cuda_runtime.h>

#include <new>
#include <stdexcept>
#include <string>

namespace dca::bench {

/// Throws std::bad_alloc for memory, else std::runtime_error with one sentence about `what` failed.
inline void require_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  if (error == cudaErrorMemoryAllocation) {
    (void)cudaGetLastError();  // not sticky: it would be reported once more by the next launch
    throw std::bad_alloc();
  }
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(error) + ", " + cudaGetErrorString(error));
}

}  // namespace dca::bench
