#include "workloads.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <functional>
#include <random>
#include <stdexcept>

#include "ceilings.h"
#include "dca/dca.h"
#include "error_rule.h"
#include "reference.h"

namespace dca::bench {
namespace {

void require(const Status& status) {
  if (!status.ok()) throw std::runtime_error(status.message());
}

// (batch, rows, heads, head_dim), contiguous.
struct Tensor {
  DType dtype;
  Strides stride;
  std::vector<char> bytes;

  Tensor(DType type, int64_t batch, int64_t rows, int64_t heads, int64_t dim)
      : dtype(type),
        stride{rows * heads * dim, heads * dim, dim},
        bytes(static_cast<size_t>(batch * rows * heads * dim) * element_size(type)) {}

  // Uniform in [-1, 1): a plain generator, since buffers have up to 10^9 elements.
  void randomize(uint64_t seed) {
    uint64_t state = seed;
    for (int64_t i = 0, n = static_cast<int64_t>(bytes.size() / element_size(dtype)); i < n; ++i) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      reference::write(bytes.data(), dtype, i, static_cast<double>(static_cast<int64_t>(state >> 11)) * 0x1p-52 - 1.0);
    }
  }
  ConstTensorRef ref() const { return {bytes.data(), stride}; }
  TensorRef mutable_ref() { return {bytes.data(), stride}; }
  std::pair<void*, size_t> buffer() { return {bytes.data(), bytes.size()}; }
  double at(int64_t index) const { return reference::read(bytes.data(), dtype, index); }
};

struct RotaryBuffers {
  std::vector<float> cos, sin;
  RotaryTables tables;

  explicit RotaryBuffers(const Options& o) {
    const int64_t half = o.head_dim / 2;
    for (int64_t position = 0; position <= o.max_position; ++position) {
      for (int64_t c = 0; c < half; ++c) {
        const double frequency = std::pow(10000.0, -static_cast<double>(c) / static_cast<double>(half));
        const double angle = static_cast<double>(position) * frequency;
        cos.push_back(static_cast<float>(std::cos(angle)));
        sin.push_back(static_cast<float>(std::sin(angle)));
      }
    }
    cos.push_back(0.0f);  // head_dim 1 has no pair, and the library wants a pointer
    sin.push_back(0.0f);
    tables = {cos.data(), sin.data(), o.max_position + 1, static_cast<int32_t>(half), false};
  }
};

std::vector<double> time_runs(const Options& o, const std::function<Status()>& call) {
  std::vector<double> seconds;
  for (int64_t run = -o.warmup; run < o.repeat; ++run) {
    const auto start = std::chrono::steady_clock::now();
    require(call());
    const auto end = std::chrono::steady_clock::now();
    if (run >= 0) seconds.push_back(std::chrono::duration<double>(end - start).count());
  }
  return seconds;
}

template <class Params>
Params common_params(const Options& o, const RotaryBuffers& rotary) {
  Params p;
  p.dtype = o.dtype;
  p.chunk = {static_cast<int32_t>(o.chunk_len), static_cast<int32_t>(o.max_position)};
  p.batch = static_cast<int32_t>(o.batch);
  p.num_heads_kv = static_cast<int32_t>(o.kv_heads);
  p.head_dim = static_cast<int32_t>(o.head_dim);
  p.seqlen_k = static_cast<int32_t>(o.seqlen);
  p.rotary = rotary.tables;
  return p;
}

AttentionParams attention_params(const Options& o, const RotaryBuffers& rotary, const Tensor& q, const Tensor& k,
                                 const Tensor& v, Tensor& out, int64_t rows) {
  AttentionParams p = common_params<AttentionParams>(o, rotary);
  p.num_heads = static_cast<int32_t>(o.heads);
  p.seqlen_q = static_cast<int32_t>(rows);
  p.cache_seqlen = p.seqlen_k;
  p.q = q.ref();
  p.k = k.ref();
  p.v = v.ref();
  p.out = out.mutable_ref();
  p.softmax_scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(o.head_dim)));
  p.num_splits = static_cast<int32_t>(o.splits);
  return p;
}

// --- Verification ---

std::string require_verdict(const error_rule::Verdict& verdict) {
  if (!verdict.ok) throw std::runtime_error("--verify: " + verdict.message);
  return verdict.message;
}

// `rows` from row `begin` of every sequence on.
ConstTensorRef from_row(const ConstTensorRef& rows, int64_t begin, DType dtype) {
  const int64_t bytes = begin * rows.stride.row * static_cast<int64_t>(element_size(dtype));
  return {static_cast<const char*>(rows.data) + bytes, rows.stride};
}

// The reference is slow, so of long prompts only the rows [begin, begin + count) are compared.
std::string verify_rows(const AttentionParams& whole, const Tensor& out, int32_t begin, int32_t count) {
  AttentionParams p = whole;
  p.q = from_row(p.q, begin, p.dtype);
  p.seqlen_q = count;
  p.cache_seqlen = p.cache_seqlen - whole.seqlen_q + begin + count;
  const auto exact = reference::attention(p);
  const auto baseline = p.dtype == DType::Float32 ? reference::AttentionResult{} : reference::attention_baseline(p);
  std::vector<double> actual;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t first = b * out.stride.batch + begin * out.stride.row;
    for (int64_t i = 0; i < count * out.stride.row; ++i) actual.push_back(out.at(first + i));
  }
  return require_verdict(error_rule::attention(actual, exact.out, baseline.out, p.dtype));
}

std::string verify_attention(const AttentionParams& p, const Tensor& out) {
  constexpr int32_t kAll = 512;  // rows that are compared without choosing
  if (p.seqlen_q <= kAll) return "all rows: " + verify_rows(p, out, 0, p.seqlen_q);
  std::string last;
  // The first rows, those around every kind of border, and the last.
  const int64_t n = p.chunk.chunk_len;
  for (const int64_t begin : {int64_t{0}, n - 1, static_cast<int64_t>(p.chunk.max_position), 2 * n - 1, 3 * n - 1,
                              static_cast<int64_t>(p.seqlen_q) - 2}) {
    if (begin + 2 <= p.seqlen_q) last = verify_rows(p, out, static_cast<int32_t>(begin), 2);
  }
  return "rows at the borders: " + last;
}

std::string verify_new_rows(const AppendParams& whole, int32_t begin, int32_t count, const Tensor& k_cache,
                            const Tensor& v_cache) {
  AppendParams p = whole;
  p.k = from_row(p.k, begin, p.dtype);
  p.v = from_row(p.v, begin, p.dtype);
  p.seqlen_k = count;
  p.cache_seqlen = begin;
  std::vector<double> keys, exact_keys;
  for (const auto& row : reference::rotate_and_append_kv(p)) {
    for (int32_t c = 0; c < p.head_dim; ++c) {
      keys.push_back(k_cache.at(row.k_offset + c));
      const bool copied = v_cache.at(row.v_offset + c) == row.value[static_cast<size_t>(c)];
      if (!copied) throw std::runtime_error("--verify: v_cache differs from v");
    }
    exact_keys.insert(exact_keys.end(), row.key.begin(), row.key.end());
  }
  return require_verdict(error_rule::rotation(keys, exact_keys, 1.0, p.dtype));
}

// Long appends are compared at both ends.
std::string verify_append(const AppendParams& p, const Tensor& k_cache, const Tensor& v_cache) {
  const int32_t count = std::min(p.seqlen_k, 512);
  verify_new_rows(p, 0, count, k_cache, v_cache);
  return "first and last rows: " + verify_new_rows(p, p.seqlen_k - count, count, k_cache, v_cache);
}

// --- The operations ---

Result run_prefill(const Options& o, const RotaryBuffers& rotary) {
  Tensor q(o.dtype, o.batch, o.seqlen, o.heads, o.head_dim), out = q;
  Tensor k(o.dtype, o.batch, o.seqlen, o.kv_heads, o.head_dim), v = k, k_rotated = k;
  q.randomize(1);
  k.randomize(2);
  v.randomize(3);
  RotateKeysParams keys = common_params<RotateKeysParams>(o, rotary);
  keys.k = k.ref();
  keys.out = k_rotated.mutable_ref();
  const AttentionParams p = attention_params(o, rotary, q, k_rotated, v, out, o.seqlen);
  Result result;
  require(describe_attention(p, &result.kernel));
  result.rotate_keys_seconds = quantile(time_runs(o, [&] { return rotate_keys(keys); }), 0.5);
  result.seconds = time_runs(o, [&] { return attention(p); });
  const double pairs = 0.5 * static_cast<double>(o.seqlen) * static_cast<double>(o.seqlen + 1);
  result.work = 4.0 * static_cast<double>(o.batch * o.heads * o.head_dim) * pairs;
  result.work_unit = "FLOP";
  result.ceiling = measure_fma_peak(build_info().cpu_threads);
  result.ceiling_name = "fp32 FMA peak";
  if (o.verify) result.verified = verify_attention(p, out);
  return result;
}

Result run_decode(const Options& o, const RotaryBuffers& rotary) {
  Tensor q(o.dtype, o.batch, 1, o.heads, o.head_dim), out = q;
  Tensor k(o.dtype, o.batch, o.seqlen, o.kv_heads, o.head_dim), v = k;  // any keys are rotated keys of some others
  q.randomize(1);
  k.randomize(2);
  v.randomize(3);
  const AttentionParams p = attention_params(o, rotary, q, k, v, out, 1);
  Result result;
  require(describe_attention(p, &result.kernel));
  result.seconds = time_runs(o, [&] { return attention(p); });
  result.work = static_cast<double>(k.bytes.size() + v.bytes.size());
  result.work_unit = "B";
  result.ceiling = measure_read_bandwidth({k.buffer(), v.buffer()}, build_info().cpu_threads);
  result.ceiling_name = "reading the same K and V";
  if (o.verify) result.verified = verify_attention(p, out);
  return result;
}

Result run_append(const Options& o, const RotaryBuffers& rotary) {
  Tensor k(o.dtype, o.batch, o.seqlen, o.kv_heads, o.head_dim), v = k, k_cache = k, v_cache = k;
  k.randomize(2);
  v.randomize(3);
  AppendParams p = common_params<AppendParams>(o, rotary);
  p.cache_slots = p.seqlen_k;
  p.k = k.ref();
  p.v = v.ref();
  p.k_cache = k_cache.mutable_ref();
  p.v_cache = v_cache.mutable_ref();
  Result result;
  result.kernel = std::string("cpu/") + build_info().cpu_isa + "/append";
  result.seconds = time_runs(o, [&] { return rotate_and_append_kv(p); });
  result.work = 2.0 * static_cast<double>(k.bytes.size() + v.bytes.size());
  result.work_unit = "B";
  if (o.verify) result.verified = verify_append(p, k_cache, v_cache);  // before the copy overwrites the caches
  const Buffers caches = {k_cache.buffer(), v_cache.buffer()};
  result.ceiling = measure_copy_bandwidth({k.buffer(), v.buffer()}, caches, build_info().cpu_threads);
  result.ceiling_name = "copying K and V";
  return result;
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
  const RotaryBuffers rotary(options);
  Result result = options.operation == Operation::Prefill  ? run_prefill(options, rotary)
                  : options.operation == Operation::Decode ? run_decode(options, rotary)
                                                           : run_append(options, rotary);
  result.threads = build_info().cpu_threads;
  return result;
}

}  // namespace dca::bench
