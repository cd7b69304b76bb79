// How attention is cut into tasks: pieces of work that one thread does alone.
#pragma once

#include <cstdint>
#include <vector>

#include "dca/params.h"
#include "heuristics.h"
#include "micro_kernels.h"

namespace dca::cpu {

/// The query positions [q_begin, q_end) of one chunk of one sequence, for all query heads of the KV heads
/// [kv_head_begin, kv_head_end), over the keys of one split.
struct Task {
  int32_t b;
  int32_t kv_head_begin;
  int32_t kv_head_end;
  int32_t q_begin;
  int32_t q_end;
  int32_t split;
  KeyRange window;  ///< logical keys of this split
  bool packed;      ///< keys are packed for the tile (tile_walk.h), not read as rows (row_walk.h)

  int32_t num_positions() const { return q_end - q_begin; }
  int32_t num_kv_heads() const { return kv_head_end - kv_head_begin; }
};

struct Plan {
  int32_t block_m = 0;
  int32_t num_splits = 1;
  std::vector<Task> tasks;  ///< longest first
  int64_t max_workers = 1;  ///< threads that the work repays

  // The largest task of each kind, in query rows; 0 if there is none.
  int64_t max_packed_rows = 0;
  int64_t max_unpacked_rows = 0;
};

Plan make_plan(const AttentionParams& p, const MicroKernels& mk);

/// The number of splits that make_plan would choose.
int32_t choose_num_splits(const AttentionParams& p, const MicroKernels& mk);

/// The products of a task's tiles: those of bfloat16 where queries are and the machine can, else fp32. Factors on the
/// logits come after the product, so that Q is rounded as the model would round it, and 8-bit numbers stay as they are.
const PackedProducts& packed_products(const AttentionParams& p, const MicroKernels& mk);

CpuTileShape tile_shape(const AttentionParams& p, const MicroKernels& mk);

/// Whether a tile of so many rows packs its keys.
bool packs_keys(int64_t rows, int32_t head_dim, int32_t lanes);

}  // namespace dca::cpu
