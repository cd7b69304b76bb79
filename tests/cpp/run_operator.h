// How the tests call the operators. Problems live in host memory; run_on_cpu.cpp hands them over as they are, and
// run_on_cuda.cpp (in dca_cuda_tests) copies them to the device, each buffer into an allocation of its own, and back.
#pragma once

#include <cstddef>
#include <vector>

#include "dca/dca.h"

namespace dca::testing {

/// Host memory that the parameters of a call point into.
struct HostBuffer {
  const void* data;
  size_t bytes;
};
using HostBuffers = std::vector<HostBuffer>;

template <class T>
HostBuffer buffer_of(const std::vector<T>& values) {
  return {values.data(), values.size() * sizeof(T)};
}

Status run_operator(const AttentionParams& params, const HostBuffers& buffers);
Status run_operator(const RotateKeysParams& params, const HostBuffers& buffers);
Status run_operator(const AppendParams& params, const HostBuffers& buffers);
Status run_operator(const MergeParams& params, const HostBuffers& buffers);

/// Elements between the heads and between the rows of a test's tensors: as odd as the device allows.
struct Gaps {
  int32_t head;
  int32_t row;
};
Gaps tensor_gaps(DType dtype);

/// Whether attention rounds rotated queries to the dtype, as matrix units want them.
bool rounds_queries(DType dtype);

}  // namespace dca::testing
