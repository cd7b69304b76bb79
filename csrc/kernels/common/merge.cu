// The merged softmax of several attention results over disjoint keys, weights in fp32. One pass over memory: a thread
// makes 16 bytes of a row, and reads the row's LSEs itself, which its neighbours read too.
#include "kernels.h"
#include "launch_check.h"
#include "numeric.h"

namespace dca::cuda {
namespace {

constexpr int kThreads = 128;

struct MergeArgs {
  const void* outs[kMaxMergeParts];
  const float* lses[kMaxMergeParts];
  void* out;
  float* lse;
  int32_t num_parts;
  int32_t num_heads;
  int32_t head_dim;
  int64_t seqlen;
  int64_t num_rows;  // (batch, seqlen, num_heads)
};

template <class Element, int kVector>
__global__ void __launch_bounds__(kThreads) merge_kernel(const __grid_constant__ MergeArgs args) {
  const int32_t units = (args.head_dim + kVector - 1) / kVector;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= args.num_rows * units) return;
  const int64_t row = i / units;
  const int32_t column = static_cast<int32_t>(i % units) * kVector;
  const int32_t head = static_cast<int32_t>(row % args.num_heads);
  const int64_t token = row / args.num_heads;
  const int64_t lse_index = (token / args.seqlen * args.num_heads + head) * args.seqlen + token % args.seqlen;

  float largest = -INFINITY;
  for (int32_t part = 0; part < args.num_parts; ++part) largest = fmaxf(largest, args.lses[part][lse_index]);
  float sum = 0.0f;
  float joined[kVector] = {};
  for (int32_t part = 0; part < args.num_parts; ++part) {
    const float lse = args.lses[part][lse_index];
    if (lse == -INFINITY) continue;            // whatever its out holds
    const float weight = expf(lse - largest);  // of NaN, which fmaxf passes over, NaN
    sum += weight;
    const Element* const source = static_cast<const Element*>(args.outs[part]) + row * args.head_dim + column;
    if constexpr (kVector > 1) {
      const Vec16<Element> x = load16(source);
      CUTE_UNROLL
      for (int c = 0; c < kVector; ++c) joined[c] += weight * static_cast<float>(x[c]);
    } else {
      joined[0] += weight * static_cast<float>(*source);
    }
  }
  const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
  Element* const target = static_cast<Element*>(args.out) + row * args.head_dim + column;
  if constexpr (kVector > 1) {
    Vec16<Element> rounded;
    CUTE_UNROLL
    for (int c = 0; c < kVector; ++c) rounded[c] = static_cast<Element>(joined[c] * inverse);
    store16(target, rounded);
  } else {
    *target = static_cast<Element>(joined[0] * inverse);
  }
  if (column == 0) args.lse[lse_index] = sum == 0.0f ? -INFINITY : largest + logf(sum);
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <class Element>
Status launch_as(const MergeArgs& args, void* stream) {
  bool vectors = args.head_dim % kVec<Element> == 0 && aligned(args.out);
  for (int32_t part = 0; part < args.num_parts; ++part) vectors = vectors && aligned(args.outs[part]);
  const int64_t units = args.num_rows * (vectors ? args.head_dim / kVec<Element> : args.head_dim);
  const int64_t ctas = (units + kThreads - 1) / kThreads;
  return launch_kernel("merge_attention_states",
                       vectors ? merge_kernel<Element, kVec<Element>> : merge_kernel<Element, 1>, ctas, kThreads, 0,
                       stream, args);
}

}  // namespace

Status launch_merge(const MergeParams& p) {
  MergeArgs args{};
  for (int32_t part = 0; part < p.num_parts; ++part) {
    args.outs[part] = p.outs[part];
    args.lses[part] = p.lses[part];
  }
  args.out = p.out;
  args.lse = p.lse;
  args.num_parts = p.num_parts;
  args.num_heads = p.num_heads;
  args.head_dim = p.head_dim;
  args.seqlen = p.seqlen;
  args.num_rows = p.batch * p.seqlen * p.num_heads;
  switch (p.dtype) {
    case DType::Float32:
      return launch_as<float>(args, p.exec.stream);
    case DType::BFloat16:
      return launch_as<cutlass::bfloat16_t>(args, p.exec.stream);
    default:
      return launch_as<cutlass::half_t>(args, p.exec.stream);
  }
}

}  // namespace dca::cuda
