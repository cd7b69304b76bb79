// What a build without CUDA kernels says about them.
#include "backends.h"

namespace dca::cuda {

Status unavailable() {
  return {StatusCode::Unavailable,
          "this build of dca has no CUDA kernels; build it where nvcc is found, or with DCA_CUDA=ON"};
}

bool available() { return false; }
const char* architectures() { return ""; }
Status attention(const AttentionParams&) { return unavailable(); }
Status check_attention(const AttentionParams&) { return unavailable(); }
Status attention_workspace_bytes(const AttentionParams&, size_t*) { return unavailable(); }
Status describe_attention(const AttentionParams&, std::string*) { return unavailable(); }
Status rotate_keys(const RotateKeysParams&) { return unavailable(); }
Status rotate_and_append_kv(const AppendParams&) { return unavailable(); }
Status merge_attention_states(const MergeParams&) { return unavailable(); }
Status copy_to_host(void*, const void*, size_t, void*) { return unavailable(); }

}  // namespace dca::cuda
