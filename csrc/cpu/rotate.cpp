// Key rotation, and rotation with the write into a cache: one memory-bound pass, parallel over rows.
#include <algorithm>
#include <vector>

#include "backends.h"
#include "cache_rows.h"
#include "micro_kernels.h"
#include "threading.h"

namespace dca::cpu {
namespace {

constexpr int64_t kRowsPerTask = 64;

// What rotate_keys and rotate_and_append_kv share: new rows of k behind what is cached.
template <class Params>
struct NewRows {
  const Params& p;

  int64_t row_begin(int32_t b) const {
    return p.cu_seqlens_k != nullptr ? p.cu_seqlens_k[b] : static_cast<int64_t>(b) * p.seqlen_k;
  }
  int64_t count(int32_t b) const {
    return p.cu_seqlens_k != nullptr ? p.cu_seqlens_k[b + 1] - p.cu_seqlens_k[b] : p.seqlen_k;
  }
  int64_t slot(int32_t b, int64_t r) const {
    return (p.cache_seqlens != nullptr ? p.cache_seqlens[b] : p.cache_seqlen) + r;
  }
  int64_t position(int32_t b, int64_t r) const {
    return slot(b, r) - (p.cache_leftpad != nullptr ? p.cache_leftpad[b] : 0);
  }
  // Row r of sequence b of a tensor laid out like k.
  const void* input(const ConstTensorRef& t, int32_t b, int64_t r, int32_t head) const {
    const bool ragged = p.cu_seqlens_k != nullptr;
    return head_rows(t.data, p.dtype, t.stride, ragged ? 0 : b, ragged ? p.cu_seqlens_k[b] + r : r, head).data;
  }

  // Row r of k, rotated, in fp32.
  void rotate(const MicroKernels& mk, int32_t b, int64_t r, int32_t head, float* row) const {
    mk.load_row(input(p.k, b, r, head), p.dtype, p.head_dim, row);
    const int64_t at = position(b, r);
    if (at >= 0) {
      const int64_t entry = static_cast<int64_t>(p.chunk.key_position(static_cast<int32_t>(at))) * p.rotary.half_dim;
      mk.rotate_row(row, p.rotary.cos + entry, p.rotary.sin + entry, p.rotary.half_dim, p.rotary.interleaved);
    }
  }
};

// Calls visit(b, r, scratch row) for every new row, in parallel; `scratch row` is head_dim floats.
template <class Params, class Visit>
void for_each_new_row(const Params& p, Visit&& visit) {
  const NewRows<Params> rows{p};
  const Threading& threading = threading_of(p.exec);
  std::vector<float> scratch(static_cast<size_t>(p.head_dim) * static_cast<size_t>(threading.num_threads));
  for (int32_t b = 0; b < p.batch; ++b) {
    const int64_t count = rows.count(b);
    const int64_t tasks = (count + kRowsPerTask - 1) / kRowsPerTask;
    parallel_tasks(threading, tasks, [&](int64_t task, int32_t worker) {
      float* row = scratch.data() + static_cast<int64_t>(worker) * p.head_dim;
      const int64_t end = std::min(count, (task + 1) * kRowsPerTask);
      for (int64_t r = task * kRowsPerTask; r < end; ++r) visit(b, r, row);
    });
  }
}

}  // namespace

Status rotate_keys(const RotateKeysParams& p) {
  const MicroKernels& mk = *micro_kernels();
  const NewRows<RotateKeysParams> rows{p};
  const ConstTensorRef out{p.out.data, p.out.stride};
  for_each_new_row(p, [&](int32_t b, int64_t r, float* scratch) {
    for (int32_t head = 0; head < p.num_heads_kv; ++head) {
      rows.rotate(mk, b, r, head, scratch);
      mk.store_row(scratch, p.dtype, p.head_dim, const_cast<void*>(rows.input(out, b, r, head)));
    }
  });
  return {};
}

namespace {

// Where the new rows go, and in what form.
class CacheWriter {
 public:
  CacheWriter(const AppendParams& p, const MicroKernels& mk) : p_(p), mk_(mk), dtype_(dtype_of_cache(p)) {}

  /// Writes `row` (head_dim), which it may change, into a slot of sequence b.
  void store_key(float* row, int32_t b, int64_t slot, int32_t head) const {
    store(row, p_.k_cache, p_.k_scale, p_.k_scale_out, place_of(b, slot), head);
  }

  /// The same for a value, from where it lies; `scratch` is head_dim floats.
  void store_value(const void* value, int32_t b, int64_t slot, int32_t head, float* scratch) const {
    const Place place = place_of(b, slot);
    if (dtype_ == p_.dtype) {  // copied as it is
      const size_t bytes = static_cast<size_t>(p_.head_dim) * element_size(dtype_);
      std::copy_n(static_cast<const char*>(value), bytes, static_cast<char*>(row_of(p_.v_cache, place, head)));
      return;
    }
    mk_.load_row(value, p_.dtype, p_.head_dim, scratch);
    store(scratch, p_.v_cache, p_.v_scale, p_.v_scale_out, place, head);
  }

 private:
  struct Place {
    int64_t batch;  // sequence or page
    int64_t row;    // slot in it
  };

  Place place_of(int32_t b, int64_t slot) const {
    const PageTable& pages = p_.pages;
    if (pages.page_table == nullptr) return {b, slot};
    return {pages.page_table[b * pages.stride_batch + slot / pages.page_size], slot % pages.page_size};
  }

  void* row_of(const TensorRef& cache, Place place, int32_t head) const {
    return const_cast<void*>(head_rows(cache.data, dtype_, cache.stride, place.batch, place.row, head).data);
  }

  void store(float* row, const TensorRef& cache, const CacheScale& scale, const CacheScaleRef& scale_out, Place place,
             int32_t head) const {
    void* const out = row_of(cache, place, head);
    if (dtype_ == DType::Int8) {
      const Strides& stride = scale_out.stride;
      scale_out.data[place.batch * stride.batch + place.row * stride.row + head * stride.head] =
          mk_.quantize_row(row, p_.head_dim, static_cast<int8_t*>(out));
      return;
    }
    if (dtype_ == DType::Float8E4M3) {
      const float divisor = scale.of(head);
      for (int32_t c = 0; c < p_.head_dim; ++c) row[c] /= divisor;
    }
    mk_.store_row(row, dtype_, p_.head_dim, out);
  }

  const AppendParams& p_;
  const MicroKernels& mk_;
  const DType dtype_;
};

}  // namespace

Status rotate_and_append_kv(const AppendParams& p) {
  const MicroKernels& mk = *micro_kernels();
  const NewRows<AppendParams> rows{p};
  const CacheWriter caches(p, mk);
  for_each_new_row(p, [&](int32_t b, int64_t r, float* scratch) {
    const int64_t slot = rows.slot(b, r);
    for (int32_t head = 0; head < p.num_heads_kv; ++head) {
      rows.rotate(mk, b, r, head, scratch);
      caches.store_key(scratch, b, slot, head);
      caches.store_value(rows.input(p.v, b, r, head), b, slot, head, scratch);
    }
  });
  return {};
}

}  // namespace dca::cpu
