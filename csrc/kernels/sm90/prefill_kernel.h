// Dual Chunk Attention prefill for Hopper (An et al. 2024, section 3): TMA, wgmma, warp specialisation.
//
// A CTA computes tiles of kBlockM query rows of one chunk, longest first. Warpgroup 0 loads: one of its warps walks the
// key blocks intra -> successive -> inter and requests K and V by TMA as places in the rings become free, whatever
// segment and tile they belong to. The other warpgroups compute, each 64 rows: S = Q K^T, softmax, O += P V, one online
// softmax through all segments. At a segment switch a warpgroup rotates its own rows of Q in shared memory while the
// loads go on.
//
// Of a cache of e4m3 TMA brings what the cache holds, and warpgroup 0 widens it into the rings of the products
// (widener.h).
//
// Shared memory: Q (kBlockM, kHeadDim) | K ring (kStages, kBlockN, kHeadDim) | V ring | with e4m3 the rings of packed K
// and V (kPackedStages, kBlockN, kHeadDim) | mbarriers, and what is said of the blocks | tiles.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "consumer.h"
#include "producer.h"
#include "widener.h"

namespace dca::cuda::sm90 {

/// `writers`, `readers`: arrivals that fill a place, and that make it free.
template <int kStages>
__device__ void init_ring(RingBarriers<kStages>& ring, uint32_t writers, uint32_t readers) {
  for (int stage = 0; stage < kStages; ++stage) {
    Barrier::init(&ring.k_full[stage], writers);
    Barrier::init(&ring.v_full[stage], writers);
    EmptyBarrier::init(&ring.k_empty[stage], readers);
    EmptyBarrier::init(&ring.v_empty[stage], readers);
  }
}

template <class Traits>
__device__ void init_barriers(typename Traits::Shared& shared) {
  constexpr uint32_t kConsumerWarps = Traits::kConsumerThreads / 32;
  constexpr uint32_t kTileReaders = Traits::kConsumerThreads + (Traits::kE4M3 ? 128 : 0);
  constexpr uint32_t kWidenerWarps = Traits::kE4M3 ? 4 : 0;
  init_ring(shared.products, Traits::kE4M3 ? kWidenerWarps : 1, kConsumerWarps);
  if constexpr (Traits::kE4M3) init_ring(shared.widening, 1, kWidenerWarps);
  for (int slot = 0; slot < Traits::kTileSlots; ++slot) {
    Barrier::init(&shared.tile_full[slot], 1);
    EmptyBarrier::init(&shared.tile_empty[slot], kTileReaders);
    shared.tiles[slot].failed = 0;
  }
  cutlass::arch::fence_barrier_init();
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1) prefill_kernel(const __grid_constant__ PrefillArgs args) {
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(memory);
  if (threadIdx.x == 0) init_barriers<Traits>(shared);
  __syncthreads();
  const int32_t thread = static_cast<int32_t>(threadIdx.x);
  if (cutlass::canonical_warp_group_idx() == 0) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    if constexpr (Traits::kE4M3) {
      Widener<Traits>(args, shared, thread).run();
    } else {
      if (thread < 32) Producer<Traits>(args, shared, thread).run();
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    Consumer<Traits>(args, shared, thread - 128).run();
  }
}

}  // namespace dca::cuda::sm90
