// A tile of many query rows of one KV head: each block of keys and values is packed once, and multiplied strip by strip
// with rows whose logits stay in L1 between Q K^T, the softmax and P V.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "query_rows.h"

namespace dca::cpu {

/// Buffers of one worker. `dim` is head_dim rounded up to whole panels, `rows` a multiple of a group, `blocks` those
/// that are packed at a time.
struct TileBuffers {
  float* queries;  ///< (rows, dim) packed
  float* keys;     ///< (blocks, kBlockKeys, dim) packed
  float* values;   ///< (blocks, kBlockKeys, dim) packed, kPanelGap between panels
  float* logits;   ///< (kMaxStripRows, kBlockKeys)
  float* staged;   ///< (kMaxGroupRows, dim)
  int64_t dim;

  static int64_t block_keys(int64_t dim) { return kBlockKeys * dim; }
  static int64_t block_values(int64_t dim) { return (kBlockKeys + kPanelGap) * dim; }

  static int64_t count(int64_t rows, int64_t dim, int64_t blocks) {
    return (rows + kMaxGroupRows) * dim + blocks * (block_keys(dim) + block_values(dim)) + kMaxStripRows * kBlockKeys;
  }
  TileBuffers(int64_t rows, int64_t padded_dim, int64_t blocks, float* memory) : dim(padded_dim) {
    keys = memory;
    values = keys + blocks * block_keys(dim);
    logits = values + blocks * block_values(dim);
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
      for (int32_t begin = it.keys().begin; begin < it.keys().end; begin += products_.blocks * kBlockKeys) {
        attend(it, begin, std::min(begin + products_.blocks * kBlockKeys, it.keys().end));
      }
    }
    for (int32_t row = 0; row < c_.rows.count(); ++row) c_.state.row_max[row] *= softmax_factor();
  }

 private:
  /// Neighbouring keys of one segment and their values, packed.
  struct Block {
    const float* keys;
    const float* values;
    int32_t begin;
    int32_t count;
    bool masked;  ///< some rows do not see all of them
    bool finite;  ///< all values are
    bool scaled;  ///< by the scales of an Int8 cache's rows
    float key_scales[kBlockKeys];
    float value_scales[kBlockKeys];
  };

  static int32_t words_of_query(const PackedProducts& products, int32_t head_dim) {
    const int32_t words = (head_dim + products.numbers_per_word - 1) / products.numbers_per_word;
    return (words + products.depth_words - 1) / products.depth_words * products.depth_words;
  }

  float* queries(int32_t row) const { return w_.queries + static_cast<int64_t>(row) * query_words_; }

  // The softmax wants a positive factor on the logits, so its sign, or that it is 0, goes to the queries.
  float query_factor() const { return logit_factor_ == 0.0f ? 0.0f : std::copysign(1.0f, logit_factor_); }
  float softmax_factor() const { return logit_factor_ == 0.0f ? 1.0f : std::abs(logit_factor_); }

  void load_queries(Segment segment) {
    const float factor = query_factor();
    for (int32_t first = 0; first < c_.rows.count(); first += products_.group_rows) {
      const int32_t m = std::min(products_.group_rows, c_.rows.count() - first);
      for (int32_t r = 0; r < m; ++r) {
        c_.rows.ask_for(first + r + products_.group_rows);
        c_.rows.load(first + r, segment, c_.state.dim, w_.staged + r * c_.state.dim);
      }
      for (int64_t i = 0; factor != 1.0f && i < m * c_.state.dim; ++i) w_.staged[i] *= factor;
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

  // One strip of rows after the other goes through all the keys [begin, end).
  void attend(const SegmentIterator& it, int32_t begin, int32_t end) {
    Block blocks[kMaxBlocks];
    int32_t num_blocks = 0;
    for (int32_t at = begin; at < end; at += kBlockKeys, ++num_blocks) {
      const int32_t n = std::min(kBlockKeys, end - at);
      pack(at, n, it.needs_mask(at + n), num_blocks, blocks[num_blocks]);
    }
    for (int32_t first = 0; first < c_.rows.count(); first += products_.strip_rows) {
      const int32_t m = std::min(products_.strip_rows, c_.rows.count() - first);
      for (int32_t i = 0; i < num_blocks; ++i) attend(first, m, blocks[i]);
    }
  }

  void pack(int32_t begin, int32_t n, bool masked, int32_t index, Block& block) {
    float* const packed_keys = w_.keys + index * TileBuffers::block_keys(w_.dim);
    float* const packed_values = w_.values + index * TileBuffers::block_values(w_.dim);
    const BlockRows keys = rows_of(c_.keys, begin, n);
    products_.pack_keys(keys, c_.p.head_dim, packed_keys);
    const BlockRows values = rows_of(c_.values, begin, n);
    block.finite = products_.pack_values(values, c_.p.head_dim, packed_values);
    block.keys = packed_keys;
    block.values = packed_values;
    block.begin = begin;
    block.count = n;
    block.masked = masked;
    block.scaled = keys.dtype == DType::Int8;
    if (!block.scaled) return;
    std::copy_n(keys.scale, kBlockKeys, block.key_scales);
    std::copy_n(values.scale, kBlockKeys, block.value_scales);
    for (int32_t j = 0; j < n; ++j) block.finite = block.finite && std::isfinite(values.scale[j]);
  }

  void attend(int32_t first, int32_t m, const Block& block) {
    // Rows are in the order of their positions: the first one sees the least.
    const bool masked = block.masked && c_.rows.visible(first, block.begin, block.count) < block.count;
    int32_t seen[kMaxStripRows];
    int32_t most = block.count;
    if (masked) {
      for (int32_t r = 0; r < m; ++r) seen[r] = c_.rows.visible(first + r, block.begin, block.count);
      most = *std::max_element(seen, seen + m);
      if (most == 0) return;
    } else {
      std::fill_n(seen, kMaxStripRows, block.count);
    }
    products_.qk(queries(first), m, block.keys, most, c_.p.head_dim, w_.logits);
    const SoftmaxRows rows = c_.state.softmax_rows(first, m, seen);
    if (masked && !block.finite) {
      if (block.scaled) scale_logits(m, most, block.key_scales);
      c_.mk.softmax_rows(w_.logits, rows, softmax_factor());
      weigh_seen_values(rows, first, block);
    } else {
      const BlockFactors factors{softmax_factor(), block.scaled ? block.key_scales : nullptr,
                                 block.scaled ? block.value_scales : nullptr};
      const bool trusting = !masked && trusts_maxima(rows, block);
      if (!products_.softmax(w_.logits, rows, most, factors, trusting)) {
        products_.qk(queries(first), m, block.keys, most, c_.p.head_dim, w_.logits);
        products_.softmax(w_.logits, rows, most, factors, false);
      }
      products_.pv(w_.logits, m, block.values, most, c_.p.head_dim, rows.o, rows.ldo);
    }
  }

  // It is a whole block, and every row saw keys before.
  static bool trusts_maxima(const SoftmaxRows& rows, const Block& block) {
    return block.count == kBlockKeys &&
           std::all_of(rows.row_max, rows.row_max + rows.m, [](float x) { return x > -INFINITY; });
  }

  void scale_logits(int32_t m, int32_t n, const float* factors) {
    for (int32_t r = 0; r < m; ++r) {
      for (int32_t j = 0; j < n; ++j) w_.logits[r * kBlockKeys + j] *= factors[j];
    }
  }

  // A weight of 0 would not hide a NaN in a value that the row must not see.
  void weigh_seen_values(const SoftmaxRows& rows, int32_t first, const Block& block) {
    const BlockRows values = rows_of(c_.values, block.begin, block.count);
    for (int32_t j = 0; j < values.count; ++j) {
      float* const value = w_.staged;
      c_.mk.load_row(values.row[j], values.dtype, c_.p.head_dim, value);
      const float scale = block.scaled ? block.value_scales[j] : 1.0f;
      for (int32_t r = 0; r < rows.m; ++r) {
        if (j >= rows.counts[r]) continue;
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
