// What the operators refuse: everything visible in sizes, strides and numbers, and, on the CPU or on request, the
// values of the length tensors and page tables.
#pragma once

#include "dca/dca.h"

namespace dca {

Status check(const AttentionParams& params);
Status check(const RotateKeysParams& params);
Status check(const AppendParams& params);
Status check(const MergeParams& params);

/// Null pointers to memory that an operator with work to do reads or writes; for parameters that passed check().
Status check_pointers(const AttentionParams& params);
Status check_pointers(const RotateKeysParams& params);
Status check_pointers(const AppendParams& params);
Status check_pointers(const MergeParams& params);

}  // namespace dca
