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

/// A row of q and of the tables that belongs to a row of the tile. Rows that are not the tile's get one that exists, so
/// that nothing that reads it needs a branch.
template <class Element>
__device__ __forceinline__ RotaryRow<Element> query_row(const AttentionArgs& args, const WorkTile& tile,
                                                        const TileRow& at, Segment segment, float sign) {
  const AttentionParams& p = args.p;
  const int32_t position = at.valid ? at.position : tile.positions.begin;
  const int32_t head = at.valid ? at.head : tile.head_begin;
  const int64_t batch = p.cu_seqlens_q != nullptr ? 0 : tile.b;
  const int64_t table = static_cast<int64_t>(p.chunk.query_position(position, segment)) * p.rotary.half_dim;
  RotaryRow<Element> row;
  row.data = static_cast<const Element*>(p.q.data) + batch * p.q.stride.batch +
             (tile.seqlen.q_row + tile.seqlen.row(position)) * p.q.stride.row + head * p.q.stride.head;
  row.head_dim = p.head_dim;
  row.cos = p.rotary.cos + table;
  row.sin = p.rotary.sin + table;
  row.factor = at.valid ? sign : 0.0f;
  return row;
}

/// A pair of units on its way: asked for first, rotated and stored later.
template <class Element>
struct QueryPair {
  int32_t row;
  int32_t column;
  RotaryRow<Element> source;
  UnitPair<Element> pair;

  __device__ QueryPair(const AttentionArgs& args, const WorkTile& tile, Segment segment, float sign, int32_t tile_row,
                       int32_t first_column)
      : row(tile_row),
        column(first_column),
        source(query_row<Element>(args, tile, TileRow::of(args, tile, tile_row), segment, sign)),
        pair(UnitPair<Element>::load(source.data, args.p.rotary.half_dim, first_column)) {}

  template <class Store>
  __device__ void finish(int32_t half_dim, Store& store) {
    pair.rotate(source, column);
    pair.store(half_dim, column, [&](int32_t c, const Vec16<Element>& x) { store(row, c, x); });
  }
};

template <class PairOf, class Store, int... kIndices>
__device__ __forceinline__ void rotate_pairs(PairOf& pair_of, Store& store, int32_t half_dim, int32_t first,
                                             int32_t lanes, std::integer_sequence<int, kIndices...>) {
  decltype(pair_of(0)) pairs[] = {pair_of(first + kIndices * lanes)...};
  (pairs[kIndices].finish(half_dim, store), ...);
}

}  // namespace detail

/// Rotates rows of the tile for `segment` into `sQ` (rows, kHeadDim) in shared memory, read anew from global memory: an
/// unrotated copy beside them would cost as much shared memory as a stage of keys. Lane `lane` of `lanes`; they hold
/// the rows row_of(0) ... row_of(num_rows - 1). kAhead: pairs of units that a lane asks for before it uses the first,
/// as many as there are registers for beside what the kernel holds.
template <int kAhead, class Smem, class RowOf, class Place = ColumnsInPlace>
__device__ __forceinline__ void load_queries(const AttentionArgs& args, const WorkTile& tile, Segment segment,
                                             float sign, Smem&& sQ, int32_t num_rows, RowOf row_of, int32_t lane,
                                             int32_t lanes, Place place = {}) {
  using Element = typename std::remove_reference_t<Smem>::value_type;
  constexpr int kHeadDim = decltype(cute::size<1>(sQ))::value;
  constexpr int kVector = kVec<Element>;
  const RotaryTables& rotary = args.p.rotary;
  const RotaryUnits units = RotaryUnits::of(rotary, kHeadDim, kVector);
  const auto store = [&](int32_t row, int32_t column, const Vec16<Element>& x) { place(sQ, row, column, x); };

  const int32_t pairs = units.offset;
  const auto pair_of = [&](int32_t i) {
    return detail::QueryPair<Element>(args, tile, segment, sign, row_of(i / pairs), i % pairs * kVector);
  };
  int32_t i = lane;
  CUTE_NO_UNROLL
  for (; i + (kAhead - 1) * lanes < num_rows * pairs; i += kAhead * lanes) {
    detail::rotate_pairs(pair_of, store, rotary.half_dim, i, lanes, std::make_integer_sequence<int, kAhead>{});
  }
  if constexpr (kAhead > 1) {
    CUTE_NO_UNROLL
    for (; i < num_rows * pairs; i += lanes) {
      detail::rotate_pairs(pair_of, store, rotary.half_dim, i, lanes, std::make_integer_sequence<int, 1>{});
    }
  }

  // Units whose pairs fall anywhere, columns without rotation, and those behind head_dim.
  const int32_t others = units.count - pairs;
  CUTE_NO_UNROLL
  for (i = lane; i < num_rows * others; i += lanes) {
    const int32_t row = row_of(i / others);
    const int32_t unit = pairs + i % others;
    rotate_unit(detail::query_row<Element>(args, tile, TileRow::of(args, tile, row), segment, sign), rotary, units,
                unit, [&](int32_t column, const Vec16<Element>& x) { store(row, column, x); });
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
