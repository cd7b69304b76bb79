// The operations on random data: their buffers, their work, their times, and their check against the reference.
#pragma once

#include <string>
#include <vector>

#include "machine.h"
#include "options.h"

namespace dca::bench {

struct Result {
  std::string kernel;
  std::string machine;
  std::vector<Fact> facts;           ///< about the machine, beyond its name
  std::vector<double> seconds;       ///< of each timed run, in order
  double rotate_keys_seconds = 0.0;  ///< prefill: median of the pass over K that comes before, not part of `seconds`
  double work = 0.0;                 ///< FLOP (prefill) or bytes
  const char* work_unit = "";        ///< "FLOP" or "B"
  Ceiling ceiling;                   ///< work per second
  int threads = 0;
  std::string verified;  ///< what was compared; empty without --verify
};

/// Value at share p of the sorted values, between neighbours linearly.
double quantile(std::vector<double> values, double p);

/// Throws std::invalid_argument where there is no such machine, and std::runtime_error with one sentence if the library
/// refuses the shape or --verify fails.
Result run_workload(const Options& options);

}  // namespace dca::bench
