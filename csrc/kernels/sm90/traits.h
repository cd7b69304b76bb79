// Tile shapes, shared-memory layouts, TMA copies and wgmma operations of the sm90 prefill kernel.
#pragma once

#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/atom/copy_traits_sm90_tma.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

#include "numeric.h"

namespace dca::cuda::sm90 {

using namespace cute;  // NOLINT: the vocabulary of every line below

/// What an SM of compute capability 9.0 gives to one CTA.
inline constexpr int kMaxSharedBytes = 227 * 1024;

/// One producer warpgroup, of which one thread loads K and V by TMA, and kConsumers warpgroups of 64 query rows each.
///
/// Per SM and cycle an H100 does 4096 dense bf16 FLOP and 16 exp2: a block of 128 x 128 at head_dim 128 is 2048 cycles
/// of wgmma and 1024 of exp2, so that the two must overlap; two consumers do, each with its own half of the rows.
/// Registers: S and O of 64 x 128 are 64 each per thread.
template <class Element_, int kHeadDim_>
struct PrefillTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static_assert(kHeadDim == 64 || kHeadDim == 128);
  static constexpr int kConsumers = 2;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kConsumerThreads = 128 * kConsumers;
  static constexpr int kBlockM = 64 * kConsumers;
  static constexpr int kBlockN = 128;
  static constexpr int kStages = kHeadDim == 128 ? 2 : 4;
  static constexpr int kProducerRegisters = 40;
  static constexpr int kConsumerRegisters = 232;

  // 8 rows of 64 elements with permuted 16-byte units: what TMA writes and wgmma reads without bank conflicts.
  using Atom = GMMA::Layout_K_SW128_Atom<Element>;
  using SmemQ = decltype(tile_to_shape(Atom{}, Shape<Int<kBlockM>, Int<kHeadDim>>{}));
  using SmemKv = decltype(tile_to_shape(Atom{}, Shape<Int<kBlockN>, Int<kHeadDim>>{}));
  using SmemKvRing = decltype(tile_to_shape(Atom{}, Shape<Int<kBlockN>, Int<kHeadDim>, Int<kStages>>{}));
  /// V as (head_dim, keys, stages).
  using SmemVtRing = decltype(composition(
      SmemKvRing{},
      Layout<Shape<Int<kHeadDim>, Int<kBlockN>, Int<kStages>>, Stride<Int<kBlockN>, _1, Int<kBlockN * kHeadDim>>>{}));

  using MmaQk = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, float, Shape<Int<kBlockM>, Int<kBlockN>, Int<kHeadDim>>>(),
      Layout<Shape<Int<kConsumers>, _1, _1>>{}));
  using MmaPv = decltype(make_tiled_mma(
      GMMA::rs_op_selector<Element, Element, float, Shape<Int<kBlockM>, Int<kHeadDim>, Int<kBlockN>>, GMMA::Major::K,
                           GMMA::Major::MN>(),
      Layout<Shape<Int<kConsumers>, _1, _1>>{}));

  /// K or V in global memory: (rows, head_dim, KV heads, batch).
  using GlobalKv =
      decltype(make_tensor(make_gmem_ptr(static_cast<const Element*>(nullptr)),
                           Shape<int32_t, int32_t, int32_t, int32_t>{}, Stride<int64_t, _1, int64_t, int64_t>{}));
  using TmaKv =
      decltype(make_tma_copy(SM90_TMA_LOAD{}, GlobalKv{}, SmemKv{}, Shape<Int<kBlockN>, Int<kHeadDim>>{}, _1{}));
  static constexpr int kBlockBytes = kBlockN * kHeadDim * 2;

  struct alignas(1024) Shared {
    alignas(1024) Element q[cosize_v<SmemQ>];
    alignas(1024) Element k[cosize_v<SmemKvRing>];
    alignas(1024) Element v[cosize_v<SmemKvRing>];
    uint64_t k_full[kStages], v_full[kStages];    // a block has arrived
    uint64_t k_empty[kStages], v_empty[kStages];  // all consumer warps are done with it
    alignas(16) unsigned char tile[256];
  };
  static_assert(sizeof(Shared) + 1024 <= kMaxSharedBytes);
};

}  // namespace dca::cuda::sm90
