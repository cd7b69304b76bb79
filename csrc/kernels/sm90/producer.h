// The producer warp: finds the tiles of the CTA, and brings their keys and values by TMA.
#pragma once

#include <cute/arch/cluster_sm90.hpp>
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
  int32_t cluster;       ///< CTAs that bring each other's keys: neighbours in the order of tiles, heads of one KV head
};

/// The clusters of a launch: of one CTA, but for Variant::Multicast.
template <class Traits>
struct Cluster {
  __device__ __forceinline__ static int32_t size(const PrefillArgs& args) {
    return Traits::kMulticast ? args.cluster : 1;
  }
  /// Of this CTA in its cluster.
  __device__ __forceinline__ static int32_t rank() {
    return Traits::kMulticast ? static_cast<int32_t>(block_rank_in_cluster()) : 0;
  }
};

/// The tiles of a CTA: one of each round of gridDim.x tiles, alternately counted from the front and from the back of
/// the round. Tiles are ordered by length, so that all CTAs get nearly the same work. The CTAs of a cluster take
/// neighbours.
template <class Traits>
struct TileSequence {
  int32_t round = 0;

  __device__ int32_t next(const PrefillArgs& args) {
    const int32_t cluster = Cluster<Traits>::size(args);
    const int32_t size = static_cast<int32_t>(gridDim.x) / cluster;
    const int32_t place = static_cast<int32_t>(blockIdx.x) / cluster;
    const int64_t index = static_cast<int64_t>(round) * size + (round % 2 == 0 ? place : size - 1 - place);
    ++round;
    const int64_t tile = index * cluster + Cluster<Traits>::rank();
    return tile < args.num_tiles ? static_cast<int32_t>(tile) : -1;  // past the last one only in the last round
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
      for (KeyBlock block = walk.next(); block.count > 0;) {
        const KeyBlock next = walk.next();
        request(found, BlockNote::of(found, block, next, Traits::kBlockN));
        block = next;
      }
    }
  }

  /// Finds a tile that has work, and says so to all who wait for it; or that there is none any more: false.
  __device__ bool next_tile() {
    slot_.advance();
    for (int32_t index = tiles_.next(args_);; index = tiles_.next(args_)) {
      EmptyBarrier::wait(&shared_.tile_empty[slot_.stage()], slot_.phase_before());
      if (index < 0) break;
      WorkTile& tile = shared_.tiles[slot_.stage()].tile;
      __syncwarp();  // all lanes have seen that the tile before was empty, if it was
      if (lane_ == 0) tile.assign(args_.attention, index);
      __syncwarp();
      if (tile.empty() && !tile.first_of_sequence) continue;
      publish(false);
      return true;
    }
    publish(true);
    return false;
  }

  /// The one that next_tile() has found.
  __device__ const WorkTile& tile() const { return shared_.tiles[slot_.stage()].tile; }

  /// Asks for the keys and values of a block of that tile, as soon as there is room for them, and says what they are
  /// to those who wait for them. Of packed rings the widener says it.
  __device__ __forceinline__ void request(const WorkTile& tile, const BlockNote& note) {
    const KeySource source = KeySource::of(args_.attention, tile, note.first_key + first_row(), args_.rows_per_box);
    load(args_.k, source, tile.kv_head, rings().k, barriers().k_full, barriers().k_empty, [&] {
      if constexpr (!Traits::kE4M3) shared_.notes[at_.stage()] = note;
    });
    load(args_.v, source, tile.kv_head, rings().v, barriers().v_full, barriers().v_empty, [&] {
      if constexpr (!Traits::kE4M3) shared_.first_keys[at_.stage()] = note.first_key;
    });
    at_.advance();
  }

 private:
  __device__ __forceinline__ void publish(bool last) {
    if (lane_ == 0) {
      TileSlot& slot = shared_.tiles[slot_.stage()];
      if (!last) {
        slot.before = BlockFlags::in_front_of(KeyBlockIterator<true>(slot.tile.ranges, Traits::kBlockN).next());
      }
      slot.count = slot_.count;
      slot.last = last;
      EmptyBarrier::arrive(&shared_.tile_full[slot_.stage()]);
    }
  }

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

  // Rows of a block that this CTA brings: all, or its part of them for the whole cluster.
  __device__ __forceinline__ int32_t num_rows() const { return Traits::kBlockN / Cluster<Traits>::size(args_); }

  // The first one that this lane asks for.
  __device__ __forceinline__ int32_t first_row() const {
    return Cluster<Traits>::rank() * num_rows() + lane_ * args_.rows_per_box;
  }

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
    const int32_t row = lane_ * args_.rows_per_box;
    if (row >= num_rows()) return;
    auto* target = ring + at_.stage() * Traits::kStageElements +
                   (Cluster<Traits>::rank() * num_rows() + row) * Traits::kLoadColumns;
    CUTE_UNROLL
    for (int column = 0; column < Traits::kHeadDim; column += Traits::kLoadColumns) {
      bring(map, &full[at_.stage()], target, column, source, kv_head);
      target += Traits::kBlockN * Traits::kLoadColumns;
    }
  }

  // To this CTA, or to the same place of all CTAs of the cluster, whose barriers at this place count the bytes.
  __device__ __forceinline__ void bring(const CUtensorMap& map, uint64_t* full, Cached* target, int32_t column,
                                        const KeySource& source, int32_t kv_head) const {
    constexpr auto kHint = static_cast<uint64_t>(TMA::CacheHintSm90::EVICT_NORMAL);
    if constexpr (Traits::kMulticast) {
      const uint16_t all = static_cast<uint16_t>((1 << args_.cluster) - 1);
      SM90_TMA_LOAD_MULTICAST_4D::copy(&map, full, all, kHint, target, column, source.row, kv_head, source.batch);
    } else {
      SM90_TMA_LOAD_4D::copy(&map, full, kHint, target, column, source.row, kv_head, source.batch);
    }
  }

  static_assert(Traits::kBlockN / 16 <= 32);  // boxes: pages are multiples of 16 slots

  const PrefillArgs& args_;
  Shared& shared_;
  const int32_t lane_;
  TileSequence<Traits> tiles_;
  RingPosition<Traits::kTileSlots> slot_{~0u};  ///< of the tile that next_tile() has found; before the first
  RingPosition<Traits::kLoadStages> at_;
};

}  // namespace dca::cuda::sm90
