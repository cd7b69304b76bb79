#include <cstring>

#include "amx_unit.h"
#include "ceilings.h"
#include "dca/dca.h"

namespace dca::bench {

bool kernels_use_amx() { return std::strcmp(build_info().cpu_isa, "amx_bf16") == 0; }

double multiply_tiles_of_one_thread() {
  constexpr int64_t kTimes = 500000;  // some 10 ms
  const Tiles tiles;
  tiles.multiply(kTimes);
  return 4 * kTimes * Tiles::kFlopOfProduct;
}

}  // namespace dca::bench
