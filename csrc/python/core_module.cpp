// dca_ext._core: the host side of the torch-free library for Python: geometry, what was built, what would run.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

#include "dca/dca.h"

namespace py = pybind11;

namespace {

dca::Segment segment_of_name(const std::string& name) {
  if (name == "intra") return dca::Segment::Intra;
  if (name == "successive") return dca::Segment::Successive;
  if (name == "inter") return dca::Segment::Inter;
  throw py::value_error("segment must be one of intra, successive, inter; got " + name);
}

const char* name_of(dca::Segment segment) {
  switch (segment) {
    case dca::Segment::Intra:
      return "intra";
    case dca::Segment::Successive:
      return "successive";
    default:
      return "inter";
  }
}

dca::DType dtype_of_name(const std::string& name) {
  if (name == "float32") return dca::DType::Float32;
  if (name == "bfloat16") return dca::DType::BFloat16;
  if (name == "float16") return dca::DType::Float16;
  throw py::value_error("dtype must be one of float32, bfloat16, float16; got " + name);
}

dca::ChunkGeometry make_geometry(int32_t chunk_len, int32_t max_position) {
  const dca::ChunkGeometry geometry{chunk_len, max_position};
  if (!geometry.valid()) {
    throw py::value_error(
        "chunk_len and max_position must satisfy 1 <= chunk_len <= max_position <= 2 * chunk_len - 1; got "
        "chunk_len=" +
        std::to_string(chunk_len) + ", max_position=" + std::to_string(max_position));
  }
  return geometry;
}

// The walk of one query tile: (segment, first key, end of keys) in the kernels' order.
std::vector<std::tuple<std::string, int32_t, int32_t>> walk(const dca::ChunkGeometry& geometry, int32_t q_begin,
                                                            int32_t q_end) {
  if (q_begin < 0 || q_end <= q_begin || q_end > geometry.chunk_end(q_begin)) {
    throw py::value_error("q_begin and q_end must be a non-empty range within one chunk; got " +
                          std::to_string(q_begin) + " and " + std::to_string(q_end));
  }
  std::vector<std::tuple<std::string, int32_t, int32_t>> ranges;
  for (dca::SegmentIterator it(geometry, q_begin, q_end); !it.done(); it.next()) {
    ranges.emplace_back(name_of(it.segment()), it.keys().begin, it.keys().end);
  }
  return ranges;
}

py::dict build_info() {
  const dca::BuildInfo info = dca::build_info();
  py::dict d;
  d["version"] = info.version;
  d["compiler"] = info.compiler;
  d["cpu_instruction_sets"] = info.cpu_instruction_sets;
  d["cpu_isa"] = info.cpu_isa;
  d["cuda_architectures"] = info.cuda_architectures;
  d["cpu_threads"] = info.cpu_threads;
  return d;
}

std::string describe_kernel(int32_t seqlen_q, int32_t seqlen_k, int32_t num_heads, int32_t num_heads_kv,
                            int32_t head_dim, const std::string& dtype, const std::string& device, int32_t chunk_len,
                            int32_t max_position) {
  static const float table = 1.0f;  // rotary tables must not be null; their values are not read
  if (device != "cpu" && device != "cuda") throw py::value_error("device must be cpu or cuda; got " + device);
  dca::AttentionParams p;
  p.exec.device = device == "cpu" ? dca::Device::Cpu : dca::Device::Cuda;
  p.dtype = dtype_of_name(dtype);
  p.chunk = {chunk_len, max_position};
  p.batch = 1;
  p.num_heads = num_heads;
  p.num_heads_kv = num_heads_kv;
  p.head_dim = head_dim;
  p.seqlen_q = seqlen_q;
  p.seqlen_k = p.cache_seqlen = seqlen_k;
  p.rotary = {&table, &table, static_cast<int64_t>(max_position) + 1, 0, false};
  const auto contiguous = [&](int64_t rows, int64_t heads) {
    return dca::Strides{rows * heads * head_dim, heads * head_dim, head_dim};
  };
  p.q.stride = p.out.stride = contiguous(seqlen_q, num_heads);
  p.k.stride = p.v.stride = contiguous(seqlen_k, num_heads_kv);
  std::string kernel;
  const dca::Status status = dca::describe_attention(p, &kernel);
  if (status.code() == dca::StatusCode::InvalidArgument) throw py::value_error(status.message());
  if (!status.ok()) throw std::runtime_error(status.message());
  return kernel;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "Host side of the torch-free dca library.";
  m.def("build_info", &build_info, "What the library was built with and what it uses on this machine.");
  m.def("describe_kernel", &describe_kernel, py::kw_only(), py::arg("seqlen_q"), py::arg("seqlen_k"),
        py::arg("num_heads"), py::arg("num_heads_kv"), py::arg("head_dim"), py::arg("dtype") = "float32",
        py::arg("device") = "cpu", py::arg("chunk_len") = 2560, py::arg("max_position") = 3072,
        "Name of the kernel that attention of this shape would run.");
  py::class_<dca::ChunkGeometry>(m, "ChunkGeometry", "The geometry that every kernel uses; positions in tokens.")
      .def(py::init(&make_geometry), py::arg("chunk_len"), py::arg("max_position"))
      .def_readonly("chunk_len", &dca::ChunkGeometry::chunk_len)
      .def_readonly("max_position", &dca::ChunkGeometry::max_position)
      .def("key_position", &dca::ChunkGeometry::key_position, py::arg("j"))
      .def(
          "query_position",
          [](const dca::ChunkGeometry& g, int32_t i, const std::string& segment) {
            return g.query_position(i, segment_of_name(segment));
          },
          py::arg("i"), py::arg("segment"))
      .def(
          "segment_of", [](const dca::ChunkGeometry& g, int32_t i, int32_t j) { return name_of(g.segment_of(i, j)); },
          py::arg("i"), py::arg("j"))
      .def("tile_end", &dca::ChunkGeometry::tile_end, py::arg("begin"), py::arg("block_m"), py::arg("seqlen"))
      .def("walk", &walk, py::arg("q_begin"), py::arg("q_end"),
           "[(segment, first key, end of keys)] of a query tile, in the kernels' order.");
}
