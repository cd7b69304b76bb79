// One append, or one rotation of keys, with all the memory it needs.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <vector>

#include "attention_problem.h"

namespace dca::testing {

inline constexpr double kLargestInput = 6.0;  // of a few thousand normal numbers

struct AppendShape {
  DType dtype = DType::Float32;
  DType cache_dtype = DType::Same;
  Scales scales = Scales::None;
  ChunkGeometry chunk{16, 23};
  int32_t num_heads_kv = 2;
  int32_t head_dim = 64;
  int32_t half_rotary_dim = 32;
  bool interleaved = false;
  std::vector<int32_t> new_rows = {5, 5, 5};
  std::vector<int32_t> before = {0, 13, 31};
  std::vector<int32_t> leftpads;
  bool ragged = false;
  int32_t page_size = 0;  // 0: not paged
};

/// An append of rows of `dtype` to a cache of another format.
inline AppendShape append_into(DType cache_dtype, Scales scales, DType dtype) {
  AppendShape shape;
  shape.dtype = dtype;
  shape.cache_dtype = cache_dtype;
  shape.scales = scales;
  return shape;
}

struct AppendProblem {
  AppendShape shape;
  std::vector<int32_t> cu_seqlens = {0};
  std::vector<int32_t> page_table;
  Tables tables;
  Tensor k, v, k_cache, v_cache;
  std::vector<float> k_scales, v_scales;
  Tensor k_row_scales, v_row_scales;  // of an Int8 cache
  AppendParams p;

  explicit AppendProblem(const AppendShape& s) : shape(s) {
    const int32_t batch = static_cast<int32_t>(s.new_rows.size());
    for (const int32_t n : s.new_rows) cu_seqlens.push_back(cu_seqlens.back() + n);
    tables = Tables(s.chunk.max_position + 1, s.half_rotary_dim);
    k = Tensor(s.dtype, s.ragged ? 1 : batch, s.ragged ? cu_seqlens.back() : s.new_rows[0], s.num_heads_kv, s.head_dim);
    v = k;
    std::mt19937 random(5);
    k.randomize(random);
    v.randomize(random);
    p.dtype = s.dtype;
    p.cache_dtype = s.cache_dtype;
    p.k_scale = make_scale(s.scales, s.num_heads_kv, 0, k_scales);
    p.v_scale = make_scale(s.scales, s.num_heads_kv, 1, v_scales);
    p.chunk = s.chunk;
    p.batch = batch;
    p.num_heads_kv = s.num_heads_kv;
    p.head_dim = s.head_dim;
    p.seqlen_k = *std::max_element(s.new_rows.begin(), s.new_rows.end());
    p.k = k.ref();
    p.v = v.ref();
    if (s.ragged) {
      p.cu_seqlens_k = cu_seqlens.data();
      p.total_k = cu_seqlens.back();
    }
    p.cache_seqlens = shape.before.data();
    if (!s.leftpads.empty()) p.cache_leftpad = shape.leftpads.data();
    p.rotary = {tables.cos.data(), tables.sin.data(), s.chunk.max_position + 1, s.half_rotary_dim, s.interleaved};
    build_caches(batch);
  }

  void build_caches(int32_t batch) {
    constexpr int32_t kSlots = 40;
    int64_t blocks = batch;
    int32_t rows = kSlots;
    if (shape.page_size > 0) {
      const int32_t pages = (kSlots + shape.page_size - 1) / shape.page_size;
      rows = shape.page_size;
      blocks = static_cast<int64_t>(batch) * pages;
      page_table.resize(static_cast<size_t>(blocks));
      std::iota(page_table.rbegin(), page_table.rend(), 0);  // the last page first
      p.pages = {page_table.data(), pages, pages, shape.page_size, blocks};
    }
    k_cache = v_cache = Tensor(dtype_of_cache(shape), blocks, rows, shape.num_heads_kv, shape.head_dim);
    p.cache_slots = shape.page_size > 0 ? p.pages.max_pages * shape.page_size : kSlots;
    p.k_cache = k_cache.mutable_ref();
    p.v_cache = v_cache.mutable_ref();
    if (shape.cache_dtype != DType::Int8) return;
    k_row_scales = v_row_scales = Tensor(DType::Float32, blocks, rows, shape.num_heads_kv, 1);
    p.k_scale_out = k_row_scales.mutable_scales();
    p.v_scale_out = v_row_scales.mutable_scales();
  }

  HostBuffers buffers() const {
    return {buffer_of(k.bytes()),      buffer_of(v.bytes()),  buffer_of(k_cache.bytes()), buffer_of(v_cache.bytes()),
            buffer_of(tables.cos),     buffer_of(tables.sin), buffer_of(cu_seqlens),      buffer_of(shape.before),
            buffer_of(shape.leftpads), buffer_of(page_table), buffer_of(k_scales),        buffer_of(v_scales)};
  }

  // The caches hold NaN everywhere at first, so a stray write shows as a number in a place that no row owns.
  void expect_matches_reference() {
    const Status status = run_operator(p, buffers());
    ASSERT_TRUE(status.ok()) << status.message();
    const auto rows = reference::rotate_and_append_kv(p);
    for (const auto& row : rows) {
      std::vector<double> key, value;
      for (int32_t c = 0; c < p.head_dim; ++c) {
        key.push_back(k_cache.at(row.k_offset + c));
        value.push_back(v_cache.at(row.v_offset + c));
        k_cache.set(row.k_offset + c, NAN);
        v_cache.set(row.v_offset + c, NAN);
      }
      const DType dtype = dtype_of_cache(p);
      ASSERT_TRUE(accepted(error_rule::rotation(key, row.key, kLargestInput / row.k_scale, dtype)));
      if (dtype == p.dtype) {
        ASSERT_EQ(value, row.value) << "values are copied as they are";
      } else {
        ASSERT_TRUE(accepted(error_rule::rotation(value, row.value, kLargestInput / row.v_scale, dtype)));
      }
      if (dtype == DType::Int8) {
        ASSERT_NEAR(k_row_scales.at(row.k_scale_offset), row.k_scale, 4e-7 * row.k_scale) << "a few roundings in fp32";
        ASSERT_EQ(v_row_scales.at(row.v_scale_offset), row.v_scale) << "values are not rotated";
        k_row_scales.set(row.k_scale_offset, NAN);
        v_row_scales.set(row.v_scale_offset, NAN);
      }
    }
    for (const Tensor* cache : {&k_cache, &v_cache, &k_row_scales, &v_row_scales}) {
      ASSERT_TRUE(cache->gaps_are_nan());
      for (const double x : cache->values()) ASSERT_TRUE(std::isnan(x)) << "written where no new row belongs";
    }
  }
};

inline void expect_rotated(const AppendShape& shape) {
  AppendProblem source(shape);
  Tensor out = source.k;
  for (const auto& byte : out.bytes()) const_cast<uint8_t&>(byte) = 0xff;  // NaN in every dtype
  RotateKeysParams p;
  p.dtype = shape.dtype;
  p.chunk = shape.chunk;
  p.batch = source.p.batch;
  p.num_heads_kv = shape.num_heads_kv;
  p.head_dim = shape.head_dim;
  p.seqlen_k = source.p.seqlen_k;
  p.total_k = source.p.total_k;
  p.k = source.k.ref();
  p.out = out.mutable_ref();
  p.cu_seqlens_k = source.p.cu_seqlens_k;
  p.cache_seqlens = source.p.cache_seqlens;
  p.cache_leftpad = source.p.cache_leftpad;
  p.rotary = source.p.rotary;
  HostBuffers buffers = source.buffers();
  buffers.push_back(buffer_of(out.bytes()));
  const Status status = run_operator(p, buffers);
  ASSERT_TRUE(status.ok()) << status.message();
  EXPECT_TRUE(accepted(error_rule::rotation(out.values(), reference::rotate_keys(p), kLargestInput, p.dtype)));
  EXPECT_TRUE(out.gaps_are_nan());
}

/// Shapes of rotate_keys: many rows, padded ones, pairs that fit no vector, ragged rows.
inline std::vector<AppendShape> shapes_to_rotate(DType dtype) {
  std::vector<AppendShape> shapes;
  AppendShape shape;
  shape.dtype = dtype;
  shape.new_rows.assign(3, 70);  // more than one CPU task's worth of rows
  shapes.push_back(shape);
  shape.leftpads = {3, 13, 0};
  shapes.push_back(shape);
  shape.interleaved = true;
  shape.half_rotary_dim = 7;
  shapes.push_back(shape);
  shape.ragged = true;
  shape.new_rows = {4, 0, 17};
  shapes.push_back(shape);
  return shapes;
}

/// Appends to caches of 8-bit numbers: in one piece, into pages behind left padding, ragged.
inline void expect_appends_match_reference(AppendShape shape) {
  AppendProblem(shape).expect_matches_reference();
  shape.page_size = 3;
  shape.leftpads = {3, 13, 0};
  AppendProblem(shape).expect_matches_reference();
  shape.ragged = true;
  shape.new_rows = {4, 17, 0};
  AppendProblem(shape).expect_matches_reference();
}

/// The same with 0 to all channels of a row rotated, in halves and in neighbours.
inline void expect_partial_rotations_match_reference(AppendShape shape) {
  shape.head_dim = 80;
  for (const bool interleaved : {false, true}) {
    for (const int32_t half : {0, 1, 20, 40}) {
      shape.half_rotary_dim = half;
      shape.interleaved = interleaved;
      AppendProblem(shape).expect_matches_reference();
    }
  }
}

}  // namespace dca::testing
