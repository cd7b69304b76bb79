#include "machine.h"

#include <stdexcept>

#include "cpu_machine.h"
#if defined(DCA_HAS_CUDA)
#include "cuda_machine.h"
#endif

namespace dca::bench {

void require(const Status& status) {
  if (!status.ok()) throw std::runtime_error(status.message());
}

std::unique_ptr<Machine> open_machine(const Options& options) {
  if (options.device == Device::Cpu) return open_cpu(options);
#if defined(DCA_HAS_CUDA)
  return open_cuda(options);
#else
  throw std::invalid_argument("--device=cuda needs a build with CUDA kernels; configure with DCA_CUDA=ON");
#endif
}

}  // namespace dca::bench
