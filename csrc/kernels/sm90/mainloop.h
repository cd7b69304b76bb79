// The steps of the sm90 mainloop: rings guarded by mbarriers, the turns of the warpgroups, S = Q K^T and O += P V by
// wgmma, the mask.
#pragma once

#include <cutlass/arch/barrier.h>

#include "key_blocks.h"
#include "queries.h"
#include "softmax.h"
#include "traits.h"

namespace dca::cuda::sm90 {

// --- Order ---

using Barrier = cutlass::arch::ClusterTransactionBarrier;
using EmptyBarrier = cutlass::arch::ClusterBarrier;

/// The place in a ring of the count-th entry that goes through it, and which of the barrier's two phases is its
/// round's.
template <int kStages>
struct RingPosition {
  uint32_t count = 0;

  __device__ __forceinline__ int32_t stage() const { return static_cast<int32_t>(count % kStages); }
  __device__ __forceinline__ uint32_t phase() const { return count / kStages % 2; }
  /// For whoever fills the ring, and waits for a place of the round before: the first round finds all of them free.
  __device__ __forceinline__ uint32_t phase_before() const { return phase() ^ 1; }
  __device__ __forceinline__ void advance() { ++count; }
  __device__ __forceinline__ RingPosition before() const { return {count - 1}; }
};

/// Hardware barriers among consumers. Their numbers are constants in the instructions: as values, they would take
/// registers for as long as the kernel runs.
template <int kConsumers>
struct ConsumerBarriers {
  using Named = cutlass::arch::NamedBarrier;
  static_assert(Named::ReservedNamedBarrierCount + 2 + 2 * kConsumers <= Named::HardwareMaxNumNamedBarriers);

  /// The threads of one warpgroup.
  __device__ __forceinline__ static void warpgroup(int32_t index) {
    for_index(index, [](auto i) { Named::sync(128, 1 + i); });
  }
  /// All consumers.
  __device__ __forceinline__ static void all() { Named::sync(128 * kConsumers, 1 + kConsumers); }

  // A turn is waited for by the warpgroup whose it is and given by the one before it.
  __device__ __forceinline__ static void wait_for_turn(int32_t index) {
    for_index(index, [](auto i) { Named::sync(256, 2 + kConsumers + i); });
  }
  __device__ __forceinline__ static void give_turn(int32_t index) {
    for_index(index, [](auto i) { Named::arrive(256, 2 + kConsumers + i); });
  }

 private:
  template <class Function>
  __device__ __forceinline__ static void for_index(int32_t index, Function&& function) {
    for_each(make_int_sequence<kConsumers>{}, [&](auto i) {
      if (index == i) function(i);
    });
  }
};

/// The warpgroups issue the products of a block in turn, so that one's softmax runs under another's products. All of
/// them walk the same blocks, so they take as many turns.
template <int kConsumers, bool kOrdered>
struct Turns {
  using Barriers = ConsumerBarriers<kConsumers>;

  /// Before the first turn, which is the first warpgroup's.
  __device__ __forceinline__ static void begin(int32_t warpgroup) {
    if (kOrdered && warpgroup == kConsumers - 1) Barriers::give_turn(0);
  }
  __device__ __forceinline__ static void take(int32_t warpgroup) {
    if constexpr (kOrdered) Barriers::wait_for_turn(warpgroup);
  }
  __device__ __forceinline__ static void pass(int32_t warpgroup) {
    if constexpr (kOrdered) Barriers::give_turn(warpgroup + 1 == kConsumers ? 0 : warpgroup + 1);
  }
  /// After the last turn: the first warpgroup takes the one that nobody needs, so that no barrier stays half full.
  __device__ __forceinline__ static void end(int32_t warpgroup) {
    if (kOrdered && warpgroup == 0) Barriers::wait_for_turn(0);
  }
};

// --- Products ---

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

/// The same value, but what follows from it - addresses, descriptors for wgmma - is not kept in registers from use to
/// use, where it would push accumulators out of them.
template <class T>
__device__ __forceinline__ T* made_anew(T* pointer) {
  asm volatile("" : "+l"(pointer));
  return pointer;
}
__device__ __forceinline__ int32_t made_anew(int32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}
__device__ __forceinline__ uint32_t made_anew(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
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

// --- Blocks of keys ---

/// Hides the rows that are not the block's and, in the intra segment, keys behind the row's own position.
template <class Logits, class Coordinates>
__device__ __forceinline__ void mask_block(Logits& s, const Coordinates& coordinates, const AttentionArgs& args,
                                           const WorkTile& tile, const KeyBlock& block, int32_t first_key) {
  // Counted from the thread's first column, from which the others are constants away.
  const int32_t begin = block.begin - first_key - get<1>(coordinates(0, 0));
  const int32_t end = begin + block.count;
  CUTE_UNROLL
  for (int r = 0; r < size<0>(s); ++r) {
    int32_t limit = end;
    if (block.segment == Segment::Intra) {
      const int32_t position = TileRow::of(args, tile, get<0>(coordinates(r, 0))).position;
      limit = min(limit, begin + position - block.begin + 1);
    }
    CUTE_UNROLL
    for (int c = 0; c < size<1>(s); ++c) {
      const int32_t column = c / 2 * 8 + c % 2;
      if (column < begin || column >= limit) s(r, c) = -INFINITY;
    }
  }
}

}  // namespace dca::cuda::sm90
