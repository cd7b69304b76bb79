// dca_bench: times prefill, decode, append and merge, and checks them against the reference. See --help.
#include <cstdio>
#include <cstdlib>
#include <new>
#include <stdexcept>

#include "options.h"
#include "report.h"
#include "workloads.h"

int main(int argc, char** argv) try {
  const dca::bench::Options options = dca::bench::parse_options(argc, argv);
  // The library's pool reads its size from the environment, once, at the first call.
  if (options.threads > 0) setenv("DCA_NUM_THREADS", std::to_string(options.threads).c_str(), 1);
  const dca::bench::Result result = dca::bench::run_workload(options);
  dca::bench::print_table(options, result);
  if (!options.json.empty()) dca::bench::write_json(options, result);
  if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0) throw std::runtime_error("cannot write the figures");
  return 0;
} catch (const std::invalid_argument& error) {
  std::fprintf(stderr, "dca_bench: %s.\n", error.what());
  return 2;
} catch (const std::bad_alloc&) {
  std::fprintf(stderr, "dca_bench: the shape needs more memory than there is.\n");
  return 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "dca_bench: %s.\n", error.what());
  return 1;
}
