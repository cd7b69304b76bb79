// Launches of compiled sm90 kernels.
#pragma once

#include <numeric>

#include "decode_kernel.h"
#include "launch_check.h"
#include "prefill_kernel.h"
#include "tensor_map.h"

namespace dca::cuda::sm90 {

/// K or V of the call in boxes.
inline Status encode_cache(const char* name, const AttentionParams& p, const ConstTensorRef& cache, const Box& box,
                           CUtensorMap* map) {
  const bool paged = p.pages.page_table != nullptr;
  const bool ragged = p.cu_seqlens_k != nullptr;
  const TensorExtents extents{paged    ? p.pages.page_size
                              : ragged ? p.total_k
                                       : p.seqlen_k,
                              p.num_heads_kv,
                              paged    ? p.pages.num_pages
                              : ragged ? 1
                                       : p.batch};
  return encode_tensor_map(name, cache.data, cache.stride, dtype_of_cache(p), p.head_dim, extents, box, map);
}

/// Of the `rows` that are asked for together, how many lie in one page wherever blocks are cut.
inline int32_t rows_per_box(const AttentionParams& p, int32_t rows) {
  return p.pages.page_table != nullptr ? std::gcd(p.pages.page_size, rows) : rows;
}

template <TileKind kKind, DType kDType, int kHeadDim, DType kCacheDType = DType::Same,
          Variant kVariant = Variant::Default>
struct Instance {
  static_assert(kKind == TileKind::Prefill);
  using Traits = PrefillTraits<typename ElementOf<kDType>::type, kHeadDim,
                               typename ElementOf<kCacheDType == DType::Same ? kDType : kCacheDType>::type, kVariant>;

  static Status encode(const AttentionParams& p, PrefillArgs* args) {
    args->rows_per_box = rows_per_box(p, Traits::kBlockN);
    const Box box{Traits::kLoadColumns, args->rows_per_box};
    if (Status status = encode_cache("k", p, p.k, box, &args->k); !status.ok()) return status;
    if (Status status = encode_cache("v", p, p.v, box, &args->v); !status.ok()) return status;
    // Rows of several heads are not rows of the tensor, and partial results are not out.
    args->out_by_tma = args->attention.plan.heads_per_tile == 1 && args->attention.plan.num_splits == 1 &&
                       args->attention.plan.out_fits_tma;
    if (!args->out_by_tma) return {};
    const bool ragged = p.cu_seqlens_q != nullptr;
    const TensorExtents extents{ragged ? p.total_q : p.seqlen_q, p.num_heads, ragged ? 1 : p.batch};
    return encode_tensor_map("out", p.out.data, p.out.stride, p.dtype, p.head_dim, extents, {Traits::kBoxColumns, 64},
                             &args->out);
  }

  static Status launch(const AttentionParams& params, const AttentionPlan& plan) {
    PrefillArgs args{AttentionArgs(params, plan), {}, {}, {}, 0, 0, false};
    args.num_tiles = static_cast<int32_t>(args.attention.order.count());
    if (Status status = encode(params, &args); !status.ok()) return status;
    constexpr int kSharedBytes = static_cast<int>(sizeof(typename Traits::Shared));
    return launch_attention_kernel<&prefill_kernel<Traits>>(plan.num_ctas, Traits::kThreads, kSharedBytes,
                                                            params.exec.stream, args);
  }

  static constexpr AttentionInstance description() {
    constexpr bool kOnRequest = kVariant != Variant::Default && kVariant != Variant::ThreeConsumers;
    return {"sm90",          name_of(kVariant), kOnRequest,          kKind,   kDType,     kHeadDim,
            Traits::kBlockM, 1,                 Traits::kPersistent, &launch, kCacheDType};
  }
};

template <DType kDType, int kHeadDim, DType kCacheDType>
struct Instance<TileKind::Decode, kDType, kHeadDim, kCacheDType> {
  using Traits = DecodeTraits<typename ElementOf<kDType>::type, kHeadDim,
                              typename ElementOf<kCacheDType == DType::Same ? kDType : kCacheDType>::type>;

  static Status launch(const AttentionParams& params, const AttentionPlan& plan) {
    DecodeArgs args{AttentionArgs(params, plan), rows_per_box(params, Traits::kWarpKeys), {}, {}};
    const Box box{Traits::kBoxColumns * Traits::kPacked, args.rows_per_box};
    if (Status status = encode_cache("k", params, params.k, box, &args.k); !status.ok()) return status;
    if (Status status = encode_cache("v", params, params.v, box, &args.v); !status.ok()) return status;
    return launch_attention_kernel<&decode_kernel<Traits>>(plan.num_ctas, Traits::kThreads, Traits::kSharedBytes,
                                                           params.exec.stream, args);
  }

  static constexpr AttentionInstance description() {
    return {"sm90",          "",               false, TileKind::Decode, kDType,     kHeadDim,
            Traits::kBlockM, Traits::kMinCtas, false, &launch,          kCacheDType};
  }
};

}  // namespace dca::cuda::sm90
