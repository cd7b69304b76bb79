// A warp's ring of keys and values in decode, and what fills it: cp.async.
//
// Loads of a warp, whatever they are made of:
//   ring()     where they go
//   begin()    asks for the first blocks
//   next()     asks for one block more, and waits for the block that is next in the walk; none: its count is 0
//   stage()    the place in the ring of that block
//   masked()   whether some row must not see some key of it
//   mask()     hides that
//   advance()  the warp is done with that block
//   end()      nothing is on its way any more
#pragma once

#include "mainloop.h"

namespace dca::cuda::sm80 {

/// Where a warp's keys and values of each block lie in shared memory.
template <class Traits>
class DecodeRing {
  using Operand = typename Traits::Operand;

 public:
  /// `rings`: those of all warps.
  __device__ DecodeRing(unsigned char* rings, int32_t warp)
      : k_(reinterpret_cast<Operand*>(rings) + warp * 2 * Traits::kStages * Traits::kStageElements),
        v_(k_ + Traits::kStages * Traits::kStageElements) {}

  __device__ Operand* k(int32_t stage) const { return k_ + stage * Traits::kStageElements; }
  __device__ Operand* v(int32_t stage) const { return v_ + stage * Traits::kStageElements; }
  __device__ auto smem_k(int32_t stage) const {
    return make_tensor(make_smem_ptr(k(stage)), typename Traits::SmemKv{});
  }
  /// V as (head_dim, keys).
  __device__ auto smem_vt(int32_t stage) const {
    return make_tensor(make_smem_ptr(v(stage)), typename Traits::SmemVt{});
  }

 private:
  Operand* k_;
  Operand* v_;
};

/// Loads by cp.async, 16 bytes a lane.
template <class Traits, bool kPaged>
class CopyLoads {
  using Cached = typename Traits::Cached;
  static constexpr int kStages = Traits::kStages;
  static constexpr int kBlockN = Traits::kBlockN;

 public:
  __device__ CopyLoads(const AttentionArgs& args, const WorkTile& tile, unsigned char* rings)
      : args_(args),
        tile_(tile),
        lane_(static_cast<int32_t>(threadIdx.x) % 32),
        first_row_(static_cast<int32_t>(threadIdx.x) / 32 * Traits::kWarpKeys),
        ring_(rings, static_cast<int32_t>(threadIdx.x) / 32),
        ahead_(tile.ranges, kBlockN),
        walk_(tile.ranges, kBlockN) {}

  __device__ const DecodeRing<Traits>& ring() const { return ring_; }
  __device__ int32_t stage() const { return stage_; }

  __device__ __forceinline__ void begin() {
    CUTE_UNROLL
    for (int i = 0; i < kStages - 1; ++i) request();
  }

  __device__ __forceinline__ KeyBlock next() {
    const KeyBlock block = walk_.next();
    if (block.count == 0) return block;
    __syncwarp();  // every lane is done with the stage that is loaded next
    request();
    cp_async_wait<kStages - 1>();
    __syncwarp();
    return block;
  }

  __device__ __forceinline__ bool masked() const { return walk_.masked(); }

  template <class Logits, class Coordinates>
  __device__ __forceinline__ void mask(Logits& s, const Coordinates& at, const KeyBlock& block) const {
    mask_logits(s, at, args_, tile_, block, first_row_);
  }

  __device__ __forceinline__ void advance() { stage_ = following(stage_); }

  __device__ __forceinline__ void end() const { cp_async_wait<0>(); }

 private:
  __device__ static int32_t following(int32_t stage) { return stage + 1 == kStages ? 0 : stage + 1; }

  __device__ __forceinline__ void request() {
    const KeyBlock block = ahead_.next();
    const CacheRows<Cached, kPaged> keys(args_, args_.p.k, tile_, tile_.k);
    const CacheRows<Cached, kPaged> values(args_, args_.p.v, tile_, tile_.v);
    const int32_t row = args_.p.head_dim / Traits::kPacked;
    if (block.count > 0) {
      load_rows<typename Traits::SmemKv, 32>(keys, block, first_row_, row, ring_.k(ahead_stage_), lane_);
      load_rows<typename Traits::SmemKv, 32>(values, block, first_row_, row, ring_.v(ahead_stage_), lane_);
    }
    cp_async_fence();  // also without a block, so that the number of groups in flight stays what it is
    ahead_stage_ = following(ahead_stage_);
  }

  const AttentionArgs& args_;
  const WorkTile& tile_;
  const int32_t lane_;
  const int32_t first_row_;  ///< of a block, of those that are the warp's
  const DecodeRing<Traits> ring_;
  KeyBlockRuns<> ahead_;
  KeyBlockRuns<> walk_;
  int32_t ahead_stage_ = 0;
  int32_t stage_ = 0;
};

}  // namespace dca::cuda::sm80
