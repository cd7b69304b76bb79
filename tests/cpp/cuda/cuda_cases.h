// What the CUDA tests share: dtypes, head_dims and architectures, and the skip for kernels that this build or device
// has not.
#pragma once

#include <gtest/gtest.h>

#include <cstdlib>
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

}  // namespace dca::testing
