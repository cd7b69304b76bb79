// Copies on the host of what a CUDA call's device memory says about lengths, for DCA_CHECK=1: the checks of the CPU
// then hold for CUDA too.
#pragma once

#include <memory>
#include <vector>

#include "backends.h"

namespace dca {

template <class Params>
class HostLengths {
 public:
  Status copy(const Params& device) {
    host_ = device;
    host_.exec.device = Device::Cpu;
    stream_ = device.exec.stream;
    const size_t batch = static_cast<size_t>(device.batch);
    fetch(host_.cu_seqlens_k, batch + 1);
    fetch(host_.cache_seqlens, batch);
    fetch(host_.cache_leftpad, batch);
    fetch_more(device);
    return status_;
  }

  /// The call as if it were one on the CPU; only its lengths and page table may be read.
  const Params& params() const { return host_; }

 private:
  void fetch_more(const AttentionParams& device) {
    fetch(host_.cu_seqlens_q, static_cast<size_t>(device.batch) + 1);
    fetch_pages(device.pages, device.batch);
  }
  void fetch_more(const AppendParams& device) { fetch_pages(device.pages, device.batch); }
  void fetch_more(const RotateKeysParams&) {}

  void fetch_pages(const PageTable& pages, int32_t batch) {
    if (pages.page_table == nullptr || batch == 0) return;
    fetch(host_.pages.page_table, static_cast<size_t>((batch - 1) * pages.stride_batch + pages.max_pages));
  }

  void fetch(const int32_t*& pointer, size_t count) {
    if (pointer == nullptr || !status_.ok()) return;
    copies_.push_back(std::make_unique<std::vector<int32_t>>(count));
    if (count > 0) status_ = cuda::copy_to_host(copies_.back()->data(), pointer, count * sizeof(int32_t), stream_);
    pointer = copies_.back()->data();
  }

  Params host_;
  void* stream_ = nullptr;
  std::vector<std::unique_ptr<std::vector<int32_t>>> copies_;
  Status status_;
};

}  // namespace dca
