// Dual Chunk Attention in double precision, slow and readable: the oracle of the C++ tests and of dca_bench --verify.
//
// It goes pair by pair, query by key, straight from the table of the method, and uses neither the arithmetic of
// chunk_geometry.h nor that of seqlen_info.h, so that a mistake there shows. Parameters are the public structs, with
// Device::Cpu pointers and valid values; results come as doubles, so that rounding is no part of them.
#pragma once

#include <cstdint>
#include <vector>

#include "dca/params.h"

namespace dca::reference {

// --- The table ---

Segment segment_of(int64_t i, int64_t j, ChunkGeometry chunk);
int64_t key_position(int64_t j, ChunkGeometry chunk);
int64_t query_position(int64_t i, Segment segment, ChunkGeometry chunk);

// --- Elements of any dtype ---

double read(const void* data, DType dtype, int64_t index);
void write(void* data, DType dtype, int64_t index, double value);

/// x as the nearest number of dtype, ties to even; Float8E4M3, which has no infinity, ends at +-448. Int8 has neither
/// infinity nor NaN: it ends at -128 and 127, and NaN is -128, which no append writes.
double round_to(double x, DType dtype);

// --- The operators ---

struct AttentionResult {
  std::vector<double> out;  ///< (rows of q, num_heads, head_dim), contiguous
  std::vector<double> lse;  ///< laid out as the lse of the parameters
};

AttentionResult attention(const AttentionParams& params);

/// Attention with the roundings that any implementation in the dtype has: q rotated in fp32 and rounded, products of
/// rounded inputs, fp32 softmax, weights rounded, out rounded. Its error is what the error rule allows twice.
AttentionResult attention_baseline(const AttentionParams& params);

/// (rows of k, num_heads_kv, head_dim), contiguous.
std::vector<double> rotate_keys(const RotateKeysParams& params);

/// What one new row of one head is in the caches, before rounding, and where: offsets in elements.
struct AppendedRow {
  int32_t head;
  int64_t k_offset;
  int64_t v_offset;
  std::vector<double> key;
  std::vector<double> value;
  float k_scale = 1.0f;  ///< what the row was divided by; of an Int8 cache it is written as well
  float v_scale = 1.0f;
  int64_t k_scale_offset = 0;  ///< of an Int8 cache
  int64_t v_scale_offset = 0;
};

std::vector<AppendedRow> rotate_and_append_kv(const AppendParams& params);

AttentionResult merge_attention_states(const MergeParams& params);

}  // namespace dca::reference
