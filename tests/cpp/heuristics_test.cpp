// Tile shapes and split counts: pure functions, so their promises can be checked for every shape that matters.
#include "heuristics.h"

#include <gtest/gtest.h>

#include <algorithm>

namespace dca {
namespace {

TEST(Heuristics, TilesFitInCacheAndAreWholeStrips) {
  struct Limits {
    int32_t elements;
    int32_t strip;
  };
  for (const Limits limits : {Limits{kCpuTaskElements, 24}, Limits{kCpuLargestTaskElements, 32}}) {
    for (const int32_t head_dim : {1, 64, 80, 96, 128, 256, 1024}) {
      for (const int32_t group : {1, 2, 3, 4, 7, 8, 16, 64}) {
        const CpuTileShape shape = cpu_tile_shape(group, head_dim, limits.elements, limits.strip);
        EXPECT_GE(shape.block_m, 8);
        EXPECT_LE(shape.block_m, 40 * limits.strip);
        EXPECT_TRUE(shape.block_m < limits.strip || shape.block_m % limits.strip == 0);
        // 8 positions are the least, however wide the group.
        EXPECT_TRUE(shape.block_m == 8 || 1LL * shape.block_m * group * head_dim <= limits.elements);
      }
    }
  }
}

TEST(Heuristics, EveryThreadHasTasks) {
  for (const int32_t num_threads : {1, 2, 64}) {
    for (const int64_t total : {int64_t{0}, int64_t{1} << 20, int64_t{1} << 30}) {
      const int32_t elements = cpu_task_elements(total, num_threads);
      EXPECT_GE(elements, kCpuTaskElements);
      EXPECT_LE(elements, kCpuLargestTaskElements);
      EXPECT_TRUE(elements == kCpuTaskElements || elements * 8LL * num_threads <= total);
    }
  }
  EXPECT_EQ(cpu_task_elements(int64_t{1} << 30, 64), kCpuLargestTaskElements);
}

TEST(Heuristics, HeadsThatShareATaskFitInCacheAndAreEven) {
  for (const int32_t num_heads_kv : {1, 2, 3, 8, 32, 71}) {
    for (const int32_t rows : {1, 4, 16}) {
      for (const int32_t head_dim : {1, 64, 128, 1024}) {
        const int32_t heads = cpu_heads_per_task(num_heads_kv, rows, head_dim);
        ASSERT_GE(heads, 1);
        ASSERT_LE(heads, num_heads_kv);
        ASSERT_TRUE(heads == 1 || 2LL * heads * rows * head_dim * 4 <= 256 * 1024);
        // The last task lacks less than one head for each of the others.
        const int32_t tasks = (num_heads_kv + heads - 1) / heads;
        ASSERT_LT(tasks * heads - num_heads_kv, tasks);
      }
    }
  }
}

TEST(Heuristics, OneThreadAndNoWorkNeedNoSplits) {
  EXPECT_EQ(cpu_num_splits(1, 1, 1 << 20), 1);
  EXPECT_EQ(cpu_num_splits(0, 8, 1 << 20), 1);
  EXPECT_EQ(cpu_num_splits(1, 8, 0), 1);
}

TEST(Heuristics, SplitsFeedEveryThreadAndAreNotShort) {
  for (const int64_t tiles : {1, 2, 3, 7, 8, 31, 1000}) {
    for (const int32_t threads : {2, 3, 16, 128}) {
      for (const int32_t kv_len : {1, 511, 512, 1024, 40000, 1 << 20, INT32_MAX}) {
        const int32_t splits = cpu_num_splits(tiles, threads, kv_len);
        ASSERT_GE(splits, 1);
        ASSERT_TRUE(splits == 1 || kv_len / splits >= 512);
        const bool all_threads_busy = tiles * splits >= 4LL * threads;
        const bool no_room_for_more = kv_len / 512 <= splits;
        ASSERT_TRUE(all_threads_busy || no_room_for_more);
        // One split fewer would leave threads without work.
        ASSERT_TRUE(splits == 1 || tiles * (splits - 1) < 4LL * threads);
      }
    }
  }
}

// --- CUDA ---

TEST(Heuristics, CudaTilesHoldWholeRowsOfHeads) {
  for (const int32_t block_m : {16, 64, 128, 192}) {
    for (const int32_t group : {1, 2, 3, 8, 16, 71, 200}) {
      for (const int32_t seqlen_q : {1, 2, 15, 16, 64, 127, 128, 5000}) {
        for (const int32_t chunk_len : {1, 100, 2560, INT32_MAX}) {
          const CudaTileShape shape = cuda_tile_shape(group, seqlen_q, block_m, chunk_len);
          ASSERT_GE(shape.heads, 1);
          ASSERT_GE(shape.positions, 1);
          ASSERT_LE(shape.heads * shape.positions, block_m);
          ASSERT_LE(shape.heads, group);
          // The whole group shares a tile where one head has no rows enough to fill it; else heads share tiles evenly.
          if (seqlen_q < block_m) {
            ASSERT_EQ(shape.heads, std::min(group, block_m));
          } else {
            ASSERT_TRUE(group % shape.heads == 0 && block_m % shape.heads == 0);
          }
        }
      }
    }
  }
  EXPECT_TRUE(cuda_prefers_decode_tiles(8, 2));
  EXPECT_FALSE(cuda_prefers_decode_tiles(8, 3));
  EXPECT_FALSE(cuda_prefers_decode_tiles(INT32_MAX, INT32_MAX));
}

TEST(Heuristics, CudaSplitsFillTheDeviceOnceAndAreNotShort) {
  for (const int64_t tiles : {1, 8, 32, 100, 263, 264, 5000}) {
    for (const int32_t slots : {1, 80, 216, 264}) {
      for (const int32_t kv_len : {0, 255, 512, 40000, 1 << 20, INT32_MAX}) {
        for (const bool equal_tiles : {false, true}) {
          const int32_t splits = cuda_num_splits(tiles, slots, kv_len, equal_tiles);
          ASSERT_GE(splits, 1);
          ASSERT_LE(splits, 128);
          ASSERT_TRUE(splits == 1 || kv_len / splits >= 256);
          ASSERT_TRUE(splits == 1 || tiles * splits <= (equal_tiles ? 4 : 1) * slots) << "waves too many";
          // Most of the slots are in use, or nearly all splits that the keys allow.
          ASSERT_TRUE(2 * tiles * splits > slots || 100 * splits >= 95 * std::min(128, kv_len / 256));
        }
      }
    }
  }
}

TEST(CudaHeuristics, HeadsShareTilesWhereChunksWouldLeaveManyRowsEmpty) {
  EXPECT_EQ(cuda_tile_shape(4, 16384, 128, 2560).heads, 1) << "20 tiles, no row empty";
  EXPECT_EQ(cuda_tile_shape(4, 16384, 192, 6144).heads, 1) << "32 tiles, no row empty";
  EXPECT_EQ(cuda_tile_shape(4, 16384, 192, 2560).heads, 2) << "2592 rows instead of 2688; with 4 heads no fewer";
  EXPECT_EQ(cuda_tile_shape(1, 16384, 192, 2560).heads, 1) << "there is one";
  EXPECT_EQ(cuda_tile_shape(4, 16384, 128, 2730).heads, 1) << "2752 rows instead of 2816, too little for it";
  EXPECT_EQ(cuda_tile_shape(7, 16384, 192, 2560).heads, 1) << "7 heads share no 192 rows";
}

TEST(CudaHeuristics, KvHeadsAtOnceAreFewButFillTheDevice) {
  EXPECT_EQ(cuda_kv_heads_at_once(8, 4096, 132), 1) << "131072 tokens: the tiles of one go 31 times through";
  EXPECT_EQ(cuda_kv_heads_at_once(8, 512, 132), 2) << "16384 tokens: one's would 4 times";
  EXPECT_EQ(cuda_kv_heads_at_once(8, 10, 132), 8) << "all are too few";
  EXPECT_EQ(cuda_kv_heads_at_once(7, 400, 132), 7) << "2 would do, but do not divide 7";
  for (const int64_t heads : {0, 1, 5, 12, 96}) {
    for (const int64_t tiles : {0, 1, 77, 5000}) {
      for (const int32_t slots : {0, 1, 132}) {
        const int64_t at_once = cuda_kv_heads_at_once(heads, tiles, slots);
        ASSERT_GE(at_once, 1);
        ASSERT_EQ(heads % at_once, 0);
      }
    }
  }
}

TEST(CudaHeuristics, LargeTilesAreForCallsWithMany) {
  EXPECT_FALSE(cuda_prefers_large_tiles(352, 132)) << "2048 tokens, 32 heads";
  EXPECT_TRUE(cuda_prefers_large_tiles(704, 132)) << "4096 tokens";
}

TEST(CudaHeuristics, SplitsOfEqualTilesFillTheirWaves) {
  EXPECT_EQ(cuda_num_splits(8, 264, 131072, true), 32) << "as good as 33, and shares of whole blocks more often";
  EXPECT_EQ(cuda_num_splits(256, 264, 32768, true), 1) << "nearly full as it is";
  EXPECT_EQ(cuda_num_splits(256, 396, 32768, true), 3) << "two waves, nearly full, instead of two thirds of one";
  EXPECT_EQ(cuda_num_splits(300, 264, 255, true), 1) << "not below 256 keys";
}

TEST(CudaHeuristics, CtasOfPersistentKernelsFillTheDeviceOnce) {
  EXPECT_EQ(cuda_num_ctas(4096, 132, true, true), 132);
  EXPECT_EQ(cuda_num_ctas(100, 132, true, true), 100);
  EXPECT_EQ(cuda_num_ctas(4096, 132, true, false), 4096) << "lengths differ: the device deals tiles out";
  EXPECT_EQ(cuda_num_ctas(4096, 132, false, true), 4096);
  EXPECT_EQ(cuda_num_ctas(4096, 0, true, true), 1) << "a device that says it has no room still gets a launch";
}

}  // namespace
}  // namespace dca
