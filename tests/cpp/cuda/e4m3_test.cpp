// Caches of 8-bit floating point on CUDA: attention by both kinds of tiles, append, refusals.
#include <cmath>
#include <cstdlib>
#include <string>

#include "cuda_cases.h"
#include "e4m3_problem.h"

namespace dca::testing {
namespace {

// n = 16, P = 23: around every kind of border.
const std::vector<int32_t> kLengths = {1, 2, 16, 17, 23, 24, 25, 32, 33, 48, 49, 53, 0};

class CudaE4M3 : public CudaKernelTest {
 protected:
  ProblemShape needed() const override { return cached(1, 1); }

  ProblemShape cached(int32_t group, int32_t seqlen_q) const {
    ProblemShape s = shape(group);
    s.cache_dtype = DType::Float8E4M3;
    s.scales = Scales::PerHead;
    s.page_size = 16;
    s.kv_lens = kLengths;
    s.q_lens.assign(kLengths.size(), seqlen_q);
    return s;
  }
};

TEST_P(CudaE4M3, OneToken) {
  for (const int32_t group : {1, 4, 8, 16}) {
    ProblemShape s = cached(group, 1);
    expect_matches_reference(s, {1, 4});
    s.keys = KeyLayout::Paged;
    expect_matches_reference(s, {1, 4});
  }
}

TEST_P(CudaE4M3, AllKindsOfScales) {
  for (const Scales scales : kAllScales) {
    ProblemShape s = cached(4, 2);
    s.scales = scales;
    expect_matches_reference(s, {1, 4});
  }
}

TEST_P(CudaE4M3, LeftPadding) {
  ProblemShape s = cached(4, 1);
  for (const int32_t length : kLengths) s.leftpads.push_back(60 - length);
  expect_matches_reference(s, {1, 4});
  s.keys = KeyLayout::Paged;  // whole pages of padding have no valid page id
  expect_matches_reference(s, {1, 4});
}

// By prefill tiles, or by decode tiles where there are none for such a cache: those take any number of rows.
TEST_P(CudaE4M3, ManyTokensAcrossChunkBorders) {
  for (const int32_t seqlen_q : {5, 20, 53}) {  // longer than some sequences: rows without a position
    for (const int32_t group : {1, 4}) expect_matches_reference(cached(group, seqlen_q), {1, 4});
  }
}

TEST_P(CudaE4M3, TilesOfManyRows) {
  ProblemShape s = cached(2, 150);
  s.chunk = {140, 210};
  s.kv_lens = {391, 150, 64};
  s.q_lens = {150, 150, 150};
  expect_matches_reference(s, {1, 3});
  s.keys = KeyLayout::Paged;
  s.leftpads = {9, 250, 336};
  expect_matches_reference(s, {1, 3});
}

// So many tiles that a CTA of a persistent kernel gets several: cut ones, and whole ones.
TEST_P(CudaE4M3, MoreTilesThanADeviceHolds) {
  ProblemShape s = cached(1, 70);
  s.num_heads = 100;
  s.num_heads_kv = 50;
  s.chunk = {32, 50};
  s.kv_lens = s.q_lens = {70, 70};
  expect_matches_reference(s);
  s.num_heads = 140;
  s.num_heads_kv = 1;
  s.chunk = {128, 150};
  s.kv_lens = s.q_lens = {128};
  expect_matches_reference(s);
}

TEST_P(CudaE4M3, PagesOfManySizes) {
  ProblemShape s = cached(2, 150);
  s.num_heads_kv = 1;
  s.num_heads = 2;
  s.chunk = {128, 150};
  s.kv_lens = {300, 261};
  s.q_lens = {150, 150};
  s.leftpads = {0, 39};
  s.keys = KeyLayout::Paged;
  for (const int32_t page_size : {16, 64, 80, 128, 256}) {
    s.page_size = page_size;
    expect_matches_reference(s);
  }
}

TEST_P(CudaE4M3, TilesMayBeComputedAgain) {
  ProblemShape s = cached(1, 1);
  s.q_lens.clear();
  expect_tiles_may_be_computed_again(s, 2, 300);
  if (s.head_dim == 64) expect_tiles_may_be_computed_again(s, 140, 260);  // one after the other in a CTA
}

TEST_P(CudaE4M3, NaNOfOneSequenceStaysThere) { expect_nan_stays_in_its_sequence(cached(1, 1)); }

TEST_P(CudaE4M3, PrefillAndDecodeMixedInOneBatch) {
  ProblemShape s = cached(4, 1);
  s.kv_lens = {53, 17, 40, 0, 33, 24};
  s.q_lens = {1, 17, 9, 0, 2, 0};
  s.ragged_q = true;
  expect_matches_reference(s, {1, 3});
  s.keys = KeyLayout::Paged;
  expect_matches_reference(s, {1, 3});
}

TEST_P(CudaE4M3, MoreSplitsThanKeys) { expect_matches_reference(cached(4, 1), {2, 60, 256}); }

TEST_P(CudaE4M3, LongCache) {
  ProblemShape s = cached(8, 2);
  s.chunk = {300, 415};
  s.kv_lens = {1201, 700};
  s.q_lens = {2, 2};
  expect_matches_reference(s, {0, 1, 7});
  s.keys = KeyLayout::Paged;
  s.page_size = 64;
  expect_matches_reference(s, {0, 7});
}

TEST_P(CudaE4M3, SegmentsAlone) {
  for (const auto segment : {SegmentSelection::Intra, SegmentSelection::Successive, SegmentSelection::Inter}) {
    AttentionProblem problem(cached(4, 5));
    AttentionParams p = problem.params();
    p.segments = segment;
    EXPECT_TRUE(problem.matches_reference(p, {1, 4}));
    kernel_cases += 2;
  }
}

TEST_P(CudaE4M3, NegativeSoftmaxScaleAndTemperature) {
  AttentionProblem problem(cached(4, 2));
  AttentionParams p = problem.params();
  p.softmax_scale = -p.softmax_scale;
  p.original_max_position_embeddings = 20;
  EXPECT_TRUE(problem.matches_reference(p, {1, 4}));
  kernel_cases += 2;
}

TEST_P(CudaE4M3, PartialRotation) {
  ProblemShape s = cached(4, 2);
  for (const bool interleaved : {false, true}) {
    for (const int32_t half : {0, 1, 8, 20}) {
      s.half_rotary_dim = half;
      s.interleaved = interleaved;
      expect_matches_reference(s);
    }
  }
}

TEST_P(CudaE4M3, EveryCodeIsReadExactly) {
  const ProblemShape s = shape();
  CodesProblem(s.dtype, 2, s.head_dim).expect_exact();
  CodesProblem(s.dtype, 17, s.head_dim).expect_exact();  // more rows than a decode tile has
  kernel_cases += 2;
}

// Only their products with the scale of the logits are in the range of fp16, to which decode rounds them.
TEST_P(CudaE4M3, QueriesOfAnySize) {
  const ProblemShape s = cached(4, 2);
  const int power = s.dtype == DType::BFloat16 ? 60 : 8;
  for (const double scale : {std::ldexp(1.0, power), std::ldexp(1.0, -power)}) {
    AttentionProblem problem(s);
    AttentionParams p = problem.params();
    const Tables tables(p.rotary.num_positions, p.rotary.half_dim, 10000.0, scale);
    p.rotary.cos = tables.cos.data();
    p.rotary.sin = tables.sin.data();
    p.softmax_scale = static_cast<float>(p.softmax_scale / scale);
    EXPECT_TRUE(problem.matches_reference(p, {1, 4}, {buffer_of(tables.cos), buffer_of(tables.sin)})) << scale;
    kernel_cases += 2;
  }
}

// One key outweighs 4096 others e^18 times, each of which is too small a part of it for fp16 as it is. What remains of
// the output is theirs alone.
TEST_P(CudaE4M3, SmallWeightsCount) {
  constexpr int32_t kKeys = 4097;
  constexpr double kFirstKey = 2.25, kValue = 448.0, kLogit = 18.0;
  const ProblemShape s = shape();
  Tensor k(DType::Float8E4M3, 1, kKeys, 1, s.head_dim), v = k;
  for (int32_t key = 0; key < kKeys; ++key) {
    for (int32_t c = 0; c < s.head_dim; ++c) {
      k.set(k.offset(0, key, 0) + c, key == 0 ? kFirstKey : 0.0);
      v.set(v.offset(0, key, 0) + c, key == 0 ? 0.0 : kValue);
    }
  }
  for (const int32_t rows : {1, 40}) {  // by decode tiles, and by prefill tiles where there are any
    Tensor q(s.dtype, 1, rows, 2, s.head_dim);
    for (int64_t row = 0; row < rows; ++row) {
      for (int32_t c = 0; c < s.head_dim; ++c) {
        for (const int32_t head : {0, 1}) q.set(q.offset(0, row, head) + c, 1.0);
      }
    }
    Tensor out = q;
    const Tables tables{kKeys + 1, 0};
    AttentionParams p;
    p.dtype = s.dtype;
    p.cache_dtype = DType::Float8E4M3;
    p.chunk = {kKeys, kKeys};
    p.batch = p.num_heads_kv = 1;
    p.num_heads = 2;
    p.head_dim = s.head_dim;
    p.seqlen_q = rows;
    p.seqlen_k = p.cache_seqlen = kKeys;
    p.q = q.ref();
    p.k = k.ref();
    p.v = v.ref();
    p.out = out.mutable_ref();
    p.rotary = {tables.cos.data(), tables.sin.data(), kKeys + 1, 0, false};
    p.softmax_scale = static_cast<float>(kLogit / (kFirstKey * s.head_dim));
    p.num_splits = 1;
    HostBuffers buffers;
    for (const Tensor* tensor : {&q, &k, &v, &out}) buffers.push_back(buffer_of(tensor->bytes()));
    buffers.push_back(buffer_of(tables.cos));
    buffers.push_back(buffer_of(tables.sin));
    const Status status = run_operator(p, buffers);
    ASSERT_TRUE(status.ok()) << status.message();
    for (int32_t row = 0; row < rows; ++row) {
      const double others = (kKeys - rows + row) * std::exp(-kLogit);
      const double expected = kValue * others / (1.0 + others);
      EXPECT_NEAR(out.at(out.offset(0, row, 1)), expected, 0.01 * expected) << "row " << row << " of " << rows;
    }
    ++kernel_cases;
  }
}

TEST_P(CudaE4M3, PagesThatTheCacheHasNot) {
  ProblemShape s = cached(4, 1);
  s.keys = KeyLayout::Paged;
  s.kv_lens = {40, 40};
  s.q_lens = {1, 1};
  AttentionProblem problem(s);
  for (const int32_t wild : {INT32_MAX, INT32_MIN, -1, 1000}) {
    AttentionParams p = problem.params();
    const std::vector<int32_t> table(static_cast<size_t>(p.batch * p.pages.stride_batch), wild);
    HostBuffers buffers = problem.buffers();
    buffers.push_back(buffer_of(table));
    p.pages.page_table = table.data();
    const Status status = run_operator(p, buffers);
    EXPECT_TRUE(status.ok()) << status.message();
    for (const double x : problem.out()) ASSERT_EQ(x, 0.0) << "keys and values of pages that are not there are 0";
    ++kernel_cases;
  }
}

TEST_P(CudaE4M3, TheKernelSaysWhatItReads) {
  AttentionProblem problem(cached(4, 2));
  AttentionParams p = problem.params();
  p.exec.device = Device::Cuda;
  p.num_splits = 1;
  std::string kernel;
  EXPECT_TRUE(describe_attention(p, &kernel).ok());
  EXPECT_EQ(kernel.rfind(std::string("cuda/") + std::get<2>(GetParam()) + "/", 0), 0u) << kernel;
  EXPECT_EQ(kernel.substr(kernel.size() - 5), "/e4m3");
}

DCA_TEST_SM80(CudaE4M3, 64, 80, 96, 128, 192, 256);
DCA_TEST_SM90(CudaE4M3, 64, 80, 96, 128, 192, 256);

// --- Append ---

constexpr DType kDTypes[] = {DType::Float32, DType::BFloat16, DType::Float16};

AppendShape appended(DType dtype, Scales scales) { return append_into(DType::Float8E4M3, scales, dtype); }

void expect_appended(const AppendShape& shape) {
  AppendProblem(shape).expect_matches_reference();
  ++kernel_cases;
}

TEST(CudaE4M3Append, MatchesTheReference) {
  for (const DType dtype : kDTypes) {
    for (const Scales scales : kAllScales) {
      AppendShape shape = appended(dtype, scales);
      expect_appended(shape);
      shape.page_size = 16;
      shape.leftpads = {3, 13, 0};
      expect_appended(shape);
      shape.ragged = true;
      shape.new_rows = {4, 17, 0};
      expect_appended(shape);
    }
  }
}

TEST(CudaE4M3Append, PartialAndInterleavedRotation) {
  for (const bool interleaved : {false, true}) {
    for (const int32_t half : {0, 1, 16, 20, 24, 32, 40}) {
      AppendShape shape = appended(DType::BFloat16, Scales::PerHead);
      shape.head_dim = 80;
      shape.half_rotary_dim = half;
      shape.interleaved = interleaved;
      expect_appended(shape);
    }
  }
}

TEST(CudaE4M3Append, HeadDims) {
  for (const int32_t head_dim : {16, 64, 96, 128, 256}) {
    AppendShape shape = appended(DType::BFloat16, Scales::PerHead);
    shape.head_dim = head_dim;
    shape.half_rotary_dim = head_dim / 2;
    expect_appended(shape);
  }
}

TEST(CudaE4M3Append, RoundsOnceToNearestEvenAndSaturates) {
  RoundingProblem problem;
  problem.expect_rounds_to_nearest_even(1.0f, 0.25f);
  problem.expect_rounds_to_nearest_even(0.3f, 7.0f);
  kernel_cases += 2;
}

// --- Refusals ---

template <class Problem, class Params>
void expect_refused(const Params& p, const Problem& problem, const std::string& message) {
  const Status status = run_operator(p, problem.buffers());
  EXPECT_EQ(status.code(), StatusCode::InvalidArgument);
  EXPECT_NE(status.message().find(message), std::string::npos) << status.message();
}

ProblemShape small_shape() {
  ProblemShape shape;
  shape.dtype = DType::BFloat16;
  shape.cache_dtype = DType::Float8E4M3;
  shape.q_lens = {1};
  return shape;
}

TEST(CudaE4M3Refusal, WhatIsNotWhole16Bytes) {
  ProblemShape shape = small_shape();
  shape.head_dim = 72;
  AttentionProblem odd(shape);
  const std::string message = "head_dim must be a multiple of 16 for a Float8E4M3 cache on CUDA; got 72";
  expect_refused(odd.params(), odd, message);
  AppendShape rows = appended(DType::BFloat16, Scales::None);
  rows.head_dim = 72;
  AppendProblem append(rows);
  expect_refused(append.p, append, message);
}

TEST(CudaE4M3Refusal, Strides) {
  if (const std::string why = missing_kernel(small_shape()); !why.empty()) GTEST_SKIP() << why;
  AttentionProblem problem(small_shape());
  AttentionParams p = problem.params();
  p.k.stride.row += 8;
  expect_refused(p, problem, "the strides of k must be multiples of 16 elements (16 bytes) on CUDA; got ");
  p = problem.params();
  p.v.data = static_cast<const char*>(p.v.data) + 8;
  expect_refused(p, problem, "v must be aligned to 16 bytes on CUDA");
}

TEST(CudaInt8Refusal, TheFormatIsForTheCpu) {
  const std::string message =
      "an int8 cache is for the CPU only: on CUDA cache_dtype must be Same or Float8E4M3; got Int8";
  AttentionProblem problem(small_shape());
  AttentionParams p = problem.params();
  p.cache_dtype = DType::Int8;
  expect_refused(p, problem, message);
  AppendProblem append(appended(DType::BFloat16, Scales::None));
  append.p.cache_dtype = DType::Int8;
  expect_refused(append.p, append, message);
}

TEST(CudaCheckedValuesE4M3, Scales) {
  const char* value = std::getenv("DCA_CHECK");
  if (value == nullptr || std::string(value) != "1") GTEST_SKIP() << "needs DCA_CHECK=1 in the environment";
  if (const std::string why = missing_kernel(small_shape()); !why.empty()) GTEST_SKIP() << why;
  AttentionProblem problem(small_shape());
  const std::vector<float> wild = {1.0f, -3.0f};
  AttentionParams p = problem.params();
  p.k_scale.data = wild.data();
  p.k_scale.stride.head = 1;
  HostBuffers buffers = problem.buffers();
  buffers.push_back(buffer_of(wild));
  const Status status = run_operator(p, buffers);
  EXPECT_EQ(status.code(), StatusCode::InvalidArgument);
  EXPECT_NE(status.message().find("k_scale must be finite and above 0; got -3"), std::string::npos) << status.message();
}

}  // namespace
}  // namespace dca::testing
