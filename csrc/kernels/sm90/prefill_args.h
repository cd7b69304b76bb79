// What the prefill kernel is launched with.
#pragma once

#include <cuda.h>

#include "tile_scheduler.h"

namespace dca::cuda::sm90 {

struct PrefillArgs {
  AttentionArgs attention;
  CUtensorMap k;
  CUtensorMap v;
  CUtensorMap out;
  int32_t num_tiles;
  int32_t rows_per_box;  ///< of K and V: kBlockN, or what divides it and the page
  bool out_by_tma;       ///< tiles of one head whose rows TMA can store
};

}  // namespace dca::cuda::sm90
