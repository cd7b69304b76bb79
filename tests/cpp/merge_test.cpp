// merge_attention_states alone, and the three segments merged into the whole.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "merge_problem.h"

namespace dca::testing {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr DType kDTypes[] = {DType::Float32, DType::BFloat16, DType::Float16};

TEST(Merge, WeighsPartsByTheirLse) {
  for (const DType dtype : kDTypes) {
    for (const int32_t num_parts : {1, 2, 3, 5}) MergeProblem(dtype, num_parts, 2, 7, 3, 80).expect_matches_reference();
  }
}

TEST(Merge, OddShapes) {
  MergeProblem(DType::Float32, 2, 1, 1, 1, 1).expect_matches_reference();
  MergeProblem(DType::BFloat16, 2, 1, 131, 2, 7).expect_matches_reference();
}

TEST(Merge, PartsWithoutKeysCarryNoWeightWhateverTheirOutHolds) {
  for (const DType dtype : kDTypes) {
    MergeProblem problem(dtype, 3, 1, 6, 2, 64);
    for (int64_t r = 0; r < 6; ++r) {
      for (int32_t head = 0; head < 2; ++head) {
        for (int32_t part = 0; part < 3; ++part) {
          if (((r + 1) >> part & 1) != 0) continue;  // row r keeps the parts of the bits of r + 1
          problem.lses[part][head * 6 + r] = -kInfinity;
          for (int32_t c = 0; c < 64; ++c) {
            reference::write(problem.outs[part].data(), dtype, (r * 2 + head) * 64 + c, kNaN);
          }
        }
      }
    }
    problem.expect_matches_reference();
  }
}

TEST(Merge, AllPartsWithoutKeysGiveZero) {
  MergeProblem problem(DType::BFloat16, 2, 1, 3, 2, 64);
  for (auto& lse : problem.lses) std::fill(lse.begin(), lse.end(), -kInfinity);
  ASSERT_TRUE(merge_attention_states(problem.p).ok());
  for (const double x : problem.out_values()) EXPECT_EQ(x, 0.0);
  for (const float x : problem.lse) EXPECT_EQ(x, -kInfinity);
}

TEST(Merge, FarApartPartsDoNotOverflow) {
  MergeProblem problem(DType::Float32, 2, 1, 4, 1, 64);
  std::fill(problem.lses[0].begin(), problem.lses[0].end(), 2000.0f);
  std::fill(problem.lses[1].begin(), problem.lses[1].end(), -2000.0f);
  problem.expect_matches_reference();
}

TEST(Merge, NaNIsNotHidden) {
  MergeProblem problem(DType::Float32, 2, 1, 2, 1, 8);
  problem.lses[0][1] = kNaN;
  problem.lses[1][1] = -kInfinity;
  ASSERT_TRUE(merge_attention_states(problem.p).ok());
  EXPECT_FALSE(std::isnan(problem.lse[0]));
  EXPECT_TRUE(std::isnan(problem.lse[1]));
}

// --- Segments ---

ProblemShape segment_shape(DType dtype) {
  ProblemShape shape;
  shape.dtype = dtype;
  shape.kv_lens = {53, 33, 17, 5};
  shape.q_lens = {20, 20, 20, 20};
  return shape;
}

TEST(AttentionSegments, EachAloneMatchesTheReference) {
  for (const DType dtype : kDTypes) {
    AttentionProblem problem(segment_shape(dtype));
    for (const auto segment : {SegmentSelection::Intra, SegmentSelection::Successive, SegmentSelection::Inter}) {
      AttentionParams p = problem.params();
      p.segments = segment;
      EXPECT_TRUE(problem.matches_reference(p, {1, 3})) << "segment " << static_cast<int>(segment);
    }
  }
}

TEST(AttentionSegments, MergedTheyAreTheWhole) {
  AttentionProblem problem(segment_shape(DType::Float32));
  const AttentionParams whole = problem.params();
  const auto exact = reference::attention(whole);
  MergeProblem merge(DType::Float32, 3, whole.batch, whole.seqlen_q, whole.num_heads, whole.head_dim);
  for (int32_t s = 0; s < kNumSegments; ++s) {
    AttentionParams p = problem.params();
    p.segments = static_cast<SegmentSelection>(s);
    ASSERT_TRUE(attention(p).ok());
    const std::vector<double> out = problem.out();
    const std::vector<double> lse = problem.lse();
    for (size_t i = 0; i < out.size(); ++i) {
      reference::write(merge.outs[s].data(), DType::Float32, static_cast<int64_t>(i), out[i]);
    }
    merge.lses[s].assign(lse.begin(), lse.end());
    merge.lse_pointers[s] = merge.lses[s].data();
  }
  ASSERT_TRUE(merge_attention_states(merge.p).ok());
  EXPECT_TRUE(accepted(error_rule::attention(merge.out_values(), exact.out, {}, DType::Float32)));
  EXPECT_TRUE(accepted(error_rule::lse({merge.lse.begin(), merge.lse.end()}, exact.lse)));
}

}  // namespace
}  // namespace dca::testing
