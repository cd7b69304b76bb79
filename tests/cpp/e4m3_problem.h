// Caches of 8-bit floating point: what the tests of both devices share.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "append_problem.h"
#include "attention_problem.h"

namespace dca::testing {

inline constexpr int32_t kCodes = 256;
inline constexpr Scales kAllScales[] = {Scales::None, Scales::Number, Scales::PerTensor, Scales::PerHead};

inline double value_of(int32_t code) {
  const auto byte = static_cast<uint8_t>(code);
  return reference::read(&byte, DType::Float8E4M3, 0);
}

/// 256 sequences of one key each: all elements of key s are code s, and element c of its value is code s + c. A query
/// that sees one key returns its value as it is.
struct CodesProblem {
  /// Logits up to 1792: in sight of 10^4 fp32 rounds an exponent by more than fp16 rounds a result.
  static constexpr double kQuery = 1.0 / 64;

  int32_t group;
  Tensor q, k, v, out;
  std::vector<float> lse;
  Tables tables{2, 0};
  AttentionParams p;

  CodesProblem(DType dtype, int32_t query_heads, int32_t head_dim)
      : group(query_heads),
        q(dtype, kCodes, 1, query_heads, head_dim),
        k(DType::Float8E4M3, kCodes, 1, 1, head_dim),
        v(k),
        out(q),
        lse(static_cast<size_t>(kCodes * query_heads), 7.0f) {
    for (int32_t s = 0; s < kCodes; ++s) {
      for (int32_t c = 0; c < head_dim; ++c) {
        for (int32_t head = 0; head < group; ++head) q.set(q.offset(s, 0, head) + c, kQuery);
        k.set(k.offset(s, 0, 0) + c, value_of(s));
        v.set(v.offset(s, 0, 0) + c, value_of(s + c));
      }
    }
    p.dtype = dtype;
    p.cache_dtype = DType::Float8E4M3;
    p.batch = kCodes;
    p.num_heads = group;
    p.num_heads_kv = 1;
    p.head_dim = head_dim;
    p.seqlen_q = p.seqlen_k = p.cache_seqlen = 1;
    p.q = q.ref();
    p.k = k.ref();
    p.v = v.ref();
    p.out = out.mutable_ref();
    p.lse = lse.data();
    p.rotary = {tables.cos.data(), tables.sin.data(), 2, 0, false};
  }

  void expect_exact() {
    const Status status =
        run_operator(p, {buffer_of(q.bytes()), buffer_of(k.bytes()), buffer_of(v.bytes()), buffer_of(out.bytes()),
                         buffer_of(lse), buffer_of(tables.cos), buffer_of(tables.sin)});
    ASSERT_TRUE(status.ok()) << status.message();
    for (int32_t s = 0; s < kCodes; ++s) {
      for (int32_t head = 0; head < group; ++head) {
        const double logit = lse[static_cast<size_t>(s * group + head)];
        if (std::isnan(value_of(s))) {
          EXPECT_TRUE(std::isnan(logit)) << "a NaN in a key must be seen";
          continue;
        }
        // Tensor cores cut the bits of a sum that lie far below its largest term. Another code is off by 1/16.
        EXPECT_NEAR(logit, kQuery * p.head_dim * value_of(s), 1e-5 * std::fabs(logit)) << "code " << s;
        for (int32_t c = 0; c < p.head_dim; ++c) {
          const double x = out.at(out.offset(s, 0, head) + c);
          const double exact = value_of(s + c);
          ASSERT_TRUE(x == exact || (std::isnan(x) && std::isnan(exact))) << x << " is not " << exact;
        }
      }
    }
  }
};

/// One append of k and v = `inputs` in fp32 without rotation, a row of kRow each.
struct RoundingProblem {
  static constexpr int32_t kRow = 64;

  std::vector<float> inputs;
  std::vector<uint8_t> k_cache, v_cache;
  Tables tables{2, 0};
  AppendParams p;

  /// Every number of the format, the middle between neighbours and what lies just beside it, far more, and NaN.
  RoundingProblem() {
    const float infinity = std::numeric_limits<float>::infinity();
    inputs = {464.0f, 465.0f, 1e30f, infinity, std::nanf(""), 0x1p-11f, 0x1p-130f};
    for (int32_t code = 0; code < 0x7f; ++code) {
      const float x = static_cast<float>(value_of(code));
      const float next = code < 0x7e ? static_cast<float>(value_of(code + 1)) : 480.0f;
      const float middle = 0.5f * (x + next);
      for (const float y : {x, middle, std::nextafter(middle, 0.0f), std::nextafter(middle, infinity)}) {
        inputs.push_back(y);
      }
    }
    for (size_t i = inputs.size(); i-- > 0;) inputs.push_back(-inputs[i]);
    while (inputs.size() % kRow != 0) inputs.push_back(1.0f);
    k_cache.assign(inputs.size(), 0x55);
    v_cache = k_cache;
    p.cache_dtype = DType::Float8E4M3;
    p.batch = p.num_heads_kv = 1;
    p.head_dim = kRow;
    p.seqlen_k = p.cache_slots = static_cast<int32_t>(inputs.size()) / kRow;
    p.k = p.v = {inputs.data(), {0, kRow, kRow}};
    p.k_cache = {k_cache.data(), {0, kRow, kRow}};
    p.v_cache = {v_cache.data(), {0, kRow, kRow}};
    p.rotary = {tables.cos.data(), tables.sin.data(), 2, 0, false};
  }

  void expect_rounded(const std::vector<uint8_t>& codes, float scale) const {
    for (size_t i = 0; i < inputs.size(); ++i) {
      uint8_t expected = 0;
      reference::write(&expected, DType::Float8E4M3, 0, inputs[i] / scale);  // the division is one in fp32
      if (std::isnan(inputs[i])) {
        EXPECT_EQ(codes[i] & 0x7f, 0x7f);
      } else {
        ASSERT_EQ(codes[i], expected) << inputs[i] << " / " << scale;
      }
    }
  }

  void expect_rounds_to_nearest_even(float k_scale, float v_scale) {
    p.k_scale.value = k_scale;
    p.v_scale.value = v_scale;
    const Status status = run_operator(
        p, {buffer_of(inputs), buffer_of(k_cache), buffer_of(v_cache), buffer_of(tables.cos), buffer_of(tables.sin)});
    ASSERT_TRUE(status.ok()) << status.message();
    expect_rounded(k_cache, k_scale);
    expect_rounded(v_cache, v_scale);
  }
};

}  // namespace dca::testing
