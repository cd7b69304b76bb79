// Few query rows, as in decode: keys and values are read where they lie, in their own dtype, once for all rows.
//
// A task may hold several KV heads. They take turns at every run of kRunKeys keys, so that memory is read straight on
// where the heads of a key lie side by side; and what comes two runs later is asked for in advance.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "query_rows.h"

namespace dca::cpu {

/// Buffers of one worker. `dim` is head_dim rounded up to whole vectors.
struct RowBuffers {
  float* queries;  ///< (rows, dim)
  float* logits;   ///< (rows, kBlockKeys)
  int32_t* seen;   ///< (rows)

  static int64_t count(int64_t rows, int64_t dim) { return rows * (dim + kBlockKeys + 1); }
  RowBuffers(int64_t rows, int64_t dim, float* memory) {
    logits = memory;
    queries = logits + rows * kBlockKeys;
    seen = reinterpret_cast<int32_t*>(queries + rows * dim);
  }
};

class RowWalk {
 public:
  RowWalk(const TaskContext& context, const RowBuffers& buffers)
      : c_(context), w_(buffers), dim_(static_cast<int32_t>(context.state.dim)) {}
  RowWalk(const RowWalk&) = delete;

  void run() {
    c_.state.clear(c_.rows.count());
    for (SegmentIterator it(c_.p.chunk, c_.task.q_begin, c_.task.q_end, c_.p.segments, c_.task.window); !it.done();
         it.next()) {
      load_queries(it.segment());
      const KeyRange keys = it.keys();
      find_runs(keys.begin, keys.end, *next_);
      for (int32_t begin = keys.begin; begin < keys.end; begin += kBlockKeys) {
        const int32_t n = std::min(kBlockKeys, keys.end - begin);
        std::swap(now_, next_);
        find_runs(begin + n, keys.end, *next_);
        block(begin, n, it.needs_mask(begin + n));
      }
    }
  }

 private:
  // 8 rows at a distance of 4 KiB share 8 ways of a small L1 cache.
  static constexpr int32_t kRunKeys = 8;
  static constexpr int32_t kRunsAhead = 2;

  struct Runs {
    int32_t count = 0;
    RowRun run[kBlockKeys];
  };

  // The runs of the block that starts at key `begin`.
  void find_runs(int32_t begin, int32_t end, Runs& runs) const {
    runs.count = 0;
    c_.places.for_each_run(begin, std::min(kBlockKeys, end - begin), kRunKeys,
                           [&](const RowRun& run) { runs.run[runs.count++] = run; });
  }

  void load_queries(Segment segment) {
    for (int32_t row = 0; row < c_.rows.count(); ++row) {
      float* const query = w_.queries + static_cast<int64_t>(row) * dim_;
      c_.rows.load(row, segment, dim_, query);
      const float factor = c_.rows.logit_factor(row);
      for (int32_t c = 0; c < dim_; ++c) query[c] *= factor;
    }
  }

  // Where run i of `runs` of a cache lies, or what is read after the last of them.
  const void* ahead(const Cache& cache, const Runs& runs, int32_t i, const Cache& cache_after, const Runs& runs_after,
                    int32_t head) const {
    if (i < runs.count) return cache.rows(runs.run[i], head).data;
    i = std::min(i - runs.count, runs_after.count - 1);
    return i < 0 ? nullptr : cache_after.rows(runs_after.run[i], head).data;
  }

  void block(int32_t begin, int32_t n, bool masked) {
    for (int32_t i = 0; i < now_->count; ++i) {
      for (int32_t head = c_.task.kv_head_begin; head < c_.task.kv_head_end; ++head) {
        multiply_keys(now_->run[i], ahead(c_.keys, *now_, i + kRunsAhead, c_.values, *now_, head), head);
      }
    }
    for (int32_t row = 0; row < c_.rows.count(); ++row) w_.seen[row] = c_.rows.visible(row, begin, n, masked);
    c_.mk.softmax_rows(w_.logits, kBlockKeys, c_.rows.count(), w_.seen, c_.state.row_max, c_.state.row_sum, c_.state.o,
                       c_.state.dim, dim_);
    for (int32_t i = 0; i < now_->count; ++i) {
      for (int32_t head = c_.task.kv_head_begin; head < c_.task.kv_head_end; ++head) {
        weigh_values(now_->run[i], ahead(c_.values, *now_, i + kRunsAhead, c_.keys, *next_, head), head);
      }
    }
  }

  // Logits of one run for the rows of one KV head.
  void multiply_keys(const RowRun& run, const void* next, int32_t head) {
    const HeadRows keys = c_.keys.rows(run, head);
    const int32_t first = first_row(head);
    float* const s = logits(first) + run.offset;
    c_.mk.qk_rows(w_.queries + static_cast<int64_t>(first) * dim_, dim_, c_.rows.per_kv_head(), keys, next, run.count,
                  dim_, s, kBlockKeys);
    scale_columns(keys, run.count, s);
  }

  // O += weights * values of one run for the rows of one KV head. The values that all rows see go together and the rest
  // row by row, since a weight of 0 does not hide a NaN in a value that the row must not see.
  void weigh_values(const RowRun& run, const void* next, int32_t head) {
    const HeadRows values = c_.values.rows(run, head);
    const int32_t first = first_row(head);
    const auto seen = [&](int32_t r) { return std::clamp(w_.seen[first + r] - run.offset, 0, run.count); };
    const auto weights = [&](int32_t r) { return logits(first + r) + run.offset; };
    int32_t common = run.count;
    for (int32_t r = 0; r < c_.rows.per_kv_head(); ++r) common = std::min(common, seen(r));
    scale_columns(values, run.count, weights(0));
    c_.mk.pv_rows(weights(0), kBlockKeys, c_.rows.per_kv_head(), values, next, common, dim_, c_.state.row(first), dim_);
    for (int32_t r = 0; r < c_.rows.per_kv_head(); ++r) {
      if (seen(r) == common) continue;
      c_.mk.pv_rows(weights(r) + common, kBlockKeys, 1, values.from(common), next, seen(r) - common, dim_,
                    c_.state.row(first + r), dim_);
    }
  }

  // The rows of an Int8 cache are read without their scales, which are factors on columns of logits and weights.
  // Columns that a row does not see may become NaN; nothing reads them.
  void scale_columns(const HeadRows& rows, int32_t count, float* s) const {
    if (rows.scales == nullptr) return;
    c_.mk.scale_columns(s, kBlockKeys, c_.rows.per_kv_head(), count, rows.scales, rows.scale_stride);
  }

  int32_t first_row(int32_t head) const { return (head - c_.task.kv_head_begin) * c_.rows.per_kv_head(); }

  float* logits(int32_t row) const { return w_.logits + static_cast<int64_t>(row) * kBlockKeys; }

  const TaskContext& c_;
  const RowBuffers w_;
  const int32_t dim_;
  Runs runs_[2];
  Runs* now_ = runs_;       // of the block at hand
  Runs* next_ = runs_ + 1;  // of the one after it
};

}  // namespace dca::cpu
