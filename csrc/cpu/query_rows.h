// The query rows of a task, and the state that the online softmax keeps for each.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "cache_rows.h"
#include "dca/seqlen_info.h"
#include "micro_kernels.h"
#include "plan.h"

namespace dca::cpu {

/// Rows in the order (KV head, position, query head of the group): so they lie in memory where heads are inside.
class QueryRows {
 public:
  QueryRows(const AttentionParams& p, const MicroKernels& mk, const SeqlenInfo& info, const Task& task)
      : p_(p),
        mk_(mk),
        info_(info),
        task_(task),
        group_(p.num_heads / p.num_heads_kv),
        logit_scale_(logit_scale(p, info, task.b) * kLog2E) {}

  int32_t per_kv_head() const { return group_ * task_.num_positions(); }
  int32_t count() const { return per_kv_head() * task_.num_kv_heads(); }
  int32_t kv_head(int32_t row) const { return task_.kv_head_begin + row / per_kv_head(); }
  int32_t head(int32_t row) const { return kv_head(row) * group_ + row % group_; }
  int32_t position(int32_t row) const { return task_.q_begin + row % per_kv_head() / group_; }

  /// All factors on the logits of a row, and log2(e).
  float logit_factor(int32_t row) const { return logit_scale_ * head_scale(p_, p_.k_scale, kv_head(row)); }

  /// Asks for a row that is loaded later; there need not be so many.
  void ask_for(int32_t row) const {
    if (row < count()) ask_to_read(source(row).data, p_.head_dim * static_cast<int64_t>(element_size(p_.dtype)));
  }

  /// out (dim) = the row rotated for `segment`, zeros behind head_dim.
  void load(int32_t row, Segment segment, int64_t dim, float* out) const {
    const HeadRows q = source(row);
    const int64_t entry = static_cast<int64_t>(p_.chunk.query_position(position(row), segment)) * p_.rotary.half_dim;
    mk_.load_row(q.data, p_.dtype, p_.head_dim, out);
    std::fill(out + p_.head_dim, out + dim, 0.0f);
    mk_.rotate_row(out, p_.rotary.cos + entry, p_.rotary.sin + entry, p_.rotary.half_dim, p_.rotary.interleaved);
  }

  /// How many of the keys [begin, begin + n) of the intra segment a row sees.
  int32_t visible(int32_t row, int32_t begin, int32_t n) const { return std::clamp(position(row) - begin + 1, 0, n); }

 private:
  HeadRows source(int32_t row) const {
    const int64_t b = p_.cu_seqlens_q != nullptr ? 0 : task_.b;
    return head_rows(p_.q.data, p_.dtype, p_.q.stride, b, info_.q_row + info_.row(position(row)), head(row));
  }

  static constexpr float kLog2E = 1.44269504f;

  const AttentionParams& p_;
  const MicroKernels& mk_;
  const SeqlenInfo& info_;
  const Task& task_;
  const int32_t group_;
  const float logit_scale_;
};

/// The online softmax over the keys so far, in base 2.
struct RunningRows {
  float* o;        ///< (rows, dim): sum of 2^(logit - row_max) * value
  int64_t dim;     ///< head_dim rounded up to whole vectors
  float* row_max;  ///< (rows)
  float* row_sum;  ///< (rows)

  float* row(int64_t r) const { return o + r * dim; }

  /// The m rows from `first` on, of which row r sees counts[r] keys of a block.
  SoftmaxRows softmax_rows(int32_t first, int32_t m, const int32_t* counts) const {
    return {m, counts, row_max + first, row_sum + first, row(first), dim, static_cast<int32_t>(dim)};
  }

  void clear(int64_t rows) const {
    std::fill_n(o, rows * dim, 0.0f);
    std::fill_n(row_max, rows, -INFINITY);
    std::fill_n(row_sum, rows, 0.0f);
  }

  /// Divides row r by its sum, times v_scale; returns its LSE in base e. A row that saw no key becomes 0, -inf.
  float finish(int64_t r, int32_t head_dim, float v_scale) const {
    constexpr float kLn2 = 0.693147181f;
    const bool empty = row_sum[r] == 0.0f;
    const float factor = empty ? 0.0f : v_scale / row_sum[r];
    float* const out = row(r);
    for (int32_t c = 0; c < head_dim; ++c) out[c] *= factor;
    return empty ? -INFINITY : (row_max[r] + std::log2(row_sum[r])) * kLn2;
  }
};

/// What both walks know of their task.
struct TaskContext {
  const AttentionParams& p;
  const MicroKernels& mk;
  const Task& task;
  const QueryRows& rows;
  RunningRows state;
  Cache keys;
  Cache values;
  CacheRows places;
};

}  // namespace dca::cpu
