#include <string>

#include "run_operator.h"

namespace dca::testing {

Status run_operator(const AttentionParams& params, const HostBuffers&) { return attention(params); }
Status run_operator(const RotateKeysParams& params, const HostBuffers&) { return rotate_keys(params); }
Status run_operator(const AppendParams& params, const HostBuffers&) { return rotate_and_append_kv(params); }
Status run_operator(const MergeParams& params, const HostBuffers&) { return merge_attention_states(params); }

Gaps tensor_gaps(DType) { return {3, 5}; }  // no row but the first is aligned to a vector

bool rounds_queries(DType dtype) {
  // The sets that multiply pairs of bfloat16 say so in their names.
  return dtype == DType::BFloat16 && std::string(build_info().cpu_isa).find("bf16") != std::string::npos;
}

}  // namespace dca::testing
