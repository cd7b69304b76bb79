// Random problems, far beyond the cases that somebody thought of: whatever shapes, layouts and factors a call may have.
//
//     DCA_RANDOM_CASES=1000 DCA_RANDOM_SEED=7 dca_cpp_tests --gtest_filter='*Random*'    (dca_cuda_tests as well)
//
// A case that fails says its seed: DCA_RANDOM_CASES=1 DCA_RANDOM_SEED=<that> is the case alone.
#pragma once

#include <functional>

#include "attention_problem.h"

namespace dca::testing {

/// What a device takes.
struct RandomLimits {
  std::vector<int32_t> head_dims_less;  ///< what a third of the cases take off the head_dim that is asked for
  std::vector<int32_t> page_sizes;
  std::vector<float> scale_factors;  ///< one of them times the softmax scale
  bool int8_caches = false;
};

/// One call with its parameters, whose result is compared for one number of splits.
struct RandomCase {
  ProblemShape shape;
  SegmentSelection segments = SegmentSelection::All;
  float scale_factor = 1.0f;  ///< of the softmax scale
  int32_t original_max_position_embeddings = 0;
  int32_t num_splits = 1;

  ::testing::AssertionResult matches_reference() const;
};

/// What `seed` stands for, with the dtype and head_dim of `shape`.
RandomCase draw_random_case(ProblemShape shape, const RandomLimits& limits, uint32_t seed);

/// Compares as many cases as the environment asks for, else `count`; visits those that `runs` takes.
void expect_random_cases_match(const ProblemShape& shape, const RandomLimits& limits, int count,
                               const std::function<bool(const RandomCase&)>& runs);

}  // namespace dca::testing
