// Launch of one compiled attention kernel. Instances are explicit instantiations, generated from
// cmake/KernelInstances.cmake.
#pragma once

#include "decode_kernel.h"
#include "launch_check.h"
#include "prefill_kernel.h"

namespace dca::cuda::sm80 {

template <TileKind kKind, DType kDType, int kHeadDim, DType kCacheDType = DType::Same>
struct Instance {
  using Element = typename ElementOf<kDType>::type;
  using Cached = typename ElementOf<kCacheDType == DType::Same ? kDType : kCacheDType>::type;
  using Traits = std::conditional_t<kKind == TileKind::Prefill, PrefillTraits<Element, kHeadDim, Cached>,
                                    DecodeTraits<Element, kHeadDim, Cached>>;

  template <bool kPaged>
  static constexpr auto kernel() {
    if constexpr (kKind == TileKind::Prefill) {
      return prefill_kernel<Traits, kPaged>;
    } else {
      return decode_kernel<Traits, kPaged>;
    }
  }

  template <bool kPaged>
  static Status launch_as(const AttentionParams& params, const AttentionPlan& plan) {
    return launch_attention_kernel<kernel<kPaged>()>(plan.num_ctas, Traits::kThreads, Traits::kSharedBytes,
                                                     params.exec.stream, AttentionArgs(params, plan));
  }

  static Status launch(const AttentionParams& params, const AttentionPlan& plan) {
    return params.pages.page_table != nullptr ? launch_as<true>(params, plan) : launch_as<false>(params, plan);
  }

  static constexpr AttentionInstance description() {
    constexpr int32_t kSharedPerSm = 164 * 1024;
    constexpr int32_t kFitting = kSharedPerSm / (Traits::kSharedBytes + 1024);
    constexpr int32_t kCtas = kFitting < Traits::kMinCtas ? kFitting : Traits::kMinCtas;
    return {"sm80", "", false, kKind, kDType, kHeadDim, Traits::kBlockM, kCtas, false, &launch, kCacheDType};
  }
};

}  // namespace dca::cuda::sm80
