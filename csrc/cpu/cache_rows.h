// Rows of K and V wherever they lie: uniform, ragged or in pages.
#pragma once

#include <algorithm>
#include <cstdint>

#include "dca/seqlen_info.h"
#include "micro_kernels.h"

namespace dca::cpu {

/// Ask for memory that is wanted soon. (gcc drops calls of functions that do nothing else; an empty statement is
/// something.)
inline void ask_to_read(const void* data, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(data) + i);
  asm volatile("");
}
inline void ask_to_write(void* data, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<char*>(data) + i, 1);
  asm volatile("");
}

inline HeadRows head_rows(const void* data, DType dtype, Strides stride, int64_t batch, int64_t row, int32_t head) {
  const int64_t offset = batch * stride.batch + row * stride.row + head * stride.head;
  HeadRows rows;
  rows.data = static_cast<const char*>(data) + offset * static_cast<int64_t>(element_size(dtype));
  rows.stride = stride.row;
  rows.dtype = dtype;
  return rows;
}

/// The factor that all rows of a head have in common. Those of an Int8 cache have theirs each: HeadRows::scales.
inline float head_scale(const AttentionParams& p, const CacheScale& scale, int32_t head) {
  return dtype_of_cache(p) == DType::Int8 ? 1.0f : scale.of(head);
}

/// `count` neighbouring rows of a cache that hold the keys or the values from `offset` on of some block.
struct RowRun {
  int64_t batch;  ///< or the page
  int64_t row;
  int32_t offset;
  int32_t count;
};

/// The K or the V of a call.
struct Cache {
  ConstTensorRef tensor;
  CacheScale scale;
  DType dtype;

  static Cache keys(const AttentionParams& p) { return {p.k, p.k_scale, dtype_of_cache(p)}; }
  static Cache values(const AttentionParams& p) { return {p.v, p.v_scale, dtype_of_cache(p)}; }

  HeadRows rows(const RowRun& run, int32_t head) const {
    HeadRows rows = head_rows(tensor.data, dtype, tensor.stride, run.batch, run.row, head);
    if (dtype == DType::Int8) {
      rows.scales = scale.data + run.batch * scale.stride.batch + run.row * scale.stride.row + head * scale.stride.head;
      rows.scale_stride = scale.stride.row;
    }
    return rows;
  }

  /// Those of the heads [head_begin, head_end); `next` lies where the first of them has what is wanted soon.
  RunRows rows(const RowRun& run, int32_t head_begin, int32_t head_end, const void* next) const {
    RunRows rows;
    rows.first = this->rows(run, head_begin);
    rows.head_stride = tensor.stride.head;
    rows.head_scale_stride = scale.stride.head;
    rows.heads = head_end - head_begin;
    rows.count = run.count;
    rows.next = next;
    return rows;
  }
};

/// Where the logical keys of one sequence lie, in K and in V alike.
class CacheRows {
 public:
  CacheRows(const AttentionParams& p, const SeqlenInfo& info, int32_t b)
      : first_row_(info.k_row + info.leftpad), b_(p.cu_seqlens_k != nullptr ? 0 : b) {
    if (p.pages.page_table != nullptr) {
      pages_ = p.pages.page_table + b * p.pages.stride_batch;
      page_size_ = p.pages.page_size;
    }
  }

  /// Calls visit(run) for the logical keys [begin, begin + n), in order, in runs of at most max_count.
  template <class Visit>
  void for_each_run(int32_t begin, int32_t n, int32_t max_count, Visit&& visit) const {
    for (int32_t offset = 0; offset < n;) {
      RowRun run{b_, first_row_ + begin + offset, offset, std::min(n - offset, max_count)};
      if (pages_ != nullptr) {
        const int32_t within = static_cast<int32_t>(run.row % page_size_);
        run.batch = pages_[run.row / page_size_];
        run.row = within;
        run.count = std::min(run.count, page_size_ - within);
      }
      visit(run);
      offset += run.count;
    }
  }

 private:
  int64_t first_row_;
  int64_t b_;
  const int32_t* pages_ = nullptr;
  int32_t page_size_ = 0;
};

}  // namespace dca::cpu
