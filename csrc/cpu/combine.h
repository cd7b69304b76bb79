// The merged softmax of one row: partial results over disjoint keys, weighted by exp(lse_p - lse), in fp32.
#pragma once

#include <cmath>
#include <cstdint>

#include "micro_kernels.h"

namespace dca::cpu {

/// sum (dim) = the merged row; returns its LSE. lse_of(p) is a float, out_of(p) points to dim elements of dtype. Parts
/// at -inf carry no weight, whatever their out holds; where all are, the row is 0 and the LSE -inf.
template <class LseOf, class OutOf>
float combine_row(const MicroKernels& mk, int32_t num_parts, int32_t dim, DType dtype, LseOf&& lse_of, OutOf&& out_of,
                  float* sum) {
  for (int32_t c = 0; c < dim; ++c) sum[c] = 0.0f;
  float largest = -INFINITY;
  for (int32_t part = 0; part < num_parts; ++part) largest = std::fmax(largest, lse_of(part));
  if (largest == -INFINITY) {
    bool any_nan = false;  // fmax passes over NaN; a NaN must not become a silent zero
    for (int32_t part = 0; part < num_parts; ++part) any_nan = any_nan || std::isnan(lse_of(part));
    if (!any_nan) return -INFINITY;
  }
  float total = 0.0f;
  for (int32_t part = 0; part < num_parts; ++part) {
    if (lse_of(part) == -INFINITY) continue;
    const float weight = std::exp(lse_of(part) - largest);
    mk.add_scaled(out_of(part), dtype, weight, dim, sum);
    total += weight;
  }
  const float inverse = 1.0f / total;
  for (int32_t c = 0; c < dim; ++c) sum[c] *= inverse;
  return largest + std::log(total);
}

}  // namespace dca::cpu
