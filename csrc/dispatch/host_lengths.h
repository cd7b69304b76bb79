// Copies on the host of what a CUDA call's device memory says about lengths and scales, for DCA_CHECK=1: the checks of
// the CPU then hold for CUDA too.
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

  /// The call as if it were one on the CPU; only its lengths, page table and scales may be read.
  const Params& params() const { return host_; }

 private:
  void fetch_more(const AttentionParams& device) {
    fetch(host_.cu_seqlens_q, static_cast<size_t>(device.batch) + 1);
    fetch_cache(device);
  }
  void fetch_more(const AppendParams& device) { fetch_cache(device); }
  void fetch_more(const RotateKeysParams&) {}

  template <class CacheParams>
  void fetch_cache(const CacheParams& device) {
    fetch_pages(device.pages, device.batch);
    for (CacheScale* scale : {&host_.k_scale, &host_.v_scale}) {
      fetch(scale->data, scale->stride.head == 0 ? 1 : static_cast<size_t>(device.num_heads_kv));
    }
  }

  void fetch_pages(const PageTable& pages, int32_t batch) {
    if (pages.page_table == nullptr || batch == 0) return;
    fetch(host_.pages.page_table, static_cast<size_t>((batch - 1) * pages.stride_batch + pages.max_pages));
  }

  template <class T>
  void fetch(const T*& pointer, size_t count) {
    if (pointer == nullptr || !status_.ok()) return;
    const auto copy = std::make_shared<std::vector<T>>(count);
    if (count > 0) status_ = cuda::copy_to_host(copy->data(), pointer, count * sizeof(T), stream_);
    pointer = copy->data();
    copies_.push_back(copy);
  }

  Params host_;
  void* stream_ = nullptr;
  std::vector<std::shared_ptr<void>> copies_;
  Status status_;
};

}  // namespace dca
