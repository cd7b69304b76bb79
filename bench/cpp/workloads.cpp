#include "workloads.h"

#include <algorithm>
#include <cmath>

#include "dca/dca.h"
#include "inputs.h"
#include "tensor.h"
#include "verification.h"

namespace dca::bench {
namespace {

template <class Params>
Params common_params(const Options& o, const Machine& machine, const Rotary& rotary) {
  Params p;
  p.exec = machine.execution();
  p.dtype = o.dtype;
  p.chunk = {static_cast<int32_t>(o.chunk_len), static_cast<int32_t>(o.max_position)};
  p.batch = static_cast<int32_t>(o.batch);
  p.num_heads_kv = static_cast<int32_t>(o.kv_heads);
  p.head_dim = static_cast<int32_t>(o.head_dim);
  p.seqlen_k = static_cast<int32_t>(o.seqlen);
  p.rotary = rotary.tables();
  return p;
}

struct AttentionTensors {
  Tensor q, k, v, out;
};

AttentionParams attention_params(const Options& o, const Machine& machine, const Rotary& rotary,
                                 const AttentionTensors& tensors, int64_t rows) {
  AttentionParams p = common_params<AttentionParams>(o, machine, rotary);
  p.num_heads = static_cast<int32_t>(o.heads);
  p.seqlen_q = static_cast<int32_t>(rows);
  p.cache_seqlen = p.seqlen_k;
  p.q = tensors.q.ref();
  p.k = tensors.k.ref();
  p.v = tensors.v.ref();
  p.out = tensors.out.mutable_ref();
  p.softmax_scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(o.head_dim)));
  p.num_splits = static_cast<int32_t>(o.splits);
  return p;
}

// Of one head in the cache: its elements, and its scale if it has one.
double bytes_per_row(const Options& o) {
  const DType dtype = dtype_of_cache(o);
  const size_t elements = static_cast<size_t>(o.head_dim) * element_size(dtype);
  return static_cast<double>(elements + (dtype == DType::Int8 ? sizeof(float) : 0));
}

// The CPU backend finds its own scratch memory.
std::shared_ptr<void> give_workspace(const Machine& machine, AttentionParams& p) {
  if (p.exec.device == Device::Cpu) return nullptr;
  require(attention_workspace_bytes(p, &p.workspace_bytes));
  std::shared_ptr<void> workspace = machine.allocate(p.workspace_bytes);
  p.workspace = workspace.get();
  return workspace;
}

std::string verify(const Machine& machine, const Rotary& rotary, const AttentionTensors& tensors, AttentionParams p,
                   const PageTable& host_pages) {
  const Tensor q = host_copy(machine, tensors.q), out = host_copy(machine, tensors.out);
  const Tensor k = host_copy(machine, tensors.k), v = host_copy(machine, tensors.v);
  p.exec = {};
  p.q = q.ref();
  p.k = k.ref();
  p.v = v.ref();
  p.rotary = rotary.host_tables();
  p.cache_seqlens = nullptr;  // all are p.cache_seqlen
  p.pages = host_pages;
  return verify_attention(p, out);
}

Result run_prefill(const Options& o, Machine& machine, const Rotary& rotary) {
  const AttentionTensors tensors = {
      random_tensor(machine, o.dtype, o.batch, o.seqlen, o.heads, o.head_dim, 1),
      Tensor(machine, o.dtype, o.batch, o.seqlen, o.kv_heads, o.head_dim),
      random_tensor(machine, o.dtype, o.batch, o.seqlen, o.kv_heads, o.head_dim, 3),
      Tensor(machine, o.dtype, o.batch, o.seqlen, o.heads, o.head_dim),
  };
  const Tensor k = random_tensor(machine, o.dtype, o.batch, o.seqlen, o.kv_heads, o.head_dim, 2);
  RotateKeysParams keys = common_params<RotateKeysParams>(o, machine, rotary);
  keys.k = k.ref();
  keys.out = tensors.k.mutable_ref();
  AttentionParams p = attention_params(o, machine, rotary, tensors, o.seqlen);
  Result result;
  require(describe_attention(p, &result.kernel));
  const auto workspace = give_workspace(machine, p);
  result.rotate_keys_seconds = quantile(machine.time_runs([&] { return rotate_keys(keys); }), 0.5);
  result.seconds = machine.time_runs([&] { return attention(p); });
  const double pairs = 0.5 * static_cast<double>(o.seqlen) * static_cast<double>(o.seqlen + 1);
  result.work = 4.0 * static_cast<double>(o.batch * o.heads * o.head_dim) * pairs;
  result.work_unit = "FLOP";
  if (o.ceiling) result.ceiling = machine.arithmetic_ceiling(o.dtype);
  if (o.verify) result.verified = verify(machine, rotary, tensors, p, {});
  return result;
}

Result run_decode(const Options& o, Machine& machine, const Rotary& rotary) {
  const CacheLayout layout(machine, o);
  const AttentionTensors tensors = {
      random_tensor(machine, o.dtype, o.batch, o.queries, o.heads, o.head_dim, 1),
      layout.random_cache(machine, o, 2),  // any keys are rotated keys of some others
      layout.random_cache(machine, o, 3),
      Tensor(machine, o.dtype, o.batch, o.queries, o.heads, o.head_dim),
  };
  const Tensor k_scales = layout.scales(machine, o), v_scales = layout.scales(machine, o);
  AttentionParams p = attention_params(o, machine, rotary, tensors, o.queries);
  p.cache_dtype = o.cache_dtype;
  if (k_scales.count > 0) {
    p.k_scale = {1.0f, static_cast<const float*>(k_scales.memory.get()), k_scales.stride};
    p.v_scale = {1.0f, static_cast<const float*>(v_scales.memory.get()), v_scales.stride};
  }
  p.seqlen_k = static_cast<int32_t>(layout.total_slots);
  p.pages = layout.pages();
  // Lengths in memory, as a serving loop has them.
  const Mirrored<int32_t> lengths(machine, std::vector<int32_t>(static_cast<size_t>(o.batch), p.cache_seqlen));
  p.cache_seqlens = lengths.data();
  Result result;
  require(describe_attention(p, &result.kernel));
  const auto workspace = give_workspace(machine, p);
  result.seconds = machine.time_runs([&] { return attention(p); });
  result.work = 2.0 * static_cast<double>(o.batch * o.seqlen * o.kv_heads) * bytes_per_row(o);
  result.work_unit = "B";
  Buffers read = {tensors.k.buffer(), tensors.v.buffer()};
  if (k_scales.count > 0) read.insert(read.end(), {k_scales.buffer(), v_scales.buffer()});
  if (o.ceiling) result.ceiling = machine.read_ceiling(read);
  if (o.verify) result.verified = verify(machine, rotary, tensors, p, layout.host_pages());
  return result;
}

Result run_append(const Options& o, Machine& machine, const Rotary& rotary) {
  const CacheLayout layout(machine, o);
  const Tensor k = random_tensor(machine, o.dtype, o.batch, o.seqlen, o.kv_heads, o.head_dim, 2);
  const Tensor v = random_tensor(machine, o.dtype, o.batch, o.seqlen, o.kv_heads, o.head_dim, 3);
  const Tensor k_cache = layout.cache(machine, o), v_cache = layout.cache(machine, o);
  const Tensor k_scales = layout.scales(machine, o), v_scales = layout.scales(machine, o);
  AppendParams p = common_params<AppendParams>(o, machine, rotary);
  p.cache_dtype = o.cache_dtype;
  p.cache_slots = static_cast<int32_t>(layout.total_slots);
  p.k = k.ref();
  p.v = v.ref();
  p.k_cache = k_cache.mutable_ref();
  p.v_cache = v_cache.mutable_ref();
  if (k_scales.count > 0) {
    p.k_scale_out = {static_cast<float*>(k_scales.memory.get()), k_scales.stride};
    p.v_scale_out = {static_cast<float*>(v_scales.memory.get()), v_scales.stride};
  }
  p.pages = layout.pages();
  Result result;
  result.seconds = machine.time_runs([&] { return rotate_and_append_kv(p); });
  const size_t written = static_cast<size_t>(k.count) * element_size(dtype_of_cache(o));
  const double rows = static_cast<double>(o.batch * o.seqlen * o.kv_heads);
  result.work = 2.0 * (static_cast<double>(k.bytes()) + rows * bytes_per_row(o));
  result.work_unit = "B";
  if (o.verify) {  // before the copy overwrites the caches
    const Tensor host_k = host_copy(machine, k), host_v = host_copy(machine, v);
    AppendParams host = p;
    host.exec = {};
    host.k = host_k.ref();
    host.v = host_v.ref();
    host.rotary = rotary.host_tables();
    host.pages = layout.host_pages();
    result.verified = verify_append(host, host_copy(machine, k_cache), host_copy(machine, v_cache));
  }
  // Caches of pages have a few slots more; those of narrow elements take a part of k and v.
  const auto part = [&](const Tensor& tensor) { return std::pair<void*, size_t>(tensor.memory.get(), written); };
  if (o.ceiling) result.ceiling = machine.copy_ceiling({part(k), part(v)}, {part(k_cache), part(v_cache)});
  return result;
}

Result run_merge(const Options& o, Machine& machine) {
  std::vector<Tensor> outs, lses;
  std::vector<const void*> out_pointers;
  std::vector<const float*> lse_pointers;
  for (int64_t part = 0; part < o.parts; ++part) {
    const auto seed = static_cast<uint64_t>(2 * part);
    outs.push_back(random_tensor(machine, o.dtype, o.batch, o.seqlen, o.heads, o.head_dim, seed + 1));
    lses.push_back(random_tensor(machine, DType::Float32, o.batch, o.heads, o.seqlen, 1, seed + 2));
    out_pointers.push_back(outs.back().memory.get());
    lse_pointers.push_back(static_cast<const float*>(lses.back().memory.get()));
  }
  const Tensor out(machine, o.dtype, o.batch, o.seqlen, o.heads, o.head_dim);
  const Tensor lse(machine, DType::Float32, o.batch, o.heads, o.seqlen, 1);
  MergeParams p;
  p.exec = machine.execution();
  p.dtype = o.dtype;
  p.num_parts = static_cast<int32_t>(o.parts);
  p.batch = o.batch;
  p.seqlen = o.seqlen;
  p.num_heads = static_cast<int32_t>(o.heads);
  p.head_dim = static_cast<int32_t>(o.head_dim);
  p.outs = out_pointers.data();
  p.lses = lse_pointers.data();
  p.out = out.memory.get();
  p.lse = static_cast<float*>(lse.memory.get());
  Result result;
  result.seconds = machine.time_runs([&] { return merge_attention_states(p); });
  result.work = static_cast<double>(o.parts + 1) * static_cast<double>(out.bytes() + lse.bytes());
  result.work_unit = "B";
  if (o.verify) {
    std::vector<Tensor> host;
    for (int64_t part = 0; part < o.parts; ++part) {
      host.push_back(host_copy(machine, outs[static_cast<size_t>(part)]));
      out_pointers[static_cast<size_t>(part)] = host.back().memory.get();
      host.push_back(host_copy(machine, lses[static_cast<size_t>(part)]));
      lse_pointers[static_cast<size_t>(part)] = static_cast<const float*>(host.back().memory.get());
    }
    p.exec = {};
    result.verified = verify_merge(p, host_copy(machine, out));
  }
  if (o.ceiling) result.ceiling = machine.copy_ceiling({outs[0].buffer()}, {out.buffer()});
  return result;
}

Result run_operation(const Options& o, Machine& machine) {
  if (o.operation == Operation::Merge) return run_merge(o, machine);
  const Rotary rotary(machine, o);
  return o.operation == Operation::Prefill  ? run_prefill(o, machine, rotary)
         : o.operation == Operation::Decode ? run_decode(o, machine, rotary)
                                            : run_append(o, machine, rotary);
}

}  // namespace

double quantile(std::vector<double> values, double p) {
  std::sort(values.begin(), values.end());
  const double at = p * static_cast<double>(values.size() - 1);
  const size_t below = static_cast<size_t>(at);
  const size_t above = std::min(below + 1, values.size() - 1);
  return values[below] + (at - static_cast<double>(below)) * (values[above] - values[below]);
}

Result run_workload(const Options& options) {
  const std::unique_ptr<Machine> machine = open_machine(options);
  Result result = run_operation(options, *machine);
  if (result.kernel.empty()) {
    const std::string backend = options.device == Device::Cpu ? std::string("cpu/") + build_info().cpu_isa : "cuda";
    result.kernel = backend + "/" + name_of(options.operation);
  }
  result.machine = machine->name();
  result.facts = machine->facts();
  result.threads = build_info().cpu_threads;
  return result;
}

}  // namespace dca::bench
