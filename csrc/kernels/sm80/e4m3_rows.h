// Rows of e4m3 in shared memory become rows of elements, for prefill: once for all warps that read them.
#pragma once

#include "e4m3.h"
#include "mainloop.h"

namespace dca::cuda::sm80 {

/// 8 elements of 8 numbers.
template <class Element>
__device__ __forceinline__ uint4 widen_unit(uint32_t first, uint32_t last) {
  const uint2 low = read_e4m3<Element>(first);
  const uint2 high = read_e4m3<Element>(last);
  return {low.x, low.y, high.x, high.y};
}

/// Widens the units that this thread itself has copied by load_rows into `packed`, of PackedLayout (kRows, kHeadDim /
/// 2), to `smem` of Layout (kRows, kHeadDim).
template <class PackedLayout, class Layout, int kThreads, class Packed, class Element>
__device__ __forceinline__ void widen_rows(const Packed* packed, Element* smem, int32_t thread) {
  // Eight lanes whose units of a row fall into two atoms begin with different halves, or they would meet in the banks.
  const bool swapped = ThreadUnits<PackedLayout, kThreads>::kUnits == 8 && thread % 8 >= 4;
  ThreadUnits<PackedLayout, kThreads>::for_each(thread, [&](int32_t row) {
    return [&, row](int32_t column) {
      const uint4 numbers = *reinterpret_cast<const uint4*>(packed + PackedLayout{}(row, column));
      const uint4 low = widen_unit<Element>(numbers.x, numbers.y);
      const uint4 high = widen_unit<Element>(numbers.z, numbers.w);
      const auto store = [&](int32_t at, const uint4& unit) {
        *reinterpret_cast<uint4*>(smem + Layout{}(row, at)) = unit;
      };
      store(2 * column + (swapped ? 8 : 0), swapped ? high : low);
      store(2 * column + (swapped ? 0 : 8), swapped ? low : high);
    };
  });
}

}  // namespace dca::cuda::sm80
