// Joins the partial results of split keys: out = sum_s exp(lse_s - lse) out_s, lse = ln sum_s exp(lse_s).
//
// On Hopper it starts while the attention kernel ends, and waits for it. One warp per (row, head). Lanes first share
// the splits out for the weights, then the columns.
#include "dependent_launch.h"
#include "launch_check.h"
#include "numeric.h"
#include "tile_scheduler.h"

namespace dca::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kMaxSplits = 256;
constexpr int kSplitsPerLane = kMaxSplits / 32;

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

template <class Element>
__global__ void __launch_bounds__(32 * kWarps) combine_kernel(const __grid_constant__ CombineArgs args) {
  const AttentionParams& p = args.p;
  const int32_t lane = static_cast<int32_t>(threadIdx.x) % 32;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;  // row * num_heads + head
  const int64_t stride = args.total_rows * p.num_heads;
  if (index >= stride) return;
  wait_for_previous_kernel();
  const int64_t row = index / p.num_heads;
  const int32_t head = static_cast<int32_t>(index % p.num_heads);

  float weight[kSplitsPerLane];
  float largest = -INFINITY;
  CUTE_UNROLL
  for (int i = 0; i < kSplitsPerLane; ++i) {
    const int32_t split = i * 32 + lane;
    weight[i] = split < args.plan.num_splits ? args.plan.lse_accum[split * stride + index] : -INFINITY;
    largest = fmaxf(largest, weight[i]);
  }
  largest = warp_max(largest);
  const float offset = largest == -INFINITY ? 0.0f : largest;
  float sum = 0.0f;
  CUTE_UNROLL
  for (int i = 0; i < kSplitsPerLane; ++i) {
    weight[i] = exp2_approx((weight[i] - offset) * kLog2E);
    sum += weight[i];
  }
  sum = warp_sum(sum);
  const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;

  const bool ragged = p.cu_seqlens_q != nullptr;
  const int64_t b = ragged ? 0 : row / p.seqlen_q;
  const int64_t in_batch = ragged ? row : row % p.seqlen_q;
  Element* const out = static_cast<Element*>(p.out.data) + b * p.out.stride.batch + in_batch * p.out.stride.row +
                       head * p.out.stride.head;
  for (int32_t first = 0; first < p.head_dim; first += 32 * kVec<Element>) {  // one pass up to head_dim 256
    const int32_t column = first + lane * kVec<Element>;
    float joined[kVec<Element>] = {};
    CUTE_UNROLL
    for (int i = 0; i < kSplitsPerLane; ++i) {
      for (int32_t source = 0; source < 32 && i * 32 + source < args.plan.num_splits; ++source) {
        const float w = __shfl_sync(0xffffffff, weight[i], source);
        if (w == 0.0f || column >= p.head_dim) continue;  // a part without weight may never have been written
        const float* const part = args.plan.out_accum + ((i * 32 + source) * stride + index) * p.head_dim + column;
        CUTE_UNROLL
        for (int c = 0; c < kVec<Element>; c += 4) {
          const float4 x = *reinterpret_cast<const float4*>(part + c);
          joined[c] += w * x.x, joined[c + 1] += w * x.y, joined[c + 2] += w * x.z, joined[c + 3] += w * x.w;
        }
      }
    }
    if (column >= p.head_dim) continue;
    Vec16<Element> rounded;
    CUTE_UNROLL
    for (int c = 0; c < kVec<Element>; ++c) rounded[c] = static_cast<Element>(joined[c] * inverse);
    store16(out + column, rounded);
  }
  if (lane == 0 && p.lse != nullptr) {
    const int64_t line = ragged ? head : b * p.num_heads + head;
    p.lse[line * (ragged ? p.total_q : p.seqlen_q) + in_batch] = sum == 0.0f ? -INFINITY : largest + logf(sum);
  }
}

}  // namespace

Status launch_combine(const AttentionParams& params, const AttentionPlan& plan) {
  const CombineArgs args{params, plan, AttentionArgs(params, plan).total_rows};
  const int64_t ctas = (args.total_rows * params.num_heads + kWarps - 1) / kWarps;
  const auto kernel =
      params.dtype == DType::BFloat16 ? combine_kernel<cutlass::bfloat16_t> : combine_kernel<cutlass::half_t>;
  static std::atomic<int> known{-1};
  return launch_kernel("attention", kernel, ctas, 32 * kWarps, 0, params.exec.stream, args,
                       Launch{waits_by_itself(kernel, known)});
}

}  // namespace dca::cuda
