// The operators of the namespace dca_ext on LibTorch's stable ABI: tensors in, checks, allocation of the outputs, one
// call into the torch-free core. dca_ext/functional.py is their public face and documents shapes.
#include "device_scope.h"
#include "tensor_args.h"

#include <cmath>
#include <tuple>
#include <vector>

namespace dca::torch_ops {

namespace {

int64_t int_or(const OptionalTensor& t, int64_t value) { return t.has_value() ? 0 : value; }

SegmentSelection segment_selection(int64_t segment) {
  if (segment < -1 || segment >= kNumSegments)
    refuse("segment must be -1 (all), 0, 1 or 2; got " + std::to_string(segment));
  return static_cast<SegmentSelection>(segment);
}

/// Of ragged rows the batch size that their borders give.
int64_t batch_of(const char* name, const OptionalTensor& cu_seqlens, const Tensor& rows) {
  if (!cu_seqlens.has_value()) return rows.size(0);
  if (cu_seqlens->dim() != 1 || cu_seqlens->size(0) == 0) {
    refuse(std::string(name) + " must have batch + 1 entries in one dimension; got shape " + shape_of(*cu_seqlens));
  }
  return cu_seqlens->size(0) - 1;
}

/// The longest of ragged sequences.
int32_t longest(const char* name, int64_t max_seqlen) {
  if (max_seqlen < 0) refuse(std::string(name) + " must not be negative; got " + std::to_string(max_seqlen));
  return to_int32(name, max_seqlen);
}

/// Of a sequence in a cache (batch, slots, heads, head_dim), or in pages.
int32_t slots_of(bool paged, const PageTable& pages, const Tensor& cache) {
  return to_int32("the slots of a sequence",
                  paged ? static_cast<int64_t>(pages.max_pages) * pages.page_size : cache.size(1));
}

/// An attention ready to run: its parameters and the memory that they point to.
struct AttentionCall {
  AttentionParams p;
  Tensor out;
  Tensor lse;
  std::optional<Tensor> workspace;
};

AttentionCall attention_call(const DeviceScope& scope, const Tensor& q, const Tensor& k, const Tensor& v,
                             const Tensor& rotary_cos, const Tensor& rotary_sin, int64_t chunk_len,
                             int64_t max_position, int64_t segment, const OptionalTensor& cu_seqlens_q,
                             int64_t max_seqlen_q, const OptionalTensor& cu_seqlens_k, int64_t max_seqlen_k,
                             const OptionalTensor& cache_seqlens, int64_t cache_seqlen, bool lengths_before_append,
                             const OptionalTensor& cache_leftpad, const OptionalTensor& pages,
                             const OptionalTensor& k_scale, double k_scale_value, const OptionalTensor& v_scale,
                             double v_scale_value, std::optional<double> softmax_scale,
                             const OptionalTensor& temperature, int64_t original_max_position_embeddings,
                             int64_t num_splits, bool interleaved, bool return_lse) {
  const bool ragged_q = cu_seqlens_q.has_value();
  const bool ragged_k = cu_seqlens_k.has_value();
  AttentionParams p;
  p.exec = scope.execution();
  p.dtype = dtype_of("q", q);
  check_like("q", q, q, ragged_q ? 3 : 4);
  p.cache_dtype = check_cache("k (or k_cache)", k, q, ragged_k ? 3 : 4);
  check_cache("v (or v_cache)", v, q, ragged_k ? 3 : 4);
  check_same_cache_dtype("v (or v_cache)", v, k);
  const int64_t q_heads = q.dim() - 2;
  const int64_t k_heads = k.dim() - 2;
  const int64_t batch = batch_of("cu_seqlens_q", cu_seqlens_q, q);
  if (k.size(k_heads + 1) != q.size(q_heads + 1)) {
    refuse("head_dim of k (or k_cache) must be that of q (" + std::to_string(q.size(q_heads + 1)) + "); got " +
           std::to_string(k.size(k_heads + 1)));
  }
  if (k.dim() == 4) {
    check_shape("v (or v_cache)", v, {k.size(0), k.size(1), k.size(2), k.size(3)});
  } else {
    check_shape("v", v, {k.size(0), k.size(1), k.size(2)});
  }
  if (!ragged_k && !pages.has_value() && k.size(0) != batch) {
    refuse("k (or k_cache) must have the batch size of q (" + std::to_string(batch) + "); got " +
           std::to_string(k.size(0)));
  }

  p.chunk = chunk_geometry(chunk_len, max_position);
  p.segments = segment_selection(segment);
  p.batch = to_int32("batch", batch);
  p.num_heads = to_int32("num_heads", q.size(q_heads));
  p.num_heads_kv = to_int32("num_heads_kv", k.size(k_heads));
  p.head_dim = to_int32("head_dim", q.size(q_heads + 1));
  p.seqlen_q = ragged_q ? longest("max_seqlen_q", max_seqlen_q) : to_int32("the rows of q", q.size(1));
  p.total_q = ragged_q ? q.size(0) : 0;
  p.pages = page_table(pages, k, q, batch);
  p.seqlen_k = ragged_k ? longest("max_seqlen_k", max_seqlen_k) : slots_of(pages.has_value(), p.pages, k);
  p.total_k = ragged_k ? k.size(0) : 0;
  p.q = const_ref(q);
  p.k = const_ref(k);
  p.v = const_ref(v);
  p.k_scale = cache_scale("k_scale", k_scale, k_scale_value, k, p.cache_dtype, p.num_heads_kv);
  p.v_scale = cache_scale("v_scale", v_scale, v_scale_value, v, p.cache_dtype, p.num_heads_kv);
  p.cu_seqlens_q = int32_vector("cu_seqlens_q", cu_seqlens_q, q, batch + 1);
  p.cu_seqlens_k = int32_vector("cu_seqlens_k", cu_seqlens_k, q, batch + 1);
  p.cache_seqlens = int32_vector("cache_seqlens", cache_seqlens, q, batch);
  p.cache_seqlen = to_int32("cache_seqlens", int_or(cache_seqlens, cache_seqlen));
  p.cache_seqlens_before_append = lengths_before_append;
  p.cache_leftpad = int32_vector("cache_leftpad", cache_leftpad, q, batch);
  p.rotary = rotary_tables(rotary_cos, rotary_sin, q, interleaved);
  // A head_dim of 0 is refused by the core.
  p.softmax_scale = static_cast<float>(softmax_scale.value_or(1.0 / std::sqrt(static_cast<double>(p.head_dim))));
  p.temperature = float_vector("temperature", temperature, q, batch);
  p.original_max_position_embeddings = to_int32("original_max_position_embeddings", original_max_position_embeddings);
  p.num_splits = to_int32("num_splits", num_splits);

  Tensor out = ragged_q ? torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2)})
                        : torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2), q.size(3)});
  Tensor lse = !return_lse ? torch::stable::new_empty(q, {0}, ScalarType::Float)
               : ragged_q  ? torch::stable::new_empty(q, {q.size(1), q.size(0)}, ScalarType::Float)
                           : torch::stable::new_empty(q, {q.size(0), q.size(2), q.size(1)}, ScalarType::Float);
  p.out = ref(out);
  p.lse = return_lse ? static_cast<float*>(lse.mutable_data_ptr()) : nullptr;
  // The CPU keeps its own scratch; on CUDA all memory is torch's, so that it is reused and can be captured in a graph.
  std::optional<Tensor> workspace;
  if (p.exec.device == Device::Cuda) {
    check_status(dca::attention_workspace_bytes(p, &p.workspace_bytes));
    if (p.workspace_bytes > 0) {
      workspace = torch::stable::new_empty(q, {static_cast<int64_t>(p.workspace_bytes)}, ScalarType::Byte);
      p.workspace = workspace->mutable_data_ptr();
    }
  }
  return {p, out, lse, workspace};
}

}  // namespace

std::tuple<Tensor, Tensor> attention(Tensor q, Tensor k, Tensor v, Tensor rotary_cos, Tensor rotary_sin,
                                     int64_t chunk_len, int64_t max_position, int64_t segment,
                                     OptionalTensor cu_seqlens_q, int64_t max_seqlen_q, OptionalTensor cu_seqlens_k,
                                     int64_t max_seqlen_k, OptionalTensor cache_seqlens, int64_t cache_seqlen,
                                     OptionalTensor cache_leftpad, OptionalTensor pages,
                                     OptionalTensor k_scale, double k_scale_value, OptionalTensor v_scale,
                                     double v_scale_value, std::optional<double> softmax_scale,
                                     OptionalTensor temperature, int64_t original_max_position_embeddings,
                                     int64_t num_splits, bool interleaved, bool return_lse) {
  const DeviceScope scope(q);
  const AttentionCall call = attention_call(
      scope, q, k, v, rotary_cos, rotary_sin, chunk_len, max_position, segment, cu_seqlens_q, max_seqlen_q,
      cu_seqlens_k, max_seqlen_k, cache_seqlens, cache_seqlen, /*lengths_before_append=*/false, cache_leftpad, pages,
      k_scale, k_scale_value, v_scale, v_scale_value, softmax_scale, temperature, original_max_position_embeddings,
      num_splits, interleaved, return_lse);
  check_status(dca::attention(call.p));
  return {call.out, call.lse};
}

namespace {

// What rotate_keys and rotate_and_append_kv share: new rows of k, and where they go.
template <class Params>
void fill_new_rows(Params& p, const DeviceScope& scope, const Tensor& k, const Tensor& rotary_cos,
                   const Tensor& rotary_sin, int64_t chunk_len, int64_t max_position, const OptionalTensor& cu_seqlens,
                   int64_t max_seqlen, const OptionalTensor& cache_seqlens, int64_t cache_seqlen,
                   const OptionalTensor& cache_leftpad, bool interleaved) {
  const bool ragged = cu_seqlens.has_value();
  p.exec = scope.execution();
  p.dtype = dtype_of("k", k);
  check_like("k", k, k, ragged ? 3 : 4);
  const int64_t batch = batch_of("cu_seqlens_q", cu_seqlens, k);
  p.chunk = chunk_geometry(chunk_len, max_position);
  p.batch = to_int32("batch", batch);
  p.num_heads_kv = to_int32("num_heads_kv", k.size(k.dim() - 2));
  p.head_dim = to_int32("head_dim", k.size(k.dim() - 1));
  p.seqlen_k = ragged ? longest("max_seqlen_q", max_seqlen) : to_int32("the rows of k", k.size(1));
  p.total_k = ragged ? k.size(0) : 0;
  p.k = const_ref(k);
  p.cu_seqlens_k = int32_vector("cu_seqlens_q", cu_seqlens, k, batch + 1);
  p.cache_seqlens = int32_vector("cache_seqlens", cache_seqlens, k, batch);
  p.cache_seqlen = to_int32("cache_seqlens", int_or(cache_seqlens, cache_seqlen));
  p.cache_leftpad = int32_vector("cache_leftpad", cache_leftpad, k, batch);
  p.rotary = rotary_tables(rotary_cos, rotary_sin, k, interleaved);
}

}  // namespace

Tensor rotate_keys(Tensor k, Tensor rotary_cos, Tensor rotary_sin, int64_t chunk_len, int64_t max_position,
                   OptionalTensor cu_seqlens, int64_t max_seqlen, OptionalTensor cache_seqlens, int64_t cache_seqlen,
                   OptionalTensor cache_leftpad, bool interleaved) {
  const DeviceScope scope(k);
  RotateKeysParams p;
  fill_new_rows(p, scope, k, rotary_cos, rotary_sin, chunk_len, max_position, cu_seqlens, max_seqlen, cache_seqlens,
                cache_seqlen, cache_leftpad, interleaved);
  Tensor out = k.dim() == 3 ? torch::stable::new_empty(k, {k.size(0), k.size(1), k.size(2)})
                            : torch::stable::new_empty(k, {k.size(0), k.size(1), k.size(2), k.size(3)});
  p.out = ref(out);
  check_status(dca::rotate_keys(p));
  return out;
}

namespace {

AppendParams append_params(const DeviceScope& scope, const Tensor& k, const Tensor& v, const Tensor& k_cache,
                           const Tensor& v_cache, const Tensor& rotary_cos, const Tensor& rotary_sin,
                           int64_t chunk_len, int64_t max_position, const OptionalTensor& cu_seqlens,
                           int64_t max_seqlen, const OptionalTensor& cache_seqlens, int64_t cache_seqlen,
                           const OptionalTensor& cache_leftpad, const OptionalTensor& pages,
                           const OptionalTensor& k_scale, double k_scale_value, const OptionalTensor& v_scale,
                           double v_scale_value, const OptionalTensor& k_scale_out, const OptionalTensor& v_scale_out,
                           bool interleaved) {
  AppendParams p;
  fill_new_rows(p, scope, k, rotary_cos, rotary_sin, chunk_len, max_position, cu_seqlens, max_seqlen, cache_seqlens,
                cache_seqlen, cache_leftpad, interleaved);
  check_like("v", v, k, k.dim());
  p.cache_dtype = check_cache("k_cache", k_cache, k, 4);
  check_cache("v_cache", v_cache, k, 4);
  check_same_cache_dtype("v_cache", v_cache, k_cache);
  if (k.dim() == 4) {
    check_shape("v", v, {k.size(0), k.size(1), k.size(2), k.size(3)});
  } else {
    check_shape("v", v, {k.size(0), k.size(1), k.size(2)});
  }
  const int64_t cache_batch = pages.has_value() ? k_cache.size(0) : p.batch;
  check_shape("k_cache", k_cache, {cache_batch, k_cache.size(1), p.num_heads_kv, p.head_dim});
  check_shape("v_cache", v_cache, {cache_batch, k_cache.size(1), p.num_heads_kv, p.head_dim});
  p.v = const_ref(v);
  check_written_once("k_cache", k_cache, "v_cache", v_cache);
  p.k_cache = ref(k_cache);
  p.v_cache = ref(v_cache);
  if (p.cache_dtype != DType::Int8) {
    p.k_scale = cache_scale("k_scale", k_scale, k_scale_value, k_cache, p.cache_dtype, p.num_heads_kv);
    p.v_scale = cache_scale("v_scale", v_scale, v_scale_value, v_cache, p.cache_dtype, p.num_heads_kv);
  }
  if (k_scale_out.has_value() && v_scale_out.has_value()) {
    check_written_once("k_scale", *k_scale_out, "v_scale", *v_scale_out);
  }
  p.k_scale_out = cache_scale_ref("k_scale", k_scale_out, k_cache, p.cache_dtype);
  p.v_scale_out = cache_scale_ref("v_scale", v_scale_out, v_cache, p.cache_dtype);
  p.pages = page_table(pages, k_cache, k, p.batch);
  p.cache_slots = slots_of(pages.has_value(), p.pages, k_cache);
  return p;
}

}  // namespace

void rotate_and_append_kv(Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor rotary_cos, Tensor rotary_sin,
                          int64_t chunk_len, int64_t max_position, OptionalTensor cu_seqlens, int64_t max_seqlen,
                          OptionalTensor cache_seqlens, int64_t cache_seqlen, OptionalTensor cache_leftpad,
                          OptionalTensor pages, OptionalTensor k_scale, double k_scale_value, OptionalTensor v_scale,
                          double v_scale_value, OptionalTensor k_scale_out, OptionalTensor v_scale_out,
                          bool interleaved) {
  const DeviceScope scope(k);
  check_status(dca::rotate_and_append_kv(append_params(
      scope, k, v, k_cache, v_cache, rotary_cos, rotary_sin, chunk_len, max_position, cu_seqlens, max_seqlen,
      cache_seqlens, cache_seqlen, cache_leftpad, pages, k_scale, k_scale_value, v_scale, v_scale_value, k_scale_out,
      v_scale_out, interleaved)));
}

std::tuple<Tensor, Tensor> append_and_attend(
    Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor rotary_cos, Tensor rotary_sin,
    int64_t chunk_len, int64_t max_position, OptionalTensor cu_seqlens_q, int64_t max_seqlen_q,
    OptionalTensor cache_seqlens, int64_t cache_seqlen, OptionalTensor cache_leftpad, OptionalTensor pages,
    OptionalTensor k_scale, double k_scale_value, OptionalTensor v_scale, double v_scale_value,
    OptionalTensor k_scale_out, OptionalTensor v_scale_out, std::optional<double> softmax_scale,
    OptionalTensor temperature, int64_t original_max_position_embeddings, int64_t num_splits, bool interleaved,
    bool return_lse) {
  const int64_t dims = cu_seqlens_q.has_value() ? 3 : 4;
  dtype_of("q", q);
  check_rows("q", q, dims);
  check_like("k", k, q, dims);
  if (k.size(0) != q.size(0) || (dims == 4 && k.size(1) != q.size(1))) {
    refuse("k must have as many rows as q, of shape " + shape_of(q) + "; got shape " + shape_of(k));
  }
  const DeviceScope scope(q);
  const AppendParams append =
      append_params(scope, k, v, k_cache, v_cache, rotary_cos, rotary_sin, chunk_len, max_position, cu_seqlens_q,
                    max_seqlen_q, cache_seqlens, cache_seqlen, cache_leftpad, pages, k_scale, k_scale_value, v_scale,
                    v_scale_value, k_scale_out, v_scale_out, interleaved);
  const AttentionCall call = attention_call(
      scope, q, k_cache, v_cache, rotary_cos, rotary_sin, chunk_len, max_position, -1, cu_seqlens_q, max_seqlen_q, {},
      0, cache_seqlens, cache_seqlen, /*lengths_before_append=*/true, cache_leftpad, pages,
      k_scale_out.has_value() ? k_scale_out : k_scale, k_scale_value,
      v_scale_out.has_value() ? v_scale_out : v_scale, v_scale_value, softmax_scale, temperature,
      original_max_position_embeddings, num_splits, interleaved, return_lse);
  // What the attention refuses, a bad page among tokens cached long ago for one, is refused before the append writes.
  check_status(dca::check_attention(call.p));
  check_status(dca::rotate_and_append_kv(append));
  check_status(dca::attention(call.p));
  return {call.out, call.lse};
}

std::tuple<Tensor, Tensor> merge_attention_states(std::vector<Tensor> outs, std::vector<Tensor> lses) {
  if (outs.empty() || outs.size() != lses.size()) {
    refuse("outs and lses must have the same number of parts, at least one; got " + std::to_string(outs.size()) +
           " and " + std::to_string(lses.size()));
  }
  const Tensor& first = outs[0];
  const bool ragged = first.dim() == 3;
  if (!ragged && first.dim() != 4) {
    refuse("outs must have shape (batch, seqlen, num_heads, head_dim) or (total, num_heads, head_dim); got " +
           shape_of(first));
  }
  const DeviceScope scope(first);
  MergeParams p;
  p.exec = scope.execution();
  p.dtype = dtype_of("outs", first);
  p.num_parts = to_int32("the number of parts", static_cast<int64_t>(outs.size()));
  p.batch = ragged ? 1 : first.size(0);
  p.seqlen = first.size(ragged ? 0 : 1);
  p.num_heads = to_int32("num_heads", first.size(first.dim() - 2));
  p.head_dim = to_int32("head_dim", first.size(first.dim() - 1));

  std::vector<const void*> out_pointers;
  std::vector<const float*> lse_pointers;
  for (size_t i = 0; i < outs.size(); ++i) {
    check_like("outs", outs[i], first, first.dim());
    check_same_device("lses", lses[i], first);
    if (lses[i].scalar_type() != ScalarType::Float) refuse("lses must be float32; got " + dtype_name(lses[i]));
    if (ragged) {
      check_shape("outs", outs[i], {first.size(0), first.size(1), first.size(2)});
      check_shape("lses", lses[i], {first.size(1), first.size(0)});
    } else {
      check_shape("outs", outs[i], {first.size(0), first.size(1), first.size(2), first.size(3)});
      check_shape("lses", lses[i], {first.size(0), first.size(2), first.size(1)});
    }
    outs[i] = torch::stable::contiguous(outs[i]);
    lses[i] = torch::stable::contiguous(lses[i]);
    out_pointers.push_back(outs[i].const_data_ptr());
    lse_pointers.push_back(static_cast<const float*>(lses[i].const_data_ptr()));
  }
  p.outs = out_pointers.data();
  p.lses = lse_pointers.data();

  Tensor out = ragged ? torch::stable::new_empty(first, {first.size(0), first.size(1), first.size(2)})
                      : torch::stable::new_empty(first, {first.size(0), first.size(1), first.size(2), first.size(3)});
  Tensor lse = ragged ? torch::stable::new_empty(lses[0], {first.size(1), first.size(0)})
                      : torch::stable::new_empty(lses[0], {first.size(0), first.size(2), first.size(1)});
  p.out = out.mutable_data_ptr();
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  check_status(dca::merge_attention_states(p));
  return {out, lse};
}

std::string last_refusal_of_this_thread() { return last_refusal(); }

}  // namespace dca::torch_ops

STABLE_TORCH_LIBRARY(dca_ext, m) {
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor rotary_cos, Tensor rotary_sin, SymInt chunk_len, "
      "SymInt max_position, int segment, Tensor? cu_seqlens_q, SymInt max_seqlen_q, Tensor? cu_seqlens_k, "
      "SymInt max_seqlen_k, Tensor? cache_seqlens, SymInt cache_seqlen, "
      "Tensor? cache_leftpad, Tensor? page_table, Tensor? k_scale, float k_scale_value, Tensor? v_scale, "
      "float v_scale_value, float? softmax_scale, Tensor? temperature, "
      "SymInt original_max_position_embeddings, int num_splits, bool interleaved, bool return_lse) -> (Tensor, "
      "Tensor)");
  m.def(
      "append_and_attend(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor rotary_cos, "
      "Tensor rotary_sin, SymInt chunk_len, SymInt max_position, Tensor? cu_seqlens_q, SymInt max_seqlen_q, "
      "Tensor? cache_seqlens, SymInt cache_seqlen, Tensor? cache_leftpad, Tensor? page_table, Tensor? k_scale, "
      "float k_scale_value, Tensor? v_scale, float v_scale_value, Tensor(c!)? k_scale_out, Tensor(d!)? v_scale_out, "
      "float? softmax_scale, Tensor? temperature, SymInt original_max_position_embeddings, int num_splits, "
      "bool interleaved, bool return_lse) -> (Tensor, Tensor)");
  m.def(
      "rotate_keys(Tensor k, Tensor rotary_cos, Tensor rotary_sin, SymInt chunk_len, SymInt max_position, "
      "Tensor? cu_seqlens, SymInt max_seqlen, Tensor? cache_seqlens, SymInt cache_seqlen, Tensor? cache_leftpad, "
      "bool interleaved) -> Tensor");
  m.def(
      "rotate_and_append_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor rotary_cos, "
      "Tensor rotary_sin, SymInt chunk_len, SymInt max_position, Tensor? cu_seqlens, SymInt max_seqlen, "
      "Tensor? cache_seqlens, SymInt cache_seqlen, Tensor? cache_leftpad, Tensor? page_table, Tensor? k_scale, "
      "float k_scale_value, Tensor? v_scale, float v_scale_value, Tensor(c!)? k_scale_out, Tensor(d!)? v_scale_out, "
      "bool interleaved) -> ()");
  m.def("merge_attention_states(Tensor[] outs, Tensor[] lses) -> (Tensor, Tensor)");
  m.def("last_refusal() -> str");
}

// Without tensors there is no device to choose a function by.
STABLE_TORCH_LIBRARY_IMPL(dca_ext, CompositeExplicitAutograd, m) {
  m.impl("last_refusal", TORCH_BOX(&dca::torch_ops::last_refusal_of_this_thread));
}

// The same functions for both devices: the core chooses the backend, and says so where it was built without one.
#define DCA_IMPLEMENT(key)                                                                \
  STABLE_TORCH_LIBRARY_IMPL(dca_ext, key, m) {                                            \
    m.impl("attention", TORCH_BOX(&dca::torch_ops::attention));                           \
    m.impl("append_and_attend", TORCH_BOX(&dca::torch_ops::append_and_attend));           \
    m.impl("rotate_keys", TORCH_BOX(&dca::torch_ops::rotate_keys));                       \
    m.impl("rotate_and_append_kv", TORCH_BOX(&dca::torch_ops::rotate_and_append_kv));     \
    m.impl("merge_attention_states", TORCH_BOX(&dca::torch_ops::merge_attention_states)); \
  }
DCA_IMPLEMENT(CPU)
DCA_IMPLEMENT(CUDA)
