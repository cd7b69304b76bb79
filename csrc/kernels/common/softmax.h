// Online softmax of the rows that a thread holds of a tile of mma.sync or wgmma (Milakov and Gimelshein 2018; base 2).
//
// A thread holds kRows rows of the logits tile, and four neighbouring lanes share a row. The running sum is kept per
// lane and joined at the end; the running maximum is joined wherever it is looked for.
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

/// For each block either advance(), then apply() to O before its products, or, where maxima are trusted, weigh(), then
/// add() or admit(). In the end finish(), and fits() where they were trusted without admit().
///
/// kHeadroom: weights are 2^kHeadroom times as large, so that formats with few exponent bits hold small ones. It
/// cancels where O is divided by the sums.
template <int kRows, int kHeadroom = 0>
struct OnlineSoftmax {
  /// A maximum stays what it is while weights exceed 1 by no more than 2^kSlack: O is then seldom multiplied.
  static constexpr float kSlack = kHeadroom > 0 ? 0.0f : 8.0f;

  /// What the weights of a row may sum up to, so that O has room for values.
  static constexpr float kMostSum = 0x1p64f;

  /// Of the raw logits that advance() has seen, or some that is smaller by at most kSlack powers of two.
  float row_max[kRows];
  float row_sum[kRows];  ///< this lane's share of sum 2^((logit - row_max) * scale_log2 + kHeadroom)

  __device__ OnlineSoftmax() {
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) row_max[r] = -INFINITY, row_sum[r] = 0.0f;
  }

  /// What the rows of O have to be multiplied by after advance().
  struct Rescale {
    float factor[kRows];
  };

  /// The largest logit of each row of `s` (kRows, columns), over its four lanes. Up to four running maxima a row: one
  /// alone would wait for itself at every column.
  template <class Logits>
  __device__ __forceinline__ static void row_maxima(const Logits& s, float (&maxima)[kRows]) {
    constexpr int kColumns = decltype(cute::size<1>(s))::value;
    constexpr int kChains = kColumns < 8 ? 1 : 4;
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      float chains[kChains];
      CUTE_UNROLL
      for (int c = 0; c < kChains; ++c) chains[c] = s(r, c);
      CUTE_UNROLL
      for (int c = kChains; c < kColumns; ++c) chains[c % kChains] = fmaxf(chains[c % kChains], s(r, c));
      maxima[r] = chains[0];
      CUTE_UNROLL
      for (int i = 1; i < kChains; ++i) maxima[r] = fmaxf(maxima[r], chains[i]);
    }
    CUTE_UNROLL
    for (int lanes = 1; lanes < 4; lanes *= 2) {
      CUTE_UNROLL
      for (int r = 0; r < kRows; ++r) maxima[r] = fmaxf(maxima[r], __shfl_xor_sync(0xffffffff, maxima[r], lanes));
    }
  }

  /// Turns the logits `s` (kRows, columns) into weights. A row may have seen no key yet, its logits all -inf.
  ///
  /// Products with the maximum are rounded, __fmul_rn: fused into the differences they would leave their rounding
  /// errors there, and a maximum that has not moved would ask for a factor of almost 1.
  template <class Logits>
  __device__ __forceinline__ Rescale advance(Logits& s, float scale_log2) {
    Rescale rescale;
    float maxima[kRows];
    row_maxima(s, maxima);
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      float largest = fmaxf(maxima[r], row_max[r]);
      if ((largest - row_max[r]) * scale_log2 <= kSlack) largest = row_max[r];
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

  /// What a block adds to the sums of a lane.
  struct Sums {
    float of_block[kRows];
  };

  /// Turns the logits `s` into weights by the maxima as they are, without a look for larger logits, which takes as long
  /// as half the exponentials. Weights may exceed 1, which floating point does not mind as far as they are finite in
  /// the dtype that they are rounded to. Of a row that has seen no key yet they are not. For kHeadroom 0 only.
  template <class Logits>
  __device__ __forceinline__ Sums weigh(Logits& s, float scale_log2) const {
    Sums sums;
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const float offset = __fmul_rn(row_max[r], scale_log2);
      float sum = 0.0f;
      CUTE_UNROLL
      for (int c = 0; c < cute::size<1>(s); ++c) {
        s(r, c) = exp2_approx(s(r, c) * scale_log2 - offset);
        sum += s(r, c);
      }
      sums.of_block[r] = sum;
    }
    return sums;
  }

  /// Takes over what weigh() has summed.
  __device__ __forceinline__ void add(const Sums& sums) {
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) row_sum[r] += sums.of_block[r];
  }

  /// add(), if no row of the warp has more than `limit` in the block. Else nothing changes, the result is false, and
  /// the logits are needed again, for advance().
  __device__ __forceinline__ bool admit(const Sums& sums, float limit) {
    bool fits = true;
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) fits &= sums.of_block[r] <= limit;  // false if it is no number
    if (!__all_sync(0xffffffff, fits)) return false;
    add(sums);
    return true;
  }

  /// Whether all weights of row r were finite, and small enough to leave room for the values in `o`, any element of
  /// that row of O: one infinite weight, and each is infinite or no number. After finish().
  __device__ __forceinline__ bool fits(int r, float o) const { return row_sum[r] <= kMostSum && fabsf(o) < INFINITY; }

  /// O (kRows, columns) times the factors. The maximum of a row seldom moves once it has seen some hundred keys.
  template <class Output>
  __device__ __forceinline__ static void apply(const Rescale& rescale, Output& o) {
    bool moved = false;
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) moved |= rescale.factor[r] != 1.0f;
    if (!__any_sync(0xffffffff, moved)) return;
    CUTE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      CUTE_UNROLL
      for (int c = 0; c < cute::size<1>(o); ++c) o(r, c) *= rescale.factor[r];
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
/// a masked logit stays -inf. NaN stays NaN.
struct LogitScale {
  float magnitude_log2;
  float sign;

  __device__ static LogitScale of(float scale) {
    const float magnitude = fabsf(scale) * kLog2E;
    return {magnitude < 1e-30f ? 1e-30f : magnitude, scale < 0.0f ? -1.0f : 1.0f};
  }
};

}  // namespace dca::cuda
