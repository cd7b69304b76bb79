// Tile shapes and split counts as pure functions of shapes, so that they can be tested and read in one place.
#pragma once

#include <algorithm>
#include <cstdint>

namespace dca {

/// A CPU query tile: block_m positions of every query head of one KV head.
struct CpuTileShape {
  int32_t block_m;
};

/// Rows of a tile (positions times heads of the group) at which packing the keys pays for itself: below, the keys are
/// read where they lie, as decode has to.
inline constexpr int32_t kCpuMinPackedRows = 17;

/// A task whose Q, and whose O, has at most so many elements, and whole strips of rows where it has many.
constexpr CpuTileShape cpu_tile_shape(int32_t group, int32_t head_dim, int32_t task_elements, int32_t strip_rows) {
  const int32_t rows = std::max(1, task_elements / std::max(1, head_dim));
  const int32_t block_m = std::clamp(rows / std::max(1, group), 8, 40 * strip_rows);
  return {block_m >= strip_rows ? block_m / strip_rows * strip_rows : block_m};
}

/// Elements of Q, and of O, of a task that a small L2 cache has room for: in fp32 both take at most 256 KiB.
inline constexpr int32_t kCpuTaskElements = 32768;

/// Of a task that packs its keys, at the most. Each block of keys is packed once a task, and once for each block the
/// task's Q and O pass by, from L3 where L2 is small: with so many rows neither costs much.
inline constexpr int32_t kCpuLargestTaskElements = 131072;

/// Of a task that packs its keys, of `total` elements in all: fewer where threads would have fewer than 8 tasks each, or
/// some would wait too long for the others' last ones.
constexpr int32_t cpu_task_elements(int64_t total, int32_t num_threads) {
  const int64_t share = total / (8 * static_cast<int64_t>(std::max(1, num_threads)));
  return static_cast<int32_t>(std::clamp<int64_t>(share, kCpuTaskElements, kCpuLargestTaskElements));
}

/// KV heads that share a task of few rows: as many as Q and O have room for, evenly.
constexpr int32_t cpu_heads_per_task(int32_t num_heads_kv, int32_t rows_per_head, int32_t head_dim) {
  const int64_t elements = static_cast<int64_t>(std::max(1, rows_per_head)) * std::max(1, head_dim);
  const int32_t most = static_cast<int32_t>(std::max<int64_t>(1, kCpuTaskElements / elements));
  const int32_t tasks = (num_heads_kv + most - 1) / most;
  return (num_heads_kv + tasks - 1) / tasks;
}

/// Key splits per tile: enough tasks to keep every thread busy to the end, and at least 512 keys in each. More splits
/// than tiles need are not free: each writes its partial result in fp32.
constexpr int32_t cpu_num_splits(int64_t num_tiles, int32_t num_threads, int32_t max_kv_len) {
  if (num_tiles <= 0 || num_threads <= 1) return 1;
  const int64_t wanted = (4 * static_cast<int64_t>(num_threads) + num_tiles - 1) / num_tiles;
  return static_cast<int32_t>(std::clamp<int64_t>(wanted, 1, std::max(1, max_kv_len / 512)));
}

// --- CUDA ---

/// Decode tiles have 16 rows, what one mma.sync computes at the least.
inline constexpr int32_t kCudaDecodeRows = 16;

constexpr bool cuda_prefers_decode_tiles(int32_t group, int32_t seqlen_q) {
  return static_cast<int64_t>(group) * seqlen_q <= kCudaDecodeRows;
}

/// Rows of a CUDA tile: `heads` query heads of one KV head at each of `positions` positions.
struct CudaTileShape {
  int32_t heads;
  int32_t positions;
};

/// Where one head has rows enough for a tile, a tile is one head's: the keys that its neighbours read are in L2, and
/// TMA can store its rows. Unless many rows of a chunk's tiles would have no position - of 192 rows, 5 % where chunks
/// have 2560 - and tiles of several heads have fewer of them. Where one head has no rows enough, the heads of the group
/// share a tile, and the keys are read once for all of them.
constexpr CudaTileShape cuda_tile_shape(int32_t group, int32_t seqlen_q, int32_t block_m, int32_t chunk_len) {
  if (seqlen_q < block_m) {
    const int32_t heads = std::min(group, block_m);
    return {heads, block_m / heads};
  }
  const int64_t positions = std::min(seqlen_q, chunk_len);
  const auto rows = [&](int32_t heads) {  // of the tiles of a chunk, for each head
    const int64_t in_tile = block_m / heads;
    return (positions + in_tile - 1) / in_tile * in_tile;
  };
  int32_t best = 1;
  for (int32_t heads = 2; heads <= std::min(group, block_m); ++heads) {
    if (group % heads == 0 && block_m % heads == 0 && 33 * rows(heads) < 32 * rows(best)) best = heads;
  }
  return {best, block_m / best};
}

/// Of `num_kv_heads` KV heads, counted over all sequences, how many are read at one time: as few as can be, so that
/// their keys and values stay in L2, but enough that their tiles go six times through the device, which evens out that
/// tiles differ. A divisor of their number.
constexpr int64_t cuda_kv_heads_at_once(int64_t num_kv_heads, int64_t tiles_of_kv_head, int32_t num_slots) {
  constexpr int64_t kRounds = 6;
  const int64_t tiles = std::max<int64_t>(1, tiles_of_kv_head);
  int64_t heads = std::max<int64_t>(1, (kRounds * num_slots + tiles - 1) / tiles);
  while (heads < num_kv_heads && num_kv_heads % heads != 0) ++heads;
  return std::clamp<int64_t>(num_kv_heads, 1, heads);
}

/// Whether a call whose large tiles are `num_tiles` has enough of them: where they are few, small ones leave a more
/// even end.
constexpr bool cuda_prefers_large_tiles(int64_t num_tiles, int32_t num_slots) { return num_tiles >= 4LL * num_slots; }

/// CTAs for `num_tiles` tiles on a device that holds `num_slots` at a time. A kernel whose CTAs take tile after tile
/// fills the device once, in a fixed order; that is even where all sequences have one length. Else every tile has its
/// CTA, and the device deals them out as others end.
constexpr int64_t cuda_num_ctas(int64_t num_tiles, int32_t num_slots, bool persistent, bool equal_lengths) {
  return persistent && equal_lengths ? std::min<int64_t>(num_tiles, std::max(1, num_slots)) : num_tiles;
}

/// Key splits per tile on a device that holds `num_slots` CTAs at a time, with at least 256 keys of the cache's
/// capacity in each: each split writes its partial result in fp32.
///
/// equal_tiles: tiles take equally long, as those of decode do. The last wave of CTAs then costs as much as the others,
/// so splits are the fewest that fill up to four waves nearly as well as any number of them does. Other tiles are split
/// only where they leave slots empty, and then to fill them once.
constexpr int32_t cuda_num_splits(int64_t num_tiles, int32_t num_slots, int32_t max_kv_len, bool equal_tiles) {
  constexpr int32_t kMaxSplits = 128;
  constexpr int32_t kMinKeys = 256;
  constexpr int64_t kWaves = 4;
  if (num_tiles <= 0 || num_slots <= 0) return 1;
  const int64_t most = std::clamp(max_kv_len / kMinKeys, 1, kMaxSplits);
  if (!equal_tiles) {
    if (num_tiles * 5 >= static_cast<int64_t>(num_slots) * 4) return 1;
    return static_cast<int32_t>(std::clamp<int64_t>(num_slots / num_tiles, 1, most));
  }
  // Of the slots of all waves, the share in use.
  const auto filled = [&](int64_t splits) {
    const int64_t ctas = num_tiles * splits;
    return static_cast<double>(ctas) / static_cast<double>((ctas + num_slots - 1) / num_slots * num_slots);
  };
  const int64_t last = std::clamp<int64_t>(kWaves * num_slots / num_tiles, 1, most);
  double best = 0.0;
  for (int64_t splits = 1; splits <= last; ++splits) best = std::max(best, filled(splits));
  int64_t splits = 1;
  while (filled(splits) < 0.95 * best) ++splits;
  return static_cast<int32_t>(splits);
}

}  // namespace dca
