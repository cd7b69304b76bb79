// What the CUDA kernels (csrc/kernels) provide to the dispatch: launches of compiled instances, in plain C++.
#pragma once

#include <cstdint>

#include "dca/dca.h"

namespace dca::cuda {

/// The current device.
struct DeviceProperties {
  int32_t major = 0;  ///< compute capability
  int32_t minor = 0;
  int32_t multiprocessors = 0;
};
Status current_device(DeviceProperties* properties);

/// How an attention call is cut into CTAs. A tile is a range of query positions of one chunk times a range of query
/// heads of one KV head; row r of a tile is position r / heads_per_tile and head r % heads_per_tile of it.
struct AttentionPlan {
  int32_t heads_per_tile = 1;
  int32_t positions_per_tile = 1;
  int32_t num_head_tiles = 1;    ///< per KV head
  int32_t num_query_tiles = 1;   ///< per sequence: the most that its rows can have
  int32_t kv_heads_at_once = 1;  ///< whose tiles come before those of the next group of as many
  int32_t num_groups = 1;        ///< times kv_heads_at_once: the KV heads of all sequences
  int32_t num_splits = 1;
  int64_t num_ctas = 1;        ///< of the launch: a CTA for each tile, or fewer, which take tile after tile
  bool out_fits_tma = false;   ///< the strides of out are such that TMA can store to it
  float* out_accum = nullptr;  ///< (num_splits, total rows, num_heads, head_dim) (device); null if num_splits == 1
  float* lse_accum = nullptr;  ///< (num_splits, total rows, num_heads) (device)
};

/// Prefill tiles have many rows and share each key block between warps; decode tiles have 16 and share keys out.
enum class TileKind : int32_t { Prefill = 0, Decode = 1 };

/// One compiled attention kernel.
struct AttentionInstance {
  const char* architecture;  ///< "sm80": any device from 8.0 on; "sm90": 9.0 alone, K and V that TMA can read
  const char* variant;       ///< of those with other tiles or another schedule; "": none
  bool on_request;           ///< there to be timed: only DCA_CUDA_KERNELS chooses it
  TileKind kind;
  DType dtype;
  int32_t head_dim;     ///< smaller ones are padded in shared memory
  int32_t block_m;      ///< rows of a tile
  int32_t ctas_per_sm;  ///< by its shared memory and registers, with 164 KB per SM, on Hopper 228
  bool persistent;      ///< its CTAs take tile after tile
  Status (*launch)(const AttentionParams& params, const AttentionPlan& plan);
  DType cache_dtype = DType::Same;  ///< of K and V
};

/// All that this build has (generated from cmake/KernelInstances.cmake).
extern const AttentionInstance kAttentionInstances[];
extern const int32_t kNumAttentionInstances;
const char* compiled_architectures();  ///< "sm_80,sm_90"

/// Joins out_accum and lse_accum into out and lse.
Status launch_combine(const AttentionParams& params, const AttentionPlan& plan);

Status launch_rotate_keys(const RotateKeysParams& params);
Status launch_rotate_and_append_kv(const AppendParams& params);

inline constexpr int32_t kMaxMergeParts = 64;
Status launch_merge(const MergeParams& params);

/// Copies `bytes` from the device to the host and waits for it: for DCA_CHECK=1 only.
Status copy_to_host(void* host, const void* device, size_t bytes, void* stream);

}  // namespace dca::cuda
