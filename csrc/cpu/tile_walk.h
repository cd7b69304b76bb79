// A tile of many query rows of one KV head: each block of keys and values is packed once, and multiplied strip by strip
// with rows whose logits stay in L1 between Q K^T, the softmax and P V.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "query_rows.h"

namespace dca::cpu {

/// The products of a task's tiles: those of bfloat16 where queries are and the machine can, else fp32. Factors on the
/// logits come after the product, so that Q is rounded as the model would round it, and 8-bit numbers stay as they are.
inline const PackedProducts& packed_products(const AttentionParams& p, const MicroKernels& mk) {
  return p.dtype == DType::BFloat16 && mk.bfloat16 != nullptr ? *mk.bfloat16 : mk.fp32;
}

/// Buffers of one worker. `dim` is head_dim rounded up to whole panels, `rows` a multiple of a group.
struct TileBuffers {
  float* queries;  ///< (rows, dim) packed
  float* keys;     ///< (kBlockKeys, dim) packed
  float* values;   ///< (kBlockKeys, dim) packed, kPanelGap between panels
  float* logits;   ///< (kMaxStripRows, kBlockKeys)
  float* staged;   ///< (kMaxGroupRows, dim)

  static int64_t count(int64_t rows, int64_t dim) {
    return rows * dim + kBlockKeys * (2 * dim + kMaxStripRows) + dim * kPanelGap + kMaxGroupRows * dim;
  }
  TileBuffers(int64_t rows, int64_t dim, float* memory) {
    keys = memory;
    values = keys + kBlockKeys * dim;
    logits = values + (kBlockKeys + kPanelGap) * dim;
    queries = logits + kMaxStripRows * kBlockKeys;
    staged = queries + rows * dim;
  }
};

/// Encloses the products of one thread.
class ProductsScope {
 public:
  explicit ProductsScope(const PackedProducts& products) : products_(products) {
    if (products_.begin != nullptr) products_.begin();
  }
  ~ProductsScope() {
    if (products_.end != nullptr) products_.end();
  }
  ProductsScope(const ProductsScope&) = delete;
  ProductsScope& operator=(const ProductsScope&) = delete;

 private:
  const PackedProducts& products_;
};

class TileWalk {
 public:
  TileWalk(const TaskContext& context, const TileBuffers& buffers)
      : c_(context),
        products_(packed_products(context.p, context.mk)),
        w_(buffers),
        query_words_(words_of_query(products_, c_.p.head_dim)),
        logit_factor_(c_.rows.logit_factor(0)) {}

  void run() {
    const ProductsScope scope(products_);
    c_.state.clear((c_.rows.count() + products_.group_rows - 1) / products_.group_rows * products_.group_rows);
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
  static int32_t words_of_query(const PackedProducts& products, int32_t head_dim) {
    const int32_t words = (head_dim + products.numbers_per_word - 1) / products.numbers_per_word;
    return (words + products.depth_words - 1) / products.depth_words * products.depth_words;
  }

  float* queries(int32_t row) const { return w_.queries + static_cast<int64_t>(row) * query_words_; }

  void load_queries(Segment segment) {
    for (int32_t first = 0; first < c_.rows.count(); first += products_.group_rows) {
      const int32_t m = std::min(products_.group_rows, c_.rows.count() - first);
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
    const BlockRows keys = rows_of(c_.keys, begin, n);
    products_.pack_keys(keys, c_.p.head_dim, w_.keys);
    float logit_factors[kBlockKeys] = {};
    for (int32_t j = 0; j < n; ++j) logit_factors[j] = logit_factor_ * (has_scales(keys) ? keys.scale[j] : 1.0f);
    const BlockRows values = rows_of(c_.values, begin, n);
    bool finite = products_.pack_values(values, c_.p.head_dim, w_.values);
    for (int32_t j = 0; has_scales(values) && j < n; ++j) finite = finite && std::isfinite(values.scale[j]);
    for (int32_t first = 0; first < c_.rows.count(); first += products_.strip_rows) {
      const int32_t m = std::min(products_.strip_rows, c_.rows.count() - first);
      int32_t seen[kMaxStripRows];
      for (int32_t r = 0; r < m; ++r) seen[r] = c_.rows.visible(first + r, begin, n, masked);
      const int32_t most = *std::max_element(seen, seen + m);
      if (most == 0) continue;
      products_.qk(queries(first), m, w_.keys, most, c_.p.head_dim, logit_factors, w_.logits);
      c_.mk.softmax_rows(w_.logits, kBlockKeys, m, seen, c_.state.row_max + first, c_.state.row_sum + first,
                         c_.state.row(first), c_.state.dim, static_cast<int32_t>(c_.state.dim));
      if (masked && !finite) {
        weigh_seen_values(first, m, seen, values);
      } else {
        weigh_packed_values(first, m, seen, most, values);
      }
    }
  }

  // The rows of an Int8 cache.
  static bool has_scales(const BlockRows& rows) { return rows.dtype == DType::Int8; }

  // Keys that a row does not see get weight 0.
  void weigh_packed_values(int32_t first, int32_t m, const int32_t* seen, int32_t most, const BlockRows& values) {
    for (int32_t r = 0; r < m; ++r) {
      float* const weights = w_.logits + r * kBlockKeys;
      std::fill(weights + seen[r], weights + most, 0.0f);
      products_.round_weights(weights, most, has_scales(values) ? values.scale : nullptr);
    }
    products_.pv(w_.logits, m, w_.values, most, c_.p.head_dim, c_.state.row(first), c_.state.dim);
  }

  // A weight of 0 would not hide a NaN in a value that the row must not see.
  void weigh_seen_values(int32_t first, int32_t m, const int32_t* seen, const BlockRows& values) {
    for (int32_t j = 0; j < values.count; ++j) {
      float* const value = w_.staged;
      c_.mk.load_row(values.row[j], values.dtype, c_.p.head_dim, value);
      const float scale = has_scales(values) ? values.scale[j] : 1.0f;
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
  const int32_t query_words_;
  const float logit_factor_;
};

}  // namespace dca::cpu
