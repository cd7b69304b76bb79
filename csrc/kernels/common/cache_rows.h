// Rows of K and V wherever they lie: uniform, ragged or in pages.
#pragma once

#include "tile_scheduler.h"

namespace dca::cuda {

/// The keys or the values of the tile's sequence and KV head, addressed by logical position. Made where it is used: all
/// that it refers to lies in shared or constant memory.
template <class Element, bool kPaged>
class CacheRows {
 public:
  /// `base` is tile.k or tile.v.
  __device__ CacheRows(const AttentionArgs& args, const ConstTensorRef& cache, const WorkTile& tile, const void* base)
      : args_(args), stride_(cache.stride), tile_(tile), base_(static_cast<const Element*>(base)) {}

  /// First element of logical key j + further; `further` is a constant. If it is not `present` an address that is safe
  /// to name in a copy of no bytes. Keys of a page that the cache has not, whatever the page table holds, are not.
  __device__ __forceinline__ const Element* row(int32_t j, int further, bool& present) const {
    if constexpr (kPaged) {
      if (!present) return base_;
      int32_t page, within;
      args_.page_size(page, within, j + further + tile_.seqlen.leftpad);
      const int32_t id = args_.p.pages.page_table[tile_.b * args_.p.pages.stride_batch + page];
      present = id >= 0 && id < args_.p.pages.num_pages;
      return present ? base_ + id * stride_.batch + within * stride_.row : base_;
    } else {
      return base_ + j * stride_.row + further * stride_.row;
    }
  }

 private:
  const AttentionArgs& args_;
  const Strides& stride_;
  const WorkTile& tile_;
  const Element* base_;
};

}  // namespace dca::cuda
