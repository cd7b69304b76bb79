#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <stdexcept>

#include "cuda_memory.h"
#include "cuda_status.h"

namespace dca::bench {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 1024;  // the loops stride over the grid, so any number is right

// A bijection of 64-bit numbers that mixes well enough for benchmark data: multiply and fold, twice.
__device__ uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 31)) * 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 29)) * 0xD6E8FEB86659FD93u;
  return x ^ (x >> 32);
}

__device__ void store(float* to, float x) { *to = x; }
__device__ void store(__nv_bfloat16* to, float x) { *to = __float2bfloat16(x); }
__device__ void store(__half* to, float x) { *to = __float2half(x); }
__device__ void store(__nv_fp8_e4m3* to, float x) { *to = __nv_fp8_e4m3(x); }

template <class Element>
__global__ void __launch_bounds__(kThreads) fill(Element* data, int64_t count, uint64_t seed) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += step) {
    // 24 bits are what a float holds.
    const uint32_t bits = static_cast<uint32_t>(mix(static_cast<uint64_t>(i) + (seed << 48)) >> 40);
    store(data + i, static_cast<float>(bits) * 0x1p-23f - 1.0f);
  }
}

__global__ void __launch_bounds__(kThreads) read_all(uint4* data, int64_t count) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  uint32_t sum = 0;
#pragma unroll 4
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += step) {
    const uint4 x = data[i];
    sum += x.x ^ x.y ^ x.z ^ x.w;
  }
  if (sum == 0x5EED5EEDu) data[0].x = sum;  // so that the compiler believes that the sum is wanted
}

}  // namespace

void fill_uniform(void* data, DType dtype, int64_t count, uint64_t seed, cudaStream_t stream) {
  switch (dtype) {
    case DType::Float32:
      fill<<<kBlocks, kThreads, 0, stream>>>(static_cast<float*>(data), count, seed);
      break;
    case DType::BFloat16:
      fill<<<kBlocks, kThreads, 0, stream>>>(static_cast<__nv_bfloat16*>(data), count, seed);
      break;
    case DType::Float16:
      fill<<<kBlocks, kThreads, 0, stream>>>(static_cast<__half*>(data), count, seed);
      break;
    case DType::Float8E4M3:
      fill<<<kBlocks, kThreads, 0, stream>>>(static_cast<__nv_fp8_e4m3*>(data), count, seed);
      break;
    case DType::Int8:
      throw std::logic_error("a cache of int8 is for the CPU");
    case DType::Same:
      throw std::logic_error("a tensor has a dtype of its own");
  }
  require_cuda(cudaGetLastError(), "filling a tensor");
}

void read_through(void* data, size_t bytes, cudaStream_t stream) {
  read_all<<<kBlocks, kThreads, 0, stream>>>(static_cast<uint4*>(data), static_cast<int64_t>(bytes / 16));
  require_cuda(cudaGetLastError(), "flushing the cache");
}

}  // namespace dca::bench
