// The steps of both mainloops: K and V into shared memory, Q rotated into shared memory, S = Q K^T, mask, O += P V.
//
// Tensors are named as in CUTLASS: s for shared memory, r for registers; tS for the partition of Q K^T, tO of P V.
#pragma once

#include "cache_rows.h"
#include "key_blocks.h"
#include "rotary.h"
#include "softmax.h"
#include "traits.h"

namespace dca::cuda::sm80 {

// --- Global to shared memory ---

/// Copies the keys of a block, or their values, into shared memory of `SmemLayout` (kRows, kHeadDim), by kThreads
/// threads, 16 bytes at a time. Rows behind the block and columns behind head_dim become 0: what lies there in the
/// cache belongs to nobody or to another segment, and 0 * NaN would reach the output.
template <class SmemLayout, int kThreads, class Element, bool kPaged>
__device__ __forceinline__ void load_rows(const CacheRows<Element, kPaged>& source, const KeyBlock& block,
                                          int32_t first_key, int32_t head_dim, Element* smem, int32_t thread) {
  constexpr int kRows = size<0>(SmemLayout{});
  constexpr int kHeadDim = size<1>(SmemLayout{});
  constexpr int kColumns = SmemRows<kHeadDim>::kColumns;
  constexpr int kUnits = kColumns / 8;
  constexpr int kRowsAtOnce = kThreads / kUnits;
  static_assert(kRows % kRowsAtOnce == 0 || kRowsAtOnce > kRows);
  // A thread's rows and columns are whole atoms apart, so its addresses differ by constants.
  static_assert(kRowsAtOnce % 8 == 0 || kRows % 8 == 0);
  const auto layout = SmemLayout{};
  const int32_t unit = thread % kUnits * 8;
  CUTE_UNROLL
  for (int pass = 0; pass < ceil_div(kRows, kRowsAtOnce); ++pass) {
    const int32_t row = pass * kRowsAtOnce + thread / kUnits;
    if (kRowsAtOnce > kRows && row >= kRows) break;
    const int32_t in_block = first_key + row;
    const Element* data = in_block < block.count ? source.row(block.begin + in_block) : nullptr;
    CUTE_UNROLL
    for (int first = 0; first < kHeadDim; first += kColumns) {
      const int32_t column = first + unit;
      const bool present = data != nullptr && column < head_dim;
      const auto* from = reinterpret_cast<const uint128_t*>(present ? data + column : source.any());
      SM80_CP_ASYNC_CACHEGLOBAL_ZFILL<uint128_t>::copy(*from, *reinterpret_cast<uint128_t*>(smem + layout(row, column)),
                                                       present);
    }
  }
}

// --- The queries ---

/// Rotates rows of the tile for `segment` into shared memory of `SmemLayout` (rows, kHeadDim), read anew from global
/// memory: an unrotated copy beside them would cost as much shared memory as a stage of keys. Lane `lane` of `lanes`;
/// they hold the rows row_of(0) ... row_of(num_rows - 1).
template <class SmemLayout, class Element, class RowOf>
__device__ __forceinline__ void load_queries(const AttentionArgs& args, const WorkTile& tile, Segment segment,
                                             float sign, Element* smem, int32_t num_rows, RowOf row_of, int32_t lane,
                                             int32_t lanes) {
  constexpr int kHeadDim = size<1>(SmemLayout{});
  const AttentionParams& p = args.p;
  const RotaryUnits units = RotaryUnits::of(p.rotary, kHeadDim, kVec<Element>);
  const auto layout = SmemLayout{};
  CUTE_NO_UNROLL  // beside the accumulators there are no registers for more
      for (int32_t i = lane; i < num_rows * units.count; i += lanes) {
    const int32_t row = row_of(i / units.count);
    const int32_t unit = i % units.count;
    const auto store = [&](int32_t column, const Vec16<Element>& x) { store16(smem + layout(row, column), x); };
    const TileRow at = TileRow::of(args, tile, row);
    if (!at.valid) {
      Vec16<Element> zero;
      clear(zero);
      if (units.paired && unit < units.offset) store(unit * 8, zero);
      store((unit < units.offset ? unit * 8 + p.rotary.half_dim : (unit + units.offset) * 8), zero);
      continue;
    }
    const int64_t batch = p.cu_seqlens_q != nullptr ? 0 : tile.b;
    const int64_t table = static_cast<int64_t>(p.chunk.query_position(at.position, segment)) * p.rotary.half_dim;
    RotaryRow<Element> source;
    source.data = static_cast<const Element*>(p.q.data) + batch * p.q.stride.batch +
                  (tile.seqlen.q_row + tile.seqlen.row(at.position)) * p.q.stride.row + at.head * p.q.stride.head;
    source.head_dim = p.head_dim;
    source.cos = p.rotary.cos + table;
    source.sin = p.rotary.sin + table;
    source.factor = sign;
    rotate_unit(source, p.rotary, units, unit, store);
  }
}

// --- Products ---

/// acc = A B^T with A (M, K) and B (N, K) in shared memory. The loops are unrolled and the compiler reads ahead as far
/// as registers allow; reading one step ahead by hand made the kernels of head_dim 128 spill.
template <class Mma, class Acc, class SmemA, class SmemB>
__device__ __forceinline__ void multiply_qk(Acc& acc, const SmemA& sA, const SmemB& sB, int32_t thread) {
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

// --- Mask ---

/// Hides what a row must not see: keys behind the block's count and, in the intra segment, keys behind the row's own
/// position. `coordinates` are the (row, column) of each logit in its tile.
template <class Logits, class Coordinates>
__device__ __forceinline__ void mask_logits(Logits& s, const Coordinates& coordinates, const AttentionArgs& args,
                                            const WorkTile& tile, const KeyBlock& block, int32_t first_key) {
  CUTE_UNROLL
  for (int r = 0; r < size<0>(s); ++r) {
    int32_t limit = block.count;
    if (block.segment == Segment::Intra) {
      const int32_t position = TileRow::of(args, tile, get<0>(coordinates(r, 0))).position;
      limit = min(limit, position - block.begin + 1);
    }
    CUTE_UNROLL
    for (int c = 0; c < size<1>(s); ++c) {
      if (first_key + get<1>(coordinates(r, c)) >= limit) s(r, c) = -INFINITY;
    }
  }
}

}  // namespace dca::cuda::sm80
