// What the CUDA backend refuses before any launch, in one sentence.
#include <cstdlib>
#include <string>

#include "append_problem.h"
#include "cuda_cases.h"

namespace dca::testing {
namespace {

ProblemShape decode_shape() {
  ProblemShape shape;
  shape.dtype = DType::BFloat16;
  shape.q_lens = {1};
  return shape;
}

void expect_refused(const AttentionParams& p, const AttentionProblem& problem, const std::string& message) {
  const Status status = run_operator(p, problem.buffers());
  EXPECT_EQ(status.code(), StatusCode::InvalidArgument);
  EXPECT_NE(status.message().find(message), std::string::npos) << status.message();
}

TEST(CudaRefusal, Shapes) {
  ProblemShape shape = decode_shape();
  shape.dtype = DType::Float32;
  AttentionProblem fp32(shape);
  expect_refused(fp32.params(), fp32, "dtype must be BFloat16 or Float16 for attention on CUDA; got Float32");
  shape = decode_shape();
  shape.head_dim = 66;
  AttentionProblem odd(shape);
  expect_refused(odd.params(), odd, "head_dim must be a multiple of 8 on CUDA; got 66");
  shape.head_dim = 264;
  AttentionProblem large(shape);
  expect_refused(large.params(), large, "head_dim must be at most 256 on CUDA; got 264");
  shape = decode_shape();
  shape.keys = KeyLayout::Paged;
  shape.page_size = 24;
  AttentionProblem pages(shape);
  expect_refused(pages.params(), pages, "page_size must be a multiple of 16 on CUDA; got 24");
}

TEST(CudaRefusal, Memory) {
  if (const std::string why = missing_kernel(decode_shape()); !why.empty()) GTEST_SKIP() << why;
  AttentionProblem problem(decode_shape());
  AttentionParams p = problem.params();
  p.k.data = static_cast<const char*>(p.k.data) + 2;
  expect_refused(p, problem, "k must be aligned to 16 bytes on CUDA");
  p = problem.params();
  p.v.stride.row += 1;
  expect_refused(p, problem, "the strides of v must be multiples of 8 elements (16 bytes) on CUDA; got ");
}

// One for all sequences: the host sees it.
TEST(CudaRefusal, LengthsThatTheHostKnows) {
  AttentionProblem problem(decode_shape());
  AttentionParams p = problem.params();
  p.cache_seqlens = nullptr;
  p.cache_seqlen = p.seqlen_k + 1;
  expect_refused(p, problem, "cache_seqlens must fit in the cache: each sequence needs 36 slots, and it has 35");
  p.cache_seqlen = p.seqlen_k;
  p.cache_seqlens_before_append = true;
  expect_refused(p, problem, "cache_seqlens must fit in the cache: each sequence needs 36 slots, and it has 35");
  p.cache_seqlen = -3;
  expect_refused(p, problem, "cache_seqlens must not be negative; got -3 for each sequence");

  AppendProblem append(AppendShape{});
  AppendParams new_rows = append.p;
  new_rows.cache_seqlens = nullptr;
  new_rows.cache_seqlen = new_rows.cache_slots;
  const Status status = run_operator(new_rows, append.buffers());
  EXPECT_EQ(status.code(), StatusCode::InvalidArgument);
  EXPECT_NE(status.message().find("cache_seqlens must fit in the cache: each sequence"), std::string::npos)
      << status.message();
}

TEST(CudaRefusal, RowsOfNoLength) {
  ProblemShape shape = decode_shape();
  shape.ragged_q = true;
  AttentionProblem problem(shape);
  AttentionParams p = problem.params();
  p.seqlen_q = 0;
  expect_refused(p, problem, "the maximal sequence length of cu_seqlens_q must be at least 1 where q has rows; got 0");
}

TEST(CudaRefusal, SplitsWithoutAWorkspace) {
  if (const std::string why = missing_kernel(decode_shape()); !why.empty()) GTEST_SKIP() << why;
  AttentionProblem problem(decode_shape());
  AttentionParams p = problem.params();
  p.exec.device = Device::Cuda;
  p.num_splits = 4;
  const Status status = attention(p);  // refused before a host pointer reaches a kernel
  EXPECT_EQ(status.code(), StatusCode::InvalidArgument);
  EXPECT_NE(status.message().find("workspace must have the 4160 bytes"), std::string::npos) << status.message();
}

TEST(CudaRefusal, NothingToDoIsNoLaunch) {
  ProblemShape shape = decode_shape();
  shape.kv_lens = shape.q_lens = {};
  AttentionProblem problem(shape);
  AttentionParams p = problem.params();
  p.exec.device = Device::Cuda;
  EXPECT_TRUE(attention(p).ok());
}

// --- Values in device memory, which only DCA_CHECK=1 reads ---

class CudaCheckedValues : public ::testing::Test {
 protected:
  void SetUp() override {
    const char* value = std::getenv("DCA_CHECK");
    if (value == nullptr || std::string(value) != "1") GTEST_SKIP() << "needs DCA_CHECK=1 in the environment";
    if (const std::string why = missing_kernel(decode_shape()); !why.empty()) GTEST_SKIP() << why;
  }

  static void expect_value_refused(const AttentionParams& p, HostBuffers buffers, const std::vector<int32_t>& values,
                                   const std::string& message) {
    buffers.push_back(buffer_of(values));
    const Status status = run_operator(p, buffers);
    EXPECT_EQ(status.code(), StatusCode::InvalidArgument);
    EXPECT_NE(status.message().find(message), std::string::npos) << status.message();
  }
};

TEST_F(CudaCheckedValues, Lengths) {
  AttentionProblem problem(decode_shape());
  AttentionParams p = problem.params();
  const std::vector<int32_t> wild = {1000};
  p.cache_seqlens = wild.data();
  expect_value_refused(p, problem.buffers(), wild, "cache_seqlens must fit in the cache: sequence 0 needs 1000 slots");
  p = problem.params();
  p.cache_leftpad = wild.data();
  expect_value_refused(p, problem.buffers(), wild, "cache_leftpad must be between 0 and the slots in use (33)");
}

TEST_F(CudaCheckedValues, Pages) {
  ProblemShape shape = decode_shape();
  shape.keys = KeyLayout::Paged;
  shape.page_size = 16;
  AttentionProblem problem(shape);
  AttentionParams p = problem.params();
  const std::vector<int32_t> wild(static_cast<size_t>(p.pages.max_pages), 77);
  p.pages.page_table = wild.data();
  expect_value_refused(p, problem.buffers(), wild, "page_table entries in use must be between 0 and num_pages - 1");
}

TEST_F(CudaCheckedValues, GoodOnesPass) {
  ProblemShape shape = decode_shape();
  shape.keys = KeyLayout::Paged;
  shape.page_size = 16;
  expect_matches_reference(shape, {1, 2});
}

}  // namespace
}  // namespace dca::testing
