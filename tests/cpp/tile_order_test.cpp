// The order of CUDA tiles: every tile once, KV heads in groups, lengths without jumps.
#include <gtest/gtest.h>

#include <cstdlib>
#include <set>
#include <tuple>

#include "tile_order.h"

namespace dca {
namespace {

using Order = TileOrder<Divisor>;

TEST(TileOrder, HasEveryTileOnce) {
  for (const int32_t groups : {1, 2, 3}) {
    const Order order{{5}, {2}, {3}, {4}, groups};
    ASSERT_EQ(order.count(), 5 * 2 * 3 * 4 * groups);
    std::set<std::tuple<int32_t, int32_t, int32_t, int32_t>> seen;
    for (int32_t i = 0; i < order.count(); ++i) {
      const TileIndex tile = order.at(i);
      ASSERT_TRUE(tile.query_tile >= 0 && tile.query_tile < 5);
      ASSERT_TRUE(tile.split >= 0 && tile.split < 2);
      ASSERT_TRUE(tile.kv_head >= 0 && tile.kv_head < 3 * groups);
      ASSERT_TRUE(tile.head_tile >= 0 && tile.head_tile < 4);
      seen.insert({tile.query_tile, tile.split, tile.kv_head, tile.head_tile});
    }
    EXPECT_EQ(static_cast<int64_t>(seen.size()), order.count());
  }
}

TEST(TileOrder, AGroupOfKvHeadsIsDoneBeforeTheNext) {
  const Order order{{7}, {1}, {2}, {3}, 4};
  for (int32_t i = 0; i < order.count(); ++i) ASSERT_EQ(order.at(i).kv_head / 2, i / (7 * 2 * 3));
}

TEST(TileOrder, HeadsThatReadOneKvHeadRunSideBySide) {
  const Order order{{7}, {2}, {5}, {3}, 1};
  for (int32_t i = 0; i < order.count(); i += 3) {
    const TileIndex first = order.at(i);
    for (int32_t next = 1; next < 3; ++next) {
      const TileIndex tile = order.at(i + next);
      ASSERT_EQ(tile.head_tile, next);
      ASSERT_EQ(std::tie(tile.query_tile, tile.split, tile.kv_head),
                std::tie(first.query_tile, first.split, first.kv_head));
    }
  }
}

TEST(TileOrder, LengthsHaveNoJumpsAndEndWithTheShortest) {
  for (const int32_t groups : {1, 2, 5}) {
    const Order order{{6}, {1}, {2}, {2}, groups};
    for (int32_t i = 1; i < order.count(); ++i) {
      ASSERT_LE(std::abs(order.at(i).query_tile - order.at(i - 1).query_tile), 1) << groups << " groups, tile " << i;
    }
    EXPECT_EQ(order.at(static_cast<int32_t>(order.count()) - 1).query_tile, 5);
    EXPECT_EQ(order.at(0).query_tile, groups % 2 == 1 ? 0 : 5);
  }
}

}  // namespace
}  // namespace dca
