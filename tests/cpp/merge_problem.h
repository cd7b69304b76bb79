// One merge with all the memory it needs.
#pragma once

#include <gtest/gtest.h>

#include <limits>
#include <random>
#include <vector>

#include "attention_problem.h"

namespace dca::testing {

// Parts of random rows; storage is what element_size says.
struct MergeProblem {
  MergeParams p;
  std::vector<std::vector<uint8_t>> outs;
  std::vector<std::vector<float>> lses;
  std::vector<const void*> out_pointers;
  std::vector<const float*> lse_pointers;
  std::vector<uint8_t> out;
  std::vector<float> lse;

  MergeProblem(DType dtype, int32_t num_parts, int64_t batch, int64_t seqlen, int32_t num_heads, int32_t head_dim) {
    const int64_t rows = batch * seqlen * num_heads;
    std::mt19937 random(3);
    std::normal_distribution<double> normal;
    for (int32_t part = 0; part < num_parts; ++part) {
      outs.emplace_back(static_cast<size_t>(rows * head_dim) * element_size(dtype));
      lses.emplace_back(static_cast<size_t>(rows));
      for (int64_t i = 0; i < rows * head_dim; ++i) reference::write(outs.back().data(), dtype, i, normal(random));
      for (float& x : lses.back()) x = static_cast<float>(3.0 * normal(random));
    }
    for (int32_t part = 0; part < num_parts; ++part) {
      out_pointers.push_back(outs[part].data());
      lse_pointers.push_back(lses[part].data());
    }
    out.resize(static_cast<size_t>(rows * head_dim) * element_size(dtype));
    for (int64_t i = 0; i < rows * head_dim; ++i)
      reference::write(out.data(), dtype, i, std::numeric_limits<float>::quiet_NaN());
    lse.assign(static_cast<size_t>(rows), std::numeric_limits<float>::quiet_NaN());
    p.dtype = dtype;
    p.num_parts = num_parts;
    p.batch = batch;
    p.seqlen = seqlen;
    p.num_heads = num_heads;
    p.head_dim = head_dim;
    p.outs = out_pointers.data();
    p.lses = lse_pointers.data();
    p.out = out.data();
    p.lse = lse.data();
  }

  std::vector<double> out_values() const {
    std::vector<double> values;
    for (int64_t i = 0; i < p.batch * p.seqlen * p.num_heads * p.head_dim; ++i) {
      values.push_back(reference::read(out.data(), p.dtype, i));
    }
    return values;
  }

  HostBuffers buffers() const {
    HostBuffers all = {buffer_of(out), buffer_of(lse)};
    for (const auto& part : outs) all.push_back(buffer_of(part));
    for (const auto& part : lses) all.push_back(buffer_of(part));
    return all;
  }

  void expect_matches_reference() {
    const Status status = run_operator(p, buffers());
    ASSERT_TRUE(status.ok()) << status.message();
    const auto exact = reference::merge_attention_states(p);
    EXPECT_TRUE(accepted(error_rule::rotation(out_values(), exact.out, 6.0, p.dtype)));
    EXPECT_TRUE(accepted(error_rule::lse({lse.begin(), lse.end()}, exact.lse)));
  }
};

}  // namespace dca::testing
