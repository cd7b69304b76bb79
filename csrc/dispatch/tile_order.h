// The order of the tiles of a CUDA call.
#pragma once

#include <cstdint>

#include "dca/chunk_geometry.h"

namespace dca {

/// A tile by its numbers.
struct TileIndex {
  int32_t query_tile;  ///< counted from the longest
  int32_t split;
  int32_t kv_head;  ///< counted over all sequences: those of the first, those of the second, ...
  int32_t head_tile;
};

/// Group of kv_heads_at_once KV heads (slowest), query tile, split, KV head of the group, head tile. So the heads that
/// read one KV head run side by side, and its keys stay in L2 until its tiles are done. Groups go from their longest
/// tiles to their shortest and back, the last one to its shortest: what runs at one time is of about one length, and
/// the end is even.
template <class Divisor>
struct TileOrder {
  Divisor num_query_tiles;
  Divisor num_splits;
  Divisor kv_heads_at_once;
  Divisor num_head_tiles;
  int32_t num_groups;

  DCA_HOST_DEVICE constexpr int64_t count() const {
    return int64_t{num_groups} * num_query_tiles.divisor * num_splits.divisor * kv_heads_at_once.divisor *
           num_head_tiles.divisor;
  }

  DCA_HOST_DEVICE constexpr TileIndex at(int32_t index) const {
    TileIndex tile{};
    int32_t group = 0, place = 0;
    num_head_tiles(index, tile.head_tile, index);
    kv_heads_at_once(index, place, index);
    num_splits(index, tile.split, index);
    num_query_tiles(group, tile.query_tile, index);
    tile.kv_head = group * kv_heads_at_once.divisor + place;
    if ((num_groups - 1 - group) % 2 != 0) tile.query_tile = num_query_tiles.divisor - 1 - tile.query_tile;
    return tile;
  }
};

}  // namespace dca
