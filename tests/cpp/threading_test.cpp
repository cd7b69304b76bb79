// The result must not depend on who runs the tasks, how many there are, or in which order they come.
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <functional>
#include <thread>
#include <vector>

#include "attention_problem.h"

namespace dca::testing {
namespace {

using Worker = void (*)(int32_t index, void* context);

void run_in_order(int32_t num_threads, Worker worker, void* context) {
  for (int32_t i = 0; i < num_threads; ++i) worker(i, context);
}

void run_backwards(int32_t num_threads, Worker worker, void* context) {
  for (int32_t i = num_threads; i-- > 0;) worker(i, context);
}

void run_on_new_threads(int32_t num_threads, Worker worker, void* context) {
  std::vector<std::thread> threads;
  for (int32_t i = 0; i < num_threads; ++i) threads.emplace_back(worker, i, context);
  for (std::thread& thread : threads) thread.join();
}

ProblemShape mixed_batch() {
  ProblemShape shape;
  shape.num_heads = 8;
  shape.kv_lens = {53, 17, 40, 33};
  shape.q_lens = {53, 1, 9, 2};
  shape.ragged_q = true;
  shape.keys = KeyLayout::Paged;
  return shape;
}

TEST(Threading, AnyExecutorGivesTheSameBits) {
  AttentionProblem problem(mixed_batch());
  for (const int32_t num_splits : {1, 3}) {
    AttentionParams expected_params = problem.params();
    expected_params.num_splits = num_splits;
    ASSERT_TRUE(problem.matches_reference(expected_params));
    const std::vector<double> out = problem.out();
    const std::vector<double> lse = problem.lse();
    for (const auto run : {run_in_order, run_backwards, run_on_new_threads}) {
      for (const int32_t num_threads : {1, 2, 3, 16}) {
        const Threading threading{num_threads, run};
        AttentionParams p = problem.params();
        p.num_splits = num_splits;
        p.exec.threading = &threading;
        ASSERT_TRUE(attention(p).ok());
        EXPECT_EQ(problem.out(), out);
        EXPECT_EQ(problem.lse(), lse);
      }
    }
  }
}

// What `child` returns in a process of its own, forked from this one; 99: it did not end.
int in_a_child(const std::function<bool()>& child) {
  const pid_t pid = fork();
  if (pid == 0) {
    alarm(20);
    _exit(child() ? 0 : 1);
  }
  int status = 0;
  waitpid(pid, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 99;
}

TEST(Threading, AChildProcessHasAPoolOfItsOwn) {
  AttentionProblem problem(mixed_batch());
  ASSERT_TRUE(problem.matches_reference(problem.params()));
  EXPECT_EQ(in_a_child([&] { return static_cast<bool>(problem.matches_reference(problem.params())); }), 0);
}

// Where the system has no thread more: here, no memory for its stack.
TEST(Threading, FewerThreadsThanWantedWillDo) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "the limit on addresses by which this test keeps threads from starting leaves none to a sanitizer";
#endif
  AttentionProblem problem(mixed_batch());
  const int result = in_a_child([&] {
    const rlimit limit{1 << 20, 1 << 20};
    return setrlimit(RLIMIT_AS, &limit) == 0 && static_cast<bool>(problem.matches_reference(problem.params()));
  });
  EXPECT_EQ(result, 0);
}

TEST(Threading, ChosenSplitsMatchTheReferenceForAnyThreadCount) {
  ProblemShape shape;
  shape.num_heads = 4;
  shape.num_heads_kv = 1;
  shape.chunk = {700, 1000};
  shape.kv_lens = {2100};
  shape.q_lens = {1};
  AttentionProblem problem(shape);
  for (const int32_t num_threads : {1, 2, 5}) {
    const Threading threading{num_threads, run_on_new_threads};
    AttentionParams p = problem.params();
    p.exec.threading = &threading;
    size_t bytes = 0;
    ASSERT_TRUE(attention_workspace_bytes(p, &bytes).ok());
    EXPECT_EQ(bytes > 0, num_threads > 1) << "one sequence and one KV head need splits to feed several threads";
    EXPECT_TRUE(problem.matches_reference(p));
  }
}

// A second call finds the library's pool taken and must do its work all the same.
TEST(Threading, ConcurrentCallsShareThePool) {
  constexpr int kCalls = 20;
  std::vector<std::thread> callers;
  std::vector<int> correct(3, 0);
  for (size_t caller = 0; caller < correct.size(); ++caller) {
    callers.emplace_back([&correct, caller] {
      ProblemShape shape = mixed_batch();
      shape.seed = static_cast<uint32_t>(caller + 1);
      AttentionProblem problem(shape);
      for (int call = 0; call < kCalls; ++call) correct[caller] += problem.matches_reference(problem.params()) ? 1 : 0;
    });
  }
  for (std::thread& thread : callers) thread.join();
  for (const int count : correct) EXPECT_EQ(count, kCalls);
}

TEST(Threading, BuildInfoSaysWhatRuns) {
  const BuildInfo info = build_info();
  EXPECT_EQ(info.cpu_threads, 4) << "DCA_NUM_THREADS of the test";
  EXPECT_NE(std::string(info.cpu_instruction_sets).find(info.cpu_isa), std::string::npos);
  EXPECT_NE(std::string(info.compiler), "");
  EXPECT_NE(std::string(info.version), "");
}

}  // namespace
}  // namespace dca::testing
