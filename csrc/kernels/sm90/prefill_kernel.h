// Dual Chunk Attention prefill for Hopper (An et al. 2024, section 3): TMA, wgmma, warp specialisation.
//
// A CTA computes tiles of kBlockM query rows of one chunk, longest first. Warpgroup 0 loads: one of its warps walks the
// key blocks intra -> successive -> inter and requests K and V by TMA as places in the rings become free, whatever
// segment and tile they belong to. The other warpgroups compute, each 64 rows: S = Q K^T, softmax, O += P V, one online
// softmax through all segments. At a segment switch a warpgroup rotates its own rows of Q in shared memory while the
// loads go on.
//
// Shared memory: Q (kBlockM, kHeadDim) | K ring (kStages, kBlockN, kHeadDim) | V ring | mbarriers | tiles.
#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "consumer.h"
#include "producer.h"

namespace dca::cuda::sm90 {

template <class Traits>
__device__ void init_barriers(typename Traits::Shared& shared) {
  constexpr uint32_t kConsumerWarps = Traits::kConsumerThreads / 32;
  for (int stage = 0; stage < Traits::kStages; ++stage) {
    Barrier::init(&shared.k_full[stage], 1);
    Barrier::init(&shared.v_full[stage], 1);
    EmptyBarrier::init(&shared.k_empty[stage], kConsumerWarps);
    EmptyBarrier::init(&shared.v_empty[stage], kConsumerWarps);
  }
  for (int slot = 0; slot < Traits::kTileSlots; ++slot) {
    Barrier::init(&shared.tile_full[slot], 1);
    EmptyBarrier::init(&shared.tile_empty[slot], kConsumerWarps);
  }
  cutlass::arch::fence_barrier_init();
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1) prefill_kernel(const __grid_constant__ PrefillArgs args) {
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(memory);
  if (threadIdx.x == 0) init_barriers<Traits>(shared);
  __syncthreads();
  if (cutlass::canonical_warp_group_idx() == 0) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    if (threadIdx.x < 32) Producer<Traits>(args, shared, static_cast<int32_t>(threadIdx.x)).run();
  } else {
    cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    Consumer<Traits>(args, shared, static_cast<int32_t>(threadIdx.x) - 128).run();
  }
}

}  // namespace dca::cuda::sm90
