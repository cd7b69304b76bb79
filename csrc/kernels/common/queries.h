// The queries of a tile: rotated into shared memory for a segment, and which keys their rows see.
#pragma once

#include "key_blocks.h"
#include "rotary.h"
#include "tile_scheduler.h"

namespace dca::cuda {

/// Where 16 bytes of a row of Q go in shared memory: to the columns that they are.
struct ColumnsInPlace {
  template <class Smem, class Vec>
  __device__ __forceinline__ void operator()(Smem& sQ, int32_t row, int32_t column, const Vec& x) const {
    store16(&sQ(row, column), x);
  }
};

namespace detail {

/// The rows of a tile in one segment. Those that are not the tile's, whose results nobody stores, are its first one, so
/// that nothing that reads them needs a branch.
template <class Element>
class QueryRows {
 public:
  __device__ QueryRows(const AttentionArgs& args, const WorkTile& tile, Segment segment)
      : args_(args), tile_(tile), positions_(args.p.chunk.query_positions(segment)) {
    const AttentionParams& p = args.p;
    const int64_t batch = p.cu_seqlens_q != nullptr ? 0 : tile.b;
    first_ = static_cast<const Element*>(p.q.data) + batch * p.q.stride.batch +
             (tile.seqlen.q_row + tile.seqlen.row(tile.positions.begin)) * p.q.stride.row +
             tile.head_begin * p.q.stride.head;
  }

  __device__ __forceinline__ RotaryRow<Element> row(int32_t tile_row) const {
    const AttentionParams& p = args_.p;
    const TileRow at = TileRow::of(args_, tile_, tile_row);
    const int32_t position = at.valid ? at.position : tile_.positions.begin;
    const int32_t head = at.valid ? at.head : tile_.head_begin;
    const Element* const data = first_ + count(position - tile_.positions.begin) * p.q.stride.row +
                                count(head - tile_.head_begin) * p.q.stride.head;
    const int64_t table = count(positions_.of(position - tile_.chunk_begin)) * p.rotary.half_dim;
    return {data, p.head_dim, p.rotary.cos + table, p.rotary.sin + table};
  }

 private:
  // As 64 bits, of which the upper ones are known to be 0: two instructions less to multiply by.
  __device__ static int64_t count(int32_t non_negative) { return static_cast<uint32_t>(non_negative); }

  const AttentionArgs& args_;
  const WorkTile& tile_;
  const QueryPositions positions_;
  const Element* first_;
};

/// Elements of 16 bits, or their negatives.
template <class Element>
__device__ __forceinline__ Vec16<Element> with_sign(const Vec16<Element>& x, bool negative) {
  static_assert(sizeof(Element) == 2);
  const uint32_t flip = negative ? 0x80008000u : 0u;
  uint4 words = *reinterpret_cast<const uint4*>(x.data());
  words = {words.x ^ flip, words.y ^ flip, words.z ^ flip, words.w ^ flip};
  return reinterpret_cast<const Vec16<Element>&>(words);
}

/// The share of a lane, out of kLanes, of kRows rows of kPairsOfRow pairs of units.
template <int kRows, int kPairsOfRow, int kLanes>
struct Share {
  static constexpr int kPairs = (kRows * kPairsOfRow + kLanes - 1) / kLanes;

  struct Place {
    int32_t row;
    int32_t unit;
    bool present;
  };
  /// The i-th one. Where lanes are whole rows it is the same unit in each, and rows are a constant apart: without signs
  /// compilers see that.
  __device__ __forceinline__ static Place place(uint32_t lane, int i) {
    if constexpr (kLanes % kPairsOfRow == 0) {
      return of(lane / kPairsOfRow + i * (kLanes / kPairsOfRow), lane % kPairsOfRow);
    } else {
      const uint32_t index = lane + i * kLanes;
      return of(index / kPairsOfRow, index % kPairsOfRow);
    }
  }

 private:
  __device__ __forceinline__ static Place of(uint32_t row, uint32_t unit) {
    return {static_cast<int32_t>(row), static_cast<int32_t>(unit), kRows * kPairsOfRow % kLanes == 0 || row < kRows};
  }
};

/// Rows whose halves rotate each other, all of kHeadDim columns: places are constants, and loads come in batches.
template <int kHeadDim, int kRows, int kLanes, int kAhead, class Element, class RowOf, class Store>
__device__ __forceinline__ void rotate_whole_rows(const QueryRows<Element>& queries, uint32_t lane, RowOf& row_of,
                                                  Store& store) {
  constexpr int kHalf = kHeadDim / 2;
  using Share = detail::Share<kRows, kHalf / kVec<Element>, kLanes>;
  constexpr int kBatch = batch_of(Share::kPairs, kAhead);
  CUTE_NO_UNROLL
  for (int done = 0; done < Share::kPairs; done += kBatch) {
    UnitPair<Element> pairs[kBatch];
    CUTE_UNROLL
    for (int i = 0; i < kBatch; ++i) {
      const auto place = Share::place(lane, done + i);
      const RotaryRow<Element> row = queries.row(row_of(place.present ? place.row : 0));
      pairs[i] = UnitPair<Element>::load(row, kHalf, place.unit * kVec<Element>);
    }
    CUTE_UNROLL
    for (int i = 0; i < kBatch; ++i) {
      const auto place = Share::place(lane, done + i);
      if (!place.present) break;
      pairs[i].rotate();
      pairs[i].store(kHalf, place.unit * kVec<Element>,
                     [&](int32_t column, const Vec16<Element>& x) { store(row_of(place.row), column, x); });
    }
  }
}

/// Any others: pairs that fall anywhere, columns without rotation, and those behind head_dim.
template <int kHeadDim, int kRows, int kLanes, class Element, class RowOf, class Store>
__device__ __forceinline__ void rotate_any_rows(const QueryRows<Element>& queries, const RotaryTables& rotary,
                                                uint32_t lane, RowOf& row_of, Store& store) {
  const RotaryUnits units = RotaryUnits::of(rotary, kHeadDim, kVec<Element>);
  CUTE_NO_UNROLL
  for (int32_t i = static_cast<int32_t>(lane); i < kRows * units.count; i += kLanes) {
    const int32_t tile_row = row_of(i / units.count);
    rotate_unit(queries.row(tile_row), rotary, units, i % units.count,
                [&](int32_t column, const Vec16<Element>& x) { store(tile_row, column, x); });
  }
}

}  // namespace detail

/// Rotates kRows rows of the tile, row_of(0) ... row_of(kRows - 1), for `segment` into `sQ` (rows, kHeadDim) in shared
/// memory, by kLanes lanes: thread % kLanes is the lane. They are Elements in global memory, and read anew from there:
/// an unrotated copy beside them would cost as much shared memory as they do. kAhead: pairs of units that a lane asks
/// for before it uses the first, as many as there are registers for beside what the kernel holds. `place` stores them.
template <class Element, int kRows, int kLanes, int kAhead, class Smem, class RowOf, class Place = ColumnsInPlace>
__device__ __forceinline__ void load_queries(const AttentionArgs& args, const WorkTile& tile, Segment segment,
                                             float sign, Smem&& sQ, RowOf row_of, int32_t thread, Place place = {}) {
  constexpr int kHeadDim = decltype(cute::size<1>(sQ))::value;
  const detail::QueryRows<Element> queries(args, tile, segment);
  const RotaryTables& rotary = args.p.rotary;
  const uint32_t lane = static_cast<uint32_t>(thread) % kLanes;
  const auto store = [&](int32_t row, int32_t column, const Vec16<Element>& x) {
    place(sQ, row, column, detail::with_sign(x, sign < 0.0f));
  };
  if (args.p.head_dim == kHeadDim && 2 * rotary.half_dim == kHeadDim && !rotary.interleaved) {
    detail::rotate_whole_rows<kHeadDim, kRows, kLanes, kAhead>(queries, lane, row_of, store);
  } else {
    detail::rotate_any_rows<kHeadDim, kRows, kLanes>(queries, rotary, lane, row_of, store);
  }
}

/// Asks L2 for the rows of q that load_queries will read, kRows of the tile: at the start of a tile they are in memory.
template <class Element, int kRows>
__device__ __forceinline__ void prefetch_queries(const AttentionArgs& args, const WorkTile& tile, int32_t lane,
                                                 int32_t lanes) {
  constexpr int kLine = 128 / sizeof(Element);
  const detail::QueryRows<Element> queries(args, tile, Segment::Intra);
  for (int32_t i = lane; i < kRows; i += lanes) {
    const Element* const row = queries.row(i).data;
    for (int32_t column = 0; column < args.p.head_dim; column += kLine) {
      asm volatile("prefetch.global.L2 [%0];" ::"l"(row + column));
    }
  }
}

/// Hides what a row must not see: keys behind the block's count and, in the intra segment, keys behind the row's own
/// position. `coordinates` are the (row, column) of each logit in its tile.
template <class Logits, class Coordinates>
__device__ __forceinline__ void mask_logits(Logits& s, const Coordinates& coordinates, const AttentionArgs& args,
                                            const WorkTile& tile, const KeyBlock& block, int32_t first_key) {
  CUTE_UNROLL
  for (int r = 0; r < cute::size<0>(s); ++r) {
    int32_t limit = block.count;
    if (block.segment == Segment::Intra) {
      const int32_t position = TileRow::of(args, tile, cute::get<0>(coordinates(r, 0))).position;
      limit = min(limit, position - block.begin + 1);
    }
    CUTE_UNROLL
    for (int c = 0; c < cute::size<1>(s); ++c) {
      if (first_key + cute::get<1>(coordinates(r, c)) >= limit) s(r, c) = -INFINITY;
    }
  }
}

}  // namespace dca::cuda
