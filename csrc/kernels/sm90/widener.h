// The producer warpgroup where K and V are a cache of e4m3: TMA brings what the cache holds into rings of its own, and
// all four warps widen each block, once for all consumers, into the rings that the products read. The first warp is
// also the producer of the packed rings.
#pragma once

#include "producer.h"
#include "sm80/e4m3_rows.h"

namespace dca::cuda::sm90 {

template <class Traits>
class Widener {
  using Shared = typename Traits::Shared;
  using Cached = typename Traits::Cached;
  using Packed = uint16_t;  // two numbers of the cache

 public:
  /// `thread` of the warpgroup.
  __device__ Widener(const PrefillArgs& args, Shared& shared, int32_t thread)
      : shared_(shared), thread_(thread), producer_(args, shared, thread % 32) {}

  __device__ void run() {
    for (RingPosition<Traits::kTileSlots> at;; at.advance()) {
      if (is_producer()) producer_.next_tile();
      Barrier::wait(&shared_.tile_full[at.stage()], at.phase());
      const TileSlot& slot = shared_.tiles[at.stage()];
      if (slot.last) break;
      widen_keys(slot.tile, slot.careful);
      at.count = slot.count;  // as it was, but not kept in a register meanwhile
      EmptyBarrier::arrive(&shared_.tile_empty[at.stage()]);
    }
  }

 private:
  __device__ __forceinline__ bool is_producer() const { return thread_ < 32; }

  // The loads are one block ahead. `careful`: maxima are looked for in all blocks.
  __device__ void widen_keys(const WorkTile& tile, bool careful) {
    static_assert(Traits::kPackedStages == 2);
    RingBarriers<Traits::kPackedStages>& from = shared_.widening;
    RingBarriers<Traits::kStages>& to = shared_.products;
    KeyBlockIterator<true> ahead(tile.ranges, Traits::kBlockN);
    KeyBlock block = ahead.next();
    request(tile, block);
    bool look = true;
    for (; block.count > 0; ++count_) {
      const KeyBlock next = ahead.next();
      request(tile, next);
      const RingPosition<Traits::kStages> place{count_};
      widen(shared_.packed.k, from.k_full, from.k_empty, shared_.k, to.k_full, to.k_empty, [&](Packed*) {
        if (thread_ != 0) return;
        shared_.notes[place.stage()] = BlockNote::of(tile, block, next, Traits::kBlockN, careful || look);
      });
      widen(shared_.packed.v, from.v_full, from.v_empty, shared_.v, to.v_full, to.v_empty,
            [&](Packed* values) { clear_foreign_values(tile, block, values); });
      look = Traits::kLooksAtSegments && next.segment != block.segment;
      block = next;
    }
  }

  __device__ __forceinline__ void request(const WorkTile& tile, const KeyBlock& block) {
    if (!is_producer() || block.count == 0) return;
    producer_.request(tile, BlockNote::of(tile, block, {}, Traits::kBlockN, true));
  }

  // The next block of one of the rings. `prepare`: by all threads, when the packed block is there and its place free.
  template <class Wide, class Prepare>
  __device__ __forceinline__ void widen(Cached* packed, uint64_t* packed_full, uint64_t* packed_empty, Wide* wide,
                                        uint64_t* wide_full, uint64_t* wide_empty, Prepare&& prepare) const {
    const RingPosition<Traits::kPackedStages> from{count_};
    const RingPosition<Traits::kStages> to{count_};
    Barrier::wait(&packed_full[from.stage()], from.phase());
    EmptyBarrier::wait(&wide_empty[to.stage()], to.phase_before());
    auto* const numbers = reinterpret_cast<Packed*>(packed + from.stage() * Traits::kStageElements);
    prepare(numbers);
    sm80::widen_rows<typename Traits::SmemPacked, typename Traits::SmemKvRows, 128, Traits::kPackedUnitsAhead>(
        numbers, wide + to.stage() * Traits::kStageElements, made_anew(thread_));
    cutlass::arch::fence_view_async_shared();  // each writer, before wgmma reads, and before TMA writes over zeros
    release(packed_empty[from.stage()]);
    if (thread_ % 32 == 0) EmptyBarrier::arrive(&wide_full[to.stage()]);
  }

  // Rows that are no key of the sequence: padding, another sequence's, nobody's. A weight of 0 does not hide a NaN.
  // Each thread clears what it widens itself.
  __device__ __forceinline__ void clear_foreign_values(const WorkTile& tile, const KeyBlock& block,
                                                       Packed* values) const {
    const int32_t first_key = first_key_of(tile, block, Traits::kBlockN);
    const int32_t kv_len = tile.seqlen.kv_len;
    if (first_key >= 0 && first_key + Traits::kBlockN <= kv_len) return;
    sm80::clear_rows<typename Traits::SmemPacked, 128>(
        values, [&](int32_t row) { return first_key + row < 0 || first_key + row >= kv_len; }, made_anew(thread_));
  }

  // One arrival per warp, when all its lanes have come here.
  __device__ __forceinline__ void release(uint64_t& empty) const {
    __syncwarp();
    if (thread_ % 32 == 0) EmptyBarrier::arrive(&empty);
  }

  Shared& shared_;
  const int32_t thread_;
  Producer<Traits> producer_;
  uint32_t count_ = 0;  ///< of the blocks before this one, of all tiles
};

}  // namespace dca::cuda::sm90
