// Where the results of a tile go: out and lse, or the partial results of a split.
#pragma once

#include "softmax.h"
#include "tile_scheduler.h"

namespace dca::cuda {

/// Addresses of the rows of a tile's results.
template <class Element>
struct OutputRows {
  const AttentionArgs& args;
  const WorkTile& tile;

  /// Row of the query at `position` in q, out and the partial results: rows of all sequences.
  __device__ int64_t global_row(int32_t row) const {
    const bool ragged = args.p.cu_seqlens_q != nullptr;
    return (ragged ? tile.seqlen.q_row : static_cast<int64_t>(tile.b) * args.p.seqlen_q) + row;
  }
  __device__ Element* out(int32_t row, int32_t head) const {
    const Strides& stride = args.p.out.stride;
    const int64_t batch = args.p.cu_seqlens_q != nullptr ? 0 : tile.b * stride.batch;
    return static_cast<Element*>(args.p.out.data) + batch + (tile.seqlen.q_row + row) * stride.row + head * stride.head;
  }
  __device__ float* out_accum(int32_t row, int32_t head) const {
    return args.plan.out_accum + accum_index(row, head) * args.p.head_dim;
  }
  __device__ bool wants_lse() const { return args.p.lse != nullptr || args.plan.num_splits > 1; }
  __device__ void store_lse(int32_t row, int32_t head, float value) const {
    if (args.plan.num_splits > 1) {
      args.plan.lse_accum[accum_index(row, head)] = value;
    } else if (args.p.lse != nullptr) {
      const bool ragged = args.p.cu_seqlens_q != nullptr;
      const int64_t line = ragged ? head : static_cast<int64_t>(tile.b) * args.p.num_heads + head;
      args.p.lse[line * (ragged ? args.p.total_q : args.p.seqlen_q) + tile.seqlen.q_row + row] = value;
    }
  }

 private:
  __device__ int64_t accum_index(int32_t row, int32_t head) const {
    return (tile.split * args.total_rows + global_row(row)) * args.p.num_heads + head;
  }
};

/// Rows without a position: out = 0, lse = -inf; of a split only the latter, since such a part carries no weight.
template <class Element>
__device__ void clear_rows_without_position(const AttentionArgs& args, const WorkTile& tile, int32_t thread,
                                            int32_t threads) {
  const OutputRows<Element> rows{args, tile};
  const int32_t units = args.plan.num_splits > 1 ? 0 : args.p.head_dim / kVec<Element>;
  const int32_t num_rows = tile.seqlen.first_row * tile.num_heads;
  for (int32_t i = thread; i < num_rows; i += threads) {
    const int32_t head = tile.head_begin + i % tile.num_heads;
    const int32_t row = i / tile.num_heads;
    Vec16<Element> zero;
    cute::clear(zero);
    for (int32_t unit = 0; unit < units; ++unit) store16(rows.out(row, head) + unit * kVec<Element>, zero);
    rows.store_lse(row, head, -INFINITY);
  }
}

/// Divides a thread's rows of O, (rows, columns) at `coordinates` of the tile, by their sums, stores their LSE and, of
/// a split, the rows themselves. `leader`: whether this lane stores for the four that share a row. `factor`: on O.
template <class Element, int kRows, int kHeadroom, class Output, class Coordinates>
__device__ __forceinline__ void finish_rows(const OutputRows<Element>& rows,
                                            const OnlineSoftmax<kRows, kHeadroom>& softmax, Output& o,
                                            const Coordinates& coordinates, float scale_log2, bool leader,
                                            float factor = 1.0f) {
  CUTE_UNROLL
  for (int r = 0; r < kRows; ++r) {
    const float inverse = softmax.row_sum[r] == 0.0f ? 0.0f : factor / softmax.row_sum[r];
    CUTE_UNROLL
    for (int c = 0; c < cute::size<1>(o); ++c) o(r, c) *= inverse;
    const TileRow at = TileRow::of(rows.args, rows.tile, cute::get<0>(coordinates(r, 0)));
    if (!at.valid) continue;
    const int32_t row = rows.tile.seqlen.row(at.position);
    if (leader && rows.wants_lse()) rows.store_lse(row, at.head, softmax.lse(r, scale_log2));
    if (rows.args.plan.num_splits == 1) continue;
    float* const accum = rows.out_accum(row, at.head);
    CUTE_UNROLL
    for (int c = 0; c < cute::size<1>(o); c += 2) {
      const int32_t column = cute::get<1>(coordinates(r, c));
      if (column < rows.args.p.head_dim) *reinterpret_cast<float2*>(accum + column) = {o(r, c), o(r, c + 1)};
    }
  }
}

/// Copies rows of a tile from `staging` (rows, kHeadDim) in shared memory to out, 16 bytes at a time: those of one
/// warp, row_of(0) ... row_of(num_rows - 1). Rows of other tiles are not touched.
template <class Element, class Staging, class RowOf>
__device__ __forceinline__ void store_rows_of_warp(const OutputRows<Element>& rows, Staging&& staging, int32_t num_rows,
                                                   RowOf row_of, int32_t lane) {
  constexpr int kUnits = decltype(cute::size<1>(staging))::value / kVec<Element>;
  for (int32_t i = lane; i < num_rows * kUnits; i += 32) {
    const int32_t row = row_of(i / kUnits);
    const int32_t column = i % kUnits * kVec<Element>;
    const TileRow at = TileRow::of(rows.args, rows.tile, row);
    if (!at.valid || column >= rows.args.p.head_dim) continue;
    store16(rows.out(rows.tile.seqlen.row(at.position), at.head) + column, load16(&staging(row, column)));
  }
}

}  // namespace dca::cuda
