// Tensor -> checks -> plain references. Everything that only a tensor knows (dtype, device, shape, strides) is checked
// here, by name; everything that the plain parameters can tell is left to the core.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <climits>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>

#include "dca/dca.h"

namespace dca::torch_ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

/// What this thread last refused. torch 2.15 no longer tells kinds of C++ exceptions apart, all become RuntimeError: so
/// Python asks whether one was a refusal, which is a ValueError there.
inline std::string& last_refusal() {
  thread_local std::string message;
  return message;
}

/// Arrives in Python as ValueError.
[[noreturn]] inline void refuse(const std::string& message) {
  last_refusal() = message;
  throw std::invalid_argument(message);
}

inline void check_status(const Status& status) {
  if (status.ok()) return;
  if (status.code() == StatusCode::InvalidArgument) refuse(status.message());
  throw std::runtime_error(status.message());
}

inline std::string shape_of(const Tensor& t) {
  std::string text = "(";
  for (int64_t d = 0; d < t.dim(); ++d) text += (d ? ", " : "") + std::to_string(t.size(d));
  return text + ")";
}

inline std::string dtype_name(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Float8_e4m3fn:
      return "float8_e4m3fn";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default:
      return "another dtype";
  }
}

inline DType dtype_of(const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::Float32;
    case ScalarType::BFloat16:
      return DType::BFloat16;
    case ScalarType::Half:
      return DType::Float16;
    default:
      refuse(std::string(name) + " must be float32, bfloat16 or float16; got " + dtype_name(t));
  }
}

/// Sizes and strides reach the kernels as int32 counts.
inline int32_t to_int32(const char* name, int64_t value) {
  if (value < INT32_MIN || value > INT32_MAX)
    refuse(std::string(name) + " must fit in 32 bits; got " + std::to_string(value));
  return static_cast<int32_t>(value);
}

inline void check_same_device(const char* name, const Tensor& t, const Tensor& q) {
  if (t.is_cpu() != q.is_cpu() || t.get_device_index() != q.get_device_index()) {
    refuse(std::string(name) + " must be on the device of the queries or keys; got another device");
  }
}

inline void check_shape(const char* name, const Tensor& t, std::initializer_list<int64_t> shape) {
  bool same = t.dim() == static_cast<int64_t>(shape.size());
  std::string wanted = "(";
  int64_t d = 0;
  for (const int64_t size : shape) {
    same = same && t.size(d) == size;
    wanted += (d++ ? ", " : "") + std::to_string(size);
  }
  if (!same) refuse(std::string(name) + " must have shape " + wanted + "); got " + shape_of(t));
}

inline void check_rows(const char* name, const Tensor& t, int64_t dims) {
  if (t.dim() != dims) {
    refuse(std::string(name) + " must have " + std::to_string(dims) + " dimensions; got shape " + shape_of(t));
  }
  if (t.size(dims - 1) > 1 && t.stride(dims - 1) != 1) {
    refuse(std::string(name) + " must be contiguous in its last dimension; got stride " +
           std::to_string(t.stride(dims - 1)));
  }
}

/// Like `q` in dtype and device, `dims` dimensions, the last of them contiguous.
inline void check_like(const char* name, const Tensor& t, const Tensor& q, int64_t dims) {
  check_same_device(name, t, q);
  if (t.scalar_type() != q.scalar_type()) {
    refuse(std::string(name) + " must have the dtype of the queries or keys, " + dtype_name(q) + "; got " +
           dtype_name(t));
  }
  check_rows(name, t, dims);
}

/// The same for a cache, which may hold float8_e4m3fn or int8 instead. Returns what it holds.
inline DType check_cache(const char* name, const Tensor& t, const Tensor& q, int64_t dims) {
  check_same_device(name, t, q);
  DType dtype = DType::Same;
  if (t.scalar_type() == ScalarType::Float8_e4m3fn) {
    dtype = DType::Float8E4M3;
  } else if (t.scalar_type() == ScalarType::Char) {
    dtype = DType::Int8;
  } else if (t.scalar_type() != q.scalar_type()) {
    refuse(std::string(name) + " must have the dtype of the queries or keys, " + dtype_name(q) +
           ", or float8_e4m3fn or int8; got " + dtype_name(t));
  }
  check_rows(name, t, dims);
  return dtype;
}

inline void check_same_cache_dtype(const char* name, const Tensor& t, const Tensor& k) {
  if (t.scalar_type() != k.scalar_type()) {
    refuse(std::string(name) + " must have the dtype of k_cache, " + dtype_name(k) + "; got " + dtype_name(t));
  }
}

/// (batch, seqlen, heads, head_dim), or (total, heads, head_dim) without a batch stride. What a view calls the stride
/// of a dimension of one entry means nothing, and need not be what the kernels ask of strides.
inline Strides strides_of(const Tensor& t) {
  const auto stride = [&](int64_t d) { return t.size(d) > 1 ? t.stride(d) : 0; };
  if (t.dim() == 3) return {0, stride(0), stride(1)};
  return {stride(0), stride(1), stride(2)};
}

inline ConstTensorRef const_ref(const Tensor& t) { return {t.const_data_ptr(), strides_of(t)}; }
inline TensorRef ref(const Tensor& t) { return {t.mutable_data_ptr(), strides_of(t)}; }

/// No two elements of tensors that are written may lie in one place: not of an expanded one, nor of one given twice.
inline void check_written_once(const char* first_name, const Tensor& first, const char* second_name,
                               const Tensor& second) {
  for (const auto& [name, t] : {std::pair<const char*, const Tensor&>{first_name, first}, {second_name, second}}) {
    for (int64_t d = 0; d < t.dim(); ++d) {
      if (t.size(d) > 1 && t.stride(d) == 0) {
        refuse(std::string(name) + " is written, so its elements must not share memory; got an expanded tensor, with " +
               "a stride of 0 in dimension " + std::to_string(d));
      }
    }
  }
  if (first.numel() > 0 && first.const_data_ptr() == second.const_data_ptr()) {
    refuse(std::string(first_name) + " and " + second_name + " are written, so they must not be the same memory");
  }
}

/// int32 (size) on q's device, contiguous; nullptr if absent.
inline const int32_t* int32_vector(const char* name, const OptionalTensor& t, const Tensor& q, int64_t size) {
  if (!t.has_value()) return nullptr;
  check_same_device(name, *t, q);
  if (t->scalar_type() != ScalarType::Int) refuse(std::string(name) + " must be int32; got " + dtype_name(*t));
  check_shape(name, *t, {size});
  if (!t->is_contiguous()) refuse(std::string(name) + " must be contiguous");
  return static_cast<const int32_t*>(t->const_data_ptr());
}

inline const float* float_vector(const char* name, const OptionalTensor& t, const Tensor& q, int64_t size) {
  if (!t.has_value()) return nullptr;
  check_same_device(name, *t, q);
  if (t->scalar_type() != ScalarType::Float) refuse(std::string(name) + " must be float32; got " + dtype_name(*t));
  check_shape(name, *t, {size});
  if (!t->is_contiguous()) refuse(std::string(name) + " must be contiguous");
  return static_cast<const float*>(t->const_data_ptr());
}

inline void check_scale_tensor(const char* name, const Tensor& t, const Tensor& q) {
  check_same_device(name, t, q);
  if (t.scalar_type() != ScalarType::Float) refuse(std::string(name) + " must be float32; got " + dtype_name(t));
}

/// Strides of the scales of an int8 cache: float32, shaped like the cache without head_dim.
inline Strides row_scale_strides(const char* name, const OptionalTensor& t, const Tensor& cache) {
  const std::string what = std::string(name) + " of an int8 cache must be a float32 tensor";
  if (!t.has_value()) refuse(what + " with a scale for each slot and KV head; got none");
  check_scale_tensor(name, *t, cache);
  bool same = t->dim() == cache.dim() - 1;
  std::string wanted;
  for (int64_t d = 0; d < cache.dim() - 1; ++d) {
    same = same && t->size(d) == cache.size(d);
    wanted += (d > 0 ? ", " : " (") + std::to_string(cache.size(d));
  }
  if (!same) refuse(what + wanted + "), a scale for each slot and KV head; got " + shape_of(*t));
  if (t->dim() == 2) return {0, t->stride(0), t->stride(1)};
  return {t->stride(0), t->stride(1), t->stride(2)};
}

/// Scales that are read: of a cache of float8_e4m3fn float32 (num_heads_kv), or one for all heads, (1) or (), and
/// `value` if absent; of one of int8 shaped like the cache without head_dim.
inline CacheScale cache_scale(const char* name, const OptionalTensor& t, double value, const Tensor& cache,
                              DType cache_dtype, int64_t num_heads_kv) {
  CacheScale scale;
  scale.value = static_cast<float>(value);
  if (cache_dtype == DType::Int8) {
    scale.stride = row_scale_strides(name, t, cache);
    scale.data = static_cast<const float*>(t->const_data_ptr());
    return scale;
  }
  if (!t.has_value()) return scale;
  check_scale_tensor(name, *t, cache);
  const bool one = t->dim() == 0 || (t->dim() == 1 && t->size(0) == 1);
  if (!one && (t->dim() != 1 || t->size(0) != num_heads_kv)) {
    refuse(std::string(name) + " must have shape (), (1) or (num_heads_kv) = (" + std::to_string(num_heads_kv) +
           "); got " + shape_of(*t));
  }
  if (!one && !t->is_contiguous()) refuse(std::string(name) + " must be contiguous");
  scale.data = static_cast<const float*>(t->const_data_ptr());
  scale.stride.head = one ? 0 : 1;
  return scale;
}

/// Scales that an append to an int8 cache writes; nothing for other caches.
inline CacheScaleRef cache_scale_ref(const char* name, const OptionalTensor& t, const Tensor& cache,
                                     DType cache_dtype) {
  if (cache_dtype != DType::Int8) {
    if (t.has_value()) refuse(std::string(name) + " must be None unless the caches are int8; got a tensor");
    return {};
  }
  const Strides stride = row_scale_strides(name, t, cache);
  return {static_cast<float*>(t->mutable_data_ptr()), stride};
}

inline RotaryTables rotary_tables(const Tensor& cos, const Tensor& sin, const Tensor& q, bool interleaved) {
  for (const auto& [name, t] : {std::pair<const char*, const Tensor&>{"rotary_cos", cos}, {"rotary_sin", sin}}) {
    check_same_device(name, t, q);
    if (t.scalar_type() != ScalarType::Float) refuse(std::string(name) + " must be float32; got " + dtype_name(t));
    if (t.dim() != 2) {
      refuse(std::string(name) + " must have shape (at least max_position + 1, rotary_dim / 2); got " + shape_of(t));
    }
    if (!t.is_contiguous()) refuse(std::string(name) + " must be contiguous");
  }
  check_shape("rotary_sin", sin, {cos.size(0), cos.size(1)});
  return {static_cast<const float*>(cos.const_data_ptr()), static_cast<const float*>(sin.const_data_ptr()), cos.size(0),
          to_int32("the width of rotary_cos", cos.size(1)), interleaved};
}

/// The page table of a cache (num_pages, page_size, heads, head_dim); not paged if absent.
inline PageTable page_table(const OptionalTensor& t, const Tensor& cache, const Tensor& q, int64_t batch) {
  if (!t.has_value()) return {};
  check_same_device("page_table", *t, q);
  if (t->scalar_type() != ScalarType::Int) refuse("page_table must be int32; got " + dtype_name(*t));
  if (t->dim() != 2 || t->size(0) != batch) {
    refuse("page_table must have shape (" + std::to_string(batch) + ", max_pages); got " + shape_of(*t));
  }
  if (t->size(1) > 1 && t->stride(1) != 1) refuse("page_table must be contiguous in its last dimension");
  PageTable pages;
  pages.page_table = static_cast<const int32_t*>(t->const_data_ptr());
  pages.stride_batch = t->stride(0);
  pages.max_pages = to_int32("max_pages", t->size(1));
  pages.page_size = to_int32("page_size", cache.size(1));
  pages.num_pages = cache.size(0);
  return pages;
}

inline ChunkGeometry chunk_geometry(int64_t chunk_len, int64_t max_position) {
  return {to_int32("chunk_len", chunk_len), to_int32("max_position", max_position)};
}

}  // namespace dca::torch_ops
