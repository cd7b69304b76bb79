#include <algorithm>
#include <limits>
#include <memory>

#include "cuda_ceilings.h"
#include "cuda_memory.h"
#include "cuda_status.h"

namespace dca::bench {
namespace {

constexpr int kTrials = 7;  // the best counts: a ceiling is what was possible

struct CudaFree {
  void operator()(void* memory) const { (void)cudaFree(memory); }
};
using DeviceMemory = std::unique_ptr<void, CudaFree>;

DeviceMemory allocate(size_t bytes) {
  void* memory = nullptr;
  require_cuda(cudaMalloc(&memory, bytes), "allocating memory for a ceiling");
  return DeviceMemory(memory);
}

struct EventPair {
  cudaEvent_t start = nullptr;
  cudaEvent_t stop = nullptr;

  EventPair() {
    require_cuda(cudaEventCreate(&start), "creating an event");
    require_cuda(cudaEventCreate(&stop), "creating an event");
  }
  ~EventPair() {
    (void)cudaEventDestroy(start);
    (void)cudaEventDestroy(stop);
  }
  EventPair(const EventPair&) = delete;
  EventPair& operator=(const EventPair&) = delete;
};

// Seconds on the device of what `queue` puts on the stream.
template <class Queue>
double seconds_of(const EventPair& events, cudaStream_t stream, Queue&& queue) {
  require_cuda(cudaEventRecord(events.start, stream), "recording an event");
  queue();
  require_cuda(cudaEventRecord(events.stop, stream), "recording an event");
  require_cuda(cudaEventSynchronize(events.stop), "measuring a ceiling");
  float milliseconds = 0.0f;
  require_cuda(cudaEventElapsedTime(&milliseconds, events.start, events.stop), "reading an event");
  return 1e-3 * static_cast<double>(milliseconds);
}

// --- Matrix rate ---

constexpr int kThreads = 256;
constexpr int kBlocksPerSm = 2;  // 4 warps for each of the 4 tensor cores
constexpr int kFragments = 4;    // of A and of B: 16 independent accumulators hide the latency
constexpr int kOperandsPerThread = kFragments * (4 + 2);
constexpr double kFlopPerMma = 2.0 * 16 * 8 * 16;

template <bool kBFloat16>
__device__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (kBFloat16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

__device__ int64_t nanoseconds() {
  int64_t now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
}

// operands: kOperandsPerThread words of two random numbers each for every thread of one block, thread-major.
// sums: one number per thread of the grid. clock: cycles and nanoseconds of the first warp.
template <bool kBFloat16>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    mma_loop(const uint32_t* operands, int64_t steps, float* sums, int64_t* clock) {
  uint32_t a[kFragments][4], b[kFragments][2];
  const uint32_t* mine = operands + threadIdx.x * kOperandsPerThread;
#pragma unroll
  for (int f = 0; f < kFragments; ++f) {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[f][i] = mine[f * 6 + i];
#pragma unroll
    for (int i = 0; i < 2; ++i) b[f][i] = mine[f * 6 + 4 + i];
  }
  float d[kFragments][kFragments][4] = {};
  const int64_t first_cycle = clock64();
  const int64_t first_nanosecond = nanoseconds();
#pragma unroll 1
  for (int64_t step = 0; step < steps; ++step) {
#pragma unroll
    for (int i = 0; i < kFragments; ++i) {
#pragma unroll
      for (int j = 0; j < kFragments; ++j) mma<kBFloat16>(d[i][j], a[i], b[j]);
    }
  }
  const int64_t cycles = clock64() - first_cycle;
  const int64_t elapsed = nanoseconds() - first_nanosecond;
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    clock[0] = cycles;
    clock[1] = elapsed;
  }
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kFragments; ++i) {
#pragma unroll
    for (int j = 0; j < kFragments; ++j) sum += d[i][j][0] + d[i][j][1] + d[i][j][2] + d[i][j][3];
  }
  sums[static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x] = sum;
}

}  // namespace

MatrixRate measure_mma_rate(DType dtype, cudaStream_t stream) {
  int device = 0, num_sms = 0;
  require_cuda(cudaGetDevice(&device), "asking for the device");
  require_cuda(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device), "asking for the device");
  const int blocks = num_sms * kBlocksPerSm;
  const int64_t numbers = 2 * kThreads * kOperandsPerThread;  // two in a word
  const DeviceMemory operands = allocate(static_cast<size_t>(numbers) * 2);
  const DeviceMemory sums = allocate(static_cast<size_t>(blocks) * kThreads * sizeof(float));
  const DeviceMemory clock = allocate(2 * sizeof(int64_t));
  fill_uniform(operands.get(), dtype, numbers, 1, stream);

  const EventPair events;
  int64_t ticks[2] = {};
  const auto seconds = [&](int64_t steps) {
    const double result = seconds_of(events, stream, [&] {
      const auto kernel = dtype == DType::BFloat16 ? mma_loop<true> : mma_loop<false>;
      kernel<<<blocks, kThreads, 0, stream>>>(static_cast<const uint32_t*>(operands.get()), steps,
                                              static_cast<float*>(sums.get()), static_cast<int64_t*>(clock.get()));
      require_cuda(cudaGetLastError(), "measuring the matrix rate");
    });
    require_cuda(cudaMemcpy(ticks, clock.get(), sizeof ticks, cudaMemcpyDeviceToHost), "measuring the matrix rate");
    return result;
  };

  // Long enough that the clock settles and the launch does not count; found by doubling, on any device.
  constexpr double kLongEnough = 0.02;
  int64_t steps = 16;
  seconds(steps);  // the first launch loads the kernel
  while (seconds(steps) < kLongEnough) steps *= 2;
  MatrixRate rate;
  double best = std::numeric_limits<double>::infinity();
  for (int trial = 0; trial < kTrials; ++trial) {
    const double now = seconds(steps);
    if (now >= best) continue;
    best = now;
    if (ticks[1] > 0) rate.sm_clock_mhz = 1e3 * static_cast<double>(ticks[0]) / static_cast<double>(ticks[1]);
  }
  const double warps = static_cast<double>(blocks) * kThreads / 32;
  rate.flop_per_second = kFlopPerMma * kFragments * kFragments * static_cast<double>(steps) * warps / best;
  return rate;
}

CopyRate measure_copy_rate(size_t wanted_bytes, cudaStream_t stream) {
  size_t free_bytes = 0, total_bytes = 0;
  require_cuda(cudaMemGetInfo(&free_bytes, &total_bytes), "asking for free memory");
  const size_t bytes = std::max<size_t>(std::min(wanted_bytes, free_bytes / 3) / 16 * 16, 16);
  const DeviceMemory from = allocate(bytes), to = allocate(bytes);
  // Random, since a device may move equal bytes faster.
  fill_uniform(from.get(), DType::Float32, static_cast<int64_t>(bytes / 4), 1, stream);
  const EventPair events;
  const auto seconds = [&] {
    return seconds_of(events, stream, [&] {
      require_cuda(cudaMemcpyAsync(to.get(), from.get(), bytes, cudaMemcpyDeviceToDevice, stream), "copying");
    });
  };
  double best = seconds();
  for (int trial = 0; trial < kTrials; ++trial) best = std::min(best, seconds());
  return {2.0 * static_cast<double>(bytes) / best, static_cast<double>(bytes)};
}

}  // namespace dca::bench
