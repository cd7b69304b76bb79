// The inner products of the CPU backend behind one interface. micro_kernels.inc is the only implementation; it is
// compiled once per instruction set, and the best one that the machine can run is chosen at run time.
//
// All sums are fp32. Row-major matrices come as pointer and row stride in elements.
#pragma once

#include <cstdint>

#include "dca/params.h"

namespace dca::cpu {

inline constexpr int32_t kBlockKeys = 128;  ///< keys that a tile packs at a time; the row stride of its logits
inline constexpr int32_t kPanelGap = 16;    ///< words between panels of values
inline constexpr int32_t kMaxGroupRows = 16;
inline constexpr int32_t kMaxStripRows = 32;
inline constexpr int32_t kMaxBlocks = 8;

/// Rows of one attention head in a cache: row r at data + r * stride elements, head_dim contiguous elements each. In an
/// Int8 cache they stand for themselves times scales[r * scale_stride]; the micro-kernels take them without it.
struct HeadRows {
  const void* data = nullptr;
  int64_t stride = 0;
  DType dtype = DType::Float32;
  const float* scales = nullptr;
  int64_t scale_stride = 0;

  HeadRows from(int64_t row) const {
    return {static_cast<const char*>(data) + row * stride * static_cast<int64_t>(element_size(dtype)), stride, dtype,
            scales == nullptr ? nullptr : scales + row * scale_stride, scale_stride};
  }
};

/// `count` neighbouring rows of `heads` neighbouring heads. The products take at most
/// MicroKernels::run_keys of them, and are quickest over as many.
struct RunRows {
  HeadRows first;  ///< of the first head
  int64_t head_stride = 0;
  int64_t head_scale_stride = 0;
  int32_t heads = 1;
  int32_t count = 0;
  const void* next = nullptr;  ///< rows at the same strides that will be wanted soon; it may point anywhere

  HeadRows head(int32_t h) const {
    HeadRows rows = first;
    rows.data = static_cast<const char*>(rows.data) + h * head_stride * static_cast<int64_t>(element_size(rows.dtype));
    if (rows.scales != nullptr) rows.scales += h * head_scale_stride;
    return rows;
  }
};

/// Up to kBlockKeys keys or values of one head, wherever they lie.
struct BlockRows {
  const void* row[kBlockKeys];
  float scale[kBlockKeys] = {};  ///< of each row of an Int8 cache; what is packed is without it
  int32_t count = 0;
  DType dtype = DType::Float32;
};

/// Rows of the online softmax, in base 2: how many logits of a block they see, and what they keep of those before. All
/// of them are multiplied by one factor, which row_max is without.
struct SoftmaxRows {
  int32_t m;
  const int32_t* counts;  ///< (m)
  float* row_max;         ///< (m)
  float* row_sum;         ///< (m)
  float* o;               ///< (m, dim), rows ldo floats apart
  int64_t ldo;
  int32_t dim;
};

/// What the logits and the weights of a block are multiplied by.
struct BlockFactors {
  float logits;         ///< the one of SoftmaxRows, positive (or NaN)
  const float* keys;    ///< (kBlockKeys) also the logits of each key; nullptr: nothing
  const float* values;  ///< (kBlockKeys) the weights of each key; nullptr: nothing
};

/// A query tile and a block of keys and values, all packed: its products, and the softmax between them
/// (simd_packed.inc, simd_tiles.inc, simd_packed_softmax.inc).
///
/// Operands are stored in words of 32 bits, each one fp32 number or more numbers of fewer bits; buffers of words have
/// room for whole groups of rows and for kBlockKeys keys.
struct PackedProducts {
  int32_t numbers_per_word;
  int32_t depth_words;  ///< operands end with whole steps of so many words: what is missing is 0
  int32_t group_rows;   ///< rows that a product takes at a time, up to kMaxGroupRows
  int32_t strip_rows;   ///< rows best taken one after the other by each product, whole groups, up to kMaxStripRows
  int32_t blocks;       ///< blocks best packed at a time, up to kMaxBlocks

  /// A thread's products lie between these two; either may be nullptr.
  void (*begin)();
  void (*end)();

  /// Packs a group: m rows of q (m, dim), with zeros behind them up to whole vectors.
  void (*pack_queries)(const float* q, int64_t ldq, int32_t m, int32_t dim, float* packed);

  void (*pack_keys)(const BlockRows& keys, int32_t dim, float* packed);

  /// Returns whether all values are finite.
  bool (*pack_values)(const BlockRows& values, int32_t dim, float* packed);

  /// s (m rounded up to groups, n rounded up to a panel; rows of kBlockKeys floats) = queries * keys^T.
  void (*qk)(const float* queries, int32_t m, const float* keys, int32_t n, int32_t dim, float* s);

  /// One step of the online softmax, as MicroKernels::softmax_rows. Leaves n weights in each row, in words: those of
  /// keys that it does not see are 0. Where `trusting` that logits have hardly grown, it may return false, and only s
  /// has changed: it is to be computed again, and looked at.
  bool (*softmax)(float* s, const SoftmaxRows& rows, int32_t n, const BlockFactors& factors, bool trusting);

  /// o (m rounded up to groups, dim rounded up to lanes) += weights (rows of kBlockKeys words) * values (n, dim).
  void (*pv)(const float* p, int32_t m, const float* values, int32_t n, int32_t dim, float* o, int64_t ldo);
};

struct MicroKernels {
  const char* isa;
  int32_t lanes;  ///< floats per vector register: fp32 buffers have rows of a multiple of this
  int32_t panel;  ///< words side by side in packed keys and values, a multiple of lanes and a divisor of kBlockKeys

  /// dst[0, n) = src in fp32.
  void (*load_row)(const void* src, DType dtype, int32_t n, float* dst);

  /// dst[0, n) = src rounded to dtype, which is not Int8.
  void (*store_row)(const float* src, DType dtype, int32_t n, void* dst);

  /// dst[0, n) = src / scale, rounded to nearest even, in [-127, 127]. Returns scale = max |src| / 127. Where that is
  /// 0, dst is 0; where src has a NaN or an infinity, dst is 0 and scale NaN.
  float (*quantize_row)(const float* src, int32_t n, int8_t* dst);

  /// sum[0, n) += weight * src.
  void (*add_scaled)(const void* src, DType dtype, float weight, int32_t n, float* sum);

  /// Turns the first 2 * half channels of `row` by one row of the rotary tables.
  void (*rotate_row)(float* row, const float* cos, const float* sin, int32_t half, bool interleaved);

  /// One step of the online softmax on rows of s, kBlockKeys floats apart, whose factor is positive (or NaN): updates
  /// maxima and sums, rescales the rows of o whose maximum grew, and turns logits into weights.
  void (*softmax_rows)(float* s, const SoftmaxRows& rows, float factor);

  /// The largest count of RunRows. So few rows at a distance of 4 KiB share the ways of one set of a small L1 cache.
  int32_t (*run_keys)(DType cached);

  /// How many runs later is what RunRows::next should point to, of runs of so many bytes.
  int32_t (*runs_ahead)(int64_t bytes);

  /// The products below have forms of their own for rows of q and o, which depend on the dtype of the cache. Puts a row
  /// of q into its form, and a row of o back.
  void (*pack_query_row)(float* row, DType cached, int32_t dim);
  void (*unpack_output_row)(float* row, DType cached, int32_t dim);

  /// s = factor * q * keys^T for m query rows of each head, keys read where they are. q (heads * m, dim), factors
  /// (heads * m), equal for the rows of a head, and s (heads * m, count; rows of kBlockKeys floats) are in the order of
  /// the heads. dim is a multiple of lanes.
  void (*qk_rows)(const float* q, const float* factors, int32_t m, const RunRows& keys, int32_t dim, float* s);

  /// o (heads * m, dim) += p (heads * m, count; rows of kBlockKeys floats) * values, in the same way.
  void (*pv_rows)(const float* p, int32_t m, const RunRows& values, int32_t dim, float* o);

  /// s (heads * m, count): columns times the scales of the rows of their head, if there are any. Columns
  /// that a row does not see may become NaN.
  void (*scale_columns)(float* s, int32_t m, const RunRows& rows);

  PackedProducts fp32;
  const PackedProducts* bfloat16;  ///< of bfloat16 queries over keys and values of 16 or 8 bits; nullptr: as fp32
};

/// One per compiled instruction set; see micro_kernels.cpp.
extern const MicroKernels kMicroKernelsPortable;
extern const MicroKernels kMicroKernelsPortableBFloat16;  ///< for tests: pairs of bfloat16 without the instruction
#if defined(DCA_CPU_HAS_X86)
extern const MicroKernels kMicroKernelsAvx2;
extern const MicroKernels kMicroKernelsAvx512;
#endif
#if defined(DCA_CPU_HAS_AVX512_BF16)
extern const MicroKernels kMicroKernelsAvx512BFloat16;
#endif
#if defined(DCA_CPU_HAS_AMX)
extern const MicroKernels kMicroKernelsAmxBFloat16;

/// Asks the system for AMX's tile registers, which a process has only on request. False where the processor or the
/// system has none. (C's linkage, so that a test can put an emulator in its place.)
extern "C" bool dca_cpu_request_amx();
#endif

/// The set in use: the best that this machine runs, or the one that the environment variable DCA_CPU_ISA names.
/// nullptr if that one is unknown, not compiled or not supported here.
const MicroKernels* micro_kernels();

/// Names of the compiled sets, best first, separated by commas.
const char* compiled_instruction_sets();

}  // namespace dca::cpu
