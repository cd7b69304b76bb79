// Dual Chunk Attention over a tile of many query rows (An et al. 2024, section 3), for every GPU from 8.0 on.
//
// One CTA of 4 warps owns kBlockM rows: query positions of one chunk, times query heads of one KV head where the heads
// are packed. It walks the keys intra -> successive -> inter in blocks of kBlockN with one online softmax; between
// segments only Q changes, and each warp rotates its own rows of Q anew. Work is split over CTAs by WorkTile.
//
// Shared memory: Q (kBlockM, kHeadDim) | K ring (kStages, kBlockN, kHeadDim) | V ring (the same). One barrier per
// block: behind it the block's keys and values have come, and all warps are done with the block before, whose stage the
// next one is asked for into, amid the products of Q K^T. Within a block warps run apart, so that one's softmax meets
// another's products. O leaves through Q's place.
//
// Of a cache of e4m3 the rings hold what the cache holds, and behind them lie one block of K and one of V as the
// products want them: (kBlockN, kHeadDim) each. A thread widens what it has copied itself, once its copies have come;
// K in front of the barrier, V in front of a second one, when nobody reads the place that it goes to.
#pragma once

#include "e4m3_rows.h"
#include "mainloop.h"
#include "output_rows.h"

namespace dca::cuda::sm80 {

template <class Traits, bool kPaged>
class PrefillTile {
  using Element = typename Traits::Element;
  using Cached = typename Traits::Cached;
  using Mma = typename Traits::Mma;
  static constexpr int kHeadDim = Traits::kHeadDim;
  static constexpr int kBlockM = Traits::kBlockM;
  static constexpr int kBlockN = Traits::kBlockN;
  static constexpr int kStages = Traits::kStages;
  static_assert(kStages == 2);  // a block and the next take turns
  static constexpr int kRowsPerWarp = kBlockM / Traits::kWarps;
  static constexpr int kThreadRows = kRowsPerWarp / 8;
  using Softmax = OnlineSoftmax<kThreadRows, Traits::kHeadroom>;
  static constexpr bool kTrusting = Traits::kTrusting;
  // What a lane's weights of a row in a block may sum up to, so that each is finite in Element. fp16 reaches to 2^16.
  static constexpr float kMostOfBlock = std::is_same_v<Element, cutlass::half_t> ? 0x1p15f : Softmax::kMostSum;

 public:
  __device__ PrefillTile(const AttentionArgs& args, const WorkTile& tile, Element* smem)
      : args_(args),
        tile_(tile),
        smem_q_(smem),
        smem_k_(smem + kBlockM * kHeadDim),
        smem_v_(smem_k_ + kStages * Traits::kStageElements),
        thread_(static_cast<int32_t>(threadIdx.x)),
        scale_(LogitScale::of(tile.scale * factor(args.p.k_scale))) {}

  __device__ void run() {
    KeyBlockRuns<> walk(tile_.ranges, kBlockN);
    KeyBlock block = walk.next();
    load(block, 0);

    auto acc_o = partition_fragment_C(Mma{}, Shape<Int<kBlockM>, Int<kHeadDim>>{});
    clear(acc_o);
    auto o = make_tensor(acc_o.data(), as_rows_and_columns(acc_o.layout()));
    Softmax softmax;

    int32_t stage = 0;
    int32_t segment = -1;
    while (block.count > 0) {
      const bool first = segment < 0;
      if (segment != static_cast<int32_t>(block.segment)) {
        segment = static_cast<int32_t>(block.segment);
        rotate_queries(block.segment);
      }
      const bool masked = walk.masked();
      const KeyBlock next = walk.next();
      auto acc_s = partition_fragment_C(Mma{}, Shape<Int<kBlockM>, Int<kBlockN>>{});
      wait_for_keys(stage);
      multiply_qk<Mma>(acc_s, smem_q(), smem_k(stage), thread_, [&] { load(next, stage ^ 1); });
      auto s = make_tensor(acc_s.data(), as_rows_and_columns(acc_s.layout()));
      if (masked) mask_logits(s, logit_coordinates(), args_, tile_, block, 0);
      if (!kTrusting || first || !softmax.admit(softmax.weigh(s, scale_.magnitude_log2), kMostOfBlock)) {
        if (kTrusting && !first) {  // weights too large for their dtype: the logits once more
          multiply_qk<Mma>(acc_s, smem_q(), smem_k(stage), thread_);
          if (masked) mask_logits(s, logit_coordinates(), args_, tile_, block, 0);
        }
        softmax.apply(softmax.advance(s, scale_.magnitude_log2), o);
      }
      wait_for_values(stage);
      multiply_pv<Mma>(acc_o, acc_s, smem_vt(stage), thread_);
      block = next;
      stage ^= 1;
    }
    cp_async_wait<0>();
    softmax.finish();
    store(acc_o, o, softmax);
  }

 private:
  __device__ Element* ring_k(int32_t stage) const { return smem_k_ + stage * Traits::kStageElements; }
  __device__ Element* ring_v(int32_t stage) const { return smem_v_ + stage * Traits::kStageElements; }
  __device__ auto smem_q() const { return make_tensor(make_smem_ptr(smem_q_), typename Traits::SmemQ{}); }
  // What the products read: a stage of a ring, or its numbers widened.
  __device__ auto smem_k(int32_t stage) const {
    return make_tensor(make_smem_ptr(Traits::kE4M3 ? widened_k() : ring_k(stage)), typename Traits::SmemKv{});
  }
  __device__ auto smem_vt(int32_t stage) const {
    return make_tensor(make_smem_ptr(Traits::kE4M3 ? widened_v() : ring_v(stage)), typename Traits::SmemVt{});
  }
  __device__ Element* widened_k() const { return smem_v_ + kStages * Traits::kStageElements; }
  __device__ Element* widened_v() const { return widened_k() + Traits::kWidenedElements; }

  // On products with K or with V.
  __device__ float factor(const CacheScale& scale) const { return cache_factor<Element, Cached>(scale, tile_.kv_head); }

  // (rows, columns) of this thread's logits -> (row, column) of the tile.
  __device__ auto logit_coordinates() const {
    const auto all = make_identity_tensor(Shape<Int<kBlockM>, Int<kBlockN>>{});
    const auto mine = Mma{}.get_slice(thread_).partition_C(all);
    return make_tensor(mine.data(), as_rows_and_columns(mine.layout()));
  }

  // Asks for the keys and values of a block into a stage that nobody reads any more. Without a branch, which would keep
  // the compiler from putting the addresses between the products: behind the last block zeros come. With pages there is
  // one, around the read of the page table.
  __device__ __forceinline__ void load(const KeyBlock& block, int32_t stage) {
    load_rows(CacheRows<Cached, kPaged>(args_, args_.p.k, tile_, tile_.k), block, ring_k(stage));
    load_rows(CacheRows<Cached, kPaged>(args_, args_.p.v, tile_, tile_.v), block, ring_v(stage));
    cp_async_fence();
  }

  __device__ __forceinline__ void load_rows(const CacheRows<Cached, kPaged>& source, const KeyBlock& block,
                                            Element* stage) {
    sm80::load_rows<typename Traits::SmemRing, Traits::kThreads>(source, block, 0, args_.p.head_dim / Traits::kPacked,
                                                                 stage, thread_);
  }

  // For the block's keys; and until all warps are done with the last block.
  __device__ __forceinline__ void wait_for_keys(int32_t stage) const {
    cp_async_wait<0>();
    if constexpr (Traits::kE4M3) widen(ring_k(stage), widened_k());
    __syncthreads();
  }

  // For its values, which have come with the keys, but are widened behind the barrier that frees their place.
  __device__ __forceinline__ void wait_for_values(int32_t stage) const {
    if constexpr (Traits::kE4M3) {
      widen(ring_v(stage), widened_v());
      __syncthreads();
    }
  }

  __device__ __forceinline__ void widen(const Element* stage, Element* widened) const {
    widen_rows<typename Traits::SmemRing, typename Traits::SmemKv, Traits::kThreads, Traits::kPackedUnitsAhead>(
        stage, widened, thread_);
  }

  // The warp's own rows: the tiled product gives warp w the rows 16 w ... 16 w + 15 of every 16 * kWarps.
  __device__ __forceinline__ int32_t row_of_warp(int32_t i) const {
    return i / 16 * 16 * Traits::kWarps + thread_ / 32 * 16 + i % 16;
  }

  __device__ void rotate_queries(Segment segment) {
    __syncwarp();  // every lane has read the old ones
    load_queries<Element, kRowsPerWarp, 32, Traits::kQueryPairsAhead>(
        args_, tile_, segment, scale_.sign, smem_q(), [&](int32_t i) { return row_of_warp(i); }, thread_);
    __syncwarp();
  }

  template <class Acc, class Rows>
  __device__ void store(Acc& acc_o, Rows& o, const Softmax& softmax) {
    const OutputRows<Element> rows{args_, tile_};
    const auto all = make_identity_tensor(Shape<Int<kBlockM>, Int<kHeadDim>>{});
    const auto mine = Mma{}.get_slice(thread_).partition_C(all);
    const auto coordinates = make_tensor(mine.data(), as_rows_and_columns(mine.layout()));
    finish_rows(rows, softmax, o, coordinates, scale_.magnitude_log2, thread_ % 4 == 0, factor(args_.p.v_scale));
    if (args_.plan.num_splits == 1) store_rounded(acc_o, rows);
  }

  // Through the warp's rows of Q, so that a row leaves in 16-byte pieces.
  template <class Acc>
  __device__ void store_rounded(const Acc& acc_o, const OutputRows<Element>& rows) {
    const auto rounded = convert_fragment<Element>(acc_o);
    const auto copy_o = make_tiled_copy_C(Copy_Atom<UniversalCopy<uint32_t>, Element>{}, Mma{});
    const auto thr_copy_o = copy_o.get_slice(thread_);
    __syncwarp();
    auto staging = smem_q();
    copy(copy_o, thr_copy_o.retile_S(rounded), thr_copy_o.partition_D(staging));
    __syncwarp();
    store_rows_of_warp(
        rows, staging, kRowsPerWarp, [&](int32_t i) { return row_of_warp(i); }, thread_ % 32);
  }

  const AttentionArgs& args_;
  const WorkTile& tile_;
  Element* const smem_q_;
  Element* const smem_k_;
  Element* const smem_v_;
  const int32_t thread_;
  const LogitScale scale_;
};

template <class Traits, bool kPaged>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kMinCtas)
    prefill_kernel(const __grid_constant__ AttentionArgs args) {
  extern __shared__ __align__(128) unsigned char shared[];
  using Element = typename Traits::Element;
  __shared__ __align__(16) unsigned char storage[sizeof(WorkTile)];
  const WorkTile& tile = WorkTile::in_shared_memory(args, storage);
  if (tile.first_of_sequence)
    clear_rows_without_position<Element>(args, tile, static_cast<int32_t>(threadIdx.x), Traits::kThreads);
  if (tile.empty()) return;
  PrefillTile<Traits, kPaged>(args, tile, reinterpret_cast<Element*>(shared)).run();
}

}  // namespace dca::cuda::sm80
