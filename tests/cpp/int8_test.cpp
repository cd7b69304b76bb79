// Caches of int8 with a scale for each slot and KV head: every number, rounding, and attention over them in all
// layouts.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "append_problem.h"
#include "attention_problem.h"

namespace dca::testing {
namespace {

constexpr DType kDTypes[] = {DType::Float32, DType::BFloat16, DType::Float16};
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// --- The format ---

TEST(Int8, TheReferenceReadsAndWritesEveryNumber) {
  for (int32_t x = -128; x <= 127; ++x) {
    int8_t copy = 0x55;
    reference::write(&copy, DType::Int8, 0, x);
    EXPECT_EQ(copy, x);
    EXPECT_EQ(reference::read(&copy, DType::Int8, 0), x);
  }
  EXPECT_EQ(reference::round_to(2.5, DType::Int8), 2.0) << "ties to even";
  EXPECT_EQ(reference::round_to(-3.5, DType::Int8), -4.0) << "ties to even";
  EXPECT_EQ(reference::round_to(1e30, DType::Int8), 127.0);
  EXPECT_EQ(reference::round_to(-kInfinity, DType::Int8), -128.0);
}

// --- What the kernels read ---

// 256 sequences of one key each: all elements of key s are the number s, and element c of its value is s + c.
void expect_numbers_survive(DType dtype, int32_t group, int32_t head_dim) {
  constexpr int32_t kNumbers = 256;
  constexpr double kQuery = 0.25;
  const auto number = [](int32_t s) { return static_cast<double>(static_cast<int8_t>(s)); };
  Tensor q(dtype, kNumbers, 1, group, head_dim), out = q;
  Tensor k(DType::Int8, kNumbers, 1, 1, head_dim), v = k;
  Tensor k_scales(DType::Float32, kNumbers, 1, 1, 1), v_scales = k_scales;
  std::vector<float> lse(static_cast<size_t>(kNumbers * group));
  const Tables tables(2, 0);
  for (int32_t s = 0; s < kNumbers; ++s) {
    k_scales.set(k_scales.offset(s, 0, 0), 0.5 + s);  // powers of two leave the numbers of v as they are
    v_scales.set(v_scales.offset(s, 0, 0), s % 2 == 0 ? 0.25 : 4.0);
    for (int32_t c = 0; c < head_dim; ++c) {
      for (int32_t head = 0; head < group; ++head) q.set(q.offset(s, 0, head) + c, kQuery);
      k.set(k.offset(s, 0, 0) + c, number(s));
      v.set(v.offset(s, 0, 0) + c, number(s + c));
    }
  }
  AttentionParams p;
  p.dtype = dtype;
  p.cache_dtype = DType::Int8;
  p.batch = kNumbers;
  p.num_heads = group;
  p.num_heads_kv = 1;
  p.head_dim = head_dim;
  p.seqlen_q = p.seqlen_k = p.cache_seqlen = 1;
  p.q = q.ref();
  p.k = k.ref();
  p.v = v.ref();
  p.k_scale = k_scales.scales();
  p.v_scale = v_scales.scales();
  p.out = out.mutable_ref();
  p.lse = lse.data();
  p.rotary = {tables.cos.data(), tables.sin.data(), 2, 0, false};
  const Status status = attention(p);
  ASSERT_TRUE(status.ok()) << status.message();
  for (int32_t s = 0; s < kNumbers; ++s) {
    for (int32_t head = 0; head < group; ++head) {
      const double exact = kQuery * head_dim * number(s) * (0.5 + s);
      EXPECT_NEAR(lse[static_cast<size_t>(s * group + head)], exact, 1e-6 * std::fabs(exact)) << "number " << s;
      for (int32_t c = 0; c < head_dim; ++c) {
        ASSERT_EQ(out.at(out.offset(s, 0, head) + c), number(s + c) * (s % 2 == 0 ? 0.25 : 4.0));
      }
    }
  }
}

// One row reads keys and values where they lie, a long group a packed block of keys and a converted block of values.
TEST(Int8, EveryNumberSurvivesTheLoads) {
  for (const DType dtype : kDTypes) {
    for (const int32_t group : {1, 2, 3, 6, 32}) {
      for (const int32_t head_dim : {20, 64}) expect_numbers_survive(dtype, group, head_dim);
    }
  }
}

// --- What append writes ---

// One append of rows of `head_dim` in fp32 without rotation.
struct Quantized {
  std::vector<int8_t> numbers;
  std::vector<float> scales;
  std::vector<int8_t> values;
  std::vector<float> value_scales;
};

Quantized quantize(const std::vector<float>& inputs, int32_t head_dim) {
  const Tables tables(2, 0);
  const int32_t rows = static_cast<int32_t>(inputs.size()) / head_dim;
  Quantized result;
  result.numbers.assign(inputs.size(), 0x55);
  result.values = result.numbers;
  result.scales.assign(static_cast<size_t>(rows), 7.0f);
  result.value_scales = result.scales;
  AppendParams p;
  p.cache_dtype = DType::Int8;
  p.batch = p.num_heads_kv = 1;
  p.head_dim = head_dim;
  p.seqlen_k = p.cache_slots = rows;
  p.k = p.v = {inputs.data(), {0, head_dim, head_dim}};
  p.k_cache = {result.numbers.data(), {0, head_dim, head_dim}};
  p.v_cache = {result.values.data(), {0, head_dim, head_dim}};
  p.k_scale_out = {result.scales.data(), {0, 1, 1}};
  p.v_scale_out = {result.value_scales.data(), {0, 1, 1}};
  p.rotary = {tables.cos.data(), tables.sin.data(), 2, 0, false};
  const Status status = rotate_and_append_kv(p);
  EXPECT_TRUE(status.ok()) << status.message();
  return result;
}

TEST(Int8, AppendRoundsOnceToNearestEven) {
  for (const int32_t head_dim : {1, 5, 16, 64, 100}) {
    for (const float scale : {1.0f, 0.3f, 1e-30f, 2e35f}) {
      // All numbers, the middles between neighbours and what lies just beside them; each row has its 127.
      std::vector<float> inputs;
      for (int32_t half = -253; half <= 253; ++half) {
        const float x = 0.5f * static_cast<float>(half) * scale;
        for (const float y : {x, std::nextafter(x, -kInfinity), std::nextafter(x, kInfinity)}) {
          if (inputs.size() % static_cast<size_t>(head_dim) == 0) inputs.push_back(127.0f * scale);
          if (inputs.size() % static_cast<size_t>(head_dim) != 0) inputs.push_back(y);
        }
      }
      while (inputs.size() % static_cast<size_t>(head_dim) != 0) inputs.push_back(0.0f);
      const Quantized result = quantize(inputs, head_dim);
      for (size_t i = 0; i < inputs.size(); ++i) {
        const float divisor = 127.0f * scale / 127.0f;
        ASSERT_EQ(result.scales[i / static_cast<size_t>(head_dim)], divisor);
        ASSERT_EQ(result.numbers[i], std::nearbyint(inputs[i] / divisor)) << inputs[i] << " / " << divisor;
      }
      EXPECT_EQ(result.values, result.numbers);
      EXPECT_EQ(result.value_scales, result.scales);
    }
  }
}

TEST(Int8, RowsWithoutAScaleAreZeros) {
  constexpr int32_t kDim = 37;
  for (const float special : {0.0f, -0.0f, 0x1p-149f, std::nanf(""), kInfinity, -kInfinity}) {
    for (const int32_t at : {0, 7, 31, 36}) {
      const bool finite = std::isfinite(special);
      std::vector<float> inputs(kDim, finite ? 0.0f : 3.0f);
      inputs[static_cast<size_t>(at)] = special;
      const Quantized result = quantize(inputs, kDim);
      EXPECT_TRUE(finite ? result.scales[0] == 0.0f : std::isnan(result.scales[0]))
          << special << " is " << result.scales[0];
      EXPECT_EQ(result.numbers, std::vector<int8_t>(kDim, 0)) << special;
      EXPECT_TRUE(finite ? result.value_scales[0] == 0.0f : std::isnan(result.value_scales[0]));
      EXPECT_EQ(result.values, result.numbers);
    }
  }
}

// The scale of subnormal numbers is itself subnormal, and rounded so coarsely that quotients can pass 127.
TEST(Int8, QuotientsEndAt127) {
  for (const int32_t head_dim : {2, 16, 33}) {
    std::vector<float> inputs(static_cast<size_t>(head_dim), 0.0f);
    inputs.front() = -190 * 0x1p-149f;
    inputs.back() = 189 * 0x1p-149f;
    const Quantized result = quantize(inputs, head_dim);
    EXPECT_EQ(result.scales[0], 0x1p-149f);
    EXPECT_EQ(result.numbers.front(), -127);
    EXPECT_EQ(result.numbers.back(), 127);
  }
}

AppendShape appended(DType dtype) { return append_into(DType::Int8, Scales::PerRow, dtype); }

TEST(Int8, AppendMatchesTheReference) {
  for (const DType dtype : kDTypes) expect_appends_match_reference(appended(dtype));
}

TEST(Int8, AppendRotatesPartially) { expect_partial_rotations_match_reference(appended(DType::BFloat16)); }

// --- Attention ---

ProblemShape cached(DType dtype, int32_t group, int32_t seqlen_q) {
  ProblemShape shape;
  shape.dtype = dtype;
  shape.cache_dtype = DType::Int8;
  shape.scales = Scales::PerRow;
  shape.num_heads = 2 * group;
  shape.kv_lens = {1, 2, 16, 17, 23, 24, 25, 32, 33, 48, 49, 53};  // n = 16, P = 23: around every kind of border
  shape.q_lens.assign(shape.kv_lens.size(), seqlen_q);
  return shape;
}

void expect_matches_reference(const ProblemShape& shape, const std::vector<int32_t>& split_counts = {1, 4}) {
  AttentionProblem problem(shape);
  EXPECT_TRUE(problem.matches_reference(problem.params(), split_counts));
}

TEST(Int8, DecodeAndSeveralTokens) {
  for (const DType dtype : kDTypes) {
    for (const int32_t group : {1, 4, 8}) {
      for (const int32_t seqlen_q : {1, 5, 20}) {
        ProblemShape shape = cached(dtype, group, seqlen_q);
        expect_matches_reference(shape);
        shape.keys = KeyLayout::Paged;
        expect_matches_reference(shape);
      }
    }
  }
}

// A weight of 0 times such a scale is not 0.
TEST(Int8, ANaNForTheScaleOfAValueReachesExactlyTheRowsThatSeeIt) {
  constexpr int64_t kKey = 95;
  for (const DType dtype : kDTypes) {
    for (const int32_t seqlen_q : {90, 6}) {
      const ProblemShape shape = last_rows_of_100(cached(dtype, 4, seqlen_q), seqlen_q);
      AttentionProblem problem(shape);
      const AttentionParams p = problem.params();
      for (int32_t head = 0; head < shape.num_heads_kv; ++head) {
        const int64_t at = kKey * p.v_scale.stride.row + head * p.v_scale.stride.head;
        const_cast<float*>(p.v_scale.data)[at] = std::nanf("");
      }
      EXPECT_TRUE(problem.matches_reference(p)) << "seqlen_q " << seqlen_q;
    }
  }
}

// Longer than a block of keys, whose columns are scaled in vectors and one by one.
TEST(Int8, LongCaches) {
  for (const int32_t seqlen_q : {1, 60}) {
    ProblemShape shape = cached(DType::Float32, 4, seqlen_q);
    shape.chunk = {160, 200};
    shape.kv_lens = {127, 128, 129, 300, 517};
    shape.q_lens.assign(shape.kv_lens.size(), seqlen_q);
    expect_matches_reference(shape);
    shape.keys = KeyLayout::Paged;
    expect_matches_reference(shape);
  }
}

TEST(Int8, LeftPaddingAndRaggedQueries) {
  ProblemShape shape = cached(DType::BFloat16, 3, 1);
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

TEST(Int8, RaggedKeys) {
  ProblemShape shape = cached(DType::Float32, 2, 3);
  shape.keys = KeyLayout::Ragged;
  expect_matches_reference(shape);
}

TEST(Int8, HeadDimsThatFitNoVector) {
  for (const int32_t head_dim : {1, 20, 80, 128}) {
    ProblemShape shape = cached(DType::Float32, 2, 2);
    shape.head_dim = head_dim;
    expect_matches_reference(shape);
  }
}

TEST(Int8, SegmentsAlone) {
  for (const auto segment : {SegmentSelection::Intra, SegmentSelection::Successive, SegmentSelection::Inter}) {
    AttentionProblem problem(cached(DType::Float32, 2, 5));
    AttentionParams p = problem.params();
    p.segments = segment;
    EXPECT_TRUE(problem.matches_reference(p, {1, 4}));
  }
}

TEST(Int8, TemperatureAndScalesMultiply) {
  AttentionProblem problem(cached(DType::Float32, 2, 5));
  AttentionParams p = problem.params();
  p.original_max_position_embeddings = 20;
  EXPECT_TRUE(problem.matches_reference(p, {1, 4}));
}

// --- Refusals ---

void expect_refused(const Status& status, const std::string& message) {
  EXPECT_EQ(status.code(), StatusCode::InvalidArgument);
  EXPECT_NE(status.message().find(message), std::string::npos) << status.message();
}

TEST(Int8, AttentionRefusesBadScales) {
  AttentionProblem problem(cached(DType::Float32, 2, 1));
  AttentionParams p = problem.params();
  p.k_scale.data = nullptr;
  expect_refused(attention(p), "k_scale.data of an Int8 cache must not be null");
  p = problem.params();
  p.v_scale.data = nullptr;
  expect_refused(attention(p), "v_scale.data of an Int8 cache must not be null");
  p = problem.params();
  p.v_scale.value = 0.5f;
  expect_refused(attention(p), "v_scale of an Int8 cache must be one for each slot and head, in data; got 0.5");
  p = problem.params();
  p.dtype = DType::Int8;
  expect_refused(attention(p), "dtype must be Float32, BFloat16 or Float16; got 4");
}

TEST(Int8, AppendRefusesBadScales) {
  AppendProblem append(appended(DType::Float32));
  const auto refused = [&](auto spoil, const std::string& message) {
    AppendParams p = append.p;
    spoil(p);
    expect_refused(rotate_and_append_kv(p), message);
  };
  const std::vector<float> scales = {1.0f, 1.0f};
  refused([](AppendParams& p) { p.k_scale_out.data = nullptr; }, "k_scale_out.data of an Int8 cache must not be null");
  refused([](AppendParams& p) { p.v_scale_out.data = nullptr; }, "v_scale_out.data of an Int8 cache must not be null");
  refused([&](AppendParams& p) { p.k_scale.data = scales.data(); },
          "k_scale must be left out for an append to an Int8 cache, which writes its scales to k_scale_out; got one");
  refused([](AppendParams& p) { p.v_scale.value = 2.0f; }, "v_scale of an Int8 cache must be one for each slot");
  refused([](AppendParams& p) { p.cache_dtype = DType::Float8E4M3; },
          "k_scale_out must be left out for a cache that is not Int8; got one");
  for (const Tensor* tensor : {&append.k_cache, &append.v_cache, &append.k_row_scales, &append.v_row_scales}) {
    for (const double x : tensor->values()) ASSERT_TRUE(std::isnan(x)) << "a refused call has written nothing";
  }
}

// In any build: an empty call needs no kernel, and is checked like another.
TEST(Int8, CudaHasNone) {
  const std::string message = "an int8 cache is for the CPU only: on CUDA cache_dtype must be Same or Float8E4M3";
  AttentionProblem problem(cached(DType::BFloat16, 2, 1));
  AttentionParams p = problem.params();
  p.exec.device = Device::Cuda;
  p.batch = 0;
  expect_refused(attention(p), message);
  AppendProblem append(appended(DType::BFloat16));
  append.p.exec.device = Device::Cuda;
  append.p.batch = 0;
  expect_refused(rotate_and_append_kv(append.p), message);
}

TEST(Int8, TheKernelIsThatOfTheShapes) {
  AttentionProblem problem(cached(DType::BFloat16, 1, 1));
  AttentionParams p = problem.params();
  std::string kernel;
  ASSERT_TRUE(describe_attention(p, &kernel).ok());
  EXPECT_NE(kernel.find("/rows"), std::string::npos) << kernel;
}

}  // namespace
}  // namespace dca::testing
