// Launch of one compiled sm90 kernel.
#pragma once

#include <atomic>

#include "launch_check.h"
#include "prefill_kernel.h"

namespace dca::cuda::sm90 {

template <TileKind kKind, DType kDType, int kHeadDim>
struct Instance {
  static_assert(kKind == TileKind::Prefill);
  using Element = typename ElementOf<kDType>::type;
  using Traits = PrefillTraits<Element, kHeadDim>;

  /// K or V for TMA. Strides of dimensions of one entry may be anything in the parameters, but not in a tensor map.
  static auto global_kv(const AttentionParams& p, const ConstTensorRef& cache) {
    const bool ragged = p.cu_seqlens_k != nullptr;
    const int64_t rows = ragged ? p.total_k : p.seqlen_k;
    const int32_t batch = ragged ? 1 : p.batch;
    const int64_t row = rows > 1 ? cache.stride.row : p.head_dim;
    const int64_t head = p.num_heads_kv > 1 ? cache.stride.head : p.head_dim;
    const int64_t sequence = batch > 1 ? cache.stride.batch : row * rows;
    return make_tensor(make_gmem_ptr(static_cast<const Element*>(cache.data)),
                       make_shape(static_cast<int32_t>(rows), p.head_dim, p.num_heads_kv, batch),
                       make_stride(row, _1{}, head, sequence));
  }

  static auto tma(const AttentionParams& p, const ConstTensorRef& cache) {
    return make_tma_copy(SM90_TMA_LOAD{}, global_kv(p, cache), typename Traits::SmemKv{},
                         Shape<Int<Traits::kBlockN>, Int<kHeadDim>>{}, _1{});
  }

  static Status launch(const AttentionParams& params, const AttentionPlan& plan) {
    const PrefillArgs<Traits> args{AttentionArgs(params, plan), tma(params, params.k), tma(params, params.v)};
    constexpr int kSharedBytes = static_cast<int>(sizeof(typename Traits::Shared));
    static std::atomic<uint64_t> prepared{0};
    if (Status status = allow_shared_memory(prefill_kernel<Traits>, kSharedBytes, prepared); !status.ok()) {
      return status;
    }
    return launch_kernel("attention", prefill_kernel<Traits>, args.attention.num_ctas(), Traits::kThreads, kSharedBytes,
                         params.exec.stream, args);
  }

  static constexpr AttentionInstance description() {
    return {"sm90", kKind, kDType, kHeadDim, Traits::kBlockM, false, 1, &launch};
  }
};

}  // namespace dca::cuda::sm90
