// What the CPU can do at best, measured next to the operators: fused multiply-adds from registers, reads and
// copies of memory, with all threads at once.
#pragma once

#include "machine.h"

namespace dca::bench {

/// FLOP/s of fp32 FMA chains in the widest vectors that the machine has.
double measure_fma_peak(int num_threads);

/// Whether the library's kernels are those of AMX. It has asked the system for the tile registers then.
bool kernels_use_amx();

/// FLOP/s of products of bfloat16 in AMX's tiles, where kernels_use_amx().
double measure_amx_peak(int num_threads);

/// One thread's part of that; returns its FLOP.
double multiply_tiles_of_one_thread();

/// Bytes/s of reading all of `buffers`, the threads sharing each.
double measure_read_bandwidth(const Buffers& buffers, int num_threads);

/// Bytes/s, read plus written, of copying `from` to `to`, which have the same sizes.
double measure_copy_bandwidth(const Buffers& from, const Buffers& to, int num_threads);

}  // namespace dca::bench
