// The products of decode over a cache of e4m3: ldmatrix brings it from shared memory two numbers at a time, as if they
// were one element of 16 bits, and they become fp16 in registers. fp16 holds every number of e4m3, takes the fewest
// instructions, and on GPUs that have instructions for e4m3 is what they give. So queries become fp16 as well.
//
// Which column of a product a number belongs to is free, if all parties agree. So nothing is exchanged between lanes:
//
//   S = Q K^T  Of 8 keys x 16 channels a lane gets channels 4t to 4t + 3 of a key (t = lane % 4). They are columns 2t,
//              2t + 1, 2t + 8 and 2t + 9 of the operand, in the order in which they are best read. Q is written to
//              shared memory in this order.
//   O += P V   Of 8 keys x 16 channels, transposed, a lane gets channels 2g and 2g + 1 (g = lane / 4) of keys 2t and
//              2t + 1: bytes 0 and 2 are channel 2g of both, column g of one tile of O; bytes 1 and 3 of the next. A
//              lane then holds channels 4t to 4t + 3 of a row of O.
#pragma once

#include "e4m3.h"
#include "mainloop.h"

namespace dca::cuda::sm80 {

/// Q of bf16, already rounded to it, becomes fp16, which has fewer exponents: times the power of two that makes its
/// products with the cache logits, within a factor of 2. So what is lost below 2^-24 is lost from logits, and only
/// single products of many thousands are too large.
template <class Element>
struct QueryPower {
  float factor = 1.0f;

  /// Takes the power of two out of `scale`. Q of fp16 stays what it is.
  __device__ static QueryPower out_of(LogitScale& scale) {
    if constexpr (std::is_same_v<Element, cutlass::half_t>) return {};
    constexpr float kRead = E4M3Reader<cutlass::half_t>::kScale;  // undoes how numbers are read
    const float power = __uint_as_float(__float_as_uint(scale.magnitude_log2 / kRead) & 0x7f800000u);
    scale.magnitude_log2 /= power;
    return {power};
  }

  __device__ __forceinline__ uint32_t apply(uint32_t pair) const {
    if constexpr (std::is_same_v<Element, cutlass::half_t>) return pair;
    return round_pair<cutlass::half_t>(__uint_as_float(pair << 16) * factor,
                                       __uint_as_float(pair & 0xffff0000u) * factor);
  }
};

/// Writes 8 columns of Q to where the products expect them.
template <class Element>
struct ColumnsAsRead {
  QueryPower<Element> power;

  template <class Smem>
  __device__ __forceinline__ void operator()(Smem& sQ, int32_t row, int32_t column, const Vec16<Element>& x) const {
    const auto* const words = reinterpret_cast<const uint32_t*>(x.data());
    const int32_t first = column / 16 * 16 + column % 16 / 2;
    const uint2 low = ordered_as_read(power.apply(words[0]), power.apply(words[1]));
    const uint2 high = ordered_as_read(power.apply(words[2]), power.apply(words[3]));
    *reinterpret_cast<uint2*>(&sQ(row, first)) = {low.x, high.x};
    *reinterpret_cast<uint2*>(&sQ(row, first + 8)) = {low.y, high.y};
  }
};

/// acc = A B^T with B (N, K / 2) pairs in shared memory. `read_a(k)` is step k of A in registers, its columns permuted.
template <class Mma, class Acc, class ReadA, class SmemB>
__device__ __forceinline__ void multiply_qk_e4m3(Acc& acc, ReadA&& read_a, const SmemB& sB, int32_t thread) {
  Mma mma;
  using Element = typename SmemB::value_type;
  const auto thr_mma = mma.get_slice(thread);
  const auto copy_b = make_tiled_copy_B(Copy_Atom<SM75_U32x4_LDSM_N, Element>{}, mma);
  const auto thr_copy_b = copy_b.get_slice(thread);
  auto pairs = thr_mma.partition_fragment_B(sB);
  const auto tSsB = thr_copy_b.partition_S(sB);
  auto pairs_view = thr_copy_b.retile_D(pairs);
  clear(acc);
  constexpr int kPairSteps = decltype(size<2>(pairs))::value;
  for_each(make_int_sequence<kPairSteps>{}, [&](auto k) {
    copy(copy_b, tSsB(_, _, k), pairs_view(_, _, k));
    const auto words = recast<uint32_t>(pairs(_, _, k));  // (2, N / 8): 16 channels each
    for_each(make_int_sequence<2>{}, [&](auto half) {
      auto keys = make_fragment_like(pairs(_, _, 0));
      auto key_words = recast<uint32_t>(keys);
      CUTE_UNROLL
      for (int n = 0; n < size<1>(words); ++n) {
        const uint2 four = read_e4m3_any_order<Element>(words(half, n));
        key_words(0, n) = four.x;
        key_words(1, n) = four.y;
      }
      const auto a = read_a(Int<2 * decltype(k)::value + decltype(half)::value>{});
      gemm(mma, a, keys, acc);
    });
  });
}

/// acc (M = 16, N = 8) += A B^T with B of one tile in two registers.
template <class Mma, class Acc, class FragmentA>
__device__ __forceinline__ void multiply_column_tile(const Mma& mma, Acc&& acc, const FragmentA& a, uint32_t first,
                                                     uint32_t last) {
  using Element = typename FragmentA::value_type;
  auto b = make_tensor<Element>(Layout<Shape<Shape<_2, _2>, _1>>{});
  auto words = recast<uint32_t>(b);
  words(0) = first;
  words(1) = last;
  gemm(mma, a(_, 0), b(_, 0), acc(_, 0));
}

/// acc += P V with V^T (N / 2, K) pairs of channels, a view of V in shared memory. Columns of acc are permuted.
template <class Mma, class Acc, class Weights, class SmemVt>
__device__ __forceinline__ void multiply_pv_e4m3(Acc& acc, const Weights& weights, const SmemVt& sVt, int32_t thread) {
  Mma mma;
  using Element = typename SmemVt::value_type;
  const auto rounded = convert_fragment<Element>(weights);
  const auto tOrP = make_tensor(rounded.data(), as_operand_a(rounded.layout()));
  const auto copy_v = make_tiled_copy_B(Copy_Atom<SM75_U16x8_LDSM_T, Element>{}, mma);
  const auto thr_copy_v = copy_v.get_slice(thread);
  auto pairs = mma.get_slice(thread).partition_fragment_B(sVt);
  const auto tOsV = thr_copy_v.partition_S(sVt);
  auto pairs_view = thr_copy_v.retile_D(pairs);
  constexpr int kSteps = decltype(size<2>(tOrP))::value;
  for_each(make_int_sequence<kSteps>{}, [&](auto k) {
    copy(copy_v, tOsV(_, _, k), pairs_view(_, _, k));
    const auto words = recast<uint32_t>(pairs(_, _, k));  // (2, N / 16): 8 keys each
    CUTE_UNROLL
    for (int n = 0; n < size<1>(words); ++n) {
      const uint2 first_keys = read_e4m3_even_odd<Element>(words(0, n));
      const uint2 last_keys = read_e4m3_even_odd<Element>(words(1, n));
      multiply_column_tile(mma, acc(_, _, 2 * n), tOrP(_, _, k), first_keys.x, last_keys.x);
      multiply_column_tile(mma, acc(_, _, 2 * n + 1), tOrP(_, _, k), first_keys.y, last_keys.y);
    }
  });
}

}  // namespace dca::cuda::sm80
