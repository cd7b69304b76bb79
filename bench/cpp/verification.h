// Comparison with the double-precision reference. The reference is slow, so of long sequences only some rows are looked
// at. Parameters hold host pointers; each call says what it compared, or throws std::runtime_error with one sentence.
#pragma once

#include <string>

#include "dca/params.h"
#include "tensor.h"

namespace dca::bench {

std::string verify_attention(const AttentionParams& params, const Tensor& out);
std::string verify_append(const AppendParams& params, const Tensor& k_cache, const Tensor& v_cache);
std::string verify_merge(const MergeParams& params, const Tensor& out);

}  // namespace dca::bench
