// merge_attention_states on the CPU, parallel over rows.
#include <algorithm>
#include <vector>

#include "backends.h"
#include "combine.h"
#include "micro_kernels.h"
#include "threading.h"

namespace dca::cpu {

namespace {

// The LSEs of so many rows of a head share a cache line.
constexpr int64_t kRowsPerTask = 16;

}  // namespace

Status merge_attention_states(const MergeParams& p) {
  const MicroKernels& mk = *micro_kernels();
  const Threading& threading = threading_of(p.exec);
  const int64_t row_bytes = static_cast<int64_t>(p.head_dim) * static_cast<int64_t>(element_size(p.dtype));
  const size_t per_worker = static_cast<size_t>(p.head_dim);  // the sum
  std::vector<float> scratch(per_worker * static_cast<size_t>(threading.num_threads));
  const int64_t blocks = (p.seqlen + kRowsPerTask - 1) / kRowsPerTask;
  parallel_tasks(threading, p.batch * blocks, [&](int64_t task, int32_t worker) {
    float* sum = scratch.data() + per_worker * static_cast<size_t>(worker);
    const int64_t b = task / blocks;
    const int64_t begin = task % blocks * kRowsPerTask;
    const int64_t end = std::min<int64_t>(begin + kRowsPerTask, p.seqlen);
    for (int32_t head = 0; head < p.num_heads; ++head) {
      for (int64_t r = begin; r < end; ++r) {
        const int64_t lse_index = (b * p.num_heads + head) * p.seqlen + r;
        const int64_t out_offset = ((b * p.seqlen + r) * p.num_heads + head) * row_bytes;
        const float lse = combine_row(
            mk, p.num_parts, p.head_dim, p.dtype, [&](int32_t part) { return p.lses[part][lse_index]; },
            [&](int32_t part) { return static_cast<const char*>(p.outs[part]) + out_offset; }, sum);
        mk.store_row(sum, p.dtype, p.head_dim, static_cast<char*>(p.out) + out_offset);
        p.lse[lse_index] = lse;
      }
    }
  });
  return {};
}

}  // namespace dca::cpu
