// One plain struct per operation: pointers, element strides, sizes. Everything a caller says, nothing derived.
//
// Layouts (the last dimension is always contiguous; all strides are in elements):
//   uniform   (batch, seqlen, heads, head_dim)
//   ragged    (total, heads, head_dim), sequence b in rows [cu_seqlens[b], cu_seqlens[b + 1])
//   paged     (num_pages, page_size, heads, head_dim), slot s of sequence b in page page_table[b, s / page_size]
//
// Pointers marked (device) lie where `device` says; on Device::Cuda they are read by kernels only, never by the host.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dca/chunk_geometry.h"

namespace dca {

enum class DType : int32_t {
  Same = -1,  ///< of a cache: as the other tensors of the call
  Float32 = 0,
  BFloat16 = 1,
  Float16 = 2,
  Float8E4M3 = 3,  ///< of a cache only: 4 exponent bits, 3 mantissa bits, up to 448, NaN but no infinity
  Int8 = 4,        ///< of a cache on the CPU only: whole numbers, with a scale for each slot and KV head
};
enum class Device : int32_t { Cpu = 0, Cuda = 1 };

constexpr size_t element_size(DType dtype) {
  return dtype == DType::Float32 ? 4 : dtype == DType::Float8E4M3 || dtype == DType::Int8 ? 1 : 2;
}

/// Where element (b, s, h, d) lies: data + b * batch + s * row + h * head + d. Ragged tensors ignore `batch`; in a
/// paged cache b is the page and s the slot within it.
struct Strides {
  int64_t batch = 0;
  int64_t row = 0;
  int64_t head = 0;
};

struct ConstTensorRef {
  const void* data = nullptr;  ///< (device)
  Strides stride;
};

struct TensorRef {
  void* data = nullptr;  ///< (device)
  Strides stride;
};

/// What the elements of a cache of 8-bit numbers stand for: x in KV head h of slot s means x * scale.
///
/// Of a Float8E4M3 cache, data is (num_heads_kv) with strides {0, 0, 1}, one number for all heads with {0, 0, 0}, or
/// null. Of an Int8 cache, it is laid out like the cache without head_dim: (batch, slots, num_heads_kv),
/// (total, num_heads_kv) or (num_pages, page_size, num_heads_kv). Scales of slots that no token owns are never read.
struct CacheScale {
  float value = 1.0f;           ///< of every element, if data is null
  const float* data = nullptr;  ///< (device)
  Strides stride;

  /// Of a head whose rows share one.
  DCA_HOST_DEVICE constexpr float of(int32_t head) const { return data != nullptr ? data[head * stride.head] : value; }
  /// Of one row: b is the sequence and s its slot, or the page and the slot within it.
  DCA_HOST_DEVICE constexpr float of(int64_t b, int64_t s, int32_t head) const {
    return data != nullptr ? data[b * stride.batch + s * stride.row + head * stride.head] : value;
  }
};

/// Where the scales of an Int8 cache are written, laid out as its CacheScale.
struct CacheScaleRef {
  float* data = nullptr;  ///< (device)
  Strides stride;
};

/// Rotary tables. Row p holds cos and sin of position p, a scale included if the model's frequencies come with one.
struct RotaryTables {
  const float* cos = nullptr;  ///< (num_positions, half_dim), contiguous (device)
  const float* sin = nullptr;  ///< (num_positions, half_dim), contiguous (device)
  int64_t num_positions = 0;   ///< at least max_position + 1
  int32_t half_dim = 0;        ///< rotary_dim / 2; rotary_dim <= head_dim
  bool interleaved = false;    ///< pairs (2c, 2c + 1) instead of (c, c + half_dim)
};

/// Pages of a KV cache; page_table == nullptr means that the cache is not paged.
struct PageTable {
  const int32_t* page_table = nullptr;  ///< (batch, max_pages) (device)
  int64_t stride_batch = 0;             ///< elements between the rows of page_table
  int32_t max_pages = 0;
  int32_t page_size = 0;  ///< slots per page: any on the CPU, a multiple of 16 on CUDA
  int64_t num_pages = 0;  ///< pages in the cache
};

/// How CPU operators run in parallel. The default is the library's own thread pool.
struct Threading {
  int32_t num_threads = 0;
  /// Calls worker(0, context) ... worker(num_threads - 1, context), in parallel where it can, and returns after all.
  void (*run)(int32_t num_threads, void (*worker)(int32_t index, void* context), void* context) = nullptr;
};

/// Where an operator runs.
struct Execution {
  Device device = Device::Cpu;
  void* stream = nullptr;                ///< cudaStream_t
  const Threading* threading = nullptr;  ///< CPU only; nullptr: the library's own pool
};

/// Key splits that a caller may ask for.
inline constexpr int32_t kMaxNumSplits = 256;

/// Attention of unrotated queries over rotated keys, through all segments or through one.
///
/// The logical position of cache slot s is s - leftpad[b]; the last query row of a sequence is its last key. A row with
/// a negative position, and one that sees no key, gives out = 0 and lse = -inf. On CUDA rows of a ragged q behind the
/// last sequence may get anything.
struct AttentionParams {
  Execution exec;
  DType dtype = DType::Float32;     ///< of q and out
  DType cache_dtype = DType::Same;  ///< of k and v: Same, Float8E4M3 or Int8
  ChunkGeometry chunk;
  SegmentSelection segments = SegmentSelection::All;

  int32_t batch = 0;
  int32_t num_heads = 0;     ///< a multiple of num_heads_kv
  int32_t num_heads_kv = 0;  //
  int32_t head_dim = 0;
  int32_t seqlen_q = 0;  ///< query rows of every sequence; ragged: their maximum
  int64_t total_q = 0;   ///< ragged: rows of q
  int32_t seqlen_k = 0;  ///< slots of a sequence in k and v; ragged k: their maximum; paged: max_pages * page_size
  int64_t total_k = 0;   ///< ragged k: rows of k and v

  ConstTensorRef q;      ///< (batch, seqlen_q, num_heads, head_dim) or (total_q, num_heads, head_dim)
  ConstTensorRef k;      ///< (batch, seqlen_k, num_heads_kv, head_dim), ragged, or pages
  ConstTensorRef v;      ///< as k
  CacheScale k_scale;    ///< of a Float8E4M3 or Int8 k
  CacheScale v_scale;    ///< of a Float8E4M3 or Int8 v
  TensorRef out;         ///< as q
  float* lse = nullptr;  ///< (batch, num_heads, seqlen_q) or (num_heads, total_q), contiguous; may be null (device)

  const int32_t* cu_seqlens_q = nullptr;  ///< (batch + 1): q and out are ragged (device)
  const int32_t* cu_seqlens_k = nullptr;  ///< (batch + 1): k and v are ragged (device)

  int32_t cache_seqlen = 0;                  ///< slots in use, left padding included, if cache_seqlens is null
  const int32_t* cache_seqlens = nullptr;    ///< (batch): the same per sequence (device); ignored for ragged k
  bool cache_seqlens_before_append = false;  ///< the lengths do not yet count this call's query rows
  const int32_t* cache_leftpad = nullptr;    ///< (batch): unused slots in front of each sequence (device)
  PageTable pages;

  RotaryTables rotary;
  float softmax_scale = 1.0f;
  const float* temperature = nullptr;  ///< (batch): factor on the logits (device)
  /// Not 0, and temperature null: YaRN's factor max(1, 0.1 ln(kv_len / this) + 1)^2.
  int32_t original_max_position_embeddings = 0;

  int32_t num_splits = 0;     ///< key splits per query tile, at most kMaxNumSplits; 0: chosen from the shapes
  void* workspace = nullptr;  ///< attention_workspace_bytes() bytes (device); CPU: may be null
  size_t workspace_bytes = 0;
};

/// out = k rotated at (position mod chunk_len), row r of sequence b at position cache_seqlens[b] + r - leftpad[b].
/// Rows in front of position 0 are copied as they are.
struct RotateKeysParams {
  Execution exec;
  DType dtype = DType::Float32;  ///< of k and out
  ChunkGeometry chunk;

  int32_t batch = 0;
  int32_t num_heads_kv = 0;
  int32_t head_dim = 0;
  int32_t seqlen_k = 0;  ///< rows of every sequence; ragged: their maximum
  int64_t total_k = 0;   ///< ragged: rows of k

  ConstTensorRef k;  ///< (batch, seqlen_k, num_heads_kv, head_dim) or (total_k, num_heads_kv, head_dim)
  TensorRef out;     ///< as k

  const int32_t* cu_seqlens_k = nullptr;   ///< (batch + 1): k is ragged (device)
  int32_t cache_seqlen = 0;                ///< slots in use before these rows, if cache_seqlens is null
  const int32_t* cache_seqlens = nullptr;  ///< (batch) (device)
  const int32_t* cache_leftpad = nullptr;  ///< (batch) (device)

  RotaryTables rotary;
};

/// Writes k, rotated as in RotateKeysParams, and v into the caches, row r of sequence b into slot cache_seqlens[b] + r.
/// A Float8E4M3 cache takes x / scale, rounded once to nearest even; what is too large becomes 448, and NaN stays NaN.
/// An Int8 cache takes the same whole numbers in [-127, 127] with scale = max |x| / 127 over the row of a head, and
/// that scale. Where it is 0 (zeros only, or too small for fp32) the numbers are 0. Where the row has a NaN or an
/// infinity, the scale is NaN and the numbers are 0.
struct AppendParams {
  Execution exec;
  DType dtype = DType::Float32;     ///< of k and v
  DType cache_dtype = DType::Same;  ///< of both caches: Same, Float8E4M3 or Int8
  ChunkGeometry chunk;

  int32_t batch = 0;
  int32_t num_heads_kv = 0;
  int32_t head_dim = 0;
  int32_t seqlen_k = 0;     ///< new rows of every sequence; ragged: their maximum
  int64_t total_k = 0;      ///< ragged: rows of k and v
  int32_t cache_slots = 0;  ///< slots of a sequence in the caches; paged: max_pages * page_size

  ConstTensorRef k;           ///< (batch, seqlen_k, num_heads_kv, head_dim) or (total_k, num_heads_kv, head_dim)
  ConstTensorRef v;           ///< as k
  TensorRef k_cache;          ///< (batch, cache_slots, num_heads_kv, head_dim) or pages
  TensorRef v_cache;          ///< as k_cache
  CacheScale k_scale;         ///< of a Float8E4M3 k_cache: read
  CacheScale v_scale;         ///< of a Float8E4M3 v_cache: read
  CacheScaleRef k_scale_out;  ///< of an Int8 k_cache: written
  CacheScaleRef v_scale_out;  ///< of an Int8 v_cache: written

  const int32_t* cu_seqlens_k = nullptr;   ///< (batch + 1): k and v are ragged (device)
  int32_t cache_seqlen = 0;                ///< slots in use before the call, if cache_seqlens is null
  const int32_t* cache_seqlens = nullptr;  ///< (batch) (device)
  const int32_t* cache_leftpad = nullptr;  ///< (batch) (device)
  PageTable pages;

  RotaryTables rotary;
};

/// The dtype that the elements of a call's cache have.
template <class Params>
constexpr DType dtype_of_cache(const Params& params) {
  return params.cache_dtype == DType::Same ? params.dtype : params.cache_dtype;
}

/// The attention over the union of disjoint key sets from the attention over each: weights exp(lse_p - lse) in fp32.
/// Parts at -inf carry no weight, whatever their out holds; where all are, out = 0 and lse = -inf.
struct MergeParams {
  Execution exec;
  DType dtype = DType::Float32;  ///< of every outs[p] and of out

  int32_t num_parts = 0;
  int64_t batch = 0;   ///< 1 for ragged tensors
  int64_t seqlen = 0;  ///< rows, or total rows of ragged tensors
  int32_t num_heads = 0;
  int32_t head_dim = 0;

  const void* const* outs = nullptr;   ///< num_parts host pointers to contiguous (batch, seqlen, num_heads, head_dim)
  const float* const* lses = nullptr;  ///< num_parts host pointers to contiguous (batch, num_heads, seqlen)
  void* out = nullptr;                 ///< (batch, seqlen, num_heads, head_dim), contiguous (device)
  float* lse = nullptr;                ///< (batch, num_heads, seqlen), contiguous (device)
};

}  // namespace dca
