// A consumer warpgroup: 64 query rows of each tile through all blocks of keys, one online softmax for all segments.
#pragma once

#include <cute/arch/copy_sm90_tma.hpp>

#include "e4m3.h"
#include "mainloop.h"
#include "output_rows.h"
#include "prefill_args.h"

namespace dca::cuda::sm90 {

template <class Traits>
class Consumer {
  using Element = typename Traits::Element;
  using Shared = typename Traits::Shared;
  using MmaQk = typename Traits::MmaQk;
  using MmaPv = typename Traits::MmaPv;
  using Barriers = ConsumerBarriers<Traits::kConsumers>;
  using Turns = sm90::Turns<Traits::kConsumers, Traits::kOrdered>;
  static constexpr int kHeadDim = Traits::kHeadDim;
  static constexpr int kBlockM = Traits::kBlockM;
  static constexpr int kBlockN = Traits::kBlockN;
  static constexpr int kThreadRows = 2;
  using Softmax = OnlineSoftmax<kThreadRows, Traits::kHeadroom>;

 public:
  /// `thread` counts the threads of all consumers.
  __device__ Consumer(const PrefillArgs& args, Shared& shared, int32_t thread)
      : prefill_(args), args_(args.attention), shared_(shared), thread_(thread) {}

  __device__ void run() {
    Turns::begin(warpgroup());
    for (RingPosition<Traits::kTileSlots> at;; at.advance()) {
      Barrier::wait(&shared_.tile_full[at.stage()], at.phase());
      TileSlot& slot = shared_.tiles[at.stage()];
      if (slot.last) break;
      const WorkTile& tile = slot.tile;
      thread_ = made_anew(thread_);
      if (tile.first_of_sequence) {
        clear_rows_without_position<Element>(args_, tile, thread_, Traits::kConsumerThreads);
      }
      if (!tile.empty()) compute(slot);
      at.count = slot.count;  // as it was, but not kept in a register meanwhile
      EmptyBarrier::arrive(&shared_.tile_empty[at.stage()]);
    }
    Turns::end(warpgroup());
    wait_for_stores();
  }

 private:
  // What a thread holds of the warpgroup's 64 rows.
  struct Fragments {
    decltype(partition_fragment_C(MmaPv{}, Shape<Int<kBlockM>, Int<kHeadDim>>{})) acc_o;
    decltype(partition_fragment_C(MmaQk{}, Shape<Int<kBlockM>, Int<kBlockN>>{})) acc_s;
    decltype(make_tensor<Element>(acc_s.layout())) weights;  ///< of the block before, rounded

    __device__ auto o() { return make_tensor(acc_o.data(), as_rows_and_columns(acc_o.layout())); }
    __device__ auto s() { return make_tensor(acc_s.data(), as_rows_and_columns(acc_s.layout())); }
    __device__ auto p() { return make_tensor(weights.data(), as_operand_a(weights.layout())); }
    __device__ void keep_weights() { round_fragment(acc_s, weights); }
  };

  // S = Q K^T of a block is issued before O += P V of the block before it. The first block has none before it.
  __device__ void compute(TileSlot& slot) {
    const WorkTile& tile = slot.tile;
    BlockFlags flags = slot.before;
    const float scale_log2 = scale_of(tile).magnitude_log2;
    Fragments f;
    clear(f.acc_o);
    auto o = f.o();
    auto s = f.s();
    Softmax softmax;
    if (!flags.has(BlockFlags::kLast)) {
      rotate_queries(tile, flags.next_segment());
      wait_for_keys();
      Turns::take(warpgroup());
      issue_qk(f);
      flags = flags_of_keys();
      Turns::pass(warpgroup());
      warpgroup_wait<0>();
      finish_qk(f, tile, flags);
      softmax.advance(s, scale_log2);  // O is still 0
      f.keep_weights();
      at_.advance();
      for (;;) {
        if (flags.has(BlockFlags::kForeignRows | BlockFlags::kLast | BlockFlags::kSwitch)) {
          if (!Traits::kE4M3 && flags.has(BlockFlags::kForeignRows)) clear_foreign_values(tile);
          if (flags.has(BlockFlags::kLast)) break;
          if (flags.has(BlockFlags::kSwitch)) rotate_queries(tile, flags.next_segment());
        }
        wait_for_keys();
        Turns::take(warpgroup());
        issue_qk(f);
        flags = flags_of_keys();  // this and the wait for values take time, in which the products run
        wait_for_values();
        issue_pv(f);
        Turns::pass(warpgroup());
        warpgroup_wait<1>();  // the logits; the values' products go on
        // Rounded in each branch, so that the compiler puts it among the exponentials.
        if (!Traits::kTrusting || flags.has(BlockFlags::kMaxima)) {
          finish_qk(f, tile, flags);
          const auto rescale = softmax.advance(s, scale_log2);
          stay_in_front(softmax);
          finish_pv(f);
          softmax.apply(rescale, o);
          f.keep_weights();
        } else {
          finish_qk(f);
          softmax.add(softmax.weigh(s, scale_log2));  // under the products of the other warpgroup
          finish_pv(f);
          f.keep_weights();
        }
        at_.advance();
      }
      wait_for_values();
      issue_pv(f);
      finish_pv(f);
    }
    softmax.finish();
    const auto at = coordinates<kHeadDim>(MmaPv{});
    if (Traits::kTrusting && !slot.careful) check(slot, o, softmax, at);
    store(slot, f.acc_o, o, softmax, at, scale_log2);
  }

  // --- Products ---

  __device__ __forceinline__ void issue_qk(Fragments& f) const {
    warpgroup_fence_operand(f.weights);  // nothing may define them between this product and the next
    MmaQk mma;
    const auto thr_mma = mma.get_slice(warpgroup() * 128);  // descriptors are the same for all threads
    const auto sQ = make_tensor(make_smem_ptr(made_anew(shared_.q)), typename Traits::SmemQ{});
    const auto sK = make_tensor(make_smem_ptr(made_anew(shared_.k)), typename Traits::SmemKvRing{});
    const auto tSrQ = thr_mma.partition_fragment_A(sQ);
    const auto tSrK = thr_mma.partition_fragment_B(sK);
    issue_product<true>(mma, tSrQ, tSrK(_, _, _, at_.stage()), f.acc_s);
  }

  __device__ __forceinline__ void issue_pv(Fragments& f) const {
    MmaPv mma;
    const auto sVt = make_tensor(make_smem_ptr(made_anew(shared_.v)), typename Traits::SmemVtRing{});
    const auto tOrV = mma.get_slice(warpgroup() * 128).partition_fragment_B(sVt);
    issue_product<false>(mma, f.p(), tOrV(_, _, _, at_.before().stage()), f.acc_o);
  }

  // After the wait for it.
  __device__ __forceinline__ void finish_qk(Fragments& f) const {
    warpgroup_fence_operand(f.acc_s);
    release(shared_.products.k_empty[at_.stage()]);
  }

  // The same, and masked.
  __device__ __forceinline__ void finish_qk(Fragments& f, const WorkTile& tile, BlockFlags flags) const {
    warpgroup_fence_operand(f.acc_s);
    if (flags.has(BlockFlags::kMasked)) {
      const BlockNote& note = shared_.notes[at_.stage()];
      const KeyBlock block{read_by_one(note.block.begin), read_by_one(note.block.count),
                           flags.has(BlockFlags::kIntra) ? Segment::Intra : Segment::Inter};
      auto s = f.s();
      mask_block(s, coordinates<kBlockN>(MmaQk{}), args_, tile, block, read_by_one(note.first_key));
    }
    finish_qk(f);
  }

  __device__ __forceinline__ void finish_pv(Fragments& f) const {
    warpgroup_wait<0>();
    warpgroup_fence_operand(f.acc_o);
    release(shared_.products.v_empty[at_.before().stage()]);
  }

  __device__ auto smem_q() const { return make_tensor(make_smem_ptr(shared_.q), typename Traits::SmemQRows{}); }

  __device__ __forceinline__ int32_t warpgroup() const { return static_cast<uint32_t>(thread_) / 128; }

  // On products with K or with V.
  __device__ __forceinline__ float factor(const CacheScale& scale, const WorkTile& tile) const {
    return cache_factor<Element, typename Traits::Cached>(scale, tile.kv_head);
  }

  __device__ __forceinline__ LogitScale scale_of(const WorkTile& tile) const {
    return LogitScale::of(tile.scale * factor(args_.p.k_scale, tile));
  }

  // (rows, columns) of this thread's accumulators -> (row, column) of the tile.
  template <int kColumns, class Mma>
  __device__ auto coordinates(const Mma& mma) const {
    const auto whole = make_identity_tensor(Shape<Int<kBlockM>, Int<kColumns>>{});
    const auto mine = mma.get_slice(made_anew(thread_)).partition_C(whole);
    return make_tensor(mine.data(), as_rows_and_columns(mine.layout()));
  }

  // ptxas moves a wait in front of whatever does not need its result, and so all exponentials behind the products that
  // they are to run under. A branch that hangs on their sums holds them back; sums are never negative.
  __device__ __forceinline__ static void stay_in_front(const Softmax& softmax) {
    if (softmax.row_sum[0] < 0.0f || softmax.row_sum[1] < 0.0f) __trap();
  }

  // A note is read by the lane that makes its place free: no other read can come too late.
  template <class T>
  __device__ __forceinline__ T read_by_one(const T& noted) const {
    T value{};
    if (made_anew(thread_) % 32 == 0) value = noted;
    return __shfl_sync(0xffffffff, value, 0);
  }

  // One arrival per warp: its reads are done, since its warpgroup's products are.
  __device__ __forceinline__ void release(uint64_t& empty) const {
    if (made_anew(thread_) % 32 == 0) EmptyBarrier::arrive(&empty);
  }

  // --- Keys and values ---

  __device__ __forceinline__ void wait_for_keys() const {
    Barrier::wait(&shared_.products.k_full[at_.stage()], at_.phase());
  }

  // What is said of them, when they are there.
  __device__ __forceinline__ BlockFlags flags_of_keys() const {
    return {read_by_one(shared_.notes[at_.stage()].flags.bits)};
  }

  __device__ __forceinline__ void wait_for_values() const {
    Barrier::wait(&shared_.products.v_full[at_.before().stage()], at_.before().phase());
  }

  // Rows that are no key of the sequence: padding, another sequence's, nobody's. A weight of 0 does not hide a NaN. All
  // consumers see the same blocks; each writer makes its zeros visible to wgmma before they meet, which they could not
  // do in their turns. Where values are widened, the widener does this.
  __device__ void clear_foreign_values(const WorkTile& tile) const {
    wait_for_values();
    const int32_t first_key = read_by_one(shared_.first_keys[at_.before().stage()]);
    const int32_t kv_len = tile.seqlen.kv_len;
    Element* const stage = shared_.v + at_.before().stage() * Traits::kStageElements;
    auto sV = make_tensor(make_smem_ptr(stage), typename Traits::SmemKvRows{});
    constexpr int kUnits = kHeadDim / kVec<Element>;
    Vec16<Element> zero;
    clear(zero);
    for (int32_t i = made_anew(thread_); i < kBlockN * kUnits; i += Traits::kConsumerThreads) {
      const int32_t key = first_key + i / kUnits;
      if (key < 0 || key >= kv_len) store16(&sV(i / kUnits, i % kUnits * kVec<Element>), zero);
    }
    cutlass::arch::fence_view_async_shared();
    Barriers::all();
  }

  // --- Queries ---

  // The place of the warpgroup's 64 rows of Q is also that of its results on their way out. Whoever writes there comes
  // here first: a warp writes rows of the other three as well, which may not be done with their products yet, and TMA
  // may still read the results of a tile before.
  __device__ __forceinline__ void take_place_of_q() const {
    wait_for_stores();
    Barriers::warpgroup(warpgroup());
  }

  // The warpgroup's own rows. wgmma reads Q through the async proxy: each writer makes its stores visible to it before
  // the barrier.
  __device__ void rotate_queries(const WorkTile& tile, Segment segment) {
    take_place_of_q();
    const int32_t first_row = warpgroup() * 64;
    load_queries<Element, 64, 128, Traits::kQueryPairsAhead>(
        args_, tile, segment, scale_of(tile).sign, smem_q(), [&](int32_t i) { return first_row + i; },
        made_anew(thread_));
    cutlass::arch::fence_view_async_shared();
    Barriers::warpgroup(warpgroup());
  }

  // --- Results ---

  // Whether the trust in the first block's maxima was justified. If not, the tile comes again.
  template <class Rows, class Coordinates>
  __device__ void check(TileSlot& slot, const Rows& o, const Softmax& softmax, const Coordinates& at) const {
    CUTE_UNROLL
    for (int r = 0; r < kThreadRows; ++r) {
      const bool own = TileRow::of(args_, slot.tile, get<0>(at(r, 0))).valid;
      if (own && !softmax.fits(r, o(r, 0))) atomicOr(&slot.failed, 1);
    }
  }

  template <class Acc, class Rows, class Coordinates>
  __device__ void store(const TileSlot& slot, const Acc& acc_o, Rows& o, const Softmax& softmax, const Coordinates& at,
                        float scale_log2) {
    const WorkTile& tile = slot.tile;
    const OutputRows<Element> rows{args_, tile};
    finish_rows(rows, softmax, o, at, scale_log2, thread_ % 4 == 0, factor(args_.p.v_scale, tile));
    if (args_.plan.num_splits > 1) return;
    take_place_of_q();
    stage_results(acc_o, o, at);
    const int32_t first_row = warpgroup() * 64;
    if (prefill_.out_by_tma && tile.num_positions() >= first_row + 64) {
      store_by_tma(rows, first_row, slot.careful);
    } else {
      __syncwarp();
      const int32_t first_of_warp = thread_ / 32 * 16;
      store_rows_of_warp(
          rows, smem_q(), 16, [&](int32_t i) { return first_of_warp + i; }, thread_ % 32);
    }
  }

  // Rounded, into the place of the warpgroup's rows of Q.
  template <class Acc, class Rows, class Coordinates>
  __device__ void stage_results(const Acc& acc_o, const Rows& o, const Coordinates& at) const {
    auto staging = smem_q();
    const auto rounded = convert_fragment<Element>(acc_o);
    const auto values = make_tensor(rounded.data(), o.layout());
    CUTE_UNROLL
    for (int r = 0; r < kThreadRows; ++r) {
      // The thread's columns are 8 apart, each in the next unit of the row.
      const int32_t first = staging.layout()(get<0>(at(r, 0)), get<1>(at(r, 0)));
      CUTE_UNROLL
      for (int c = 0; c < size<1>(values); c += 2) {
        const int32_t place = Traits::Rows::template behind<kBlockM>(first, c / 2 * 8);
        *reinterpret_cast<uint32_t*>(shared_.q + place) = *reinterpret_cast<const uint32_t*>(&values(r, c));
      }
    }
  }

  // All 64 rows are the tile's. The copy runs on while the next tile begins.
  // `again`: these rows may have been stored before, by a copy that must not come after this one.
  __device__ void store_by_tma(const OutputRows<Element>& rows, int32_t first_row, bool again) const {
    cutlass::arch::fence_view_async_shared();
    Barriers::warpgroup(warpgroup());
    if (thread_ % 128 != 0) return;
    if (Traits::kTrusting && again) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
    const WorkTile& tile = rows.tile;
    const bool ragged = args_.p.cu_seqlens_q != nullptr;
    const int32_t row = static_cast<int32_t>(tile.seqlen.q_row) + tile.seqlen.row(tile.positions.begin) + first_row;
    const Element* source = shared_.q + first_row * Traits::kBoxColumns;
    CUTE_UNROLL
    for (int column = 0; column < kHeadDim; column += Traits::kBoxColumns) {
      SM90_TMA_STORE_4D::copy(&prefill_.out, source, column, row, tile.head_begin, ragged ? 0 : tile.b);
      source += kBlockM * Traits::kBoxColumns;
    }
    tma_store_arrive();
  }

  __device__ __forceinline__ void wait_for_stores() const {
    if (thread_ % 128 == 0) tma_store_wait<0>();
  }

  const PrefillArgs& prefill_;
  const AttentionArgs& args_;
  Shared& shared_;
  int32_t thread_;
  RingPosition<Traits::kStages> at_;  ///< the block whose keys come next; the values that come next are those before it
};

}  // namespace dca::cuda::sm90
