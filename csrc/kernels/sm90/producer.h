// The producer warp: finds the tiles of the CTA, and brings their keys and values by TMA.
#pragma once

#include <cute/arch/copy_sm90_tma.hpp>

#include "key_source.h"
#include "mainloop.h"
#include "prefill_args.h"

namespace dca::cuda::sm90 {

/// The tiles of a CTA: one of each round of gridDim.x tiles, alternately counted from the front and from the back of
/// the round. Tiles are ordered by length, so that all CTAs get nearly the same work.
struct TileSequence {
  int32_t round = 0;

  __device__ int32_t next(const PrefillArgs& args) {
    const int32_t size = static_cast<int32_t>(gridDim.x);
    const int32_t place = static_cast<int32_t>(blockIdx.x);
    const int64_t index = static_cast<int64_t>(round) * size + (round % 2 == 0 ? place : size - 1 - place);
    ++round;
    return index < args.num_tiles ? static_cast<int32_t>(index) : -1;  // past the last one only in the last round
  }
};

template <class Traits>
class Producer {
  using Shared = typename Traits::Shared;
  using Cached = typename Traits::Cached;

 public:
  __device__ Producer(const PrefillArgs& args, Shared& shared, int32_t lane)
      : args_(args), shared_(shared), lane_(lane) {}

  __device__ void run() {
    while (next_tile()) {
      const WorkTile& found = tile();
      KeyBlockIterator<true> walk(found.ranges, Traits::kBlockN);
      bool look = true;
      for (KeyBlock block = walk.next(); block.count > 0;) {
        const KeyBlock next = walk.next();
        request(found, BlockNote::of(found, block, next, Traits::kBlockN, careful_ || look));
        look = Traits::kLooksAtSegments && next.segment != block.segment;
        block = next;
      }
    }
  }

  /// Finds a tile that has work, and says so to all who wait for it; or that there is none any more: false.
  __device__ bool next_tile() {
    slot_.advance();
    for (int32_t index = next_index(); index >= 0; index = next_index()) {
      WorkTile& tile = current().tile;
      __syncwarp();  // all lanes have seen that the tile before was empty, if it was
      if (lane_ == 0) tile.assign(args_.attention, index);
      __syncwarp();
      if (tile.empty() && !tile.first_of_sequence) continue;
      if (!tile.empty()) prefetch_queries<typename Traits::Element, Traits::kBlockM>(args_.attention, tile, lane_, 32);
      publish(index);
      return true;
    }
    publish(-1);
    return false;
  }

  /// The one that next_tile() has found.
  __device__ const WorkTile& tile() const { return current().tile; }

  /// Asks for the keys and values of a block of that tile, as soon as there is room for them, and says what they are
  /// to those who wait for them. Of packed rings the widener says it.
  __device__ __forceinline__ void request(const WorkTile& tile, const BlockNote& note) {
    const KeySource source = KeySource::of(args_.attention, tile, note.first_key + row(), args_.rows_per_box);
    load(args_.k, source, tile.kv_head, rings().k, barriers().k_full, barriers().k_empty, [&] {
      if constexpr (!Traits::kE4M3) shared_.notes[at_.stage()] = note;
    });
    load(args_.v, source, tile.kv_head, rings().v, barriers().v_full, barriers().v_empty, [&] {
      if constexpr (!Traits::kE4M3) shared_.first_keys[at_.stage()] = note.first_key;
    });
    at_.advance();
  }

 private:
  // The tile to compute in the slot, when it is free. One that failed comes first. From the first failure on all tiles
  // are careful: what makes one fail is likely to be met again, and at most those in the slots are computed twice.
  __device__ int32_t next_index() {
    int32_t index = failed_in(slot_);
    if (index < 0) index = tiles_.next(args_);
    if constexpr (Traits::kTrusting) {  // before the last word all tiles must be done
      for (uint32_t i = 1; i < Traits::kTileSlots && index < 0; ++i) index = failed_in({slot_.count + i});
    }
    return index;
  }

  // The tile that was last in a slot, when it is done, if it failed.
  __device__ int32_t failed_in(RingPosition<Traits::kTileSlots> at) {
    at.count = made_anew(at.count);  // what follows from it would take registers, of which there are few
    EmptyBarrier::wait(&shared_.tile_empty[at.stage()], at.phase_before());
    if constexpr (!Traits::kTrusting) return -1;
    TileSlot& slot = shared_.tiles[at.stage()];
    const int32_t index = slot.failed != 0 ? slot.index : -1;
    __syncwarp();  // all lanes have read it
    if (index < 0) return -1;
    if (lane_ == 0) slot.failed = 0;
    careful_ = true;
    return index;
  }

  // `index`: of the tile in the slot; -1: there is none any more.
  __device__ __forceinline__ void publish(int32_t index) {
    if (lane_ == 0) {
      TileSlot& slot = current();
      if (index >= 0) {
        slot.before = BlockFlags::in_front_of(KeyBlockIterator<true>(slot.tile.ranges, Traits::kBlockN).next());
      }
      slot.index = index;
      slot.count = slot_.count;
      slot.last = index < 0;
      slot.careful = careful_;
      EmptyBarrier::arrive(&shared_.tile_full[slot_.stage()]);
    }
  }

  // The slot of the tile that next_tile() has found.
  __device__ TileSlot& current() const { return shared_.tiles[made_anew(slot_.stage())]; }

  // The rings that TMA fills, and their barriers: those of the products, or those that are widened into them.
  __device__ auto& rings() const {
    if constexpr (Traits::kE4M3) {
      return shared_.packed;
    } else {
      return shared_;
    }
  }
  __device__ RingBarriers<Traits::kLoadStages>& barriers() const {
    if constexpr (Traits::kE4M3) {
      return shared_.widening;
    } else {
      return shared_.products;
    }
  }

  // The first row of a block that this lane asks for.
  __device__ __forceinline__ int32_t row() const { return lane_ * args_.rows_per_box; }

  // Lane i brings the i-th box of rows, column by column of atoms. `say`: into the place, before it is full.
  template <class Say>
  __device__ __forceinline__ void load(const CUtensorMap& map, const KeySource& source, int32_t kv_head, Cached* ring,
                                       uint64_t* full, uint64_t* empty, Say&& say) const {
    EmptyBarrier::wait(&empty[at_.stage()], at_.phase_before());
    if (lane_ == 0) {
      say();
      Barrier::arrive_and_expect_tx(&full[at_.stage()], Traits::kStageElements * sizeof(Cached));
    }
    __syncwarp();
    if (row() >= Traits::kBlockN) return;
    auto* target = ring + at_.stage() * Traits::kStageElements + row() * Traits::kLoadColumns;
    CUTE_UNROLL
    for (int column = 0; column < Traits::kHeadDim; column += Traits::kLoadColumns) {
      SM90_TMA_LOAD_4D::copy(&map, &full[at_.stage()], static_cast<uint64_t>(TMA::CacheHintSm90::EVICT_NORMAL), target,
                             column, source.row, kv_head, source.batch);
      target += Traits::kBlockN * Traits::kLoadColumns;
    }
  }

  static_assert(Traits::kBlockN / 16 <= 32);  // boxes: pages are multiples of 16 slots

  const PrefillArgs& args_;
  Shared& shared_;
  const int32_t lane_;
  TileSequence tiles_;
  RingPosition<Traits::kTileSlots> slot_{~0u};  ///< of the tile that next_tile() has found; before the first
  RingPosition<Traits::kLoadStages> at_;
  bool careful_ = !Traits::kTrusting;
};

}  // namespace dca::cuda::sm90
