// Tensors in global memory as TMA sees them: (head_dim, rows, heads, sequences or pages), and boxes of them.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <string>

#include <cutlass/cuda_host_adapter.hpp>

#include "dca/params.h"

namespace dca::cuda::sm90 {

/// The extents of a 4-dimensional tensor that are not head_dim's.
struct TensorExtents {
  int64_t rows;
  int32_t heads;
  int64_t batch;
};

/// What one TMA copies: columns x rows of one head. A row of `columns` elements is as wide as the swizzle, 128, 64 or
/// 32 bytes.
struct Box {
  int32_t columns;
  int32_t rows;
};

constexpr CUtensorMapDataType tensor_map_type(DType dtype) {
  return dtype == DType::BFloat16  ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
         : dtype == DType::Float16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                   : CU_TENSOR_MAP_DATA_TYPE_UINT8;
}

constexpr CUtensorMapSwizzle tensor_map_swizzle(int64_t row_bytes) {
  return row_bytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
         : row_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                           : CU_TENSOR_MAP_SWIZZLE_32B;
}

/// Strides of dimensions of one entry may be anything in the parameters, but not in a tensor map. L2 fetches what a box
/// has of a row, 128 bytes; 256, the other half of a row of head_dim 128 as well, made decode 8 % slower on an H200.
inline Status encode_tensor_map(const char* name, const void* data, const Strides& stride, DType dtype,
                                int32_t head_dim, const TensorExtents& extents, const Box& box, CUtensorMap* map) {
  const int64_t element_bytes = dtype == DType::Float8E4M3 ? 1 : 2;  // else bf16 or fp16
  const auto bytes = [&](int64_t extent, int64_t step, int64_t otherwise) {
    return static_cast<cuuint64_t>((extent > 1 ? step : otherwise) * element_bytes);
  };
  const cuuint64_t shape[] = {static_cast<cuuint64_t>(head_dim), static_cast<cuuint64_t>(extents.rows),
                              static_cast<cuuint64_t>(extents.heads), static_cast<cuuint64_t>(extents.batch)};
  const cuuint64_t strides[] = {bytes(extents.rows, stride.row, head_dim), bytes(extents.heads, stride.head, head_dim),
                                bytes(extents.batch, stride.batch, head_dim)};
  const cuuint32_t box_shape[] = {static_cast<cuuint32_t>(box.columns), static_cast<cuuint32_t>(box.rows), 1, 1};
  const cuuint32_t steps[] = {1, 1, 1, 1};
  const CUresult result = CUTLASS_CUDA_DRIVER_WRAPPER_CALL(cuTensorMapEncodeTiled)(
      map, tensor_map_type(dtype), 4, const_cast<void*>(data), shape, strides, box_shape, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, tensor_map_swizzle(box.columns * element_bytes),
      CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result == CUDA_SUCCESS) return {};
  return {StatusCode::Internal, std::string("cuTensorMapEncodeTiled refused ") + name + " (error " +
                                    std::to_string(static_cast<int>(result)) + ")"};
}

}  // namespace dca::cuda::sm90
