#include "verification.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <vector>

#include "error_rule.h"
#include "reference.h"

namespace dca::bench {
namespace {

constexpr int32_t kAll = 512;  // rows that are compared without choosing
constexpr double kLargestInt8 = 127.0;

std::string require_verdict(const error_rule::Verdict& verdict) {
  if (!verdict.ok) throw std::runtime_error("--verify: " + verdict.message);
  return verdict.message;
}

// Of a row that was made in fp32.
void require_scale(const char* name, double actual, double exact) {
  if (std::fabs(actual - exact) <= 4e-7 * exact) return;
  throw std::runtime_error(std::string("--verify: ") + name + " is " + std::to_string(actual) + ", not " +
                           std::to_string(exact));
}

// `rows` from row `begin` of every sequence on.
ConstTensorRef from_row(const ConstTensorRef& rows, int64_t begin, DType dtype) {
  const int64_t bytes = begin * rows.stride.row * static_cast<int64_t>(element_size(dtype));
  return {static_cast<const char*>(rows.data) + bytes, rows.stride};
}

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

std::string verify_new_rows(const AppendParams& whole, int32_t begin, int32_t count, const Tensor& k_cache,
                            const Tensor& v_cache) {
  AppendParams p = whole;
  p.k = from_row(p.k, begin, p.dtype);
  p.v = from_row(p.v, begin, p.dtype);
  p.seqlen_k = count;
  p.cache_seqlen = begin;
  const DType dtype = dtype_of_cache(p);
  std::vector<double> actual, exact;
  for (const auto& row : reference::rotate_and_append_kv(p)) {
    for (int32_t c = 0; c < p.head_dim; ++c) {
      actual.push_back(k_cache.at(row.k_offset + c));
      const double value = v_cache.at(row.v_offset + c);
      const double exact_value = row.value[static_cast<size_t>(c)];
      if (dtype == DType::Int8) {  // a quotient that fp32 has rounded already
        require_verdict(error_rule::rotation({value}, {exact_value}, kLargestInt8, dtype));
      } else if (value != reference::round_to(exact_value, dtype)) {
        throw std::runtime_error("--verify: v_cache differs from v");
      }
    }
    exact.insert(exact.end(), row.key.begin(), row.key.end());
    if (dtype == DType::Int8) {
      require_scale("k_scale", p.k_scale_out.data[row.k_scale_offset], row.k_scale);
      require_scale("v_scale", p.v_scale_out.data[row.v_scale_offset], row.v_scale);
    }
  }
  return require_verdict(error_rule::rotation(actual, exact, dtype == DType::Int8 ? kLargestInt8 : 1.0, dtype));
}

}  // namespace

std::string verify_attention(const AttentionParams& p, const Tensor& out) {
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

// Long appends are compared at both ends.
std::string verify_append(const AppendParams& p, const Tensor& k_cache, const Tensor& v_cache) {
  const int32_t count = std::min(p.seqlen_k, kAll);
  verify_new_rows(p, 0, count, k_cache, v_cache);
  return "first and last rows: " + verify_new_rows(p, p.seqlen_k - count, count, k_cache, v_cache);
}

std::string verify_merge(const MergeParams& p, const Tensor& out) {
  const auto exact = reference::merge_attention_states(p);
  std::vector<double> actual;
  for (int64_t i = 0; i < out.count; ++i) actual.push_back(out.at(i));
  // A weighted sum in fp32, rounded once: the same rule as for a rotation.
  return "all rows: " + require_verdict(error_rule::rotation(actual, exact.out, p.num_parts, p.dtype));
}

}  // namespace dca::bench
