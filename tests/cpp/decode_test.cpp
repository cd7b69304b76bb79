// Queries that end at the last cached token: one token, several, across chunk borders, mixed in one batch.
#include <gtest/gtest.h>

#include <vector>

#include "attention_problem.h"

namespace dca::testing {
namespace {

// n = 16, P = 23: one token at, before and behind every kind of border.
const std::vector<int32_t> kLengths = {1, 2, 16, 17, 23, 24, 25, 32, 33, 48, 49, 53};

void expect_matches_reference(const ProblemShape& shape, const std::vector<int32_t>& split_counts = {1, 4}) {
  AttentionProblem problem(shape);
  EXPECT_TRUE(problem.matches_reference(problem.params(), split_counts));
}

ProblemShape decode_shape(DType dtype, int32_t group) {
  ProblemShape shape;
  shape.dtype = dtype;
  shape.num_heads = 2 * group;
  shape.kv_lens = kLengths;
  shape.q_lens.assign(kLengths.size(), 1);
  return shape;
}

constexpr DType kDTypes[] = {DType::Float32, DType::BFloat16, DType::Float16};

TEST(Decode, OneToken) {
  for (const DType dtype : kDTypes) {
    for (const int32_t group : {1, 4, 8}) {
      expect_matches_reference(decode_shape(dtype, group));
      ProblemShape paged = decode_shape(dtype, group);
      paged.keys = KeyLayout::Paged;
      expect_matches_reference(paged);
    }
  }
}

TEST(Decode, OneTokenOverLeftPadding) {
  ProblemShape shape = decode_shape(DType::Float32, 4);
  for (const int32_t length : kLengths) shape.leftpads.push_back(60 - length);
  expect_matches_reference(shape);
  shape.keys = KeyLayout::Paged;  // whole pages of padding have no valid page id
  expect_matches_reference(shape);
}

TEST(Decode, SeveralTokensAcrossAChunkBorder) {
  for (const DType dtype : kDTypes) {
    for (const int32_t seqlen_q : {2, 5, 16, 17, 20}) {
      ProblemShape shape = decode_shape(dtype, 4);
      shape.q_lens.assign(kLengths.size(), seqlen_q);  // longer than some sequences: rows without a position
      expect_matches_reference(shape);
    }
  }
}

TEST(Decode, PrefillAndDecodeMixedInOneBatch) {
  ProblemShape shape;
  shape.kv_lens = {53, 17, 40, 0, 33, 24};
  shape.q_lens = {1, 17, 9, 0, 2, 0};
  shape.ragged_q = true;
  expect_matches_reference(shape);
  shape.keys = KeyLayout::Paged;
  expect_matches_reference(shape);
}

// Many more splits than keys, and splits whose window holds none of a row's keys.
TEST(Decode, MoreSplitsThanKeys) {
  ProblemShape shape = decode_shape(DType::Float32, 4);
  expect_matches_reference(shape, {2, 60, 256});
  shape.q_lens.assign(kLengths.size(), 20);
  expect_matches_reference(shape, {2, 60, 256});
}

TEST(Decode, LongCache) {
  for (const DType dtype : kDTypes) {
    ProblemShape shape;
    shape.dtype = dtype;
    shape.num_heads = 8;
    shape.chunk = {300, 415};
    shape.kv_lens = {1201, 700};
    shape.q_lens = {3, 3};
    expect_matches_reference(shape, {0, 1, 7});
  }
}

TEST(Decode, LengthsCountedBeforeTheAppend) {
  ProblemShape shape;
  shape.kv_lens = {33, 20};
  shape.q_lens = {4, 4};
  AttentionProblem problem(shape);
  AttentionParams p = problem.params();
  const std::vector<int32_t> before = {29, 16};
  p.cache_seqlens = before.data();
  p.cache_seqlens_before_append = true;
  EXPECT_TRUE(problem.matches_reference(p));
}

TEST(Decode, OneLengthForAllSequences) {
  ProblemShape shape;
  shape.kv_lens = {33, 33};
  shape.q_lens = {4, 4};
  AttentionProblem problem(shape);
  AttentionParams p = problem.params();
  p.cache_seqlens = nullptr;
  p.cache_seqlen = 33;
  EXPECT_TRUE(problem.matches_reference(p));
}

// --- The same rows, however the prefill is cut ---

// The rows [begin, end) of a prefill as a call of their own over the same cache.
std::vector<double> rows_alone(const AttentionParams& whole, int32_t begin, int32_t end, AttentionProblem& problem) {
  AttentionParams p = whole;
  const int64_t row_bytes = whole.q.stride.row * static_cast<int64_t>(element_size(p.dtype));
  p.q.data = static_cast<const char*>(p.q.data) + begin * row_bytes;
  p.out.data = static_cast<char*>(p.out.data) + begin * row_bytes;
  p.lse = nullptr;
  p.seqlen_q = end - begin;
  p.cache_seqlens = nullptr;
  p.cache_seqlen = end;
  EXPECT_TRUE(attention(p).ok());
  return problem.out();
}

TEST(Decode, AnySplitOfAPrefillIntoChunksIsThePrefill) {
  constexpr int32_t kLength = 53;
  ProblemShape shape;
  shape.kv_lens = {kLength};
  AttentionProblem problem(shape);
  ASSERT_TRUE(attention(problem.params()).ok());
  const std::vector<double> whole = problem.out();
  for (const int32_t step : {1, 2, 5, 15, 16, 17, 52}) {
    const AttentionParams p = problem.params();
    std::vector<double> pieces;
    for (int32_t begin = 0; begin < kLength; begin += step) {
      pieces = rows_alone(p, begin, std::min(begin + step, kLength), problem);
    }
    ASSERT_EQ(pieces.size(), whole.size());
    for (size_t i = 0; i < whole.size(); ++i) ASSERT_NEAR(pieces[i], whole[i], 1e-5) << "step " << step;
  }
}

}  // namespace
}  // namespace dca::testing
