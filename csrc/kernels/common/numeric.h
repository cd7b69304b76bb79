// Element types of the kernels, and the few numeric instructions that they spell out.
#pragma once

#include <cstdint>

#include <cutlass/numeric_conversion.h>
#include <cutlass/numeric_types.h>
#include <cute/tensor.hpp>

#include "dca/params.h"

namespace dca::cuda {

template <DType kDType>
struct ElementOf;
template <>
struct ElementOf<DType::Float32> {
  using type = float;
};
template <>
struct ElementOf<DType::BFloat16> {
  using type = cutlass::bfloat16_t;
};
template <>
struct ElementOf<DType::Float16> {
  using type = cutlass::half_t;
};
template <>
struct ElementOf<DType::Float8E4M3> {
  using type = cutlass::float_e4m3_t;
};

inline constexpr float kLog2E = 1.44269504f;
inline constexpr float kLn2 = 0.693147181f;

/// 2^x by the special function unit, subnormal results flushed to 0. Relative error at most 2^-22.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// 16 bytes of elements.
template <class Element>
using Vec16 = cute::array_aligned<Element, 16 / sizeof(Element), 16>;

template <class Element>
inline constexpr int kVec = 16 / static_cast<int>(sizeof(Element));

/// Of a thread's `share` of units, how many it reads before it uses the first: the most up to `ahead` that divide it.
constexpr int batch_of(int share, int ahead) {
  int batch = share < ahead ? share : ahead;
  while (share % batch != 0) --batch;
  return batch;
}

template <class Element>
__device__ __forceinline__ Vec16<Element> load16(const Element* p) {
  Vec16<Element> x;
  *reinterpret_cast<uint4*>(x.data()) = *reinterpret_cast<const uint4*>(p);
  return x;
}

template <class Element>
__device__ __forceinline__ void store16(Element* p, const Vec16<Element>& x) {
  *reinterpret_cast<uint4*>(p) = *reinterpret_cast<const uint4*>(x.data());
}

/// Two floats, rounded to nearest, in one register, the first in its lower half.
template <class Element>
__device__ __forceinline__ uint32_t round_pair(float first, float second) {
  const cutlass::NumericArrayConverter<Element, float, 2> convert;
  const auto pair = convert(cutlass::Array<float, 2>{first, second});
  return *reinterpret_cast<const uint32_t*>(pair.data());
}

/// A fragment of floats, rounded into one of as many 16-bit elements. Register by register: copied as elements, pairs
/// are taken apart and put together again, some 200 instructions for a block of logits.
template <class Source, class Target>
__device__ __forceinline__ void round_fragment(const Source& source, Target& target) {
  constexpr int kCount = decltype(cute::size(source))::value;
  static_assert(kCount % 2 == 0 && kCount == decltype(cute::size(target))::value);
  const auto words = cute::recast<uint32_t>(cute::make_tensor(target.data(), cute::Layout<cute::Int<kCount>>{}));
  CUTE_UNROLL
  for (int i = 0; i < kCount / 2; ++i) {
    words(i) = round_pair<typename Target::value_type>(source.data()[2 * i], source.data()[2 * i + 1]);
  }
}

/// The same into a new one of the same layout.
template <class Element, class Source>
__device__ __forceinline__ auto convert_fragment(const Source& source) {
  auto target = cute::make_tensor<Element>(source.layout());
  round_fragment(source, target);
  return target;
}

}  // namespace dca::cuda
