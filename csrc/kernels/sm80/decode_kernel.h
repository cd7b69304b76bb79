// Dual Chunk Attention of few query rows over a long cache: decode and multi-token verify, for every GPU from 8.0 on.
#pragma once

#include "decode_tile.h"

namespace dca::cuda::sm80 {

template <class Traits, bool kPaged>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinCtas)
    decode_kernel(const __grid_constant__ AttentionArgs args) {
  static_assert(Traits::kSharedBytes + 1024 <= kMaxSharedBytes);  // the tile lies there too
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ __align__(16) unsigned char storage[sizeof(WorkTile)];
  const WorkTile& tile = WorkTile::in_shared_memory(args, storage);
  if (tile.first_of_sequence) {
    clear_rows_without_position<typename Traits::Element>(args, tile, static_cast<int32_t>(threadIdx.x),
                                                          Traits::kThreads);
  }
  if (tile.empty()) return;
  CopyLoads<Traits, kPaged> loads(args, tile, shared + Traits::kQueryBytes);
  DecodeTile<Traits, CopyLoads<Traits, kPaged>>(args, tile, shared, loads).run();
}

}  // namespace dca::cuda::sm80
