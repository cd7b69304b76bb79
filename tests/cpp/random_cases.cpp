#include "random_cases.h"

#include <algorithm>
#include <cstdlib>
#include <sstream>

namespace dca::testing {
namespace {

int from_environment(const char* name, int otherwise) {
  const char* const text = std::getenv(name);
  return text != nullptr && *text != '\0' ? std::atoi(text) : otherwise;
}

class Draw {
 public:
  explicit Draw(uint32_t seed) : random_(seed) {}

  /// Both included.
  int between(int first, int last) { return std::uniform_int_distribution<int>(first, last)(random_); }
  bool once_in(int times) { return between(1, times) == 1; }
  template <class T>
  T one_of(const std::vector<T>& all) {
    return all[static_cast<size_t>(between(0, static_cast<int>(all.size()) - 1))];
  }

 private:
  std::mt19937 random_;
};

ChunkGeometry draw_chunk(Draw& draw) {
  const int chunk_len =
      draw.once_in(2) ? draw.between(1, 200) : draw.one_of<int>({1, 16, 31, 32, 63, 64, 65, 127, 128, 129, 192});
  const int most = 2 * chunk_len - 1;
  return {chunk_len, draw.once_in(4) ? chunk_len : draw.once_in(3) ? most : draw.between(chunk_len, most)};
}

/// Lengths of `batch` sequences, and of their queries: few, so that decode takes them, or many.
void draw_lengths(Draw& draw, int batch, bool few_queries, ProblemShape& s) {
  const int reach = few_queries ? 900 : 400;
  const int queries = few_queries ? draw.between(1, 3) : draw.between(10, 200);
  s.ragged_q = draw.once_in(2);
  s.kv_lens.clear();
  for (int b = 0; b < batch; ++b) {
    const int border = s.chunk.chunk_len * draw.between(1, 3) + draw.between(-1, 1);
    const int keys = draw.once_in(8) ? 0 : draw.once_in(3) ? std::min(border, reach) : draw.between(1, reach);
    s.kv_lens.push_back(keys);
    s.q_lens.push_back(!s.ragged_q ? queries : draw.once_in(4) ? keys : draw.between(0, std::min(queries, keys + 3)));
  }
  if (draw.once_in(3)) {
    for (int b = 0; b < batch; ++b) s.leftpads.push_back(draw.once_in(3) ? 0 : draw.between(0, 150));
  }
}

void draw_cache(Draw& draw, const RandomLimits& limits, ProblemShape& s) {
  if (!draw.once_in(3)) return;
  if (limits.int8_caches && draw.once_in(2)) {
    s.cache_dtype = DType::Int8;
    s.scales = Scales::PerRow;
  } else {
    s.cache_dtype = DType::Float8E4M3;
    s.scales = draw.one_of<Scales>({Scales::None, Scales::Number, Scales::PerTensor, Scales::PerHead});
  }
}

std::string to_string(const RandomCase& c, uint32_t seed) {
  std::ostringstream text;
  text << "DCA_RANDOM_SEED=" << seed << ": " << to_string(c.shape) << ", segments " << static_cast<int>(c.segments)
       << ", softmax scale times " << c.scale_factor << ", original_max_position_embeddings "
       << c.original_max_position_embeddings << ", splits " << c.num_splits;
  return text.str();
}

}  // namespace

::testing::AssertionResult RandomCase::matches_reference() const {
  AttentionProblem problem(shape);
  AttentionParams p = problem.params();
  p.segments = segments;
  p.softmax_scale *= scale_factor;
  p.original_max_position_embeddings = original_max_position_embeddings;
  return problem.matches_reference(p, {num_splits});
}

RandomCase draw_random_case(ProblemShape s, const RandomLimits& limits, uint32_t seed) {
  Draw draw(seed);
  RandomCase c;
  s.seed = seed;
  draw_cache(draw, limits, s);
  if (draw.once_in(3)) s.head_dim -= draw.one_of(limits.head_dims_less);
  s.chunk = draw_chunk(draw);
  s.keys = draw.one_of<KeyLayout>({KeyLayout::Slots, KeyLayout::Ragged, KeyLayout::Paged});
  s.page_size = draw.one_of(limits.page_sizes);
  const bool few_queries = draw.once_in(3);
  draw_lengths(draw, draw.between(1, 3), few_queries, s);
  // Now and then so many heads that the CTAs of a persistent kernel take several tiles each.
  const int group = few_queries ? draw.between(1, 16) : draw.once_in(8) ? 140 : draw.between(1, 12);
  s.num_heads_kv = group > 12 ? 1 : draw.between(1, 3);
  s.num_heads = group * s.num_heads_kv;
  if (draw.once_in(4)) s.half_rotary_dim = draw.between(0, s.head_dim / 2);
  s.interleaved = draw.once_in(5);
  c.shape = s;
  if (draw.once_in(3)) {
    c.segments =
        draw.one_of<SegmentSelection>({SegmentSelection::Intra, SegmentSelection::Successive, SegmentSelection::Inter});
  }
  c.scale_factor = draw.one_of(limits.scale_factors);
  if (draw.once_in(5)) c.original_max_position_embeddings = draw.between(5, 100);
  c.num_splits = draw.one_of<int32_t>({1, 1, 1, 0, 2, 3, 7, 60});
  return c;
}

void expect_random_cases_match(const ProblemShape& shape, const RandomLimits& limits, int count,
                               const std::function<bool(const RandomCase&)>& runs) {
  const auto first = static_cast<uint32_t>(from_environment("DCA_RANDOM_SEED", 1));
  const auto end = first + static_cast<uint32_t>(from_environment("DCA_RANDOM_CASES", count));
  for (uint32_t seed = first; seed < end; ++seed) {
    const RandomCase c = draw_random_case(shape, limits, seed);
    if (!runs(c)) continue;
    SCOPED_TRACE(to_string(c, seed));
    EXPECT_TRUE(c.matches_reference());
  }
}

}  // namespace dca::testing
