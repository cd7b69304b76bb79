#include "plan.h"

#include <algorithm>

#include "dca/seqlen_info.h"
#include "heuristics.h"
#include "threading.h"

namespace dca::cpu {
namespace {

constexpr int64_t kMinMacsPerThread = 100000;  // some 3 microseconds

// Which KV heads share a task. Where the heads of a key lie side by side, reading them together reads memory
// straight on: 21 to 28 GB/s where head after head gave 13 to 16 (8 heads x 512 bytes, Zen 3, two threads).
int32_t kv_heads_per_task(const AttentionParams& p, int64_t rows, bool packed) {
  const bool side_by_side = p.k.stride.head < p.k.stride.row && p.v.stride.head < p.v.stride.row;
  if (packed || !side_by_side) return 1;
  return cpu_heads_per_task(p.num_heads_kv, static_cast<int32_t>(rows), p.head_dim);
}

// Calls visit(task) for every task, its split and window not yet set.
template <class Visit>
void for_each_tile(const AttentionParams& p, const MicroKernels& mk, Visit&& visit) {
  const int32_t group = p.num_heads / p.num_heads_kv;
  const int32_t block_m = tile_shape(p, mk).block_m;
  for (int32_t b = 0; b < p.batch; ++b) {
    const SeqlenInfo info = SeqlenInfo::of(p, b);
    for (int32_t begin = info.position(info.first_row); begin < info.kv_len;) {
      const int32_t end = p.chunk.tile_end(begin, block_m, info.kv_len);
      const int64_t rows = static_cast<int64_t>(group) * (end - begin);
      const bool packed = packs_keys(rows, p.head_dim, mk.lanes);
      const int32_t heads = kv_heads_per_task(p, rows, packed);
      for (int32_t head = 0; head < p.num_heads_kv; head += heads) {
        visit(Task{b, head, std::min(head + heads, p.num_heads_kv), begin, end, 0, {0, end}, packed});
      }
      begin = end;
    }
  }
}

int64_t num_pairs(const Task& task) {
  return static_cast<int64_t>(task.num_kv_heads()) * task.num_positions() * task.window.size();
}

}  // namespace

const PackedProducts& packed_products(const AttentionParams& p, const MicroKernels& mk) {
  return p.dtype == DType::BFloat16 && mk.bfloat16 != nullptr ? *mk.bfloat16 : mk.fp32;
}

CpuTileShape tile_shape(const AttentionParams& p, const MicroKernels& mk) {
  const PackedProducts& products = packed_products(p, mk);
  const int64_t positions = p.cu_seqlens_q != nullptr ? p.total_q : static_cast<int64_t>(p.batch) * p.seqlen_q;
  const int64_t total = positions * p.num_heads * p.head_dim;
  const int32_t elements = cpu_task_elements(total, threading_of(p.exec).num_threads);
  return cpu_tile_shape(p.num_heads / p.num_heads_kv, p.head_dim, elements, products.strip_rows);
}

bool packs_keys(int64_t rows, int32_t head_dim, int32_t lanes) {
  // Keys as rows are read in whole vectors, which must not pass the end of a row.
  return rows >= kCpuMinPackedRows || head_dim % lanes != 0;
}

int32_t choose_num_splits(const AttentionParams& p, const MicroKernels& mk) {
  if (p.num_splits > 0) return p.num_splits;
  int64_t num_tasks = 0;
  int32_t longest = 0;
  for_each_tile(p, mk, [&](const Task& task) {
    ++num_tasks;
    longest = std::max(longest, task.q_end);
  });
  return cpu_num_splits(num_tasks, threading_of(p.exec).num_threads, longest);
}

Plan make_plan(const AttentionParams& p, const MicroKernels& mk) {
  const int32_t group = p.num_heads / p.num_heads_kv;
  Plan plan;
  plan.block_m = tile_shape(p, mk).block_m;
  plan.num_splits = choose_num_splits(p, mk);
  int64_t pairs = 0;
  for_each_tile(p, mk, [&](Task task) {
    const int64_t rows = static_cast<int64_t>(group) * task.num_kv_heads() * task.num_positions();
    int64_t& largest = task.packed ? plan.max_packed_rows : plan.max_unpacked_rows;
    largest = std::max(largest, rows);
    const int32_t end = task.q_end;
    const int32_t keys = (end + plan.num_splits - 1) / plan.num_splits;
    for (task.split = 0; task.split < plan.num_splits; ++task.split) {
      const int64_t first = static_cast<int64_t>(task.split) * keys;
      task.window = {static_cast<int32_t>(std::min<int64_t>(first, end)),
                     static_cast<int32_t>(std::min<int64_t>(first + keys, end))};
      plan.tasks.push_back(task);
      pairs += num_pairs(task);
    }
  });
  std::stable_sort(plan.tasks.begin(), plan.tasks.end(),
                   [](const Task& a, const Task& b) { return num_pairs(a) > num_pairs(b); });
  plan.max_workers = 1 + pairs * group * 2 * p.head_dim / kMinMacsPerThread;
  return plan;
}

}  // namespace dca::cpu
