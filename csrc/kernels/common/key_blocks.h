// The walk of a query tile in blocks of keys: intra -> successive -> inter, by the one geometry of all backends.
#pragma once

#include "dca/chunk_geometry.h"

namespace dca::cuda {

/// Keys [begin, begin + count) of one segment. count == 0: the walk is over.
struct KeyBlock {
  int32_t begin = 0;
  int32_t count = 0;
  Segment segment = Segment::Intra;
};

/// The key ranges of a tile; segments that it does not walk are empty.
struct KeyRanges {
  KeyRange keys[kNumSegments];
  int32_t mask_from;  ///< intra blocks that end behind this key have keys that some row must not see

  DCA_HOST_DEVICE void assign(const ChunkGeometry& chunk, KeyRange positions, SegmentSelection selection,
                              KeyRange window) {
    for (KeyRange& range : keys) range = {0, 0};
    for (SegmentIterator it(chunk, positions.begin, positions.end, selection, window); !it.done(); it.next()) {
      keys[static_cast<int32_t>(it.segment())] = it.keys();
    }
    mask_from = positions.begin + 1;
  }

  /// True if some row must not see some key of a block of `block_n`, or if there are fewer keys than that.
  DCA_HOST_DEVICE bool needs_mask(const KeyBlock& block, int32_t block_n) const {
    return block.count < block_n || (block.segment == Segment::Intra && block.begin + block.count > mask_from);
  }
};

/// Where a range that is no multiple of the block has its short block.
enum class ShortBlock { Last, First };

/// Holds as little as it can: the ranges stay where they are, in shared memory.
template <ShortBlock kShort = ShortBlock::Last>
class KeyBlockIterator {
 public:
  DCA_HOST_DEVICE KeyBlockIterator(const KeyRanges& ranges, int32_t block_n)
      : ranges_(ranges), rest_(ranges.keys[0]), block_n_(block_n) {}

  DCA_HOST_DEVICE KeyBlock next() {
    while (rest_.empty()) {
      if (segment_ + 1 == kNumSegments) return {};
      rest_ = ranges_.keys[++segment_];
    }
    KeyBlock block;
    block.begin = rest_.begin;
    const int32_t over = kShort == ShortBlock::First ? rest_.size() % block_n_ : 0;
    block.count = over > 0 ? over : rest_.size() < block_n_ ? rest_.size() : block_n_;
    block.segment = static_cast<Segment>(segment_);
    rest_.begin += block.count;
    return block;
  }

 private:
  const KeyRanges& ranges_;
  KeyRange rest_;
  int32_t segment_ = 0;
  int32_t block_n_;
};

}  // namespace dca::cuda
