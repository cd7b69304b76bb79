#include "amx_unit.h"
#include "ceilings.h"

namespace dca::bench {

double multiply_tiles_of_one_thread() {
  constexpr int64_t kTimes = 500000;  // some 10 ms
  const Tiles tiles;
  tiles.multiply(kTimes);
  return 4 * kTimes * Tiles::kFlopOfProduct;
}

}  // namespace dca::bench
