// The driver entry points that torch looks up when it first asks for a device and the simulator does not have. torch
// wants their addresses; of their answers it needs one.
#include <cstdio>

namespace {
constexpr int kSuccess = 0;
constexpr int kNotSupported = 801;
}  // namespace

extern "C" int cuDevicePrimaryCtxGetState(int /*device*/, unsigned* flags, int* active) {
  *flags = 0;
  *active = 1;
  return kSuccess;
}

#define DCA_NOT_SIMULATED(name)                                     \
  extern "C" int name() {                                           \
    std::fprintf(stderr, "simulated GPU: there is no " #name "\n"); \
    return kNotSupported;                                           \
  }

DCA_NOT_SIMULATED(cuCtxFromGreenCtx)
DCA_NOT_SIMULATED(cuCtxPopCurrent)
DCA_NOT_SIMULATED(cuCtxPushCurrent)
DCA_NOT_SIMULATED(cuCtxSetCurrent)
DCA_NOT_SIMULATED(cuDevResourceGenerateDesc)
DCA_NOT_SIMULATED(cuDevSmResourceSplitByCount)
DCA_NOT_SIMULATED(cuDeviceGetDevResource)
DCA_NOT_SIMULATED(cuDevicePrimaryCtxRetain)
DCA_NOT_SIMULATED(cuFuncGetAttribute)
DCA_NOT_SIMULATED(cuFuncSetAttribute)
DCA_NOT_SIMULATED(cuFuncSetCacheConfig)
DCA_NOT_SIMULATED(cuGreenCtxCreate)
DCA_NOT_SIMULATED(cuGreenCtxDestroy)
DCA_NOT_SIMULATED(cuGreenCtxStreamCreate)
DCA_NOT_SIMULATED(cuLaunchCooperativeKernel)
DCA_NOT_SIMULATED(cuLaunchKernel)
DCA_NOT_SIMULATED(cuLinkAddData_v2)
DCA_NOT_SIMULATED(cuLinkComplete)
DCA_NOT_SIMULATED(cuLinkCreate_v2)
DCA_NOT_SIMULATED(cuMemAddressFree)
DCA_NOT_SIMULATED(cuMemAddressReserve)
DCA_NOT_SIMULATED(cuMemCreate)
DCA_NOT_SIMULATED(cuMemExportToShareableHandle)
DCA_NOT_SIMULATED(cuMemGetAllocationGranularity)
DCA_NOT_SIMULATED(cuMemGetAllocationPropertiesFromHandle)
DCA_NOT_SIMULATED(cuMemImportFromShareableHandle)
DCA_NOT_SIMULATED(cuMemMap)
DCA_NOT_SIMULATED(cuMemRelease)
DCA_NOT_SIMULATED(cuMemRetainAllocationHandle)
DCA_NOT_SIMULATED(cuMemSetAccess)
DCA_NOT_SIMULATED(cuMemUnmap)
DCA_NOT_SIMULATED(cuMemsetD32Async)
DCA_NOT_SIMULATED(cuModuleGetFunction)
DCA_NOT_SIMULATED(cuModuleLoad)
DCA_NOT_SIMULATED(cuModuleLoadData)
DCA_NOT_SIMULATED(cuModuleLoadDataEx)
DCA_NOT_SIMULATED(cuModuleUnload)
DCA_NOT_SIMULATED(cuMulticastAddDevice)
DCA_NOT_SIMULATED(cuMulticastBindMem)
DCA_NOT_SIMULATED(cuMulticastCreate)
DCA_NOT_SIMULATED(cuMulticastUnbind)
DCA_NOT_SIMULATED(cuOccupancyMaxActiveBlocksPerMultiprocessor)
DCA_NOT_SIMULATED(cuPointerGetAttribute)
DCA_NOT_SIMULATED(cuStreamWriteValue32)
