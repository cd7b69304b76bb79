// The current CUDA device.
#pragma once

#include <memory>

#include "machine.h"

namespace dca::bench {

/// Throws std::invalid_argument where there is none.
std::unique_ptr<Machine> open_cuda(const Options& options);

}  // namespace dca::bench
