// Device memory full of random numbers, and read for its own sake.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "dca/params.h"

namespace dca::bench {

/// Numbers uniform in [-1, 1).
void fill_uniform(void* data, DType dtype, int64_t count, uint64_t seed, cudaStream_t stream);

/// Reads all of `data` (a multiple of 16 bytes, of no other use). Evicts by reading, not by writing: written lines
/// would have to go back to memory while the kernel that is timed next runs.
void read_through(void* data, size_t bytes, cudaStream_t stream);

}  // namespace dca::bench
