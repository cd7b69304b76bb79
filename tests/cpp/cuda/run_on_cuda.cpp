// Every buffer of a problem gets a device allocation of exactly its size, so that an access outside of it is seen by
// compute-sanitizer; all of them are copied back, so that a write where there should be none is seen as well.
#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

#include "run_operator.h"

namespace dca::testing {
namespace {

Status status_of(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return {};
  return {StatusCode::Internal, std::string(what) + ": " + cudaGetErrorString(error)};
}

class DeviceCopies {
 public:
  explicit DeviceCopies(const HostBuffers& buffers) : buffers_(buffers) {
    for (const HostBuffer& buffer : buffers_) copies_.push_back(allocate(buffer.bytes));
    for (size_t i = 0; i < buffers_.size(); ++i) {
      if (buffers_[i].bytes > 0) {
        remember(cudaMemcpy(copies_[i], buffers_[i].data, buffers_[i].bytes, cudaMemcpyHostToDevice));
      }
    }
  }
  DeviceCopies(const DeviceCopies&) = delete;
  ~DeviceCopies() {
    for (void* copy : copies_) cudaFree(copy);
  }

  void* allocate(size_t bytes) {
    void* memory = nullptr;
    remember(cudaMalloc(&memory, bytes > 0 ? bytes : 16));
    return memory;
  }
  void* workspace(size_t bytes) {
    copies_.push_back(allocate(bytes));
    return copies_.back();
  }

  /// Points a host pointer into the device's copy.
  template <class T>
  void translate(T*& pointer) {
    if (pointer == nullptr) return;
    const auto address = reinterpret_cast<uintptr_t>(pointer);
    for (size_t i = 0; i < buffers_.size(); ++i) {
      const auto begin = reinterpret_cast<uintptr_t>(buffers_[i].data);
      if (address >= begin && address < begin + buffers_[i].bytes) {
        pointer = reinterpret_cast<T*>(static_cast<char*>(copies_[i]) + (address - begin));
        return;
      }
    }
    unknown_ = true;
  }

  Status copy_back() {
    remember(cudaDeviceSynchronize());
    for (size_t i = 0; i < buffers_.size(); ++i) {
      if (buffers_[i].bytes > 0) {
        remember(
            cudaMemcpy(const_cast<void*>(buffers_[i].data), copies_[i], buffers_[i].bytes, cudaMemcpyDeviceToHost));
      }
    }
    return status();
  }

  Status status() const {
    if (unknown_) return {StatusCode::Internal, "the test passed a pointer to memory that it did not name"};
    return status_of(error_, "the test's own CUDA calls");
  }

 private:
  void remember(cudaError_t error) {
    if (error_ == cudaSuccess) error_ = error;
  }

  HostBuffers buffers_;
  std::vector<void*> copies_;
  cudaError_t error_ = cudaSuccess;
  bool unknown_ = false;
};

void translate_rotary(DeviceCopies& device, RotaryTables& rotary) {
  device.translate(rotary.cos);
  device.translate(rotary.sin);
}

template <class Params>
void translate_new_rows(DeviceCopies& device, Params& p) {
  p.exec.device = Device::Cuda;
  device.translate(p.k.data);
  device.translate(p.cu_seqlens_k);
  device.translate(p.cache_seqlens);
  device.translate(p.cache_leftpad);
  translate_rotary(device, p.rotary);
}

template <class Params, class Call>
Status run(DeviceCopies& device, const Params& p, Call&& call) {
  if (Status status = device.status(); !status.ok()) return status;
  if (Status status = call(p); !status.ok()) return status;
  return device.copy_back();
}

}  // namespace

Status run_operator(const AttentionParams& params, const HostBuffers& buffers) {
  DeviceCopies device(buffers);
  AttentionParams p = params;
  p.exec.device = Device::Cuda;
  device.translate(p.q.data);
  device.translate(p.k.data);
  device.translate(p.v.data);
  device.translate(p.out.data);
  device.translate(p.lse);
  device.translate(p.cu_seqlens_q);
  device.translate(p.cu_seqlens_k);
  device.translate(p.cache_seqlens);
  device.translate(p.cache_leftpad);
  device.translate(p.pages.page_table);
  device.translate(p.temperature);
  device.translate(p.k_scale.data);
  device.translate(p.v_scale.data);
  translate_rotary(device, p.rotary);
  if (Status status = attention_workspace_bytes(p, &p.workspace_bytes); !status.ok()) return status;
  p.workspace = p.workspace_bytes > 0 ? device.workspace(p.workspace_bytes) : nullptr;
  return run(device, p, attention);
}

Status run_operator(const RotateKeysParams& params, const HostBuffers& buffers) {
  DeviceCopies device(buffers);
  RotateKeysParams p = params;
  translate_new_rows(device, p);
  device.translate(p.out.data);
  return run(device, p, rotate_keys);
}

Status run_operator(const AppendParams& params, const HostBuffers& buffers) {
  DeviceCopies device(buffers);
  AppendParams p = params;
  translate_new_rows(device, p);
  device.translate(p.v.data);
  device.translate(p.k_cache.data);
  device.translate(p.v_cache.data);
  device.translate(p.k_scale.data);
  device.translate(p.v_scale.data);
  device.translate(p.pages.page_table);
  return run(device, p, rotate_and_append_kv);
}

Status run_operator(const MergeParams& params, const HostBuffers& buffers) {
  DeviceCopies device(buffers);
  MergeParams p = params;
  p.exec.device = Device::Cuda;
  std::vector<const void*> outs(p.outs, p.outs + p.num_parts);
  std::vector<const float*> lses(p.lses, p.lses + p.num_parts);
  for (const void*& out : outs) device.translate(out);
  for (const float*& lse : lses) device.translate(lse);
  p.outs = outs.data();
  p.lses = lses.data();
  device.translate(p.out);
  device.translate(p.lse);
  return run(device, p, merge_attention_states);
}

Gaps tensor_gaps(DType dtype) {
  const int32_t vector = static_cast<int32_t>(16 / element_size(dtype));
  return {vector, 3 * vector};
}

bool rounds_queries(DType) { return true; }

}  // namespace dca::testing
