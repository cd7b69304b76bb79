// Decode tiles against the reference: few query rows behind a cache.
#include "cuda_cases.h"

namespace dca::testing {
namespace {

// n = 16, P = 23: one token at, before and behind every kind of border.
const std::vector<int32_t> kLengths = {1, 2, 16, 17, 23, 24, 25, 32, 33, 48, 49, 53, 0};

class CudaDecode : public CudaKernelTest {
 protected:
  ProblemShape decode_shape(int32_t group, int32_t seqlen_q = 1) const {
    ProblemShape s = shape(group);
    s.kv_lens = kLengths;
    s.q_lens.assign(kLengths.size(), seqlen_q);
    return s;
  }
};

TEST_P(CudaDecode, OneToken) {
  for (const int32_t group : {1, 4, 8, 16}) {
    ProblemShape s = decode_shape(group);
    expect_matches_reference(s, {1, 4});
    s.keys = KeyLayout::Paged;
    s.page_size = 16;
    expect_matches_reference(s, {1, 4});
  }
}

TEST_P(CudaDecode, OneTokenOverLeftPadding) {
  ProblemShape s = decode_shape(4);
  for (const int32_t length : kLengths) s.leftpads.push_back(60 - length);
  expect_matches_reference(s, {1, 4});
  s.keys = KeyLayout::Paged;  // whole pages of padding have no valid page id
  s.page_size = 16;
  expect_matches_reference(s, {1, 4});
}

TEST_P(CudaDecode, SeveralTokensAcrossAChunkBorder) {
  for (const int32_t seqlen_q : {2, 4, 16, 20}) {  // longer than some sequences: rows without a position
    for (const int32_t group : {1, 4}) expect_matches_reference(decode_shape(group, seqlen_q), {1, 4});
  }
}

TEST_P(CudaDecode, PrefillAndDecodeMixedInOneBatch) {
  ProblemShape s = shape(4);
  s.kv_lens = {53, 17, 40, 0, 33, 24};
  s.q_lens = {1, 17, 9, 0, 2, 0};
  s.ragged_q = true;
  expect_matches_reference(s, {1, 3});
  s.keys = KeyLayout::Paged;
  s.page_size = 16;
  expect_matches_reference(s, {1, 3});
}

TEST_P(CudaDecode, MoreSplitsThanKeys) { expect_matches_reference(decode_shape(4), {2, 60, 256}); }

TEST_P(CudaDecode, LongCache) {
  ProblemShape s = shape(8);
  s.chunk = {300, 415};
  s.kv_lens = {1201, 700};
  s.q_lens = {2, 2};
  expect_matches_reference(s, {0, 1, 7});
  s.keys = KeyLayout::Paged;
  s.page_size = 64;
  expect_matches_reference(s, {0, 1, 7});
}

TEST_P(CudaDecode, SumsOfManyBlocksDoNotDrift) {
  for (const float logit : {712.0f, 747.0f}) expect_sums_without_drift(shape(), 1, 16384, logit);
}

// The last block of the own chunk is whole, and some rows must not see all of it.
TEST_P(CudaDecode, WholeBlocksThatNeedAMask) {
  ProblemShape s = shape(4);
  s.chunk = {300, 415};
  s.kv_lens = {728, 192};
  s.q_lens = {3, 3};
  expect_matches_reference(s, {1, 3});
}

TEST_P(CudaDecode, MaximaMayMoveFar) { expect_maxima_may_move_far(shape(4), 2); }

DCA_TEST_SM80(CudaDecode, 64, 80, 96, 128, 192, 256);
DCA_TEST_SM90(CudaDecode, 64, 80, 96, 128, 192, 256);

// --- What device memory holds must not lead out of the buffers ---

class CudaRobust : public CudaKernelTest {
 protected:
  ProblemShape wild_shape() const {
    ProblemShape s = shape(4);
    s.kv_lens = {40, 40};
    s.q_lens = {1, 1};
    return s;
  }
};

TEST_P(CudaRobust, LengthsPastTheCache) {
  for (const int32_t seqlen_q : {1, 8}) {
    ProblemShape s = wild_shape();
    s.q_lens = {seqlen_q, seqlen_q};
    AttentionProblem problem(s);
    for (const int32_t wild : {INT32_MAX, INT32_MIN, -1, 1000}) {
      AttentionParams p = problem.params();
      const std::vector<int32_t> lengths = {wild, 40};
      const std::vector<int32_t> leftpads = {0, wild};
      HostBuffers buffers = problem.buffers();
      buffers.push_back(buffer_of(lengths));
      buffers.push_back(buffer_of(leftpads));
      p.cache_seqlens = lengths.data();
      p.cache_leftpad = leftpads.data();
      const Status status = run_operator(p, buffers);
      EXPECT_TRUE(status.ok()) << status.message();
      ++kernel_cases;
    }
  }
}

TEST_P(CudaRobust, PagesThatTheCacheHasNot) {
  ProblemShape s = wild_shape();
  s.keys = KeyLayout::Paged;
  s.page_size = 16;
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

DCA_TEST_SM80(CudaRobust, 64, 128);
DCA_TEST_SM90(CudaRobust, 64, 128);

}  // namespace
}  // namespace dca::testing
