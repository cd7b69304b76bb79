// dca: fused Dual Chunk Attention kernels (An et al. 2024, arXiv 2402.17463). The whole C++ API.
//
//   dca::AttentionParams p;                       // pointers, strides, sizes: see params.h
//   ...
//   if (dca::Status s = dca::attention(p); !s.ok()) std::cerr << s.message() << "\n";
//
// No call throws, exits or prints. A refused call has written nothing. Work on Device::Cuda is queued on the given
// stream and not waited for.
#pragma once

#include <cstddef>
#include <string>
#include <utility>

#include "dca/chunk_geometry.h"
#include "dca/params.h"

namespace dca {

enum class StatusCode {
  Ok,
  InvalidArgument,  ///< an argument cannot be what it was; the message names it
  Unavailable,      ///< this build or this machine has no kernel for it
  OutOfMemory,
  Internal,  ///< an error of the CUDA runtime or of this library
};

class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(StatusCode code, std::string message) : code_(code), message_(std::move(message)) {}

  bool ok() const { return code_ == StatusCode::Ok; }
  StatusCode code() const { return code_; }
  /// One sentence that names the argument, what it was and what it may be; empty if ok.
  const std::string& message() const { return message_; }

 private:
  StatusCode code_ = StatusCode::Ok;
  std::string message_;
};

/// Attention over rotated keys: prefill, decode, chunked prefill, and single segments.
Status attention(const AttentionParams& params);

/// What attention(params) would refuse, without computing. Asked before the rotate_and_append_kv() in front of an
/// attention, it keeps a refusal from coming after the write.
Status check_attention(const AttentionParams& params);

/// Bytes of AttentionParams::workspace that attention(params) needs; 0 where keys are not split.
Status attention_workspace_bytes(const AttentionParams& params, size_t* bytes);

/// Keys rotated at (position mod chunk_len).
Status rotate_keys(const RotateKeysParams& params);

/// Key rotation and cache write in one pass.
Status rotate_and_append_kv(const AppendParams& params);

/// The merged softmax of several attention results over disjoint keys.
Status merge_attention_states(const MergeParams& params);

/// What this library was built with and what it found on this machine.
struct BuildInfo {
  const char* version;               ///< of dca
  const char* compiler;              ///< that built the CPU kernels
  const char* cpu_instruction_sets;  ///< compiled, best first, separated by commas
  const char* cpu_isa;               ///< in use on this machine (environment variable DCA_CPU_ISA forces one)
  const char* cuda_architectures;    ///< compiled, separated by commas; empty: built without CUDA
  int cpu_threads;                   ///< of the library's own pool (environment variable DCA_NUM_THREADS)
};
BuildInfo build_info();

/// Name of the kernel that attention(params) would run, such as "cpu/avx2/tile" or "cuda/sm90/prefill/bf16/128"; reads
/// shapes and strides, no values.
Status describe_attention(const AttentionParams& params, std::string* kernel);

}  // namespace dca
