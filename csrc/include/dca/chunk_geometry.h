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

/// Rotary positions of queries in one segment, from their distance to the beginning of their chunk.
struct QueryPositions {
  int32_t most;
  int32_t offset;

  DCA_HOST_DEVICE constexpr int32_t of(int32_t within) const { return (within < most ? within : most) + offset; }
};

struct Chunk;

struct ChunkGeometry {
  int32_t chunk_len = 1;     ///< n: the stride of the chunks, in tokens
  int32_t max_position = 1;  ///< P: the largest rotary position in use; n <= P <= 2n - 1

  /// True for 1 <= chunk_len <= max_position <= 2 * chunk_len - 1, without overflow.
  DCA_HOST_DEVICE constexpr bool valid() const {
    return chunk_len >= 1 && max_position >= chunk_len && max_position - chunk_len <= chunk_len - 1;
  }

  /// The chunk that holds `position`.
  DCA_HOST_DEVICE constexpr Chunk chunk_of(int32_t position) const;

  /// First position behind the chunk that holds `position`.
  DCA_HOST_DEVICE constexpr int64_t chunk_end(int32_t position) const;

  /// End of the query tile of at most `block_m` rows that starts at `begin`: tiles never straddle a chunk border.
  DCA_HOST_DEVICE constexpr int32_t tile_end(int32_t begin, int32_t block_m, int32_t seqlen) const;

  DCA_HOST_DEVICE constexpr int32_t key_position(int32_t j) const { return j % chunk_len; }

  /// min(within + n, P) is taken as min(within, P - n) + n: within + n can pass 2^31 for the largest chunks.
  DCA_HOST_DEVICE constexpr QueryPositions query_positions(Segment segment) const {
    if (segment == Segment::Inter) return {0, max_position};
    if (segment == Segment::Successive) return {max_position - chunk_len, chunk_len};
    return {INT32_MAX, 0};
  }
  DCA_HOST_DEVICE constexpr int32_t query_position(int32_t i, Segment segment) const;

  /// Segment of key j for query i >= j.
  DCA_HOST_DEVICE constexpr Segment segment_of(int32_t i, int32_t j) const {
    const int32_t chunks_apart = i / chunk_len - j / chunk_len;
    return chunks_apart == 0 ? Segment::Intra : chunks_apart == 1 ? Segment::Successive : Segment::Inter;
  }
};

/// A chunk, and what holds for the queries in it. Nothing here divides: who asks for a chunk has done so once.
struct Chunk {
  ChunkGeometry geometry;
  int32_t begin = 0;  ///< its first position, a multiple of chunk_len

  DCA_HOST_DEVICE constexpr int64_t end() const { return static_cast<int64_t>(begin) + geometry.chunk_len; }

  /// End of the query tile of at most `block_m` rows that starts at `q_begin`.
  DCA_HOST_DEVICE constexpr int32_t tile_end(int32_t q_begin, int32_t block_m, int32_t seqlen) const {
    int64_t tile_end = static_cast<int64_t>(q_begin) + block_m;
    if (tile_end > end()) tile_end = end();
    return static_cast<int32_t>(tile_end < seqlen ? tile_end : seqlen);
  }

  DCA_HOST_DEVICE constexpr int32_t query_position(int32_t i, Segment segment) const {
    return geometry.query_positions(segment).of(i - begin);
  }

  /// Keys that queries up to q_end see in `segment`: all of them see all of these, except in the intra segment, where
  /// row i sees those up to i.
  DCA_HOST_DEVICE constexpr KeyRange key_range(int32_t q_end, Segment segment) const {
    const int32_t previous = begin >= geometry.chunk_len ? begin - geometry.chunk_len : 0;
    if (segment == Segment::Intra) return {begin, q_end};
    if (segment == Segment::Successive) return {previous, begin};
    return {0, previous};
  }
};

DCA_HOST_DEVICE constexpr Chunk ChunkGeometry::chunk_of(int32_t position) const {
  return {*this, position - position % chunk_len};
}
DCA_HOST_DEVICE constexpr int64_t ChunkGeometry::chunk_end(int32_t position) const { return chunk_of(position).end(); }
DCA_HOST_DEVICE constexpr int32_t ChunkGeometry::tile_end(int32_t begin, int32_t block_m, int32_t seqlen) const {
  return chunk_of(begin).tile_end(begin, block_m, seqlen);
}
DCA_HOST_DEVICE constexpr int32_t ChunkGeometry::query_position(int32_t i, Segment segment) const {
  return chunk_of(i).query_position(i, segment);
}

/// Divides numbers that are 0 or more by one that is 1 or more.
struct Divisor {
  int32_t divisor = 1;

  DCA_HOST_DEVICE constexpr void operator()(int32_t& quotient, int32_t& remainder, int32_t dividend) const {
    quotient = dividend / divisor;
    remainder = dividend % divisor;
  }
};

/// What QueryTiles divides by. A GPU has no instruction for that: kernels have a Divisor that multiplies.
template <class Divisor>
struct TileDivisors {
  Divisor chunk_len;
  Divisor block_m;
  Divisor tiles_per_chunk;  ///< of a whole chunk

  DCA_HOST_DEVICE constexpr TileDivisors(ChunkGeometry geometry, int32_t positions_per_tile)
      : chunk_len{geometry.chunk_len},
        block_m{positions_per_tile},
        tiles_per_chunk{(geometry.chunk_len - 1) / positions_per_tile + 1} {}
};

/// Positions of one chunk.
struct QueryTile {
  KeyRange positions;
  Chunk chunk;
};

/// The query tiles of the positions [begin, end), by index: at most `block_m` positions each, none across a chunk
/// border.
template <class Divisor = dca::Divisor>
class QueryTiles {
 public:
  DCA_HOST_DEVICE constexpr QueryTiles(ChunkGeometry geometry, int32_t begin, int32_t end, int32_t block_m)
      : QueryTiles(geometry, begin, end, TileDivisors<Divisor>(geometry, block_m)) {}

  /// `divisors`: those of `geometry`, and block_m.
  DCA_HOST_DEVICE constexpr QueryTiles(ChunkGeometry geometry, int32_t begin, int32_t end,
                                       const TileDivisors<Divisor>& divisors)
      : divisors_(divisors), begin_(begin), end_(end) {
    if (end <= begin) return;
    int32_t whole_chunks = 0, rest = 0;
    divisors_.chunk_len(whole_chunks, rest, begin);
    first_chunk_ = {geometry, begin - rest};
    const int64_t border = first_chunk_.end();
    const int32_t first_len = static_cast<int32_t>(border < end ? border : end) - begin;
    divisors_.chunk_len(whole_chunks, rest, end - begin - first_len);
    in_first_ = tiles_of(first_len);
    count_ = in_first_ + whole_chunks * divisors_.tiles_per_chunk.divisor + tiles_of(rest);
  }

  DCA_HOST_DEVICE constexpr int32_t count() const { return count_; }

  /// Tile `index`, 0 <= index < count().
  DCA_HOST_DEVICE constexpr QueryTile tile(int32_t index) const {
    Chunk chunk = first_chunk_;
    int32_t in_chunk = index;
    int32_t first = begin_;  // of the positions in that chunk
    if (index >= in_first_) {
      int32_t chunks_between = 0;
      divisors_.tiles_per_chunk(chunks_between, in_chunk, index - in_first_);
      chunk.begin += (chunks_between + 1) * chunk.geometry.chunk_len;
      first = chunk.begin;
    }
    const int32_t block_m = divisors_.block_m.divisor;
    const int32_t begin = first + in_chunk * block_m;
    return {{begin, chunk.tile_end(begin, block_m, end_)}, chunk};
  }

  /// The most tiles that `seqlen` positions can have, wherever they begin: each border between them cuts one tile in
  /// two.
  DCA_HOST_DEVICE static constexpr int64_t max_count(ChunkGeometry geometry, int32_t seqlen, int32_t block_m) {
    return seqlen <= 0 ? 0 : static_cast<int64_t>(ceil_div(seqlen, block_m)) + ceil_div(seqlen - 1, geometry.chunk_len);
  }

 private:
  DCA_HOST_DEVICE static constexpr int32_t ceil_div(int32_t a, int32_t b) { return a / b + (a % b != 0 ? 1 : 0); }

  DCA_HOST_DEVICE constexpr int32_t tiles_of(int32_t positions) const {
    int32_t whole = 0, rest = 0;
    divisors_.block_m(whole, rest, positions);
    return whole + (rest != 0 ? 1 : 0);
  }

  TileDivisors<Divisor> divisors_;
  int32_t begin_;
  int32_t end_;
  Chunk first_chunk_;
  int32_t in_first_ = 0;  // tiles in it
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
      : SegmentIterator(geometry.chunk_of(q_begin), {q_begin, q_end}, selection, window) {}

  /// Of `positions` in `chunk`.
  DCA_HOST_DEVICE constexpr SegmentIterator(Chunk chunk, KeyRange positions, SegmentSelection selection,
                                            KeyRange window)
      : chunk_(chunk), positions_(positions), window_(window) {
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
    return chunk_.key_range(positions_.end, segment()).intersect(window_);
  }
  /// True if some row of the tile does not see some key of [begin, end): only on the diagonal of the intra segment.
  DCA_HOST_DEVICE constexpr bool needs_mask(int32_t end) const {
    return segment() == Segment::Intra && end > positions_.begin + 1;
  }

 private:
  DCA_HOST_DEVICE constexpr void skip_empty() {
    while (index_ < stop_ && keys().empty()) ++index_;
  }

  Chunk chunk_;
  KeyRange positions_;
  KeyRange window_;
  int index_ = 0;
  int stop_ = kNumSegments;
};

}  // namespace dca
