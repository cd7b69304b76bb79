// The geometry of Dual Chunk Attention (An et al. 2024, arXiv 2402.17463, section 3), written once for host and device.
//
// Positions are logical: 0 is the first token of a sequence, padding in front of it not counted. With n = chunk_len and
// P = max_position, a query at i sees the keys j <= i in three segments:
//
//   segment      keys                        key position   query position          causal mask
//   Intra        i div n == j div n          j mod n        i mod n                 yes
//   Successive   (i div n) - (j div n) == 1  j mod n        min(i mod n + n, P)     no
//   Inter        (i div n) - (j div n) >= 2  j mod n        P                       no
//
// For queries of one chunk these are three contiguous key ranges, so a tile of queries that does not straddle a chunk
// border walks three ranges of key blocks, and only Q changes between them.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define DCA_HOST_DEVICE __host__ __device__
#else
#define DCA_HOST_DEVICE
#endif

namespace dca {

enum class Segment : int32_t { Intra = 0, Successive = 1, Inter = 2 };
inline constexpr int kNumSegments = 3;

/// A half-open range of logical key positions.
struct KeyRange {
  int32_t begin = 0;
  int32_t end = 0;

  DCA_HOST_DEVICE constexpr int32_t size() const { return end > begin ? end - begin : 0; }
  DCA_HOST_DEVICE constexpr bool empty() const { return end <= begin; }
  DCA_HOST_DEVICE constexpr KeyRange intersect(KeyRange other) const {
    return {begin > other.begin ? begin : other.begin, end < other.end ? end : other.end};
  }
};

struct ChunkGeometry {
  int32_t chunk_len = 1;     ///< n: the stride of the chunks, in tokens
  int32_t max_position = 1;  ///< P: the largest rotary position in use; n <= P <= 2n - 1

  /// True for 1 <= chunk_len <= max_position <= 2 * chunk_len - 1, without overflow.
  DCA_HOST_DEVICE constexpr bool valid() const {
    return chunk_len >= 1 && max_position >= chunk_len && max_position - chunk_len <= chunk_len - 1;
  }

  DCA_HOST_DEVICE constexpr int32_t chunk_begin(int32_t position) const { return position - position % chunk_len; }

  /// First position behind the chunk that holds `position`.
  DCA_HOST_DEVICE constexpr int64_t chunk_end(int32_t position) const {
    return static_cast<int64_t>(chunk_begin(position)) + chunk_len;
  }

  /// End of the query tile of at most `block_m` rows that starts at `begin`: tiles never straddle a chunk border.
  DCA_HOST_DEVICE constexpr int32_t tile_end(int32_t begin, int32_t block_m, int32_t seqlen) const {
    int64_t end = static_cast<int64_t>(begin) + block_m;
    if (end > chunk_end(begin)) end = chunk_end(begin);
    return static_cast<int32_t>(end < seqlen ? end : seqlen);
  }

  DCA_HOST_DEVICE constexpr int32_t key_position(int32_t j) const { return j % chunk_len; }

  DCA_HOST_DEVICE constexpr int32_t query_position(int32_t i, Segment segment) const {
    if (segment == Segment::Inter) return max_position;
    const int32_t within = i % chunk_len;
    if (segment == Segment::Intra) return within;
    // within + chunk_len can pass 2^31 for the largest chunks; the comparison must not.
    return within < max_position - chunk_len ? within + chunk_len : max_position;
  }

  /// Segment of key j for query i >= j.
  DCA_HOST_DEVICE constexpr Segment segment_of(int32_t i, int32_t j) const {
    const int32_t chunks_apart = i / chunk_len - j / chunk_len;
    return chunks_apart == 0 ? Segment::Intra : chunks_apart == 1 ? Segment::Successive : Segment::Inter;
  }

  /// Keys that the queries [q_begin, q_end) of one chunk see in `segment`: all of them see all of these, except in the
  /// intra segment, where row i sees those up to i.
  DCA_HOST_DEVICE constexpr KeyRange key_range(int32_t q_begin, int32_t q_end, Segment segment) const {
    const int32_t begin = chunk_begin(q_begin);
    const int32_t previous = begin >= chunk_len ? begin - chunk_len : 0;
    if (segment == Segment::Intra) return {begin, q_end};
    if (segment == Segment::Successive) return {previous, begin};
    return {0, previous};
  }
};

/// The query tiles of the positions [begin, end), by index: at most `block_m` positions each, none across a chunk
/// border.
class QueryTiles {
 public:
  DCA_HOST_DEVICE constexpr QueryTiles(ChunkGeometry geometry, int32_t begin, int32_t end, int32_t block_m)
      : geometry_(geometry), begin_(begin), end_(end), block_m_(block_m) {
    if (end <= begin) return;
    const int32_t chunk_len = geometry.chunk_len;
    const int64_t border = geometry.chunk_end(begin);
    first_len_ = static_cast<int32_t>(border < end ? border : end) - begin;
    in_first_ = ceil_div(first_len_, block_m);
    in_chunk_ = ceil_div(chunk_len, block_m);
    const int32_t behind = end - begin - first_len_;
    count_ = in_first_ + behind / chunk_len * in_chunk_ + ceil_div(behind % chunk_len, block_m);
  }

  DCA_HOST_DEVICE constexpr int32_t count() const { return count_; }

  /// Positions of tile `index`, 0 <= index < count().
  DCA_HOST_DEVICE constexpr KeyRange tile(int32_t index) const {
    int32_t begin = begin_ + index * block_m_;
    if (index >= in_first_) {
      const int32_t behind = index - in_first_;
      begin = begin_ + first_len_ + behind / in_chunk_ * geometry_.chunk_len + behind % in_chunk_ * block_m_;
    }
    return {begin, geometry_.tile_end(begin, block_m_, end_)};
  }

  /// The most tiles that `seqlen` positions can have, wherever they begin: each border between them cuts one tile in
  /// two.
  DCA_HOST_DEVICE static constexpr int64_t max_count(ChunkGeometry geometry, int32_t seqlen, int32_t block_m) {
    return seqlen <= 0 ? 0 : static_cast<int64_t>(ceil_div(seqlen, block_m)) + ceil_div(seqlen - 1, geometry.chunk_len);
  }

 private:
  DCA_HOST_DEVICE static constexpr int32_t ceil_div(int32_t a, int32_t b) { return a / b + (a % b != 0 ? 1 : 0); }

  ChunkGeometry geometry_;
  int32_t begin_;
  int32_t end_;
  int32_t block_m_;
  int32_t first_len_ = 0;  // positions in the first chunk
  int32_t in_first_ = 0;   // tiles in it
  int32_t in_chunk_ = 1;   // tiles in a whole chunk
  int32_t count_ = 0;
};

/// Which segments an operation walks.
enum class SegmentSelection : int32_t { All = -1, Intra = 0, Successive = 1, Inter = 2 };

/// The key ranges of one query tile, in the order intra, successive, inter; empty ones are passed over.
///
///   for (SegmentIterator it(geometry, q_begin, q_end); !it.done(); it.next()) { it.segment(); it.keys(); }
///
/// `window` restricts the walk to a part of the keys: split-KV gives each split its own window.
class SegmentIterator {
 public:
  DCA_HOST_DEVICE constexpr SegmentIterator(ChunkGeometry geometry, int32_t q_begin, int32_t q_end,
                                            SegmentSelection selection = SegmentSelection::All,
                                            KeyRange window = {0, INT32_MAX})
      : geometry_(geometry), q_begin_(q_begin), q_end_(q_end), window_(window) {
    const bool all = selection == SegmentSelection::All;
    index_ = all ? 0 : static_cast<int>(selection);
    stop_ = all ? kNumSegments : index_ + 1;
    skip_empty();
  }

  DCA_HOST_DEVICE constexpr bool done() const { return index_ >= stop_; }
  DCA_HOST_DEVICE constexpr void next() {
    ++index_;
    skip_empty();
  }
  DCA_HOST_DEVICE constexpr Segment segment() const { return static_cast<Segment>(index_); }
  DCA_HOST_DEVICE constexpr KeyRange keys() const {
    return geometry_.key_range(q_begin_, q_end_, segment()).intersect(window_);
  }
  /// True if some row of the tile does not see some key of [begin, end): only on the diagonal of the intra segment.
  DCA_HOST_DEVICE constexpr bool needs_mask(int32_t end) const {
    return segment() == Segment::Intra && end > q_begin_ + 1;
  }

 private:
  DCA_HOST_DEVICE constexpr void skip_empty() {
    while (index_ < stop_ && keys().empty()) ++index_;
  }

  ChunkGeometry geometry_;
  int32_t q_begin_;
  int32_t q_end_;
  KeyRange window_;
  int index_ = 0;
  int stop_ = kNumSegments;
};

}  // namespace dca
