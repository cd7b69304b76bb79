// The public calls: check, return at once if there is nothing to do, and hand over to the backend of the device.
#include <cstdlib>
#include <exception>
#include <new>
#include <string>

#include "backends.h"
#include "checks.h"
#include "dca/dca.h"
#include "host_lengths.h"

namespace dca {
namespace {

template <class Params>
bool on_cuda(const Params& p) {
  return p.exec.device == Device::Cuda;
}

Status check_backend(const Execution& exec) {
  if (exec.device == Device::Cuda && !cuda::available()) return cuda::unavailable();
  if (exec.device == Device::Cpu && cpu::isa() == nullptr) {
    return {StatusCode::Unavailable, std::string("DCA_CPU_ISA must name one of the compiled instruction sets (") +
                                         cpu::compiled_instruction_sets() + ") that this machine runs"};
  }
  return {};
}

// DCA_CHECK=1: on CUDA too the values of lengths and page tables are checked, at the price of waiting for the device.
bool checks_device_values() {
  static const bool on = [] {
    const char* value = std::getenv("DCA_CHECK");
    return value != nullptr && std::string(value) == "1";
  }();
  return on;
}

template <class Params>
Status check_device_values(const Params& params) {
  if (!checks_device_values()) return {};
  HostLengths<Params> lengths;
  if (Status status = lengths.copy(params); !status.ok()) return status;
  return check(lengths.params());
}
Status check_device_values(const MergeParams&) { return {}; }  // has none

// Checks, and says through *has_work whether there is any for a backend.
template <class Params>
Status prepare(const Params& params, bool empty, bool* has_work) {
  *has_work = false;
  const Status backend = empty ? Status() : check_backend(params.exec);
  // Without a backend for the device, what its kernels ask of shapes is beside the point.
  if (on_cuda(params) && !backend.ok()) return backend;
  if (Status status = check(params); !status.ok()) return status;
  if (empty || !backend.ok()) return backend;
  *has_work = true;
  return {};
}

// Checks, and calls the backend if there is work for it. Nothing that the host side throws leaves the library.
template <class Params, class Backend>
Status run(const char* name, const Params& params, bool empty, Backend&& backend) try {
  bool has_work = false;
  if (Status status = prepare(params, empty, &has_work); !has_work) return status;
  if (Status status = check_pointers(params); !status.ok()) return status;
  if (on_cuda(params)) {
    if (Status status = check_device_values(params); !status.ok()) return status;
  }
  return backend(params);
} catch (const std::bad_alloc&) {
  return {StatusCode::OutOfMemory,
          std::string(name) + ": not enough memory for the kernel's schedule and scratch buffers"};
} catch (const std::exception& error) {
  return {StatusCode::Internal, std::string(name) + ": " + error.what()};
}

bool is_empty(const AttentionParams& p) {
  return p.batch == 0 || (p.cu_seqlens_q != nullptr ? p.total_q == 0 : p.seqlen_q == 0);
}

template <class Params>
bool has_no_new_rows(const Params& p) {
  return p.batch == 0 || (p.cu_seqlens_k != nullptr ? p.total_k == 0 : p.seqlen_k == 0);
}

}  // namespace

Status attention(const AttentionParams& params) {
  return run("attention", params, is_empty(params), on_cuda(params) ? cuda::attention : cpu::attention);
}

Status check_attention(const AttentionParams& params) {
  return run("check_attention", params, is_empty(params),
             [](const AttentionParams& p) { return on_cuda(p) ? cuda::check_attention(p) : Status(); });
}

Status attention_workspace_bytes(const AttentionParams& params, size_t* bytes) {
  bool has_work = false;
  Status status = prepare(params, is_empty(params), &has_work);
  *bytes = 0;
  if (!has_work) return status;
  if (on_cuda(params)) return cuda::attention_workspace_bytes(params, bytes);
  *bytes = cpu::attention_workspace_bytes(params);
  return {};
}

Status describe_attention(const AttentionParams& params, std::string* kernel) {
  kernel->clear();
  // Shapes and strides only. The CPU's checks would read the values of lengths and pages; its kernels do not depend on
  // them, nor on there being any.
  AttentionParams shapes = params;
  shapes.k_scale = shapes.v_scale = {};
  if (!on_cuda(params)) {
    shapes.cu_seqlens_q = shapes.cu_seqlens_k = shapes.cache_seqlens = shapes.cache_leftpad = nullptr;
    shapes.pages = {};
  }
  bool has_work = false;
  Status status = prepare(shapes, is_empty(shapes), &has_work);
  if (!has_work) return status;
  if (on_cuda(shapes)) return cuda::describe_attention(shapes, kernel);
  *kernel = cpu::describe_attention(shapes);
  return {};
}

Status rotate_keys(const RotateKeysParams& params) {
  return run("rotate_keys", params, has_no_new_rows(params), on_cuda(params) ? cuda::rotate_keys : cpu::rotate_keys);
}

Status rotate_and_append_kv(const AppendParams& params) {
  return run("rotate_and_append_kv", params, has_no_new_rows(params),
             on_cuda(params) ? cuda::rotate_and_append_kv : cpu::rotate_and_append_kv);
}

Status merge_attention_states(const MergeParams& params) {
  return run("merge_attention_states", params, params.batch == 0 || params.seqlen == 0,
             on_cuda(params) ? cuda::merge_attention_states : cpu::merge_attention_states);
}

BuildInfo build_info() {
  BuildInfo info{};
  info.version = DCA_VERSION;
#if defined(__clang__)
  info.compiler = "clang " __clang_version__;
#else
  info.compiler = "gcc " __VERSION__;
#endif
  info.cpu_instruction_sets = cpu::compiled_instruction_sets();
  info.cpu_isa = cpu::isa() != nullptr ? cpu::isa() : "";
  info.cuda_architectures = cuda::architectures();
  info.cpu_threads = cpu::default_num_threads();
  return info;
}

}  // namespace dca
