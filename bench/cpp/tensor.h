// Arrays in the memory of a machine.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "dca/params.h"
#include "machine.h"
#include "reference.h"

namespace dca::bench {

/// (batch, rows, heads, head_dim), contiguous. A cache of pages is (num_pages, page_size, heads, head_dim).
struct Tensor {
  DType dtype = DType::Float32;
  Strides stride;
  int64_t count = 0;
  std::shared_ptr<void> memory;

  Tensor(const Machine& machine, DType type, int64_t batch, int64_t rows, int64_t heads, int64_t dim)
      : dtype(type), stride{rows * heads * dim, heads * dim, dim}, count(batch * rows * heads * dim) {
    memory = machine.allocate(bytes());
  }

  size_t bytes() const { return static_cast<size_t>(count) * element_size(dtype); }
  ConstTensorRef ref() const { return {memory.get(), stride}; }
  TensorRef mutable_ref() const { return {memory.get(), stride}; }
  std::pair<void*, size_t> buffer() const { return {memory.get(), bytes()}; }

  /// The element at an offset; of a host_copy only.
  double at(int64_t index) const { return reference::read(memory.get(), dtype, index); }
};

inline Tensor random_tensor(const Machine& machine, DType dtype, int64_t batch, int64_t rows, int64_t heads,
                            int64_t dim, uint64_t seed) {
  Tensor tensor(machine, dtype, batch, rows, heads, dim);
  machine.fill_random(tensor.memory.get(), dtype, tensor.count, seed);
  return tensor;
}

/// The same tensor where the reference can read it.
inline Tensor host_copy(const Machine& machine, const Tensor& tensor) {
  if (machine.execution().device == Device::Cpu) return tensor;
  Tensor copy = tensor;
  copy.memory = {new char[tensor.bytes()], [](void* memory) { delete[] static_cast<char*>(memory); }};
  machine.copy_to_host(copy.memory.get(), tensor.memory.get(), tensor.bytes());
  return copy;
}

/// Numbers that the host knows and the machine's kernels read.
template <class Element>
struct Mirrored {
  std::vector<Element> host;
  std::shared_ptr<void> memory;

  Mirrored(const Machine& machine, std::vector<Element> values) : host(std::move(values)) {
    memory = machine.allocate(host.size() * sizeof(Element));
    machine.copy_from_host(memory.get(), host.data(), host.size() * sizeof(Element));
  }
  const Element* data() const { return static_cast<const Element*>(memory.get()); }
};

}  // namespace dca::bench
