// Dual Chunk Attention prefill for Hopper (An et al. 2024, section 3): TMA, wgmma, warp specialisation.
//
// One CTA owns kBlockM query rows of one chunk. Warpgroup 0 loads: one thread walks the key blocks intra -> successive
// -> inter and requests K and V by TMA as places in the rings become free, whatever segment they belong to. The other
// warpgroups compute, each 64 rows: S = Q K^T, softmax, O += P V, one online softmax through all segments. At a segment
// switch a warpgroup rotates its own rows of Q in shared memory while the loads go on.
//
// Shared memory: Q (kBlockM, kHeadDim) | K ring (kStages, kBlockN, kHeadDim) | V ring | mbarriers | the tile.
#pragma once

#include "mainloop.h"
#include "output_rows.h"

namespace dca::cuda::sm90 {

template <class Traits>
struct PrefillArgs {
  AttentionArgs attention;
  typename Traits::TmaKv tma_k;
  typename Traits::TmaKv tma_v;
};

// --- The producer ---

template <class Traits>
class Producer {
 public:
  __device__ Producer(const PrefillArgs<Traits>& args, const WorkTile& tile, typename Traits::Shared& shared)
      : args_(args), tile_(tile), shared_(shared) {}

  __device__ void run() {
    KeyBlockIterator<ShortBlock::First> walk(tile_.ranges, Traits::kBlockN);
    RingPosition<Traits::kStages> at;
    for (KeyBlock block = walk.next(); block.count > 0; block = walk.next()) {
      load(args_.tma_k, block, at, shared_.k, shared_.k_full, shared_.k_empty);
      load(args_.tma_v, block, at, shared_.v, shared_.v_full, shared_.v_empty);
      at.advance();
    }
  }

 private:
  __device__ __forceinline__ void load(const typename Traits::TmaKv& tma, const KeyBlock& block,
                                       const RingPosition<Traits::kStages>& at, typename Traits::Element* ring,
                                       uint64_t* full, uint64_t* empty) {
    EmptyBarrier::wait(&empty[at.stage], at.phase ^ 1);  // the first round finds every place free
    Barrier::arrive_and_expect_tx(&full[at.stage], Traits::kBlockBytes);
    const int32_t first_row =
        first_key_of_box(block, Traits::kBlockN) + tile_.seqlen.leftpad + static_cast<int32_t>(tile_.seqlen.k_row);
    const auto all = tma.get_tma_tensor(make_shape(int32_t{}, int32_t{}, int32_t{}, int32_t{}));
    const int32_t batch = args_.attention.p.cu_seqlens_k != nullptr ? 0 : tile_.b;
    const auto from_row = domain_offset(make_coord(first_row, 0, tile_.kv_head, batch), all);
    const auto source =
        local_tile(from_row(_, _, 0, 0), Shape<Int<Traits::kBlockN>, Int<Traits::kHeadDim>>{}, make_coord(0, 0));
    auto target = make_tensor(make_smem_ptr(ring), typename Traits::SmemKvRing{})(_, _, at.stage);
    auto parts = tma_partition(tma, _0{}, Layout<_1>{}, group_modes<0, 2>(target), group_modes<0, 2>(source));
    copy(tma.with(full[at.stage]), get<0>(parts), get<1>(parts));
  }

  const PrefillArgs<Traits>& args_;
  const WorkTile& tile_;
  typename Traits::Shared& shared_;
};

// --- The consumers ---

template <class Traits>
class Consumer {
  using Element = typename Traits::Element;
  using MmaQk = typename Traits::MmaQk;
  using MmaPv = typename Traits::MmaPv;
  using Position = RingPosition<Traits::kStages>;
  static constexpr int kHeadDim = Traits::kHeadDim;
  static constexpr int kBlockM = Traits::kBlockM;
  static constexpr int kBlockN = Traits::kBlockN;
  static constexpr int kThreadRows = 2;

 public:
  /// `thread` counts the threads of all consumers.
  __device__ Consumer(const AttentionArgs& args, const WorkTile& tile, typename Traits::Shared& shared, int32_t thread)
      : args_(args), tile_(tile), shared_(shared), thread_(thread), scale_(LogitScale::of(tile.scale)) {}

  __device__ void run() {
    auto acc_o = partition_fragment_C(MmaPv{}, Shape<Int<kBlockM>, Int<kHeadDim>>{});
    clear(acc_o);
    auto o = make_tensor(acc_o.data(), as_rows_and_columns(acc_o.layout()));
    OnlineSoftmax<kThreadRows> softmax;

    MmaQk mma_qk;
    MmaPv mma_pv;
    const auto thr_qk = mma_qk.get_slice(thread_);
    const auto thr_pv = mma_pv.get_slice(thread_);
    const auto sK = make_tensor(make_smem_ptr(shared_.k), typename Traits::SmemKvRing{});
    const auto sVt = make_tensor(make_smem_ptr(shared_.v), typename Traits::SmemVtRing{});
    const auto tSrQ = thr_qk.partition_fragment_A(smem_q());
    const auto tSrK = thr_qk.partition_fragment_B(sK);
    const auto tOrV = thr_pv.partition_fragment_B(sVt);

    // S = Q K^T of a block is issued before O += P V of the block before it, whose products then run under this block's
    // softmax. The first block has none before it. `behind` is where V of the block before lies.
    KeyBlockIterator<ShortBlock::First> walk(tile_.ranges, kBlockN);
    KeyBlock previous, block = walk.next();
    Position at, behind;
    auto acc_s = partition_fragment_C(MmaQk{}, Shape<Int<kBlockM>, Int<kBlockN>>{});
    auto s = make_tensor(acc_s.data(), as_rows_and_columns(acc_s.layout()));
    auto weights = make_tensor<Element>(acc_s.layout());
    const auto tOrP = make_tensor(weights.data(), as_operand_a(weights.layout()));

    const auto issue_qk = [&] {
      if (previous.count == 0 || previous.segment != block.segment) rotate_queries(block.segment);
      Barrier::wait(&shared_.k_full[at.stage], at.phase);
      warpgroup_fence_operand(weights);  // nothing may define them between this product and the next
      issue_product<true>(mma_qk, tSrQ, tSrK(_, _, _, at.stage), acc_s);
    };
    const auto finish_qk = [&] {
      warpgroup_fence_operand(acc_s);
      release(shared_.k_empty[at.stage]);
      at.advance();
      if (tile_.ranges.needs_mask(block, kBlockN)) {
        mask_block(s, coordinates<kBlockN>(mma_qk), args_, tile_, block, kBlockN);
      }
    };
    const auto issue_pv = [&] { issue_product<false>(mma_pv, tOrP, tOrV(_, _, _, behind.stage), acc_o); };
    const auto wait_for_values = [&] {
      Barrier::wait(&shared_.v_full[behind.stage], behind.phase);
      if (has_foreign_rows(previous)) clear_foreign_values(previous, behind.stage);
    };
    const auto finish_pv = [&] {
      warpgroup_wait<0>();
      warpgroup_fence_operand(acc_o);
      release(shared_.v_empty[behind.stage]);
      behind.advance();
    };

    if (block.count > 0) {
      issue_qk();
      warpgroup_wait<0>();
      finish_qk();
      softmax.advance(s, scale_.magnitude_log2);  // O is still 0
      copy(convert_fragment<Element>(acc_s), weights);
      previous = block;
      for (block = walk.next(); block.count > 0; block = walk.next()) {
        wait_for_values();
        issue_qk();
        issue_pv();
        warpgroup_wait<1>();  // the logits; the values' products go on
        finish_qk();
        const auto rescale = softmax.advance(s, scale_.magnitude_log2);
        finish_pv();
        softmax.apply(rescale, o);
        copy(convert_fragment<Element>(acc_s), weights);
        previous = block;
      }
      wait_for_values();
      issue_pv();
      finish_pv();
    }
    softmax.finish();
    store(acc_o, o, softmax, coordinates<kHeadDim>(mma_pv));
  }

 private:
  __device__ auto smem_q() const { return make_tensor(make_smem_ptr(shared_.q), typename Traits::SmemQ{}); }

  // (rows, columns) of this thread's accumulators -> (row, column) of the tile.
  template <int kColumns, class Mma>
  __device__ auto coordinates(const Mma& mma) const {
    const auto mine = mma.get_slice(thread_).partition_C(make_identity_tensor(Shape<Int<kBlockM>, Int<kColumns>>{}));
    return make_tensor(mine.data(), as_rows_and_columns(mine.layout()));
  }

  // Whether a box brought rows in front of the sequence: padding, or the end of another sequence. TMA makes rows in
  // front of all of them 0.
  __device__ __forceinline__ bool has_foreign_rows(const KeyBlock& block) const {
    const bool rows_in_front = args_.p.cu_seqlens_k != nullptr || args_.p.cache_leftpad != nullptr;
    return rows_in_front && first_key_of_box(block, kBlockN) < 0;
  }

  // A weight of 0 does not hide a NaN in a value that is not the sequence's own. All consumers see the same blocks;
  // each writer makes its zeros visible to wgmma before they meet.
  __device__ void clear_foreign_values(const KeyBlock& block, int32_t stage) const {
    auto sV = make_tensor(make_smem_ptr(shared_.v), typename Traits::SmemKvRing{});
    constexpr int kUnits = kHeadDim / 8;
    Vec16<Element> zero;
    clear(zero);
    const int32_t count = -first_key_of_box(block, kBlockN) * kUnits;
    for (int32_t i = thread_; i < count; i += Traits::kConsumerThreads) {
      store16(&sV(i / kUnits, i % kUnits * 8, stage), zero);
    }
    cutlass::arch::fence_view_async_shared();
    cutlass::arch::NamedBarrier::sync(Traits::kConsumerThreads, 1 + Traits::kConsumers);
  }

  // One arrival per warp: its reads are done, since its warpgroup's products are.
  __device__ __forceinline__ void release(uint64_t& empty) const {
    if (thread_ % 32 == 0) EmptyBarrier::arrive(&empty);
  }

  __device__ void synchronize_warpgroup() const { cutlass::arch::NamedBarrier::sync(128, 1 + thread_ / 128); }

  // The warpgroup's own 64 rows. A warp writes rows of the other three as well, whose share of the last product need
  // not be done when its own is: hence the first barrier. wgmma reads Q through the async proxy: each writer makes its
  // stores visible to it before the second.
  __device__ void rotate_queries(Segment segment) {
    synchronize_warpgroup();
    const int32_t first_row = thread_ / 128 * 64;
    load_queries(
        args_, tile_, segment, scale_.sign, smem_q(), 64, [&](int32_t i) { return first_row + i; }, thread_ % 128, 128);
    cutlass::arch::fence_view_async_shared();
    synchronize_warpgroup();
  }

  template <class Acc, class Rows, class Coordinates>
  __device__ void store(const Acc& acc_o, Rows& o, const OnlineSoftmax<kThreadRows>& softmax, const Coordinates& at) {
    const OutputRows<Element> rows{args_, tile_};
    finish_rows(rows, softmax, o, at, scale_.magnitude_log2, thread_ % 4 == 0);
    if (args_.plan.num_splits == 1) store_rounded(acc_o, o, rows, at);
  }

  // Through the warp's rows of Q, so that a row leaves in 16-byte pieces.
  template <class Acc, class Rows, class Coordinates>
  __device__ void store_rounded(const Acc& acc_o, const Rows& o, const OutputRows<Element>& rows,
                                const Coordinates& at) {
    auto staging = smem_q();
    const auto rounded = convert_fragment<Element>(acc_o);
    const auto values = make_tensor(rounded.data(), o.layout());
    synchronize_warpgroup();  // the last product with these rows of Q is done for all
    CUTE_UNROLL
    for (int r = 0; r < kThreadRows; ++r) {
      CUTE_UNROLL
      for (int c = 0; c < size<1>(values); c += 2) {
        *reinterpret_cast<uint32_t*>(&staging(get<0>(at(r, c)), get<1>(at(r, c)))) =
            *reinterpret_cast<const uint32_t*>(&values(r, c));
      }
    }
    __syncwarp();
    const int32_t first_row = thread_ / 32 * 16;
    store_rows_of_warp(
        rows, staging, 16, [&](int32_t i) { return first_row + i; }, thread_ % 32);
  }

  const AttentionArgs& args_;
  const WorkTile& tile_;
  typename Traits::Shared& shared_;
  const int32_t thread_;
  const LogitScale scale_;
};

// --- The kernel ---

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    prefill_kernel(const __grid_constant__ PrefillArgs<Traits> args) {
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<typename Traits::Shared*>(memory);
  const int32_t warpgroup = cutlass::canonical_warp_group_idx();
  if (threadIdx.x == 0) {
    constexpr uint32_t kConsumerWarps = Traits::kConsumerThreads / 32;
    for (int stage = 0; stage < Traits::kStages; ++stage) {
      Barrier::init(&shared.k_full[stage], 1);
      Barrier::init(&shared.v_full[stage], 1);
      EmptyBarrier::init(&shared.k_empty[stage], kConsumerWarps);
      EmptyBarrier::init(&shared.v_empty[stage], kConsumerWarps);
    }
    cutlass::arch::fence_barrier_init();
  }
  static_assert(sizeof(WorkTile) <= sizeof(shared.tile));
  const WorkTile& tile = WorkTile::in_shared_memory(args.attention, shared.tile);  // a barrier for all
  if (tile.first_of_sequence) {
    clear_rows_without_position<typename Traits::Element, Traits::kThreads>(args.attention, tile);
  }
  if (tile.empty()) return;
  if (warpgroup == 0) {
    cutlass::arch::warpgroup_reg_dealloc<Traits::kProducerRegisters>();
    if (threadIdx.x == 0) Producer<Traits>(args, tile, shared).run();
  } else {
    cutlass::arch::warpgroup_reg_alloc<Traits::kConsumerRegisters>();
    Consumer<Traits>(args.attention, tile, shared, static_cast<int32_t>(threadIdx.x) - 128).run();
  }
}

}  // namespace dca::cuda::sm90
