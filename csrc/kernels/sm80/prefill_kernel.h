// Dual Chunk Attention over a tile of many query rows (An et al. 2024, section 3), for every GPU from 8.0 on.
//
// One CTA of 4 warps owns kBlockM rows: query positions of one chunk, times query heads of one KV head where the heads
// are packed. It walks the keys intra -> successive -> inter in blocks of kBlockN with one online softmax; between
// segments only Q changes, and each warp rotates its own rows of Q anew. Work is split over CTAs by WorkTile.
//
// Shared memory: Q (kBlockM, kHeadDim) | K ring (kStages, kBlockN, kHeadDim) | V ring (the same). The K of block i +
// kStages is requested as soon as Q K^T of block i is done, the V of block i + kStages - 1 as soon as P V of block i -
// 1 is, so that softmax and products hide the loads. O leaves through Q's place.
//
// Of a cache of e4m3 the rings hold what the cache holds, and behind them lie one block of K and one of V as the
// products want them: (kBlockN, kHeadDim) each. A thread widens what it has copied itself, once its copies have come.
#pragma once

#include "e4m3_rows.h"
#include "mainloop.h"
#include "output_rows.h"

namespace dca::cuda::sm80 {

template <class Traits, bool kPaged>
class PrefillTile {
  using Element = typename Traits::Element;
  using Cached = typename Traits::Cached;
  using Value = typename Traits::Value;
  using MmaQk = typename Traits::MmaQk;
  using MmaPv = typename Traits::MmaPv;
  static constexpr int kHeadDim = Traits::kHeadDim;
  static constexpr int kBlockM = Traits::kBlockM;
  static constexpr int kBlockN = Traits::kBlockN;
  static constexpr int kStages = Traits::kStages;
  static constexpr int kRowsPerWarp = kBlockM / Traits::kWarps;
  static constexpr int kThreadRows = kRowsPerWarp / 8;
  using Softmax = OnlineSoftmax<kThreadRows, Traits::kHeadroom>;

 public:
  __device__ PrefillTile(const AttentionArgs& args, const WorkTile& tile, Element* smem)
      : args_(args),
        tile_(tile),
        smem_q_(smem),
        smem_k_(smem + kBlockM * kHeadDim),
        smem_v_(smem_k_ + kStages * Traits::kStageElements),
        thread_(static_cast<int32_t>(threadIdx.x)),
        scale_(LogitScale::of(tile.scale * factor<Element>(args.p.k_scale))) {}

  __device__ void run() {
    KeyBlockIterator<> walk(tile_.ranges, kBlockN);
    KeyBlock blocks[kStages];  // the current one and those on their way
    CUTE_UNROLL
    for (int i = 0; i < kStages; ++i) blocks[i] = walk.next();

    auto acc_o = partition_fragment_C(MmaPv{}, Shape<Int<kBlockM>, Int<kHeadDim>>{});
    clear(acc_o);
    auto o = make_tensor(acc_o.data(), as_rows_and_columns(acc_o.layout()));
    Softmax softmax;

    CUTE_UNROLL
    for (int i = 0; i < kStages; ++i) {
      load_keys(blocks[i], i);
      if (i + 1 < kStages) load_values(blocks[i], i);
    }
    int32_t stage = 0;
    int32_t segment = -1;
    while (blocks[0].count > 0) {
      if (segment != static_cast<int32_t>(blocks[0].segment)) {
        segment = static_cast<int32_t>(blocks[0].segment);
        rotate_queries(blocks[0].segment);
      }
      auto acc_s = partition_fragment_C(MmaQk{}, Shape<Int<kBlockM>, Int<kBlockN>>{});
      wait_for_oldest(smem_k_, widened_k(), stage);  // K of this block; and all warps are done with V of the last one
      load_values(blocks[kStages - 1], previous(stage));
      multiply_qk<MmaQk>(acc_s, smem_q(), smem_k(stage), thread_);
      auto s = make_tensor(acc_s.data(), as_rows_and_columns(acc_s.layout()));
      if (tile_.ranges.needs_mask(blocks[0], kBlockN)) mask_logits(s, logit_coordinates(), args_, tile_, blocks[0], 0);

      CUTE_UNROLL
      for (int i = 0; i + 1 < kStages; ++i) blocks[i] = blocks[i + 1];
      blocks[kStages - 1] = walk.next();
      wait_for_oldest(smem_v_, widened_v(), stage);  // V of this block; and all warps are done with its K
      load_keys(blocks[kStages - 1], stage);
      softmax.apply(softmax.advance(s, scale_.magnitude_log2), o);
      multiply_pv<MmaPv>(acc_o, acc_s, smem_vt(stage), thread_);
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    cp_async_wait<0>();
    softmax.finish();
    store(acc_o, o, softmax);
  }

 private:
  __device__ static int32_t previous(int32_t stage) { return stage == 0 ? kStages - 1 : stage - 1; }

  __device__ auto smem_q() const { return make_tensor(make_smem_ptr(smem_q_), typename Traits::SmemQ{}); }
  // What the products read: a stage of a ring, or its numbers widened.
  __device__ auto smem_k(int32_t stage) const {
    return make_tensor(make_smem_ptr(Traits::kE4M3 ? widened_k() : smem_k_ + stage * Traits::kStageElements),
                       typename Traits::SmemKv{});
  }
  __device__ auto smem_vt(int32_t stage) const {
    auto* const values = reinterpret_cast<Value*>(smem_v_ + stage * Traits::kStageElements);
    return make_tensor(make_smem_ptr(Traits::kE4M3 ? widened_v() : values), typename Traits::SmemVt{});
  }
  __device__ Element* widened_k() const { return smem_v_ + kStages * Traits::kStageElements; }
  __device__ Value* widened_v() const { return reinterpret_cast<Value*>(widened_k() + Traits::kWidenedElements); }

  // On products with K, which is read as T, or with V.
  template <class T>
  __device__ float factor(const CacheScale& scale) const {
    return cache_factor<T, Cached>(scale, tile_.kv_head);
  }

  // (rows, columns) of this thread's logits -> (row, column) of the tile.
  __device__ auto logit_coordinates() const {
    const auto all = make_identity_tensor(Shape<Int<kBlockM>, Int<kBlockN>>{});
    const auto mine = MmaQk{}.get_slice(thread_).partition_C(all);
    return make_tensor(mine.data(), as_rows_and_columns(mine.layout()));
  }

  // Without a block a group is committed all the same, so that the number of groups in flight stays what it is.
  __device__ __forceinline__ void load_keys(const KeyBlock& block, int32_t stage) {
    const CacheRows<Cached, kPaged> keys(args_, args_.p.k, tile_, tile_.k);
    if (block.count > 0) load(keys, block, smem_k_ + stage * Traits::kStageElements);
    cp_async_fence();
  }

  __device__ __forceinline__ void load_values(const KeyBlock& block, int32_t stage) {
    const CacheRows<Cached, kPaged> values(args_, args_.p.v, tile_, tile_.v);
    if (block.count > 0) load(values, block, smem_v_ + stage * Traits::kStageElements);
    cp_async_fence();
  }

  template <class Source>
  __device__ __forceinline__ void load(const Source& source, const KeyBlock& block, Element* stage) {
    load_rows<typename Traits::SmemRing, Traits::kThreads>(source, block, 0, args_.p.head_dim / Traits::kPacked, stage,
                                                           thread_);
  }

  // The place that is widened into was read before the barrier that this one follows.
  template <class Widened>
  __device__ __forceinline__ void wait_for_oldest(const Element* ring, Widened* widened, int32_t stage) const {
    cp_async_wait<2 * (kStages - 1)>();
    if constexpr (Traits::kE4M3) {
      widen_rows<typename Traits::SmemRing, typename Traits::SmemKv, Traits::kThreads>(
          ring + stage * Traits::kStageElements, widened, thread_);
    }
    __syncthreads();
  }

  // The warp's own rows: the tiled product gives warp w the rows 16 w ... 16 w + 15 of every 16 * kWarps.
  __device__ __forceinline__ int32_t row_of_warp(int32_t i) const {
    return i / 16 * 16 * Traits::kWarps + thread_ / 32 * 16 + i % 16;
  }

  __device__ void rotate_queries(Segment segment) {
    __syncwarp();  // every lane has read the old ones
    load_queries<1>(
        args_, tile_, segment, scale_.sign, smem_q(), kRowsPerWarp, [&](int32_t i) { return row_of_warp(i); },
        thread_ % 32, 32);
    __syncwarp();
  }

  template <class Acc, class Rows>
  __device__ void store(Acc& acc_o, Rows& o, const Softmax& softmax) {
    const OutputRows<Element> rows{args_, tile_};
    const auto all = make_identity_tensor(Shape<Int<kBlockM>, Int<kHeadDim>>{});
    const auto mine = MmaPv{}.get_slice(thread_).partition_C(all);
    const auto coordinates = make_tensor(mine.data(), as_rows_and_columns(mine.layout()));
    finish_rows(rows, softmax, o, coordinates, scale_.magnitude_log2, thread_ % 4 == 0, factor<Value>(args_.p.v_scale));
    if (args_.plan.num_splits == 1) store_rounded(acc_o, rows);
  }

  // Through the warp's rows of Q, so that a row leaves in 16-byte pieces.
  template <class Acc>
  __device__ void store_rounded(const Acc& acc_o, const OutputRows<Element>& rows) {
    const auto rounded = convert_fragment<Element>(acc_o);
    const auto copy_o = make_tiled_copy_C(Copy_Atom<UniversalCopy<uint32_t>, Element>{}, MmaPv{});
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
