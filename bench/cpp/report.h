// A result for people and for programs.
#pragma once

#include "options.h"
#include "workloads.h"

namespace dca::bench {

void print_table(const Options& options, const Result& result);

/// One line of JSON. The file appears whole or not at all, whenever the process is stopped.
void write_json(const Options& options, const Result& result);

}  // namespace dca::bench
