#include "attention_problem.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <sstream>

namespace dca::testing {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr int32_t kHugePage = 1 << 30;  // reading it is a crash
constexpr double kInt8ForNaN = -128.0;  // what reference::write makes of NaN

}  // namespace

// --- Tensor ---

Tensor::Tensor(DType dtype, int64_t batch, int64_t rows, int32_t heads, int32_t dim)
    : dtype_(dtype), batch_(batch), rows_(rows), heads_(heads), dim_(dim) {
  stride_.head = dim + tensor_gaps(dtype).head;
  stride_.row = heads * stride_.head + tensor_gaps(dtype).row;
  stride_.batch = (rows + 1) * stride_.row;
  const int64_t count = std::max<int64_t>(1, batch * stride_.batch);
  bytes_.resize(static_cast<size_t>(count) * element_size(dtype));
  fill_with_nan();
}

double Tensor::at(int64_t offset) const {
  const double x = reference::read(bytes_.data(), dtype_, offset);
  return dtype_ == DType::Int8 && x == kInt8ForNaN ? kNaN : x;
}

void Tensor::fill_with_nan() {
  for (size_t i = 0; i < bytes_.size() / element_size(dtype_); ++i) set(static_cast<int64_t>(i), kNaN);
}

void Tensor::randomize_row(std::mt19937& random, int64_t batch, int64_t row) { randomize_row(random, batch, row, {}); }

void Tensor::randomize_row(std::mt19937& random, int64_t batch, int64_t row, const CacheScale& scale) {
  std::normal_distribution<double> normal;
  for (int32_t head = 0; head < heads_; ++head) {
    const double factor = scale.of(batch, row, head);
    for (int32_t c = 0; c < dim_; ++c) set(offset(batch, row, head) + c, normal(random) / factor);
  }
}

void Tensor::randomize(std::mt19937& random) {
  for (int64_t b = 0; b < batch_; ++b) {
    for (int64_t r = 0; r < rows_; ++r) randomize_row(random, b, r);
  }
}

std::vector<double> Tensor::values() const {
  std::vector<double> values;
  for (int64_t b = 0; b < batch_; ++b) {
    for (int64_t r = 0; r < rows_; ++r) {
      for (int32_t head = 0; head < heads_; ++head) {
        for (int32_t c = 0; c < dim_; ++c) values.push_back(at(offset(b, r, head) + c));
      }
    }
  }
  return values;
}

bool Tensor::gaps_are_nan() const {
  for (int64_t i = 0; i < batch_ * stride_.batch; ++i) {
    const int64_t row = i % stride_.batch / stride_.row;
    const int64_t in_row = i % stride_.batch % stride_.row;
    const bool owned = row < rows_ && in_row / stride_.head < heads_ && in_row % stride_.head < dim_;
    if (!owned && !std::isnan(at(i))) return false;
  }
  return true;
}

Tables::Tables(int64_t num_positions, int32_t half_dim, double base, double scale) {
  for (int64_t position = 0; position < num_positions; ++position) {
    for (int32_t c = 0; c < half_dim; ++c) {
      const double angle = position * std::pow(base, -static_cast<double>(c) / half_dim);
      cos.push_back(static_cast<float>(scale * std::cos(angle)));
      sin.push_back(static_cast<float>(scale * std::sin(angle)));
    }
  }
  if (half_dim == 0) cos = sin = {0.0f};  // a pointer that is not null
}

CacheScale make_scale(Scales kind, int32_t num_heads_kv, int32_t which, std::vector<float>& memory) {
  CacheScale scale;
  if (kind == Scales::None || kind == Scales::PerRow) return scale;
  // 448 of the smallest is what a normal number seldom reaches; some of the elements are subnormal.
  for (int32_t head = 0; head < num_heads_kv; ++head) {
    memory.push_back((which == 0 ? 0.011f : 0.17f) * static_cast<float>(1 + 5 * head));
  }
  if (kind == Scales::Number) {
    scale.value = memory[0];
    memory.clear();
    return scale;
  }
  if (kind == Scales::PerTensor) memory.resize(1);
  scale.data = memory.data();
  scale.stride.head = kind == Scales::PerHead ? 1 : 0;
  return scale;
}

ProblemShape last_rows_of_100(ProblemShape shape, int32_t rows) {
  shape.chunk = {64, 96};
  shape.kv_lens = {100};
  shape.q_lens = {rows};
  return shape;
}

std::string to_string(const ProblemShape& shape) {
  std::ostringstream text;
  text << "dtype " << static_cast<int>(shape.dtype) << ", cache " << static_cast<int>(shape.cache_dtype) << ", scales "
       << static_cast<int>(shape.scales) << ", head_dim " << shape.head_dim << ", heads " << shape.num_heads << "/"
       << shape.num_heads_kv << ", n " << shape.chunk.chunk_len << ", P " << shape.chunk.max_position
       << (shape.ragged_q ? ", ragged q" : "")
       << (shape.keys == KeyLayout::Slots   ? ""
           : shape.keys == KeyLayout::Paged ? ", paged"
                                            : ", ragged k")
       << (shape.leftpads.empty() ? "" : ", left-padded") << (shape.interleaved ? ", interleaved" : "") << ", kv_lens";
  for (const int32_t n : shape.kv_lens) text << " " << n;
  for (size_t b = 0; b < shape.q_lens.size(); ++b) text << (b == 0 ? ", q_lens " : " ") << shape.q_lens[b];
  return text.str();
}

// --- AttentionProblem ---

AttentionProblem::AttentionProblem(const ProblemShape& shape) : shape_(shape) {
  if (shape_.q_lens.empty()) shape_.q_lens = shape_.kv_lens;
  if (shape_.half_rotary_dim < 0) shape_.half_rotary_dim = shape_.head_dim / 2;
  tables_ = Tables(shape_.chunk.max_position + 1, shape_.half_rotary_dim);
  k_scale_ = make_scale(shape_.scales, shape_.num_heads_kv, 0, k_scales_);
  v_scale_ = make_scale(shape_.scales, shape_.num_heads_kv, 1, v_scales_);
  std::mt19937 random(shape_.seed);
  build_queries(random);
  build_keys(random);
}

// Rows without a logical position stay NaN: they must not be read.
void AttentionProblem::build_queries(std::mt19937& random) {
  const int64_t batch = static_cast<int64_t>(shape_.kv_lens.size());
  const int64_t total = std::accumulate(shape_.q_lens.begin(), shape_.q_lens.end(), int64_t{0});
  const int64_t rows = shape_.ragged_q ? total : batch > 0 ? shape_.q_lens[0] : 0;
  q_ = out_ = Tensor(shape_.dtype, shape_.ragged_q ? 1 : batch, rows, shape_.num_heads, shape_.head_dim);
  lse_.resize(static_cast<size_t>(total * shape_.num_heads));
  for (int64_t b = 0; b < batch; ++b) {
    const int32_t q_len = shape_.q_lens[b];
    EXPECT_TRUE(shape_.ragged_q || q_len == shape_.q_lens[0]) << "uniform queries have one length";
    for (int32_t r = std::max(0, q_len - shape_.kv_lens[b]); r < q_len; ++r) {
      q_.randomize_row(random, shape_.ragged_q ? 0 : b, shape_.ragged_q ? cu_seqlens_q_.back() + r : r);
    }
    cu_seqlens_q_.push_back(cu_seqlens_q_.back() + q_len);
  }
}

void AttentionProblem::build_keys(std::mt19937& random) {
  const size_t batch = shape_.kv_lens.size();
  for (size_t b = 0; b < batch; ++b) {
    cache_seqlens_.push_back(leftpad(b) + shape_.kv_lens[b]);
    cu_seqlens_k_.push_back(cu_seqlens_k_.back() + cache_seqlens_.back());
    slots_ = std::max(slots_, cache_seqlens_.back());
  }
  const bool ragged = shape_.keys == KeyLayout::Ragged;
  slots_ += ragged ? 0 : 2;  // spare slots
  if (shape_.keys == KeyLayout::Paged) {
    build_pages(random);
  } else {
    build_cache(ragged ? 1 : static_cast<int64_t>(batch), ragged ? cu_seqlens_k_.back() : slots_);
  }
  std::uniform_real_distribution<double> largest(0.5, 4.0);
  for (size_t b = 0; b < batch; ++b) {
    for (int64_t slot = leftpad(b); slot < cache_seqlens_[b]; ++slot) {
      int64_t block = ragged ? 0 : static_cast<int64_t>(b);
      int64_t row = ragged ? cu_seqlens_k_[b] + slot : slot;
      if (shape_.keys == KeyLayout::Paged) {
        block = page_table_[b * max_pages_ + slot / shape_.page_size];
        row = slot % shape_.page_size;
      }
      for (int32_t head = 0; shape_.scales == Scales::PerRow && head < shape_.num_heads_kv; ++head) {
        k_row_scales_.set(k_row_scales_.offset(block, row, head), largest(random) / 127.0);
        v_row_scales_.set(v_row_scales_.offset(block, row, head), largest(random) / 127.0);
      }
      k_.randomize_row(random, block, row, k_scale_);
      v_.randomize_row(random, block, row, v_scale_);
    }
  }
}

// Pages in a random order, with one of nobody's among them; unused entries of the table lead out of the cache.
void AttentionProblem::build_pages(std::mt19937& random) {
  max_pages_ = (slots_ + shape_.page_size - 1) / shape_.page_size + 1;
  slots_ = max_pages_ * shape_.page_size;
  std::vector<int32_t> order(shape_.kv_lens.size() * static_cast<size_t>(max_pages_) + 1);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);
  num_pages_ = static_cast<int64_t>(order.size());
  for (size_t b = 0; b < shape_.kv_lens.size(); ++b) {
    for (int32_t page = 0; page < max_pages_; ++page) {
      const bool padding = (page + 1) * shape_.page_size <= leftpad(b);
      const bool used = page * shape_.page_size < cache_seqlens_[b] && !padding;
      page_table_.push_back(used ? order[b * static_cast<size_t>(max_pages_) + page] : kHugePage);
    }
  }
  build_cache(num_pages_, shape_.page_size);
}

void AttentionProblem::build_cache(int64_t blocks, int64_t rows) {
  k_ = v_ = Tensor(dtype_of_cache(shape_), blocks, rows, shape_.num_heads_kv, shape_.head_dim);
  if (shape_.scales != Scales::PerRow) return;
  k_row_scales_ = v_row_scales_ = Tensor(DType::Float32, blocks, rows, shape_.num_heads_kv, 1);
  k_scale_ = k_row_scales_.scales();
  v_scale_ = v_row_scales_.scales();
}

void AttentionProblem::forget_results() {
  out_.fill_with_nan();
  std::fill(lse_.begin(), lse_.end(), std::numeric_limits<float>::quiet_NaN());
}

AttentionParams AttentionProblem::params() {
  const int32_t batch = static_cast<int32_t>(shape_.kv_lens.size());
  forget_results();
  AttentionParams p;
  p.dtype = shape_.dtype;
  p.cache_dtype = shape_.cache_dtype;
  p.chunk = shape_.chunk;
  p.batch = batch;
  p.num_heads = shape_.num_heads;
  p.num_heads_kv = shape_.num_heads_kv;
  p.head_dim = shape_.head_dim;
  p.seqlen_q = batch > 0 ? *std::max_element(shape_.q_lens.begin(), shape_.q_lens.end()) : 0;
  p.seqlen_k = slots_;
  p.q = q_.ref();
  p.k = k_.ref();
  p.v = v_.ref();
  p.k_scale = k_scale_;
  p.v_scale = v_scale_;
  p.out = out_.mutable_ref();
  p.lse = lse_.data();
  if (shape_.ragged_q) {
    p.total_q = cu_seqlens_q_.back();
    p.cu_seqlens_q = cu_seqlens_q_.data();
  }
  if (shape_.keys == KeyLayout::Ragged) {
    p.total_k = cu_seqlens_k_.back();
    p.cu_seqlens_k = cu_seqlens_k_.data();
  } else {
    // Lengths that are all alike come as a number, others from memory, so that both are tested.
    const int32_t length = cache_seqlens_.empty() ? 0 : cache_seqlens_.front();
    const bool alike =
        std::all_of(cache_seqlens_.begin(), cache_seqlens_.end(), [&](int32_t l) { return l == length; });
    if (alike) p.cache_seqlen = length;
    p.cache_seqlens = alike ? nullptr : cache_seqlens_.data();
  }
  if (shape_.keys == KeyLayout::Paged) {
    p.pages = {page_table_.data(), max_pages_, max_pages_, shape_.page_size, num_pages_};
  }
  if (!shape_.leftpads.empty()) p.cache_leftpad = shape_.leftpads.data();
  p.rotary = {tables_.cos.data(), tables_.sin.data(), shape_.chunk.max_position + 1, shape_.half_rotary_dim,
              shape_.interleaved};
  p.softmax_scale = 1.0f / std::sqrt(static_cast<float>(shape_.head_dim));
  return p;
}

HostBuffers AttentionProblem::buffers() const {
  return {buffer_of(q_.bytes()),    buffer_of(k_.bytes()),     buffer_of(v_.bytes()),  buffer_of(out_.bytes()),
          buffer_of(lse_),          buffer_of(tables_.cos),    buffer_of(tables_.sin), buffer_of(cu_seqlens_q_),
          buffer_of(cu_seqlens_k_), buffer_of(cache_seqlens_), buffer_of(page_table_), buffer_of(shape_.leftpads),
          buffer_of(k_scales_),     buffer_of(v_scales_)};  // Int8 is for the CPU, which takes memory as it is
}

::testing::AssertionResult AttentionProblem::matches_reference(AttentionParams params,
                                                               const std::vector<int32_t>& split_counts,
                                                               const HostBuffers& more) {
  HostBuffers all = buffers();
  all.insert(all.end(), more.begin(), more.end());
  const auto exact = reference::attention(params);
  reference::AttentionResult baseline;
  if (shape_.dtype != DType::Float32) baseline = reference::attention_baseline(params);
  const std::vector<double> lse_baseline = rounds_queries(shape_.dtype) ? baseline.lse : std::vector<double>();
  for (const int32_t num_splits : split_counts) {
    forget_results();
    params.num_splits = num_splits;
    const std::string what = " (" + to_string(shape_) + ", num_splits " + std::to_string(num_splits) + ")";
    if (const Status status = run_operator(params, all); !status.ok())
      return ::testing::AssertionFailure() << status.message();
    if (auto ok = accepted(error_rule::attention(out(), exact.out, baseline.out, shape_.dtype)); !ok) return ok << what;
    if (params.lse != nullptr) {
      if (auto ok = accepted(error_rule::lse(lse(), exact.lse, lse_baseline)); !ok) return ok << what;
    }
    if (!out_.gaps_are_nan()) return ::testing::AssertionFailure() << "written between the rows of out" << what;
  }
  return ::testing::AssertionSuccess();
}

}  // namespace dca::testing
