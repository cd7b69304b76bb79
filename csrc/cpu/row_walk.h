// Few query rows, as in decode: keys and values are read where they lie, in their own dtype, once for all rows.
//
// A task may hold several KV heads. They take turns at every run of few keys, so that memory is read straight on
// where the heads of a key lie side by side; and what comes some runs later is asked for in advance.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "query_rows.h"

namespace dca::cpu {

/// Buffers of one worker. `dim` is head_dim rounded up to whole vectors.
struct RowBuffers {
  float* queries;  ///< (rows, dim), packed
  float* logits;   ///< (rows, kBlockKeys)
  float* factors;  ///< (rows), on the logits
  int32_t* seen;   ///< (rows)

  static int64_t count(int64_t rows, int64_t dim) { return rows * (dim + kBlockKeys + 2); }
  RowBuffers(int64_t rows, int64_t dim, float* memory) {
    logits = memory;
    queries = logits + rows * kBlockKeys;
    factors = queries + rows * dim;
    seen = reinterpret_cast<int32_t*>(factors + rows);
  }
};

class RowWalk {
 public:
  RowWalk(const TaskContext& context, const RowBuffers& buffers)
      : c_(context),
        w_(buffers),
        dim_(static_cast<int32_t>(context.state.dim)),
        run_keys_(context.mk.run_keys(context.keys.dtype)),
        runs_ahead_(
            context.mk.runs_ahead(static_cast<int64_t>(context.task.num_kv_heads()) * run_keys_ * context.p.head_dim *
                                  static_cast<int64_t>(element_size(context.keys.dtype)))) {}
  RowWalk(const RowWalk&) = delete;

  void run() {
    c_.state.clear(c_.rows.count());
    for (int32_t row = 0; row < c_.rows.count(); ++row) w_.factors[row] = c_.rows.logit_factor(row);
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
    for (int32_t row = 0; row < c_.rows.count(); ++row) {
      c_.mk.unpack_output_row(c_.state.row(row), c_.values.dtype, dim_);
    }
  }

 private:
  struct Runs {
    int32_t count = 0;
    RowRun run[kBlockKeys];
  };

  // The runs of the block that starts at key `begin`.
  void find_runs(int32_t begin, int32_t end, Runs& runs) const {
    runs.count = 0;
    c_.places.for_each_run(begin, std::min(kBlockKeys, end - begin), run_keys_,
                           [&](const RowRun& run) { runs.run[runs.count++] = run; });
  }

  void load_queries(Segment segment) {
    for (int32_t row = 0; row < c_.rows.count(); ++row) {
      float* const query = w_.queries + static_cast<int64_t>(row) * dim_;
      c_.rows.load(row, segment, dim_, query);
      c_.mk.pack_query_row(query, c_.keys.dtype, dim_);
    }
  }

  // Run i of `runs` of a cache, and where lies what is read runs_ahead_ later: a run of the same block, or of what is
  // read after it.
  RunRows rows_of(const Cache& cache, const Runs& runs, int32_t i, const Cache& cache_after,
                  const Runs& runs_after) const {
    const int32_t head = c_.task.kv_head_begin;
    const int32_t ahead = i + runs_ahead_;
    const void* next = nullptr;
    if (ahead < runs.count) {
      next = cache.rows(runs.run[ahead], head).data;
    } else if (runs_after.count > 0) {
      next = cache_after.rows(runs_after.run[std::min(ahead - runs.count, runs_after.count - 1)], head).data;
    }
    return cache.rows(runs.run[i], head, c_.task.kv_head_end, next);
  }

  void block(int32_t begin, int32_t n, bool masked) {
    for (int32_t i = 0; i < now_->count; ++i) {
      multiply_keys(now_->run[i], rows_of(c_.keys, *now_, i, c_.values, *now_));
    }
    for (int32_t row = 0; row < c_.rows.count(); ++row) w_.seen[row] = masked ? c_.rows.visible(row, begin, n) : n;
    c_.mk.softmax_rows(w_.logits, c_.state.softmax_rows(0, c_.rows.count(), w_.seen), 1.0f);
    const int32_t seen_by_all = *std::min_element(w_.seen, w_.seen + c_.rows.count());
    for (int32_t i = 0; i < now_->count; ++i) {
      const RowRun& run = now_->run[i];
      const RunRows values = rows_of(c_.values, *now_, i, c_.keys, *next_);
      c_.mk.scale_columns(logits(0) + run.offset, c_.rows.per_kv_head(), values);
      if (run.offset + run.count <= seen_by_all) {
        c_.mk.pv_rows(logits(0) + run.offset, c_.rows.per_kv_head(), values, dim_, c_.state.o);
      } else {
        weigh_seen_values(run, values);
      }
    }
  }

  void multiply_keys(const RowRun& run, const RunRows& keys) {
    float* const s = logits(0) + run.offset;
    c_.mk.qk_rows(w_.queries, w_.factors, c_.rows.per_kv_head(), keys, dim_, s);
    c_.mk.scale_columns(s, c_.rows.per_kv_head(), keys);
  }

  // Row by row, since a weight of 0 would not hide a NaN in a value that the row must not see.
  void weigh_seen_values(const RowRun& run, const RunRows& values) {
    for (int32_t row = 0; row < c_.rows.count(); ++row) {
      RunRows seen = values;
      seen.first = values.head(row / c_.rows.per_kv_head());
      seen.heads = 1;
      seen.count = std::clamp(w_.seen[row] - run.offset, 0, run.count);
      c_.mk.pv_rows(logits(row) + run.offset, 1, seen, dim_, c_.state.row(row));
    }
  }

  float* logits(int32_t row) const { return w_.logits + static_cast<int64_t>(row) * kBlockKeys; }

  const TaskContext& c_;
  const RowBuffers w_;
  const int32_t dim_;
  const int32_t run_keys_;
  const int32_t runs_ahead_;
  Runs runs_[2];
  Runs* now_ = runs_;       // of the block at hand
  Runs* next_ = runs_ + 1;  // of the one after it
};

}  // namespace dca::cpu
