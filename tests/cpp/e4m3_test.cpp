// Caches of 8-bit floating point: every code, rounding and saturation, scales, and attention over them in all layouts.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "append_problem.h"
#include "attention_problem.h"

namespace dca::testing {
namespace {

constexpr int32_t kDim = 64;
constexpr int32_t kCodes = 256;
constexpr DType kDTypes[] = {DType::Float32, DType::BFloat16, DType::Float16};
constexpr Scales kScales[] = {Scales::None, Scales::Number, Scales::PerTensor, Scales::PerHead};

std::vector<uint8_t> every_code() {
  std::vector<uint8_t> codes(kCodes);
  std::iota(codes.begin(), codes.end(), uint8_t{0});
  return codes;
}

double value_of(uint8_t code) { return reference::read(&code, DType::Float8E4M3, 0); }

// --- The format ---

TEST(E4M3, TheReferenceReadsAndWritesEveryCode) {
  for (const uint8_t code : every_code()) {
    uint8_t copy = 0x55;
    reference::write(&copy, DType::Float8E4M3, 0, value_of(code));
    if (std::isnan(value_of(code))) {
      EXPECT_EQ(code & 0x7f, 0x7f);
      EXPECT_TRUE(std::isnan(value_of(copy)));
    } else {
      EXPECT_EQ(copy, code);
    }
  }
  EXPECT_EQ(value_of(0x01), 0x1p-9);
  EXPECT_EQ(value_of(0x07), 0x7p-9);
  EXPECT_EQ(value_of(0x08), 0x1p-6);
  EXPECT_EQ(value_of(0x3c), 1.5);
  EXPECT_EQ(value_of(0xfe), -448.0);
  const double infinity = std::numeric_limits<double>::infinity();
  EXPECT_EQ(reference::round_to(465.0, DType::Float8E4M3), 448.0) << "there is no infinity";
  EXPECT_EQ(reference::round_to(-infinity, DType::Float8E4M3), -448.0);
  EXPECT_EQ(reference::round_to(17.0, DType::Float8E4M3), 16.0) << "ties to even";
  EXPECT_EQ(reference::round_to(19.0, DType::Float8E4M3), 20.0) << "ties to even";
  EXPECT_EQ(reference::round_to(0x1p-10, DType::Float8E4M3), 0.0) << "subnormal, ties to even";
}

// --- What the kernels read ---

// Sequence s has one key and one value, the code s in every element; a query that sees one key returns its value.
struct CodesProblem {
  std::vector<uint8_t> cache;
  std::vector<float> q, out;
  std::vector<float> lse;
  Tables tables{2, 0};
  AttentionParams p;

  explicit CodesProblem(int32_t group) {
    for (const uint8_t code : every_code()) cache.insert(cache.end(), kDim, code);
    q.assign(cache.size() * static_cast<size_t>(group), 0.25f);
    out.assign(q.size(), 7.0f);
    lse.assign(static_cast<size_t>(kCodes * group), 7.0f);
    p.cache_dtype = DType::Float8E4M3;
    p.batch = kCodes;
    p.num_heads = group;
    p.num_heads_kv = 1;
    p.head_dim = kDim;
    p.seqlen_q = p.seqlen_k = p.cache_seqlen = 1;
    p.q = {q.data(), {group * kDim, group * kDim, kDim}};
    p.k = p.v = {cache.data(), {kDim, kDim, kDim}};
    p.out = {out.data(), {group * kDim, group * kDim, kDim}};
    p.lse = lse.data();
    p.rotary = {tables.cos.data(), tables.sin.data(), 2, 0, false};
  }
};

// One row reads keys and values where they lie, a long group a packed block of keys and a converted block of values.
TEST(E4M3, EveryCodeSurvivesTheLoads) {
  for (const int32_t group : {1, 2, 3, 6, 32}) {
    CodesProblem problem(group);
    ASSERT_TRUE(attention(problem.p).ok());
    for (int32_t i = 0; i < kCodes * group; ++i) {
      const double x = value_of(static_cast<uint8_t>(i / group));
      const double logit = problem.lse[static_cast<size_t>(i)];
      if (std::isnan(x)) {
        EXPECT_TRUE(std::isnan(logit)) << "a NaN in a key must be seen";
        continue;
      }
      EXPECT_NEAR(logit, 0.25 * kDim * x, 1e-6 * std::fabs(logit));
      for (int32_t c = 0; c < kDim; ++c) {
        ASSERT_EQ(problem.out[static_cast<size_t>(i * kDim + c)], x) << "code " << i / group << ", group " << group;
      }
    }
  }
}

// --- What append writes ---

// k and v of `inputs` in fp32 through a scale, without rotation.
std::vector<uint8_t> appended(const std::vector<float>& inputs, float scale, bool values) {
  const Tables tables(2, 0);
  const int32_t rows = static_cast<int32_t>(inputs.size()) / kDim;
  std::vector<uint8_t> k_cache(inputs.size(), 0x55), v_cache(inputs.size(), 0x55);
  AppendParams p;
  p.cache_dtype = DType::Float8E4M3;
  p.batch = p.num_heads_kv = 1;
  p.head_dim = kDim;
  p.seqlen_k = p.cache_slots = rows;
  p.k = p.v = {inputs.data(), {0, kDim, kDim}};
  p.k_cache = {k_cache.data(), {0, kDim, kDim}};
  p.v_cache = {v_cache.data(), {0, kDim, kDim}};
  (values ? p.v_scale : p.k_scale).value = scale;
  p.rotary = {tables.cos.data(), tables.sin.data(), 2, 0, false};
  EXPECT_TRUE(rotate_and_append_kv(p).ok());
  return values ? v_cache : k_cache;
}

// Every number of the format, the middle between neighbours and what lies just beside it, far more, and NaN.
std::vector<float> numbers_to_round() {
  const float infinity = std::numeric_limits<float>::infinity();
  std::vector<float> numbers = {464.0f, 465.0f, 1e30f, infinity, std::nanf(""), 0x1p-11f, 0x1p-130f};
  for (uint8_t code = 0; code < 0x7f; ++code) {
    const float x = static_cast<float>(value_of(code));
    const float next = code < 0x7e ? static_cast<float>(value_of(static_cast<uint8_t>(code + 1))) : 480.0f;
    const float middle = 0.5f * (x + next);
    for (const float y : {x, middle, std::nextafter(middle, 0.0f), std::nextafter(middle, infinity)}) {
      numbers.push_back(y);
    }
  }
  for (size_t i = numbers.size(); i-- > 0;) numbers.push_back(-numbers[i]);
  while (numbers.size() % kDim != 0) numbers.push_back(1.0f);
  return numbers;
}

TEST(E4M3, AppendRoundsOnceToNearestEvenAndSaturates) {
  const std::vector<float> numbers = numbers_to_round();
  for (const float scale : {1.0f, 0.25f, 0.3f, 7.0f}) {
    for (const bool values : {false, true}) {
      const std::vector<uint8_t> codes = appended(numbers, scale, values);
      for (size_t i = 0; i < numbers.size(); ++i) {
        uint8_t expected = 0;
        reference::write(&expected, DType::Float8E4M3, 0, numbers[i] / scale);  // the division is one in fp32
        if (std::isnan(numbers[i])) {
          EXPECT_EQ(codes[i] & 0x7f, 0x7f);
        } else {
          ASSERT_EQ(codes[i], expected) << numbers[i] << " / " << scale;
        }
      }
    }
  }
}

TEST(E4M3, AppendMatchesTheReference) {
  for (const DType dtype : kDTypes) {
    for (const Scales scales : kScales) {
      AppendShape shape;
      shape.dtype = dtype;
      shape.cache_dtype = DType::Float8E4M3;
      shape.scales = scales;
      AppendProblem(shape).expect_matches_reference();
      shape.page_size = 3;
      shape.leftpads = {3, 13, 0};
      AppendProblem(shape).expect_matches_reference();
      shape.ragged = true;
      shape.new_rows = {4, 0, 17};
      AppendProblem(shape).expect_matches_reference();
    }
  }
}

TEST(E4M3, AppendRotatesPartially) {
  for (const bool interleaved : {false, true}) {
    for (const int32_t half : {0, 1, 20, 40}) {
      AppendShape shape;
      shape.dtype = DType::BFloat16;
      shape.cache_dtype = DType::Float8E4M3;
      shape.scales = Scales::PerHead;
      shape.head_dim = 80;
      shape.half_rotary_dim = half;
      shape.interleaved = interleaved;
      AppendProblem(shape).expect_matches_reference();
    }
  }
}

// --- Attention ---

ProblemShape cached(DType dtype, Scales scales, int32_t group, int32_t seqlen_q) {
  ProblemShape shape;
  shape.dtype = dtype;
  shape.cache_dtype = DType::Float8E4M3;
  shape.scales = scales;
  shape.num_heads = 2 * group;
  shape.kv_lens = {1, 2, 16, 17, 23, 24, 25, 32, 33, 48, 49, 53};  // n = 16, P = 23: around every kind of border
  shape.q_lens.assign(shape.kv_lens.size(), seqlen_q);
  return shape;
}

void expect_matches_reference(const ProblemShape& shape, const std::vector<int32_t>& split_counts = {1, 4}) {
  AttentionProblem problem(shape);
  EXPECT_TRUE(problem.matches_reference(problem.params(), split_counts));
}

TEST(E4M3, DecodeAndSeveralTokens) {
  for (const DType dtype : kDTypes) {
    for (const Scales scales : kScales) {
      for (const int32_t seqlen_q : {1, 5, 20}) {
        ProblemShape shape = cached(dtype, scales, 4, seqlen_q);
        expect_matches_reference(shape);
        shape.keys = KeyLayout::Paged;
        expect_matches_reference(shape);
      }
    }
  }
}

TEST(E4M3, LeftPaddingAndRaggedQueries) {
  ProblemShape shape = cached(DType::BFloat16, Scales::PerHead, 3, 1);
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

TEST(E4M3, HeadDimsThatFitNoVector) {
  for (const int32_t head_dim : {1, 20, 80, 128}) {
    ProblemShape shape = cached(DType::Float32, Scales::PerHead, 2, 2);
    shape.head_dim = head_dim;
    expect_matches_reference(shape);
  }
}

TEST(E4M3, SegmentsAlone) {
  for (const auto segment : {SegmentSelection::Intra, SegmentSelection::Successive, SegmentSelection::Inter}) {
    AttentionProblem problem(cached(DType::Float32, Scales::PerHead, 2, 5));
    AttentionParams p = problem.params();
    p.segments = segment;
    EXPECT_TRUE(problem.matches_reference(p, {1, 4}));
  }
}

TEST(E4M3, TemperatureAndScalesMultiply) {
  AttentionProblem problem(cached(DType::Float32, Scales::PerHead, 2, 5));
  AttentionParams p = problem.params();
  p.original_max_position_embeddings = 20;
  EXPECT_TRUE(problem.matches_reference(p, {1, 4}));
}

// --- Refusals ---

void expect_refused(const Status& status, const std::string& message) {
  EXPECT_EQ(status.code(), StatusCode::InvalidArgument);
  EXPECT_NE(status.message().find(message), std::string::npos) << status.message();
}

template <class Params, class Call>
void expect_scales_refused(Params p, Call call) {
  for (const float bad : {0.0f, -1.0f, std::nanf(""), std::numeric_limits<float>::infinity()}) {
    Params changed = p;
    changed.k_scale.value = bad;
    expect_refused(call(changed), "k_scale must be finite and above 0; got ");
    const std::vector<float> scales = {1.0f, bad};
    changed = p;
    changed.v_scale.data = scales.data();
    changed.v_scale.stride_head = 1;
    expect_refused(call(changed), "v_scale must be finite and above 0; got ");
  }
  Params changed = p;
  changed.k_scale.stride_head = 2;
  expect_refused(call(changed), "k_scale must have a stride_head of 0 (one scale for all heads) or 1; got 2");
  changed = p;
  changed.cache_dtype = DType::BFloat16;
  expect_refused(call(changed), "cache_dtype must be Same or Float8E4M3; got 1");
  changed = p;
  changed.cache_dtype = DType::Same;
  changed.v_scale.value = 2.0f;
  expect_refused(call(changed), "v_scale must be left out for a cache that is not Float8E4M3");
}

TEST(E4M3, BadScalesAndFormatsAreRefused) {
  AttentionProblem problem(cached(DType::Float32, Scales::None, 2, 1));
  expect_scales_refused(problem.params(), [](const AttentionParams& p) { return attention(p); });
  AppendShape shape;
  shape.cache_dtype = DType::Float8E4M3;
  AppendProblem append(shape);
  expect_scales_refused(append.p, [](const AppendParams& p) { return rotate_and_append_kv(p); });
  for (const double x : append.k_cache.values()) ASSERT_TRUE(std::isnan(x)) << "a refused call has written nothing";
  AttentionParams p = problem.params();
  p.dtype = DType::Float8E4M3;
  expect_refused(attention(p), "dtype must be Float32, BFloat16 or Float16; got 3");
}

}  // namespace
}  // namespace dca::testing
