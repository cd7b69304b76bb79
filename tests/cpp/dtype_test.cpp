// Conversions of bf16 and fp16, every bit pattern, through the public operators.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "attention_problem.h"

namespace dca::testing {
namespace {

constexpr int32_t kDim = 64;
constexpr int32_t kPatterns = 1 << 16;
constexpr DType kHalves[] = {DType::BFloat16, DType::Float16};

std::vector<uint16_t> every_pattern() {
  std::vector<uint16_t> patterns;
  for (int32_t bits = 0; bits < kPatterns; ++bits) patterns.push_back(static_cast<uint16_t>(bits));
  return patterns;
}

void expect_same_numbers(const std::vector<uint16_t>& actual, const std::vector<uint16_t>& expected, DType dtype) {
  for (size_t i = 0; i < expected.size(); ++i) {
    if (std::isnan(reference::read(expected.data(), dtype, static_cast<int64_t>(i)))) {
      const double x = reference::read(actual.data(), dtype, static_cast<int64_t>(i));
      ASSERT_TRUE(std::isnan(x)) << std::hex << expected[i];
    } else {
      ASSERT_EQ(actual[i], expected[i]) << std::hex << expected[i];
    }
  }
}

TEST(Dtype, TheReferenceReadsAndWritesEveryNumber) {
  for (const DType dtype : kHalves) {
    const std::vector<uint16_t> patterns = every_pattern();
    std::vector<uint16_t> copies(kPatterns);
    for (int32_t i = 0; i < kPatterns; ++i) {
      reference::write(copies.data(), dtype, i, reference::read(patterns.data(), dtype, i));
    }
    expect_same_numbers(copies, patterns, dtype);
  }
  const uint16_t one_and_a_half[] = {0x3fc0, 0x3e00};
  EXPECT_EQ(reference::read(one_and_a_half, DType::BFloat16, 0), 1.5);
  EXPECT_EQ(reference::read(one_and_a_half, DType::Float16, 1), 1.5);
  EXPECT_EQ(reference::round_to(1.0 + 0x1p-8, DType::BFloat16), 1.0) << "ties to even";
  EXPECT_EQ(reference::round_to(1.0 + 0x3p-8, DType::BFloat16), 1.0 + 0x1p-6) << "ties to even";
  EXPECT_EQ(reference::round_to(65519.0, DType::Float16), 65504.0);
  EXPECT_EQ(reference::round_to(65520.0, DType::Float16), std::numeric_limits<double>::infinity());
  EXPECT_EQ(reference::round_to(0x1.8p-24, DType::Float16), 0x1p-23) << "subnormal";
}

// Without rotation rotate_keys is load and store.
TEST(Dtype, EveryNumberSurvivesLoadAndStore) {
  for (const DType dtype : kHalves) {
    const std::vector<uint16_t> in = every_pattern();
    std::vector<uint16_t> out(in.size(), 0x1234);
    const Tables tables(1, 0);
    RotateKeysParams p;
    p.dtype = dtype;
    p.batch = p.num_heads_kv = 1;
    p.head_dim = kDim;
    p.seqlen_k = kPatterns / kDim;
    p.k = {in.data(), {0, kDim, kDim}};
    p.out = {out.data(), {0, kDim, kDim}};
    p.rotary = {tables.cos.data(), tables.sin.data(), 2, 0, false};
    ASSERT_TRUE(rotate_keys(p).ok());
    expect_same_numbers(out, in, dtype);
  }
}

// The products of bfloat16 numbers of AVX-512 and AMX take subnormal ones, below 2^-126, for 0; no mode changes that.
bool becomes_zero(uint16_t bits, DType dtype, bool packed) {
  const std::string isa = build_info().cpu_isa;
  const bool multiplies = isa == "avx512_bf16" || (isa == "amx_bf16" && packed);
  return dtype == DType::BFloat16 && multiplies && (bits & 0x7f80) == 0;
}

// A query that sees one key returns its value as it is: the vectorised loads, for every number. One row (decode) reads
// values in place, many rows (a long group) read a converted block.
TEST(Dtype, EveryNumberSurvivesTheValueLoads) {
  for (const DType dtype : kHalves) {
    for (const int32_t group : {1, 32}) {
      const std::vector<uint16_t> values = every_pattern();
      constexpr int32_t kSequences = kPatterns / kDim;
      const std::vector<uint16_t> zeros(values.size(), 0);
      std::vector<uint16_t> out(values.size() * static_cast<size_t>(group), 0x1234);
      const std::vector<uint16_t> queries(out.size(), 0);
      const Tables tables(2, 0);
      AttentionParams p;
      p.dtype = dtype;
      p.batch = kSequences;
      p.num_heads = group;
      p.num_heads_kv = 1;
      p.head_dim = kDim;
      p.seqlen_q = p.seqlen_k = p.cache_seqlen = 1;
      p.q = {queries.data(), {group * kDim, group * kDim, kDim}};
      p.k = {zeros.data(), {kDim, kDim, kDim}};
      p.v = {values.data(), {kDim, kDim, kDim}};
      p.out = {out.data(), {group * kDim, group * kDim, kDim}};
      p.rotary = {tables.cos.data(), tables.sin.data(), 2, 0, false};
      ASSERT_TRUE(attention(p).ok());
      std::vector<uint16_t> expected;
      for (int32_t b = 0; b < kSequences; ++b) {
        for (int32_t h = 0; h < group; ++h) {
          // The weight 1 is multiplied into O and divided out again, which turns -0 into 0 + -0 = 0.
          for (int32_t c = 0; c < kDim; ++c) {
            const uint16_t bits = values[static_cast<size_t>(b) * kDim + c];
            expected.push_back(bits == 0x8000 || becomes_zero(bits, dtype, group > 1) ? uint16_t{0} : bits);
          }
        }
      }
      expect_same_numbers(out, expected, dtype);
    }
  }
}

// Halfway cases, overflow and subnormals of the store, made by tables that scale.
TEST(Dtype, StoreRoundsToNearestEven) {
  for (const DType dtype : kHalves) {
    for (const double scale : {1.0 + 0x1p-8, 1.0 + 0x1p-11, 1.0 + 0x3p-9, 0x1p-3, 0x1.8p-1, 3.0, 0x1p-20}) {
      const std::vector<uint16_t> in = every_pattern();
      std::vector<uint16_t> out(in.size(), 0x1234);
      const std::vector<float> cos(kDim, static_cast<float>(scale));
      const std::vector<float> sin(kDim, 0.0f);
      RotateKeysParams p;
      p.dtype = dtype;
      p.batch = p.num_heads_kv = 1;
      p.head_dim = kDim;
      p.seqlen_k = kPatterns / kDim;
      p.k = {in.data(), {0, kDim, kDim}};
      p.out = {out.data(), {0, kDim, kDim}};
      p.rotary = {cos.data(), sin.data(), 2, kDim / 2, false};
      ASSERT_TRUE(rotate_keys(p).ok());
      for (int32_t i = 0; i < kPatterns; ++i) {
        const double x = reference::read(in.data(), dtype, i);
        const double partner = reference::read(in.data(), dtype, i ^ (kDim / 2));
        if (!std::isfinite(x) || !std::isfinite(partner)) continue;  // 0 * infinity of the partner is NaN
        // fp32 rounds first, as the operator's "rotation in fp32" says.
        const double exact = reference::round_to(static_cast<float>(x) * static_cast<float>(scale), dtype);
        ASSERT_EQ(reference::read(out.data(), dtype, i), exact) << x << " * " << scale;
      }
    }
  }
}

}  // namespace
}  // namespace dca::testing
