#include "ceilings.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace dca::bench {
namespace {

constexpr int kTrials = 7;  // the best counts: a ceiling is what was possible

// Calls work(thread) on num_threads threads and returns the seconds until all are done.
template <class Work>
double seconds_of(int num_threads, Work&& work) {
  const auto start = std::chrono::steady_clock::now();
  std::vector<std::thread> threads;
  for (int i = 1; i < num_threads; ++i) threads.emplace_back([&work, i] { work(i); });
  work(0);
  for (std::thread& thread : threads) thread.join();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

template <class Work>
double best_seconds_of(int num_threads, Work&& work) {
  double best = seconds_of(num_threads, work);
  for (int trial = 1; trial < kTrials; ++trial) best = std::min(best, seconds_of(num_threads, work));
  return best;
}

// --- FMA ---

constexpr int kChains = 12;  // two units of latency 4 need 8; with two operands, 12 fit in 16 registers
constexpr int64_t kSteps = 4000000;

typedef float Vec4 __attribute__((vector_size(16)));
typedef float Vec8 __attribute__((vector_size(32)));
typedef float Vec16 __attribute__((vector_size(64)));

template <class Vec>
[[gnu::always_inline]] inline float fma_chains() {
  // Unknown to the compiler, and no subnormals on the way. Chains that start alike would become one.
  volatile float factor = 0.999f;
  const float scalar = factor;
  const Vec x = scalar - Vec{};
  const Vec y = (1.0f - scalar) - Vec{};
  Vec acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = factor - Vec{};
  for (int64_t step = 0; step < kSteps; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) acc[i] = acc[i] * x + y;
  }
  float sum = 0.0f;
  for (int i = 0; i < kChains; ++i) sum += acc[i][0];
  return sum;
}

struct FmaLoop {
  float (*run)();
  int lanes;
};

#if defined(__x86_64__)
__attribute__((target("avx512f"))) float fma_avx512() { return fma_chains<Vec16>(); }
__attribute__((target("avx2,fma"))) float fma_avx2() { return fma_chains<Vec8>(); }
#endif
float fma_portable() { return fma_chains<Vec4>(); }

FmaLoop widest_fma_loop() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return {fma_avx512, 16};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {fma_avx2, 8};
#endif
  return {fma_portable, 4};
}

// --- Memory ---

// The part of a buffer that a thread works on, in whole cache lines.
struct Slice {
  char* begin;
  size_t bytes;
};

Slice slice_of(const std::pair<void*, size_t>& buffer, int thread, int num_threads) {
  constexpr size_t kLine = 64;
  const size_t share = (buffer.second / static_cast<size_t>(num_threads) + kLine - 1) / kLine * kLine;
  const size_t begin = std::min(buffer.second, share * static_cast<size_t>(thread));
  return {static_cast<char*>(buffer.first) + begin, std::min(share, buffer.second - begin)};
}

typedef uint64_t Words2 __attribute__((vector_size(16)));
typedef uint64_t Words4 __attribute__((vector_size(32)));
typedef uint64_t Words8 __attribute__((vector_size(64)));

// Reads kStreams equal parts side by side: processors follow several pages at a time, some better than one.
template <class Words, int kStreams>
[[gnu::always_inline]] inline uint64_t exclusive_or(const char* data, size_t bytes) {
  constexpr int kVecs = 256 / sizeof(Words);
  constexpr size_t kStep = kVecs * sizeof(Words);
  const size_t part = bytes / kStreams / kStep * kStep;
  Words sums[kVecs] = {};
  for (size_t i = 0; i < part; i += kStep) {
    for (int s = 0; s < kStreams; ++s) {
#pragma GCC unroll 16
      for (int k = 0; k < kVecs; ++k) {
        Words words;
        std::memcpy(&words, data + s * part + i + k * sizeof words, sizeof words);
        sums[k] ^= words;
      }
    }
  }
  uint64_t all = 0;
  for (const Words& sum : sums) {
    for (size_t lane = 0; lane < sizeof sum / sizeof all; ++lane) all ^= sum[lane];
  }
  for (size_t i = kStreams * part; i < bytes; ++i) all ^= static_cast<unsigned char>(data[i]);
  return all;
}

struct ReadLoops {
  uint64_t (*one_stream)(const char* data, size_t bytes);
  uint64_t (*four_streams)(const char* data, size_t bytes);
};

#if defined(__x86_64__)
template <int kStreams>
__attribute__((target("avx512f"))) uint64_t read_avx512(const char* data, size_t bytes) {
  return exclusive_or<Words8, kStreams>(data, bytes);
}
template <int kStreams>
__attribute__((target("avx2"))) uint64_t read_avx2(const char* data, size_t bytes) {
  return exclusive_or<Words4, kStreams>(data, bytes);
}
#endif
template <int kStreams>
uint64_t read_portable(const char* data, size_t bytes) {
  return exclusive_or<Words2, kStreams>(data, bytes);
}

ReadLoops widest_read_loops() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return {read_avx512<1>, read_avx512<4>};
  if (__builtin_cpu_supports("avx2")) return {read_avx2<1>, read_avx2<4>};
#endif
  return {read_portable<1>, read_portable<4>};
}

double total_bytes(const Buffers& buffers) {
  double total = 0.0;
  for (const auto& buffer : buffers) total += static_cast<double>(buffer.second);
  return total;
}

}  // namespace

double measure_fma_peak(int num_threads) {
  const FmaLoop loop = widest_fma_loop();
  std::vector<float> sums(static_cast<size_t>(num_threads));
  const auto run = [&](int thread) { sums[static_cast<size_t>(thread)] = loop.run(); };
  const double seconds = best_seconds_of(num_threads, run);
  return 2.0 * kChains * kSteps * loop.lanes * num_threads / seconds;
}

#if defined(DCA_BENCH_HAS_AMX)
double measure_amx_peak(int num_threads) {
  std::vector<double> flop(static_cast<size_t>(num_threads));
  const auto run = [&](int thread) { flop[static_cast<size_t>(thread)] = multiply_tiles_of_one_thread(); };
  const double seconds = best_seconds_of(num_threads, run);
  return flop[0] * num_threads / seconds;
}
#endif

double measure_read_bandwidth(const Buffers& buffers, int num_threads) {
  std::vector<uint64_t> sums(static_cast<size_t>(num_threads));
  const auto seconds_by = [&](uint64_t (*read)(const char*, size_t)) {
    return best_seconds_of(num_threads, [&](int thread) {
      uint64_t sum = 0;
      for (const auto& buffer : buffers) {
        const Slice slice = slice_of(buffer, thread, num_threads);
        sum ^= read(slice.begin, slice.bytes);
      }
      sums[static_cast<size_t>(thread)] = sum;
    });
  };
  const ReadLoops loops = widest_read_loops();
  return total_bytes(buffers) / std::min(seconds_by(loops.one_stream), seconds_by(loops.four_streams));
}

double measure_copy_bandwidth(const Buffers& from, const Buffers& to, int num_threads) {
  const double seconds = best_seconds_of(num_threads, [&](int thread) {
    for (size_t i = 0; i < from.size(); ++i) {
      const Slice source = slice_of(from[i], thread, num_threads);
      std::memcpy(slice_of(to[i], thread, num_threads).begin, source.begin, source.bytes);
    }
  });
  return 2.0 * total_bytes(from) / seconds;
}

}  // namespace dca::bench
