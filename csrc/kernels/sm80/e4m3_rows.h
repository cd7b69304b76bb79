// Rows of e4m3 in shared memory become rows of elements, for prefill: once for all warps that read them.
#pragma once

#include <cutlass/arch/memory.h>

#include "e4m3.h"
#include "mainloop.h"

namespace dca::cuda::sm80 {

/// 8 numbers become 8 elements in shared memory: one store, which compilers would otherwise take apart for some shapes.
template <class Element>
__device__ __forceinline__ void widen_unit(uint2 numbers, Element* unit) {
  const uint2 low = read_e4m3<Element>(numbers.x);
  const uint2 high = read_e4m3<Element>(numbers.y);
  const uint4 elements = {low.x, low.y, high.x, high.y};
  cutlass::arch::shared_store<16>(cast_smem_ptr_to_uint(unit), &elements);
}

/// Of the rows that `which` names, the units that widen_rows has this thread read become 0.
template <class PackedLayout, int kThreads, class Packed, class Which>
__device__ __forceinline__ void clear_rows(Packed* packed, Which&& which, int32_t thread) {
  using Units = ThreadUnits<PackedLayout, kThreads>;
  const Units units(thread);
  if (units.none()) return;
  for (int row = units.row; row < Units::kRows; row += Units::kRowsAtOnce) {
    if (!which(row)) continue;
    for (int column = units.column; column < Units::kHeadDim; column += Units::kColumns) {
      *reinterpret_cast<uint4*>(packed + PackedLayout{}(row, column)) = {0, 0, 0, 0};
    }
  }
}

/// Widens the units that this thread itself copies by load_rows into `packed`, of PackedLayout (kRows, kHeadDim / 2),
/// to `smem` of Layout (kRows, kHeadDim). Up to kAhead units are read before the first is used, so that not each of
/// them is waited for.
template <class PackedLayout, class Layout, int kThreads, int kAhead, class Packed, class Element>
__device__ __forceinline__ void widen_rows(const Packed* packed, Element* smem, int32_t thread) {
  using Units = ThreadUnits<PackedLayout, kThreads>;
  const Units units(thread);
  if (units.none()) return;
  // Eight lanes whose units of a row fall into two atoms begin with different halves, or they would meet in the banks.
  const bool swapped = Units::kUnits == 8 && thread % 8 >= 4;
  const Packed* const from = packed + PackedLayout{}(units.row, units.column);
  Element* const first = smem + Layout{}(units.row, 2 * units.column + (swapped ? 8 : 0));
  Element* const last = smem + Layout{}(units.row, 2 * units.column + (swapped ? 0 : 8));
  // Whole atoms further on, units are permuted alike: addresses differ by constants.
  constexpr int kAcross = Units::kHeadDim / Units::kColumns;
  constexpr int kCount = ceil_div(Units::kRows, Units::kRowsAtOnce) * kAcross;
  constexpr int kBatch = batch_of(kCount, kAhead);
  const auto row = [](int i) { return i / kAcross * Units::kRowsAtOnce; };
  const auto column = [](int i) { return i % kAcross * Units::kColumns; };
  CUTE_UNROLL
  for (int done = 0; done < kCount; done += kBatch) {
    uint4 numbers[kBatch];
    CUTE_UNROLL
    for (int i = 0; i < kBatch; ++i) {
      numbers[i] = *reinterpret_cast<const uint4*>(from + PackedLayout{}(row(done + i), column(done + i)));
    }
    CUTE_UNROLL
    for (int i = 0; i < kBatch; ++i) {
      const int32_t step = Layout{}(row(done + i), 2 * column(done + i));
      const uint2 low{numbers[i].x, numbers[i].y}, high{numbers[i].z, numbers[i].w};
      widen_unit(swapped ? high : low, first + step);
      widen_unit(swapped ? low : high, last + step);
    }
  }
}

}  // namespace dca::cuda::sm80
