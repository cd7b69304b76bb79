// A tile of few query rows over a long cache: what decode kernels compute, whatever brings them the keys.
//
// One CTA owns up to 16 rows - the query heads of one KV head times a few tokens - and one split of the keys. Its warps
// share nothing but Q: each walks the blocks of kBlockN keys and takes kWarpKeys of every block through a ring of its
// own (decode_ring.h), with an online softmax of its own, so that a load is waited for by the one warp that needs it.
// At the end the warps' results are joined through shared memory; the results of the splits, by launch_combine.
//
// Shared memory: Q for the three segments (3, 16, kHeadDim) | per warp a ring of ({K, V}, kStages, kWarpKeys,
// kHeadDim), whose place O, max and sum of the warps take at the end.
//
// The keys and values of a cache of e4m3 are widened between shared memory and the products (e4m3_products.h); their
// scales are factors on the logits and on the rows of O.
#pragma once

#include "decode_ring.h"
#include "dependent_launch.h"
#include "e4m3_products.h"
#include "output_rows.h"

namespace dca::cuda::sm80 {

/// `Loads` brings a warp's blocks into its ring: CopyLoads (decode_ring.h), or TmaLoads of Hopper.
template <class Traits, class Loads>
class DecodeTile {
  using Element = typename Traits::Element;
  using Operand = typename Traits::Operand;
  using Mma = typename Traits::Mma;
  static constexpr int kHeadDim = Traits::kHeadDim;
  static constexpr int kBlockM = Traits::kBlockM;
  static constexpr int kWarpKeys = Traits::kWarpKeys;
  static constexpr int kThreadRows = 2;
  using Softmax = OnlineSoftmax<kThreadRows, Traits::kHeadroom>;
  using Place = std::conditional_t<Traits::kE4M3, ColumnsAsRead<Element>, ColumnsInPlace>;

 public:
  /// `shared`: kSharedBytes, the rings of `loads` among them.
  __device__ DecodeTile(const AttentionArgs& args, const WorkTile& tile, unsigned char* shared, Loads& loads)
      : args_(args),
        tile_(tile),
        loads_(loads),
        ring_(loads.ring()),
        smem_q_(reinterpret_cast<Operand*>(shared)),
        exchange_(reinterpret_cast<float*>(shared + Traits::kQueryBytes)),
        warp_(static_cast<int32_t>(threadIdx.x) / 32),
        lane_(static_cast<int32_t>(threadIdx.x) % 32),
        scale_(LogitScale::of(tile.scale * factor(args.p.k_scale))),
        place_(place_of(scale_)) {}

  __device__ void run() {
    loads_.begin();
    rotate_queries();
    __syncthreads();

    auto acc_o = partition_fragment_C(Mma{}, Shape<Int<kBlockM>, Int<kHeadDim>>{});
    clear(acc_o);
    auto o = make_tensor(acc_o.data(), as_rows_and_columns(acc_o.layout()));
    Softmax softmax;
    auto tSrQ = Mma{}.get_slice(lane_).partition_fragment_A(smem_q(Segment::Intra));
    [[maybe_unused]] int32_t segment = -1;
    for (KeyBlock block = loads_.next(); block.count > 0; loads_.advance(), block = loads_.next()) {
      auto acc_s = partition_fragment_C(Mma{}, Shape<Int<kBlockM>, Int<kWarpKeys>>{});
      if constexpr (Traits::kQueriesInRegisters) {
        if (segment != static_cast<int32_t>(block.segment)) {
          segment = static_cast<int32_t>(block.segment);
          read_queries(tSrQ, block.segment);
        }
      }
      multiply_qk_of_block(acc_s, tSrQ, block.segment);
      auto s = make_tensor(acc_s.data(), as_rows_and_columns(acc_s.layout()));
      if (loads_.masked()) loads_.mask(s, coordinates<kWarpKeys>(), block);
      softmax.apply(softmax.advance(s, scale_.magnitude_log2), o);
      if constexpr (Traits::kE4M3) {
        multiply_pv_e4m3<Mma>(acc_o, acc_s, ring_.smem_vt(loads_.stage()), lane_);
      } else {
        multiply_pv<Mma>(acc_o, acc_s, ring_.smem_vt(loads_.stage()), lane_);
      }
    }
    loads_.end();
    admit_next_kernel();
    softmax.finish();
    publish(o, softmax);
    __syncthreads();
    join_and_store();
  }

 private:
  // On products with K, or with V.
  __device__ float factor(const CacheScale& scale) const {
    return cache_factor<Operand, typename Traits::Cached>(scale, tile_.kv_head);
  }

  // How Q is written, and what that leaves of `scale`.
  __device__ static Place place_of(LogitScale& scale) {
    if constexpr (Traits::kE4M3) {
      return {QueryPower<Element>::out_of(scale)};
    } else {
      return {};
    }
  }

  __device__ Operand* q_of(Segment segment) const {
    return smem_q_ + static_cast<int32_t>(segment) * kBlockM * kHeadDim;
  }
  __device__ auto smem_q(Segment segment) const {
    return make_tensor(make_smem_ptr(q_of(segment)), typename Traits::SmemQ{});
  }

  // (rows, columns) of this thread's accumulators -> (row, column).
  template <int kColumns>
  __device__ auto coordinates() const {
    const auto all = make_identity_tensor(Shape<Int<kBlockM>, Int<kColumns>>{});
    const auto mine = Mma{}.get_slice(lane_).partition_C(all);
    return make_tensor(mine.data(), as_rows_and_columns(mine.layout()));
  }

  // Q for each segment of the walk: the warps reach the switches at different times.
  __device__ void rotate_queries() {
    for (int32_t i = 0; i < kNumSegments; ++i) {
      if (tile_.ranges.keys[i].empty()) continue;
      const Segment segment = static_cast<Segment>(i);
      load_queries<Element, kBlockM, Traits::kThreads, 4>(
          args_, tile_, segment, scale_.sign, smem_q(segment), [](int32_t row) { return row; },
          static_cast<int32_t>(threadIdx.x), place_);
    }
  }

  template <class Fragment>
  __device__ __forceinline__ void read_queries(Fragment& tSrQ, Segment segment) const {
    const auto copy_a = make_tiled_copy_A(Copy_Atom<SM75_U32x4_LDSM_N, Operand>{}, Mma{});
    const auto thr_copy_a = copy_a.get_slice(lane_);
    copy(copy_a, thr_copy_a.partition_S(smem_q(segment)), thr_copy_a.retile_D(tSrQ));
  }

  // S = Q K^T of the warp's keys; Q is in tSrQ already, or read as it is needed.
  template <class Acc, class Fragment>
  __device__ __forceinline__ void multiply_qk_of_block(Acc& acc_s, const Fragment& tSrQ, Segment segment) const {
    const auto sK = ring_.smem_k(loads_.stage());
    if constexpr (Traits::kE4M3 && Traits::kQueriesInRegisters) {
      multiply_qk_e4m3<Mma>(
          acc_s, [&](auto k) { return tSrQ(_, _, k); }, sK, lane_);
    } else if constexpr (Traits::kE4M3) {
      multiply_qk_e4m3<Mma>(
          acc_s, [&](auto k) { return query_step(segment, k); }, sK, lane_);
    } else if constexpr (Traits::kQueriesInRegisters) {
      multiply_qk_registers<Mma>(acc_s, tSrQ, sK, lane_);
    } else {
      multiply_qk<Mma>(acc_s, smem_q(segment), sK, lane_);
    }
  }

  // Step k of Q's fragments out of shared memory.
  template <class Step>
  __device__ __forceinline__ auto query_step(Segment segment, Step k) const {
    const auto sQ = smem_q(segment);
    const auto copy_a = make_tiled_copy_A(Copy_Atom<SM75_U32x4_LDSM_N, Operand>{}, Mma{});
    const auto thr_copy_a = copy_a.get_slice(lane_);
    auto all = Mma{}.get_slice(lane_).partition_fragment_A(sQ);  // of which only this step becomes registers
    copy(copy_a, thr_copy_a.partition_S(sQ)(_, _, k), thr_copy_a.retile_D(all)(_, _, k));
    auto step = make_fragment_like(all(_, _, k));
    copy(all(_, _, k), step);
    return step;
  }

  // exchange: O (kWarps, kBlockM, kExchangeRow) | max in powers of two (kWarps, kBlockM) | sum (kWarps, kBlockM)
  __device__ float* exchange_o(int32_t warp, int32_t row) const {
    return exchange_ + (warp * kBlockM + row) * Traits::kExchangeRow;
  }
  __device__ float& exchange_max(int32_t warp, int32_t row) const {
    return exchange_[Traits::kWarps * kBlockM * Traits::kExchangeRow + warp * kBlockM + row];
  }
  __device__ float& exchange_sum(int32_t warp, int32_t row) const {
    return exchange_[Traits::kWarps * kBlockM * (Traits::kExchangeRow + 1) + warp * kBlockM + row];
  }

  template <class Rows>
  __device__ void publish(const Rows& o, const Softmax& softmax) {
    __syncthreads();  // all warps are done with their rings
    const auto at = coordinates<kHeadDim>();
    CUTE_UNROLL
    for (int r = 0; r < kThreadRows; ++r) {
      const int32_t row = get<0>(at(r, 0));
      publish_row(o, at, r, exchange_o(warp_, row));
      if (lane_ % 4 == 0) {
        exchange_max(warp_, row) = softmax.row_max[r] * scale_.magnitude_log2;
        exchange_sum(warp_, row) = softmax.row_sum[r];
      }
    }
  }

  template <class Rows, class Coordinates>
  __device__ __forceinline__ void publish_row(const Rows& o, const Coordinates& at, int r, float* row) const {
    if constexpr (Traits::kE4M3) {  // two column tiles are the even and the odd channels of 16
      CUTE_UNROLL
      for (int c = 0; c < size<1>(o); c += 4) {
        const int32_t channel = get<1>(at(r, c)) + lane_ % 4 * 2;
        *reinterpret_cast<float4*>(row + channel) = {o(r, c), o(r, c + 2), o(r, c + 1), o(r, c + 3)};
      }
    } else {
      CUTE_UNROLL
      for (int c = 0; c < size<1>(o); c += 2) {
        *reinterpret_cast<float2*>(row + get<1>(at(r, c))) = {o(r, c), o(r, c + 1)};
      }
    }
  }

  __device__ void join_and_store() {
    const OutputRows<Element> rows{args_, tile_};
    constexpr int kUnits = kHeadDim / 8;
    for (int32_t i = threadIdx.x; i < kBlockM * kUnits; i += Traits::kThreads) {
      const int32_t row = i / kUnits;
      const int32_t column = i % kUnits * 8;
      const TileRow at = TileRow::of(args_, tile_, row);
      if (!at.valid || column >= args_.p.head_dim) continue;
      float largest = -INFINITY;
      for (int w = 0; w < Traits::kWarps; ++w) largest = fmaxf(largest, exchange_max(w, row));
      float sum = 0.0f;
      float joined[8] = {};
      for (int w = 0; w < Traits::kWarps; ++w) {
        if (exchange_sum(w, row) == 0.0f) continue;
        const float weight = exp2_approx(exchange_max(w, row) - largest);
        sum += weight * exchange_sum(w, row);
        const float* const part = exchange_o(w, row) + column;
        CUTE_UNROLL
        for (int c = 0; c < 8; ++c) joined[c] += weight * part[c];
      }
      const float inverse = sum == 0.0f ? 0.0f : factor(args_.p.v_scale) / sum;
      CUTE_UNROLL
      for (int c = 0; c < 8; ++c) joined[c] *= inverse;
      store_unit(rows, tile_.seqlen.row(at.position), at.head, column, joined);
      if (column == 0) {
        rows.store_lse(tile_.seqlen.row(at.position), at.head,
                       sum == 0.0f ? -INFINITY : (largest + Softmax::log2_of(sum)) * kLn2);
      }
    }
  }

  __device__ void store_unit(const OutputRows<Element>& rows, int32_t row, int32_t head, int32_t column,
                             const float (&x)[8]) const {
    if (args_.plan.num_splits > 1) {
      float* const accum = rows.out_accum(row, head) + column;
      *reinterpret_cast<float4*>(accum) = {x[0], x[1], x[2], x[3]};
      *reinterpret_cast<float4*>(accum + 4) = {x[4], x[5], x[6], x[7]};
      return;
    }
    Vec16<Element> rounded;
    CUTE_UNROLL
    for (int c = 0; c < 8; ++c) rounded[c] = static_cast<Element>(x[c]);
    store16(rows.out(row, head) + column, rounded);
  }

  const AttentionArgs& args_;
  const WorkTile& tile_;
  Loads& loads_;
  const DecodeRing<Traits> ring_;
  Operand* const smem_q_;
  float* const exchange_;
  const int32_t warp_;
  const int32_t lane_;
  LogitScale scale_;
  const Place place_;
};

}  // namespace dca::cuda::sm80
