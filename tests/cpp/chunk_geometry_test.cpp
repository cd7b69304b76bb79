// The geometry against the table of the method, pair by pair: the reference writes it out once more, in 64 bits.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "dca/chunk_geometry.h"
#include "reference.h"

namespace dca {
namespace {

constexpr int32_t kLargest = INT32_MAX;

// Distance between the positions that query i and key j are rotated at.
int32_t distance(ChunkGeometry geometry, int32_t i, int32_t j) {
  return geometry.query_position(i, geometry.segment_of(i, j)) - geometry.key_position(j);
}

std::vector<int32_t> row_of_distances(ChunkGeometry geometry, int32_t i) {
  std::vector<int32_t> row;
  for (int32_t j = 0; j <= i; ++j) row.push_back(distance(geometry, i, j));
  return row;
}

template <class Visit>
void for_each_geometry(int32_t largest_chunk, Visit visit) {
  for (int32_t n = 1; n <= largest_chunk; ++n) {
    for (int32_t position = n; position <= 2 * n - 1; ++position) visit(ChunkGeometry{n, position});
  }
}

TEST(ChunkGeometry, HasTheRowsOfThePapersFigure2) {
  const ChunkGeometry figure2{6, 9};
  EXPECT_EQ(row_of_distances(figure2, 7), (std::vector<int32_t>{7, 6, 5, 4, 3, 2, 1, 0}));
  EXPECT_EQ(row_of_distances(figure2, 11), (std::vector<int32_t>{9, 8, 7, 6, 5, 4, 5, 4, 3, 2, 1, 0}));
}

TEST(ChunkGeometry, HasAllThreeSegmentsInRow13OfChunk4) {
  EXPECT_EQ(row_of_distances({4, 6}, 13), (std::vector<int32_t>{6, 5, 4, 3, 6, 5, 4, 3, 5, 4, 3, 2, 1, 0}));
}

TEST(ChunkGeometry, AcceptsExactlyTheGeometriesOfTheContract) {
  for (int32_t n = -1; n <= 5; ++n) {
    for (int32_t largest_position = -1; largest_position <= 12; ++largest_position) {
      const bool expected = 1 <= n && n <= largest_position && largest_position <= 2 * n - 1;
      EXPECT_EQ((ChunkGeometry{n, largest_position}.valid()), expected) << n << " " << largest_position;
    }
  }
  EXPECT_TRUE((ChunkGeometry{kLargest, kLargest}.valid()));
  EXPECT_TRUE((ChunkGeometry{1 << 30, kLargest}.valid()));
  EXPECT_FALSE((ChunkGeometry{(1 << 30) - 1, kLargest}.valid()));
  EXPECT_FALSE((ChunkGeometry{INT32_MIN, INT32_MIN}.valid()));
}

TEST(ChunkGeometry, AgreesWithTheTable) {
  for_each_geometry(7, [](ChunkGeometry geometry) {
    for (int32_t i = 0; i < 40; ++i) {
      for (int32_t j = 0; j <= i; ++j) {
        const Segment segment = reference::segment_of(i, j, geometry);
        ASSERT_EQ(geometry.segment_of(i, j), segment);
        ASSERT_EQ(geometry.key_position(j), reference::key_position(j, geometry));
        ASSERT_EQ(geometry.query_position(i, segment), reference::query_position(i, segment, geometry));
        ASSERT_LE(distance(geometry, i, j), geometry.max_position);
        ASSERT_GE(distance(geometry, i, j), 0);
      }
    }
  });
}

TEST(ChunkGeometry, IsCausalRopeUpToMaxPosition) {
  for_each_geometry(7, [](ChunkGeometry geometry) {
    for (int32_t i = 0; i <= geometry.max_position; ++i) {
      for (int32_t j = 0; j <= i; ++j) ASSERT_EQ(distance(geometry, i, j), i - j);
    }
    EXPECT_NE(distance(geometry, geometry.max_position + 1, 0), geometry.max_position + 1);
  });
}

// --- Tiles ---

TEST(ChunkGeometry, TilesCoverTheQueriesAndStayInOneChunk) {
  for (const ChunkGeometry geometry : {ChunkGeometry{1, 1}, {5, 7}, {16, 31}}) {
    for (const int32_t block_m : {1, 3, 16, 100}) {
      for (int32_t seqlen = 1; seqlen <= 40; ++seqlen) {
        for (int32_t begin = 0; begin < seqlen;) {
          const int32_t end = geometry.tile_end(begin, block_m, seqlen);
          ASSERT_GT(end, begin);
          ASSERT_LE(end, std::min(seqlen, begin + block_m));
          ASSERT_EQ(begin / geometry.chunk_len, (end - 1) / geometry.chunk_len);
          const bool largest = end == seqlen || end == begin + block_m || end % geometry.chunk_len == 0;
          ASSERT_TRUE(largest) << "a tile is cut for a reason only";
          begin = end;
        }
      }
    }
  }
}

// How often, and in which segment, the walk visits key j for row i.
void expect_walk_visits_what_the_table_says(ChunkGeometry geometry, int32_t q_begin, int32_t q_end,
                                            SegmentSelection selection, KeyRange window) {
  std::vector<int> visits(static_cast<size_t>(q_end) + 1, 0);
  int last = -1;
  for (SegmentIterator it(geometry, q_begin, q_end, selection, window); !it.done(); it.next()) {
    const KeyRange keys = it.keys();
    ASSERT_FALSE(keys.empty());
    ASSERT_GT(static_cast<int>(it.segment()), last) << "the order is intra, successive, inter";
    last = static_cast<int>(it.segment());
    for (int32_t j = keys.begin; j < keys.end; ++j) {
      ++visits[j];
      ASSERT_TRUE(window.begin <= j && j < window.end);
      // The segment is the table's for every row that sees the key; the diagonal's mask hides it from the others.
      for (int32_t i = std::max(j, q_begin); i < q_end; ++i) {
        ASSERT_EQ(it.segment(), reference::segment_of(i, j, geometry));
      }
      const bool hidden_from_some_row = q_begin < j;
      ASSERT_EQ(it.needs_mask(j + 1), hidden_from_some_row);
    }
  }
  for (int32_t j = 0; j < q_end; ++j) {
    const int32_t i = std::max(j, q_begin);
    const bool selected = selection == SegmentSelection::All ||
                          static_cast<int>(selection) == static_cast<int>(reference::segment_of(i, j, geometry));
    ASSERT_EQ(visits[j], selected && window.begin <= j && j < window.end ? 1 : 0) << "key " << j;
  }
}

TEST(SegmentIterator, VisitsEveryVisibleKeyOnceInItsSegment) {
  for_each_geometry(5, [](ChunkGeometry geometry) {
    for (int32_t q_begin = 0; q_begin < 18; ++q_begin) {
      for (const int32_t block_m : {1, 2, 5}) {
        const int32_t q_end = geometry.tile_end(q_begin, block_m, 20);
        for (const auto selection :
             {SegmentSelection::All, SegmentSelection::Intra, SegmentSelection::Successive, SegmentSelection::Inter}) {
          for (const KeyRange window : {KeyRange{0, kLargest}, {0, 7}, {3, 11}, {9, 9}, {15, 40}}) {
            expect_walk_visits_what_the_table_says(geometry, q_begin, q_end, selection, window);
          }
        }
      }
    }
  });
}

TEST(QueryTiles, AreTheTilesOneAfterTheOther) {
  for_each_geometry(7, [](ChunkGeometry geometry) {
    for (int32_t begin = 0; begin < 16; ++begin) {
      for (int32_t end = begin; end < 33; ++end) {
        for (const int32_t block_m : {1, 2, 3, 5, 8, 40}) {
          const QueryTiles tiles(geometry, begin, end, block_m);
          int32_t position = begin;
          for (int32_t i = 0; i < tiles.count(); ++i) {
            const QueryTile tile = tiles.tile(i);
            ASSERT_EQ(tile.positions.begin, position);
            ASSERT_EQ(tile.positions.end, geometry.tile_end(position, block_m, end));
            ASSERT_EQ(tile.chunk.begin, position / geometry.chunk_len * geometry.chunk_len);
            position = tile.positions.end;
          }
          ASSERT_EQ(position, end);
          ASSERT_LE(tiles.count(), QueryTiles<>::max_count(geometry, end - begin, block_m));
        }
      }
    }
  });
}

// --- The far end of 32 bits ---

TEST(ChunkGeometry, DoesNotOverflowNearTheLargestPosition) {
  for (const ChunkGeometry geometry : {ChunkGeometry{kLargest, kLargest},
                                       {1 << 30, kLargest},
                                       {1 << 30, 1 << 30},
                                       {1500000000, 2000000000},
                                       {7, 11},
                                       {1, 1}}) {
    for (const int32_t i : {kLargest - 1, kLargest - 2, 1 << 30, (1 << 30) - 1, 1500000000}) {
      for (const Segment segment : {Segment::Intra, Segment::Successive, Segment::Inter}) {
        EXPECT_EQ(geometry.query_position(i, segment), reference::query_position(i, segment, geometry));
      }
      for (const int32_t j : {0, i / 2, i - 1, i}) {
        EXPECT_EQ(geometry.segment_of(i, j), reference::segment_of(i, j, geometry));
        EXPECT_EQ(geometry.key_position(j), reference::key_position(j, geometry));
      }
      const int64_t chunk_end = (static_cast<int64_t>(i) / geometry.chunk_len + 1) * geometry.chunk_len;
      EXPECT_EQ(geometry.chunk_end(i), chunk_end);
      EXPECT_EQ(geometry.tile_end(i, 128, kLargest), std::min<int64_t>({i + int64_t{128}, chunk_end, kLargest}));
      int64_t keys = 0;
      for (SegmentIterator it(geometry, i, i + 1); !it.done(); it.next()) keys += it.keys().size();
      EXPECT_EQ(keys, static_cast<int64_t>(i) + 1);
      const QueryTiles tiles(geometry, i - 1, i + 1, 128);
      const QueryTile last = tiles.tile(tiles.count() - 1);
      EXPECT_EQ(last.positions.end, i + 1);
      EXPECT_EQ(last.chunk.begin, i - i % geometry.chunk_len);
    }
  }
}

static_assert(ChunkGeometry{6, 9}.query_position(7, Segment::Successive) == 7, "usable in constant expressions");
static_assert(!SegmentIterator({6, 9}, 7, 8).done(), "usable in constant expressions");

}  // namespace
}  // namespace dca
