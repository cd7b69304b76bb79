// Refusals: every bad input of the contract gives InvalidArgument, a sentence that names the argument and what it was,
// and has written nothing.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "attention_problem.h"

namespace dca::testing {
namespace {

template <class Params>
struct BadInput {
  const char* name;
  std::function<void(Params&)> spoil;
  std::vector<std::string> message_has;
};

void expect_refused(const Status& status, const std::vector<std::string>& message_has) {
  EXPECT_EQ(status.code(), StatusCode::InvalidArgument);
  for (const std::string& part : message_has) {
    EXPECT_NE(status.message().find(part), std::string::npos) << status.message();
  }
  EXPECT_EQ(status.message().find('\n'), std::string::npos);
}

const std::vector<int32_t> kNegative = {-1, 33};
const std::vector<int32_t> kTooLong = {33, 1000};
const std::vector<int32_t> kNotFromZero = {1, 33, 66};
const std::vector<int32_t> kDecreasing = {0, 33, 32};
const std::vector<int32_t> kOneTooLong = {0, 34, 66};
const std::vector<int32_t> kWrongEnd = {0, 33, 65};
const std::vector<int32_t> kBadPages(64, 99);
const std::vector<int32_t> kNegativePages(64, -1);

void run_nothing(int32_t, void (*)(int32_t, void*), void*) {}
const Threading kNoThreads = {0, run_nothing};
const Threading kNoRun = {2, nullptr};

// What all operators refuse alike.
template <class Params>
std::vector<BadInput<Params>> common_bad_inputs() {
  return {
      {"num_threads", [](Params& p) { p.exec.threading = &kNoThreads; }, {"exec.threading", "num_threads", "0"}},
      {"run", [](Params& p) { p.exec.threading = &kNoRun; }, {"exec.threading", "run"}},
      {"dtype", [](Params& p) { p.dtype = static_cast<DType>(7); }, {"dtype", "7"}},
      {"chunk_len 0",
       [](Params& p) {
         p.chunk = {0, 0};
       },
       {"chunk_len=0", "1 <= chunk_len"}},
      {"max_position too small",
       [](Params& p) {
         p.chunk = {16, 15};
       },
       {"max_position=15"}},
      {"max_position too large",
       [](Params& p) {
         p.chunk = {16, 32};
       },
       {"max_position=32"}},
      {"cos null", [](Params& p) { p.rotary.cos = nullptr; }, {"rotary_cos"}},
      {"sin null", [](Params& p) { p.rotary.sin = nullptr; }, {"rotary_sin"}},
      {"table too short", [](Params& p) { p.rotary.num_positions = 23; }, {"rotary_cos", "24", "23"}},
      {"table too wide", [](Params& p) { p.rotary.half_dim = 33; }, {"rotary_dim", "64", "66"}},
      {"table negative", [](Params& p) { p.rotary.half_dim = -1; }, {"rotary_dim", "-2"}},
      {"batch", [](Params& p) { p.batch = -1; }, {"batch", "-1"}},
      {"num_heads_kv", [](Params& p) { p.num_heads_kv = 0; }, {"num_heads_kv", "0"}},
      {"head_dim 0", [](Params& p) { p.head_dim = 0; }, {"head_dim", "0"}},
      {"head_dim too large", [](Params& p) { p.head_dim = 1025; }, {"head_dim", "1024", "1025"}},
      {"cache_seqlens negative", [](Params& p) { p.cache_seqlens = kNegative.data(); }, {"cache_seqlens", "-1"}},
      {"cache_leftpad negative", [](Params& p) { p.cache_leftpad = kNegative.data(); }, {"cache_leftpad", "-1"}},
      {"cache_leftpad too large", [](Params& p) { p.cache_leftpad = kTooLong.data(); }, {"cache_leftpad", "1000"}},
  };
}

// --- attention ---

class StatusAttention : public ::testing::Test {
 protected:
  void expect_all_refused(const ProblemShape& shape, const std::vector<BadInput<AttentionParams>>& inputs) {
    for (const auto& input : inputs) {
      SCOPED_TRACE(input.name);
      AttentionProblem problem(shape);
      AttentionParams p = problem.params();
      input.spoil(p);
      const std::vector<uint8_t> before = problem.out_tensor().bytes();
      expect_refused(attention(p), input.message_has);
      expect_refused(check_attention(p), input.message_has);
      EXPECT_EQ(problem.out_tensor().bytes(), before) << "out was written";
      for (const double x : problem.lse()) ASSERT_TRUE(std::isnan(x)) << "lse was written";
    }
  }

  static ProblemShape two_sequences() {
    ProblemShape shape;
    shape.kv_lens = {33, 33};
    return shape;
  }
};

TEST_F(StatusAttention, RefusesWhatAllOperatorsRefuse) {
  expect_all_refused(two_sequences(), common_bad_inputs<AttentionParams>());
}

TEST_F(StatusAttention, RefusesBadSizes) {
  using P = AttentionParams;
  expect_all_refused(
      two_sequences(),
      {
          {"num_heads no multiple", [](P& p) { p.num_heads = 3; }, {"num_heads", "multiple", "(2)", "3"}},
          {"num_heads 0", [](P& p) { p.num_heads = 0; }, {"num_heads", "0"}},
          {"seqlen_q", [](P& p) { p.seqlen_q = -1; }, {"seqlen_q=-1"}},
          {"seqlen_k", [](P& p) { p.seqlen_k = -1; }, {"seqlen_k=-1"}},
          {"cache_seqlens too long", [](P& p) { p.cache_seqlens = kTooLong.data(); }, {"cache_seqlens", "1000", "35"}},
          {"append past the cache", [](P& p) { p.cache_seqlens_before_append = true; }, {"cache_seqlens", "66", "35"}},
          {"num_splits negative", [](P& p) { p.num_splits = -1; }, {"num_splits", "-1"}},
          {"num_splits too large", [](P& p) { p.num_splits = 257; }, {"num_splits", "256", "257"}},
          {"yarn", [](P& p) { p.original_max_position_embeddings = -5; }, {"original_max_position_embeddings", "-5"}},
      });
}

TEST_F(StatusAttention, RefusesBadPages) {
  using P = AttentionParams;
  ProblemShape shape = two_sequences();
  shape.keys = KeyLayout::Paged;
  expect_all_refused(
      shape, {
                 {"page_size", [](P& p) { p.pages.page_size = 0; }, {"page_size", "0"}},
                 {"max_pages", [](P& p) { p.pages.max_pages = -1; }, {"max_pages=-1"}},
                 {"num_pages", [](P& p) { p.pages.num_pages = -1; }, {"num_pages=-1"}},
                 {"slots", [](P& p) { p.seqlen_k += 1; }, {"max_pages * page_size"}},
                 {"page id too large",
                  [](P& p) { p.pages.page_table = kBadPages.data(); },
                  {"page_table", "99", "sequence 0"}},
                 {"page id negative", [](P& p) { p.pages.page_table = kNegativePages.data(); }, {"page_table", "-1"}},
                 {"both layouts", [](P& p) { p.cu_seqlens_k = kNotFromZero.data(); }, {"cu_seqlens_k", "page_table"}},
             });
}

TEST_F(StatusAttention, RefusesBadBorders) {
  using P = AttentionParams;
  ProblemShape shape = two_sequences();
  shape.ragged_q = true;
  shape.keys = KeyLayout::Ragged;
  expect_all_refused(
      shape,
      {
          {"q not from 0", [](P& p) { p.cu_seqlens_q = kNotFromZero.data(); }, {"cu_seqlens_q", "start at 0", "1"}},
          {"q decreasing", [](P& p) { p.cu_seqlens_q = kDecreasing.data(); }, {"cu_seqlens_q", "decrease", "32", "33"}},
          {"q longer than stated", [](P& p) { p.cu_seqlens_q = kOneTooLong.data(); }, {"cu_seqlens_q", "34", "33"}},
          {"q wrong end", [](P& p) { p.cu_seqlens_q = kWrongEnd.data(); }, {"cu_seqlens_q", "66", "65"}},
          {"k not from 0", [](P& p) { p.cu_seqlens_k = kNotFromZero.data(); }, {"cu_seqlens_k", "start at 0"}},
          {"k decreasing", [](P& p) { p.cu_seqlens_k = kDecreasing.data(); }, {"cu_seqlens_k", "decrease", "32", "33"}},
          {"k wrong end", [](P& p) { p.cu_seqlens_k = kWrongEnd.data(); }, {"cu_seqlens_k", "66", "65"}},
          {"leftpad over ragged k", [](P& p) { p.cache_leftpad = kTooLong.data(); }, {"cache_leftpad", "1000"}},
      });
}

TEST_F(StatusAttention, RefusesNullPointers) {
  using P = AttentionParams;
  expect_all_refused(two_sequences(), {
                                          {"q", [](P& p) { p.q.data = nullptr; }, {"q must not be null"}},
                                          {"k", [](P& p) { p.k.data = nullptr; }, {"k must not be null"}},
                                          {"v", [](P& p) { p.v.data = nullptr; }, {"v must not be null"}},
                                          {"out", [](P& p) { p.out.data = nullptr; }, {"out must not be null"}},
                                      });
}

TEST_F(StatusAttention, TheWorkspaceOfARefusedCallIsEmpty) {
  AttentionProblem problem({});
  AttentionParams p = problem.params();
  p.num_splits = 257;
  size_t bytes = 1;
  expect_refused(attention_workspace_bytes(p, &bytes), {"num_splits"});
  EXPECT_EQ(bytes, 0u);
}

TEST_F(StatusAttention, ACheckComputesNothing) {
  AttentionProblem problem(two_sequences());
  const std::vector<uint8_t> before = problem.out_tensor().bytes();
  EXPECT_TRUE(check_attention(problem.params()).ok());
  EXPECT_EQ(problem.out_tensor().bytes(), before);
}

TEST_F(StatusAttention, CudaNeedsABuildWithCuda) {
  AttentionProblem problem({});
  AttentionParams p = problem.params();
  p.exec.device = Device::Cuda;
  EXPECT_EQ(check_attention(p).code(), StatusCode::Unavailable);
  const Status status = attention(p);
  EXPECT_EQ(status.code(), StatusCode::Unavailable);
  EXPECT_NE(status.message().find("DCA_CUDA=ON"), std::string::npos) << status.message();
}

// --- rotate_keys and rotate_and_append_kv ---

struct CacheBuffers {
  Tables tables{24, 32};
  Tensor k{DType::Float32, 2, 5, 2, 64};
  Tensor v = k;
  Tensor k_cache{DType::Float32, 2, 35, 2, 64};
  Tensor v_cache = k_cache;
  std::vector<int32_t> before = {30, 30};
  std::vector<int32_t> pages = {0, 0};

  template <class Params>
  Params params() {
    Params p;
    p.chunk = {16, 23};
    p.batch = 2;
    p.num_heads_kv = 2;
    p.head_dim = 64;
    p.seqlen_k = 5;
    p.k = k.ref();
    p.cache_seqlens = before.data();
    p.rotary = {tables.cos.data(), tables.sin.data(), 24, 32, false};
    return p;
  }

  AppendParams append() {
    AppendParams p = params<AppendParams>();
    p.v = v.ref();
    p.cache_slots = 35;
    p.k_cache = k_cache.mutable_ref();
    p.v_cache = v_cache.mutable_ref();
    return p;
  }
};

TEST(StatusAppend, RefusesBadInputAndLeavesTheCachesAlone) {
  using P = AppendParams;
  std::vector<BadInput<P>> inputs = common_bad_inputs<P>();
  const std::vector<BadInput<P>> own = {
      {"past capacity", [](P& p) { p.cache_slots = 34; }, {"cache_seqlens", "35", "34"}},
      {"too long", [](P& p) { p.cache_seqlens = kTooLong.data(); }, {"cache_seqlens", "38", "35"}},
      {"seqlen_k", [](P& p) { p.seqlen_k = -1; }, {"seqlen_k", "-1"}},
      {"cache_slots", [](P& p) { p.cache_slots = -1; }, {"cache_slots", "-1"}},
      {"page id",
       [](P& p) {
         p.pages = {kBadPages.data(), 5, 5, 7, 10};
       },
       {"page_table", "99"}},
      {"page slots",
       [](P& p) {
         p.pages = {kBadPages.data(), 5, 5, 6, 10};
       },
       {"max_pages * page_size", "30", "35"}},
      {"borders", [](P& p) { p.cu_seqlens_k = kNotFromZero.data(); }, {"cu_seqlens", "start at 0"}},
      {"k null", [](P& p) { p.k.data = nullptr; }, {"k must not be null"}},
      {"v null", [](P& p) { p.v.data = nullptr; }, {"v must not be null"}},
      {"k_cache null", [](P& p) { p.k_cache.data = nullptr; }, {"k_cache must not be null"}},
      {"v_cache null", [](P& p) { p.v_cache.data = nullptr; }, {"v_cache must not be null"}},
  };
  inputs.insert(inputs.end(), own.begin(), own.end());
  for (const auto& input : inputs) {
    SCOPED_TRACE(input.name);
    CacheBuffers buffers;
    P p = buffers.append();
    input.spoil(p);
    expect_refused(rotate_and_append_kv(p), input.message_has);
    for (const double x : buffers.k_cache.values()) ASSERT_TRUE(std::isnan(x));
    for (const double x : buffers.v_cache.values()) ASSERT_TRUE(std::isnan(x));
  }
}

TEST(StatusRotateKeys, RefusesBadInput) {
  using P = RotateKeysParams;
  std::vector<BadInput<P>> inputs = common_bad_inputs<P>();
  inputs.push_back({"seqlen_k", [](P& p) { p.seqlen_k = -1; }, {"seqlen_k", "-1"}});
  inputs.push_back({"k null", [](P& p) { p.k.data = nullptr; }, {"k must not be null"}});
  inputs.push_back({"out null", [](P& p) { p.out.data = nullptr; }, {"out must not be null"}});
  for (const auto& input : inputs) {
    SCOPED_TRACE(input.name);
    CacheBuffers buffers;
    P p = buffers.params<P>();
    p.out = buffers.v.mutable_ref();
    input.spoil(p);
    expect_refused(rotate_keys(p), input.message_has);
    for (const double x : buffers.v.values()) ASSERT_TRUE(std::isnan(x));
  }
}

// --- merge_attention_states ---

TEST(StatusMerge, RefusesBadInput) {
  using P = MergeParams;
  const std::vector<BadInput<P>> inputs = {
      {"num_threads", [](P& p) { p.exec.threading = &kNoThreads; }, {"exec.threading", "num_threads", "0"}},
      {"dtype", [](P& p) { p.dtype = static_cast<DType>(-1); }, {"dtype", "-1"}},
      {"num_parts", [](P& p) { p.num_parts = 0; }, {"outs", "0"}},
      {"num_heads", [](P& p) { p.num_heads = 0; }, {"num_heads=0"}},
      {"head_dim", [](P& p) { p.head_dim = -3; }, {"head_dim=-3"}},
      {"batch", [](P& p) { p.batch = -1; }, {"batch=-1"}},
      {"seqlen", [](P& p) { p.seqlen = -1; }, {"seqlen=-1"}},
      {"outs null", [](P& p) { p.outs = nullptr; }, {"outs"}},
      {"lses null", [](P& p) { p.lses = nullptr; }, {"lses"}},
      {"out null", [](P& p) { p.out = nullptr; }, {"out must not be null"}},
      {"lse null", [](P& p) { p.lse = nullptr; }, {"lse must not be null"}},
  };
  for (const auto& input : inputs) {
    SCOPED_TRACE(input.name);
    std::vector<float> part(8, 1.0f), out(8, 7.0f), lse(1, 7.0f), part_lse(1, 0.0f);
    const void* outs[] = {part.data()};
    const float* lses[] = {part_lse.data()};
    P p;
    p.num_parts = 1;
    p.batch = p.seqlen = 1;
    p.num_heads = 1;
    p.head_dim = 8;
    p.outs = outs;
    p.lses = lses;
    p.out = out.data();
    p.lse = lse.data();
    input.spoil(p);
    expect_refused(merge_attention_states(p), input.message_has);
    EXPECT_EQ(out, std::vector<float>(8, 7.0f));
  }
}

}  // namespace
}  // namespace dca::testing
