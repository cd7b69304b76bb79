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

Status rotate_and_append_kv(const AppendParams& p) {
  const MicroKernels& mk = *micro_kernels();
  const NewRows<AppendParams> rows{p};
  const DType cache_dtype = dtype_of_cache(p);
  const size_t row_bytes = static_cast<size_t>(p.head_dim) * element_size(cache_dtype);
  const auto cache_row = [&](const TensorRef& cache, int32_t b, int64_t slot, int32_t head) {
    int64_t batch = b;
    if (p.pages.page_table != nullptr) {
      batch = p.pages.page_table[b * p.pages.stride_batch + slot / p.pages.page_size];
      slot %= p.pages.page_size;
    }
    return const_cast<void*>(head_rows(cache.data, cache_dtype, cache.stride, batch, slot, head).data);
  };
  const auto store = [&](float* row, float scale, void* out) {
    if (cache_dtype == DType::Float8E4M3) {
      for (int32_t c = 0; c < p.head_dim; ++c) row[c] /= scale;
    }
    mk.store_row(row, cache_dtype, p.head_dim, out);
  };
  for_each_new_row(p, [&](int32_t b, int64_t r, float* scratch) {
    const int64_t slot = rows.slot(b, r);
    for (int32_t head = 0; head < p.num_heads_kv; ++head) {
      rows.rotate(mk, b, r, head, scratch);
      store(scratch, p.k_scale.of(head), cache_row(p.k_cache, b, slot, head));
      const void* value = rows.input(p.v, b, r, head);
      void* const to = cache_row(p.v_cache, b, slot, head);
      if (cache_dtype == p.dtype) {  // copied as it is
        std::copy_n(static_cast<const char*>(value), row_bytes, static_cast<char*>(to));
      } else {
        mk.load_row(value, p.dtype, p.head_dim, scratch);
        store(scratch, p.v_scale.of(head), to);
      }
    }
  });
  return {};
}

}  // namespace dca::cpu
