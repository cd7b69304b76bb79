// The public calls: check, return at once if there is nothing to do, and hand over to the backend of the device.
#include "backends.h"
#include "checks.h"
#include "dca/dca.h"

namespace dca {
namespace {

Status no_cuda() {
  return {StatusCode::Unavailable,
          "this build of dca has no CUDA kernels; build it where nvcc is found, or with DCA_CUDA=ON"};
}

Status check_backend(const Execution& exec) {
  if (exec.device == Device::Cuda) return no_cuda();
  if (cpu::isa() == nullptr) {
    return {StatusCode::Unavailable, std::string("DCA_CPU_ISA must name an instruction set that this machine runs, out of ") +
                                         cpu::compiled_instruction_sets()};
  }
  return {};
}

// Checks, and says through *run whether there is work for a backend.
template <class Params>
Status prepare(const Params& params, bool empty, bool* run) {
  *run = false;
  if (Status status = check(params); !status.ok()) return status;
  if (empty) return {};
  if (Status status = check_backend(params.exec); !status.ok()) return status;
  *run = true;
  return {};
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
  bool run = false;
  Status status = prepare(params, is_empty(params), &run);
  if (run) status = check_pointers(params);
  return run && status.ok() ? cpu::attention(params) : status;
}

Status attention_workspace_bytes(const AttentionParams& params, size_t* bytes) {
  bool run = false;
  Status status = prepare(params, is_empty(params), &run);
  *bytes = run ? cpu::attention_workspace_bytes(params) : 0;
  return status;
}

Status describe_attention(const AttentionParams& params, std::string* kernel) {
  kernel->clear();
  // Shapes only: pointers may be null here, so the values behind them are not checked.
  AttentionParams shapes = params;
  shapes.cu_seqlens_q = shapes.cu_seqlens_k = shapes.cache_seqlens = shapes.cache_leftpad = nullptr;
  shapes.pages = {};
  bool run = false;
  Status status = prepare(shapes, is_empty(shapes), &run);
  if (run) *kernel = cpu::describe_attention(shapes);
  return status;
}

Status rotate_keys(const RotateKeysParams& params) {
  bool run = false;
  Status status = prepare(params, has_no_new_rows(params), &run);
  if (run) status = check_pointers(params);
  return run && status.ok() ? cpu::rotate_keys(params) : status;
}

Status rotate_and_append_kv(const AppendParams& params) {
  bool run = false;
  Status status = prepare(params, has_no_new_rows(params), &run);
  if (run) status = check_pointers(params);
  return run && status.ok() ? cpu::rotate_and_append_kv(params) : status;
}

Status merge_attention_states(const MergeParams& params) {
  bool run = false;
  Status status = prepare(params, params.batch == 0 || params.seqlen == 0, &run);
  if (run) status = check_pointers(params);
  return run && status.ok() ? cpu::merge_attention_states(params) : status;
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
  info.cuda_architectures = "";
  info.cpu_threads = cpu::default_num_threads();
  return info;
}

}  // namespace dca
