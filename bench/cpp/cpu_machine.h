// The CPU, through the library's own thread pool.
#pragma once

#include <memory>

#include "machine.h"

namespace dca::bench {

std::unique_ptr<Machine> open_cpu(const Options& options);

}  // namespace dca::bench
