// Which part of an attention call a tile is. The grid depends on shapes only; lengths are read here, on the device.
#pragma once

#include <cutlass/fast_math.h>

#include "dca/seqlen_info.h"
#include "kernels.h"
#include "key_blocks.h"
#include "tile_order.h"

namespace dca::cuda {

/// What an attention kernel is launched with: the caller's parameters, the plan, and divisors made ready.
struct AttentionArgs {
  AttentionParams p;
  AttentionPlan plan;
  cutlass::FastDivmod heads_per_tile;
  cutlass::FastDivmod page_size;
  cutlass::FastDivmod num_heads_kv;
  TileOrder<cutlass::FastDivmod> order;
  TileDivisors<cutlass::FastDivmod> tiles;
  int64_t total_rows;  ///< query rows of all sequences

  explicit AttentionArgs(const AttentionParams& params, const AttentionPlan& attention_plan)
      : p(params),
        plan(attention_plan),
        heads_per_tile(attention_plan.heads_per_tile),
        page_size(params.pages.page_table != nullptr ? params.pages.page_size : 1),
        num_heads_kv(params.num_heads_kv),
        order{attention_plan.num_query_tiles, attention_plan.num_splits, attention_plan.kv_heads_at_once,
              attention_plan.num_head_tiles, attention_plan.num_groups},
        tiles(params.chunk, attention_plan.positions_per_tile),
        total_rows(params.cu_seqlens_q != nullptr ? params.total_q
                                                  : static_cast<int64_t>(params.batch) * params.seqlen_q) {}
};

/// A tile. It lies in shared memory: what all threads know alike should not cost each of them registers.
struct WorkTile {
  int32_t b;
  int32_t kv_head;
  int32_t head_begin;  ///< first query head
  int32_t num_heads;   ///< query heads of the tile, at most heads_per_tile
  int32_t split;
  bool first_of_sequence;  ///< answers for the rows without a position as well
  KeyRange positions;      ///< of the queries, within one chunk
  int32_t chunk_begin;     ///< of that chunk
  KeyRanges ranges;        ///< of the keys of this split
  SeqlenInfo seqlen;
  float scale;    ///< on the logits
  const void* k;  ///< keys of the KV head: logical key 0 of the sequence, or slot 0 of page 0
  const void* v;  ///< its values

  /// Tile `index` of the call.
  __device__ void assign(const AttentionArgs& args, int32_t index) {
    const AttentionParams& p = args.p;
    const AttentionPlan& plan = args.plan;
    const TileIndex at = args.order.at(index);
    split = at.split;
    args.num_heads_kv(b, kv_head, at.kv_head);
    const int32_t group = args.num_heads_kv.div(p.num_heads);
    const int32_t head_in_group = at.head_tile * plan.heads_per_tile;
    head_begin = kv_head * group + head_in_group;
    num_heads = min(plan.heads_per_tile, group - head_in_group);
    seqlen = SeqlenInfo::of(p, b);
    scale = logit_scale(p, seqlen, b);
    k = first_address(p, p.k);
    v = first_address(p, p.v);

    // Later positions see more keys: the last tile is the longest.
    const QueryTiles<cutlass::FastDivmod> tiles(p.chunk, seqlen.position(seqlen.first_row), seqlen.kv_len, args.tiles);
    const int32_t place = tiles.count() - 1 - at.query_tile;
    const QueryTile found = place >= 0 ? tiles.tile(place) : QueryTile{};
    positions = found.positions;
    chunk_begin = found.chunk.begin;
    first_of_sequence = place == 0 || (at.query_tile == 0 && tiles.count() == 0);
    ranges.assign(found, p.segments, split_window(args, positions.end, split),
                  p.pages.page_table != nullptr ? seqlen.leftpad : -1);
  }

  /// Computes the tile of this CTA, where each has one, into `storage` in shared memory, and waits for it.
  __device__ static const WorkTile& in_shared_memory(const AttentionArgs& args, unsigned char* storage) {
    WorkTile* const tile = reinterpret_cast<WorkTile*>(storage);
    if (threadIdx.x == 0) tile->assign(args, static_cast<int32_t>(blockIdx.x));
    __syncthreads();
    return *tile;
  }

  __device__ const void* first_address(const AttentionParams& p, const ConstTensorRef& cache) const {
    int64_t offset = kv_head * cache.stride.head;
    if (p.pages.page_table == nullptr) {
      offset += (seqlen.k_row + seqlen.leftpad) * cache.stride.row;
      if (p.cu_seqlens_k == nullptr) offset += b * cache.stride.batch;
    }
    const int64_t element_bytes = p.cache_dtype == DType::Float8E4M3 ? 1 : 2;  // else bf16 or fp16
    return static_cast<const char*>(cache.data) + offset * element_bytes;
  }

  __device__ bool empty() const { return positions.empty(); }
  __device__ int32_t num_positions() const { return positions.size(); }

  /// Keys of one split out of the `keys` that the tile sees: equal shares in whole blocks of 64. In 32 bits, which
  /// hold kMaxNumSplits times 64 beside any number of keys.
  __device__ static KeyRange split_window(const AttentionArgs& args, int32_t keys, int32_t split) {
    constexpr uint32_t kGranularity = 64;
    const int32_t num_splits = args.plan.num_splits;
    if (num_splits == 1) return {0, keys};
    const uint32_t all = static_cast<uint32_t>(keys);
    const uint32_t blocks = (all + kGranularity - 1) / kGranularity;
    const uint32_t share = args.order.num_splits.div(static_cast<int>(blocks) + num_splits - 1) * kGranularity;
    const uint32_t begin = static_cast<uint32_t>(split) * share;
    return {static_cast<int32_t>(min(begin, all)), static_cast<int32_t>(min(begin + share, all))};
  }
};

/// Row of a tile -> query position and head.
struct TileRow {
  int32_t position;
  int32_t head;
  bool valid;

  __device__ static TileRow of(const AttentionArgs& args, const WorkTile& tile, int32_t row) {
    int32_t offset, head;
    args.heads_per_tile(offset, head, row);
    return {tile.positions.begin + offset, tile.head_begin + head,
            offset < tile.num_positions() && head < tile.num_heads};
  }
};

}  // namespace dca::cuda
