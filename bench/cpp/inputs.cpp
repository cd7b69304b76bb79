#include "inputs.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

namespace dca::bench {
namespace {

std::vector<float> rotary_table(const Options& o, double (*function)(double)) {
  const int64_t half = o.head_dim / 2;
  std::vector<float> table;
  for (int64_t position = 0; position <= o.max_position; ++position) {
    for (int64_t c = 0; c < half; ++c) {
      const double frequency = std::pow(10000.0, -static_cast<double>(c) / static_cast<double>(half));
      table.push_back(static_cast<float>(function(static_cast<double>(position) * frequency)));
    }
  }
  table.push_back(0.0f);  // head_dim 1 has no pair, and the library wants a pointer
  return table;
}

int64_t pages_per_sequence(const Options& o) {
  return o.page_size == 0 ? 0 : (o.seqlen + o.page_size - 1) / o.page_size;
}

std::vector<int32_t> shuffled_pages(const Options& o) {
  std::vector<int32_t> pages(static_cast<size_t>(o.batch * pages_per_sequence(o)));
  std::iota(pages.begin(), pages.end(), 0);
  std::shuffle(pages.begin(), pages.end(), std::mt19937(7));
  return pages;
}

}  // namespace

Rotary::Rotary(const Machine& machine, const Options& o)
    : num_positions(o.max_position + 1),
      half_dim(static_cast<int32_t>(o.head_dim / 2)),
      cos(machine, rotary_table(o, std::cos)),
      sin(machine, rotary_table(o, std::sin)) {}

CacheLayout::CacheLayout(const Machine& machine, const Options& o)
    : max_pages(pages_per_sequence(o)),
      page_size(o.page_size),
      total_slots(o.page_size == 0 ? o.seqlen : max_pages * o.page_size),
      page_table(machine, shuffled_pages(o)) {}

Tensor CacheLayout::cache(const Machine& machine, const Options& o) const {
  const DType dtype = dtype_of_cache(o);
  if (page_size == 0) return {machine, dtype, o.batch, o.seqlen, o.kv_heads, o.head_dim};
  return {machine, dtype, o.batch * max_pages, page_size, o.kv_heads, o.head_dim};
}

Tensor CacheLayout::random_cache(const Machine& machine, const Options& o, uint64_t seed) const {
  Tensor tensor = cache(machine, o);
  machine.fill_random(tensor.memory.get(), tensor.dtype, tensor.count, seed);
  return tensor;
}

Tensor CacheLayout::scales(const Machine& machine, const Options& o) const {
  const int64_t heads = o.cache_dtype == DType::Int8 ? o.kv_heads : 0;
  Tensor tensor = page_size == 0 ? Tensor(machine, DType::Float32, o.batch, o.seqlen, heads, 1)
                                 : Tensor(machine, DType::Float32, o.batch * max_pages, page_size, heads, 1);
  const std::vector<float> values(static_cast<size_t>(tensor.count), 1.0f / 127.0f);
  machine.copy_from_host(tensor.memory.get(), values.data(), tensor.bytes());
  return tensor;
}

PageTable CacheLayout::pages_at(const int32_t* table) const {
  if (page_size == 0) return {};
  PageTable pages;
  pages.page_table = table;
  pages.stride_batch = max_pages;
  pages.max_pages = static_cast<int32_t>(max_pages);
  pages.page_size = static_cast<int32_t>(page_size);
  pages.num_pages = static_cast<int64_t>(page_table.host.size());
  return pages;
}

}  // namespace dca::bench
