// rotate_keys and rotate_and_append_kv: every written element against the reference, every other one untouched.
#include <gtest/gtest.h>

#include <vector>

#include "append_problem.h"

namespace dca::testing {
namespace {

constexpr DType kDTypes[] = {DType::Float32, DType::BFloat16, DType::Float16};
TEST(Append, ContiguousCacheAcrossChunkBorders) {
  for (const DType dtype : kDTypes) {
    AppendShape shape;
    shape.dtype = dtype;
    for (const int32_t rows : {1, 5, 9}) {  // from 13: one row is inside the chunk, 5 cross its border
      shape.new_rows.assign(3, rows);
      AppendProblem(shape).expect_matches_reference();
    }
  }
}

TEST(Append, PagedCache) {
  for (const DType dtype : kDTypes) {
    for (const int32_t page_size : {1, 3, 16, 64}) {
      AppendShape shape;
      shape.dtype = dtype;
      shape.page_size = page_size;
      AppendProblem(shape).expect_matches_reference();
    }
  }
}

TEST(Append, RaggedRows) {
  AppendShape shape;
  shape.ragged = true;
  shape.new_rows = {1, 0, 17, 3};
  shape.before = {16, 40, 15, 0};
  AppendProblem(shape).expect_matches_reference();
  shape.page_size = 7;
  AppendProblem(shape).expect_matches_reference();
}

// Rows in front of position 0 are copied; the first one behind is at position 0.
TEST(Append, LeftPadding) {
  AppendShape shape;
  shape.leftpads = {3, 13, 0};
  AppendProblem(shape).expect_matches_reference();
}

TEST(Append, PartialAndInterleavedRotation) {
  for (const bool interleaved : {false, true}) {
    for (const int32_t half : {0, 1, 20, 40}) {
      AppendShape shape;
      shape.head_dim = 80;
      shape.half_rotary_dim = half;
      shape.interleaved = interleaved;
      AppendProblem(shape).expect_matches_reference();
    }
  }
}

TEST(Append, OneLengthForAllSequences) {
  AppendShape shape;
  shape.before = {13, 13, 13};
  AppendProblem problem(shape);
  problem.p.cache_seqlens = nullptr;
  problem.p.cache_seqlen = 13;
  problem.expect_matches_reference();
}

TEST(Append, FillsTheCacheToItsLastSlot) {
  AppendShape shape;
  shape.before = {35, 35, 35};
  AppendProblem(shape).expect_matches_reference();
}

// --- rotate_keys ---

TEST(AppendRotateKeys, MatchesTheReference) {
  for (const DType dtype : kDTypes) {
    for (const AppendShape& shape : shapes_to_rotate(dtype)) expect_rotated(shape);
  }
}

TEST(AppendRotateKeys, InPlace) {
  AppendProblem source({});
  RotateKeysParams p;
  p.chunk = source.shape.chunk;
  p.batch = 3;
  p.num_heads_kv = 2;
  p.head_dim = 64;
  p.seqlen_k = 5;
  p.k = source.k.ref();
  p.out = source.k.mutable_ref();
  p.rotary = source.p.rotary;
  const std::vector<double> exact = reference::rotate_keys(p);
  ASSERT_TRUE(rotate_keys(p).ok());
  EXPECT_TRUE(accepted(error_rule::rotation(source.k.values(), exact, kLargestInput, DType::Float32)));
}

// --- Prefill in one go, or through a cache ---

TEST(Append, KeysAppendedInStepsAreTheKeysAppendedAtOnce) {
  AppendShape shape;
  shape.new_rows = {35};
  shape.before = {0};
  AppendProblem at_once(shape);
  ASSERT_TRUE(rotate_and_append_kv(at_once.p).ok());
  AppendProblem in_steps(shape);
  for (int32_t row = 0; row < 35; ++row) {
    AppendParams p = in_steps.p;
    const int64_t bytes = row * p.k.stride.row * static_cast<int64_t>(element_size(p.dtype));
    p.k.data = static_cast<const char*>(p.k.data) + bytes;
    p.v.data = static_cast<const char*>(p.v.data) + bytes;
    p.seqlen_k = 1;
    p.cache_seqlens = nullptr;
    p.cache_seqlen = row;
    ASSERT_TRUE(rotate_and_append_kv(p).ok());
  }
  EXPECT_EQ(in_steps.k_cache.bytes(), at_once.k_cache.bytes());
  EXPECT_EQ(in_steps.v_cache.bytes(), at_once.v_cache.bytes());
}

}  // namespace
}  // namespace dca::testing
