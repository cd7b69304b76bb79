// What a CUDA device can do at best, measured next to the operators, without a library or a datasheet.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

#include "dca/params.h"

namespace dca::bench {

struct MatrixRate {
  double flop_per_second = 0.0;
  double sm_clock_mhz = 0.0;  ///< of the streaming multiprocessors meanwhile
};

/// mma.sync m16n8k16 with fp32 accumulators on operands that stay in registers, every multiprocessor full: what a
/// kernel for compute capability 8.0 can reach. (The wgmma of 9.0 is faster.)
MatrixRate measure_mma_rate(DType dtype, cudaStream_t stream);

struct CopyRate {
  double bytes_per_second = 0.0;  ///< read plus written
  double copied_bytes = 0.0;      ///< the size of the buffer
};

/// One device-to-device copy of `wanted_bytes`, or of a third of the free memory where that is less.
CopyRate measure_copy_rate(size_t wanted_bytes, cudaStream_t stream);

}  // namespace dca::bench
