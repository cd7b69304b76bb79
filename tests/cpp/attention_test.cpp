// Whole-sequence attention in every layout against the reference, at the lengths where something changes.
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#include "attention_problem.h"

namespace dca::testing {
namespace {

// n = 16, P = 23: chunk borders at 16, 32, 48; row 24 is the first that is not causal RoPE. All lengths are shorter
// than one block of 128 keys; ManyBlocks has the longer ones.
const std::vector<int32_t> kBorderLengths = {1, 2, 15, 16, 17, 24, 25, 31, 32, 33, 49, 53};

using Axes = std::tuple<DType, int32_t, int32_t>;  // dtype, head_dim, query heads per KV head

ProblemShape shape_of(const Axes& axes) {
  ProblemShape shape;
  shape.dtype = std::get<0>(axes);
  shape.head_dim = std::get<1>(axes);
  const int32_t group = std::get<2>(axes);
  shape.num_heads_kv = group == 8 ? 1 : 2;
  shape.num_heads = group * shape.num_heads_kv;
  return shape;
}

std::string name_of(const ::testing::TestParamInfo<Axes>& info) {
  const char* dtypes[] = {"fp32", "bf16", "fp16"};
  return std::string(dtypes[static_cast<int>(std::get<0>(info.param))]) + "_dim" +
         std::to_string(std::get<1>(info.param)) + "_group" + std::to_string(std::get<2>(info.param));
}

class Attention : public ::testing::TestWithParam<Axes> {
 protected:
  // One split and several; 0 would depend on the machine.
  void expect_matches_reference(const ProblemShape& shape) {
    AttentionProblem problem(shape);
    EXPECT_TRUE(problem.matches_reference(problem.params(), {1, 3}));
  }
};

TEST_P(Attention, Uniform) {
  ProblemShape shape = shape_of(GetParam());
  for (const int32_t length : {1, 17, 25, 33}) {
    shape.kv_lens = {length, length};
    expect_matches_reference(shape);
  }
}

TEST_P(Attention, Ragged) {
  ProblemShape shape = shape_of(GetParam());
  shape.kv_lens = kBorderLengths;
  shape.kv_lens.insert(shape.kv_lens.begin() + 3, 0);  // a sequence of no tokens
  shape.ragged_q = true;
  shape.keys = KeyLayout::Ragged;
  expect_matches_reference(shape);
}

TEST_P(Attention, Paged) {
  ProblemShape shape = shape_of(GetParam());
  shape.kv_lens = {53, 16, 1, 32};
  shape.ragged_q = true;
  shape.keys = KeyLayout::Paged;
  for (const int32_t page_size : {1, 7, 16}) {
    shape.page_size = page_size;
    expect_matches_reference(shape);
  }
}

TEST_P(Attention, LeftPadded) {
  ProblemShape shape = shape_of(GetParam());
  shape.kv_lens = {33, 17, 1, 0};
  shape.q_lens = {33, 33, 33, 33};
  shape.leftpads = {0, 16, 32, 33};
  expect_matches_reference(shape);
}

// Several key blocks and several query tiles per chunk; the last of each is cut at a border.
TEST_P(Attention, ManyBlocks) {
  ProblemShape shape = shape_of(GetParam());
  shape.chunk = {140, 209};
  shape.kv_lens = {293};
  expect_matches_reference(shape);
}

INSTANTIATE_TEST_SUITE_P(Matrix, Attention,
                         ::testing::Combine(::testing::Values(DType::Float32, DType::BFloat16, DType::Float16),
                                            ::testing::Values(64, 80, 96, 128), ::testing::Values(1, 4, 8)),
                         name_of);

// --- Axes that need no product ---

void expect_matches_reference(const ProblemShape& shape) {
  AttentionProblem problem(shape);
  EXPECT_TRUE(problem.matches_reference(problem.params()));
}

TEST(AttentionShapes, LengthsAroundABlockOfKeys) {
  ProblemShape shape;
  shape.chunk = {128, 150};
  for (const int32_t length : {127, 128, 129, 257}) {
    shape.kv_lens = {length};
    expect_matches_reference(shape);
  }
}

TEST(AttentionShapes, AnyChunkLength) {
  ProblemShape shape;
  shape.kv_lens = {37};
  for (const ChunkGeometry chunk :
       {ChunkGeometry{1, 1}, {2, 2}, {2, 3}, {3, 5}, {7, 7}, {36, 70}, {37, 40}, {1000, 1999}}) {
    shape.chunk = chunk;
    expect_matches_reference(shape);
  }
}

// Of 36, 72 and 80 channels half a vector of pairs of bfloat16 is left over, with 4, 8 and 16 lanes.
TEST(AttentionShapes, AnyHeadDim) {
  ProblemShape shape;
  shape.kv_lens = {35};
  for (const DType dtype : {DType::Float32, DType::BFloat16}) {
    for (const int32_t seqlen_q : {35, 3}) {
      for (const int32_t head_dim : {1, 2, 7, 8, 33, 36, 72, 80, 192, 256}) {
        shape.dtype = dtype;
        shape.q_lens = {seqlen_q};
        shape.head_dim = head_dim;
        expect_matches_reference(shape);
      }
    }
  }
}

TEST(AttentionShapes, AnyGroup) {
  ProblemShape shape;
  shape.kv_lens = {35};
  for (const int32_t group : {1, 2, 3, 5, 7, 16, 71}) {
    shape.num_heads = 2 * group;
    expect_matches_reference(shape);
  }
}

TEST(AttentionShapes, PartialAndInterleavedRotation) {
  ProblemShape shape;
  shape.kv_lens = {41};
  for (const bool interleaved : {false, true}) {
    for (const int32_t half_rotary_dim : {0, 1, 12, 32}) {
      shape.interleaved = interleaved;
      shape.half_rotary_dim = half_rotary_dim;
      expect_matches_reference(shape);
    }
  }
}

TEST(AttentionShapes, NaNInAValueReachesExactlyTheRowsThatSeeIt) {
  for (const DType dtype : {DType::Float32, DType::BFloat16}) {
    for (const int32_t seqlen_q : {90, 6}) {
      for (const int64_t key : {95, 97}) {
        ProblemShape shape;
        shape.dtype = dtype;
        AttentionProblem problem(last_rows_of_100(shape, seqlen_q));
        const AttentionParams p = problem.params();
        for (int32_t head = 0; head < shape.num_heads_kv; ++head) {
          reference::write(const_cast<void*>(p.v.data), dtype, key * p.v.stride.row + head * p.v.stride.head,
                           std::nan(""));
        }
        EXPECT_TRUE(problem.matches_reference(p)) << "seqlen_q " << seqlen_q << ", key " << key;
        const std::vector<double> out = problem.out();
        const int64_t row_size = static_cast<int64_t>(shape.num_heads) * shape.head_dim;
        const int64_t first_to_see_it = key - (100 - seqlen_q);
        EXPECT_FALSE(std::isnan(out[static_cast<size_t>((first_to_see_it - 1) * row_size)]));
        EXPECT_TRUE(std::isnan(out[static_cast<size_t>(first_to_see_it * row_size)]));
      }
    }
  }
}

// --- Factors on the logits ---

void expect_matches_reference_scaled(const ProblemShape& shape, float softmax_scale) {
  AttentionProblem problem(shape);
  AttentionParams p = problem.params();
  p.softmax_scale = softmax_scale;
  EXPECT_TRUE(problem.matches_reference(p)) << "softmax_scale " << softmax_scale;
}

// Many query rows, which pack their keys, and few; in dtypes that are multiplied as they are, and in others.
std::vector<ProblemShape> many_rows_and_few(int32_t tokens) {
  std::vector<ProblemShape> shapes;
  for (const DType dtype : {DType::Float32, DType::BFloat16, DType::Float16}) {
    for (const int32_t rows : {tokens, 3}) {
      ProblemShape shape;
      shape.dtype = dtype;
      shape.kv_lens = {tokens};
      shape.q_lens = {rows};
      shapes.push_back(shape);
    }
  }
  return shapes;
}

TEST(AttentionFactors, OfAnySign) {
  for (const ProblemShape& shape : many_rows_and_few(41)) {
    for (const float scale : {0.3f, -0.3f, 0.0f, 1e-30f}) expect_matches_reference_scaled(shape, scale);
  }
}

TEST(AttentionFactors, ANaNIsNotHidden) {
  for (const ProblemShape& shape : many_rows_and_few(41)) {
    AttentionProblem problem(shape);
    AttentionParams p = problem.params();
    p.softmax_scale = NAN;
    ASSERT_TRUE(attention(p).ok());
    for (const double x : problem.out()) ASSERT_TRUE(std::isnan(x)) << x;
  }
}

// Logits so far apart that the maximum of a row moves by many powers of two from block to block; and so far that
// nothing holds a weight relative to the largest logit of a block before. There fp32 rounds logits more than its bound
// allows.
TEST(AttentionFactors, MaximaMayMoveFar) {
  for (ProblemShape shape : many_rows_and_few(700)) {
    shape.chunk = {400, 600};
    expect_matches_reference_scaled(shape, 2.0f);
    if (shape.dtype != DType::Float32) expect_matches_reference_scaled(shape, 30.0f);
  }
}

// The first `rows` rows of the first head.
void fill(const ConstTensorRef& tensor, DType dtype, int64_t rows, int64_t head_dim, double value) {
  for (int64_t i = 0; i < rows * head_dim; ++i) {
    const int64_t at = i / head_dim * tensor.stride.row + i % head_dim;
    reference::write(const_cast<void*>(tensor.data), dtype, at, value);
  }
}

// All keys have one logit: the LSE is that logit + ln(keys in sight). A block must leave no error of its own in the
// running sum, or they add up; one rounding of such a logit is 6e-5.
TEST(AttentionFactors, SumsOfManyBlocksDoNotDrift) {
  constexpr int32_t kKeys = 6000;
  constexpr int32_t kHeadDim = 64;
  constexpr float kScale = 8.09f;
  for (const DType dtype : {DType::Float32, DType::BFloat16}) {
    for (const int32_t rows : {40, 3}) {
      ProblemShape shape;
      shape.dtype = dtype;
      shape.num_heads = shape.num_heads_kv = 1;
      shape.chunk = {kKeys, kKeys + 1};
      shape.kv_lens = {kKeys};
      shape.q_lens = {rows};
      shape.half_rotary_dim = 0;
      AttentionProblem problem(shape);
      AttentionParams p = problem.params();
      p.softmax_scale = kScale;
      fill(p.k, dtype, kKeys, kHeadDim, 1.0);
      fill(p.q, dtype, rows, kHeadDim, 1.375);
      ASSERT_TRUE(attention(p).ok());
      const std::vector<double> lse = problem.lse();
      for (int32_t row = 0; row < rows; ++row) {
        const double expected = 1.375 * kHeadDim * static_cast<double>(kScale) + std::log(kKeys - rows + row + 1);
        EXPECT_NEAR(lse[static_cast<size_t>(row)], expected, 8 * error_rule::ulp(expected, DType::Float32))
            << "row " << row << " of " << rows;
      }
    }
  }
}

TEST(AttentionTemperature, MultipliesTheLogitsOfItsSequence) {
  ProblemShape shape;
  shape.kv_lens = {41, 41, 41};
  AttentionProblem problem(shape);
  AttentionParams p = problem.params();
  const std::vector<float> temperature = {1.0f, 1.7f, 0.3f};
  p.temperature = temperature.data();
  p.original_max_position_embeddings = 8;  // overridden
  EXPECT_TRUE(problem.matches_reference(p));
}

TEST(AttentionTemperature, YarnsFactorComesFromTheLogicalLength) {
  ProblemShape shape;
  shape.kv_lens = {41, 16, 17, 1};
  shape.q_lens = {41, 41, 41, 41};
  shape.leftpads = {0, 25, 24, 40};  // 41 slots each: the factor must not count padding
  AttentionProblem problem(shape);
  AttentionParams p = problem.params();
  p.original_max_position_embeddings = 16;
  EXPECT_TRUE(problem.matches_reference(p));
}

// --- Optional memory ---

TEST(AttentionMemory, LseMayBeNull) {
  AttentionProblem problem({});
  AttentionParams p = problem.params();
  p.lse = nullptr;
  EXPECT_TRUE(problem.matches_reference(p));
}

TEST(AttentionMemory, WorkspaceHasTheSizeThatTheLibrarySays) {
  AttentionProblem problem({});
  AttentionParams p = problem.params();
  size_t bytes = 1;
  p.num_splits = 1;
  ASSERT_TRUE(attention_workspace_bytes(p, &bytes).ok());
  EXPECT_EQ(bytes, 0u);
  p.num_splits = 3;
  ASSERT_TRUE(attention_workspace_bytes(p, &bytes).ok());
  ASSERT_GT(bytes, 0u);
  constexpr uint8_t kGuard = 0xa5;
  std::vector<uint8_t> workspace(bytes + 64, kGuard);
  p.workspace = workspace.data();
  p.workspace_bytes = bytes;
  EXPECT_TRUE(problem.matches_reference(p));
  for (size_t i = bytes; i < workspace.size(); ++i) ASSERT_EQ(workspace[i], kGuard) << "written past the workspace";
  EXPECT_NE(std::vector<uint8_t>(workspace.begin(), workspace.begin() + static_cast<int64_t>(bytes)),
            std::vector<uint8_t>(bytes, kGuard))
      << "the given workspace is the one in use";
  p.workspace_bytes = bytes - 1;  // too small: the library brings its own
  EXPECT_TRUE(problem.matches_reference(p));
}

TEST(AttentionMemory, DescribeNamesTheKernel) {
  AttentionProblem problem({});
  std::string kernel;
  ASSERT_TRUE(describe_attention(problem.params(), &kernel).ok());
  EXPECT_EQ(kernel, std::string("cpu/") + build_info().cpu_isa + "/tile");
  AttentionParams decode = problem.params();
  decode.seqlen_q = 1;
  ASSERT_TRUE(describe_attention(decode, &kernel).ok());
  EXPECT_EQ(kernel, std::string("cpu/") + build_info().cpu_isa + "/rows");
}

}  // namespace
}  // namespace dca::testing
