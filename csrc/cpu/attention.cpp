// Dual Chunk Attention on the CPU: one pass over the keys with one online softmax (An et al. 2024, section 3).
//
// A task is (sequence, KV head, query tile, key split). The tile holds up to block_m positions of one chunk, for every
// query head of the group, so that K and V are read once for all of them. It walks its keys intra -> successive ->
// inter; only Q is rotated anew in between, so one running (max, sum, O) per row goes through all three.
//
// Two strategies share the walk: many rows pack each key block and work in strips that keep the logits in L1
// ("tile"); few rows, as in decode, read the keys where they lie ("rows").
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <vector>

#include "backends.h"
#include "cache_rows.h"
#include "combine.h"
#include "heuristics.h"
#include "micro_kernels.h"
#include "threading.h"

namespace dca::cpu {
namespace {

constexpr int32_t kStripRows = 24;  // logits of a strip: 24 x 128 x 4 bytes = 12 KiB
constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;
constexpr int64_t kAlignment = 64;
constexpr int64_t kMinMacsPerThread = 100000;  // some 5 microseconds

template <class T>
constexpr T round_up(T x, T multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

struct Task {
  int32_t b;
  int32_t kv_head;
  int32_t q_begin;  // logical positions [q_begin, q_end) of one chunk
  int32_t q_end;
  int32_t split;
  KeyRange window;  // logical keys of this split

  int64_t num_pairs() const { return static_cast<int64_t>(q_end - q_begin) * window.size(); }
};

struct Plan {
  CpuTileShape shape;
  int32_t num_splits = 1;
  std::vector<Task> tasks;  // longest first

  /// Threads that the work repays: at least kMinMacsPerThread multiply-adds for each.
  int64_t max_workers(const AttentionParams& p) const {
    int64_t num_pairs = 0;
    for (const Task& task : tasks) num_pairs += task.num_pairs();
    return 1 + num_pairs * (p.num_heads / p.num_heads_kv) * 2 * p.head_dim / kMinMacsPerThread;
  }
};

// --- The plan ---

int64_t total_rows(const AttentionParams& p) {
  return p.cu_seqlens_q != nullptr ? p.total_q : static_cast<int64_t>(p.batch) * p.seqlen_q;
}

template <class Visit>
void for_each_tile(const AttentionParams& p, int32_t block_m, Visit&& visit) {
  for (int32_t b = 0; b < p.batch; ++b) {
    const SeqlenInfo info = SeqlenInfo::of(p, b);
    for (int32_t begin = info.position(info.first_row); begin < info.kv_len;) {
      const int32_t end = p.chunk.tile_end(begin, block_m, info.kv_len);
      visit(b, begin, end);
      begin = end;
    }
  }
}

int32_t choose_num_splits(const AttentionParams& p, CpuTileShape shape) {
  if (p.num_splits > 0) return p.num_splits;
  int64_t num_tiles = 0;
  int32_t longest = 0;
  for_each_tile(p, shape.block_m, [&](int32_t, int32_t, int32_t end) {
    num_tiles += p.num_heads_kv;
    longest = std::max(longest, end);
  });
  return cpu_num_splits(num_tiles, threading_of(p.exec).num_threads, longest);
}

Plan make_plan(const AttentionParams& p) {
  Plan plan;
  plan.shape = cpu_tile_shape(p.num_heads / p.num_heads_kv, p.head_dim);
  plan.num_splits = choose_num_splits(p, plan.shape);
  for_each_tile(p, plan.shape.block_m, [&](int32_t b, int32_t begin, int32_t end) {
    const int32_t keys = (end + plan.num_splits - 1) / plan.num_splits;
    for (int32_t kv_head = 0; kv_head < p.num_heads_kv; ++kv_head) {
      for (int32_t split = 0; split < plan.num_splits; ++split) {
        const int64_t first = static_cast<int64_t>(split) * keys;
        const KeyRange window{static_cast<int32_t>(std::min<int64_t>(first, end)),
                              static_cast<int32_t>(std::min<int64_t>(first + keys, end))};
        plan.tasks.push_back({b, kv_head, begin, end, split, window});
      }
    }
  });
  std::stable_sort(plan.tasks.begin(), plan.tasks.end(),
                   [](const Task& a, const Task& b) { return a.num_pairs() > b.num_pairs(); });
  return plan;
}

// --- Memory ---

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

  static int64_t count(const AttentionParams& p, int32_t num_splits) {
    return num_splits <= 1 ? 0 : num_splits * total_rows(p) * p.num_heads * (static_cast<int64_t>(p.head_dim) + 1);
  }
  Workspace(const AttentionParams& p, int32_t num_splits, float* memory) : outs(memory) {
    if (num_splits > 1) lses = memory + num_splits * total_rows(p) * p.num_heads * static_cast<int64_t>(p.head_dim);
  }
};

// What one worker needs, in fp32. `dim` is head_dim rounded up to whole vectors.
struct Scratch {
  float* q;        // (rows, dim): rotated for the current segment, times all factors on the logits and log2(e)
  float* o;        // (rows, dim)
  float* row_max;  // (rows): in base 2
  float* row_sum;  // (rows)
  float* panels;   // (block_n, dim) as packed panels
  float* values;   // (block_n, dim)
  float* s;        // (max(strip, unpacked rows), block_n)

  static int64_t rows(const AttentionParams& p, CpuTileShape shape) {
    return static_cast<int64_t>(shape.block_m) * (p.num_heads / p.num_heads_kv);
  }
  static int64_t count(const AttentionParams& p, CpuTileShape shape, int64_t dim) {
    const int64_t per_row = 2 * dim + 2;
    const int64_t strip = std::max<int64_t>(kStripRows, kCpuMinPackedRows);
    return round_up<int64_t>(rows(p, shape) * per_row + shape.block_n * (2 * dim + strip), 16);
  }
  Scratch(const AttentionParams& p, CpuTileShape shape, int64_t dim, float* memory) {
    const int64_t n = rows(p, shape);
    panels = memory;  // the vectors that are read most start on a cache line
    values = panels + shape.block_n * dim;
    q = values + shape.block_n * dim;
    o = q + n * dim;
    s = o + n * dim;
    row_max = s + std::max<int64_t>(kStripRows, kCpuMinPackedRows) * shape.block_n;
    row_sum = row_max + n;
  }
};

// --- One tile ---

class Tile {
 public:
  Tile(const AttentionParams& p, const MicroKernels& mk, CpuTileShape shape, const Task& task, const Scratch& scratch)
      : p_(p),
        mk_(mk),
        shape_(shape),
        task_(task),
        w_(scratch),
        info_(SeqlenInfo::of(p, task.b)),
        keys_(p, p.k, p.k_scale, info_, task.b, task.kv_head),
        values_(p, p.v, p.v_scale, info_, task.b, task.kv_head),
        group_(p.num_heads / p.num_heads_kv),
        positions_(task.q_end - task.q_begin),
        dim_(round_up(p.head_dim, mk.lanes)),
        scale_(logit_scale(p, info_, task.b) * kLog2E * head_scale(p, p.k_scale, task.kv_head)) {}

  void run() {
    const int32_t rows = group_ * positions_;
    std::fill_n(w_.o, static_cast<int64_t>(rows) * dim_, 0.0f);
    std::fill_n(w_.row_max, rows, -INFINITY);
    std::fill_n(w_.row_sum, rows, 0.0f);
    // Unpacked keys are read in whole vectors, which must not pass the end of a row.
    const bool packed = rows >= kCpuMinPackedRows || p_.head_dim % mk_.lanes != 0;
    for (SegmentIterator it(p_.chunk, task_.q_begin, task_.q_end, p_.segments, task_.window); !it.done(); it.next()) {
      load_queries(it.segment());
      const KeyRange keys = it.keys();
      for (int32_t begin = keys.begin; begin < keys.end; begin += shape_.block_n) {
        const int32_t n = std::min(shape_.block_n, keys.end - begin);
        const bool masked = it.needs_mask(begin + n);
        if (packed) {
          packed_block(begin, n, masked);
        } else {
          unpacked_block(begin, n, masked);
        }
      }
    }
  }

  /// Calls visit(row of q, head, o (dim), lse, 1 / sum) for each row of the tile.
  template <class Visit>
  void for_each_result(Visit&& visit) const {
    for (int32_t h = 0; h < group_; ++h) {
      for (int32_t r = 0; r < positions_; ++r) {
        const int64_t i = static_cast<int64_t>(h) * positions_ + r;
        const bool empty = w_.row_sum[i] == 0.0f;
        const float lse = empty ? -INFINITY : (w_.row_max[i] + std::log2(w_.row_sum[i])) * kLn2;
        float* o = w_.o + i * dim_;
        const float inverse = empty ? 0.0f : head_scale(p_, p_.v_scale, task_.kv_head) / w_.row_sum[i];
        for (int32_t c = 0; c < p_.head_dim; ++c) o[c] *= inverse;
        visit(info_.row(task_.q_begin + r), task_.kv_head * group_ + h, o, lse);
      }
    }
  }

 private:
  // Q of all heads of the group, rows in the order (head, position), rotated for `segment`.
  void load_queries(Segment segment) {
    const int64_t b = p_.cu_seqlens_q != nullptr ? 0 : task_.b;
    for (int32_t h = 0; h < group_; ++h) {
      for (int32_t r = 0; r < positions_; ++r) {
        const int32_t position = task_.q_begin + r;
        const HeadRows q = head_rows(p_.q.data, p_.dtype, p_.q.stride, b, info_.q_row + info_.row(position),
                                     task_.kv_head * group_ + h);
        float* row = w_.q + (static_cast<int64_t>(h) * positions_ + r) * dim_;
        const int64_t entry = static_cast<int64_t>(p_.chunk.query_position(position, segment)) * p_.rotary.half_dim;
        mk_.load_row(q.data, p_.dtype, p_.head_dim, row);
        std::fill(row + p_.head_dim, row + dim_, 0.0f);
        mk_.rotate_row(row, p_.head_dim, p_.rotary.cos + entry, p_.rotary.sin + entry, p_.rotary.half_dim,
                       p_.rotary.interleaved, scale_);
      }
    }
  }

  // Keys of [begin, begin + n) that a row of the tile sees.
  int32_t visible(int32_t row, int32_t begin, int32_t n, bool masked) const {
    return masked ? std::clamp(task_.q_begin + row % positions_ - begin + 1, 0, n) : n;
  }

  float* logits(int32_t row) const { return w_.s + static_cast<int64_t>(row) * shape_.block_n; }

  // Turns the logits of rows [first, first + m), which start at w_.s, into weights.
  void softmax_rows(int32_t first, int32_t m, int32_t begin, int32_t n, bool masked) {
    for (int32_t row = first; row < first + m; ++row) {
      const int32_t seen = visible(row, begin, n, masked);
      if (seen == 0) continue;
      mk_.softmax_row(logits(row - first), seen, w_.row_max + row, w_.row_sum + row,
                      w_.o + static_cast<int64_t>(row) * dim_, dim_);
    }
  }

  // O += weights * values for rows [first, first + m). On the diagonal the keys that all rows see go together and the
  // rest row by row, since a weight of 0 does not hide a NaN in a value that the row must not see.
  void weigh_values(int32_t first, int32_t m, HeadRows values, int32_t begin, int32_t offset, int32_t count,
                    bool masked) {
    float* const o = w_.o + static_cast<int64_t>(first) * dim_;
    int32_t common = count;
    for (int32_t row = first; masked && row < first + m; ++row) {
      common = std::min(common, visible(row, begin + offset, count, masked));
    }
    mk_.pv(w_.s + offset, shape_.block_n, m, values, common, dim_, o, dim_);
    for (int32_t row = 0; masked && row < m; ++row) {
      const int32_t rest = visible(first + row, begin + offset, count, masked) - common;
      mk_.pv(logits(row) + offset + common, shape_.block_n, 1, values.from(common), rest, dim_,
             o + static_cast<int64_t>(row) * dim_, dim_);
    }
  }

  void load_block(const CacheRows& rows, int32_t begin, int32_t n, float* block) {
    rows.for_each_run(begin, n, [&](HeadRows run, int32_t offset, int32_t count) {
      for (int32_t j = 0; j < count; ++j) {
        float* row = block + static_cast<int64_t>(offset + j) * dim_;
        mk_.load_row(run.from(j).data, run.dtype, p_.head_dim, row);
        if (run.scales != nullptr) {
          const float scale = run.scales[j * run.scale_stride];
          for (int32_t c = 0; c < p_.head_dim; ++c) row[c] *= scale;
        }
        std::fill(row + p_.head_dim, row + dim_, 0.0f);
      }
    });
  }

  void pack_keys(int32_t begin, int32_t n) {
    if (keys_.contiguous() && !keys_.scaled()) {
      keys_.for_each_run(
          begin, n, [&](HeadRows run, int32_t, int32_t count) { mk_.pack_keys(run, count, p_.head_dim, w_.panels); });
    } else {  // pages may end inside a panel, and panels take no scales: gather first, where the values will come
      load_block(keys_, begin, n, w_.values);
      mk_.pack_keys({w_.values, dim_, DType::Float32}, n, p_.head_dim, w_.panels);
    }
  }

  void packed_block(int32_t begin, int32_t n, bool masked) {
    pack_keys(begin, n);
    load_block(values_, begin, n, w_.values);
    const HeadRows values{w_.values, dim_, DType::Float32};
    const int32_t rows = group_ * positions_;
    for (int32_t first = 0; first < rows; first += kStripRows) {
      const int32_t m = std::min(kStripRows, rows - first);
      int32_t n_strip = 0;
      for (int32_t row = first; row < first + m; ++row) n_strip = std::max(n_strip, visible(row, begin, n, masked));
      if (n_strip == 0) continue;
      float* const q = w_.q + static_cast<int64_t>(first) * dim_;
      mk_.qk_packed(q, dim_, m, w_.panels, n_strip, p_.head_dim, w_.s, shape_.block_n);
      softmax_rows(first, m, begin, n_strip, masked);
      weigh_values(first, m, values, begin, 0, n_strip, masked);
    }
  }

  // The rows of an Int8 cache are read without their scales, which are factors on its columns of logits and weights.
  // Columns that a row of the tile does not see may become NaN; nothing reads them.
  void scale_columns(HeadRows rows, int32_t offset, int32_t count) const {
    if (rows.scales == nullptr) return;
    mk_.scale_columns(w_.s + offset, shape_.block_n, group_ * positions_, count, rows.scales, rows.scale_stride);
  }

  void unpacked_block(int32_t begin, int32_t n, bool masked) {
    const int32_t rows = group_ * positions_;
    keys_.for_each_run(begin, n, [&](HeadRows run, int32_t offset, int32_t count) {
      mk_.qk_rows(w_.q, dim_, rows, run, count, dim_, w_.s + offset, shape_.block_n);
      scale_columns(run, offset, count);
    });
    softmax_rows(0, rows, begin, n, masked);
    values_.for_each_run(begin, n, [&](HeadRows run, int32_t offset, int32_t count) {
      scale_columns(run, offset, count);
      weigh_values(0, rows, run, begin, offset, count, masked);
    });
  }

  const AttentionParams& p_;
  const MicroKernels& mk_;
  const CpuTileShape shape_;
  const Task& task_;
  const Scratch w_;
  const SeqlenInfo info_;
  const CacheRows keys_;
  const CacheRows values_;
  const int32_t group_;
  const int32_t positions_;
  const int32_t dim_;
  const float scale_;
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
            num_splits, p.head_dim, [&](int32_t split) { return workspace.lses[split * split_rows + row]; },
            [&](int32_t split) { return workspace.outs + (split * split_rows + row) * p.head_dim; }, sum);
        mk.store_row(sum, p.dtype, p.head_dim, output.row(info, b, r, head));
        output.store_lse(info, b, r, head, lse);
      }
    });
  }
}

}  // namespace

Status attention(const AttentionParams& p) {
  const MicroKernels& mk = *micro_kernels();
  const Plan plan = make_plan(p);
  const Output output(p);

  Buffer owned;
  float* memory = static_cast<float*>(p.workspace);
  const int64_t workspace_count = Workspace::count(p, plan.num_splits);
  if (workspace_count > 0 && p.workspace_bytes < static_cast<size_t>(workspace_count) * sizeof(float)) {
    owned = allocate_floats(workspace_count);
    memory = owned.get();
  }
  const int64_t dim = round_up(p.head_dim, mk.lanes);
  const int64_t scratch_count = Scratch::count(p, plan.shape, dim);
  const Threading& threading = threading_of(p.exec);
  const Buffer scratch = allocate_floats(scratch_count * threading.num_threads);
  if (scratch == nullptr || (workspace_count > 0 && memory == nullptr)) {
    return {StatusCode::OutOfMemory, "attention: not enough memory for the CPU kernel's scratch buffers"};
  }
  const Workspace workspace(p, plan.num_splits, memory);

  clear_rows_without_position(p, output);
  const int64_t split_rows = total_rows(p) * p.num_heads;
  parallel_tasks(
      threading, static_cast<int64_t>(plan.tasks.size()),
      [&](int64_t index, int32_t worker) {
        const Task& task = plan.tasks[static_cast<size_t>(index)];
        const SeqlenInfo info = SeqlenInfo::of(p, task.b);
        Tile tile(p, mk, plan.shape, task, Scratch(p, plan.shape, dim, scratch.get() + worker * scratch_count));
        tile.run();
        tile.for_each_result([&](int32_t r, int32_t head, const float* o, float lse) {
          if (plan.num_splits == 1) {
            mk.store_row(o, p.dtype, p.head_dim, output.row(info, task.b, r, head));
            output.store_lse(info, task.b, r, head, lse);
          } else {
            const int64_t row = task.split * split_rows + accum_row(p, info, task.b, r, head);
            std::copy_n(o, p.head_dim, workspace.outs + row * p.head_dim);
            workspace.lses[row] = lse;
          }
        });
      },
      plan.max_workers(p));
  if (plan.num_splits > 1) combine_splits(p, mk, plan.num_splits, workspace, output);
  return {};
}

size_t attention_workspace_bytes(const AttentionParams& p) {
  const CpuTileShape shape = cpu_tile_shape(p.num_heads / p.num_heads_kv, p.head_dim);
  return static_cast<size_t>(Workspace::count(p, choose_num_splits(p, shape))) * sizeof(float);
}

std::string describe_attention(const AttentionParams& p) {
  const MicroKernels& mk = *micro_kernels();
  const int32_t group = p.num_heads / p.num_heads_kv;
  const int32_t block_m = cpu_tile_shape(group, p.head_dim).block_m;
  const int32_t rows = group * std::min({block_m, p.seqlen_q, p.chunk.chunk_len});
  const bool packed = rows >= kCpuMinPackedRows || p.head_dim % mk.lanes != 0;
  return std::string("cpu/") + mk.isa + (packed ? "/tile" : "/rows");
}

const char* isa() { return micro_kernels() != nullptr ? micro_kernels()->isa : nullptr; }

int default_num_threads() { return default_threading().num_threads; }

}  // namespace dca::cpu
