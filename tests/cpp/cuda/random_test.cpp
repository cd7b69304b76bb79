#include "cuda_cases.h"
#include "random_cases.h"

namespace dca::testing {
namespace {

class CudaRandom : public CudaKernelTest {};

TEST_P(CudaRandom, MatchesTheReference) {
  // Smaller heads are padded in shared memory; pages have a multiple of 16 rows.
  const RandomLimits limits = {
      {16, 32}, {16, 32, 48, 64, 80, 128, 256}, {1.0f, 1.0f, 1.0f, 0.0f, -1.0f, 16.0f, 240.0f, -240.0f}};
  expect_random_cases_match(shape(), limits, 12, [](const RandomCase& c) {
    if (!missing_kernel(c.shape).empty()) return false;  // this build has none over such a cache
    ++kernel_cases;
    return true;
  });
}

DCA_TEST_SM80(CudaRandom, 64, 128);
DCA_TEST_SM90(CudaRandom, 64, 128);
DCA_TEST_SM90_LARGE(CudaRandom);

}  // namespace
}  // namespace dca::testing
