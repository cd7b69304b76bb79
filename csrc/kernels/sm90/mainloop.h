// The steps of the sm90 mainloop: K and V by TMA through rings guarded by mbarriers, S = Q K^T and O += P V by wgmma.
#pragma once

#include "key_blocks.h"
#include "queries.h"
#include "softmax.h"
#include "traits.h"

namespace dca::cuda::sm90 {

using Barrier = cutlass::arch::ClusterTransactionBarrier;
using EmptyBarrier = cutlass::arch::ClusterBarrier;

/// Where a ring stands: the stage, and which of the barrier's two phases belongs to this round.
template <int kStages>
struct RingPosition {
  int32_t stage = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) stage = 0, phase ^= 1;
  }
};

/// ((2, 2, V), M, N) accumulators of 64-row wgmma tiles -> ((2, M), (2, V, N)): rows, columns.
template <class AccLayout>
__device__ __forceinline__ constexpr auto as_rows_and_columns(AccLayout layout) {
  return make_layout(make_layout(get<0, 1>(layout), get<1>(layout)),
                     make_layout(get<0, 0>(layout), get<0, 2>(layout), get<2>(layout)));
}

/// Logits accumulators ((2, 2, V), M, 1) -> ((2, 2, 2), M, V / 2): the A operand of the next product.
template <class AccLayout>
__device__ __forceinline__ constexpr auto as_operand_a(AccLayout layout) {
  const auto pairs = logical_divide(get<0, 2>(layout), Layout<_2>{});
  return make_layout(make_layout(get<0, 0>(layout), get<0, 1>(layout), get<0>(pairs)), get<1>(layout),
                     make_layout(get<1>(pairs), get<2>(layout)));
}

/// acc = A B or acc += A B over all steps of K, issued and committed; the caller waits.
template <bool kClear, class Mma, class FragmentA, class FragmentB, class Acc>
__device__ __forceinline__ void issue_product(Mma& mma, const FragmentA& a, const FragmentB& b, Acc& acc) {
  warpgroup_fence_operand(acc);
  warpgroup_arrive();
  mma.accumulate_ = kClear ? GMMA::ScaleOut::Zero : GMMA::ScaleOut::One;
  for_each(make_int_sequence<decltype(size<2>(FragmentA{}))::value>{}, [&](auto k) {
    gemm(mma, a(_, _, k), b(_, _, k), acc);
    mma.accumulate_ = GMMA::ScaleOut::One;
  });
  warpgroup_commit_batch();
}

/// Key of the first row that TMA brings for a block: a box has kBlockN rows and ends where the block ends. Negative at
/// the beginning of a sequence.
__device__ __forceinline__ int32_t first_key_of_box(const KeyBlock& block, int32_t block_n) {
  return block.begin + block.count - block_n;
}

/// Hides the keys in front of a block in its box, which another segment has or nobody, and in the intra segment those
/// behind the row's own position.
template <class Logits, class Coordinates>
__device__ __forceinline__ void mask_block(Logits& s, const Coordinates& coordinates, const AttentionArgs& args,
                                           const WorkTile& tile, const KeyBlock& block, int32_t block_n) {
  const int32_t first = block_n - block.count;
  const int32_t base = first_key_of_box(block, block_n);
  CUTE_UNROLL
  for (int r = 0; r < size<0>(s); ++r) {
    int32_t limit = block_n;
    if (block.segment == Segment::Intra) {
      limit = TileRow::of(args, tile, get<0>(coordinates(r, 0))).position - base + 1;
    }
    CUTE_UNROLL
    for (int c = 0; c < size<1>(s); ++c) {
      const int32_t column = get<1>(coordinates(r, c));
      if (column < first || column >= limit) s(r, c) = -INFINITY;
    }
  }
}

}  // namespace dca::cuda::sm90
