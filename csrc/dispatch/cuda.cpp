// CUDA calls: from shapes and the device to a compiled instance and a plan. Nothing here depends on values in device
// memory, so that a captured CUDA graph serves every length.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>

#include "backends.h"
#include "heuristics.h"
#include "kernels.h"

namespace dca::cuda {
namespace {

int64_t total_rows(const AttentionParams& p) {
  return p.cu_seqlens_q != nullptr ? p.total_q : static_cast<int64_t>(p.batch) * p.seqlen_q;
}

// What TMA can reach: strides that are not 0 and less than 2^40 bytes, and rows that 32 bits can count.
bool fits_tma(const Strides& stride, int64_t rows, int32_t heads, int64_t batch) {
  constexpr int64_t kLimit = (int64_t{1} << 40) / 2;
  const auto fits = [](int64_t step, int64_t count) { return count <= 1 || (step > 0 && step < kLimit); };
  return rows > 0 && rows <= INT32_MAX && batch <= INT32_MAX && fits(stride.row, rows) && fits(stride.head, heads) &&
         fits(stride.batch, batch);
}

bool fits_tma(const AttentionParams& p, const ConstTensorRef& cache) {
  if (p.pages.page_table != nullptr) {
    return p.pages.num_pages > 0 && fits_tma(cache.stride, p.pages.page_size, p.num_heads_kv, p.pages.num_pages);
  }
  if (p.cu_seqlens_k != nullptr) return fits_tma(cache.stride, p.total_k, p.num_heads_kv, 1);
  return fits_tma(cache.stride, p.seqlen_k, p.num_heads_kv, p.batch);
}

bool can_run(const AttentionInstance& instance, const AttentionParams& p, const DeviceProperties& device) {
  if (std::string_view(instance.architecture) == "sm80") return device.major >= 8;
  return device.major == 9 && device.minor == 0 && fits_tma(p, p.k) && fits_tma(p, p.v);
}

// DCA_CUDA_KERNELS names the kernels that calls get, to compare them: sm80, sm90, or sm90:VARIANT.
bool is_wanted(const AttentionInstance& instance) {
  const char* const only = std::getenv("DCA_CUDA_KERNELS");
  if (only == nullptr || *only == '\0') return !instance.on_request;
  std::string name = instance.architecture;
  if (*instance.variant != '\0') name.append(":").append(instance.variant);
  return name == only;
}

// The tiles of a call by one instance's rows.
struct Tiles {
  CudaTileShape shape;
  int32_t num_head_tiles;   // of a KV head
  int64_t num_query_tiles;  // of a sequence, at most
  int64_t num_kv_heads;     // of all sequences

  Tiles(const AttentionParams& p, const AttentionInstance& instance) {
    const int32_t group = p.num_heads / p.num_heads_kv;
    shape = cuda_tile_shape(group, p.seqlen_q, instance.block_m, p.chunk.chunk_len);
    num_head_tiles = (group + shape.heads - 1) / shape.heads;
    num_query_tiles = QueryTiles<>::max_count(p.chunk, p.seqlen_q, shape.positions);
    num_kv_heads = int64_t{p.batch} * p.num_heads_kv;
  }

  int64_t of_kv_head() const { return num_query_tiles * num_head_tiles; }
  int64_t count() const { return of_kv_head() * num_kv_heads; }
};

// CTAs of an instance that a device holds at a time.
int32_t num_slots(const DeviceProperties& device, const AttentionInstance& instance) {
  return device.multiprocessors * instance.ctas_per_sm;
}

// Of two instances that differ in the rows of their tiles alone, whether the first is the better one.
bool has_better_tiles(const AttentionInstance& first, const AttentionInstance& second, const AttentionParams& p,
                      const DeviceProperties& device) {
  const bool larger = first.block_m > second.block_m;
  const AttentionInstance& large = larger ? first : second;
  return larger == cuda_prefers_large_tiles(Tiles(p, large).count(), num_slots(device, large));
}

// The instance with the smallest head_dim that holds the call's, of the newest architecture; nullptr: none.
const AttentionInstance* find_instance(const AttentionParams& p, TileKind kind, const DeviceProperties& device) {
  const AttentionInstance* best = nullptr;
  for (int32_t i = 0; i < kNumAttentionInstances; ++i) {
    const AttentionInstance& instance = kAttentionInstances[i];
    const bool fits = instance.kind == kind && instance.dtype == p.dtype &&
                      dtype_of_cache(instance) == dtype_of_cache(p) && instance.head_dim >= p.head_dim &&
                      is_wanted(instance) && can_run(instance, p, device);
    if (!fits) continue;
    const int newer = best == nullptr ? 0 : std::string_view(instance.architecture).compare(best->architecture);
    const bool better = best == nullptr || instance.head_dim < best->head_dim ||
                        (instance.head_dim == best->head_dim &&
                         (newer > 0 || (newer == 0 && has_better_tiles(instance, *best, p, device))));
    if (better) best = &instance;
  }
  return best;
}

std::string name_of(const AttentionInstance& instance) {
  const std::string variant = *instance.variant == '\0' ? "" : ":" + std::string(instance.variant);
  return instance.architecture + variant + (instance.kind == TileKind::Prefill ? "/prefill" : "/decode") +
         (instance.dtype == DType::BFloat16 ? "/bf16/" : "/fp16/") + std::to_string(instance.head_dim) +
         (instance.cache_dtype == DType::Float8E4M3 ? "/e4m3" : "");
}

Status no_instance(const AttentionParams& p) {
  std::string built;
  for (int32_t i = 0; i < kNumAttentionInstances; ++i) built += (i > 0 ? ", " : "") + name_of(kAttentionInstances[i]);
  return {StatusCode::Unavailable, "this build of dca has no CUDA kernel for head_dim " + std::to_string(p.head_dim) +
                                       (p.dtype == DType::BFloat16 ? " in bfloat16" : " in float16") +
                                       (dtype_of_cache(p) == p.dtype ? "" : " over a cache of float8_e4m3fn") +
                                       " and this layout of K and V; it has " + built};
}

struct Choice {
  const AttentionInstance* instance = nullptr;
  AttentionPlan plan;
};

// Ten times the oldest compute capability that this build has code for.
int32_t oldest_architecture() {
  const std::string_view names = compiled_architectures();  // "sm_80,sm_90a"
  int32_t oldest = INT32_MAX;
  for (size_t at = names.find("sm_"); at != std::string_view::npos; at = names.find("sm_", at + 1)) {
    oldest = std::min(oldest, static_cast<int32_t>(std::atoi(names.data() + at + 3)));
  }
  return oldest;
}

std::string as_capability(int32_t number) { return std::to_string(number / 10) + "." + std::to_string(number % 10); }

// The current device, if it can run the kernels of this build.
Status usable_device(DeviceProperties* device) {
  if (Status status = current_device(device); !status.ok()) return status;
  const int32_t capability = 10 * device->major + device->minor;
  static const int32_t needed = oldest_architecture();
  if (capability >= needed) return {};
  return {StatusCode::Unavailable, "the CUDA kernels of this build (" + std::string(compiled_architectures()) +
                                       ") need a GPU of compute capability " + as_capability(needed) +
                                       " or newer; this one has " + as_capability(capability)};
}

Status choose(const AttentionParams& p, Choice* choice) {
  DeviceProperties device;
  if (Status status = usable_device(&device); !status.ok()) return status;
  const int32_t group = p.num_heads / p.num_heads_kv;
  const bool few_rows = cuda_prefers_decode_tiles(group, p.seqlen_q);
  const TileKind wanted = few_rows ? TileKind::Decode : TileKind::Prefill;
  const TileKind other = few_rows ? TileKind::Prefill : TileKind::Decode;
  choice->instance = find_instance(p, wanted, device);
  if (choice->instance == nullptr) choice->instance = find_instance(p, other, device);  // any tile computes any shape
  if (choice->instance == nullptr) return no_instance(p);

  const Tiles tiles(p, *choice->instance);
  const int32_t slots = num_slots(device, *choice->instance);
  const bool equal_tiles = choice->instance->kind == TileKind::Decode;
  AttentionPlan& plan = choice->plan;
  plan.heads_per_tile = tiles.shape.heads;
  plan.positions_per_tile = tiles.shape.positions;
  plan.num_head_tiles = tiles.num_head_tiles;
  plan.num_splits = p.num_splits > 0 ? p.num_splits : cuda_num_splits(tiles.count(), slots, p.seqlen_k, equal_tiles);
  const int64_t ctas = tiles.count() * plan.num_splits;
  if (ctas > INT32_MAX) {
    return {StatusCode::InvalidArgument,
            "attention: the batch is too large for one launch; got " + std::to_string(ctas) + " tiles"};
  }
  plan.num_query_tiles = static_cast<int32_t>(tiles.num_query_tiles);
  // Decode reads every key once, side by side what lies side by side.
  const int64_t at_once =
      equal_tiles ? tiles.num_kv_heads : cuda_kv_heads_at_once(tiles.num_kv_heads, tiles.of_kv_head(), slots);
  plan.kv_heads_at_once = static_cast<int32_t>(at_once);
  plan.num_groups = static_cast<int32_t>(tiles.num_kv_heads / at_once);
  const bool equal_lengths = p.cu_seqlens_q == nullptr && p.cu_seqlens_k == nullptr && p.cache_seqlens == nullptr &&
                             p.cache_leftpad == nullptr;
  plan.num_ctas = cuda_num_ctas(ctas, slots, choice->instance->persistent, equal_lengths);
  const bool ragged = p.cu_seqlens_q != nullptr;
  plan.out_fits_tma = fits_tma(p.out.stride, ragged ? p.total_q : p.seqlen_q, p.num_heads, ragged ? 1 : p.batch);
  return {};
}

size_t workspace_bytes(const AttentionParams& p, const AttentionPlan& plan) {
  if (plan.num_splits <= 1) return 0;
  const int64_t rows = plan.num_splits * total_rows(p) * p.num_heads;
  return static_cast<size_t>(rows * (static_cast<int64_t>(p.head_dim) + 1)) * sizeof(float);
}

Status choose_with_workspace(const AttentionParams& p, Choice* choice) {
  if (Status status = choose(p, choice); !status.ok()) return status;
  AttentionPlan& plan = choice->plan;
  if (const size_t bytes = workspace_bytes(p, plan); bytes > 0) {
    if (p.workspace == nullptr || p.workspace_bytes < bytes) {
      return {StatusCode::InvalidArgument, "workspace must have the " + std::to_string(bytes) +
                                               " bytes that attention_workspace_bytes() says, for split keys; got " +
                                               std::to_string(p.workspace == nullptr ? 0 : p.workspace_bytes)};
    }
    if (reinterpret_cast<uintptr_t>(p.workspace) % 16 != 0) {
      return {StatusCode::InvalidArgument, "workspace must be aligned to 16 bytes"};
    }
    plan.out_accum = static_cast<float*>(p.workspace);
    plan.lse_accum = plan.out_accum + plan.num_splits * total_rows(p) * p.num_heads * static_cast<int64_t>(p.head_dim);
  }
  return {};
}

}  // namespace

bool available() { return true; }

Status unavailable() { return {}; }

const char* architectures() { return compiled_architectures(); }

Status attention(const AttentionParams& p) {
  Choice choice;
  if (Status status = choose_with_workspace(p, &choice); !status.ok()) return status;
  if (Status status = choice.instance->launch(p, choice.plan); !status.ok()) return status;
  return choice.plan.num_splits > 1 ? launch_combine(p, choice.plan) : Status();
}

Status check_attention(const AttentionParams& p) {
  Choice choice;
  return choose_with_workspace(p, &choice);
}

Status attention_workspace_bytes(const AttentionParams& p, size_t* bytes) {
  Choice choice;
  Status status = choose(p, &choice);
  *bytes = status.ok() ? workspace_bytes(p, choice.plan) : 0;
  return status;
}

Status describe_attention(const AttentionParams& p, std::string* kernel) {
  Choice choice;
  if (Status status = choose(p, &choice); !status.ok()) return status;
  *kernel = "cuda/" + name_of(*choice.instance);
  if (choice.plan.num_splits > 1) *kernel += "/splits=" + std::to_string(choice.plan.num_splits);
  return {};
}

Status rotate_keys(const RotateKeysParams& p) {
  DeviceProperties device;
  if (Status status = usable_device(&device); !status.ok()) return status;
  return launch_rotate_keys(p);
}

Status rotate_and_append_kv(const AppendParams& p) {
  DeviceProperties device;
  if (Status status = usable_device(&device); !status.ok()) return status;
  return launch_rotate_and_append_kv(p);
}

Status merge_attention_states(const MergeParams& p) {
  DeviceProperties device;
  if (Status status = usable_device(&device); !status.ok()) return status;
  if (p.num_parts > kMaxMergeParts) {
    return {StatusCode::InvalidArgument, "outs and lses must have at most " + std::to_string(kMaxMergeParts) +
                                             " parts on CUDA; got " + std::to_string(p.num_parts)};
  }
  return launch_merge(p);
}

}  // namespace dca::cuda
