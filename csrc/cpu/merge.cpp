// merge_attention_states on the CPU, parallel over rows.
#include <vector>

#include "backends.h"
#include "combine.h"
#include "micro_kernels.h"
#include "threading.h"

namespace dca::cpu {

Status merge_attention_states(const MergeParams& p) {
  const MicroKernels& mk = *micro_kernels();
  const Threading& threading = threading_of(p.exec);
  const int64_t row_bytes = static_cast<int64_t>(p.head_dim) * static_cast<int64_t>(element_size(p.dtype));
  // Per worker: the sum, and one row of one part in fp32.
  const size_t per_worker = 2 * static_cast<size_t>(p.head_dim);
  std::vector<float> scratch(per_worker * static_cast<size_t>(threading.num_threads));
  parallel_tasks(threading, p.batch * p.seqlen, [&](int64_t row, int32_t worker) {
    float* sum = scratch.data() + per_worker * static_cast<size_t>(worker);
    float* part_row = sum + p.head_dim;
    const int64_t b = row / p.seqlen;
    const int64_t r = row % p.seqlen;
    for (int32_t head = 0; head < p.num_heads; ++head) {
      const int64_t lse_index = (b * p.num_heads + head) * p.seqlen + r;
      const int64_t out_offset = (row * p.num_heads + head) * row_bytes;
      const float lse = combine_row(
          p.num_parts, p.head_dim, [&](int32_t part) { return p.lses[part][lse_index]; },
          [&](int32_t part) {
            mk.load_row(static_cast<const char*>(p.outs[part]) + out_offset, p.dtype, p.head_dim, part_row);
            return part_row;
          },
          sum);
      mk.store_row(sum, p.dtype, p.head_dim, static_cast<char*>(p.out) + out_offset);
      p.lse[lse_index] = lse;
    }
  });
  return {};
}

}  // namespace dca::cpu
