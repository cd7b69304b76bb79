// Loads of decode by TMA: one lane of a warp asks for its keys and values of a block with one request per column of
// atoms, and an mbarrier per stage of the ring says when they are there.
#pragma once

#include <cute/arch/copy_sm90_tma.hpp>

#include "key_source.h"
#include "mainloop.h"
#include "sm80/decode_ring.h"

namespace dca::cuda::sm90 {

struct DecodeArgs {
  AttentionArgs attention;
  int32_t rows_per_box;  ///< kWarpKeys, or 16
  CUtensorMap k;
  CUtensorMap v;
};

/// What sm80::DecodeTile asks of its loads (sm80/decode_ring.h).
template <class Traits>
class TmaLoads {
  using Ring = sm80::DecodeRing<Traits>;
  using Operand = typename Traits::Operand;
  static constexpr int kStages = Traits::kStages;
  static constexpr int kRows = Traits::kWarpKeys;
  static constexpr int kPieces = kRows / Traits::kLeastBoxRows;

 public:
  /// What needs no tile, by a thread of a warp that does not look for it; the CTA meets when that is found. `full`:
  /// kStages mbarriers of each warp.
  __device__ static void prepare(const DecodeArgs& args, uint64_t* full) {
    static_assert(Traits::kWarps > 1);
    if (threadIdx.x != 32) return;
    prefetch_tma_descriptor(&args.k);
    prefetch_tma_descriptor(&args.v);
    for (int i = 0; i < Traits::kWarps * kStages; ++i) Barrier::init(&full[i], 1);
    cutlass::arch::fence_barrier_init();
  }

  /// `full`: as prepared.
  __device__ TmaLoads(const DecodeArgs& args, const WorkTile& tile, unsigned char* rings, uint64_t* full)
      : args_(args),
        tile_(tile),
        warp_(cutlass::canonical_warp_idx_sync()),
        kv_head_(in_all_lanes(tile.kv_head)),
        ring_(rings, warp_),
        full_(full + warp_ * kStages),
        ahead_(tile.ranges, Traits::kBlockN),
        walk_(tile.ranges, Traits::kBlockN) {}

  __device__ const Ring& ring() const { return ring_; }
  __device__ int32_t stage() const { return stage_; }

  // As a loop: instructions come from memory the first time, and here memory has nothing else to do.
  __device__ __forceinline__ void begin() {
    find();
    CUTE_NO_UNROLL
    for (int i = 0; i < kStages - 1; ++i) request();
  }

  __device__ __forceinline__ KeyBlock next() {
    const KeyBlock block = walk_.next();
    if (block.count == 0) return block;
    __syncwarp();  // every lane is done with the stage that is loaded next
    request();
    Barrier::wait(&full_[stage_], phase_);
    __syncwarp();  // ldmatrix takes the whole warp, of which one lane has made the request
    if (walk_.in_run()) return block;
    const int32_t first = first_key(block);
    if (first < 0 || first + kRows > tile_.seqlen.kv_len) clear_foreign_values(first);
    return block;
  }

  __device__ __forceinline__ bool masked() const { return walk_.masked(); }

  template <class Logits, class Coordinates>
  __device__ __forceinline__ void mask(Logits& s, const Coordinates& at, const KeyBlock& block) const {
    mask_block(s, at, args_.attention, tile_, block, first_key(block));
  }

  __device__ __forceinline__ void advance() {
    stage_ = following(stage_);
    if (stage_ == 0) phase_ ^= 1;
  }

  __device__ void end() const {}  // all that was asked for has been waited for

 private:
  __device__ static int32_t following(int32_t stage) { return stage + 1 == kStages ? 0 : stage + 1; }

  /// The same value, now known to the compiler as one for the warp: requests of TMA take no others.
  __device__ __forceinline__ static int32_t in_all_lanes(int32_t value) { return __shfl_sync(0xffffffff, value, 0); }

  /// Logical key of the warp's first row of a block.
  __device__ __forceinline__ int32_t first_key(const KeyBlock& block) const {
    return first_key_of(tile_, block, Traits::kBlockN) + warp_ * kRows;
  }

  /// Whether this part of a block has a box of its own. All rows come in one, unless a page may end among them.
  __device__ __forceinline__ bool has_box(int piece) const {
    return piece == 0 || (kPieces > 1 && args_.rows_per_box < kRows);
  }

  // Where the block is that is asked for next. With pages that is in memory, so it is read one request ahead.
  __device__ __forceinline__ void find() {
    const KeyBlock block = ahead_.next();
    found_ = block.count > 0;
    if (!found_) return;
    if (ahead_.in_run() && args_.attention.p.pages.page_table == nullptr) {
      sources_[0].row += Traits::kBlockN;
      return;
    }
    CUTE_UNROLL
    for (int piece = 0; piece < kPieces; ++piece) {
      if (!has_box(piece)) break;
      const int32_t first = first_key(block) + piece * Traits::kLeastBoxRows;
      sources_[piece] = KeySource::of(args_.attention, tile_, first, args_.rows_per_box);
    }
  }

  __device__ __forceinline__ void request() {
    if (!found_) return;
    uint64_t* const full = &full_[ahead_stage_];
    CUTE_UNROLL
    for (int piece = 0; piece < kPieces; ++piece) {
      if (!has_box(piece)) break;
      const KeySource source{in_all_lanes(sources_[piece].row), in_all_lanes(sources_[piece].batch)};
      if (elect_one_sync()) {
        if (piece == 0) Barrier::arrive_and_expect_tx(full, Traits::kStageBytes);
        load(args_.k, source, ring_.k(ahead_stage_), piece, full);
        load(args_.v, source, ring_.v(ahead_stage_), piece, full);
      }
    }
    ahead_stage_ = following(ahead_stage_);
    find();
  }

  __device__ __forceinline__ void load(const CUtensorMap& map, const KeySource& source, Operand* target, int piece,
                                       uint64_t* full) const {
    target += piece * Traits::kLeastBoxRows * Traits::kBoxColumns;
    CUTE_UNROLL
    for (int box = 0; box < Traits::kBoxes; ++box) {
      SM90_TMA_LOAD_4D::copy(&map, full, static_cast<uint64_t>(TMA::CacheHintSm90::EVICT_FIRST), target,
                             box * Traits::kBoxColumns * Traits::kPacked, source.row, kv_head_, source.batch);
      target += kRows * Traits::kBoxColumns;
    }
  }

  // Rows that are no key of the sequence: padding, another sequence's, nobody's. A weight of 0 does not hide a NaN. The
  // fence is for the TMA that writes there next.
  __device__ void clear_foreign_values(int32_t first) const {
    constexpr int kUnits = Traits::kStageElements / kRows / 8;
    auto sV = make_tensor(make_smem_ptr(ring_.v(stage_)), typename Traits::SmemKv{});
    for (int32_t i = cutlass::canonical_lane_idx(); i < kRows * kUnits; i += 32) {
      const int32_t key = first + i / kUnits;
      if (key >= 0 && key < tile_.seqlen.kv_len) continue;
      *reinterpret_cast<uint4*>(&sV(i / kUnits, i % kUnits * 8)) = {0, 0, 0, 0};
    }
    cutlass::arch::fence_view_async_shared();
    __syncwarp();
  }

  const DecodeArgs& args_;
  const WorkTile& tile_;
  const int32_t warp_;
  const int32_t kv_head_;
  const Ring ring_;
  uint64_t* const full_;
  KeyBlockRuns<true> ahead_;
  KeyBlockRuns<true> walk_;
  int32_t ahead_stage_ = 0;
  int32_t stage_ = 0;
  uint32_t phase_ = 0;
  KeySource sources_[kPieces]{};
  bool found_ = false;
};

}  // namespace dca::cuda::sm90
