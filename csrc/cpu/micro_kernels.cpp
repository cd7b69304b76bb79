// Chooses the instruction set, once per process.
#include "micro_kernels.h"

#include <cstdlib>
#include <cstring>

#if defined(DCA_CPU_HAS_X86)
#include <cpuid.h>
#endif

namespace dca::cpu {
namespace {

struct Candidate {
  const MicroKernels* kernels;
  bool (*supported)();
  bool by_default;
};

bool always() { return true; }

#if defined(DCA_CPU_HAS_X86)
// clang 14 has no __builtin_cpu_supports for it.
bool supports_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}

bool supports_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && supports_f16c(); }

bool supports_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

#if defined(DCA_CPU_HAS_AVX512_BF16)
bool supports_avx512_bf16() { return supports_avx512() && __builtin_cpu_supports("avx512bf16"); }

// AMD's vdpbf16ps multiplies twice as many numbers in a time as fp32 FMA. On a Xeon with AMX, bf16 that becomes fp32
// was 1.6 times as fast as pairs (docs/performance.md).
bool multiplies_pairs_fast() { return __builtin_cpu_is("amd"); }
#endif

#if defined(DCA_CPU_HAS_AMX)
bool supports_amx() { return supports_avx512_bf16() && dca_cpu_request_amx(); }
#endif
#endif

const MicroKernels* choose() {
  const Candidate candidates[] = {
#if defined(DCA_CPU_HAS_AMX)
      {&kMicroKernelsAmxBFloat16, supports_amx, true},
#endif
#if defined(DCA_CPU_HAS_AVX512_BF16)
      {&kMicroKernelsAvx512BFloat16, supports_avx512_bf16, multiplies_pairs_fast()},
#endif
#if defined(DCA_CPU_HAS_X86)
      {&kMicroKernelsAvx512, supports_avx512, true},
      {&kMicroKernelsAvx2, supports_avx2, true},
#endif
      {&kMicroKernelsPortable, always, true},
      {&kMicroKernelsPortableBFloat16, always, false},
  };
  const char* forced = std::getenv("DCA_CPU_ISA");
  const bool any = forced == nullptr || *forced == '\0';
  for (const Candidate& candidate : candidates) {
    const bool wanted = any ? candidate.by_default : std::strcmp(forced, candidate.kernels->isa) == 0;
    if (wanted && candidate.supported()) return candidate.kernels;
  }
  return nullptr;
}

}  // namespace

const MicroKernels* micro_kernels() {
  static const MicroKernels* const chosen = choose();
  return chosen;
}

const char* compiled_instruction_sets() {
  return
#if defined(DCA_CPU_HAS_AMX)
      "amx_bf16, "
#endif
#if defined(DCA_CPU_HAS_AVX512_BF16)
      "avx512_bf16, "
#endif
#if defined(DCA_CPU_HAS_X86)
      "avx512, avx2, "
#endif
      "portable, portable_bf16";
}

}  // namespace dca::cpu
