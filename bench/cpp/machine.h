// Where the operators run: the memory, the clock and the ceilings of the CPU, or of a CUDA device.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "dca/dca.h"
#include "options.h"

namespace dca::bench {

using Buffers = std::vector<std::pair<void*, size_t>>;  ///< pointer and bytes of each

struct Ceiling {
  double per_second = 0.0;  ///< of the workload's unit
  std::string name;
};

/// Name and value, for the JSON line.
using Fact = std::pair<std::string, std::variant<std::string, double>>;

/// Throws std::runtime_error with the status' sentence unless it is ok.
void require(const Status& status);

class Machine {
 public:
  virtual ~Machine() = default;

  virtual Execution execution() const = 0;
  virtual std::string name() const = 0;
  virtual std::vector<Fact> facts() const = 0;

  /// Throws std::bad_alloc where there is not so much. The contents are undefined.
  virtual std::shared_ptr<void> allocate(size_t bytes) const = 0;
  virtual void copy_to_host(void* to, const void* from, size_t bytes) const = 0;
  virtual void copy_from_host(void* to, const void* from, size_t bytes) const = 0;
  /// Uniform in [-1, 1), Int8 in [-127, 127].
  virtual void fill_random(void* data, DType dtype, int64_t count, uint64_t seed) const = 0;

  /// Seconds of each timed call, after the warm-up.
  virtual std::vector<double> time_runs(const std::function<Status()>& call) = 0;

  /// FLOP/s of the units that attention in `dtype` runs on; on the CPU those of fp32.
  virtual Ceiling arithmetic_ceiling(DType dtype) = 0;
  /// Bytes/s at which an operator that reads `buffers` could read them.
  virtual Ceiling read_ceiling(const Buffers& buffers) = 0;
  /// Bytes/s, read plus written, of copying `from` to `to`, which have the same sizes. Writes `to`.
  virtual Ceiling copy_ceiling(const Buffers& from, const Buffers& to) = 0;
};

/// The machine that the options name; throws std::invalid_argument where this build or this computer has none.
std::unique_ptr<Machine> open_machine(const Options& options);

}  // namespace dca::bench
