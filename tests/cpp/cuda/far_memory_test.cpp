// Tensors of more than 2^31 elements: the same numbers, close together and far apart, give the same bits.
//
// Only the rows that the tensors are made of are ever touched, so a simulator needs little memory. A GPU needs up to
// 44 GiB, and skips where it has less.
#include <cuda_runtime_api.h>

#include <memory>

#include "cuda_cases.h"

namespace dca::testing {
namespace {

struct Extents {
  int64_t batch;  ///< sequences, or pages
  int64_t rows;
  int64_t heads;
  int64_t dim;

  Strides contiguous() const { return {rows * heads * dim, heads * dim, dim}; }
};

/// A 16-bit tensor on the device with any strides; nothing between its rows is touched. Without memory, data() is null.
class FarTensor {
 public:
  FarTensor(const Extents& extents, const Strides& stride) : extents_(extents), stride_(stride) {
    const int64_t elements = (extents.batch - 1) * stride.batch + (extents.rows - 1) * stride.row +
                             (extents.heads - 1) * stride.head + extents.dim;
    void* memory = nullptr;
    if (cudaMalloc(&memory, static_cast<size_t>(elements) * 2) != cudaSuccess) cudaGetLastError();
    memory_.reset(memory);
  }

  void* data() const { return memory_.get(); }
  const Strides& stride() const { return stride_; }

  void write(const std::vector<uint16_t>& values) {
    copy(const_cast<uint16_t*>(values.data()), [](char* there, uint16_t* here, size_t bytes) {
      ASSERT_EQ(cudaMemcpy(there, here, bytes, cudaMemcpyHostToDevice), cudaSuccess);
    });
  }
  std::vector<uint16_t> read() const {
    std::vector<uint16_t> values(static_cast<size_t>(extents_.batch * extents_.rows * extents_.heads * extents_.dim));
    copy(values.data(), [](char* there, uint16_t* here, size_t bytes) {
      ASSERT_EQ(cudaMemcpy(here, there, bytes, cudaMemcpyDeviceToHost), cudaSuccess);
    });
    return values;
  }

 private:
  struct Free {
    void operator()(void* memory) const { cudaFree(memory); }
  };

  template <class Row>
  void copy(uint16_t* values, Row&& row_of_head) const {
    for (int64_t b = 0; b < extents_.batch; ++b) {
      for (int64_t row = 0; row < extents_.rows; ++row) {
        for (int64_t head = 0; head < extents_.heads; ++head, values += extents_.dim) {
          const int64_t offset = b * stride_.batch + row * stride_.row + head * stride_.head;
          row_of_head(static_cast<char*>(data()) + offset * 2, values, static_cast<size_t>(extents_.dim) * 2);
        }
      }
    }
  }

  Extents extents_;
  Strides stride_;
  std::unique_ptr<void, Free> memory_;
};

/// Small things on the device.
template <class T>
class DeviceVector {
 public:
  explicit DeviceVector(const std::vector<T>& values) : size_(values.size()) {
    EXPECT_EQ(cudaMalloc(&memory_, size_ * sizeof(T)), cudaSuccess);
    EXPECT_EQ(cudaMemcpy(memory_, values.data(), size_ * sizeof(T), cudaMemcpyHostToDevice), cudaSuccess);
  }
  DeviceVector(const DeviceVector&) = delete;
  ~DeviceVector() { cudaFree(memory_); }

  T* data() const { return static_cast<T*>(memory_); }
  std::vector<T> read() const {
    std::vector<T> values(size_);
    EXPECT_EQ(cudaMemcpy(values.data(), memory_, size_ * sizeof(T), cudaMemcpyDeviceToHost), cudaSuccess);
    return values;
  }

 private:
  size_t size_;
  void* memory_ = nullptr;
};

std::vector<uint16_t> random_numbers(const Extents& e, DType dtype, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  std::vector<uint16_t> bits(static_cast<size_t>(e.batch * e.rows * e.heads * e.dim));
  for (size_t i = 0; i < bits.size(); ++i) {
    reference::write(bits.data(), dtype, static_cast<int64_t>(i), normal(random));
  }
  return bits;
}

/// The dimension whose steps are so long that the last ones pass 2^31 elements.
enum class Far { Nothing, Sequences, Rows, Heads };

Strides strides_of(const Extents& e, Far far) {
  Strides stride = e.contiguous();
  const auto past = [](int64_t steps) { return ((int64_t{1} << 31) / steps + 64) / 64 * 64; };
  if (far == Far::Sequences && e.batch > 1) stride.batch = past(e.batch - 1);
  if (far == Far::Rows && e.rows > 1) {
    stride.row = past(e.rows - 1);
    stride.batch = stride.row * e.rows;
  }
  if (far == Far::Heads && e.heads > 1) stride.head = past(e.heads - 1);
  return stride;
}

class CudaFarMemory : public CudaKernelTest {
 protected:
  static constexpr int32_t kBatch = 2, kKeys = 97, kHeads = 2, kPageSize = 16, kPages = 14;
  static constexpr ChunkGeometry kChunk{40, 48};

  struct Result {
    std::vector<uint16_t> out;
    std::vector<float> lse;
  };

  int32_t head_dim() const { return std::get<1>(GetParam()); }
  DType dtype() const { return std::get<0>(GetParam()); }

  /// False: there is no memory for it.
  bool attend(int32_t rows, Far far, bool paged, Result* result) const {
    const Extents queries{kBatch, rows, kHeads, head_dim()};
    const Extents keys =
        paged ? Extents{kPages, kPageSize, kHeads, head_dim()} : Extents{kBatch, kKeys, kHeads, head_dim()};
    FarTensor q(queries, strides_of(queries, far)), out(queries, strides_of(queries, far));
    FarTensor k(keys, strides_of(keys, far)), v(keys, strides_of(keys, far));
    for (const FarTensor* tensor : {&q, &out, &k, &v}) {
      if (tensor->data() == nullptr) return false;
    }
    q.write(random_numbers(queries, dtype(), 1));
    k.write(random_numbers(keys, dtype(), 2));
    v.write(random_numbers(keys, dtype(), 3));
    const Tables tables(kChunk.max_position + 1, head_dim() / 2);
    const DeviceVector<float> cos(tables.cos), sin(tables.sin);
    const DeviceVector<float> lse(std::vector<float>(static_cast<size_t>(kBatch * kHeads * rows)));
    const DeviceVector<int32_t> pages({13, 1, 12, 2, 11, 3, 10, 0, 8, 4, 9, 5, 7, 6});

    AttentionParams p;
    p.exec.device = Device::Cuda;
    p.dtype = dtype();
    p.chunk = kChunk;
    p.batch = kBatch;
    p.num_heads = p.num_heads_kv = kHeads;
    p.head_dim = head_dim();
    p.seqlen_q = rows;
    p.seqlen_k = paged ? kPages / kBatch * kPageSize : kKeys;
    p.cache_seqlen = kKeys;
    p.q = {q.data(), q.stride()};
    p.k = {k.data(), k.stride()};
    p.v = {v.data(), v.stride()};
    p.out = {out.data(), out.stride()};
    p.lse = lse.data();
    p.rotary = {cos.data(), sin.data(), kChunk.max_position + 1, head_dim() / 2, false};
    p.num_splits = 1;
    p.softmax_scale = 0.1f;
    if (paged) p.pages = {pages.data(), kPages / kBatch, kPages / kBatch, kPageSize, kPages};
    const Status status = attention(p);
    EXPECT_TRUE(status.ok()) << status.message();
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    *result = {out.read(), lse.read()};
    ++kernel_cases;
    return true;
  }

  void expect_the_same_near_and_far(int32_t rows, bool paged, std::initializer_list<Far> distances) {
    Result near;
    ASSERT_TRUE(attend(rows, Far::Nothing, paged, &near));
    for (const Far far : distances) {
      Result result;
      if (!attend(rows, far, paged, &result)) GTEST_SKIP() << "the device has not the memory for 2^31 elements";
      EXPECT_EQ(result.out, near.out) << "distance " << static_cast<int>(far);
      EXPECT_EQ(result.lse, near.lse) << "distance " << static_cast<int>(far);
    }
  }
};

TEST_P(CudaFarMemory, Prefill) {
  expect_the_same_near_and_far(kKeys, false, {Far::Sequences, Far::Rows, Far::Heads});
  expect_the_same_near_and_far(kKeys, true, {Far::Sequences, Far::Heads});
}

TEST_P(CudaFarMemory, Decode) {
  expect_the_same_near_and_far(2, false, {Far::Sequences, Far::Rows, Far::Heads});
  expect_the_same_near_and_far(2, true, {Far::Sequences, Far::Heads});
}

DCA_TEST_SM80(CudaFarMemory, 64, 128);
DCA_TEST_SM90(CudaFarMemory, 64, 128);
DCA_TEST_SM90_LARGE(CudaFarMemory);

// Rotated keys and values into caches whose last rows lie past 2^31 elements, and rotation into such a tensor.
TEST(CudaAppend, FarMemory) {
  constexpr ChunkGeometry kChunk{6, 9};
  const Extents rows{2, 5, 2, 64}, cache{2, 33, 2, 64};
  const Tables tables(kChunk.max_position + 1, 32);
  const DeviceVector<float> cos(tables.cos), sin(tables.sin);
  std::vector<std::vector<uint16_t>> results[3];
  for (const Far far : {Far::Nothing, Far::Sequences, Far::Rows, Far::Heads}) {
    FarTensor k(rows, strides_of(rows, far)), v(rows, strides_of(rows, far)), rotated(rows, strides_of(rows, far));
    FarTensor k_cache(cache, strides_of(cache, far)), v_cache(cache, strides_of(cache, far));
    for (const FarTensor* tensor : {&k, &v, &rotated, &k_cache, &v_cache}) {
      if (tensor->data() == nullptr) GTEST_SKIP() << "the device has not the memory for 2^31 elements";
    }
    k.write(random_numbers(rows, DType::BFloat16, 1));
    v.write(random_numbers(rows, DType::BFloat16, 2));
    for (FarTensor* tensor : {&k_cache, &v_cache}) tensor->write(random_numbers(cache, DType::BFloat16, 3));

    const auto common = [&](auto& p) {
      p.exec.device = Device::Cuda;
      p.dtype = DType::BFloat16;
      p.chunk = kChunk;
      p.batch = 2;
      p.num_heads_kv = 2;
      p.head_dim = 64;
      p.seqlen_k = 5;
      p.k = {k.data(), k.stride()};
      p.cache_seqlen = 28;  // the last slots
      p.rotary = {cos.data(), sin.data(), kChunk.max_position + 1, 32, false};
    };
    AppendParams append;
    common(append);
    append.cache_slots = 33;
    append.v = {v.data(), v.stride()};
    append.k_cache = {k_cache.data(), k_cache.stride()};
    append.v_cache = {v_cache.data(), v_cache.stride()};
    EXPECT_TRUE(rotate_and_append_kv(append).ok());
    RotateKeysParams rotate;
    common(rotate);
    rotate.out = {rotated.data(), rotated.stride()};
    EXPECT_TRUE(rotate_keys(rotate).ok());
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    results[0].push_back(k_cache.read());
    results[1].push_back(v_cache.read());
    results[2].push_back(rotated.read());
    ++kernel_cases;
  }
  for (const auto& result : results) {
    for (size_t far = 1; far < result.size(); ++far) EXPECT_EQ(result[far], result[0]) << "distance " << far;
  }
}

}  // namespace
}  // namespace dca::testing
