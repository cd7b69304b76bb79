// Nothing to do is legal: an empty result, no work, and no look at pointers that may be null.
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "attention_problem.h"

namespace dca::testing {
namespace {

TEST(Empty, AttentionOfNoSequences) {
  ProblemShape shape;
  shape.kv_lens = {};
  AttentionProblem problem(shape);
  EXPECT_TRUE(attention(problem.params()).ok());
  shape.ragged_q = true;
  shape.keys = KeyLayout::Ragged;
  AttentionProblem ragged(shape);
  EXPECT_TRUE(attention(ragged.params()).ok());
}

TEST(Empty, AttentionOfNoRows) {
  ProblemShape shape;
  shape.kv_lens = {33, 5};
  shape.q_lens = {0, 0};
  AttentionProblem uniform(shape);
  AttentionParams p = uniform.params();
  p.q.data = nullptr;
  p.out.data = nullptr;
  EXPECT_TRUE(attention(p).ok());
  size_t bytes = 1;
  EXPECT_TRUE(attention_workspace_bytes(p, &bytes).ok());
  EXPECT_EQ(bytes, 0u);
  shape.ragged_q = true;
  AttentionProblem ragged(shape);
  EXPECT_TRUE(attention(ragged.params()).ok());
}

TEST(Empty, RowsWithoutKeysGiveZeroAndMinusInfinity) {
  for (const int32_t num_splits : {0, 1, 3}) {
    ProblemShape shape;
    shape.kv_lens = {0, 0};
    shape.q_lens = {3, 3};
    AttentionProblem problem(shape);
    AttentionParams p = problem.params();
    p.num_splits = num_splits;
    p.k.data = nullptr;  // no key, so nothing to point to
    p.v.data = nullptr;
    p.seqlen_k = 0;
    ASSERT_TRUE(attention(p).ok());
    for (const double x : problem.out()) EXPECT_EQ(x, 0.0);
    for (const double x : problem.lse()) EXPECT_EQ(x, -INFINITY);
  }
}

TEST(Empty, NoNewKeys) {
  const Tables tables(2, 1);
  AppendParams append;
  append.num_heads_kv = 1;
  append.head_dim = 2;
  append.rotary = {tables.cos.data(), tables.sin.data(), 2, 1, false};
  EXPECT_TRUE(rotate_and_append_kv(append).ok()) << "batch 0";
  append.batch = 3;
  EXPECT_TRUE(rotate_and_append_kv(append).ok()) << "no rows";
  RotateKeysParams rotate;
  rotate.num_heads_kv = 1;
  rotate.head_dim = 2;
  rotate.rotary = append.rotary;
  EXPECT_TRUE(rotate_keys(rotate).ok()) << "batch 0";
  rotate.batch = 3;
  EXPECT_TRUE(rotate_keys(rotate).ok()) << "no rows";
}

TEST(Empty, MergeOfNoRows) {
  MergeParams p;
  p.num_parts = 2;
  p.num_heads = 1;
  p.head_dim = 8;
  EXPECT_TRUE(merge_attention_states(p).ok()) << "batch 0";
  p.batch = 4;
  EXPECT_TRUE(merge_attention_states(p).ok()) << "no rows";
}

}  // namespace
}  // namespace dca::testing
