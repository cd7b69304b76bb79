// Prefill tiles against the reference: whole sequences and queries behind a cache, at the lengths where something
// changes, in every layout.
#include <cmath>

#include "cuda_cases.h"

namespace dca::testing {
namespace {

class CudaPrefill : public CudaKernelTest {};

// n = 16, P = 23: chunk borders at 16, 32, 48; row 24 is the first that is not causal RoPE. Ragged, so that a tile that
// wrote past its rows would be seen in its neighbour's.
TEST_P(CudaPrefill, BordersOfChunksRagged) {
  for (const int32_t group : {1, 4, 8}) {
    ProblemShape s = shape(group);
    s.kv_lens = {1, 2, 15, 0, 16, 17, 24, 25, 31, 32, 33, 49, 53};
    s.ragged_q = true;
    s.keys = KeyLayout::Ragged;
    expect_matches_reference(s);
  }
}

TEST_P(CudaPrefill, UniformBatch) {
  ProblemShape s = shape(4);
  s.kv_lens = {40, 40};
  expect_matches_reference(s, {1, 3});
}

TEST_P(CudaPrefill, Paged) {
  ProblemShape s = shape(4);
  s.kv_lens = {53, 16, 1, 32};
  s.ragged_q = true;
  s.keys = KeyLayout::Paged;
  for (const int32_t page_size : {16, 48}) {
    s.page_size = page_size;
    expect_matches_reference(s);
  }
}

TEST_P(CudaPrefill, LeftPadded) {
  ProblemShape s = shape(4);
  s.kv_lens = {33, 17, 1, 0};
  s.q_lens = {33, 33, 33, 33};
  s.leftpads = {0, 16, 32, 33};
  expect_matches_reference(s, {1, 2});
  s.keys = KeyLayout::Paged;
  s.page_size = 16;
  expect_matches_reference(s);
}

// Whoever asks before there is any memory gets the name of the kernel that will run, and room for its splits.
TEST_P(CudaPrefill, TheKernelFollowsFromShapesAndStrides) {
  for (const KeyLayout keys : {KeyLayout::Slots, KeyLayout::Ragged, KeyLayout::Paged}) {
    ProblemShape s = shape(1);
    s.kv_lens = {700};
    s.ragged_q = keys == KeyLayout::Ragged;
    s.keys = keys;
    s.page_size = 16;
    AttentionProblem problem(s);
    AttentionParams p = problem.params();
    p.exec.device = Device::Cuda;
    std::string with_memory, without;
    size_t bytes_with_memory = 0, bytes = 0;
    ASSERT_TRUE(describe_attention(p, &with_memory).ok());
    ASSERT_TRUE(attention_workspace_bytes(p, &bytes_with_memory).ok());
    p.q.data = p.k.data = p.v.data = nullptr;
    p.out.data = nullptr;
    ASSERT_TRUE(describe_attention(p, &without).ok());
    ASSERT_TRUE(attention_workspace_bytes(p, &bytes).ok());
    EXPECT_EQ(without, with_memory);
    EXPECT_EQ(bytes, bytes_with_memory);
    const std::string architecture = std::get<2>(GetParam());
    EXPECT_EQ(without.rfind("cuda/" + architecture, 0), 0u) << without;
  }
}

TEST_P(CudaPrefill, NaNOfOneSequenceStaysThere) { expect_nan_stays_in_its_sequence(shape(1)); }

// So many tiles that a CTA of a persistent kernel gets several, of one length and of mixed ones.
TEST_P(CudaPrefill, MoreTilesThanADeviceHolds) {
  ProblemShape s = shape(1);
  s.num_heads = 100;
  s.num_heads_kv = 50;
  s.chunk = {32, 50};
  s.kv_lens = {70, 70};
  expect_matches_reference(s);
  s.kv_lens = {70, 3};
  s.ragged_q = true;
  s.keys = KeyLayout::Ragged;
  expect_matches_reference(s);
  // Whole tiles: the next one begins while the results of the last are on their way.
  s = shape(1);
  s.num_heads = 140;
  s.num_heads_kv = 1;
  s.chunk = {128, 150};
  s.kv_lens = {128};
  expect_matches_reference(s);
}

// Tiles of whole rows and cut ones side by side, in pages of which a block takes one, several, or a part.
TEST_P(CudaPrefill, PagesOfManySizes) {
  ProblemShape s = shape(1);
  s.num_heads = 2;
  s.num_heads_kv = 1;
  s.chunk = {128, 150};
  s.kv_lens = {300, 261};
  s.q_lens = {300, 300};
  s.leftpads = {0, 39};
  s.keys = KeyLayout::Paged;
  for (const int32_t page_size : {16, 64, 80, 128, 256}) {
    s.page_size = page_size;
    expect_matches_reference(s);
  }
}

// Tiles of one head each, side by side, that read the same keys.
TEST_P(CudaPrefill, HeadsOfAGroupSideBySide) {
  ProblemShape s = shape(4);
  s.chunk = {140, 209};
  s.kv_lens = {293, 293};
  expect_matches_reference(s);
  s.kv_lens = {293, 150};
  s.ragged_q = true;
  s.keys = KeyLayout::Ragged;
  expect_matches_reference(s, {1, 3});
}

// Chunks that are whole key tiles: no block but the diagonal is masked.
TEST_P(CudaPrefill, ChunksOfWholeTiles) {
  ProblemShape s = shape(1);
  s.num_heads = s.num_heads_kv = 1;
  s.chunk = {128, 150};
  for (const int32_t length : {127, 128, 129, 144, 257, 400}) {  // 144: kBlockM + 16
    s.kv_lens = {length};
    expect_matches_reference(s);
  }
  s.chunk = {384, 450};  // of tiles of 192 rows, too
  for (const int32_t length : {192, 208, 576}) {
    s.kv_lens = {length};
    expect_matches_reference(s);
  }
}

// Chunks that cut every tile: each segment ends inside a block.
TEST_P(CudaPrefill, ChunksThatCutTiles) {
  ProblemShape s = shape(1);
  s.num_heads = s.num_heads_kv = 1;
  for (const ChunkGeometry chunk : {ChunkGeometry{140, 209}, {67, 67}, {31, 61}}) {
    s.chunk = chunk;
    s.kv_lens = {293};
    expect_matches_reference(s);
  }
}

// Queries that end at the last cached token: fewer than a tile, more than a tile, across borders, mixed lengths.
TEST_P(CudaPrefill, BehindACache) {
  ProblemShape s = shape(4);
  s.chunk = {64, 90};
  s.kv_lens = {300, 200, 66};
  s.q_lens = {70, 1, 66};
  s.ragged_q = true;
  expect_matches_reference(s, {1, 4});
  s.keys = KeyLayout::Paged;
  s.page_size = 32;
  expect_matches_reference(s, {1, 4});
}

TEST_P(CudaPrefill, LongChunksOfAnOddPublishedLength) {
  ProblemShape s = shape(2);
  s.num_heads = 2;
  s.num_heads_kv = 1;
  s.chunk = {20240, 24576};
  s.kv_lens = {20300};
  s.q_lens = {70};  // the border at 20240 cuts them
  expect_matches_reference(s, {0});
}

TEST_P(CudaPrefill, TilesMayBeComputedAgain) { expect_tiles_may_be_computed_again(shape(1), 2, 300); }

DCA_TEST_SM80(CudaPrefill, 64, 80, 96, 128, 192, 256);
DCA_TEST_SM90(CudaPrefill, 64, 80, 96, 128, 192, 256);
DCA_TEST_SM90_LARGE(CudaPrefill);

// --- Axes that need no product ---

class CudaPrefillAxes : public CudaKernelTest {};

TEST_P(CudaPrefillAxes, AnyChunkLength) {
  ProblemShape s = shape(1);
  s.kv_lens = {37};
  for (const ChunkGeometry chunk : {ChunkGeometry{1, 1}, {2, 3}, {7, 7}, {36, 70}, {37, 40}, {1000, 1999}}) {
    s.chunk = chunk;
    expect_matches_reference(s);
  }
}

TEST_P(CudaPrefillAxes, AnyGroup) {
  for (const int32_t group : {2, 3, 5, 7, 16, 71, 130}) {
    ProblemShape s = shape();
    s.num_heads_kv = 1;
    s.num_heads = group;
    s.kv_lens = {35};
    expect_matches_reference(s);
  }
}

TEST_P(CudaPrefillAxes, PartialAndInterleavedRotation) {
  ProblemShape s = shape(1);
  s.kv_lens = {41};
  for (const bool interleaved : {false, true}) {
    for (const int32_t half_rotary_dim : {0, 1, 8, 12, 16}) {
      s.interleaved = interleaved;
      s.half_rotary_dim = half_rotary_dim;
      expect_matches_reference(s);
    }
  }
}

TEST_P(CudaPrefillAxes, FactorsOnTheLogits) {
  ProblemShape s = shape(1);
  s.kv_lens = {41, 41, 41};
  AttentionProblem problem(s);
  AttentionParams p = problem.params();
  const std::vector<float> temperature = {1.0f, 1.7f, -0.3f};
  p.temperature = temperature.data();
  EXPECT_TRUE(problem.matches_reference(p, {1}, {buffer_of(temperature)}));
  p.softmax_scale = 5.0f;  // logits beyond 100: exp overflows in fp32 without the running maximum
  p.temperature = nullptr;
  EXPECT_TRUE(problem.matches_reference(p, {1}));
  p.softmax_scale = 0.0f;  // all keys alike
  EXPECT_TRUE(problem.matches_reference(p, {1}));
  kernel_cases += 3;
}

TEST_P(CudaPrefillAxes, ANaNAmongTheFactorsIsNotHidden) {
  ProblemShape s = shape(1);
  s.kv_lens = {41};
  AttentionProblem problem(s);
  AttentionParams p = problem.params();
  const std::vector<float> temperature = {NAN};
  p.temperature = temperature.data();
  HostBuffers buffers = problem.buffers();
  buffers.push_back(buffer_of(temperature));
  const Status status = run_operator(p, buffers);
  ASSERT_TRUE(status.ok()) << status.message();
  for (const double x : problem.out()) ASSERT_TRUE(std::isnan(x)) << x;
  ++kernel_cases;
}

TEST_P(CudaPrefillAxes, YarnsFactorComesFromTheLogicalLength) {
  ProblemShape s = shape(1);
  s.kv_lens = {41, 16, 17, 1};
  s.q_lens = {41, 41, 41, 41};
  s.leftpads = {0, 25, 24, 40};
  AttentionProblem problem(s);
  AttentionParams p = problem.params();
  p.original_max_position_embeddings = 16;
  EXPECT_TRUE(problem.matches_reference(p, {1}));
  ++kernel_cases;
}

TEST_P(CudaPrefillAxes, SegmentsAlone) {
  ProblemShape s = shape(4);
  s.kv_lens = {53, 33, 17, 5};
  s.q_lens = {20, 20, 20, 20};
  AttentionProblem problem(s);
  for (const auto segment : {SegmentSelection::Intra, SegmentSelection::Successive, SegmentSelection::Inter}) {
    AttentionParams p = problem.params();
    p.segments = segment;
    EXPECT_TRUE(problem.matches_reference(p, {1, 3})) << "segment " << static_cast<int>(segment);
    kernel_cases += 2;
  }
}

// Whole tiles without a key behind whole tiles with some: the results of both take the same place in a CTA.
TEST_P(CudaPrefillAxes, SegmentsAloneOfMoreTilesThanADeviceHolds) {
  ProblemShape s = shape(1);
  s.num_heads = 132;
  s.num_heads_kv = 1;
  s.chunk = {128, 150};
  s.kv_lens = {384};
  AttentionProblem problem(s);
  AttentionParams p = problem.params();
  p.segments = SegmentSelection::Inter;
  EXPECT_TRUE(problem.matches_reference(p, {1}));
  ++kernel_cases;
}

TEST_P(CudaPrefillAxes, SumsOfManyBlocksDoNotDrift) {
  for (const float logit : {712.0f, 747.0f}) expect_sums_without_drift(shape(), 40, 16384, logit);
}

TEST_P(CudaPrefillAxes, MaximaMayMoveFar) { expect_maxima_may_move_far(shape(2), 200); }

TEST_P(CudaPrefillAxes, ManyTilesMayBeComputedAgain) { expect_tiles_may_be_computed_again(shape(1), 140, 260); }

TEST_P(CudaPrefillAxes, LseMayBeNull) {
  AttentionProblem problem(shape(1));
  AttentionParams p = problem.params();
  p.lse = nullptr;
  EXPECT_TRUE(problem.matches_reference(p, {1, 2}));
  kernel_cases += 2;
}

DCA_TEST_SM80(CudaPrefillAxes, 64);
DCA_TEST_SM90(CudaPrefillAxes, 64);
DCA_TEST_SM90_LARGE(CudaPrefillAxes);

// --- Choices that follow from the number of tiles ---

class CudaManyTiles : public CudaKernelTest {};

// Enough for two groups of KV heads, the first from its shortest tiles to its longest.
TEST_P(CudaManyTiles, KvHeadsInGroups) {
  ProblemShape s = shape(1);
  s.num_heads = s.num_heads_kv = 528;
  s.chunk = {16, 25};
  s.kv_lens = {40};
  expect_matches_reference(s);
}

DCA_TEST_SM90(CudaManyTiles, 64);

class CudaLargeTiles : public CudaKernelTest {};

// A call gets large tiles where it has many of them, and nothing is said of kernels.
TEST_P(CudaLargeTiles, AreChosenForManyTiles) {
  ProblemShape s = shape(1);
  s.chunk = {256, 300};
  const auto kernel_of = [&](int32_t length) {
    s.kv_lens = {length};
    AttentionProblem problem(s);
    AttentionParams p = problem.params();
    p.exec.device = Device::Cuda;
    p.num_heads = p.num_heads_kv = 64;
    std::string kernel;
    EXPECT_TRUE(describe_attention(p, &kernel).ok());
    return kernel;
  };
  setenv("DCA_CUDA_KERNELS", "sm90", 1);
  const std::string why = missing_kernel(s);  // of small tiles; SetUp has asked for large ones
  if (!why.empty()) GTEST_SKIP() << why;
  unsetenv("DCA_CUDA_KERNELS");
  EXPECT_EQ(kernel_of(200).rfind("cuda/sm90/prefill/", 0), 0u) << kernel_of(200);
  EXPECT_EQ(kernel_of(4096).rfind("cuda/sm90:three_consumers/prefill/", 0), 0u) << kernel_of(4096);
}

DCA_TEST_SM90_LARGE(CudaLargeTiles);

}  // namespace
}  // namespace dca::testing
