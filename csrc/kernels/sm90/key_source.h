// Where rows of keys lie, in the coordinates of a tensor map of K or V.
#pragma once

#include "tile_scheduler.h"

namespace dca::cuda::sm90 {

/// A row of K and V, and the sequence or page that it is in.
struct KeySource {
  int32_t row;
  int32_t batch;

  /// Of logical key `first_key`, whose box has `rows` rows, in one page if there are pages. A box may begin in front of
  /// the sequence and end behind it. TMA makes rows 0 that lie outside of the tensor: those of no page, and those of a
  /// page that the cache has not, whatever the page table holds. Entries behind the sequence are not read.
  __device__ static KeySource of(const AttentionArgs& args, const WorkTile& tile, int32_t first_key, int32_t rows) {
    const AttentionParams& p = args.p;
    const int32_t slot = first_key + tile.seqlen.leftpad;
    if (p.pages.page_table == nullptr) {
      return {slot + static_cast<int32_t>(tile.seqlen.k_row), p.cu_seqlens_k != nullptr ? 0 : tile.b};
    }
    KeySource source{0, -1};
    if (first_key + rows > 0 && first_key < tile.seqlen.kv_len) {
      int32_t page;
      args.page_size(page, source.row, slot);
      const int32_t id = p.pages.page_table[tile.b * p.pages.stride_batch + page];
      if (id >= 0 && id < p.pages.num_pages) source.batch = id;
    }
    return source;
  }
};

}  // namespace dca::cuda::sm90
