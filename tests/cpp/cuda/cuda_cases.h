// What the CUDA tests share: dtypes and head_dims, and the skip for kernels that a reduced build has not.
#pragma once

#include <gtest/gtest.h>

#include <string>
#include <tuple>
#include <vector>

#include "attention_problem.h"

namespace dca::testing {

using DtypeAndHeadDim = std::tuple<DType, int32_t>;

inline std::string name_of(const ::testing::TestParamInfo<DtypeAndHeadDim>& info) {
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

/// Tests of one dtype and head_dim; skipped where the build has no such kernel.
class CudaKernelTest : public ::testing::TestWithParam<DtypeAndHeadDim> {
 protected:
  void SetUp() override {
    const std::string why = missing_kernel(shape());
    if (!why.empty()) GTEST_SKIP() << why;
  }

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
};

#define DCA_INSTANTIATE_KERNEL_TESTS(Suite, ...) \
  INSTANTIATE_TEST_SUITE_P(                      \
      Sm80, Suite,                               \
      ::testing::Combine(::testing::Values(DType::BFloat16, DType::Float16), ::testing::Values(__VA_ARGS__)), name_of)

}  // namespace dca::testing
