// Caches of 8-bit floating point: every code, rounding and saturation, scales, and attention over them in all layouts.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "e4m3_problem.h"

namespace dca::testing {
namespace {

constexpr DType kDTypes[] = {DType::Float32, DType::BFloat16, DType::Float16};

// --- The format ---

TEST(E4M3, TheReferenceReadsAndWritesEveryCode) {
  for (int32_t code = 0; code < kCodes; ++code) {
    uint8_t copy = 0x55;
    reference::write(&copy, DType::Float8E4M3, 0, value_of(code));
    if (std::isnan(value_of(code))) {
      EXPECT_EQ(code & 0x7f, 0x7f);
      EXPECT_TRUE(std::isnan(value_of(copy)));
    } else {
      EXPECT_EQ(copy, code);
    }
  }
  EXPECT_EQ(value_of(0x01), 0x1p-9);
  EXPECT_EQ(value_of(0x07), 0x7p-9);
  EXPECT_EQ(value_of(0x08), 0x1p-6);
  EXPECT_EQ(value_of(0x3c), 1.5);
  EXPECT_EQ(value_of(0xfe), -448.0);
  const double infinity = std::numeric_limits<double>::infinity();
  EXPECT_EQ(reference::round_to(465.0, DType::Float8E4M3), 448.0) << "there is no infinity";
  EXPECT_EQ(reference::round_to(-infinity, DType::Float8E4M3), -448.0);
  EXPECT_EQ(reference::round_to(17.0, DType::Float8E4M3), 16.0) << "ties to even";
  EXPECT_EQ(reference::round_to(19.0, DType::Float8E4M3), 20.0) << "ties to even";
  EXPECT_EQ(reference::round_to(0x1p-10, DType::Float8E4M3), 0.0) << "subnormal, ties to even";
}

// --- What the kernels read and append writes ---

// One row reads keys and values where they lie, a long group a packed block of keys and a converted block of values.
TEST(E4M3, EveryCodeSurvivesTheLoads) {
  for (const DType dtype : kDTypes) {
    for (const int32_t group : {1, 2, 3, 6, 32}) CodesProblem(dtype, group, 64).expect_exact();
  }
}

TEST(E4M3, AppendRoundsOnceToNearestEvenAndSaturates) {
  RoundingProblem problem;
  problem.expect_rounds_to_nearest_even(1.0f, 0.25f);
  problem.expect_rounds_to_nearest_even(0.3f, 7.0f);
}

AppendShape appended(DType dtype, Scales scales) { return append_into(DType::Float8E4M3, scales, dtype); }

TEST(E4M3, AppendMatchesTheReference) {
  for (const DType dtype : kDTypes) {
    for (const Scales scales : kAllScales) expect_appends_match_reference(appended(dtype, scales));
  }
}

TEST(E4M3, AppendRotatesPartially) {
  expect_partial_rotations_match_reference(appended(DType::BFloat16, Scales::PerHead));
}

// --- Attention ---

ProblemShape cached(DType dtype, Scales scales, int32_t group, int32_t seqlen_q) {
  ProblemShape shape;
  shape.dtype = dtype;
  shape.cache_dtype = DType::Float8E4M3;
  shape.scales = scales;
  shape.num_heads = 2 * group;
  shape.kv_lens = {1, 2, 16, 17, 23, 24, 25, 32, 33, 48, 49, 53};  // n = 16, P = 23: around every kind of border
  shape.q_lens.assign(shape.kv_lens.size(), seqlen_q);
  return shape;
}

void expect_matches_reference(const ProblemShape& shape, const std::vector<int32_t>& split_counts = {1, 4}) {
  AttentionProblem problem(shape);
  EXPECT_TRUE(problem.matches_reference(problem.params(), split_counts));
}

TEST(E4M3, DecodeAndSeveralTokens) {
  for (const DType dtype : kDTypes) {
    for (const Scales scales : kAllScales) {
      for (const int32_t seqlen_q : {1, 5, 20}) {
        ProblemShape shape = cached(dtype, scales, 4, seqlen_q);
        expect_matches_reference(shape);
        shape.keys = KeyLayout::Paged;
        expect_matches_reference(shape);
      }
    }
  }
}

TEST(E4M3, LeftPaddingAndRaggedQueries) {
  ProblemShape shape = cached(DType::BFloat16, Scales::PerHead, 3, 1);
  for (const int32_t length : shape.kv_lens) shape.leftpads.push_back(60 - length);
  expect_matches_reference(shape);
  shape.keys = KeyLayout::Paged;
  expect_matches_reference(shape);
  shape.leftpads = {};
  shape.kv_lens = {53, 17, 40, 0, 33, 24};
  shape.q_lens = {1, 17, 9, 0, 2, 0};
  shape.ragged_q = true;
  expect_matches_reference(shape);
}

TEST(E4M3, HeadDimsThatFitNoVector) {
  for (const int32_t head_dim : {1, 20, 80, 128}) {
    ProblemShape shape = cached(DType::Float32, Scales::PerHead, 2, 2);
    shape.head_dim = head_dim;
    expect_matches_reference(shape);
  }
}

TEST(E4M3, SegmentsAlone) {
  for (const auto segment : {SegmentSelection::Intra, SegmentSelection::Successive, SegmentSelection::Inter}) {
    AttentionProblem problem(cached(DType::Float32, Scales::PerHead, 2, 5));
    AttentionParams p = problem.params();
    p.segments = segment;
    EXPECT_TRUE(problem.matches_reference(p, {1, 4}));
  }
}

TEST(E4M3, TemperatureAndScalesMultiply) {
  AttentionProblem problem(cached(DType::Float32, Scales::PerHead, 2, 5));
  AttentionParams p = problem.params();
  p.original_max_position_embeddings = 20;
  EXPECT_TRUE(problem.matches_reference(p, {1, 4}));
}

// --- Refusals ---

void expect_refused(const Status& status, const std::string& message) {
  EXPECT_EQ(status.code(), StatusCode::InvalidArgument);
  EXPECT_NE(status.message().find(message), std::string::npos) << status.message();
}

template <class Params, class Call>
void expect_scales_refused(Params p, Call call) {
  for (const float bad : {0.0f, -1.0f, std::nanf(""), std::numeric_limits<float>::infinity()}) {
    Params changed = p;
    changed.k_scale.value = bad;
    expect_refused(call(changed), "k_scale must be finite and above 0; got ");
    const std::vector<float> scales = {1.0f, bad};
    changed = p;
    changed.v_scale.data = scales.data();
    changed.v_scale.stride.head = 1;
    expect_refused(call(changed), "v_scale must be finite and above 0; got ");
  }
  Params changed = p;
  changed.k_scale.stride.head = 2;
  expect_refused(call(changed),
                 "k_scale of a Float8E4M3 cache must have a stride.head of 0 (one scale for all heads) or 1; got 2");
  changed = p;
  changed.v_scale.stride.row = 2;
  expect_refused(call(changed),
                 "v_scale of a Float8E4M3 cache must have a stride.batch and a stride.row of 0; got 0 and 2");
  changed = p;
  changed.cache_dtype = DType::BFloat16;
  expect_refused(call(changed), "cache_dtype must be Same, Float8E4M3 or Int8; got 1");
  changed = p;
  changed.cache_dtype = DType::Same;
  changed.v_scale.value = 2.0f;
  expect_refused(call(changed), "v_scale must be left out for a cache that is neither Float8E4M3 nor Int8");
}

TEST(E4M3, BadScalesAndFormatsAreRefused) {
  AttentionProblem problem(cached(DType::Float32, Scales::None, 2, 1));
  expect_scales_refused(problem.params(), [](const AttentionParams& p) { return attention(p); });
  AppendShape shape;
  shape.cache_dtype = DType::Float8E4M3;
  AppendProblem append(shape);
  expect_scales_refused(append.p, [](const AppendParams& p) { return rotate_and_append_kv(p); });
  for (const double x : append.k_cache.values()) ASSERT_TRUE(std::isnan(x)) << "a refused call has written nothing";
  AttentionParams p = problem.params();
  p.dtype = DType::Float8E4M3;
  expect_refused(attention(p), "dtype must be Float32, BFloat16 or Float16; got 3");
}

}  // namespace
}  // namespace dca::testing
