// AMX's tile registers. Linux, from 5.16 on, gives them to a process on request: they are 8 KiB more to save whenever a
// thread that uses them is interrupted.
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "micro_kernels.h"

namespace dca::cpu {

extern "C" bool dca_cpu_request_amx() {
  constexpr unsigned kBFloat16 = 1u << 22;
  constexpr unsigned kTiles = 1u << 24;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0 || (~edx & (kBFloat16 | kTiles)) != 0) return false;
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr int kTileData = 18;               // a component of the processor's state
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace dca::cpu
