// CUDA graphs for a runtime without them: a graph is the list of launches and memsets of its capture, and a replay does
// them again. Preloaded in front of the simulator's runtime, which does whatever is not captured.
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <array>
#include <cstring>
#include <functional>
#include <vector>

namespace {

using Graph = std::vector<std::function<cudaError_t()>>;

Graph* capturing = nullptr;  ///< one capture at a time
cudaStream_t capturing_stream = nullptr;

/// More than any kernel of this project takes, which all have one argument.
constexpr size_t kArgumentBytes = 2048;

bool is_captured(cudaStream_t stream) { return capturing != nullptr && stream == capturing_stream; }

template <class Function>
Function* simulated(const char* name) {
  return reinterpret_cast<Function*>(dlsym(RTLD_NEXT, name));
}

Graph* graph_of(void* handle) { return static_cast<Graph*>(handle); }

}  // namespace

extern "C" {

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  capturing = new Graph;
  capturing_stream = stream;
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
  *graph = reinterpret_cast<cudaGraph_t>(capturing);
  capturing = nullptr;
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = is_captured(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t** dependencies,
                                     const cudaGraphEdgeData** edges, size_t* num_dependencies) {
  if (id != nullptr) *id = 1;
  if (graph != nullptr) *graph = reinterpret_cast<cudaGraph_t>(capturing);
  if (dependencies != nullptr) *dependencies = nullptr;
  if (edges != nullptr) *edges = nullptr;
  if (num_dependencies != nullptr) *num_dependencies = 0;
  return cudaStreamIsCapturing(stream, status);
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
  *count = graph_of(graph)->size();
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  *executable = reinterpret_cast<cudaGraphExec_t>(new Graph(*graph_of(graph)));
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long flags) {
  return cudaGraphInstantiate(executable, graph, flags);
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph_of(graph);
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
  delete graph_of(executable);
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t) {
  for (const auto& work : *graph_of(executable)) {
    if (const cudaError_t error = work(); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream) {
  static auto* const fill = simulated<cudaError_t(void*, int, size_t, cudaStream_t)>("cudaMemsetAsync");
  if (!is_captured(stream)) return fill(memory, value, bytes, stream);
  capturing->push_back([=] { return fill(memory, value, bytes, stream); });
  return cudaSuccess;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void** arguments) {
  static auto* const launch =
      simulated<cudaError_t(const cudaLaunchConfig_t*, const void*, void**)>("cudaLaunchKernelExC");
  if (!is_captured(config->stream)) return launch(config, kernel, arguments);
  std::array<char, kArgumentBytes> argument;  // what lies behind the argument is the caller's stack
  std::memcpy(argument.data(), arguments[0], argument.size());
  const std::vector<cudaLaunchAttribute> attributes(config->attrs, config->attrs + config->numAttrs);
  capturing->push_back([=, again = *config]() mutable {
    auto copies = attributes;
    again.attrs = copies.data();
    void* pointers[] = {argument.data()};
    return launch(&again, kernel, pointers);
  });
  return cudaSuccess;
}

}  // extern "C"
