// What each backend provides. Parameters arrive checked (checks.h) and not empty.
#pragma once

#include <cstddef>
#include <string>

#include "dca/dca.h"

namespace dca {

namespace cpu {

Status attention(const AttentionParams& params);
size_t attention_workspace_bytes(const AttentionParams& params);
std::string describe_attention(const AttentionParams& params);
Status rotate_keys(const RotateKeysParams& params);
Status rotate_and_append_kv(const AppendParams& params);
Status merge_attention_states(const MergeParams& params);

/// Name of the instruction set in use; nullptr if DCA_CPU_ISA names one that is not available.
const char* isa();
const char* compiled_instruction_sets();
int default_num_threads();

}  // namespace cpu

namespace cuda {

/// False in a build without CUDA kernels: then unavailable() names the fix, and so do the other functions.
bool available();
Status unavailable();
const char* architectures();
Status attention(const AttentionParams& params);
Status check_attention(const AttentionParams& params);
Status attention_workspace_bytes(const AttentionParams& params, size_t* bytes);
Status describe_attention(const AttentionParams& params, std::string* kernel);
Status rotate_keys(const RotateKeysParams& params);
Status rotate_and_append_kv(const AppendParams& params);
Status merge_attention_states(const MergeParams& params);

/// Copies from the device to the host, and waits for it.
Status copy_to_host(void* host, const void* device, size_t bytes, void* stream);

}  // namespace cuda

}  // namespace dca
