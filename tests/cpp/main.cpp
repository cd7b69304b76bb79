// Runs the tests, unless DCA_CPU_ISA asks for an instruction set that this machine has not: then the exit code is 77,
// which ctest shows as skipped, and the reason is the library's own.
#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>

#include "attention_problem.h"
#include "dca/dca.h"

namespace {

constexpr int kSkipped = 77;

dca::Status try_attention() {
  dca::testing::AttentionProblem problem({});
  return dca::attention(problem.params());
}

}  // namespace

int main(int argc, char** argv) {
  ::testing::InitGoogleTest(&argc, argv);
  const dca::BuildInfo info = dca::build_info();
  if (const dca::Status status = try_attention(); status.code() == dca::StatusCode::Unavailable) {
    const char* isa = std::getenv("DCA_CPU_ISA");
    std::printf("skipped: DCA_CPU_ISA=%s; %s\n", isa != nullptr ? isa : "", status.message().c_str());
    return kSkipped;
  }
  std::printf("instruction set %s out of %s, %d threads\n", info.cpu_isa, info.cpu_instruction_sets, info.cpu_threads);
  return RUN_ALL_TESTS();
}
