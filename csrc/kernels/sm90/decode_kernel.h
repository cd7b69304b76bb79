// Dual Chunk Attention of few query rows over a long cache, for Hopper: sm80's tile, whose keys and values TMA brings.
#pragma once

#include "decode_loads.h"
#include "sm80/decode_tile.h"

namespace dca::cuda::sm90 {

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinCtas)
    decode_kernel(const __grid_constant__ DecodeArgs args) {
  extern __shared__ __align__(1024) unsigned char shared[];
  __shared__ __align__(16) unsigned char storage[sizeof(WorkTile)];
  __shared__ uint64_t full[Traits::kWarps * Traits::kStages];
  TmaLoads<Traits>::prepare(args, full);
  const WorkTile& tile = WorkTile::in_shared_memory(args.attention, storage);
  if (tile.first_of_sequence) {
    clear_rows_without_position<typename Traits::Element>(args.attention, tile, static_cast<int32_t>(threadIdx.x),
                                                          Traits::kThreads);
  }
  if (tile.empty()) return;
  static_assert(Traits::kQueryBytes % 1024 == 0);  // so that the rings are aligned as TMA permutes them
  TmaLoads<Traits> loads(args, tile, shared + Traits::kQueryBytes, full);
  sm80::DecodeTile<Traits, TmaLoads<Traits>>(args.attention, tile, shared, loads).run();
}

}  // namespace dca::cuda::sm90
