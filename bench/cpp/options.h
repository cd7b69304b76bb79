// The command line of dca_bench.
#pragma once

#include <cstdint>
#include <string>

#include "dca/params.h"

namespace dca::bench {

enum class Operation { Prefill, Decode, Append, Merge };
enum class Timing {
  Events,  ///< CUDA events around the call
  Graph,   ///< CUDA events around the replay of a graph that holds the call
};

struct Options {
  Operation operation = Operation::Prefill;
  Device device = Device::Cpu;
  int64_t batch = 1;
  int64_t heads = 32;
  int64_t kv_heads = 8;
  int64_t head_dim = 128;
  int64_t seqlen = 0;     ///< tokens: of the prompt, in the cache, appended, or rows merged; 0: by operation
  int64_t queries = 1;    ///< decode: query rows of each sequence
  int64_t page_size = 0;  ///< decode, append: slots per page of the cache; 0: contiguous
  int64_t parts = 3;      ///< merge
  int64_t chunk_len = 2560;
  int64_t max_position = 0;  ///< 0: chunk_len * 6 / 5, the usual ratio
  DType dtype = DType::Float32;
  DType cache_dtype = DType::Same;  ///< decode, append
  int64_t threads = 0;              ///< 0: DCA_NUM_THREADS or all processors
  int64_t splits = 0;               ///< 0: the library's choice
  Timing timing = Timing::Events;   ///< CUDA
  int64_t copy_mib = 4096;          ///< CUDA: size of the copy that measures the bandwidth
  int64_t repeat = 9;
  int64_t warmup = 2;
  bool verify = false;
  bool ceiling = true;  ///< measure what the machine could do at best
  std::string json;     ///< file for one line of JSON; empty: none
};

const char* name_of(Operation operation);
const char* name_of(DType dtype);  ///< "same" for DType::Same
const char* name_of(Device device);

/// Prints the help and ends the process for --help; throws std::invalid_argument with one sentence for bad input.
Options parse_options(int argc, char** argv);

}  // namespace dca::bench
