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
  int32_t phase;      ///< for kernels that cut blocks by pages: where key + phase is a multiple of the block; -1: not

  DCA_HOST_DEVICE void assign(const QueryTile& tile, SegmentSelection selection, KeyRange window, int32_t block_phase) {
    for (KeyRange& range : keys) range = {0, 0};
    for (SegmentIterator it(tile.chunk, tile.positions, selection, window); !it.done(); it.next()) {
      keys[static_cast<int32_t>(it.segment())] = it.keys();
    }
    mask_from = tile.positions.begin + 1;
    phase = block_phase;
  }

  /// Rows between the place where blocks are cut and `key`.
  DCA_HOST_DEVICE int32_t rows_in_front(int32_t key, int32_t block_n) const {
    return phase < 0 ? 0 : static_cast<int32_t>(static_cast<uint32_t>(key + phase) % static_cast<uint32_t>(block_n));
  }

  /// True if some row must not see some key of a block of `block_n`, or if there are fewer keys than that.
  DCA_HOST_DEVICE bool needs_mask(const KeyBlock& block, int32_t block_n) const {
    return block.count < block_n || (block.segment == Segment::Intra && block.begin + block.count > mask_from);
  }
};

/// Blocks begin where their range begins; with kPhased, also where the phase of the ranges says. Holds as little as it
/// can: the ranges stay where they are, in shared memory.
template <bool kPhased = false>
class KeyBlockIterator {
 public:
  DCA_HOST_DEVICE KeyBlockIterator(const KeyRanges& ranges, int32_t block_n)
      : ranges_(ranges), rest_(ranges.keys[0]), block_n_(block_n) {}

  DCA_HOST_DEVICE KeyBlock next() {
    while (rest_.empty()) {
      if (segment_ + 1 == kNumSegments) return {};
      rest_ = ranges_.keys[++segment_];
    }
    int32_t room = block_n_;
    if constexpr (kPhased) room -= ranges_.rows_in_front(rest_.begin, block_n_);
    KeyBlock block;
    block.begin = rest_.begin;
    block.count = rest_.size() < room ? rest_.size() : room;
    block.segment = static_cast<Segment>(segment_);
    rest_.begin += block.count;
    return block;
  }

  DCA_HOST_DEVICE const KeyRanges& ranges() const { return ranges_; }

  /// Passes over the blocks that follow the one from next() in its range and are whole and need no mask; their number.
  DCA_HOST_DEVICE int32_t skip_plain() {
    int32_t end = rest_.end;
    if (static_cast<Segment>(segment_) == Segment::Intra && ranges_.mask_from < end) end = ranges_.mask_from;
    const int32_t count = end > rest_.begin ? (end - rest_.begin) / block_n_ : 0;
    rest_.begin += count * block_n_;
    return count;
  }

 private:
  const KeyRanges& ranges_;
  KeyRange rest_;
  int32_t segment_ = 0;
  int32_t block_n_;
};

/// The same walk for loops that have little to do for a block: within a run of plain blocks - whole, of one segment,
/// without a mask - the next one follows from the one before.
template <bool kPhased = false>
class KeyBlockRuns {
 public:
  DCA_HOST_DEVICE KeyBlockRuns(const KeyRanges& ranges, int32_t block_n) : walk_(ranges, block_n), block_n_(block_n) {}

  DCA_HOST_DEVICE KeyBlock next() {
    in_run_ = rest_of_run_ > 0;
    if (in_run_) {
      --rest_of_run_;
      block_.begin += block_.count;
      block_.count = block_n_;
    } else {
      block_ = walk_.next();
      rest_of_run_ = walk_.skip_plain();
    }
    return block_;
  }

  /// Of the block that next() gave last: whether it is a plain one behind another of its range, and whether some row must
  /// not see some key of it.
  DCA_HOST_DEVICE bool in_run() const { return in_run_; }
  DCA_HOST_DEVICE bool masked() const { return !in_run_ && walk_.ranges().needs_mask(block_, block_n_); }

 private:
  KeyBlockIterator<kPhased> walk_;
  KeyBlock block_;
  int32_t rest_of_run_ = 0;
  int32_t block_n_;
  bool in_run_ = false;
};

}  // namespace dca::cuda
