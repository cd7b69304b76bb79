// What the dispatch asks of the device.
#include "kernels.h"
#include "launch_check.h"

namespace dca::cuda {

Status current_device(DeviceProperties* properties) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  const auto read = [&](cudaDeviceAttr attribute, int32_t* value) {
    int number = 0;
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&number, attribute, device);
    *value = number;
  };
  read(cudaDevAttrComputeCapabilityMajor, &properties->major);
  read(cudaDevAttrComputeCapabilityMinor, &properties->minor);
  read(cudaDevAttrMultiProcessorCount, &properties->multiprocessors);
  return cuda_status("the current CUDA device", error);
}

Status copy_to_host(void* host, const void* device, size_t bytes, void* stream) {
  cudaError_t error = cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, static_cast<cudaStream_t>(stream));
  if (error == cudaSuccess) error = cudaStreamSynchronize(static_cast<cudaStream_t>(stream));
  return cuda_status("DCA_CHECK=1", error);
}

}  // namespace dca::cuda
