// One attention call with all the memory it needs, NaN wherever the operator must not look or write.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "dca/dca.h"
#include "error_rule.h"
#include "reference.h"
#include "run_operator.h"

namespace dca::testing {

/// EXPECT_TRUE(accepted(error_rule::...)) shows the verdict's message.
inline ::testing::AssertionResult accepted(const error_rule::Verdict& verdict) {
  return (verdict.ok ? ::testing::AssertionSuccess() : ::testing::AssertionFailure()) << verdict.message;
}

/// (batch, rows, heads, dim) in any dtype. Neither heads nor rows nor sequences touch: NaN lies between them, and
/// everywhere at first. Int8 has no NaN; -128, which no append writes, is taken for it.
class Tensor {
 public:
  Tensor() = default;
  Tensor(DType dtype, int64_t batch, int64_t rows, int32_t heads, int32_t dim);

  void fill_with_nan();
  void randomize(std::mt19937& random);
  void randomize_row(std::mt19937& random, int64_t batch, int64_t row);
  /// The same, for elements that stand for themselves times a scale.
  void randomize_row(std::mt19937& random, int64_t batch, int64_t row, const CacheScale& scale);

  ConstTensorRef ref() const { return {bytes_.data(), stride_}; }
  TensorRef mutable_ref() { return {bytes_.data(), stride_}; }
  int64_t offset(int64_t batch, int64_t row, int32_t head) const {
    return batch * stride_.batch + row * stride_.row + head * stride_.head;
  }
  double at(int64_t offset) const;
  void set(int64_t offset, double value) { reference::write(bytes_.data(), dtype_, offset, value); }

  /// Everything, contiguous.
  std::vector<double> values() const;
  /// True if all that lies between heads, rows and sequences is still NaN.
  bool gaps_are_nan() const;
  const std::vector<uint8_t>& bytes() const { return bytes_; }

  /// Of Float32 and dim 1: the scales of an Int8 cache.
  CacheScale scales() const { return {1.0f, reinterpret_cast<const float*>(bytes_.data()), stride_}; }
  CacheScaleRef mutable_scales() { return {reinterpret_cast<float*>(bytes_.data()), stride_}; }

 private:
  DType dtype_ = DType::Float32;
  int64_t batch_ = 0;
  int64_t rows_ = 0;
  int32_t heads_ = 0;
  int32_t dim_ = 0;
  Strides stride_;
  std::vector<uint8_t> bytes_;
};

/// cos and sin of positions 0 ... num_positions - 1, times `scale`.
struct Tables {
  std::vector<float> cos;
  std::vector<float> sin;

  Tables() = default;
  Tables(int64_t num_positions, int32_t half_dim, double base = 10000.0, double scale = 1.0);
};

enum class KeyLayout { Slots, Ragged, Paged };

/// Scales of a Float8E4M3 cache, and those of an Int8 one.
enum class Scales { None, Number, PerTensor, PerHead, PerRow };

/// Scales for K (which 0) or V (which 1) of num_heads_kv heads, in `memory`; no two are equal. None for PerRow.
CacheScale make_scale(Scales kind, int32_t num_heads_kv, int32_t which, std::vector<float>& memory);

struct ProblemShape {
  DType dtype = DType::Float32;
  DType cache_dtype = DType::Same;
  Scales scales = Scales::None;
  int32_t head_dim = 64;
  int32_t num_heads = 4;
  int32_t num_heads_kv = 2;
  ChunkGeometry chunk{16, 23};
  std::vector<int32_t> kv_lens = {33};  ///< logical keys of each sequence
  std::vector<int32_t> q_lens;          ///< query rows of each sequence; empty: as kv_lens
  bool ragged_q = false;                ///< else all q_lens are equal
  KeyLayout keys = KeyLayout::Slots;
  int32_t page_size = 7;
  std::vector<int32_t> leftpads;  ///< empty: none
  int32_t half_rotary_dim = -1;   ///< -1: head_dim / 2
  bool interleaved = false;
  uint32_t seed = 1;
};

std::string to_string(const ProblemShape& shape);

/// The last rows of 100 tokens in two chunks: many, which pack their keys, or few, which read them in place. Key 95 is
/// the last one of a run, seen by all of six rows but the first; 97 lies inside of a run.
ProblemShape last_rows_of_100(ProblemShape shape, int32_t rows);

/// Random queries, keys (taken as rotated already) and values.
class AttentionProblem {
 public:
  explicit AttentionProblem(const ProblemShape& shape);
  AttentionProblem(const AttentionProblem&) = delete;  // the parameters point into it

  /// Parameters of the call; fills out and lse with NaN.
  AttentionParams params();

  /// Result of the last call of dca::attention, as the reference lays it out.
  std::vector<double> out() const { return out_.values(); }
  std::vector<double> lse() const { return {lse_.begin(), lse_.end()}; }
  const Tensor& out_tensor() const { return out_; }

  /// Runs the call and compares out and lse with the reference, by the error rule; nothing else may be written.
  ::testing::AssertionResult matches_reference(const AttentionParams& params) {
    return matches_reference(params, {params.num_splits});
  }

  /// The same for several values of num_splits: the exact result is one.
  /// `more` is memory that the test itself gave to the parameters.
  ::testing::AssertionResult matches_reference(AttentionParams params, const std::vector<int32_t>& split_counts,
                                               const HostBuffers& more = {});

  /// All memory that params() points into.
  HostBuffers buffers() const;

 private:
  void build_queries(std::mt19937& random);
  void build_keys(std::mt19937& random);
  void build_pages(std::mt19937& random);
  void build_cache(int64_t blocks, int64_t rows);
  void forget_results();
  int32_t leftpad(size_t b) const { return shape_.leftpads.empty() ? 0 : shape_.leftpads[b]; }

  ProblemShape shape_;
  Tables tables_;
  Tensor q_;
  Tensor k_;
  Tensor v_;
  Tensor out_;
  std::vector<float> lse_;
  std::vector<float> k_scales_;
  std::vector<float> v_scales_;
  Tensor k_row_scales_;  // of an Int8 cache, laid out like it with a head_dim of 1
  Tensor v_row_scales_;
  CacheScale k_scale_;
  CacheScale v_scale_;
  std::vector<int32_t> cu_seqlens_q_ = {0};
  std::vector<int32_t> cu_seqlens_k_ = {0};
  std::vector<int32_t> cache_seqlens_;
  std::vector<int32_t> page_table_;
  int64_t num_pages_ = 0;
  int32_t max_pages_ = 0;
  int32_t slots_ = 0;
};

}  // namespace dca::testing
