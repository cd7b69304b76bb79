// Rotary embedding of rows in units of 16 bytes of what comes out: fp32 arithmetic from the fp32 tables, one rounding.
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
};

/// kColumns neighbouring columns of a row.
template <class T, int kColumns>
using Columns = cute::array_aligned<T, kColumns, 16>;

template <int kColumns, class Element>
__device__ __forceinline__ Columns<Element, kColumns> load_columns(const Element* p) {
  constexpr int kLoads = kColumns / kVec<Element>;
  Columns<Element, kColumns> x;
  CUTE_UNROLL
  for (int i = 0; i < kLoads; ++i) {
    reinterpret_cast<uint4*>(x.data())[i] = reinterpret_cast<const uint4*>(p)[i];
  }
  return x;
}

namespace detail {

template <class Out, int kColumns, class Element>
__device__ __forceinline__ Columns<Out, kColumns> convert(const Columns<Element, kColumns>& x) {
  if constexpr (std::is_same_v<Out, Element>) {
    return x;
  } else {
    Columns<Out, kColumns> y;
    CUTE_UNROLL
    for (int i = 0; i < kColumns; ++i) y[i] = static_cast<Out>(static_cast<float>(x[i]));
    return y;
  }
}

// What turns kColumns columns of a row, and those half_dim further on. It is asked for together with them: a table that
// is asked for when they have come makes its reader wait twice.
template <int kColumns>
struct Rotations {
  Columns<float, kColumns> cos, sin;

  template <class Element>
  __device__ __forceinline__ static Rotations load(const RotaryRow<Element>& row, int32_t column) {
    return {load_columns<kColumns>(row.cos + column), load_columns<kColumns>(row.sin + column)};
  }

  // Rotates the columns `a` and those half_dim further on, `b`; the results may take their place.
  template <class Out, class Element>
  __device__ __forceinline__ void apply(const Columns<Element, kColumns>& a, const Columns<Element, kColumns>& b,
                                        Columns<Out, kColumns>& first, Columns<Out, kColumns>& second) const {
    CUTE_UNROLL
    for (int i = 0; i < kColumns; ++i) {
      const float x = static_cast<float>(a[i]);
      const float y = static_cast<float>(b[i]);
      first[i] = static_cast<Out>(x * cos[i] - y * sin[i]);
      second[i] = static_cast<Out>(x * sin[i] + y * cos[i]);
    }
  }
};

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

/// Columns [column, column + vector) of a row, the same half_dim further on, and what rotates them. Packed as they were
/// loaded: elements by themselves would take a register each.
template <class Element>
struct UnitPair {
  uint4 first;
  uint4 second;
  detail::Rotations<kVec<Element>> rotations;

  __device__ static UnitPair load(const RotaryRow<Element>& row, int32_t half_dim, int32_t column) {
    return {*reinterpret_cast<const uint4*>(row.data + column),
            *reinterpret_cast<const uint4*>(row.data + column + half_dim),
            detail::Rotations<kVec<Element>>::load(row, column)};
  }

  /// Calls store(column, 16 bytes) for both units.
  template <class Store>
  __device__ void store(int32_t half_dim, int32_t column, Store&& store) const {
    store(column, reinterpret_cast<const Vec16<Element>&>(first));
    store(column + half_dim, reinterpret_cast<const Vec16<Element>&>(second));
  }

  __device__ void rotate() {
    auto& a = reinterpret_cast<Vec16<Element>&>(first);
    auto& b = reinterpret_cast<Vec16<Element>&>(second);
    rotations.template apply<Element>(a, b, a, b);
  }
};

/// Makes one unit of work of a row: `units` are of kColumns columns. Calls store(column, Columns<Out, kColumns>) for
/// each kColumns of them that it made. Out is Element, rounded once, or float, not rounded.
template <class Out, int kColumns, class Element, class Store>
__device__ __forceinline__ void rotate_unit_as(const RotaryRow<Element>& row, const RotaryTables& rotary,
                                               const RotaryUnits& units, int32_t unit, Store&& store) {
  const bool rotates = row.cos != nullptr;
  if (unit < units.offset) {
    const int32_t column = unit * kColumns;
    if (rotates) {
      const auto a = load_columns<kColumns>(row.data + column);
      const auto b = load_columns<kColumns>(row.data + column + rotary.half_dim);
      const auto rotations = detail::Rotations<kColumns>::load(row, column);
      Columns<Out, kColumns> first, second;
      rotations.template apply<Out>(a, b, first, second);
      store(column, first);
      store(column + rotary.half_dim, second);
    } else {
      const auto copy = [&](int32_t from) {
        store(from, detail::convert<Out, kColumns, Element>(load_columns<kColumns>(row.data + from)));
      };
      copy(column);
      copy(column + rotary.half_dim);
    }
    return;
  }
  const int32_t column = (unit + units.offset) * kColumns;
  Columns<Out, kColumns> x;
  cute::clear(x);
  if (column < row.head_dim) {
    const Columns<Element, kColumns> plain = load_columns<kColumns>(row.data + column);
    CUTE_UNROLL
    for (int i = 0; i < kColumns; ++i) {
      const bool in_pair = rotates && !units.paired && column + i < 2 * rotary.half_dim;
      const float value = in_pair ? detail::rotated_element(row, rotary, column + i) : static_cast<float>(plain[i]);
      x[i] = static_cast<Out>(value);
    }
  }
  store(column, x);
}

/// The same in units of 16 bytes of the row's own dtype.
template <class Element, class Store>
__device__ __forceinline__ void rotate_unit(const RotaryRow<Element>& row, const RotaryTables& rotary,
                                            const RotaryUnits& units, int32_t unit, Store&& store) {
  rotate_unit_as<Element, kVec<Element>>(row, rotary, units, unit, store);
}

}  // namespace dca::cuda
