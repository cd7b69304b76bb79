// Rows of K and V wherever they lie: uniform, ragged or in pages.
#pragma once

#include <algorithm>
#include <cstdint>

#include "dca/seqlen_info.h"
#include "micro_kernels.h"

namespace dca::cpu {

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

/// The keys or the values of one sequence and KV head, addressed by logical position.
class CacheRows {
 public:
  CacheRows(const AttentionParams& p, const ConstTensorRef& cache, const CacheScale& scale, const SeqlenInfo& info,
            int32_t b, int32_t head)
      : cache_(cache),
        scale_(scale),
        dtype_(dtype_of_cache(p)),
        leftpad_(info.leftpad),
        row_(info.k_row),
        b_(b),
        head_(head) {
    if (p.pages.page_table != nullptr) {
      pages_ = p.pages.page_table + b * p.pages.stride_batch;
      page_size_ = p.pages.page_size;
    }
    if (p.cu_seqlens_k != nullptr) b_ = 0;
  }

  /// Calls run(rows, offset, count) for each contiguous piece of the logical keys [begin, begin + n).
  template <class Run>
  void for_each_run(int32_t begin, int32_t n, Run&& run) const {
    const int64_t slot = static_cast<int64_t>(begin) + leftpad_;
    if (pages_ == nullptr) {
      run(rows_at(b_, row_ + slot), 0, n);
      return;
    }
    for (int32_t offset = 0; offset < n;) {
      const int64_t page = (slot + offset) / page_size_;
      const int32_t within = static_cast<int32_t>((slot + offset) % page_size_);
      const int32_t count = std::min(n - offset, page_size_ - within);
      run(rows_at(pages_[page], within), offset, count);
      offset += count;
    }
  }

  bool contiguous() const { return pages_ == nullptr; }
  /// Whether the rows come with scales.
  bool scaled() const { return dtype_ == DType::Int8; }

 private:
  HeadRows rows_at(int64_t batch, int64_t row) const {
    HeadRows rows = head_rows(cache_.data, dtype_, cache_.stride, batch, row, head_);
    if (scaled()) {
      const Strides& stride = scale_.stride;
      rows.scales = scale_.data + batch * stride.batch + row * stride.row + head_ * stride.head;
      rows.scale_stride = stride.row;
    }
    return rows;
  }

  ConstTensorRef cache_;
  CacheScale scale_;
  DType dtype_;
  int32_t leftpad_;
  int64_t row_;
  int64_t b_;
  int32_t head_;
  const int32_t* pages_ = nullptr;
  int32_t page_size_ = 0;
};

}  // namespace dca::cpu
