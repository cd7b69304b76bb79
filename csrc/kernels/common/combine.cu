// Joins the partial results of split keys: out = sum_s exp(lse_s - lse) out_s, lse = ln sum_s exp(lse_s).
//
// On Hopper it starts while the attention kernel ends, and waits for it. One CTA per (row, head), whose warps share the
// splits out: what it takes is the latency of its reads, so as many of them as can be are on their way at a time.
#include "dependent_launch.h"
#include "launch_check.h"
#include "numeric.h"
#include "tile_scheduler.h"

namespace dca::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kAhead = 8;    // parts that a warp asks for before it uses the first
constexpr int kColumns = 4;  // of a lane

struct CombineArgs {
  AttentionParams p;
  AttentionPlan plan;
  int64_t total_rows;
};

__device__ float warp_max(float x) {
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, step));
  return x;
}

__device__ float warp_sum(float x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffff, x, step);
  return x;
}

/// Weights of the parts, exp(lse_s - largest), into `weight`; every warp finds their sum. Returns ln of the sum of all
/// exp(lse_s), -inf if no part has seen a key.
__device__ float find_weights(const float* lse, int64_t stride, int32_t num_splits, float* weight, float* sum) {
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % 32;
  float mine[kMaxNumSplits / 32];
  float largest = -INFINITY;
  CUTE_UNROLL
  for (int i = 0; i < kMaxNumSplits / 32; ++i) {
    const int32_t split = i * 32 + lane;
    mine[i] = split < num_splits ? lse[split * stride] : -INFINITY;
    largest = fmaxf(largest, mine[i]);
  }
  largest = warp_max(largest);
  const float offset = largest == -INFINITY ? 0.0f : largest;
  *sum = 0.0f;
  CUTE_UNROLL
  for (int i = 0; i < kMaxNumSplits / 32; ++i) {
    mine[i] = exp2_approx((mine[i] - offset) * kLog2E);
    *sum += mine[i];
    if (threadIdx.x < 32) weight[i * 32 + lane] = mine[i];
  }
  *sum = warp_sum(*sum);
  return *sum == 0.0f ? -INFINITY : largest + logf(*sum);
}

/// A lane's columns of the parts first, first + kWarps, ... of its warp: asked for before their weights are known.
struct Parts {
  int32_t first;
  float4 x[kAhead];

  __device__ static Parts load(const float* parts, int64_t stride, int32_t num_splits, int32_t first) {
    Parts loaded;
    loaded.first = first;
    CUTE_UNROLL
    for (int i = 0; i < kAhead; ++i) {
      const int32_t split = first + i * kWarps;
      loaded.x[i] = split < num_splits ? *reinterpret_cast<const float4*>(parts + split * stride) : float4{};
    }
    return loaded;
  }

  /// sum += weight times each. A part without weight may never have been written, and can be anything.
  __device__ void add_to(float4* sum, const float* weight, int32_t num_splits) const {
    CUTE_UNROLL
    for (int i = 0; i < kAhead; ++i) {
      const int32_t split = first + i * kWarps;
      const float w = split < num_splits ? weight[split] : 0.0f;
      if (w == 0.0f) continue;
      sum->x += w * x[i].x, sum->y += w * x[i].y, sum->z += w * x[i].z, sum->w += w * x[i].w;
    }
  }
};

template <class Element>
__global__ void __launch_bounds__(32 * kWarps) combine_kernel(const __grid_constant__ CombineArgs args) {
  __shared__ float weight[kMaxNumSplits];
  __shared__ float4 shares[kWarps][32];
  const AttentionParams& p = args.p;
  const int32_t warp = static_cast<int32_t>(threadIdx.x) / 32;
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % 32;
  const int64_t index = blockIdx.x;  // row * num_heads + head
  const int64_t stride = args.total_rows * p.num_heads;
  const int64_t row = index / p.num_heads;
  const int32_t head = static_cast<int32_t>(index % p.num_heads);
  const bool ragged = p.cu_seqlens_q != nullptr;
  const int64_t b = ragged ? 0 : row / p.seqlen_q;
  const int64_t in_batch = ragged ? row : row % p.seqlen_q;
  Element* const out = static_cast<Element*>(p.out.data) + b * p.out.stride.batch + in_batch * p.out.stride.row +
                       head * p.out.stride.head;

  const int32_t num_splits = args.plan.num_splits;
  // Of the columns from `column` on; behind the last one of them, the first ones, which nobody uses.
  const auto load = [&](int32_t column, int32_t first) {
    const int32_t within = column < p.head_dim ? column : 0;
    return Parts::load(args.plan.out_accum + index * p.head_dim + within, stride * p.head_dim, num_splits, first);
  };

  wait_for_previous_kernel();
  Parts parts = load(lane * kColumns, warp);
  float sum;
  const float lse = find_weights(args.plan.lse_accum + index, stride, num_splits, weight, &sum);
  __syncthreads();
  const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
  for (int32_t first = 0; first < p.head_dim; first += 32 * kColumns) {
    const int32_t column = first + lane * kColumns;
    if (first > 0) parts = load(column, warp);
    float4 x{};
    parts.add_to(&x, weight, num_splits);
    for (int32_t split = warp + kWarps * kAhead; split < num_splits; split += kWarps * kAhead) {
      load(column, split).add_to(&x, weight, num_splits);
    }
    shares[warp][lane] = x;
    __syncthreads();
    if (warp == 0 && column < p.head_dim) {
      CUTE_UNROLL
      for (int w = 1; w < kWarps; ++w) {
        const float4& other = shares[w][lane];
        x.x += other.x, x.y += other.y, x.z += other.z, x.w += other.w;
      }
      const uint2 rounded = {round_pair<Element>(x.x * inverse, x.y * inverse),
                             round_pair<Element>(x.z * inverse, x.w * inverse)};
      *reinterpret_cast<uint2*>(out + column) = rounded;
    }
    __syncthreads();
  }
  if (threadIdx.x == 0 && p.lse != nullptr) {
    const int64_t line = ragged ? head : b * p.num_heads + head;
    p.lse[line * (ragged ? p.total_q : p.seqlen_q) + in_batch] = lse;
  }
}

}  // namespace

Status launch_combine(const AttentionParams& params, const AttentionPlan& plan) {
  const CombineArgs args{params, plan, AttentionArgs(params, plan).total_rows};
  const int64_t ctas = args.total_rows * params.num_heads;
  const auto kernel =
      params.dtype == DType::BFloat16 ? combine_kernel<cutlass::bfloat16_t> : combine_kernel<cutlass::half_t>;
  static std::atomic<uint64_t> known{0};
  return launch_kernel("attention", kernel, ctas, 32 * kWarps, 0, params.exec.stream, args,
                       waits_by_itself(kernel, known));
}

}  // namespace dca::cuda
