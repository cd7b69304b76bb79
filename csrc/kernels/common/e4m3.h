// 8-bit floating point (e4m3: sign, 4 exponent bits, 3 mantissa bits). GPUs from 8.9 on have instructions that read it;
// the others move its bits.
#pragma once

#include "numeric.h"

namespace dca::cuda {

// --- Reading: four numbers of a register become two registers of two elements ---

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890

/// How e4m3 becomes Element: the numbers in the lower and in the upper half of a register.
template <class Element>
struct E4M3Reader;

template <>
struct E4M3Reader<cutlass::half_t> {
  /// What all that is read has to be multiplied by: left to the factor that comes later anyway.
  static constexpr float kScale = 1.0f;

  __device__ __forceinline__ static uint32_t lower(uint32_t four) {
    uint32_t result;
    asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; cvt.rn.f16x2.e4m3x2 %0, low; }" : "=r"(result) : "r"(four));
    return result;
  }
  __device__ __forceinline__ static uint32_t upper(uint32_t four) {
    uint32_t result;
    asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; cvt.rn.f16x2.e4m3x2 %0, high; }" : "=r"(result) : "r"(four));
    return result;
  }
};

template <>
struct E4M3Reader<cutlass::bfloat16_t> {
  static constexpr float kScale = 1.0f;

  __device__ __forceinline__ static uint32_t lower(uint32_t four) { return of_halves(Halves::lower(four)); }
  __device__ __forceinline__ static uint32_t upper(uint32_t four) { return of_halves(Halves::upper(four)); }

 private:
  using Halves = E4M3Reader<cutlass::half_t>;

  __device__ __forceinline__ static uint32_t of_halves(uint32_t two) {
    uint32_t result;
    asm("{ .reg .b16 low, high; .reg .f32 x, y; mov.b32 {low, high}, %1; cvt.f32.f16 x, low; cvt.f32.f16 y, high;"
        "  cvt.rn.bf16x2.f32 %0, y, x; }"
        : "=r"(result)
        : "r"(two));
    return result;
  }
};

/// Elements of four numbers in their order.
template <class Element>
__device__ __forceinline__ uint2 read_e4m3(uint32_t four) {
  return {E4M3Reader<Element>::lower(four), E4M3Reader<Element>::upper(four)};
}

/// Elements of numbers 0 and 2, and of numbers 1 and 3.
template <class Element>
__device__ __forceinline__ uint2 read_e4m3_even_odd(uint32_t four) {
  return read_e4m3<Element>(__byte_perm(four, 0, 0x3120));
}

/// Elements of four numbers two by two, in the order that takes the fewest instructions.
template <class Element>
__device__ __forceinline__ uint2 read_e4m3_any_order(uint32_t four) {
  return read_e4m3<Element>(four);
}

/// Four elements of 16 bits, two in a register, in the order of read_e4m3_any_order.
__device__ __forceinline__ uint2 ordered_as_read(uint32_t first, uint32_t last) { return {first, last}; }

#else

/// How e4m3 becomes Element: numbers 1 and 3 of a register. The bits move to their places in the wider format, whose
/// exponent has another bias: the numbers come out too small by a power of two, subnormal ones included. NaN, which
/// e4m3 has in the place of 480, is found by a product that overflows for 480 alone: 0 times that is NaN, or the 0
/// that the sum does not see.
template <class Element>
struct E4M3Reader;

template <>
struct E4M3Reader<cutlass::half_t> {
  /// What all that is read has to be multiplied by: left to the factor that comes later anyway.
  static constexpr float kScale = 256.0f;

  __device__ __forceinline__ static uint32_t odd_numbers(uint32_t x) {
    const uint32_t small = (x & 0x80008000u) | (x >> 1 & 0x3f803f80u);
    uint32_t overflow, result;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(overflow) : "r"(small), "r"(0x78807880u));  // 36864: 448 / 256 is below
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(overflow), "r"(0u), "r"(small));
    return result;
  }
};

template <>
struct E4M3Reader<cutlass::bfloat16_t> {
  /// Numbers 2^-120 times as large would leave no room for their products in fp32.
  static constexpr float kScale = 1.0f;

  __device__ __forceinline__ static uint32_t odd_numbers(uint32_t x) {
    const uint32_t small = (x & 0x80008000u) | (x >> 4 & 0x07f007f0u);
    return with_nan(multiply(small, 0x7b807b80u));  // 2^120
  }

 private:
  __device__ __forceinline__ static uint32_t with_nan(uint32_t x) {
    return multiply_add(multiply(x, 0x7b107b10u), 0u, x);  // 1.125 * 2^119
  }
  // bf16 has no product of its own before 9.0. -0 is what changes no sum.
  __device__ __forceinline__ static uint32_t multiply(uint32_t a, uint32_t b) {
    return multiply_add(a, b, 0x80008000u);
  }
  __device__ __forceinline__ static uint32_t multiply_add(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
  }
};

template <class Element>
__device__ __forceinline__ uint2 read_e4m3_even_odd(uint32_t four) {
  return {E4M3Reader<Element>::odd_numbers(four << 8), E4M3Reader<Element>::odd_numbers(four)};
}

template <class Element>
__device__ __forceinline__ uint2 read_e4m3_any_order(uint32_t four) {
  return read_e4m3_even_odd<Element>(four);
}

__device__ __forceinline__ uint2 ordered_as_read(uint32_t first, uint32_t last) {
  return {__byte_perm(first, last, 0x5410), __byte_perm(first, last, 0x7632)};
}

template <class Element>
__device__ __forceinline__ uint2 read_e4m3(uint32_t four) {
  const uint2 even_odd = read_e4m3_even_odd<Element>(four);
  return ordered_as_read(even_odd.x, even_odd.y);
}

#endif

/// What products with K, or with V, have to be multiplied by: nothing where the cache holds Elements.
template <class Element, class Cached>
__device__ __forceinline__ float cache_factor(const CacheScale& scale, int32_t kv_head) {
  if constexpr (std::is_same_v<Cached, cutlass::float_e4m3_t>) {
    return E4M3Reader<Element>::kScale * scale.of(kv_head);
  } else {
    return 1.0f;
  }
}

// --- Writing ---

/// x as the nearest e4m3 number, ties to even; beyond 448 it is 448, and NaN stays NaN.
__device__ __forceinline__ uint32_t to_e4m3(float x) {
  const uint32_t sign = __float_as_uint(x) >> 24 & 0x80u;
  const float magnitude = fabsf(x);
  const uint32_t bits = __float_as_uint(fminf(magnitude, 448.0f));
  // Below 2^-6 adding 2^14 rounds to the spacing of subnormal numbers, 2^-9. Else: exponent rebiased by 7 - 127, 20
  // bits rounded away.
  const uint32_t subnormal = __float_as_uint(magnitude + 0x1p14f) - 0x46800000u;
  const uint32_t normal = (bits - 0x3c000000u + 0x7ffffu + (bits >> 20 & 1u)) >> 20;
  const uint32_t number = magnitude < 0x1p-6f ? subnormal : normal;
  return sign | (magnitude == magnitude ? number : 0x7fu);
}

}  // namespace dca::cuda
