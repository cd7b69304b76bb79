// The products of decode over a cache of e4m3: ldmatrix brings it from shared memory two numbers at a time, as if they
// were one element of 16 bits, and they become elements in registers: keys those of Q, values fp16.
//
// Which column of a product a number belongs to is free, if all parties agree. So nothing is exchanged between lanes:
// of each 16 channels the even ones are the columns 0 to 7, and the odd ones 8 to 15.
//
//   S = Q K^T  Of 8 keys x 16 channels a lane gets channels 4t to 4t + 3 of a key (t = lane % 4): bytes 0 and 2 are
//              even channels, columns 2t and 2t + 1 of the operand; bytes 1 and 3 columns 2t + 8 and 2t + 9. Q is
//              written to shared memory in this order.
//   O += P V   Of 8 keys x 16 channels, transposed, a lane gets channels 2g and 2g + 1 (g = lane / 4) of keys 2t and
//              2t + 1: bytes 0 and 2 are channel 2g of both, column g of one tile of O; bytes 1 and 3 of the next. A
//              lane then holds channels 4t to 4t + 3 of a row of O.
#pragma once

#include "e4m3.h"
#include "mainloop.h"

namespace dca::cuda::sm80 {

/// Writes 8 columns of Q, of each 16 the even ones first.
struct EvenColumnsFirst {
  template <class Smem, class Vec>
  __device__ __forceinline__ void operator()(Smem& sQ, int32_t row, int32_t column, const Vec& x) const {
    const auto* const words = reinterpret_cast<const uint32_t*>(x.data());
    const int32_t first = column / 16 * 16 + column % 16 / 2;
    // Halves of two words: the lower ones, the upper ones.
    const auto lower = [&](int i) { return __byte_perm(words[i], words[i + 1], 0x5410); };
    const auto upper = [&](int i) { return __byte_perm(words[i], words[i + 1], 0x7632); };
    *reinterpret_cast<uint2*>(&sQ(row, first)) = {lower(0), lower(2)};
    *reinterpret_cast<uint2*>(&sQ(row, first + 8)) = {upper(0), upper(2)};
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
        const uint2 even_odd = read_e4m3_even_odd<Element>(words(half, n));
        key_words(0, n) = even_odd.x;
        key_words(1, n) = even_odd.y;
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
