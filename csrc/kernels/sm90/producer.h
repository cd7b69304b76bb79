// The producer warp: finds the tiles of the CTA, and brings their keys and values by TMA.
#pragma once

#include <cute/arch/copy_sm90_tma.hpp>

#include "key_source.h"
#include "mainloop.h"

namespace dca::cuda::sm90 {

struct PrefillArgs {
  AttentionArgs attention;
  CUtensorMap k;
  CUtensorMap v;
  CUtensorMap out;
  int32_t num_tiles;
  int32_t rows_per_box;  ///< of K and V: kBlockN, or what divides it and the page
  bool out_by_tma;       ///< tiles of one head whose rows TMA can store
};

/// The tiles of a CTA: one of each round of gridDim.x tiles, alternately counted from the front and from the back of
/// the round. Tiles are ordered by length, so that all CTAs get nearly the same work.
struct TileSequence {
  int32_t num_tiles;
  int32_t round = 0;

  __device__ int32_t next() {
    const int32_t size = static_cast<int32_t>(gridDim.x);
    const int32_t place = static_cast<int32_t>(blockIdx.x);
    const int64_t index = static_cast<int64_t>(round) * size + (round % 2 == 0 ? place : size - 1 - place);
    ++round;
    // An index past the last tile can only be in the last round.
    return index < num_tiles ? static_cast<int32_t>(index) : -1;
  }
};

template <class Traits>
class Producer {
  using Shared = typename Traits::Shared;
  using Position = RingPosition<Traits::kStages>;

 public:
  __device__ Producer(const PrefillArgs& args, Shared& shared, int32_t lane)
      : args_(args), shared_(shared), lane_(lane) {}

  __device__ void run() {
    TileSequence tiles{args_.num_tiles};
    RingPosition<Traits::kTileSlots> slot;
    Position at;
    for (int32_t index = tiles.next(); index >= 0; index = tiles.next()) {
      EmptyBarrier::wait(&shared_.tile_empty[slot.stage()], slot.phase_before());
      WorkTile& tile = shared_.tiles[slot.stage()].tile;
      __syncwarp();  // all lanes have seen that the tile before was empty, if it was
      if (lane_ == 0) tile.assign(args_.attention, index);
      __syncwarp();
      if (tile.empty() && !tile.first_of_sequence) continue;
      publish(slot, false);
      load_keys(tile, at);
      slot.advance();
    }
    EmptyBarrier::wait(&shared_.tile_empty[slot.stage()], slot.phase_before());
    publish(slot, true);
  }

 private:
  __device__ void publish(const RingPosition<Traits::kTileSlots>& slot, bool last) {
    if (lane_ != 0) return;
    shared_.tiles[slot.stage()].count = slot.count;
    shared_.tiles[slot.stage()].last = last;
    EmptyBarrier::arrive(&shared_.tile_full[slot.stage()]);
  }

  __device__ void load_keys(const WorkTile& tile, Position& at) {
    KeyBlockIterator<true> walk(tile.ranges, Traits::kBlockN);
    for (KeyBlock block = walk.next(); block.count > 0; block = walk.next(), at.advance()) {
      const int32_t first_key = first_key_of(tile, block, Traits::kBlockN) + lane_ * args_.rows_per_box;
      const KeySource source = KeySource::of(args_.attention, tile, first_key, args_.rows_per_box);
      load(args_.k, source, tile.kv_head, at, shared_.k, shared_.k_full, shared_.k_empty);
      load(args_.v, source, tile.kv_head, at, shared_.v, shared_.v_full, shared_.v_empty);
    }
  }

  // Lane i brings the i-th box of rows, column by column of atoms.
  __device__ __forceinline__ void load(const CUtensorMap& map, const KeySource& source, int32_t kv_head,
                                       const Position& at, typename Traits::Element* ring, uint64_t* full,
                                       uint64_t* empty) const {
    EmptyBarrier::wait(&empty[at.stage()], at.phase_before());
    if (lane_ == 0) Barrier::arrive_and_expect_tx(&full[at.stage()], Traits::kStageElements * 2);
    __syncwarp();
    const int32_t row = lane_ * args_.rows_per_box;
    if (row >= Traits::kBlockN) return;
    auto* target = ring + at.stage() * Traits::kStageElements + row * Traits::kBoxColumns;
    CUTE_UNROLL
    for (int column = 0; column < Traits::kHeadDim; column += Traits::kBoxColumns) {
      SM90_TMA_LOAD_4D::copy(&map, &full[at.stage()], static_cast<uint64_t>(TMA::CacheHintSm90::EVICT_NORMAL), target,
                             column, source.row, kv_head, source.batch);
      target += Traits::kBlockN * Traits::kBoxColumns;
    }
  }

  static_assert(Traits::kBlockN / 16 <= 32);  // boxes: pages are multiples of 16 slots

  const PrefillArgs& args_;
  Shared& shared_;
  const int32_t lane_;
};

}  // namespace dca::cuda::sm90
