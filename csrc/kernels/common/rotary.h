// Rotary embedding of rows in 16-byte units: fp32 arithmetic from the fp32 tables, one rounding.
#pragma once

#include "dca/params.h"
#include "numeric.h"

namespace dca::cuda {

/// How the columns of a row fall into units. Where halves pair whole units (half_dim a multiple of the vector), one
/// unit of work makes both, so that each element is read once.
struct RotaryUnits {
  bool paired;     ///< unit u < half_dim / vector makes the columns of u and of u + half_dim / vector
  int32_t count;   ///< units of work for a row of `row_dim` columns
  int32_t offset;  ///< what turns the index of an unpaired unit into its column / vector

  __host__ __device__ static RotaryUnits of(const RotaryTables& rotary, int32_t row_dim, int32_t vector) {
    const int32_t half = rotary.half_dim;
    const bool paired = !rotary.interleaved && half > 0 && half % vector == 0;
    const int32_t merged = paired ? half / vector : 0;
    return {paired, row_dim / vector - merged, merged};
  }
};

/// One row to rotate. `cos` and `sin` are rows of the tables; null: the row is copied.
template <class Element>
struct RotaryRow {
  const Element* data;  ///< (head_dim)
  int32_t head_dim;     ///< columns from here on are 0
  const float* cos;     ///< (half_dim)
  const float* sin;     ///< (half_dim)
  float factor;         ///< on every element
};

namespace detail {

template <class Element>
__device__ __forceinline__ Vec16<Element> load_unit(const RotaryRow<Element>& row, int32_t column) {
  if (column < row.head_dim) return load16(row.data + column);
  Vec16<Element> zero;
  cute::clear(zero);
  return zero;
}

__device__ __forceinline__ void load_floats(const float* p, float (&x)[4]) {
  const float4 v = *reinterpret_cast<const float4*>(p);
  x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
}

// One element of a row whose pairs fall anywhere.
template <class Element>
__device__ __forceinline__ float rotated_element(const RotaryRow<Element>& row, const RotaryTables& rotary,
                                                 int32_t column) {
  const int32_t half = rotary.half_dim;
  const float x = static_cast<float>(row.data[column]);
  if (column >= 2 * half) return x;
  const bool first = rotary.interleaved ? column % 2 == 0 : column < half;
  const int32_t partner = rotary.interleaved ? column ^ 1 : first ? column + half : column - half;
  const int32_t pair = rotary.interleaved ? column / 2 : first ? column : partner;
  const float y = static_cast<float>(row.data[partner]);
  return first ? x * row.cos[pair] - y * row.sin[pair] : y * row.sin[pair] + x * row.cos[pair];
}

}  // namespace detail

/// Columns [column, column + vector) of a row, and the same half_dim further on. Packed as they were loaded: elements
/// by themselves would take a register each.
template <class Element>
struct UnitPair {
  uint4 first;
  uint4 second;

  __device__ static UnitPair load(const Element* row, int32_t half_dim, int32_t column) {
    return {*reinterpret_cast<const uint4*>(row + column), *reinterpret_cast<const uint4*>(row + column + half_dim)};
  }

  /// Calls store(column, 16 bytes) for both units.
  template <class Store>
  __device__ void store(int32_t half_dim, int32_t column, Store&& store) const {
    store(column, reinterpret_cast<const Vec16<Element>&>(first));
    store(column + half_dim, reinterpret_cast<const Vec16<Element>&>(second));
  }

  __device__ void rotate(const RotaryRow<Element>& row, int32_t column) {
    auto& a = reinterpret_cast<Vec16<Element>&>(first);
    auto& b = reinterpret_cast<Vec16<Element>&>(second);
    CUTE_UNROLL
    for (int begin = 0; begin < kVec<Element>; begin += 4) {
      float cos[4], sin[4];
      detail::load_floats(row.cos + column + begin, cos);
      detail::load_floats(row.sin + column + begin, sin);
      CUTE_UNROLL
      for (int i = 0; i < 4; ++i) {
        const float x = static_cast<float>(a[begin + i]) * row.factor;
        const float y = static_cast<float>(b[begin + i]) * row.factor;
        a[begin + i] = static_cast<Element>(x * cos[i] - y * sin[i]);
        b[begin + i] = static_cast<Element>(x * sin[i] + y * cos[i]);
      }
    }
  }
};

/// Makes one unit of work of a row; calls store(column, 16 bytes) for each 16 bytes that it made.
template <class Element, class Store>
__device__ __forceinline__ void rotate_unit(const RotaryRow<Element>& row, const RotaryTables& rotary,
                                            const RotaryUnits& units, int32_t unit, Store&& store) {
  constexpr int kVector = kVec<Element>;
  const bool rotates = row.cos != nullptr;
  if (unit < units.offset) {
    auto pair = UnitPair<Element>::load(row.data, rotary.half_dim, unit * kVector);
    if (rotates) pair.rotate(row, unit * kVector);
    pair.store(rotary.half_dim, unit * kVector, store);
    return;
  }
  const int32_t column = (unit + units.offset) * kVector;
  Vec16<Element> x = detail::load_unit(row, column);
  if (column < row.head_dim) {
    CUTE_UNROLL
    for (int i = 0; i < kVector; ++i) {
      const bool in_pair = rotates && !units.paired && column + i < 2 * rotary.half_dim;
      const float value = in_pair ? detail::rotated_element(row, rotary, column + i) : static_cast<float>(x[i]);
      x[i] = static_cast<Element>(value * row.factor);
    }
  }
  store(column, x);
}

}  // namespace dca::cuda
