// What the operations are given besides tensors of random numbers: rotary tables and page tables.
#pragma once

#include "dca/params.h"
#include "options.h"
#include "tensor.h"

namespace dca::bench {

/// cos and sin of the positions 0 to max_position at base 10000, whole heads rotating.
struct Rotary {
  int64_t num_positions;
  int32_t half_dim;
  Mirrored<float> cos;
  Mirrored<float> sin;

  Rotary(const Machine& machine, const Options& options);
  RotaryTables tables() const { return {cos.data(), sin.data(), num_positions, half_dim, false}; }
  RotaryTables host_tables() const { return {cos.host.data(), sin.host.data(), num_positions, half_dim, false}; }
};

/// Slots of the caches, in pages of --page-size in random order or contiguous without it.
struct CacheLayout {
  int64_t max_pages;    ///< per sequence; 0: contiguous
  int64_t page_size;    //
  int64_t total_slots;  ///< of a sequence
  Mirrored<int32_t> page_table;

  CacheLayout(const Machine& machine, const Options& options);
  Tensor cache(const Machine& machine, const Options& options) const;
  Tensor random_cache(const Machine& machine, const Options& options, uint64_t seed) const;
  /// The scales of an Int8 cache, its layout with a head_dim of 1, 1 / 127 each; none for other caches.
  Tensor scales(const Machine& machine, const Options& options) const;
  PageTable pages() const { return pages_at(page_table.data()); }
  PageTable host_pages() const { return pages_at(page_table.host.data()); }

 private:
  PageTable pages_at(const int32_t* table) const;
};

}  // namespace dca::bench
