// What AMX's tile unit costs, and what it takes from the vector units beside it: loops of nothing else, on one thread.
// docs/performance.md says what the kernels make of it. Exit code 77 where the kernels in use are not those of AMX.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>

#include "amx_unit.h"
#include "ceilings.h"

namespace {

using dca::bench::Tiles;

constexpr int kTrials = 9;  // the best counts: a limit is what was possible
constexpr int kRepeats = 2000;
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kL1Bytes = 16 << 10;
constexpr int64_t kL2Bytes = 512 << 10;

template <class Loop>
double nanoseconds_of(Loop&& loop) {
  double best = 1e30;
  for (int trial = 0; trial < kTrials; ++trial) {
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < kRepeats; ++i) loop();
    const std::chrono::duration<double, std::nano> time = std::chrono::steady_clock::now() - start;
    best = std::min(best, time.count() / kRepeats);
  }
  return best;
}

// Eight independent operations on vectors of 64 bytes.
#define EIGHT(operation)                                                                    \
  operation " %%zmm16, %%zmm17, %%zmm0\n" operation " %%zmm16, %%zmm17, %%zmm1\n" operation \
            " %%zmm16, %%zmm17, %%zmm2\n" operation " %%zmm16, %%zmm17, %%zmm3\n" operation \
            " %%zmm16, %%zmm17, %%zmm4\n" operation " %%zmm16, %%zmm17, %%zmm5\n" operation \
            " %%zmm16, %%zmm17, %%zmm6\n" operation " %%zmm16, %%zmm17, %%zmm7"
#define OPERATIONS(name, operation)                                                                        \
  void name(int times) {                                                                                   \
    for (int i = 0; i < times; ++i) {                                                                      \
      asm volatile(EIGHT(operation) : : : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7"); \
    }                                                                                                      \
  }
OPERATIONS(multiply_vectors, "vfmadd231ps")
OPERATIONS(add_vectors, "vaddps")

// Operations of a vector unit in a nanosecond, alone or with a product of tiles before every 64 of them.
double vectors_per_nanosecond(void (*operations)(int), bool beside_tiles) {
  constexpr int kSteps = 32;
  const double time = nanoseconds_of([&] {
    for (int i = 0; i < kSteps; ++i) {
      if (beside_tiles) asm volatile("tdpbf16ps %tmm6, %tmm4, %tmm0");
      operations(8);
    }
  });
  return kSteps * 64 / time;
}

double load_time(const char* memory, int64_t bytes, bool past_l1) {
  return nanoseconds_of([&] {
           for (int64_t i = 0; i < bytes; i += kTileBytes) {
             if (past_l1) {
               asm volatile("tileloaddt1 (%0,%1,1), %%tmm4" : : "r"(memory + i), "r"(int64_t{64}) : "memory");
             } else {
               asm volatile("tileloadd (%0,%1,1), %%tmm4" : : "r"(memory + i), "r"(int64_t{64}) : "memory");
             }
           }
         }) *
         kTileBytes / static_cast<double>(bytes);
}

double store_time(char* memory, int64_t bytes) {
  return nanoseconds_of([&] {
           for (int64_t i = 0; i < bytes; i += kTileBytes) {
             asm volatile("tilestored %%tmm0, (%0,%1,1)" : : "r"(memory + i), "r"(int64_t{64}) : "memory");
           }
         }) *
         kTileBytes / static_cast<double>(bytes);
}

// How much longer 64 products take behind `steps` multiplications of numbers, each waiting for the one before, during
// which the tile unit has nothing to do.
struct Wake {
  double rest;
  double extra;
};
Wake wake_after(int steps) {
  const auto rest = [steps] {
    for (int i = 0; i < steps; ++i) asm volatile("imul %%rax, %%rax" : : : "rax");
  };
  const double resting = nanoseconds_of(rest);
  const double multiplying = nanoseconds_of([] { Tiles::multiply(16); });
  const double both = nanoseconds_of([&] {
    rest();
    asm volatile("lfence");
    Tiles::multiply(16);
    asm volatile("lfence");
  });
  return {resting, both - resting - multiplying};
}

}  // namespace

int main() {
  if (!dca::bench::kernels_use_amx()) {
    std::puts("No AMX: processor or system have none, or DCA_CPU_ISA names another instruction set.");
    return 77;
  }
  const Tiles tiles;
  asm volatile("vpxord %zmm16, %zmm16, %zmm16\n vpxord %zmm17, %zmm17, %zmm17");
  const std::unique_ptr<char, void (*)(void*)> memory(static_cast<char*>(std::aligned_alloc(4096, kL2Bytes)),
                                                      std::free);
  if (memory == nullptr) return 1;
  std::fill_n(memory.get(), kL2Bytes, char{0});

  std::printf("product of two tiles          %6.2f ns, %.0f FLOP\n", nanoseconds_of([] { Tiles::multiply(16); }) / 64,
              Tiles::kFlopOfProduct);
  std::printf("load of a tile from L1        %6.2f ns\n", load_time(memory.get(), kL1Bytes, false));
  std::printf("               from L2        %6.2f ns; past L1 %.2f ns\n", load_time(memory.get(), kL2Bytes, false),
              load_time(memory.get(), kL2Bytes, true));
  std::printf("store of a tile into L1       %6.2f ns\n", store_time(memory.get(), kL1Bytes));
  std::printf("                into L2       %6.2f ns\n", store_time(memory.get(), kL2Bytes));
  std::printf("FMA of vectors                %6.2f a ns; beside tiles %.2f\n",
              vectors_per_nanosecond(multiply_vectors, false), vectors_per_nanosecond(multiply_vectors, true));
  std::printf("additions of vectors          %6.2f a ns; beside tiles %.2f\n",
              vectors_per_nanosecond(add_vectors, false), vectors_per_nanosecond(add_vectors, true));
  for (const int steps : {0, 100, 200, 400, 800, 1600, 3200}) {
    const Wake wake = wake_after(steps);
    std::printf("64 products after %5.0f ns     %6.0f ns longer\n", wake.rest, wake.extra);
  }
}
