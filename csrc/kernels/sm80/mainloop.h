// The steps of both mainloops that are sm80's own: K and V into shared memory by cp.async, S = Q K^T and O += P V by
// ldmatrix and mma.sync.
//
// Tensors are named as in CUTLASS: s for shared memory, r for registers; tS for the partition of Q K^T, tO of P V.
#pragma once

#include "cache_rows.h"
#include "key_blocks.h"
#include "queries.h"
#include "softmax.h"
#include "traits.h"

namespace dca::cuda::sm80 {

// --- Global to shared memory ---

/// Which 16-byte units of rows in shared memory of `SmemLayout` (kRows, kHeadDim) are a thread's, out of kThreads:
/// those of one column of units of the atoms, kRowsAtOnce rows and kColumns columns apart.
template <class SmemLayout, int kThreads>
struct ThreadUnits {
  static constexpr int kRows = size<0>(SmemLayout{});
  static constexpr int kHeadDim = size<1>(SmemLayout{});
  static constexpr int kColumns = SmemRows<kHeadDim>::kColumns;
  static constexpr int kUnits = kColumns / 8;
  static constexpr int kRowsAtOnce = kThreads / kUnits;
  static_assert(kRows % kRowsAtOnce == 0 || kRowsAtOnce > kRows);
  static_assert(kRowsAtOnce % 8 == 0 || kRows % 8 == 0);

  int32_t row;     ///< the first; kRows or more: the thread has none
  int32_t column;  ///< likewise

  __device__ explicit ThreadUnits(int32_t thread) : row(thread / kUnits), column(thread % kUnits * 8) {}
  __device__ bool none() const { return kRowsAtOnce > kRows && row >= kRows; }

  /// Where the unit `further` rows and `behind` columns from the first is. Units whole atoms apart are permuted alike,
  /// so that addresses differ by constants.
  template <class Element>
  __device__ __forceinline__ Element* unit(Element* first, Element* smem, int further, int behind) const {
    if constexpr (kRowsAtOnce % 8 == 0) {
      return first + SmemLayout{}(further, behind);
    } else {
      return smem + SmemLayout{}(row + further, column + behind);
    }
  }
};

/// Copies the keys of a block, or their values, into shared memory of `SmemLayout` (kRows, kHeadDim), by kThreads
/// threads, 16 bytes at a time. Elements of the cache that are narrower than those of shared memory lie there as they
/// are: kHeadDim and head_dim count the latter. Rows behind the block and columns behind head_dim become 0: what lies
/// there in the cache belongs to nobody or to another segment, and 0 * NaN would reach the output.
template <class SmemLayout, int kThreads, class Cached, bool kPaged, class Element>
__device__ __forceinline__ void load_rows(const CacheRows<Cached, kPaged>& source, const KeyBlock& block,
                                          int32_t first_key, int32_t head_dim, Element* smem, int32_t thread) {
  using Units = ThreadUnits<SmemLayout, kThreads>;
  const Units units(thread);
  if (units.none()) return;
  Element* const first = smem + SmemLayout{}(units.row, units.column);
  const int32_t in_block = first_key + units.row;
  CUTE_UNROLL
  for (int further = 0; further < Units::kRows; further += Units::kRowsAtOnce) {
    bool row_present = in_block + further < block.count;
    const auto* const row =
        reinterpret_cast<const Element*>(source.row(block.begin + in_block, further, row_present)) + units.column;
    CUTE_UNROLL
    for (int behind = 0; behind < Units::kHeadDim; behind += Units::kColumns) {
      const auto* const from = reinterpret_cast<const uint128_t*>(row + behind);
      auto& to = *reinterpret_cast<uint128_t*>(units.unit(first, smem, further, behind));
      SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<uint128_t>::copy(*from, to, row_present && units.column + behind < head_dim);
    }
  }
}

// --- Products ---

/// What multiply_qk does beside the products.
struct NothingElse {
  __device__ void operator()() const {}
};

/// acc = A B^T with A (M, K) and B (N, K) in shared memory. The loops are unrolled and the compiler reads ahead as far
/// as registers allow; reading one step ahead by hand made the kernels of head_dim 128 spill. `meanwhile` is called
/// after step kSteps / 4: products are under way while its instructions are issued.
template <class Mma, class Acc, class SmemA, class SmemB, class Meanwhile = NothingElse>
__device__ __forceinline__ void multiply_qk(Acc& acc, const SmemA& sA, const SmemB& sB, int32_t thread,
                                            Meanwhile&& meanwhile = {}) {
  Mma mma;
  const auto thr_mma = mma.get_slice(thread);
  using Element = typename SmemA::value_type;
  const auto copy_a = make_tiled_copy_A(Copy_Atom<SM75_U32x4_LDSM_N, Element>{}, mma);
  const auto thr_copy_a = copy_a.get_slice(thread);
  const auto copy_b = make_tiled_copy_B(Copy_Atom<SM75_U32x4_LDSM_N, Element>{}, mma);
  const auto thr_copy_b = copy_b.get_slice(thread);
  auto tSrA = thr_mma.partition_fragment_A(sA);
  auto tSrB = thr_mma.partition_fragment_B(sB);
  const auto tSsA = thr_copy_a.partition_S(sA);
  const auto tSsB = thr_copy_b.partition_S(sB);
  auto tSrA_view = thr_copy_a.retile_D(tSrA);
  auto tSrB_view = thr_copy_b.retile_D(tSrB);
  const auto load = [&](auto k) {
    copy(copy_a, tSsA(_, _, k), tSrA_view(_, _, k));
    copy(copy_b, tSsB(_, _, k), tSrB_view(_, _, k));
  };
  clear(acc);
  constexpr int kSteps = decltype(size<2>(tSrA))::value;
  for_each(make_int_sequence<kSteps>{}, [&](auto k) {
    load(k);
    gemm(mma, tSrA(_, _, k), tSrB(_, _, k), acc);
    if constexpr (decltype(k)::value == kSteps / 4) meanwhile();
  });
}

/// The same with A in registers already.
template <class Mma, class Acc, class RegisterA, class SmemB>
__device__ __forceinline__ void multiply_qk_registers(Acc& acc, const RegisterA& tSrA, const SmemB& sB,
                                                      int32_t thread) {
  Mma mma;
  const auto thr_mma = mma.get_slice(thread);
  using Element = typename SmemB::value_type;
  const auto copy_b = make_tiled_copy_B(Copy_Atom<SM75_U32x4_LDSM_N, Element>{}, mma);
  const auto thr_copy_b = copy_b.get_slice(thread);
  auto tSrB = thr_mma.partition_fragment_B(sB);
  const auto tSsB = thr_copy_b.partition_S(sB);
  auto tSrB_view = thr_copy_b.retile_D(tSrB);
  clear(acc);
  constexpr int kSteps = decltype(size<2>(tSrA))::value;
  for_each(make_int_sequence<kSteps>{}, [&](auto k) {
    copy(copy_b, tSsB(_, _, k), tSrB_view(_, _, k));
    gemm(mma, tSrA(_, _, k), tSrB(_, _, k), acc);
  });
}

/// acc += P V: the weights P as they came out of Q K^T, V^T (N, K) a view of V in shared memory.
template <class Mma, class Acc, class Weights, class SmemVt>
__device__ __forceinline__ void multiply_pv(Acc& acc, const Weights& weights, const SmemVt& sVt, int32_t thread) {
  Mma mma;
  using Element = typename SmemVt::value_type;
  const auto rounded = convert_fragment<Element>(weights);
  const auto tOrP = make_tensor(rounded.data(), as_operand_a(rounded.layout()));
  const auto copy_v = make_tiled_copy_B(Copy_Atom<SM75_U16x8_LDSM_T, Element>{}, mma);
  const auto thr_copy_v = copy_v.get_slice(thread);
  auto tOrV = mma.get_slice(thread).partition_fragment_B(sVt);
  const auto tOsV = thr_copy_v.partition_S(sVt);
  auto tOrV_view = thr_copy_v.retile_D(tOrV);
  constexpr int kSteps = decltype(size<2>(tOrP))::value;
  for_each(make_int_sequence<kSteps>{}, [&](auto k) {
    copy(copy_v, tOsV(_, _, k), tOrV_view(_, _, k));
    gemm(mma, tOrP(_, _, k), tOrV(_, _, k), acc);
  });
}

}  // namespace dca::cuda::sm80
