// Key rotation, and rotation with the write into a cache: one memory-bound pass that stores 16 bytes at a time.
//
// A thread makes one unit (see rotary.h) of a new row of a sequence and KV head and, for an append, copies the same
// unit of the value. Lengths are read on the device; a slot behind the cache and a page that the cache has not are
// dropped.
#include <cutlass/fast_math.h>

#include "e4m3.h"
#include "kernels.h"
#include "launch_check.h"
#include "rotary.h"

namespace dca::cuda {
namespace {

constexpr int kThreads = 128;

// What both operations say about their rows.
template <class Params>
struct NewRowsArgs {
  Params p;
  int64_t num_rows;  // of all sequences, as they lie in k
  int32_t units;     // of work in a row
  cutlass::FastDivmod page_size;
};

// Row r of sequence b, and where it goes.
struct NewRow {
  int32_t b;
  int64_t batch;  // of its place in k and v
  int64_t row;
  int64_t slot;
  int64_t position;
};

// The sequence that ragged row `row` belongs to: the last b with cu_seqlens[b] <= row. -1: none.
__device__ int32_t find_sequence(const int32_t* cu_seqlens, int32_t batch, int64_t row) {
  int32_t low = 0, high = batch;
  while (low < high) {
    const int32_t middle = (low + high + 1) / 2;
    if (cu_seqlens[middle] <= row) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low < batch && cu_seqlens[low] <= row && row < cu_seqlens[low + 1] ? low : -1;
}

template <class Params>
__device__ NewRow locate(const Params& p, int64_t index) {
  NewRow at{};
  int64_t r = 0;
  if (p.cu_seqlens_k != nullptr) {
    at.b = find_sequence(p.cu_seqlens_k, p.batch, index);
    at.row = index;
    r = at.b < 0 ? 0 : index - p.cu_seqlens_k[at.b];
  } else {
    at.b = static_cast<int32_t>(index / p.seqlen_k);
    at.batch = at.b;
    at.row = r = index % p.seqlen_k;
  }
  if (at.b < 0) return at;
  at.slot = (p.cache_seqlens != nullptr ? p.cache_seqlens[at.b] : p.cache_seqlen) + r;
  at.position = at.slot - (p.cache_leftpad != nullptr ? p.cache_leftpad[at.b] : 0);
  return at;
}

template <class Element, class Params>
__device__ RotaryRow<Element> row_to_rotate(const Params& p, const NewRow& at, int32_t head) {
  RotaryRow<Element> row;
  row.data = static_cast<const Element*>(p.k.data) + at.batch * p.k.stride.batch + at.row * p.k.stride.row +
             head * p.k.stride.head;
  row.head_dim = p.head_dim;
  row.cos = row.sin = nullptr;
  if (at.position >= 0) {
    // A position past 2^31 can only come from a length that no cache holds; the remainder keeps it inside the table.
    const int64_t table = (at.position % p.chunk.chunk_len) * p.rotary.half_dim;
    row.cos = p.rotary.cos + table;
    row.sin = p.rotary.sin + table;
  }
  return row;
}

template <class Element>
__device__ Element* row_of(const TensorRef& t, int64_t batch, int64_t row, int32_t head) {
  return static_cast<Element*>(t.data) + batch * t.stride.batch + row * t.stride.row + head * t.stride.head;
}

// Calls visit(NewRow, head, unit) for the unit of work of this thread.
template <class Params, class Visit>
__device__ void with_unit(const NewRowsArgs<Params>& args, Visit&& visit) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= args.num_rows * args.p.num_heads_kv * args.units) return;
  const int64_t line = i / args.units;
  const NewRow at = locate(args.p, line / args.p.num_heads_kv);
  if (at.b >= 0) visit(at, static_cast<int32_t>(line % args.p.num_heads_kv), static_cast<int32_t>(i % args.units));
}

template <class Element>
__global__ void __launch_bounds__(kThreads) rotate_kernel(const __grid_constant__ NewRowsArgs<RotateKeysParams> args) {
  const RotateKeysParams& p = args.p;
  const RotaryUnits units = RotaryUnits::of(p.rotary, p.head_dim, kVec<Element>);
  with_unit(args, [&](const NewRow& at, int32_t head, int32_t unit) {
    Element* const out = row_of<Element>(p.out, at.batch, at.row, head);
    rotate_unit(row_to_rotate<Element>(p, at, head), p.rotary, units, unit,
                [&](int32_t column, const Vec16<Element>& x) { store16(out + column, x); });
  });
}

// 16 columns / scale, rounded once and stored.
template <class Element>
__device__ __forceinline__ void store_e4m3(cutlass::float_e4m3_t* to, const Columns<Element, 16>& x, float scale) {
  uint32_t words[4];
  CUTE_UNROLL
  for (int i = 0; i < 4; ++i) {
    words[i] = 0;
    CUTE_UNROLL
    for (int byte = 0; byte < 4; ++byte) {
      words[i] |= to_e4m3(static_cast<float>(x[4 * i + byte]) / scale) << (8 * byte);
    }
  }
  *reinterpret_cast<uint4*>(to) = {words[0], words[1], words[2], words[3]};
}

// Columns of a row that a thread makes at a time: what 16 bytes of the wider, or of e4m3, hold.
template <class Element, class Cached>
inline constexpr int kColumnsOf = std::is_same_v<Element, Cached> ? kVec<Element> : 16;

template <class Element, class Cached>
__global__ void __launch_bounds__(kThreads) append_kernel(const __grid_constant__ NewRowsArgs<AppendParams> args) {
  constexpr bool kCopies = std::is_same_v<Element, Cached>;
  constexpr int kColumns = kColumnsOf<Element, Cached>;
  using Out = std::conditional_t<kCopies, Element, float>;
  const AppendParams& p = args.p;
  const RotaryUnits units = RotaryUnits::of(p.rotary, p.head_dim, kColumns);
  with_unit(args, [&](const NewRow& at, int32_t head, int32_t unit) {
    if (at.slot < 0 || at.slot >= p.cache_slots) return;
    int64_t batch = at.b;
    int64_t slot = at.slot;
    if (p.pages.page_table != nullptr) {
      int32_t page, within;
      args.page_size(page, within, static_cast<int32_t>(at.slot));
      batch = p.pages.page_table[at.b * p.pages.stride_batch + page];
      slot = within;
      if (batch < 0 || batch >= p.pages.num_pages) return;
    }
    Cached* const key = row_of<Cached>(p.k_cache, batch, slot, head);
    Cached* const value = row_of<Cached>(p.v_cache, batch, slot, head);
    const Element* const v = static_cast<const Element*>(p.v.data) + at.batch * p.v.stride.batch +
                             at.row * p.v.stride.row + head * p.v.stride.head;
    // The unit that makes a piece of the key copies the same piece of the value.
    rotate_unit_as<Out, kColumns>(row_to_rotate<Element>(p, at, head), p.rotary, units, unit,
                                  [&](int32_t column, const Columns<Out, kColumns>& x) {
                                    if constexpr (kCopies) {
                                      store16(key + column, x);
                                      store16(value + column, load16(v + column));
                                    } else {
                                      store_e4m3(key + column, x, p.k_scale.of(head));
                                      store_e4m3(value + column, load_columns<kColumns>(v + column),
                                                 p.v_scale.of(head));
                                    }
                                  });
  });
}

template <class Params>
NewRowsArgs<Params> args_of(const Params& p, int32_t columns, int32_t page_size) {
  const int64_t rows = p.cu_seqlens_k != nullptr ? p.total_k : static_cast<int64_t>(p.batch) * p.seqlen_k;
  return {p, rows, RotaryUnits::of(p.rotary, p.head_dim, columns).count, cutlass::FastDivmod(page_size)};
}

template <class Params>
Status launch(const char* name, void (*const (&kernels)[3])(NewRowsArgs<Params>), const NewRowsArgs<Params>& args) {
  const int64_t units = args.num_rows * args.p.num_heads_kv * args.units;
  const int64_t ctas = (units + kThreads - 1) / kThreads;
  return launch_kernel(name, kernels[static_cast<int32_t>(args.p.dtype)], ctas, kThreads, 0, args.p.exec.stream, args);
}

}  // namespace

Status launch_rotate_keys(const RotateKeysParams& p) {
  using Kernel = void (*)(NewRowsArgs<RotateKeysParams>);
  static constexpr Kernel kKernels[] = {rotate_kernel<float>, rotate_kernel<cutlass::bfloat16_t>,
                                        rotate_kernel<cutlass::half_t>};
  return launch("rotate_keys", kKernels, args_of(p, static_cast<int32_t>(16 / element_size(p.dtype)), 1));
}

Status launch_rotate_and_append_kv(const AppendParams& p) {
  using Kernel = void (*)(NewRowsArgs<AppendParams>);
  using E4M3 = cutlass::float_e4m3_t;
  static constexpr Kernel kSame[] = {append_kernel<float, float>,
                                     append_kernel<cutlass::bfloat16_t, cutlass::bfloat16_t>,
                                     append_kernel<cutlass::half_t, cutlass::half_t>};
  static constexpr Kernel kE4M3[] = {append_kernel<float, E4M3>, append_kernel<cutlass::bfloat16_t, E4M3>,
                                     append_kernel<cutlass::half_t, E4M3>};
  const bool narrow = dtype_of_cache(p) == DType::Float8E4M3;
  const int32_t columns = narrow ? 16 : static_cast<int32_t>(16 / element_size(p.dtype));
  const int32_t page_size = p.pages.page_table != nullptr ? p.pages.page_size : 1;
  return launch("rotate_and_append_kv", narrow ? kE4M3 : kSame, args_of(p, columns, page_size));
}

}  // namespace dca::cuda
