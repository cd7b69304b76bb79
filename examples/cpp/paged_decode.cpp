// One attention layer of an inference engine, without torch: a prompt is read in pieces into a paged KV cache, further
// tokens follow one by one. Then the same tokens at once, over a contiguous cache: the results must agree.
//
// Here everything lies in host memory. On a GPU the same structs take device pointers, exec.device = dca::Device::Cuda
// and exec.stream; dtype is then BFloat16 or Float16.
#include <dca/dca.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

namespace {

constexpr int32_t kHeads = 8, kHeadsKv = 2, kHeadDim = 64;
constexpr int32_t kTokens = 1000, kPromptLen = 900, kPieceLen = 256;
constexpr int32_t kPageSize = 16, kNumPages = 80;

// Of a model trained at 256 positions (DCAConfig.from_pretraining_length(256) in Python): chunks of 160 tokens, no
// rotary position beyond 192.
constexpr dca::ChunkGeometry kChunk{160, 192};

using Floats = std::vector<float>;

void require(const dca::Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s\n", status.message().c_str());
  std::exit(1);
}

Floats random_rows(int32_t heads, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  Floats rows(static_cast<size_t>(kTokens) * heads * kHeadDim);
  for (float& x : rows) x = normal(generator);
  return rows;
}

// Elements from sequence to sequence (there is one), from row to row, from head to head.
dca::Strides rows_of(int32_t heads) { return {0, heads * kHeadDim, kHeadDim}; }

// cos and sin of the positions that DCA uses, which are few.
struct Rotary {
  Floats cos, sin;

  Rotary() {
    for (int32_t position = 0; position <= kChunk.max_position; ++position) {
      for (int32_t c = 0; c < kHeadDim / 2; ++c) {
        const float angle = position * std::pow(10000.0f, -2.0f * c / kHeadDim);
        cos.push_back(std::cos(angle));
        sin.push_back(std::sin(angle));
      }
    }
  }
  dca::RotaryTables tables() const { return {cos.data(), sin.data(), kChunk.max_position + 1, kHeadDim / 2, false}; }
};

// A KV cache of pages, which may come in any order.
struct PagedCache {
  Floats k = Floats(static_cast<size_t>(kNumPages) * kPageSize * kHeadsKv * kHeadDim);
  Floats v = k;
  std::vector<int32_t> page_table;

  PagedCache() {
    for (int32_t i = 0; i < kNumPages; ++i) page_table.push_back(i * 7 % kNumPages);
  }
  dca::PageTable pages() const { return {page_table.data(), kNumPages, kNumPages, kPageSize, kNumPages}; }
  static constexpr dca::Strides kStrides{kPageSize * kHeadsKv * kHeadDim, kHeadsKv* kHeadDim, kHeadDim};
};

// What q, k and v are before rotation: the outputs of a layer's projections.
struct Activations {
  Floats q = random_rows(kHeads, 1);
  Floats k = random_rows(kHeadsKv, 2);
  Floats v = random_rows(kHeadsKv, 3);
};

// Tokens [first, first + count): their keys and values go into the cache, their queries see all that is there then.
void advance(const Activations& x, const Rotary& rotary, PagedCache& cache, int32_t first, int32_t count, Floats& out) {
  dca::AppendParams append;
  append.chunk = kChunk;
  append.batch = 1;
  append.num_heads_kv = kHeadsKv;
  append.head_dim = kHeadDim;
  append.seqlen_k = count;
  append.cache_slots = kNumPages * kPageSize;
  append.k = {x.k.data() + first * kHeadsKv * kHeadDim, rows_of(kHeadsKv)};
  append.v = {x.v.data() + first * kHeadsKv * kHeadDim, rows_of(kHeadsKv)};
  append.k_cache = {cache.k.data(), PagedCache::kStrides};
  append.v_cache = {cache.v.data(), PagedCache::kStrides};
  append.cache_seqlen = first;
  append.pages = cache.pages();
  append.rotary = rotary.tables();
  require(dca::rotate_and_append_kv(append));

  dca::AttentionParams attend;
  attend.chunk = kChunk;
  attend.batch = 1;
  attend.num_heads = kHeads;
  attend.num_heads_kv = kHeadsKv;
  attend.head_dim = kHeadDim;
  attend.seqlen_q = count;
  attend.seqlen_k = kNumPages * kPageSize;
  attend.q = {x.q.data() + first * kHeads * kHeadDim, rows_of(kHeads)};
  attend.k = {cache.k.data(), PagedCache::kStrides};
  attend.v = {cache.v.data(), PagedCache::kStrides};
  attend.out = {out.data() + first * kHeads * kHeadDim, rows_of(kHeads)};
  attend.cache_seqlen = first + count;
  attend.pages = cache.pages();
  attend.rotary = rotary.tables();
  attend.softmax_scale = 1.0f / std::sqrt(static_cast<float>(kHeadDim));
  // On the CPU workspace may be null; on a GPU it is the caller's, so that nothing is allocated between launches.
  size_t bytes = 0;
  require(dca::attention_workspace_bytes(attend, &bytes));
  std::vector<unsigned char> workspace(bytes);
  attend.workspace = workspace.data();
  attend.workspace_bytes = bytes;
  require(dca::attention(attend));
}

// All tokens at once; k is rotated into a buffer of its own.
Floats at_once(const Activations& x, const Rotary& rotary) {
  Floats rotated(x.k.size());
  dca::RotateKeysParams rotate;
  rotate.chunk = kChunk;
  rotate.batch = 1;
  rotate.num_heads_kv = kHeadsKv;
  rotate.head_dim = kHeadDim;
  rotate.seqlen_k = kTokens;
  rotate.k = {x.k.data(), rows_of(kHeadsKv)};
  rotate.out = {rotated.data(), rows_of(kHeadsKv)};
  rotate.rotary = rotary.tables();
  require(dca::rotate_keys(rotate));

  Floats out(x.q.size());
  dca::AttentionParams attend;
  attend.chunk = kChunk;
  attend.batch = 1;
  attend.num_heads = kHeads;
  attend.num_heads_kv = kHeadsKv;
  attend.head_dim = kHeadDim;
  attend.seqlen_q = attend.seqlen_k = attend.cache_seqlen = kTokens;
  attend.q = {x.q.data(), rows_of(kHeads)};
  attend.k = {rotated.data(), rows_of(kHeadsKv)};
  attend.v = {x.v.data(), rows_of(kHeadsKv)};
  attend.out = {out.data(), rows_of(kHeads)};
  attend.rotary = rotary.tables();
  attend.softmax_scale = 1.0f / std::sqrt(static_cast<float>(kHeadDim));
  require(dca::attention(attend));
  std::string kernel;
  require(dca::describe_attention(attend, &kernel));
  std::printf("dca %s, %d tokens at once by %s\n", dca::build_info().version, kTokens, kernel.c_str());
  return out;
}

}  // namespace

int main() {
  const Activations x;
  const Rotary rotary;
  PagedCache cache;
  Floats out(x.q.size());
  for (int32_t first = 0; first < kPromptLen; first += kPieceLen) {
    advance(x, rotary, cache, first, std::min(kPieceLen, kPromptLen - first), out);
  }
  for (int32_t token = kPromptLen; token < kTokens; ++token) advance(x, rotary, cache, token, 1, out);

  const Floats expected = at_once(x, rotary);
  float difference = 0.0f;
  for (size_t i = 0; i < out.size(); ++i) difference = std::max(difference, std::abs(out[i] - expected[i]));
  const bool equal = difference < 1e-5f;
  std::printf("in pieces, paged: %s (largest difference %.1e)\n", equal ? "the same" : "NOT the same", difference);
  return equal ? 0 : 1;
}
