// What the method promises, seen from outside: rotate_keys and attention together, from unrotated keys.
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "attention_problem.h"

namespace dca::testing {
namespace {

// One sequence, one head, unrotated q, k and v through rotate_keys and attention.
struct OneHead {
  int32_t length;
  int32_t dim;
  Tensor q, k, v, k_rotated, out;
  std::vector<float> lse;

  OneHead(int32_t seqlen, int32_t head_dim) : length(seqlen), dim(head_dim) {
    q = k = v = k_rotated = out = Tensor(DType::Float32, 1, seqlen, 1, head_dim);
    lse.resize(static_cast<size_t>(seqlen));
  }

  void run(ChunkGeometry chunk, const RotaryTables& rotary, float softmax_scale) {
    RotateKeysParams keys;
    keys.chunk = chunk;
    keys.batch = keys.num_heads_kv = 1;
    keys.head_dim = dim;
    keys.seqlen_k = length;
    keys.k = k.ref();
    keys.out = k_rotated.mutable_ref();
    keys.rotary = rotary;
    ASSERT_TRUE(rotate_keys(keys).ok());
    AttentionParams p;
    p.chunk = chunk;
    p.batch = p.num_heads = p.num_heads_kv = 1;
    p.head_dim = dim;
    p.seqlen_q = p.seqlen_k = p.cache_seqlen = length;
    p.q = q.ref();
    p.k = k_rotated.ref();
    p.v = v.ref();
    p.out = out.mutable_ref();
    p.lse = lse.data();
    p.rotary = rotary;
    p.softmax_scale = softmax_scale;
    ASSERT_TRUE(attention(p).ok());
  }
};

// With q = k = (1, 0, ...), one pair of channels that turns by `step` per position, and v_j the unit vector of channel
// j, row i of out is the softmax itself, and logit(i, j) = cos(step * distance): the distances can be read off.
std::vector<std::vector<int>> distances_seen_by_the_kernel(ChunkGeometry chunk, int32_t length) {
  constexpr double kStep = 0.1;
  constexpr double kScale = 4.0;  // sharper logits
  OneHead head(length, 16);
  Tables tables(chunk.max_position + 1, 1);
  for (int32_t position = 0; position <= chunk.max_position; ++position) {
    tables.cos[position] = static_cast<float>(std::cos(kStep * position));
    tables.sin[position] = static_cast<float>(std::sin(kStep * position));
  }
  for (int32_t r = 0; r < length; ++r) {
    for (int32_t c = 0; c < 16; ++c) {
      const int64_t offset = head.q.offset(0, r, 0) + c;
      head.q.set(offset, c == 0 ? 1.0 : 0.0);
      head.k.set(offset, c == 0 ? 1.0 : 0.0);
      head.v.set(offset, c == r ? 1.0 : 0.0);
    }
  }
  head.run(chunk, {tables.cos.data(), tables.sin.data(), chunk.max_position + 1, 1, false}, kScale);
  std::vector<std::vector<int>> rows;
  for (int32_t i = 0; i < length; ++i) {
    rows.emplace_back();
    for (int32_t j = 0; j <= i; ++j) {
      const double logit = std::log(head.out.at(head.out.offset(0, i, 0) + j)) + head.lse[i];
      rows.back().push_back(static_cast<int>(std::lround(std::acos(std::fmin(1.0, logit / kScale)) / kStep)));
    }
    for (int32_t j = i + 1; j < length; ++j) EXPECT_EQ(head.out.at(head.out.offset(0, i, 0) + j), 0.0) << "not causal";
  }
  return rows;
}

TEST(Method, KernelSeesTheDistancesOfThePapersFigure2) {
  const auto rows = distances_seen_by_the_kernel({6, 9}, 12);
  EXPECT_EQ(rows[0], (std::vector<int>{0}));
  EXPECT_EQ(rows[5], (std::vector<int>{5, 4, 3, 2, 1, 0}));
  EXPECT_EQ(rows[7], (std::vector<int>{7, 6, 5, 4, 3, 2, 1, 0}));
  EXPECT_EQ(rows[11], (std::vector<int>{9, 8, 7, 6, 5, 4, 5, 4, 3, 2, 1, 0}));
}

TEST(Method, KernelSeesThreeSegmentsInRow13OfChunk4) {
  const auto rows = distances_seen_by_the_kernel({4, 6}, 14);
  EXPECT_EQ(rows[13], (std::vector<int>{6, 5, 4, 3, 6, 5, 4, 3, 5, 4, 3, 2, 1, 0}));
}

// --- Plain causal attention with RoPE ---

std::vector<double> turned(const Tensor& x, int32_t row, int32_t dim, double base) {
  std::vector<double> y;
  const int64_t offset = x.offset(0, row, 0);
  for (int32_t c = 0; c < dim; ++c) {
    const int32_t half = dim / 2;
    const double angle = row * std::pow(base, -static_cast<double>(c % half) / half);
    const double partner = c < half ? -x.at(offset + c + half) : x.at(offset + c - half);
    y.push_back(x.at(offset + c) * std::cos(angle) + partner * std::sin(angle));
  }
  return y;
}

std::vector<double> causal_row(const OneHead& head, int32_t i, double scale, double base) {
  const std::vector<double> q = turned(head.q, i, head.dim, base);
  std::vector<double> out(static_cast<size_t>(head.dim), 0.0);
  double sum = 0.0;
  for (int32_t j = 0; j <= i; ++j) {
    const std::vector<double> k = turned(head.k, j, head.dim, base);
    double logit = 0.0;
    for (int32_t c = 0; c < head.dim; ++c) logit += q[c] * k[c];
    const double weight = std::exp(scale * logit);
    sum += weight;
    for (int32_t c = 0; c < head.dim; ++c) out[c] += weight * head.v.at(head.v.offset(0, j, 0) + c);
  }
  for (double& x : out) x /= sum;
  return out;
}

double distance_from_causal(ChunkGeometry chunk, int32_t row) {
  constexpr int32_t kDim = 32;
  constexpr double kBase = 100.0;  // fast enough that one position more or less shows
  OneHead head(40, kDim);
  std::mt19937 random(7);
  head.q.randomize(random);
  head.k.randomize(random);
  head.v.randomize(random);
  const Tables tables(chunk.max_position + 1, kDim / 2, kBase);
  head.run(chunk, {tables.cos.data(), tables.sin.data(), chunk.max_position + 1, kDim / 2, false}, 0.5f);
  const std::vector<double> causal = causal_row(head, row, 0.5, kBase);
  double largest = 0.0;
  for (int32_t c = 0; c < kDim; ++c) {
    largest = std::fmax(largest, std::fabs(head.out.at(head.out.offset(0, row, 0) + c) - causal[c]));
  }
  return largest;
}

TEST(Method, RowsUpToMaxPositionAreCausalRopeAndTheNextIsNot) {
  for (const ChunkGeometry chunk : {ChunkGeometry{8, 8}, {8, 12}, {8, 15}, {13, 20}}) {
    for (int32_t row = 0; row <= chunk.max_position; ++row) EXPECT_LT(distance_from_causal(chunk, row), 1e-5) << row;
    EXPECT_GT(distance_from_causal(chunk, chunk.max_position + 1), 1e-3);
  }
}

TEST(Method, AChunkLongerThanTheSequenceIsCausalRope) {
  for (int32_t row = 0; row < 40; ++row) EXPECT_LT(distance_from_causal({64, 100}, row), 1e-5) << row;
}

}  // namespace
}  // namespace dca::testing
