// Tile shapes, shared-memory layouts and tensor-core operations of the sm80 kernels.
#pragma once

#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/copy_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/tensor.hpp>

#include "numeric.h"

namespace dca::cuda::sm80 {

using namespace cute;  // NOLINT: the vocabulary of every line below

/// What every GPU from 8.0 on can give to one CTA (8.6 and 8.9: 99 KB of 100).
inline constexpr int kMaxSharedBytes = 99 * 1024;

/// Powers of two by which weights are rounded larger than they are. Those of at most 2^15 use fp16's exponents as far
/// as 2^-39 of the largest; it has 5 bits of them.
template <class Value, class Cached>
inline constexpr int kHeadroomOf =
    std::is_same_v<Cached, cutlass::float_e4m3_t> && std::is_same_v<Value, cutlass::half_t> ? 15 : 0;

template <class Element>
using MmaAtom = std::conditional_t<std::is_same_v<Element, cutlass::bfloat16_t>,
                                   MMA_Atom<SM80_16x8x16_F32BF16BF16F32_TN>, MMA_Atom<SM80_16x8x16_F32F16F16F32_TN>>;

/// Rows of kHeadDim elements of 16 bits in shared memory. Eight rows of kColumns (64, or 32 or 16 where that does not
/// divide the row) are an atom whose 16-byte units are permuted, so that ldmatrix, which takes one unit from each of
/// eight rows, finds them in different banks.
template <int kHeadDim>
struct SmemRows {
  static constexpr int kColumns = kHeadDim % 64 == 0 ? 64 : kHeadDim % 32 == 0 ? 32 : 16;
  static constexpr int kPermutedBits = kColumns == 64 ? 3 : kColumns == 32 ? 2 : 1;
  using Atom = decltype(composition(Swizzle<kPermutedBits, 3, 3>{},
                                    Layout<Shape<_8, Int<kColumns>>, Stride<Int<kColumns>, _1>>{}));
  template <int kRows>
  using Layout_ = decltype(tile_to_shape(Atom{}, Shape<Int<kRows>, Int<kHeadDim>>{}));
  /// Offset in a Layout_ of the unit `columns` (a multiple of 8) behind one that lies in the first atom of its row at
  /// `offset`: units of an atom's row are permuted by an exclusive or.
  template <int kRows>
  __host__ __device__ static constexpr int32_t behind(int32_t offset, int columns) {
    return (offset ^ columns % kColumns) + columns / kColumns * kRows * kColumns;
  }
  /// The same memory seen as (kHeadDim, kRows).
  template <int kRows>
  using Transposed =
      decltype(composition(Layout_<kRows>{}, Layout<Shape<Int<kHeadDim>, Int<kRows>>, Stride<Int<kRows>, _1>>{}));
};

/// Prefill: 4 warps. Each holds 16 or 32 rows of the logits and of O, and reads all of K and V, so that 32 rows halve
/// the traffic from shared memory, which would else take as long as the products; registers allow them up to head_dim
/// 128.
///
/// Keys and values of a cache of e4m3 come into rings half the size, two numbers in the place of an element, and are
/// widened into one more block of each, once for all warps.
template <class Element_, int kHeadDim_, class Cached_ = Element_>
struct PrefillTraits {
  using Element = Element_;
  using Cached = Cached_;
  static constexpr int kHeadroom = kHeadroomOf<Element, Cached>;
  /// Whether maxima that have been found are trusted (docs/kernels.md). Weights with headroom have no room upwards.
  static constexpr bool kTrusting = kHeadroom == 0;
  static constexpr bool kE4M3 = std::is_same_v<Cached, cutlass::float_e4m3_t>;
  static constexpr int kPacked = kE4M3 ? 2 : 1;  // numbers of the cache in the place of an element of a ring
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBlockM = kHeadDim <= 128 ? 128 : 64;
  static constexpr int kBlockN = kHeadDim <= 64 ? 64 : 32;  // registers: S beside O
  static constexpr int kStages = 2;                         // this block and the next
  static constexpr int kMinCtas = kHeadDim <= 128 ? 2 : 1;
  static constexpr int kPackedUnitsAhead = 2;
  static constexpr int kQueryPairsAhead = kHeadDim <= 64 ? 4 : kHeadDim <= 96 ? 3 : 2;

  using Rows = SmemRows<kHeadDim>;
  using SmemQ = typename Rows::template Layout_<kBlockM>;
  using SmemKv = typename Rows::template Layout_<kBlockN>;
  using SmemVt = typename Rows::template Transposed<kBlockN>;
  using SmemRing = typename SmemRows<kHeadDim / kPacked>::template Layout_<kBlockN>;
  static constexpr int kBlockElements = kBlockN * kHeadDim;
  static constexpr int kStageElements = kBlockElements / kPacked;
  static constexpr int kWidenedElements = kE4M3 ? kBlockElements : 0;
  static constexpr int kSharedBytes = (kBlockM * kHeadDim + 2 * (kStages * kStageElements + kWidenedElements)) * 2;
  static_assert(kSharedBytes + 1024 <= kMaxSharedBytes);  // the tile lies there too

  using Mma = TiledMMA<MmaAtom<Element>, Layout<Shape<Int<kWarps>, _1, _1>>, Tile<Int<16 * kWarps>, _16, _16>>;
};

constexpr int decode_stages(int head_dim) { return head_dim <= 64 ? 4 : head_dim <= 96 ? 3 : 2; }

/// Decode: 16 rows, every warp with keys of its own and a ring of kStages blocks of 16 of them, so that no barrier
/// stands between a load and its use. 64 KB or more are on their way or in use per CTA, some 128 KB per SM: several
/// times what latency and bandwidth ask for.
///
/// Rows of a cache of e4m3 lie in shared memory as they are, two numbers in the place of an element, and become fp16 on
/// their way to the products (e4m3_products.h). What a block costs beside its products then shows, at head_dim 64
/// most, where blocks are twice as long for that.
template <class Element_, int kHeadDim_, class Cached_ = Element_>
struct DecodeTraits {
  using Element = Element_;
  using Cached = Cached_;
  static constexpr bool kE4M3 = std::is_same_v<Cached, cutlass::float_e4m3_t>;
  using Operand = std::conditional_t<kE4M3, cutlass::half_t, Element>;  // of both products
  static constexpr int kHeadroom = kHeadroomOf<Operand, Cached>;
  static constexpr int kPacked = kE4M3 ? 2 : 1;  // numbers of the cache in the place of an element
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kWarps = kHeadDim <= 128 ? 4 : 2;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBlockM = 16;
  static constexpr int kWarpKeys = kE4M3 && kHeadDim <= 64 ? 32 : 16;
  static constexpr int kBlockN = kWarpKeys * kWarps;
  static constexpr int kStages = kPacked * decode_stages(kHeadDim) * 16 / kWarpKeys;
  static constexpr bool kQueriesInRegisters = kHeadDim <= 128;  // beside O there is no room for more
  static constexpr int kMinCtas = 2;

  using Rows = SmemRows<kHeadDim>;
  using SmemQ = typename Rows::template Layout_<kBlockM>;
  using KvRows = SmemRows<kHeadDim / kPacked>;
  using SmemKv = typename KvRows::template Layout_<kWarpKeys>;
  using SmemVt = typename KvRows::template Transposed<kWarpKeys>;
  static constexpr int kStageElements = kWarpKeys * kHeadDim / kPacked;
  static constexpr int kQueryBytes = kNumSegments * kBlockM * kHeadDim * 2;
  // Floats; so that the rows of a half warp's stores of 8 bytes, or of a quarter warp's of 16, share no bank.
  static constexpr int kExchangeRow = kHeadDim + (kE4M3 ? 16 : 8);
  static constexpr int kExchangeBytes = kWarps * kBlockM * (kExchangeRow + 2) * 4;  // in the place of the ring
  static constexpr int shared_bytes(int stages) {
    const int ring_bytes = 2 * stages * kWarps * kStageElements * 2;
    return kQueryBytes + (ring_bytes > kExchangeBytes ? ring_bytes : kExchangeBytes);
  }
  static constexpr int kSharedBytes = shared_bytes(kStages);

  using Mma = TiledMMA<MmaAtom<Operand>, Layout<Shape<_1, _1, _1>>, Tile<_16, _16, _16>>;
};

}  // namespace dca::cuda::sm80
