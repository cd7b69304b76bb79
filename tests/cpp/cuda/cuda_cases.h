// What the CUDA tests share: dtypes, head_dims and architectures, and the skip for kernels that this build or device
// has not.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "attention_problem.h"

namespace dca::testing {

/// dtype, head_dim, and the architecture of the kernels, by DCA_CUDA_KERNELS.
using KernelCase = std::tuple<DType, int32_t, const char*>;

inline std::string name_of(const ::testing::TestParamInfo<KernelCase>& info) {
  return std::string(std::get<0>(info.param) == DType::BFloat16 ? "bf16" : "fp16") + "_dim" +
         std::to_string(std::get<1>(info.param));
}

/// Kernel cases that compared a result with the reference; main() prints it.
inline int kernel_cases = 0;

/// Why this build or device has no kernel for the shape; empty if it has one.
inline std::string missing_kernel(const ProblemShape& shape) {
  AttentionProblem problem(shape);
  AttentionParams p = problem.params();
  p.exec.device = Device::Cuda;
  std::string kernel;
  const Status status = describe_attention(p, &kernel);
  return status.code() == StatusCode::Unavailable ? status.message() : "";
}

inline void expect_matches_reference(const ProblemShape& shape, const std::vector<int32_t>& split_counts = {1},
                                     const char* what = "") {
  AttentionProblem problem(shape);
  EXPECT_TRUE(problem.matches_reference(problem.params(), split_counts)) << what;
  kernel_cases += static_cast<int>(split_counts.size());
}

/// Kernels load whole blocks of rows, and a weight of 0 does not hide a NaN: one sequence must not spoil the next.
inline void expect_nan_stays_in_its_sequence(ProblemShape s) {
  s.kv_lens = {40, 60, 200};
  s.q_lens.clear();
  s.ragged_q = true;
  s.keys = KeyLayout::Ragged;
  AttentionProblem problem(s);
  AttentionParams p = problem.params();
  for (int64_t row = 0; row < 40; ++row) {
    for (int32_t head = 0; head < s.num_heads_kv; ++head) {
      const int64_t offset = row * p.v.stride.row + head * p.v.stride.head;
      for (int32_t c = 0; c < s.head_dim; ++c) {
        reference::write(const_cast<void*>(p.v.data), dtype_of_cache(p), offset + c,
                         std::numeric_limits<double>::quiet_NaN());
      }
    }
  }
  EXPECT_TRUE(problem.matches_reference(p, {1, 2}));
  kernel_cases += 2;
}

/// expect_matches_reference() with a softmax scale: how far apart logits lie.
inline void expect_matches_reference_scaled(const ProblemShape& shape, float softmax_scale,
                                            const std::vector<int32_t>& split_counts) {
  AttentionProblem problem(shape);
  AttentionParams p = problem.params();
  p.softmax_scale = softmax_scale;
  EXPECT_TRUE(problem.matches_reference(p, split_counts));
  kernel_cases += static_cast<int>(split_counts.size());
}

/// Logits so far apart that the maximum of a row moves by many powers of two from block to block.
inline void expect_maxima_may_move_far(ProblemShape s, int32_t rows) {
  s.kv_lens = {300};
  s.q_lens = {rows};
  expect_matches_reference_scaled(s, 2.0f, {1, 2});
}

/// Logits so far apart that no dtype holds the weight of a later key relative to the first block's largest: what
/// prefill has trusted was wrong. Many heads, so that a CTA meets such tiles one after the other.
inline void expect_tiles_may_be_computed_again(ProblemShape s, int32_t heads, int32_t tokens) {
  s.num_heads = heads;
  s.num_heads_kv = 1;
  s.chunk = {128, 150};
  s.kv_lens = {tokens};
  expect_matches_reference_scaled(s, 30.0f, {1, 2});
}

/// Queries for which all keys have one logit, the last `rows` of a sequence of `keys`: the LSE is that logit + ln(keys
/// in sight). A block must leave no error of its own in the running sum, or some hundred of them add up: in sight with
/// logits of some hundred, where one rounding is 6e-5.
inline void expect_sums_without_drift(const ProblemShape& kernel, int32_t rows, int32_t keys, float logit) {
  constexpr ChunkGeometry kChunk{5000, 6000};
  const auto filled = [&](int64_t count, double value) {
    std::vector<uint16_t> bits(static_cast<size_t>(count * kernel.head_dim));
    for (int64_t i = 0; i < count * kernel.head_dim; ++i) reference::write(bits.data(), kernel.dtype, i, value);
    return bits;
  };
  const std::vector<uint16_t> q = filled(rows, 1.375), k = filled(keys, 1.0), v = k;
  std::vector<uint16_t> out(q.size());
  std::vector<float> lse(static_cast<size_t>(rows));
  const size_t table = static_cast<size_t>((kChunk.max_position + 1) * (kernel.head_dim / 2));
  const std::vector<float> cos(table, 1.0f), sin(table, 0.0f);  // no rotation
  const Strides stride{0, kernel.head_dim, 0};
  AttentionParams p;
  p.exec.device = Device::Cuda;
  p.dtype = kernel.dtype;
  p.chunk = kChunk;
  p.batch = p.num_heads = p.num_heads_kv = 1;
  p.head_dim = kernel.head_dim;
  p.seqlen_q = rows;
  p.seqlen_k = p.cache_seqlen = keys;
  p.q = {q.data(), stride};
  p.k = {k.data(), stride};
  p.v = {v.data(), stride};
  p.out = {out.data(), stride};
  p.lse = lse.data();
  p.rotary = {cos.data(), sin.data(), kChunk.max_position + 1, kernel.head_dim / 2, false};
  p.num_splits = 1;
  p.softmax_scale = logit / (1.375f * static_cast<float>(kernel.head_dim));
  ASSERT_TRUE(run_operator(p, {buffer_of(q), buffer_of(k), buffer_of(v), buffer_of(out), buffer_of(lse), buffer_of(cos),
                               buffer_of(sin)})
                  .ok());
  const double exact_logit = 1.375 * kernel.head_dim * static_cast<double>(p.softmax_scale);
  for (int32_t row = 0; row < rows; ++row) {
    const double expected = exact_logit + std::log(keys - rows + row + 1);
    EXPECT_NEAR(lse[static_cast<size_t>(row)], expected, 8 * error_rule::ulp(expected, DType::Float32))
        << "row " << row;
  }
  ++kernel_cases;
}

/// Tests of one dtype, head_dim and architecture; skipped where there is no such kernel.
class CudaKernelTest : public ::testing::TestWithParam<KernelCase> {
 protected:
  void SetUp() override {
    if (const char* set = std::getenv(kVariable)) before_ = set;
    // A variant that the environment asks for takes the place of its architecture.
    const std::string architecture = std::get<2>(GetParam());
    if (before_.rfind(architecture + ":", 0) != 0) setenv(kVariable, architecture.c_str(), 1);
    const std::string why = missing_kernel(needed());
    if (!why.empty()) GTEST_SKIP() << why;
  }

  void TearDown() override {
    if (before_.empty()) {
      unsetenv(kVariable);
    } else {
      setenv(kVariable, before_.c_str(), 1);
    }
  }

  /// A shape whose kernel the tests need.
  virtual ProblemShape needed() const { return shape(); }

  ProblemShape shape() const {
    ProblemShape s;
    s.dtype = std::get<0>(GetParam());
    s.head_dim = std::get<1>(GetParam());
    s.kv_lens = {33};
    return s;
  }

  /// Head counts of a group: 8 on 1, else twice the group on 2.
  ProblemShape shape(int32_t group) const {
    ProblemShape s = shape();
    s.num_heads_kv = group >= 8 ? 1 : 2;
    s.num_heads = group * s.num_heads_kv;
    return s;
  }

 private:
  static constexpr const char* kVariable = "DCA_CUDA_KERNELS";
  std::string before_;
};

#define DCA_INSTANTIATE_KERNEL_TESTS(Architecture, architecture, Suite, ...)                                    \
  INSTANTIATE_TEST_SUITE_P(Architecture, Suite,                                                                 \
                           ::testing::Combine(::testing::Values(DType::BFloat16, DType::Float16),               \
                                              ::testing::Values(__VA_ARGS__), ::testing::Values(architecture)), \
                           name_of)
#define DCA_TEST_SM80(Suite, ...) DCA_INSTANTIATE_KERNEL_TESTS(Sm80, "sm80", Suite, __VA_ARGS__)
#define DCA_TEST_SM90(Suite, ...) DCA_INSTANTIATE_KERNEL_TESTS(Sm90, "sm90", Suite, __VA_ARGS__)
// Prefill's larger tiles, whatever the number of tiles.
#define DCA_TEST_SM90_LARGE(Suite) DCA_INSTANTIATE_KERNEL_TESTS(Sm90Large, "sm90:three_consumers", Suite, 64)

}  // namespace dca::testing
