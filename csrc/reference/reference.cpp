#include "reference.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace dca::reference {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// --- Addresses ---

int64_t offset_of(const Strides& stride, int64_t batch, int64_t row, int64_t head) {
  return batch * stride.batch + row * stride.row + head * stride.head;
}

int64_t cache_offset(const Strides& stride, const PageTable& pages, int32_t b, int64_t slot, int32_t head) {
  if (pages.page_table == nullptr) return offset_of(stride, b, slot, head);
  const int64_t page = pages.page_table[b * pages.stride_batch + slot / pages.page_size];
  return offset_of(stride, page, slot % pages.page_size, head);
}

template <class Real>
std::vector<Real> read_row(const void* data, DType dtype, int64_t offset, int32_t n, double scale = 1.0) {
  std::vector<Real> row(static_cast<size_t>(n));
  for (int32_t c = 0; c < n; ++c) row[c] = static_cast<Real>(scale * read(data, dtype, offset + c));
  return row;
}

// --- Formats ---

// A binary format: 1 sign bit, then exponent and mantissa.
struct Format {
  int mantissa_bits;
  int bias;
  int special_exponent;  // of infinities and NaN; e4m3 has none: its largest exponent holds numbers and one NaN
  double largest;

  int smallest_exponent() const { return 1 - bias; }
};

Format format_of(DType dtype) {
  if (dtype == DType::BFloat16) return {7, 127, 255, std::ldexp(255.0, 120)};
  if (dtype == DType::Float16) return {10, 15, 31, 65504.0};
  return {3, 7, 16, 448.0};
}

constexpr int kE4M3NaN = 0x7f;
constexpr double kSmallestInt8 = -128.0;
constexpr double kLargestInt8 = 127.0;

int64_t bits_of(const void* data, DType dtype, int64_t index) {
  if (dtype == DType::Float8E4M3) return static_cast<const uint8_t*>(data)[index];
  return static_cast<const uint16_t*>(data)[index];
}

// --- Rotation ---

template <class Real>
std::vector<Real> rope(std::vector<Real> row, int64_t position, const RotaryTables& rotary) {
  for (int32_t c = 0; c < rotary.half_dim; ++c) {
    const int32_t first = rotary.interleaved ? 2 * c : c;
    const int32_t second = rotary.interleaved ? 2 * c + 1 : c + rotary.half_dim;
    const Real cos = rotary.cos[position * rotary.half_dim + c];
    const Real sin = rotary.sin[position * rotary.half_dim + c];
    const Real a = row[first];
    const Real b = row[second];
    row[first] = a * cos - b * sin;
    row[second] = a * sin + b * cos;
  }
  return row;
}

// --- Attention ---

// Where the rows and the keys of sequence b are.
struct Sequence {
  bool ragged_q;
  bool ragged_k;
  int64_t q_begin;   // first row in ragged q
  int64_t k_begin;   // first row in ragged k
  int64_t seqlen_q;  // rows
  int64_t leftpad;   // slot of key 0
  int64_t kv_len;    // keys

  Sequence(const AttentionParams& p, int32_t b) {
    ragged_q = p.cu_seqlens_q != nullptr;
    ragged_k = p.cu_seqlens_k != nullptr;
    q_begin = ragged_q ? p.cu_seqlens_q[b] : 0;
    k_begin = ragged_k ? p.cu_seqlens_k[b] : 0;
    seqlen_q = ragged_q ? p.cu_seqlens_q[b + 1] - q_begin : p.seqlen_q;
    int64_t slots = p.cache_seqlens != nullptr ? p.cache_seqlens[b] : p.cache_seqlen;
    if (p.cache_seqlens_before_append) slots += seqlen_q;
    if (ragged_k) slots = p.cu_seqlens_k[b + 1] - k_begin;
    leftpad = p.cache_leftpad != nullptr ? p.cache_leftpad[b] : 0;
    kv_len = slots - leftpad;
  }
};

double logit_factor(const AttentionParams& p, const Sequence& sequence, int32_t b) {
  double temperature = 1.0;
  if (p.temperature != nullptr) {
    temperature = p.temperature[b];
  } else if (p.original_max_position_embeddings > 0) {
    const double ratio = static_cast<double>(sequence.kv_len) / p.original_max_position_embeddings;
    temperature = std::pow(std::max(1.0, 0.1 * std::log(ratio) + 1.0), 2);
  }
  return p.softmax_scale * temperature;
}

// All keys, or all values, of one sequence and KV head, in logical order; what their elements stand for.
template <class Real>
std::vector<std::vector<Real>> read_cache(const AttentionParams& p, const ConstTensorRef& cache,
                                          const CacheScale& scale, const Sequence& sequence, int32_t b, int32_t head) {
  std::vector<std::vector<Real>> rows;
  for (int64_t j = 0; j < sequence.kv_len; ++j) {
    const int64_t slot = sequence.leftpad + j;
    const auto offset = [&](const Strides& stride) {
      return sequence.ragged_k ? offset_of(stride, 0, sequence.k_begin + slot, head)
                               : cache_offset(stride, p.pages, b, slot, head);
    };
    const double factor = scale.data != nullptr ? scale.data[offset(scale.stride)] : scale.value;
    rows.push_back(read_row<Real>(cache.data, dtype_of_cache(p), offset(cache.stride), p.head_dim, factor));
  }
  return rows;
}

template <class Real>
Real dot(const std::vector<Real>& a, const std::vector<Real>& b) {
  Real sum = 0;
  for (size_t c = 0; c < a.size(); ++c) sum += a[c] * b[c];
  return sum;
}

// One query row at position i: logits, softmax, weighted sum. Returns the LSE.
template <class Real, class Round>
Real attend_row(const AttentionParams& p, const std::vector<Real>& q, int64_t i, Real factor,
                const std::vector<std::vector<Real>>& keys, const std::vector<std::vector<Real>>& values, Round round,
                double* out) {
  std::vector<Real> rotated[kNumSegments];
  for (int s = 0; s < kNumSegments; ++s) {
    rotated[s] = rope(q, query_position(i, static_cast<Segment>(s), p.chunk), p.rotary);
    for (Real& x : rotated[s]) x = static_cast<Real>(round(x));
  }
  std::vector<Real> logits(static_cast<size_t>(i + 1), -std::numeric_limits<Real>::infinity());
  std::vector<bool> seen(static_cast<size_t>(i + 1), false);
  for (int64_t j = 0; j <= i; ++j) {
    const int segment = static_cast<int>(segment_of(i, j, p.chunk));
    seen[j] = p.segments == SegmentSelection::All || segment == static_cast<int>(p.segments);
    if (seen[j]) logits[j] = factor * dot(rotated[segment], keys[j]);
  }
  std::fill_n(out, p.head_dim, 0.0);
  if (std::find(seen.begin(), seen.end(), true) == seen.end()) return -std::numeric_limits<Real>::infinity();

  const Real largest = *std::max_element(logits.begin(), logits.end());
  Real sum = 0;
  for (const Real logit : logits) sum += std::exp(logit - largest);
  std::vector<Real> result(static_cast<size_t>(p.head_dim), 0);
  for (int64_t j = 0; j <= i; ++j) {
    if (!seen[j]) continue;  // its value may be anything, and 0 * NaN is NaN
    const Real weight = static_cast<Real>(round(std::exp(logits[j] - largest) / sum));
    for (int32_t c = 0; c < p.head_dim; ++c) result[c] += weight * values[j][c];
  }
  for (int32_t c = 0; c < p.head_dim; ++c) out[c] = round(result[c]);
  return largest + std::log(sum);
}

// All arithmetic in Real; `round` is applied to the rotated queries, the weights and the result.
template <class Real, class Round>
AttentionResult attend(const AttentionParams& p, Round round) {
  const bool ragged = p.cu_seqlens_q != nullptr;
  const int64_t total = ragged ? p.total_q : static_cast<int64_t>(p.batch) * p.seqlen_q;
  AttentionResult result;
  result.out.assign(static_cast<size_t>(total * p.num_heads * p.head_dim), 0.0);
  result.lse.assign(static_cast<size_t>(total * p.num_heads), -kInfinity);
  for (int32_t b = 0; b < p.batch; ++b) {
    const Sequence sequence(p, b);
    const Real factor = static_cast<Real>(logit_factor(p, sequence, b));
    for (int32_t kv_head = 0; kv_head < p.num_heads_kv; ++kv_head) {
      const auto keys = read_cache<Real>(p, p.k, p.k_scale, sequence, b, kv_head);
      const auto values = read_cache<Real>(p, p.v, p.v_scale, sequence, b, kv_head);
      const int32_t group = p.num_heads / p.num_heads_kv;
      for (int32_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
        for (int64_t r = 0; r < sequence.seqlen_q; ++r) {
          const int64_t i = sequence.kv_len - sequence.seqlen_q + r;
          if (i < 0) continue;
          const int64_t q_offset = offset_of(p.q.stride, ragged ? 0 : b, sequence.q_begin + r, head);
          const int64_t row = ragged ? sequence.q_begin + r : static_cast<int64_t>(b) * p.seqlen_q + r;
          const int64_t lse_index =
              ragged ? head * p.total_q + row : (static_cast<int64_t>(b) * p.num_heads + head) * p.seqlen_q + r;
          const auto q = read_row<Real>(p.q.data, p.dtype, q_offset, p.head_dim);
          double* out = &result.out[(row * p.num_heads + head) * p.head_dim];
          result.lse[lse_index] = attend_row<Real>(p, q, i, factor, keys, values, round, out);
        }
      }
    }
  }
  return result;
}

// --- New rows of keys ---

struct NewRow {
  int32_t b;
  int32_t head;
  int64_t batch;  // with `row` its place in k and v
  int64_t row;
  int64_t slot;
  int64_t position;
};

template <class Params, class Visit>
void for_each_new_row(const Params& p, Visit visit) {
  const bool ragged = p.cu_seqlens_k != nullptr;
  for (int32_t b = 0; b < p.batch; ++b) {
    const int64_t begin = ragged ? p.cu_seqlens_k[b] : 0;
    const int64_t count = ragged ? p.cu_seqlens_k[b + 1] - begin : p.seqlen_k;
    for (int64_t r = 0; r < count; ++r) {
      const int64_t slot = (p.cache_seqlens != nullptr ? p.cache_seqlens[b] : p.cache_seqlen) + r;
      const int64_t position = slot - (p.cache_leftpad != nullptr ? p.cache_leftpad[b] : 0);
      for (int32_t head = 0; head < p.num_heads_kv; ++head) {
        visit(NewRow{b, head, ragged ? 0 : b, begin + r, slot, position});
      }
    }
  }
}

// The largest magnitude becomes 127; a row with a NaN or an infinity has none, and says so.
float int8_scale(const std::vector<double>& row) {
  double largest = 0.0;
  for (const double x : row) {
    if (!std::isfinite(x)) return std::numeric_limits<float>::quiet_NaN();
    largest = std::max(largest, std::fabs(x));
  }
  return static_cast<float>(largest / kLargestInt8);
}

// Padding in front of position 0 has no rotation.
template <class Params>
std::vector<double> rotated_key(const Params& p, const NewRow& at) {
  const auto key = read_row<double>(p.k.data, p.dtype, offset_of(p.k.stride, at.batch, at.row, at.head), p.head_dim);
  return at.position < 0 ? key : rope(key, key_position(at.position, p.chunk), p.rotary);
}

}  // namespace

// --- The table ---

Segment segment_of(int64_t i, int64_t j, ChunkGeometry chunk) {
  const int64_t n = chunk.chunk_len;
  if (i / n == j / n) return Segment::Intra;
  if (i / n - j / n == 1) return Segment::Successive;
  return Segment::Inter;
}

int64_t key_position(int64_t j, ChunkGeometry chunk) { return j % chunk.chunk_len; }

int64_t query_position(int64_t i, Segment segment, ChunkGeometry chunk) {
  const int64_t n = chunk.chunk_len;
  const int64_t largest = chunk.max_position;
  switch (segment) {
    case Segment::Intra:
      return i % n;
    case Segment::Successive:
      return std::min(i % n + n, largest);
    default:
      return largest;
  }
}

// --- Elements ---

double read(const void* data, DType dtype, int64_t index) {
  if (dtype == DType::Float32) return static_cast<const float*>(data)[index];
  if (dtype == DType::Int8) return static_cast<const int8_t*>(data)[index];
  const Format format = format_of(dtype);
  const int64_t bits = bits_of(data, dtype, index);
  const int64_t sign = int64_t{1} << (static_cast<int>(element_size(dtype)) * 8 - 1);
  const int exponent = static_cast<int>((bits & (sign - 1)) >> format.mantissa_bits);
  const int mantissa = static_cast<int>(bits & ((1 << format.mantissa_bits) - 1));
  double x;
  if (exponent == format.special_exponent) {
    x = mantissa == 0 ? kInfinity : std::numeric_limits<double>::quiet_NaN();
  } else if (dtype == DType::Float8E4M3 && (bits & (sign - 1)) == kE4M3NaN) {
    x = std::numeric_limits<double>::quiet_NaN();
  } else if (exponent == 0) {
    x = std::ldexp(mantissa, format.smallest_exponent() - format.mantissa_bits);
  } else {
    x = std::ldexp(mantissa + (1 << format.mantissa_bits), exponent - format.bias - format.mantissa_bits);
  }
  return (bits & sign) != 0 ? -x : x;
}

double round_to(double x, DType dtype) {
  if (dtype == DType::Float32) return static_cast<float>(x);
  if (dtype == DType::Int8) {
    return std::isnan(x) ? kSmallestInt8 : std::nearbyint(std::clamp(x, kSmallestInt8, kLargestInt8));
  }
  if (x == 0.0 || std::isnan(x)) return x;
  const Format format = format_of(dtype);
  const bool saturates = dtype == DType::Float8E4M3;  // it has no infinity
  if (std::isinf(x)) return saturates ? std::copysign(format.largest, x) : x;
  const int exponent = std::max(std::ilogb(x), format.smallest_exponent());  // below: subnormal, equally spaced
  const double spacing = std::ldexp(1.0, exponent - format.mantissa_bits);
  const double rounded = std::nearbyint(x / spacing) * spacing;
  if (std::fabs(rounded) <= format.largest) return rounded;
  return std::copysign(saturates ? format.largest : kInfinity, x);
}

void write(void* data, DType dtype, int64_t index, double value) {
  if (dtype == DType::Float32) {
    static_cast<float*>(data)[index] = static_cast<float>(value);
    return;
  }
  if (dtype == DType::Int8) {
    static_cast<int8_t*>(data)[index] = static_cast<int8_t>(round_to(value, dtype));
    return;
  }
  const Format format = format_of(dtype);
  const double x = std::fabs(round_to(value, dtype));
  int bits;
  if (std::isnan(x)) {
    bits = dtype == DType::Float8E4M3
               ? kE4M3NaN
               : (format.special_exponent << format.mantissa_bits) + (1 << (format.mantissa_bits - 1));
  } else if (std::isinf(x)) {
    bits = format.special_exponent << format.mantissa_bits;
  } else {
    const int exponent = x == 0.0 ? format.smallest_exponent() : std::max(std::ilogb(x), format.smallest_exponent());
    // With the leading 1, if normal.
    const int significand = static_cast<int>(std::ldexp(x, format.mantissa_bits - exponent));
    bits = significand + ((exponent + format.bias - 1) << format.mantissa_bits);
  }
  const bool negative = std::signbit(value);
  if (dtype == DType::Float8E4M3) {
    static_cast<uint8_t*>(data)[index] = static_cast<uint8_t>(bits | (negative ? 0x80 : 0));
  } else {
    static_cast<uint16_t*>(data)[index] = static_cast<uint16_t>(bits | (negative ? 0x8000 : 0));
  }
}

// --- The operators ---

AttentionResult attention(const AttentionParams& params) {
  return attend<double>(params, [](double x) { return x; });
}

AttentionResult attention_baseline(const AttentionParams& params) {
  return attend<float>(params, [&](double x) { return round_to(x, params.dtype); });
}

std::vector<double> rotate_keys(const RotateKeysParams& p) {
  std::vector<double> out;
  for_each_new_row(p, [&](const NewRow& at) {
    const auto key = rotated_key(p, at);
    out.insert(out.end(), key.begin(), key.end());
  });
  return out;
}

std::vector<AppendedRow> rotate_and_append_kv(const AppendParams& p) {
  std::vector<AppendedRow> rows;
  const DType dtype = dtype_of_cache(p);
  // What the row is divided by: the scale that the cache has, or of an Int8 cache the one that the row gives it.
  const auto scale_of = [&](const std::vector<double>& row, const CacheScale& scale, int32_t head) {
    return dtype == DType::Int8 ? int8_scale(row) : dtype == DType::Float8E4M3 ? scale.of(head) : 1.0f;
  };
  const auto divided = [&](std::vector<double> row, float scale) {
    if (dtype != DType::Float8E4M3 && dtype != DType::Int8) return row;
    const double largest = dtype == DType::Int8 ? kLargestInt8 : format_of(dtype).largest;
    const bool nothing = dtype == DType::Int8 && !(scale > 0.0f);
    for (double& x : row) x = nothing ? 0.0 : std::isnan(x) ? x : std::clamp(x / scale, -largest, largest);
    return row;
  };
  for_each_new_row(p, [&](const NewRow& at) {
    const auto offset = [&](const Strides& stride) { return cache_offset(stride, p.pages, at.b, at.slot, at.head); };
    const auto key = rotated_key(p, at);
    const auto value =
        read_row<double>(p.v.data, p.dtype, offset_of(p.v.stride, at.batch, at.row, at.head), p.head_dim);
    AppendedRow row{at.head, offset(p.k_cache.stride), offset(p.v_cache.stride), {}, {}};
    row.k_scale_offset = offset(p.k_scale_out.stride);
    row.v_scale_offset = offset(p.v_scale_out.stride);
    row.k_scale = scale_of(key, p.k_scale, at.head);
    row.v_scale = scale_of(value, p.v_scale, at.head);
    row.key = divided(key, row.k_scale);
    row.value = divided(value, row.v_scale);
    rows.push_back(row);
  });
  return rows;
}

AttentionResult merge_attention_states(const MergeParams& p) {
  const int64_t rows = p.batch * p.seqlen;
  AttentionResult result;
  result.out.assign(static_cast<size_t>(rows * p.num_heads * p.head_dim), 0.0);
  result.lse.assign(static_cast<size_t>(rows * p.num_heads), -kInfinity);
  for (int64_t row = 0; row < rows; ++row) {
    for (int32_t head = 0; head < p.num_heads; ++head) {
      const int64_t lse_index = (row / p.seqlen * p.num_heads + head) * p.seqlen + row % p.seqlen;
      const int64_t out_index = (row * p.num_heads + head) * p.head_dim;
      double largest = -kInfinity;
      for (int32_t part = 0; part < p.num_parts; ++part) {
        largest = std::max(largest, static_cast<double>(p.lses[part][lse_index]));
      }
      if (largest == -kInfinity) continue;
      double total = 0.0;
      for (int32_t part = 0; part < p.num_parts; ++part) total += std::exp(p.lses[part][lse_index] - largest);
      for (int32_t part = 0; part < p.num_parts; ++part) {
        const double weight = std::exp(p.lses[part][lse_index] - largest) / total;
        if (weight == 0.0) continue;
        for (int32_t c = 0; c < p.head_dim; ++c) {
          result.out[out_index + c] += weight * read(p.outs[part], p.dtype, out_index + c);
        }
      }
      result.lse[lse_index] = largest + std::log(total);
    }
  }
  return result;
}

}  // namespace dca::reference
