#include "random_cases.h"

#include <tuple>

namespace dca::testing {
namespace {

class Random : public ::testing::TestWithParam<std::tuple<DType, int32_t>> {};

TEST_P(Random, MatchesTheReference) {
  ProblemShape shape;
  shape.dtype = std::get<0>(GetParam());
  shape.head_dim = std::get<1>(GetParam());
  // Logits of hundreds are known to no more digits than fp32 has, and so would be the exponentials.
  const RandomLimits limits = {{1, 2, 7, 16, 32}, {1, 3, 16, 33, 64, 128}, {1.0f, 1.0f, 1.0f, 0.0f, -1.0f, 4.0f}, true};
  expect_random_cases_match(shape, limits, 8, [](const RandomCase&) { return true; });
}

INSTANTIATE_TEST_SUITE_P(, Random,
                         ::testing::Combine(::testing::Values(DType::Float32, DType::BFloat16, DType::Float16),
                                            ::testing::Values(64, 128)));

}  // namespace
}  // namespace dca::testing
