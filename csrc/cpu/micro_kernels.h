// The inner products of the CPU backend behind one interface. micro_kernels.inc is the only implementation; it is
// compiled once per instruction set, and the best one that the machine can run is chosen at run time.
//
// All floating-point work is fp32. Row-major matrices come as pointer and row stride in elements.
#pragma once

#include <cstdint>

#include "dca/params.h"

namespace dca::cpu {

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

struct MicroKernels {
  const char* isa;
  int32_t lanes;  ///< floats per vector register: fp32 buffers have rows of a multiple of this
  int32_t panel;  ///< keys per packed panel: blocks of packed keys are padded to a multiple of this

  /// dst[0, n) = src in fp32.
  void (*load_row)(const void* src, DType dtype, int32_t n, float* dst);

  /// dst[0, n) = src rounded to dtype, which is not Int8.
  void (*store_row)(const float* src, DType dtype, int32_t n, void* dst);

  /// dst[0, n) = src / scale, rounded to nearest even, in [-127, 127]. Returns scale = max |src| / 127. Where that is
  /// 0, dst is 0; where src has a NaN or an infinity, dst is 0 and scale NaN.
  float (*quantize_row)(const float* src, int32_t n, int8_t* dst);

  /// Turns the first 2 * half channels of `row` by one row of the rotary tables, then multiplies all `dim` by `scale`.
  void (*rotate_row)(float* row, int32_t dim, const float* cos, const float* sin, int32_t half, bool interleaved,
                     float scale);

  /// Packs n keys of `dim` channels into panels: element (j, c) at [j / panel][c][j % panel]. The last panel is filled
  /// up with zeros.
  void (*pack_keys)(HeadRows keys, int32_t n, int32_t dim, float* panels);

  /// s (m, n rounded up to panel) = q (m, dim) * packed keys^T.
  void (*qk_packed)(const float* q, int64_t ldq, int32_t m, const float* panels, int32_t n, int32_t dim, float* s,
                    int64_t lds);

  /// s (m, n) = q (m, dim) * keys (n, dim)^T, keys read where they are. dim is a multiple of lanes.
  void (*qk_rows)(const float* q, int64_t ldq, int32_t m, HeadRows keys, int32_t n, int32_t dim, float* s, int64_t lds);

  /// o (m, dim) += p (m, n) * values (n, dim). dim is a multiple of lanes.
  void (*pv)(const float* p, int64_t ldp, int32_t m, HeadRows values, int32_t n, int32_t dim, float* o, int64_t ldo);

  /// s (m, n): column j times scales[j * scale_stride].
  void (*scale_columns)(float* s, int64_t lds, int32_t m, int32_t n, const float* scales, int64_t scale_stride);

  /// One step of the online softmax in base 2 on one row of logits: updates the running maximum and sum, rescales
  /// o (dim) where the maximum grew, and turns s[0, n) into weights. s has room up to a multiple of lanes.
  void (*softmax_row)(float* s, int32_t n, float* row_max, float* row_sum, float* o, int32_t dim);
};

/// One per compiled instruction set, best last; see micro_kernels.cpp.
extern const MicroKernels kMicroKernelsPortable;
#if defined(DCA_CPU_HAS_X86)
extern const MicroKernels kMicroKernelsAvx2;
extern const MicroKernels kMicroKernelsAvx512;
#endif

/// The set in use: the best that this machine runs, or the one that the environment variable DCA_CPU_ISA names.
/// nullptr if that one is unknown, not compiled or not supported here.
const MicroKernels* micro_kernels();

/// Names of the compiled sets, best first, separated by commas.
const char* compiled_instruction_sets();

}  // namespace dca::cpu
