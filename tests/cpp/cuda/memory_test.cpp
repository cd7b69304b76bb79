// The memory-bound kernels: rotation, append, merge.
#include <climits>

#include "append_problem.h"
#include "cuda_cases.h"
#include "merge_problem.h"

namespace dca::testing {
namespace {

constexpr DType kDTypes[] = {DType::Float32, DType::BFloat16, DType::Float16};

void expect_appended(const AppendShape& shape) {
  AppendProblem(shape).expect_matches_reference();
  ++kernel_cases;
}

TEST(CudaAppend, ContiguousCacheAcrossChunkBorders) {
  for (const DType dtype : kDTypes) {
    for (const int32_t rows : {1, 5, 9}) {
      AppendShape shape;
      shape.dtype = dtype;
      shape.new_rows.assign(3, rows);
      expect_appended(shape);
    }
  }
}

TEST(CudaAppend, PagedCache) {
  for (const DType dtype : kDTypes) {
    for (const int32_t page_size : {16, 64}) {
      AppendShape shape;
      shape.dtype = dtype;
      shape.page_size = page_size;
      expect_appended(shape);
    }
  }
}

TEST(CudaAppend, RaggedRows) {
  AppendShape shape;
  shape.dtype = DType::BFloat16;
  shape.ragged = true;
  shape.new_rows = {0, 1, 0, 17, 3, 0};
  shape.before = {3, 16, 40, 15, 0, 7};
  expect_appended(shape);
  shape.page_size = 16;
  expect_appended(shape);
}

TEST(CudaAppend, LeftPadding) {
  AppendShape shape;
  shape.dtype = DType::Float16;
  shape.leftpads = {3, 13, 0};
  expect_appended(shape);
}

TEST(CudaAppend, PartialAndInterleavedRotation) {
  for (const bool interleaved : {false, true}) {
    for (const int32_t half : {0, 1, 20, 24, 40}) {
      AppendShape shape;
      shape.dtype = DType::BFloat16;
      shape.head_dim = 80;
      shape.half_rotary_dim = half;
      shape.interleaved = interleaved;
      expect_appended(shape);
    }
  }
}

TEST(CudaAppend, HeadDims) {
  for (const int32_t head_dim : {8, 64, 96, 128, 256}) {
    AppendShape shape;
    shape.dtype = DType::BFloat16;
    shape.head_dim = head_dim;
    shape.half_rotary_dim = head_dim / 2;
    expect_appended(shape);
  }
}

// Slots behind the cache and pages that it has not are dropped; what fits is written.
TEST(CudaAppend, PastTheCacheIsDropped) {
  for (const int32_t page_size : {0, 16}) {
    for (const int32_t wild : {INT_MAX, INT_MAX - 2, INT_MIN, 38, 48, -3}) {
      AppendShape shape;
      shape.dtype = DType::BFloat16;
      shape.page_size = page_size;
      AppendProblem problem(shape);
      const std::vector<int32_t> before = {wild, 0, wild};
      const std::vector<int32_t> table(problem.page_table.size(), wild);
      AppendParams p = problem.p;
      p.cache_seqlens = before.data();
      if (page_size > 0) p.pages.page_table = table.data();
      HostBuffers buffers = problem.buffers();
      buffers.push_back(buffer_of(before));
      buffers.push_back(buffer_of(table));
      const Status status = run_operator(p, buffers);
      ASSERT_TRUE(status.ok()) << status.message();
      EXPECT_TRUE(problem.k_cache.gaps_are_nan());
      ++kernel_cases;
    }
  }
}

TEST(CudaRotateKeys, MatchesTheReference) {
  for (const DType dtype : kDTypes) {
    for (const AppendShape& shape : shapes_to_rotate(dtype)) {
      expect_rotated(shape);
      ++kernel_cases;
    }
  }
}

void expect_merged(MergeProblem& problem) {
  problem.expect_matches_reference();
  ++kernel_cases;
}

TEST(CudaMerge, WeighsPartsByTheirLse) {
  for (const DType dtype : kDTypes) {
    for (const int32_t num_parts : {1, 2, 3, 64}) {
      MergeProblem problem(dtype, num_parts, 2, 7, 3, 80);
      expect_merged(problem);
    }
  }
}

TEST(CudaMerge, OddShapes) {
  MergeProblem one(DType::Float32, 2, 1, 1, 1, 1);
  expect_merged(one);
  MergeProblem odd(DType::BFloat16, 2, 1, 131, 2, 7);
  expect_merged(odd);
}

TEST(CudaMerge, PartsWithoutKeysCarryNoWeightWhateverTheirOutHolds) {
  MergeProblem problem(DType::BFloat16, 3, 1, 7, 2, 64);
  for (int64_t r = 0; r < 7; ++r) {
    for (int32_t head = 0; head < 2; ++head) {
      for (int32_t part = 0; part < 3; ++part) {
        if ((r >> part & 1) != 0) continue;  // row r keeps the parts of its bits; row 0 none
        problem.lses[part][head * 7 + r] = -std::numeric_limits<float>::infinity();
        for (int32_t c = 0; c < 64; ++c) {
          reference::write(problem.outs[part].data(), DType::BFloat16, (r * 2 + head) * 64 + c, NAN);
        }
      }
    }
  }
  expect_merged(problem);
}

TEST(CudaMerge, NaNIsNotHidden) {
  for (const float other : {-std::numeric_limits<float>::infinity(), 0.5f}) {
    MergeProblem problem(DType::BFloat16, 2, 1, 2, 1, 8);
    problem.lses[0][1] = NAN;
    problem.lses[1][1] = other;
    const Status status = run_operator(problem.p, problem.buffers());
    ASSERT_TRUE(status.ok()) << status.message();
    EXPECT_FALSE(std::isnan(problem.lse[0]));
    EXPECT_TRUE(std::isnan(problem.lse[1]));
    for (int32_t c = 0; c < 8; ++c) EXPECT_TRUE(std::isnan(problem.out_values()[static_cast<size_t>(8 + c)]));
    ++kernel_cases;
  }
}

TEST(CudaMerge, TooManyPartsAreRefused) {
  MergeProblem problem(DType::BFloat16, 65, 1, 1, 1, 8);
  const Status status = run_operator(problem.p, problem.buffers());
  EXPECT_EQ(status.code(), StatusCode::InvalidArgument);
  EXPECT_NE(status.message().find("at most 64 parts on CUDA; got 65"), std::string::npos) << status.message();
}

}  // namespace
}  // namespace dca::testing
