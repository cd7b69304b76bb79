// A tile of many query rows of one KV head: each block of keys and values is packed once, and multiplied strip by strip
// with rows whose logits stay in L1 between Q K^T, the softmax and P V.
#pragma once

#include <algorithm>
#include <cstdint>

#include "query_rows.h"

namespace dca::cpu {

/// Buffers of one worker. `dim` is head_dim rounded up to whole panels, `rows` a multiple of kTileRows.
struct TileBuffers {
  float* queries;  ///< (rows, dim) packed
  float* keys;     ///< (kBlockKeys, dim) packed
  float* values;   ///< (kBlockKeys, dim) packed, kPanelGap between panels
  float* logits;   ///< (kStripRows, kBlockKeys)
  float* staged;   ///< (kTileRows, dim)

  /// 24 rows: their logits take 12 KiB, and so do their queries and outputs at head_dim 128.
  static constexpr int32_t kStripRows = 24;
  static_assert(kStripRows % kTileRows == 0, "only the last strip of a tile may end with a part of a group");

  static int64_t count(int64_t rows, int64_t dim) {
    return rows * dim + kBlockKeys * (2 * dim + kStripRows) + dim * kPanelGap + kTileRows * dim;
  }
  TileBuffers(int64_t rows, int64_t dim, float* memory) {
    keys = memory;
    values = keys + kBlockKeys * dim;
    logits = values + (kBlockKeys + kPanelGap) * dim;
    queries = logits + kStripRows * kBlockKeys;
    staged = queries + rows * dim;
  }
};

class TileWalk {
 public:
  TileWalk(const TaskContext& context, const TileBuffers& buffers)
      : c_(context),
        products_(products_for(context.p, context.mk)),
        w_(buffers),
        queries_stride_((c_.p.head_dim + products_.numbers_per_word - 1) / products_.numbers_per_word),
        logit_factor_(c_.rows.logit_factor(0)) {}

  void run() {
    c_.state.clear((c_.rows.count() + kTileRows - 1) / kTileRows * kTileRows);
    for (SegmentIterator it(c_.p.chunk, c_.task.q_begin, c_.task.q_end, c_.p.segments, c_.task.window); !it.done();
         it.next()) {
      load_queries(it.segment());
      const KeyRange keys = it.keys();
      for (int32_t begin = keys.begin; begin < keys.end; begin += kBlockKeys) {
        const int32_t n = std::min(kBlockKeys, keys.end - begin);
        block(begin, n, it.needs_mask(begin + n));
      }
    }
  }

 private:
  static constexpr int32_t kStripRows = TileBuffers::kStripRows;

  // Keys and values of bfloat16 are multiplied as they are where the machine can, else everything in fp32. Factors on
  // the logits come after the product, so that Q is rounded as the model would round it.
  static const PackedProducts& products_for(const AttentionParams& p, const MicroKernels& mk) {
    const bool bfloat16 = p.dtype == DType::BFloat16 && dtype_of_cache(p) == DType::BFloat16;
    return bfloat16 && mk.bfloat16 != nullptr ? *mk.bfloat16 : mk.fp32;
  }

  float* queries(int32_t row) const { return w_.queries + static_cast<int64_t>(row) * queries_stride_; }

  void load_queries(Segment segment) {
    for (int32_t first = 0; first < c_.rows.count(); first += kTileRows) {
      const int32_t m = std::min(kTileRows, c_.rows.count() - first);
      for (int32_t r = 0; r < m; ++r) c_.rows.load(first + r, segment, c_.state.dim, w_.staged + r * c_.state.dim);
      products_.pack_queries(w_.staged, c_.state.dim, m, c_.p.head_dim, queries(first));
    }
  }

  BlockRows rows_of(const Cache& cache, int32_t begin, int32_t n) const {
    BlockRows block;
    block.count = n;
    block.dtype = cache.dtype;
    c_.places.for_each_run(begin, n, n, [&](const RowRun& run) {
      const HeadRows rows = cache.rows(run, c_.task.kv_head_begin);
      for (int32_t j = 0; j < run.count; ++j) {
        block.row[run.offset + j] = rows.from(j).data;
        if (rows.scales != nullptr) block.scale[run.offset + j] = rows.scales[j * rows.scale_stride];
      }
    });
    return block;
  }

  void block(int32_t begin, int32_t n, bool masked) {
    products_.pack_keys(rows_of(c_.keys, begin, n), c_.p.head_dim, w_.keys);
    const BlockRows values = rows_of(c_.values, begin, n);
    const bool finite = products_.pack_values(values, c_.p.head_dim, w_.values);
    for (int32_t first = 0; first < c_.rows.count(); first += kStripRows) {
      const int32_t m = std::min(kStripRows, c_.rows.count() - first);
      int32_t seen[kStripRows];
      for (int32_t r = 0; r < m; ++r) seen[r] = c_.rows.visible(first + r, begin, n, masked);
      const int32_t most = *std::max_element(seen, seen + m);
      if (most == 0) continue;
      products_.qk(queries(first), m, w_.keys, most, c_.p.head_dim, logit_factor_, w_.logits);
      c_.mk.softmax_rows(w_.logits, kBlockKeys, m, seen, c_.state.row_max + first, c_.state.row_sum + first,
                         c_.state.row(first), c_.state.dim, static_cast<int32_t>(c_.state.dim));
      if (masked && !finite) {
        weigh_seen_values(first, m, seen, values);
      } else {
        weigh_packed_values(first, m, seen, most);
      }
    }
  }

  // Keys that a row does not see get weight 0.
  void weigh_packed_values(int32_t first, int32_t m, const int32_t* seen, int32_t most) {
    for (int32_t r = 0; r < m; ++r) {
      float* const weights = w_.logits + r * kBlockKeys;
      std::fill(weights + seen[r], weights + most, 0.0f);
      products_.round_weights(weights, most);
    }
    products_.pv(w_.logits, m, w_.values, most, c_.p.head_dim, c_.state.row(first), c_.state.dim);
  }

  // A weight of 0 would not hide a NaN in a value that the row must not see.
  void weigh_seen_values(int32_t first, int32_t m, const int32_t* seen, const BlockRows& values) {
    for (int32_t j = 0; j < values.count; ++j) {
      float* const value = w_.staged;
      c_.mk.load_row(values.row[j], values.dtype, c_.p.head_dim, value);
      const float scale = values.dtype == DType::Int8 ? values.scale[j] : 1.0f;
      for (int32_t r = 0; r < m; ++r) {
        if (j >= seen[r]) continue;
        const float weight = w_.logits[r * kBlockKeys + j] * scale;
        float* const o = c_.state.row(first + r);
        for (int32_t c = 0; c < c_.p.head_dim; ++c) o[c] += weight * value[c];
      }
    }
  }

  const TaskContext& c_;
  const PackedProducts& products_;
  const TileBuffers w_;
  const int32_t queries_stride_;
  const float logit_factor_;
};

}  // namespace dca::cpu
