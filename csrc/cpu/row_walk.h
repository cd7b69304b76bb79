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
  RowWalk(const AttentionParams& p, const MicroKernels& mk, const SeqlenInfo& info, const Task& task,
          const QueryRows& rows, const RowBuffers& buffers, const RunningRows& state)
      : p_(p),
        mk_(mk),
        task_(task),
        cache_(p, info, task.b),
        rows_(rows),
        w_(buffers),
        state_(state),
        dim_(static_cast<int32_t>(state.dim)) {}
  RowWalk(const RowWalk&) = delete;

  void run() {
    state_.clear(rows_.count());
    for (SegmentIterator it(p_.chunk, task_.q_begin, task_.q_end, p_.segments, task_.window); !it.done(); it.next()) {
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
    cache_.for_each_run(begin, std::min(kBlockKeys, end - begin), kRunKeys,
                        [&](const RowRun& run) { runs.run[runs.count++] = run; });
  }

  void load_queries(Segment segment) {
    for (int32_t row = 0; row < rows_.count(); ++row) {
      float* const query = w_.queries + static_cast<int64_t>(row) * dim_;
      rows_.load(row, segment, dim_, query);
      const float factor = rows_.logit_factor(row);
      for (int32_t c = 0; c < dim_; ++c) query[c] *= factor;
    }
  }

  HeadRows rows_of(const ConstTensorRef& tensor, const RowRun& run, int32_t head) const {
    return head_rows(tensor.data, dtype_of_cache(p_), tensor.stride, run.batch, run.row, task_.kv_head_begin + head);
  }

  // Where run i of `runs` lies, or what is read after the last of them.
  const void* ahead(const ConstTensorRef& tensor, const Runs& runs, int32_t i, const ConstTensorRef& after,
                    const Runs& runs_after, int32_t head) const {
    if (i < runs.count) return rows_of(tensor, runs.run[i], head).data;
    i = std::min(i - runs.count, runs_after.count - 1);
    return i < 0 ? nullptr : rows_of(after, runs_after.run[i], head).data;
  }

  void block(int32_t begin, int32_t n, bool masked) {
    const int32_t per_head = rows_.per_kv_head();
    for (int32_t i = 0; i < now_->count; ++i) {
      const RowRun& run = now_->run[i];
      for (int32_t head = 0; head < task_.num_kv_heads(); ++head) {
        const void* const next = ahead(p_.k, *now_, i + kRunsAhead, p_.v, *now_, head);
        mk_.qk_rows(w_.queries + static_cast<int64_t>(head) * per_head * dim_, dim_, per_head, rows_of(p_.k, run, head),
                    next, run.count, dim_, logits(head * per_head) + run.offset, kBlockKeys);
      }
    }
    for (int32_t row = 0; row < rows_.count(); ++row) w_.seen[row] = rows_.visible(row, begin, n, masked);
    mk_.softmax_rows(w_.logits, kBlockKeys, rows_.count(), w_.seen, state_.row_max, state_.row_sum, state_.o,
                     state_.dim, dim_);
    for (int32_t i = 0; i < now_->count; ++i) {
      for (int32_t head = 0; head < task_.num_kv_heads(); ++head) {
        weigh_values(now_->run[i], ahead(p_.v, *now_, i + kRunsAhead, p_.k, *next_, head), head);
      }
    }
  }

  // O += weights * values of one run for the rows of one KV head. The values that all rows see go together and the rest
  // row by row, since a weight of 0 does not hide a NaN in a value that the row must not see.
  void weigh_values(const RowRun& run, const void* next, int32_t head) {
    const HeadRows values = rows_of(p_.v, run, head);
    const int32_t per_head = rows_.per_kv_head();
    const int32_t first = head * per_head;
    const auto seen = [&](int32_t r) { return std::clamp(w_.seen[first + r] - run.offset, 0, run.count); };
    int32_t common = run.count;
    for (int32_t r = 0; r < per_head; ++r) common = std::min(common, seen(r));
    mk_.pv_rows(logits(first) + run.offset, kBlockKeys, per_head, values, next, common, dim_, state_.row(first), dim_);
    for (int32_t r = 0; r < per_head; ++r) {
      if (seen(r) == common) continue;
      mk_.pv_rows(logits(first + r) + run.offset + common, kBlockKeys, 1, values.from(common), next, seen(r) - common,
                  dim_, state_.row(first + r), dim_);
    }
  }

  float* logits(int32_t row) const { return w_.logits + static_cast<int64_t>(row) * kBlockKeys; }

  const AttentionParams& p_;
  const MicroKernels& mk_;
  const Task& task_;
  const CacheRows cache_;
  const QueryRows& rows_;
  const RowBuffers w_;
  const RunningRows state_;
  const int32_t dim_;
  Runs runs_[2];
  Runs* now_ = runs_;       // of the block at hand
  Runs* next_ = runs_ + 1;  // of the one after it
};

}  // namespace dca::cpu
