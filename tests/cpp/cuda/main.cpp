// Runs the CUDA tests and says on what, and how many kernel cases were compared. Without a device the exit code is 77,
// which ctest shows as skipped.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cstdio>

#include "cuda_cases.h"

int main(int argc, char** argv) {
  ::testing::InitGoogleTest(&argc, argv);
  int devices = 0;
  if (const cudaError_t error = cudaGetDeviceCount(&devices); error != cudaSuccess || devices == 0) {
    std::printf("skipped: no CUDA device (%s)\n", cudaGetErrorString(error));
    return 77;
  }
  cudaDeviceProp device{};
  cudaGetDeviceProperties(&device, 0);
  std::printf("%s, compute capability %d.%d; kernels for %s\n", device.name, device.major, device.minor,
              dca::build_info().cuda_architectures);
  const int failed = RUN_ALL_TESTS();
  std::printf("%d kernel cases compared with the reference\n", dca::testing::kernel_cases);
  return failed;
}
