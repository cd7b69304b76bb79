// Lengths and offsets of one sequence of a batch, read from AttentionParams once per tile, on host and device alike.
#pragma once

#include "dca/params.h"

namespace dca {

/// Lengths are clamped to what the buffers hold, so that no value in a length tensor leads outside of them.
struct SeqlenInfo {
  int64_t q_row = 0;      ///< first row of the sequence in ragged q and out, 0 if uniform
  int64_t k_row = 0;      ///< first row of the sequence in ragged k and v, 0 otherwise
  int32_t seqlen_q = 0;   ///< query rows
  int32_t kv_len = 0;     ///< logical keys, left padding not counted
  int32_t leftpad = 0;    ///< slot of logical key 0
  int32_t first_row = 0;  ///< first query row with a position >= 0

  /// Logical position of query row r.
  DCA_HOST_DEVICE constexpr int32_t position(int32_t row) const { return kv_len - seqlen_q + row; }
  /// Query row at a logical position.
  DCA_HOST_DEVICE constexpr int32_t row(int32_t position) const { return position - (kv_len - seqlen_q); }

  DCA_HOST_DEVICE static SeqlenInfo of(const AttentionParams& p, int32_t b) {
    SeqlenInfo info;
    info.seqlen_q = p.seqlen_q;
    if (p.cu_seqlens_q != nullptr) {
      info.q_row = clamp(p.cu_seqlens_q[b], 0, p.total_q);
      info.seqlen_q = static_cast<int32_t>(clamp(p.cu_seqlens_q[b + 1], info.q_row, p.total_q) - info.q_row);
    }
    int64_t slots = p.cache_seqlens != nullptr ? p.cache_seqlens[b] : p.cache_seqlen;
    if (p.cache_seqlens_before_append) slots += info.seqlen_q;
    int64_t capacity = p.seqlen_k;
    if (p.cu_seqlens_k != nullptr) {
      info.k_row = clamp(p.cu_seqlens_k[b], 0, p.total_k);
      capacity = clamp(p.cu_seqlens_k[b + 1], info.k_row, p.total_k) - info.k_row;
      slots = capacity;
    }
    slots = clamp(slots, 0, capacity);
    info.leftpad = p.cache_leftpad != nullptr ? static_cast<int32_t>(clamp(p.cache_leftpad[b], 0, slots)) : 0;
    info.kv_len = static_cast<int32_t>(slots) - info.leftpad;
    info.first_row = info.seqlen_q > info.kv_len ? info.seqlen_q - info.kv_len : 0;
    return info;
  }

 private:
  DCA_HOST_DEVICE static constexpr int64_t clamp(int64_t x, int64_t low, int64_t high) {
    return x < low ? low : x > high ? high : x;
  }
};

/// YaRN's factor on the logits for a sequence of kv_len keys: max(1, 0.1 ln(kv_len / original) + 1)^2, in fp32.
DCA_HOST_DEVICE inline float yarn_temperature(int32_t kv_len, int32_t original) {
  if (kv_len <= original) return 1.0f;
#if defined(__CUDA_ARCH__)
  const float s = 0.1f * logf(static_cast<float>(kv_len) / static_cast<float>(original)) + 1.0f;
#else
  const float s = 0.1f * __builtin_logf(static_cast<float>(kv_len) / static_cast<float>(original)) + 1.0f;
#endif
  return s * s;
}

/// Factor on the logits of sequence b.
DCA_HOST_DEVICE inline float logit_scale(const AttentionParams& p, const SeqlenInfo& info, int32_t b) {
  if (p.temperature != nullptr) return p.softmax_scale * p.temperature[b];
  if (p.original_max_position_embeddings == 0) return p.softmax_scale;
  return p.softmax_scale * yarn_temperature(info.kv_len, p.original_max_position_embeddings);
}

}  // namespace dca
