// What the producer says of each block of keys, so that consumers walk no geometry while their products wait for them.
#pragma once

#include "key_blocks.h"
#include "tile_scheduler.h"

namespace dca::cuda::sm90 {

/// Logical key of the first row that TMA brings for a block: always block_n rows, whatever the block has. It may lie in
/// front of the block, even of the sequence, where blocks are cut by pages.
__device__ __forceinline__ int32_t first_key_of(const WorkTile& tile, const KeyBlock& block, int32_t block_n) {
  return block.begin - tile.ranges.rows_in_front(block.begin, block_n);
}

/// What a consumer has to know of a block, and of what follows it, in one register.
struct BlockFlags {
  static constexpr uint32_t kMasked = 1;       ///< some row must not see some key of the block
  static constexpr uint32_t kForeignRows = 2;  ///< of the rows in the ring some are no keys of the sequence
  static constexpr uint32_t kSwitch = 4;       ///< the next block is of another segment
  static constexpr uint32_t kLast = 8;         ///< the tile has no further block
  static constexpr uint32_t kIntra = 16;       ///< the block is of the intra segment
  static constexpr uint32_t kMaxima = 32;      ///< larger logits than those before have to be looked for
  static constexpr int kSegmentShift = 6;      ///< of the next block's segment

  uint32_t bits;

  /// Any of them.
  __device__ __forceinline__ bool has(uint32_t flags) const { return (bits & flags) != 0; }
  __device__ __forceinline__ Segment next_segment() const { return static_cast<Segment>(bits >> kSegmentShift); }

  /// Of the beginning of a tile, whose first block is `next`; its count is 0 if there is none.
  __device__ static BlockFlags in_front_of(const KeyBlock& next) {
    return {next.count > 0 ? kSwitch | static_cast<uint32_t>(next.segment) << kSegmentShift : kLast};
  }
};

/// A block of keys in the rings.
struct BlockNote {
  KeyBlock block;
  int32_t first_key;  ///< logical key of its first row in the ring, always kBlockN of them
  BlockFlags flags;

  /// Of `block`, which `next` follows in its tile; the count of `next` is 0 if none does. Maxima are looked for where a
  /// mask hides keys, since rows may not have seen any before, and else where `look` says so.
  __device__ static BlockNote of(const WorkTile& tile, const KeyBlock& block, const KeyBlock& next, int32_t block_n,
                                 bool look) {
    const int32_t first_key = first_key_of(tile, block, block_n);
    BlockFlags flags = BlockFlags::in_front_of(next);
    if (next.segment == block.segment) flags.bits &= ~BlockFlags::kSwitch;
    if (block.segment == Segment::Intra) flags.bits |= BlockFlags::kIntra;
    if (tile.ranges.needs_mask(block, block_n)) flags.bits |= BlockFlags::kMasked | BlockFlags::kMaxima;
    if (look) flags.bits |= BlockFlags::kMaxima;
    if (first_key < 0 || first_key + block_n > tile.seqlen.kv_len) flags.bits |= BlockFlags::kForeignRows;
    return {block, first_key, flags};
  }
};

}  // namespace dca::cuda::sm90
