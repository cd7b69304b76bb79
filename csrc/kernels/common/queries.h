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

/// Rotates rows of the tile for `segment` into `sQ` (rows, kHeadDim) in shared memory, read anew from global memory: an
/// unrotated copy beside them would cost as much shared memory as a stage of keys. Lane `lane` of `lanes`; they hold
/// the rows row_of(0) ... row_of(num_rows - 1).
template <class Smem, class RowOf, class Place = ColumnsInPlace>
__device__ __forceinline__ void load_queries(const AttentionArgs& args, const WorkTile& tile, Segment segment,
                                             float sign, Smem&& sQ, int32_t num_rows, RowOf row_of, int32_t lane,
                                             int32_t lanes, Place place = {}) {
  using Element = typename std::remove_reference_t<Smem>::value_type;
  constexpr int kHeadDim = decltype(cute::size<1>(sQ))::value;
  const AttentionParams& p = args.p;
  const RotaryUnits units = RotaryUnits::of(p.rotary, kHeadDim, kVec<Element>);
  // Beside the accumulators there are no registers for more than one unit at a time.
  CUTE_NO_UNROLL
  for (int32_t i = lane; i < num_rows * units.count; i += lanes) {
    const int32_t row = row_of(i / units.count);
    const int32_t unit = i % units.count;
    const auto store = [&](int32_t column, const Vec16<Element>& x) { place(sQ, row, column, x); };
    const TileRow at = TileRow::of(args, tile, row);
    if (!at.valid) {
      Vec16<Element> zero;
      cute::clear(zero);
      if (units.paired && unit < units.offset) store(unit * 8, zero);
      store((unit < units.offset ? unit * 8 + p.rotary.half_dim : (unit + units.offset) * 8), zero);
      continue;
    }
    const int64_t batch = p.cu_seqlens_q != nullptr ? 0 : tile.b;
    const int64_t table = static_cast<int64_t>(p.chunk.query_position(at.position, segment)) * p.rotary.half_dim;
    RotaryRow<Element> source;
    source.data = static_cast<const Element*>(p.q.data) + batch * p.q.stride.batch +
                  (tile.seqlen.q_row + tile.seqlen.row(at.position)) * p.q.stride.row + at.head * p.q.stride.head;
    source.head_dim = p.head_dim;
    source.cos = p.rotary.cos + table;
    source.sin = p.rotary.sin + table;
    source.factor = sign;
    rotate_unit(source, p.rotary, units, unit, store);
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
