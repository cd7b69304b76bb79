// Chooses the instruction set, once per process.
#include "micro_kernels.h"

#include <cstdlib>
#include <cstring>

namespace dca::cpu {
namespace {

struct Candidate {
  const MicroKernels* kernels;
  bool supported;
};

const MicroKernels* choose() {
  const Candidate candidates[] = {
#if defined(DCA_CPU_HAS_X86)
    {&kMicroKernelsAvx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")},
    {&kMicroKernelsAvx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
    {&kMicroKernelsPortable, true},
  };
  const char* forced = std::getenv("DCA_CPU_ISA");
  for (const Candidate& candidate : candidates) {
    const bool wanted = forced == nullptr || *forced == '\0' || std::strcmp(forced, candidate.kernels->isa) == 0;
    if (wanted && candidate.supported) return candidate.kernels;
  }
  return nullptr;
}

}  // namespace

const MicroKernels* micro_kernels() {
  static const MicroKernels* const chosen = choose();
  return chosen;
}

const char* compiled_instruction_sets() {
#if defined(DCA_CPU_HAS_X86)
  return "avx512, avx2, portable";
#else
  return "portable";
#endif
}

}  // namespace dca::cpu
