// Online softmax of the rows that a thread of an mma.sync tile holds (Milakov and Gimelshein 2018; base 2).
//
// A thread holds kRows rows of the logits tile, and four neighbouring lanes share a row. The running sum is kept per
// lane and joined at the end; the running maximum is joined at every block.
#pragma once

#include "numeric.h"

namespace dca::cuda {

/// ((2, 2), M, N) accumulators of m16n8 tiles -> ((2, M), (2, N)): rows, columns.
template <class Layout>
__device__ __forceinline__ constexpr auto as_rows_and_columns(Layout layout) {
  using namespace cute;
  return make_layout(make_layout(get<0, 1>(layout), get<1>(layout)), make_layout(get<0, 0>(layout), get<2>(layout)));
}

/// Logits accumulators ((2, 2), M, N) -> ((4, 2), M, N / 2): the A operand of the next product, element by element.
template <class Layout>
__device__ __forceinline__ constexpr auto as_operand_a(Layout layout) {
  using namespace cute;
  const auto pairs = logical_divide(layout, Shape<X, X, _2>{});
  return make_layout(make_layout(get<0>(pairs), get<2, 0>(pairs)), get<1>(pairs), get<2, 1>(pairs));
}

/// kHeadroom: weights are 2^kHeadroom times as large, so that formats with few exponent bits hold small ones. It
/// cancels where O is divided by the sums.
template <int kRows, int kHeadroom = 0>
struct OnlineSoftmax {
  float row_max[kRows];  ///< of the raw logits
  float row_sum[kRows];  ///< this lane's share of sum 2^((logit - row_max) * scale_log2 + kHeadroom)

  __device__ OnlineSoftmax() {
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) row_max[r] = -INFINITY, row_sum[r] = 0.0f;
  }

  /// What the rows of O have to be multiplied by after advance().
  struct Rescale {
    float factor[kRows];
  };

  /// Turns the logits `s` (kRows, columns) into weights. A row may have seen no key yet, its logits all -inf.
  ///
  /// Products with the maximum are rounded, __fmul_rn: fused into the differences they would leave their rounding
  /// errors there, and a maximum that has not moved would ask for a factor of almost 1.
  template <class Logits>
  __device__ __forceinline__ Rescale advance(Logits& s, float scale_log2) {
    Rescale rescale;
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      float largest = s(r, 0);
      CUTE_UNROLL
      for (int c = 1; c < cute::size<1>(s); ++c) largest = fmaxf(largest, s(r, c));
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, 2));
      largest = fmaxf(largest, row_max[r]);
      const float power = largest == -INFINITY ? 0.0f : __fmul_rn(largest, scale_log2);
      rescale.factor[r] = exp2_approx(__fmul_rn(row_max[r], scale_log2) - power);
      row_max[r] = largest;
      const float offset = power - kHeadroom;
      float sum = row_sum[r] * rescale.factor[r];
      CUTE_UNROLL
      for (int c = 0; c < cute::size<1>(s); ++c) {
        s(r, c) = exp2_approx(s(r, c) * scale_log2 - offset);
        sum += s(r, c);
      }
      row_sum[r] = sum;
    }
    return rescale;
  }

  /// O (kRows, columns) times the factors. The maximum of a row seldom moves once it has seen some hundred keys; a
  /// factor is the same in the four lanes of its row.
  template <class Output>
  __device__ __forceinline__ static void apply(const Rescale& rescale, Output& o) {
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      if (__any_sync(0xffffffff, rescale.factor[r] != 1.0f)) {
        CUTE_UNROLL
        for (int c = 0; c < cute::size<1>(o); ++c) o(r, c) *= rescale.factor[r];
      }
    }
  }

  /// Joins the sums of the four lanes of each row.
  __device__ __forceinline__ void finish() {
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      row_sum[r] += __shfl_xor_sync(0xffffffff, row_sum[r], 1);
      row_sum[r] += __shfl_xor_sync(0xffffffff, row_sum[r], 2);
    }
  }

  /// log2 of what a sum of weights stands for.
  __device__ __forceinline__ static float log2_of(float sum) { return log2f(sum) - kHeadroom; }

  /// Natural logarithm of the sum of exp(logit); -inf for a row without keys. After finish().
  __device__ __forceinline__ float lse(int r, float scale_log2) const {
    return row_sum[r] == 0.0f ? -INFINITY : (row_max[r] * scale_log2 + log2_of(row_sum[r])) * kLn2;
  }
};

/// The factor from raw logits to powers of two, and the sign that Q takes over so that it is positive. Not 0, so that
/// a masked logit stays -inf.
struct LogitScale {
  float magnitude_log2;
  float sign;

  __device__ static LogitScale of(float scale) {
    return {fmaxf(fabsf(scale) * kLog2E, 1e-30f), scale < 0.0f ? -1.0f : 1.0f};
  }
};

}  // namespace dca::cuda
