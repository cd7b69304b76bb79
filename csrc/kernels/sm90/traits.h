// Tile shapes, shared memory and wgmma operations of the sm90 kernels.
#pragma once

#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

#include "block_notes.h"
#include "numeric.h"
#include "sm80/traits.h"
#include "tile_scheduler.h"

namespace dca::cuda::sm90 {

using namespace cute;  // NOLINT: the vocabulary of every line below

/// What an SM of compute capability 9.0 gives to one CTA, of 228 KB.
inline constexpr int kMaxSharedBytes = 227 * 1024;

/// Ways to compute the same. Calls get Default or ThreeConsumers, whichever suits their number of tiles; the others are
/// compiled on request, to be timed.
enum class Variant {
  Default,
  ThreeConsumers,  ///< tiles of 192 rows, at head_dim 64 and for caches of 16 bits
  OtherTurns,      ///< warpgroups take turns where they would not, and take none where they would
  PerTile,         ///< a CTA for every tile, instead of as many as the device holds
};

constexpr const char* name_of(Variant variant) {
  constexpr const char* kNames[] = {"", "three_consumers", "other_turns", "per_tile"};
  return kNames[static_cast<int>(variant)];
}

/// A tile on its way from the producer, which finds it, to the consumers.
struct TileSlot {
  WorkTile tile;
  int32_t index;      ///< its number; -1: there is none, and `last`
  BlockFlags before;  ///< the first block
  uint32_t count;     ///< of the tiles before it
  bool last;          ///< there is no further tile, nor one here
  bool careful;       ///< maxima are looked for in all blocks
  int32_t failed;     ///< by the consumers: whether it was not careful, and has to be computed again
};

/// The barriers of a ring of key blocks and of one of their values.
template <int kStages>
struct RingBarriers {
  uint64_t k_full[kStages], v_full[kStages];    // a block is there
  uint64_t k_empty[kStages], v_empty[kStages];  // all who read it are done with it
};

/// One producer warpgroup, of which one warp loads K and V by TMA, and kConsumers warpgroups of 64 query rows each.
///
/// Per SM and cycle an H100 does 4096 dense bf16 FLOP and 16 exp2: a block of 128 x 128 at head_dim 128 is 2048 cycles
/// of wgmma and 1024 of exp2, so that the two must overlap; two consumers do, each with its own half of the rows.
/// Registers per thread: S of 64 x kBlockN is kBlockN / 2, P half of that, O kHeadDim / 2.
///
/// At head_dim 64 products and exp2 take 1024 cycles each, and two consumers that wait for each other's turns and for
/// their own latencies took 1850. Three have registers enough there, and read K and V for half again as many rows.
///
/// A cache of e4m3 comes into rings of its own as it is, and all warps of the producer widen it into the rings of the
/// products.
template <class Element_, int kHeadDim_, class Cached_ = Element_, Variant kVariant_ = Variant::Default>
struct PrefillTraits {
  using Element = Element_;
  using Cached = Cached_;
  static constexpr int kHeadroom = sm80::kHeadroomOf<Element, Cached>;
  static constexpr bool kE4M3 = std::is_same_v<Cached, cutlass::float_e4m3_t>;
  static constexpr int kPacked = kE4M3 ? 2 : 1;  // numbers of the cache in the place of an element
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr Variant kVariant = kVariant_;
  static constexpr bool kThreeConsumers = kVariant == Variant::ThreeConsumers;
  static_assert(!kThreeConsumers || (kHeadDim <= 64 && !kE4M3));
  static constexpr int kConsumers = kThreeConsumers ? 3 : 2;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kConsumerThreads = 128 * kConsumers;
  static constexpr int kBlockM = 64 * kConsumers;
  static constexpr int kBlockN = kHeadDim > 128 ? (kE4M3 ? 48 : 64) : 128;  // with e4m3 224 registers do not hold 64
  static constexpr int kStages = kHeadDim <= 64 ? 4 : kHeadDim <= 96 ? 3 : 2;
  static constexpr int kPackedStages = 2;
  static constexpr int kLoadStages = kE4M3 ? kPackedStages : kStages;  // of the rings that TMA fills
  static constexpr int kTileSlots = 2;
  static constexpr int kProducerRegisters = kE4M3 ? 56 : kThreeConsumers ? 32 : 40;
  static constexpr int kConsumerRegisters = kE4M3 ? 224 : kThreeConsumers ? 160 : 232;
  static constexpr int kPackedUnitsAhead = 4;
  static constexpr int kQueryPairsAhead = kHeadDim <= 128 ? 4 : 2;
  /// Whether a tile at first trusts the maxima of its first block.
  static constexpr bool kTrusting = kHeadroom == 0;
  /// Turns pay where a block's products take as long as its softmax. At head_dim 256 they take four times that.
  static constexpr bool kOrdered = (kHeadDim <= 128) != (kVariant == Variant::OtherTurns);
  static constexpr bool kPersistent = kVariant != Variant::PerTile;
  /// fp16 has room for little trust: maxima are also looked for where a segment begins, which is where attention
  /// sinks, the first tokens of a text, have theirs.
  static constexpr bool kLooksAtSegments = std::is_same_v<Element, cutlass::half_t>;

  // 8 rows of 64 elements (32 where 64 does not divide the row) with permuted 16-byte units: what TMA writes and wgmma
  // reads without bank conflicts. Rows first, so that a column of atoms is what one TMA brings.
  static constexpr int kBoxColumns = kHeadDim % 64 == 0 ? 64 : 32;
  using Atom =
      std::conditional_t<kBoxColumns == 64, GMMA::Layout_K_SW128_Atom<Element>, GMMA::Layout_K_SW64_Atom<Element>>;
  using SmemQ = decltype(tile_to_shape(Atom{}, Shape<Int<kBlockM>, Int<kHeadDim>>{}));
  using SmemKvRing = decltype(tile_to_shape(Atom{}, Shape<Int<kBlockN>, Int<kHeadDim>, Int<kStages>>{}));
  /// V as (head_dim, keys, stages).
  using SmemVtRing = decltype(composition(
      SmemKvRing{},
      Layout<Shape<Int<kHeadDim>, Int<kBlockN>, Int<kStages>>, Stride<Int<kBlockN>, _1, Int<kBlockN * kHeadDim>>>{}));
  static constexpr int kStageElements = kBlockN * kHeadDim;

  /// What one TMA brings of a row, in numbers of the cache, and of a packed ring: rows as wide as TMA permutes them.
  using PackedRows = sm80::SmemRows<kHeadDim / 2>;
  using SmemPacked = typename PackedRows::template Layout_<kBlockN>;
  static constexpr int kLoadColumns = kE4M3 ? PackedRows::kColumns * kPacked : kBoxColumns;
  /// Q and a stage of the rings for threads that read and write there: the same places as above, but as offsets. Those
  /// above permute whole addresses, and what CuTe makes of them no compiler knows to be shared memory.
  using Rows = sm80::SmemRows<kHeadDim>;
  using SmemQRows = typename Rows::template Layout_<kBlockM>;
  using SmemKvRows = typename Rows::template Layout_<kBlockN>;
  static_assert(Rows::kColumns == kBoxColumns);

  using MmaQk = decltype(make_tiled_mma(
      GMMA::ss_op_selector<Element, Element, float, Shape<Int<kBlockM>, Int<kBlockN>, Int<kHeadDim>>>(),
      Layout<Shape<Int<kConsumers>, _1, _1>>{}));
  using MmaPv = decltype(make_tiled_mma(
      GMMA::rs_op_selector<Element, Element, float, Shape<Int<kBlockM>, Int<kHeadDim>, Int<kBlockN>>, GMMA::Major::K,
                           GMMA::Major::MN>(),
      Layout<Shape<Int<kConsumers>, _1, _1>>{}));

  static_assert(size<1>(typename MmaQk::AtomShape_MNK{}) == kBlockN);  // one product per step, which reads Q once

  struct PackedRings {
    alignas(1024) Cached k[kPackedStages * kStageElements];
    alignas(1024) Cached v[kPackedStages * kStageElements];
  };
  struct Nothing {};

  struct alignas(1024) Shared {
    alignas(1024) Element q[cosize_v<SmemQ>];
    alignas(1024) Element k[cosize_v<SmemKvRing>];
    alignas(1024) Element v[cosize_v<SmemKvRing>];
    std::conditional_t<kE4M3, PackedRings, Nothing> packed;
    RingBarriers<kStages> products;                                            // of k and v, which the products read
    BlockNote notes[kStages];                                                  // with the keys
    int32_t first_keys[kStages];                                               // with the values
    std::conditional_t<kE4M3, RingBarriers<kPackedStages>, Nothing> widening;  // of the packed rings
    uint64_t tile_full[kTileSlots], tile_empty[kTileSlots];
    TileSlot tiles[kTileSlots];
  };
  static_assert(sizeof(Shared) + 1024 <= kMaxSharedBytes);
};

/// Decode: the tile of sm80, with loads by TMA into rings as deep as kMinCtas CTAs per SM have room for. A box of TMA
/// is one column of atoms in a ring's layout, whose permutation of 16-byte units is the one that TMA has for rows of
/// that width.
///
/// Keys of e4m3 take more instructions for the bytes that they are, most of them in chains: what an SM gets done there
/// grows with the number of its warps. Memory bounds the others with two CTAs, and three have no registers.
template <class Element, int kHeadDim, class Cached = Element>
struct DecodeTraits : sm80::DecodeTraits<Element, kHeadDim, Cached> {
  using Base = sm80::DecodeTraits<Element, kHeadDim, Cached>;
  static constexpr int kMinCtas = !Base::kE4M3 || kHeadDim > 128 ? 2 : kHeadDim > 64 ? 3 : 4;
  static constexpr int kBoxColumns = Base::KvRows::kColumns;             // of 16 bits
  static constexpr int kBoxes = kHeadDim / Base::kPacked / kBoxColumns;  // of a row
  static constexpr int kLeastBoxRows = 16;                               // which divides the sizes of pages
  static constexpr uint32_t kStageBytes = 2 * Base::kStageElements * 2;  // keys and values of a warp
  static constexpr int kOtherBytes = Base::kQueryBytes + 2048;           // the tile and the barriers, and the system's
  static constexpr int kFitting = (kMaxSharedBytes / kMinCtas - kOtherBytes) / (kStageBytes * Base::kWarps);
  static constexpr int kStages = kFitting < 6 ? kFitting : 6;
  static_assert(kStages >= 2);
  static constexpr int kSharedBytes = Base::shared_bytes(kStages);
};

}  // namespace dca::cuda::sm90
