// Dual Chunk Attention on the CPU: one pass over the keys with one online softmax (An et al. 2024, section 3).
//
// A task (plan.h) holds up to block_m positions of one chunk for every query head of a KV head, so that K and V are
// read once for all of them. It walks its keys intra -> successive -> inter; only Q is rotated anew in between, so one
// running (max, sum, O) per row goes through all three. Tasks of many rows pack each key block (tile_walk.h); tasks of
// few, as in decode, read the keys where they lie (row_walk.h).
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <vector>

#include "backends.h"
#include "combine.h"
#include "heuristics.h"
#include "micro_kernels.h"
#include "plan.h"
#include "query_rows.h"
#include "row_walk.h"
#include "threading.h"
#include "tile_walk.h"

namespace dca::cpu {
namespace {

template <class T>
constexpr T round_up(T x, T multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

int64_t total_rows(const AttentionParams& p) {
  return p.cu_seqlens_q != nullptr ? p.total_q : static_cast<int64_t>(p.batch) * p.seqlen_q;
}

// --- Memory ---

constexpr int64_t kAlignment = 64;  // a cache line

struct FreeDeleter {
  void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float, FreeDeleter>;

Buffer allocate_floats(int64_t count) {
  const int64_t bytes =
      round_up<int64_t>(std::max<int64_t>(count, 1) * static_cast<int64_t>(sizeof(float)), kAlignment);
  return Buffer(static_cast<float*>(std::aligned_alloc(kAlignment, static_cast<size_t>(bytes))));
}

// Partial results of the splits: outs (num_splits, rows, heads, head_dim) and lses (num_splits, rows, heads).
struct Workspace {
  float* outs = nullptr;
  float* lses = nullptr;

  bool holds_splits() const { return lses != nullptr; }

  static int64_t count(const AttentionParams& p, int32_t num_splits) {
    return num_splits <= 1 ? 0 : num_splits * total_rows(p) * p.num_heads * (static_cast<int64_t>(p.head_dim) + 1);
  }
  Workspace(const AttentionParams& p, int32_t num_splits, float* memory) : outs(memory) {
    if (num_splits > 1) lses = memory + num_splits * total_rows(p) * p.num_heads * static_cast<int64_t>(p.head_dim);
  }
};

// What one worker needs, in floats: the running rows of a task, and the buffers of either walk.
class Scratch {
 public:
  Scratch(const AttentionParams& p, const MicroKernels& mk, const Plan& plan)
      : dim_(round_up(p.head_dim, mk.lanes)),
        panels_dim_(round_up(p.head_dim, mk.panel)),
        blocks_(packed_products(p, mk).blocks),
        packed_rows_(round_up<int64_t>(plan.max_packed_rows, packed_products(p, mk).group_rows)),
        rows_(std::max(packed_rows_, plan.max_unpacked_rows)) {
    const int64_t tile = packed_rows_ > 0 ? TileBuffers::count(packed_rows_, panels_dim_, blocks_) : 0;
    buffers_ = round_up<int64_t>(std::max(tile, RowBuffers::count(plan.max_unpacked_rows, dim_)), 16);
    per_worker_ = buffers_ + round_up<int64_t>(rows_ * (dim_ + 2), 16);
  }

  bool allocate(int32_t num_workers) {
    memory_ = allocate_floats(per_worker_ * num_workers);
    return memory_ != nullptr;
  }

  RunningRows running_rows(int32_t worker) const {
    float* const o = buffers(worker) + buffers_;
    float* const row_max = o + rows_ * dim_;
    return {o, dim_, row_max, row_max + rows_};
  }
  TileBuffers tile_buffers(int32_t worker) const { return {packed_rows_, panels_dim_, blocks_, buffers(worker)}; }
  RowBuffers row_buffers(int32_t worker, int32_t rows) const { return {rows, dim_, buffers(worker)}; }

 private:
  float* buffers(int32_t worker) const { return memory_.get() + worker * per_worker_; }

  int64_t dim_;
  int64_t panels_dim_;
  int64_t blocks_;
  int64_t packed_rows_;
  int64_t rows_;
  int64_t buffers_;
  int64_t per_worker_;
  Buffer memory_;
};

// --- Results ---

// Row r of sequence b in out, and its place in lse.
class Output {
 public:
  explicit Output(const AttentionParams& p) : p_(p) {}

  void* row(const SeqlenInfo& info, int32_t b, int32_t r, int32_t head) const {
    const Strides& s = p_.out.stride;
    const int64_t batch = p_.cu_seqlens_q != nullptr ? 0 : b * s.batch;
    const int64_t offset = batch + (info.q_row + r) * s.row + head * s.head;
    return static_cast<char*>(p_.out.data) + offset * static_cast<int64_t>(element_size(p_.dtype));
  }

  void store_lse(const SeqlenInfo& info, int32_t b, int32_t r, int32_t head, float value) const {
    if (p_.lse == nullptr) return;
    const bool ragged = p_.cu_seqlens_q != nullptr;
    const int64_t line = ragged ? head : static_cast<int64_t>(b) * p_.num_heads + head;
    p_.lse[line * (ragged ? p_.total_q : p_.seqlen_q) + info.q_row + r] = value;
  }

 private:
  const AttentionParams& p_;
};

// Row index in the workspace: rows of all sequences, then heads.
int64_t accum_row(const AttentionParams& p, const SeqlenInfo& info, int32_t b, int32_t r, int32_t head) {
  const int64_t first = p.cu_seqlens_q != nullptr ? info.q_row : static_cast<int64_t>(b) * p.seqlen_q;
  return (first + r) * p.num_heads + head;
}

// Rows in front of the first key: out = 0, lse = -inf.
void clear_rows_without_position(const AttentionParams& p, const Output& output) {
  for (int32_t b = 0; b < p.batch; ++b) {
    const SeqlenInfo info = SeqlenInfo::of(p, b);
    for (int32_t r = 0; r < info.first_row; ++r) {
      for (int32_t head = 0; head < p.num_heads; ++head) {
        char* row = static_cast<char*>(output.row(info, b, r, head));
        std::fill_n(row, static_cast<size_t>(p.head_dim) * element_size(p.dtype), char{0});
        output.store_lse(info, b, r, head, -INFINITY);
      }
    }
  }
}

void combine_splits(const AttentionParams& p, const MicroKernels& mk, int32_t num_splits, const Workspace& workspace,
                    const Output& output) {
  const int64_t split_rows = total_rows(p) * p.num_heads;
  const Threading& threading = threading_of(p.exec);
  std::vector<float> sums(static_cast<size_t>(threading.num_threads) * static_cast<size_t>(p.head_dim));
  for (int32_t b = 0; b < p.batch; ++b) {
    const SeqlenInfo info = SeqlenInfo::of(p, b);
    const int32_t rows = info.seqlen_q - info.first_row;
    parallel_tasks(threading, rows, [&](int64_t index, int32_t worker) {
      const int32_t r = info.first_row + static_cast<int32_t>(index);
      float* const sum = sums.data() + static_cast<int64_t>(worker) * p.head_dim;
      for (int32_t head = 0; head < p.num_heads; ++head) {
        const int64_t row = accum_row(p, info, b, r, head);
        const float lse = combine_row(
            mk, num_splits, p.head_dim, DType::Float32,
            [&](int32_t split) { return workspace.lses[split * split_rows + row]; },
            [&](int32_t split) { return workspace.outs + (split * split_rows + row) * p.head_dim; }, sum);
        mk.store_row(sum, p.dtype, p.head_dim, output.row(info, b, r, head));
        output.store_lse(info, b, r, head, lse);
      }
    });
  }
}

// Where the rows of a task go when they are done: into out, or among the partial results of its split.
class TaskResults {
 public:
  TaskResults(const TaskContext& context, const SeqlenInfo& info, const Output& output, const Workspace& workspace)
      : c_(context), info_(info), output_(output), workspace_(workspace) {}

  void store() const {
    for (int32_t row = 0; row < c_.rows.count(); ++row) {
      ask_for(row + kRowsAhead);
      store(row, c_.state.finish(row, c_.p.head_dim, head_scale(c_.p, c_.p.v_scale, c_.rows.kv_head(row))));
    }
  }

 private:
  // Rows of out are in no cache. Stores wait for them one after the other.
  static constexpr int32_t kRowsAhead = 16;

  void ask_for(int32_t row) const {
    if (row >= c_.rows.count() || workspace_.holds_splits()) return;
    ask_to_write(out(row), c_.p.head_dim * static_cast<int64_t>(element_size(c_.p.dtype)));
  }

  void store(int32_t row, float lse) const {
    const int32_t r = info_.row(c_.rows.position(row));
    const int32_t head = c_.rows.head(row);
    if (workspace_.holds_splits()) {
      const int64_t at = c_.task.split * total_rows(c_.p) * c_.p.num_heads + accum_row(c_.p, info_, c_.task.b, r, head);
      std::copy_n(c_.state.row(row), c_.p.head_dim, workspace_.outs + at * c_.p.head_dim);
      workspace_.lses[at] = lse;
    } else {
      c_.mk.store_row(c_.state.row(row), c_.p.dtype, c_.p.head_dim, out(row));
      output_.store_lse(info_, c_.task.b, r, head, lse);
    }
  }

  void* out(int32_t row) const {
    return output_.row(info_, c_.task.b, info_.row(c_.rows.position(row)), c_.rows.head(row));
  }

  const TaskContext& c_;
  const SeqlenInfo& info_;
  const Output& output_;
  const Workspace& workspace_;
};

void run_task(const AttentionParams& p, const MicroKernels& mk, const Task& task, const Scratch& scratch,
              int32_t worker, const Output& output, const Workspace& workspace) {
  const SeqlenInfo info = SeqlenInfo::of(p, task.b);
  const QueryRows rows(p, mk, info, task);
  const RunningRows state = scratch.running_rows(worker);
  const TaskContext context{p, mk, task, rows, state, Cache::keys(p), Cache::values(p), CacheRows(p, info, task.b)};
  if (task.packed) {
    TileWalk(context, scratch.tile_buffers(worker)).run();
  } else {
    RowWalk(context, scratch.row_buffers(worker, rows.count())).run();
  }
  TaskResults(context, info, output, workspace).store();
}

}  // namespace

Status attention(const AttentionParams& p) {
  const MicroKernels& mk = *micro_kernels();
  const Plan plan = make_plan(p, mk);
  const Output output(p);

  Buffer owned;
  float* memory = static_cast<float*>(p.workspace);
  const int64_t workspace_count = Workspace::count(p, plan.num_splits);
  if (workspace_count > 0 && p.workspace_bytes < static_cast<size_t>(workspace_count) * sizeof(float)) {
    owned = allocate_floats(workspace_count);
    memory = owned.get();
  }
  const Threading& threading = threading_of(p.exec);
  Scratch scratch(p, mk, plan);
  if (!scratch.allocate(threading.num_threads) || (workspace_count > 0 && memory == nullptr)) {
    return {StatusCode::OutOfMemory, "attention: not enough memory for the CPU kernel's scratch buffers"};
  }
  const Workspace workspace(p, plan.num_splits, memory);

  clear_rows_without_position(p, output);
  parallel_tasks(
      threading, static_cast<int64_t>(plan.tasks.size()),
      [&](int64_t index, int32_t worker) {
        run_task(p, mk, plan.tasks[static_cast<size_t>(index)], scratch, worker, output, workspace);
      },
      plan.max_workers);
  if (plan.num_splits > 1) combine_splits(p, mk, plan.num_splits, workspace, output);
  return {};
}

size_t attention_workspace_bytes(const AttentionParams& p) {
  return static_cast<size_t>(Workspace::count(p, choose_num_splits(p, *micro_kernels()))) * sizeof(float);
}

std::string describe_attention(const AttentionParams& p) {
  const MicroKernels& mk = *micro_kernels();
  const int32_t group = p.num_heads / p.num_heads_kv;
  const int32_t block_m = tile_shape(p, mk).block_m;
  const int32_t rows = group * std::min({block_m, p.seqlen_q, p.chunk.chunk_len});
  return std::string("cpu/") + mk.isa + (packs_keys(rows, p.head_dim, mk.lanes) ? "/tile" : "/rows");
}

const char* isa() { return micro_kernels() != nullptr ? micro_kernels()->isa : nullptr; }

int default_num_threads() { return default_threading().num_threads; }

}  // namespace dca::cpu
