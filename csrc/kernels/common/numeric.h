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

/// A fragment of floats, rounded to nearest, in the same layout.
template <class Element, class Tensor>
__device__ __forceinline__ auto convert_fragment(const Tensor& source) {
  constexpr int kCount = decltype(cute::size(source))::value;
  auto target = cute::make_tensor<Element>(source.layout());
  const cutlass::NumericArrayConverter<Element, float, kCount> convert;
  *reinterpret_cast<cutlass::Array<Element, kCount>*>(target.data()) =
      convert(*reinterpret_cast<const cutlass::Array<float, kCount>*>(source.data()));
  return target;
}

}  // namespace dca::cuda
