#include "checks.h"

#include <cfloat>
#include <string>

namespace dca {
namespace {

template <class... Parts>
Status refuse(const Parts&... parts) {
  std::string message;
  const auto append = [&](const auto& part) {
    if constexpr (std::is_convertible_v<decltype(part), std::string>) {
      message += part;
    } else {
      message += std::to_string(part);
    }
  };
  (append(parts), ...);
  return {StatusCode::InvalidArgument, message};
}

#define DCA_REFUSE_IF(condition, ...) \
  if (condition) return refuse(__VA_ARGS__)
#define DCA_RETURN_IF_REFUSED(expression) \
  if (Status status = (expression); !status.ok()) return status

// --- Sizes and pointers ---

Status check_heads(int32_t num_heads, int32_t num_heads_kv, int32_t head_dim) {
  DCA_REFUSE_IF(num_heads_kv < 1, "num_heads_kv must be at least 1; got ", num_heads_kv);
  DCA_REFUSE_IF(num_heads < 1 || num_heads % num_heads_kv != 0,
                "num_heads must be a positive multiple of num_heads_kv (", num_heads_kv, "); got ", num_heads);
  DCA_REFUSE_IF(head_dim < 1 || head_dim > 1024, "head_dim must be between 1 and 1024; got ", head_dim);
  return {};
}

Status check_chunk(ChunkGeometry chunk) {
  DCA_REFUSE_IF(!chunk.valid(),
                "chunk_len and max_position must satisfy 1 <= chunk_len <= max_position <= 2 * chunk_len "
                "- 1; got chunk_len=",
                chunk.chunk_len, ", max_position=", chunk.max_position);
  return {};
}

Status check_rotary(const RotaryTables& rotary, ChunkGeometry chunk, int32_t head_dim) {
  DCA_REFUSE_IF(rotary.half_dim != 0 && (rotary.cos == nullptr || rotary.sin == nullptr),
                "rotary_cos and rotary_sin must not be null");
  DCA_REFUSE_IF(rotary.num_positions <= chunk.max_position,
                "rotary_cos and rotary_sin must have at least max_position + 1 "
                "= ",
                static_cast<int64_t>(chunk.max_position) + 1, " rows; got ", rotary.num_positions);
  DCA_REFUSE_IF(rotary.half_dim < 0 || 2 * static_cast<int64_t>(rotary.half_dim) > head_dim,
                "rotary_dim = 2 * the width of rotary_cos must be at most head_dim (", head_dim, "); got ",
                2 * static_cast<int64_t>(rotary.half_dim));
  return {};
}

Status check_dtype(DType dtype) {
  DCA_REFUSE_IF(dtype != DType::Float32 && dtype != DType::BFloat16 && dtype != DType::Float16,
                "dtype must be Float32, BFloat16 or Float16; got ", static_cast<int32_t>(dtype));
  return {};
}

Status check_scale(const char* name, float scale) {
  // Written so that NaN is refused as well.
  DCA_REFUSE_IF(!(scale > 0.0f && scale <= FLT_MAX), name, " must be finite and above 0; got ", scale);
  return {};
}

// Scales that are read.
Status check_cache_scale(const char* name, const CacheScale& scale, DType cache_dtype) {
  if (cache_dtype == DType::Int8) {  // its scales are whatever an append wrote
    DCA_REFUSE_IF(scale.value != 1.0f, name, " of an Int8 cache must be one for each slot and head, in data; got ",
                  scale.value, " for all");
    return {};
  }
  DCA_REFUSE_IF(cache_dtype != DType::Float8E4M3 && (scale.data != nullptr || scale.value != 1.0f), name,
                " must be left out for a cache that is neither Float8E4M3 nor Int8; got one");
  const Strides& stride = scale.stride;
  DCA_REFUSE_IF(stride.head != 0 && stride.head != 1, name,
                " of a Float8E4M3 cache must have a stride.head of 0 (one scale for all heads) or 1; got ",
                stride.head);
  DCA_REFUSE_IF(stride.batch != 0 || stride.row != 0, name,
                " of a Float8E4M3 cache must have a stride.batch and a stride.row of 0; got ", stride.batch, " and ",
                stride.row);
  return check_scale(name, scale.value);
}

// Scales that an append writes: of an Int8 cache, which has none to read.
Status check_written_scale(const std::string& name, const CacheScale& scale, const CacheScaleRef& written,
                           DType cache_dtype) {
  const bool is_written = cache_dtype == DType::Int8;
  DCA_REFUSE_IF(is_written && scale.data != nullptr, name, " must be left out for an append to an Int8 cache, which ",
                "writes its scales to ", name, "_out; got one");
  DCA_REFUSE_IF(!is_written && written.data != nullptr, name,
                "_out must be left out for a cache that is not Int8; got one");
  return {};
}

// The scales of a Float8E4M3 cache on the CPU, or copied from the device.
Status check_scale_values(const char* name, const CacheScale& scale, int32_t num_heads_kv) {
  if (scale.data == nullptr) return {};
  for (int32_t head = 0; head < (scale.stride.head == 0 ? 1 : num_heads_kv); ++head) {
    DCA_RETURN_IF_REFUSED(check_scale(name, scale.of(head)));
  }
  return {};
}

template <class Params>
Status check_cache_format(const Params& p) {
  const DType dtype = dtype_of_cache(p);
  DCA_REFUSE_IF(dtype != p.dtype && dtype != DType::Float8E4M3 && dtype != DType::Int8,
                "cache_dtype must be Same, Float8E4M3 or Int8; got ", static_cast<int32_t>(p.cache_dtype));
  DCA_REFUSE_IF(dtype == DType::Int8 && p.exec.device == Device::Cuda,
                "an int8 cache is for the CPU only: on CUDA cache_dtype must be Same or Float8E4M3; got Int8");
  DCA_RETURN_IF_REFUSED(check_cache_scale("k_scale", p.k_scale, dtype));
  return check_cache_scale("v_scale", p.v_scale, dtype);
}

template <class Params>
Status check_scale_values(const Params& p) {
  if (dtype_of_cache(p) == DType::Int8) return {};  // those of unused slots may be anything, NaN of a used one is seen
  DCA_RETURN_IF_REFUSED(check_scale_values("k_scale", p.k_scale, p.num_heads_kv));
  return check_scale_values("v_scale", p.v_scale, p.num_heads_kv);
}

Status check_pages(const PageTable& pages, Device device, int64_t slots) {
  if (pages.page_table == nullptr) return {};
  DCA_REFUSE_IF(pages.page_size < 1, "page_size must be at least 1; got ", pages.page_size);
  DCA_REFUSE_IF(device == Device::Cuda && pages.page_size % 16 != 0, "page_size must be a multiple of 16 on CUDA; got ",
                pages.page_size);
  DCA_REFUSE_IF(pages.max_pages < 0 || pages.num_pages < 0,
                "max_pages and num_pages must not be negative; got max_pages=", pages.max_pages,
                ", num_pages=", pages.num_pages);
  DCA_REFUSE_IF(static_cast<int64_t>(pages.max_pages) * pages.page_size != slots,
                "a paged cache must have max_pages * page_size slots per sequence (",
                static_cast<int64_t>(pages.max_pages) * pages.page_size, "); got ", slots);
  return {};
}

Status check_not_null(const char* name, const void* pointer) {
  DCA_REFUSE_IF(pointer == nullptr, name, " must not be null");
  return {};
}

Status check_threading(const Threading* threading) {
  if (threading == nullptr) return {};
  DCA_REFUSE_IF(threading->num_threads < 1, "exec.threading must have num_threads of at least 1; got ",
                threading->num_threads);
  DCA_REFUSE_IF(threading->run == nullptr, "exec.threading must have a function run; it was null");
  return {};
}

template <class Params>
Status check_common(const Params& p) {
  DCA_RETURN_IF_REFUSED(check_threading(p.exec.threading));
  DCA_RETURN_IF_REFUSED(check_dtype(p.dtype));
  DCA_RETURN_IF_REFUSED(check_chunk(p.chunk));
  DCA_RETURN_IF_REFUSED(check_rotary(p.rotary, p.chunk, p.head_dim));
  DCA_REFUSE_IF(p.batch < 0, "batch must not be negative; got ", p.batch);
  return {};
}

// --- What the CUDA kernels ask for: 16 bytes at a time ---

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

Status check_vectors(const char* name, const void* data, const Strides& stride, DType dtype) {
  const int64_t vector = static_cast<int64_t>(16 / element_size(dtype));
  DCA_REFUSE_IF(!aligned(data), name, " must be aligned to 16 bytes on CUDA");
  for (const int64_t s : {stride.batch, stride.row, stride.head}) {
    DCA_REFUSE_IF(s % vector != 0, "the strides of ", name, " must be multiples of ", vector,
                  " elements (16 bytes) on CUDA; got ", s);
  }
  return {};
}

Status check_head_dim_vectors(int32_t head_dim, DType dtype) {
  const int32_t vector = static_cast<int32_t>(16 / element_size(dtype));
  DCA_REFUSE_IF(head_dim % vector != 0, "head_dim must be a multiple of ", vector, " on CUDA; got ", head_dim);
  return {};
}

// 16 bytes of the cache are more elements than 16 bytes of what it is read or written with.
template <class Params>
Status check_cache_vectors(const Params& p) {
  if (dtype_of_cache(p) != DType::Float8E4M3) return {};
  DCA_REFUSE_IF(p.head_dim % 16 != 0, "head_dim must be a multiple of 16 for a Float8E4M3 cache on CUDA; got ",
                p.head_dim);
  return {};
}

Status check_rotary_vectors(const RotaryTables& rotary, DType dtype) {
  // Where halves pair whole vectors, the tables are read four floats at a time.
  const bool paired = !rotary.interleaved && rotary.half_dim % static_cast<int32_t>(16 / element_size(dtype)) == 0;
  DCA_REFUSE_IF(paired && (!aligned(rotary.cos) || !aligned(rotary.sin)),
                "rotary_cos and rotary_sin must be aligned to 16 bytes on CUDA");
  return {};
}

Status check_cuda_shape(const AttentionParams& p) {
  constexpr int32_t kLargestHeadDim = 256;
  DCA_REFUSE_IF(p.dtype == DType::Float32, "dtype must be BFloat16 or Float16 for attention on CUDA; got Float32");
  DCA_REFUSE_IF(p.head_dim > kLargestHeadDim, "head_dim must be at most ", kLargestHeadDim, " on CUDA; got ",
                p.head_dim);
  DCA_RETURN_IF_REFUSED(check_head_dim_vectors(p.head_dim, p.dtype));
  return check_cache_vectors(p);
}

// --- Values, where the host may read them ---

Status check_cu_seqlens(const char* name, const int32_t* cu_seqlens, int32_t batch, int64_t total, int32_t max_seqlen) {
  if (cu_seqlens == nullptr) return {};
  DCA_REFUSE_IF(cu_seqlens[0] != 0, name, " must start at 0; got ", cu_seqlens[0]);
  for (int32_t b = 0; b < batch; ++b) {
    const int64_t length = static_cast<int64_t>(cu_seqlens[b + 1]) - cu_seqlens[b];
    DCA_REFUSE_IF(length < 0, name, " must not decrease; entry ", b + 1, " is ", cu_seqlens[b + 1], " after ",
                  cu_seqlens[b]);
    DCA_REFUSE_IF(length > max_seqlen, "the maximal sequence length of ", name,
                  " must be at least that of every sequence; "
                  "got ",
                  max_seqlen, ", and sequence ", b, " has ", length, " rows");
  }
  DCA_REFUSE_IF(cu_seqlens[batch] != total, name, " must end at the number of rows (", total, "); got ",
                cu_seqlens[batch]);
  return {};
}

// Of one sequence, or of all: `used` slots after the call.
Status check_capacity(const std::string& sequence, int64_t before, int64_t used, int64_t capacity) {
  DCA_REFUSE_IF(before < 0, "cache_seqlens must not be negative; got ", before, " for ", sequence);
  DCA_REFUSE_IF(used > capacity, "cache_seqlens must fit in the cache: ", sequence, " needs ", used,
                " slots, and it has ", capacity);
  return {};
}

// One length for all sequences, which the host knows on every device. `new_rows` of each come to it.
template <class Params>
Status check_common_length(const Params& p, int64_t new_rows, int64_t capacity) {
  if (p.batch == 0 || p.cache_seqlens != nullptr) return {};
  return check_capacity("each sequence", p.cache_seqlen, p.cache_seqlen + new_rows, capacity);
}

// `used` slots of sequence b, after the call.
template <class Params>
Status check_slots(const Params& p, int32_t b, int64_t before, int64_t used, int64_t capacity) {
  DCA_RETURN_IF_REFUSED(check_capacity("sequence " + std::to_string(b), before, used, capacity));
  if (p.cache_leftpad != nullptr) {
    const int32_t leftpad = p.cache_leftpad[b];
    DCA_REFUSE_IF(leftpad < 0 || leftpad > used, "cache_leftpad must be between 0 and the slots in use (", used,
                  "); got ", leftpad, " for sequence ", b);
  }
  return {};
}

Status check_page_ids(const PageTable& pages, int32_t b, int64_t first_slot, int64_t end_slot) {
  if (pages.page_table == nullptr || end_slot <= first_slot) return {};
  const int32_t* row = pages.page_table + b * pages.stride_batch;
  for (int64_t i = first_slot / pages.page_size; i <= (end_slot - 1) / pages.page_size; ++i) {
    DCA_REFUSE_IF(row[i] < 0 || row[i] >= pages.num_pages,
                  "page_table entries in use must be between 0 and num_pages - 1 "
                  "(",
                  pages.num_pages - 1, "); got ", row[i], " at sequence ", b, ", page ", i);
  }
  return {};
}

int64_t rows_of(const int32_t* cu_seqlens, int32_t b, int32_t seqlen) {
  return cu_seqlens != nullptr ? cu_seqlens[b + 1] - cu_seqlens[b] : seqlen;
}

Status check_values(const AttentionParams& p) {
  DCA_RETURN_IF_REFUSED(check_scale_values(p));
  DCA_RETURN_IF_REFUSED(check_cu_seqlens("cu_seqlens_q", p.cu_seqlens_q, p.batch, p.total_q, p.seqlen_q));
  DCA_RETURN_IF_REFUSED(check_cu_seqlens("cu_seqlens_k", p.cu_seqlens_k, p.batch, p.total_k, p.seqlen_k));
  for (int32_t b = 0; b < p.batch; ++b) {
    if (p.cu_seqlens_k != nullptr) {  // the lengths are those of cu_seqlens_k
      const int64_t rows = rows_of(p.cu_seqlens_k, b, p.seqlen_k);
      DCA_RETURN_IF_REFUSED(check_slots(p, b, rows, rows, rows));
      continue;
    }
    const int64_t before = p.cache_seqlens != nullptr ? p.cache_seqlens[b] : p.cache_seqlen;
    const int64_t used = before + (p.cache_seqlens_before_append ? rows_of(p.cu_seqlens_q, b, p.seqlen_q) : 0);
    DCA_RETURN_IF_REFUSED(check_slots(p, b, before, used, p.seqlen_k));
    const int64_t leftpad = p.cache_leftpad != nullptr ? p.cache_leftpad[b] : 0;
    DCA_RETURN_IF_REFUSED(check_page_ids(p.pages, b, leftpad, used));
  }
  return {};
}

// New rows of each sequence, where they are as many of all.
template <class Params>
int64_t uniform_new_rows(const Params& p) {
  return p.cu_seqlens_k != nullptr ? 0 : p.seqlen_k;
}

template <class Params>
Status check_new_rows(const Params& p, int64_t capacity) {
  DCA_RETURN_IF_REFUSED(check_cu_seqlens("cu_seqlens", p.cu_seqlens_k, p.batch, p.total_k, p.seqlen_k));
  for (int32_t b = 0; b < p.batch; ++b) {
    const int64_t before = p.cache_seqlens != nullptr ? p.cache_seqlens[b] : p.cache_seqlen;
    const int64_t used = before + rows_of(p.cu_seqlens_k, b, p.seqlen_k);
    DCA_RETURN_IF_REFUSED(check_slots(p, b, before, used, capacity));
  }
  return {};
}

Status check_values(const RotateKeysParams& p) { return check_new_rows(p, INT32_MAX); }

Status check_values(const AppendParams& p) {
  DCA_RETURN_IF_REFUSED(check_scale_values(p));
  DCA_RETURN_IF_REFUSED(check_new_rows(p, p.cache_slots));
  for (int32_t b = 0; b < p.batch; ++b) {
    const int64_t before = p.cache_seqlens != nullptr ? p.cache_seqlens[b] : p.cache_seqlen;
    DCA_RETURN_IF_REFUSED(check_page_ids(p.pages, b, before, before + rows_of(p.cu_seqlens_k, b, p.seqlen_k)));
  }
  return {};
}

}  // namespace

Status check(const AttentionParams& p) {
  DCA_RETURN_IF_REFUSED(check_heads(p.num_heads, p.num_heads_kv, p.head_dim));
  DCA_RETURN_IF_REFUSED(check_common(p));
  DCA_RETURN_IF_REFUSED(check_cache_format(p));
  DCA_RETURN_IF_REFUSED(check_pages(p.pages, p.exec.device, p.seqlen_k));
  DCA_REFUSE_IF(p.seqlen_q < 0 || p.seqlen_k < 0,
                "seqlen_q and seqlen_k must not be negative; got seqlen_q=", p.seqlen_q, ", seqlen_k=", p.seqlen_k);
  DCA_REFUSE_IF(p.cu_seqlens_k != nullptr && p.pages.page_table != nullptr,
                "cu_seqlens_k and page_table exclude each other; got both");
  DCA_REFUSE_IF(p.num_splits < 0 || p.num_splits > kMaxNumSplits, "num_splits must be between 0 (choose) and ",
                kMaxNumSplits, "; got ", p.num_splits);
  DCA_REFUSE_IF(p.original_max_position_embeddings < 0, "original_max_position_embeddings must not be negative; got ",
                p.original_max_position_embeddings);
  DCA_REFUSE_IF(p.cu_seqlens_q != nullptr && p.total_q > 0 && p.seqlen_q < 1,
                "the maximal sequence length of cu_seqlens_q must be at least 1 where q has rows; got ", p.seqlen_q);
  if (p.exec.device == Device::Cpu) return check_values(p);
  if (p.cu_seqlens_k == nullptr) {
    const bool appends = p.cache_seqlens_before_append && p.cu_seqlens_q == nullptr;
    DCA_RETURN_IF_REFUSED(check_common_length(p, appends ? p.seqlen_q : 0, p.seqlen_k));
  }
  return check_cuda_shape(p);
}

Status check(const RotateKeysParams& p) {
  DCA_RETURN_IF_REFUSED(check_heads(p.num_heads_kv, p.num_heads_kv, p.head_dim));
  DCA_RETURN_IF_REFUSED(check_common(p));
  DCA_REFUSE_IF(p.seqlen_k < 0, "seqlen_k must not be negative; got ", p.seqlen_k);
  if (p.exec.device == Device::Cpu) return check_values(p);
  DCA_RETURN_IF_REFUSED(check_common_length(p, uniform_new_rows(p), INT32_MAX));
  return check_head_dim_vectors(p.head_dim, p.dtype);
}

Status check(const AppendParams& p) {
  DCA_RETURN_IF_REFUSED(check_heads(p.num_heads_kv, p.num_heads_kv, p.head_dim));
  DCA_RETURN_IF_REFUSED(check_common(p));
  DCA_REFUSE_IF(p.seqlen_k < 0 || p.cache_slots < 0,
                "seqlen_k and cache_slots must not be negative; got seqlen_k=", p.seqlen_k,
                ", cache_slots=", p.cache_slots);
  DCA_RETURN_IF_REFUSED(check_cache_format(p));
  DCA_RETURN_IF_REFUSED(check_written_scale("k_scale", p.k_scale, p.k_scale_out, dtype_of_cache(p)));
  DCA_RETURN_IF_REFUSED(check_written_scale("v_scale", p.v_scale, p.v_scale_out, dtype_of_cache(p)));
  DCA_RETURN_IF_REFUSED(check_pages(p.pages, p.exec.device, p.cache_slots));
  if (p.exec.device == Device::Cpu) return check_values(p);
  DCA_RETURN_IF_REFUSED(check_common_length(p, uniform_new_rows(p), p.cache_slots));
  DCA_RETURN_IF_REFUSED(check_head_dim_vectors(p.head_dim, p.dtype));
  return check_cache_vectors(p);
}

Status check(const MergeParams& p) {
  DCA_RETURN_IF_REFUSED(check_threading(p.exec.threading));
  DCA_RETURN_IF_REFUSED(check_dtype(p.dtype));
  DCA_REFUSE_IF(p.num_parts < 1, "outs and lses must have at least one part; got ", p.num_parts);
  DCA_REFUSE_IF(p.num_heads < 1 || p.head_dim < 1,
                "num_heads and head_dim must be at least 1; got num_heads=", p.num_heads, ", head_dim=", p.head_dim);
  DCA_REFUSE_IF(p.batch < 0 || p.seqlen < 0, "batch and seqlen must not be negative; got batch=", p.batch,
                ", seqlen=", p.seqlen);
  return {};
}

// --- Memory, where there is work to do ---

Status check_pointers(const AttentionParams& p) {
  DCA_RETURN_IF_REFUSED(check_not_null("q", p.q.data));
  DCA_RETURN_IF_REFUSED(check_not_null("out", p.out.data));
  const int64_t keys = p.cu_seqlens_k != nullptr       ? p.total_k
                       : p.pages.page_table != nullptr ? p.pages.num_pages
                                                       : p.seqlen_k;
  if (keys > 0) {
    DCA_RETURN_IF_REFUSED(check_not_null("k", p.k.data));
    DCA_RETURN_IF_REFUSED(check_not_null("v", p.v.data));
    if (dtype_of_cache(p) == DType::Int8) {
      DCA_RETURN_IF_REFUSED(check_not_null("k_scale.data of an Int8 cache", p.k_scale.data));
      DCA_RETURN_IF_REFUSED(check_not_null("v_scale.data of an Int8 cache", p.v_scale.data));
    }
  }
  if (p.exec.device == Device::Cpu) return {};
  DCA_RETURN_IF_REFUSED(check_vectors("q", p.q.data, p.q.stride, p.dtype));
  DCA_RETURN_IF_REFUSED(check_vectors("k", p.k.data, p.k.stride, dtype_of_cache(p)));
  DCA_RETURN_IF_REFUSED(check_vectors("v", p.v.data, p.v.stride, dtype_of_cache(p)));
  DCA_RETURN_IF_REFUSED(check_vectors("out", p.out.data, p.out.stride, p.dtype));
  return check_rotary_vectors(p.rotary, p.dtype);
}

Status check_pointers(const RotateKeysParams& p) {
  DCA_RETURN_IF_REFUSED(check_not_null("k", p.k.data));
  DCA_RETURN_IF_REFUSED(check_not_null("out", p.out.data));
  if (p.exec.device == Device::Cpu) return {};
  DCA_RETURN_IF_REFUSED(check_vectors("k", p.k.data, p.k.stride, p.dtype));
  DCA_RETURN_IF_REFUSED(check_vectors("out", p.out.data, p.out.stride, p.dtype));
  return check_rotary_vectors(p.rotary, p.dtype);
}

Status check_pointers(const AppendParams& p) {
  DCA_RETURN_IF_REFUSED(check_not_null("k", p.k.data));
  DCA_RETURN_IF_REFUSED(check_not_null("v", p.v.data));
  DCA_RETURN_IF_REFUSED(check_not_null("k_cache", p.k_cache.data));
  DCA_RETURN_IF_REFUSED(check_not_null("v_cache", p.v_cache.data));
  if (dtype_of_cache(p) == DType::Int8) {
    DCA_RETURN_IF_REFUSED(check_not_null("k_scale_out.data of an Int8 cache", p.k_scale_out.data));
    DCA_RETURN_IF_REFUSED(check_not_null("v_scale_out.data of an Int8 cache", p.v_scale_out.data));
  }
  if (p.exec.device == Device::Cpu) return {};
  DCA_RETURN_IF_REFUSED(check_vectors("k", p.k.data, p.k.stride, p.dtype));
  DCA_RETURN_IF_REFUSED(check_vectors("v", p.v.data, p.v.stride, p.dtype));
  DCA_RETURN_IF_REFUSED(check_vectors("k_cache", p.k_cache.data, p.k_cache.stride, dtype_of_cache(p)));
  DCA_RETURN_IF_REFUSED(check_vectors("v_cache", p.v_cache.data, p.v_cache.stride, dtype_of_cache(p)));
  return check_rotary_vectors(p.rotary, p.dtype);
}

Status check_pointers(const MergeParams& p) {
  DCA_RETURN_IF_REFUSED(check_not_null("outs", p.outs));
  DCA_RETURN_IF_REFUSED(check_not_null("lses", p.lses));
  for (int32_t part = 0; part < p.num_parts; ++part) {
    DCA_RETURN_IF_REFUSED(check_not_null("every part of outs", p.outs[part]));
    DCA_RETURN_IF_REFUSED(check_not_null("every part of lses", p.lses[part]));
  }
  DCA_RETURN_IF_REFUSED(check_not_null("out", p.out));
  return check_not_null("lse", p.lse);
}

}  // namespace dca
