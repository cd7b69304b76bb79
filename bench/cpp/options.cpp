#include "options.h"

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <stdexcept>
#include <vector>

namespace dca::bench {
namespace {

constexpr const char* kHelp =
    "Times Dual Chunk Attention, and prints the share of a ceiling that is measured in the same run.\n"
    "\n"
    "  dca_bench prefill [options]   causal attention of whole prompts; ceiling: FMA peak\n"
    "  dca_bench decode [options]    one token per sequence over a cache; ceiling: reading that cache\n"
    "  dca_bench append [options]    rotation and cache write of new keys and values; ceiling: copying them\n"
    "  dca_bench merge [options]     the merge of attention over disjoint keys; ceiling: copying one part\n"
    "\n"
    "On a CUDA device the ceilings are mma.sync on registers and one large device-to-device copy, and the L2 cache is\n"
    "flushed before every timed run.\n"
    "\n";

struct IntegerFlag {
  const char* name;
  const char* help;
  int64_t Options::*field;
  int64_t smallest;
};

constexpr int64_t kLargest = INT32_MAX;

const std::vector<IntegerFlag>& integer_flags() {
  static const std::vector<IntegerFlag> flags = {
      {"--batch", "sequences (1)", &Options::batch, 1},
      {"--heads", "query heads (32)", &Options::heads, 1},
      {"--kv-heads", "key and value heads, a divisor of --heads (8)", &Options::kv_heads, 1},
      {"--head-dim", "channels per head (128)", &Options::head_dim, 1},
      {"--seqlen", "tokens: of the prompt (4096), in the cache (32768), appended or merged (16384)", &Options::seqlen,
       1},
      {"--queries", "decode: query rows of each sequence (1)", &Options::queries, 1},
      {"--page-size", "decode, append: slots per page of the cache; 0: contiguous (0)", &Options::page_size, 0},
      {"--parts", "merge: attention results to merge (3)", &Options::parts, 1},
      {"--chunk-len", "chunk length n (2560)", &Options::chunk_len, 1},
      {"--max-position", "largest rotary position P, n <= P <= 2n - 1 (n * 6 / 5)", &Options::max_position, 1},
      {"--threads", "threads of the library's pool (all processors)", &Options::threads, 1},
      {"--splits", "key splits per query tile; 0: the library chooses (0)", &Options::splits, 0},
      {"--copy-mib", "CUDA: size of the copy that measures the bandwidth, if memory allows (4096)", &Options::copy_mib,
       1},
      {"--repeat", "timed runs (9)", &Options::repeat, 1},
      {"--warmup", "runs before them (2)", &Options::warmup, 0},
  };
  return flags;
}

[[noreturn]] void print_help() {
  std::fputs(kHelp, stdout);
  const auto print = [](const std::string& name, const char* help) { std::printf("  %-20s %s\n", name.c_str(), help); };
  for (const IntegerFlag& flag : integer_flags()) print(std::string(flag.name) + " N", flag.help);
  print("--device NAME", "cpu or cuda (cpu)");
  print("--dtype TYPE", "fp32, bf16 or fp16 (fp32; CUDA: bf16)");
  print("--cache-dtype TYPE", "decode, append: same (as --dtype), e4m3, or int8 with a scale per row (same)");
  print("--timing WAY",
        "CUDA: events around the call, or around the replay of a graph (events for prefill, else graph)");
  print("--no-ceiling", "measure no ceiling: for profilers, under which it takes long");
  print("--verify", "compare with the double-precision reference; fails if the error is too large");
  print("--json FILE", "also write the result as one line of JSON");
  std::exit(0);
}

int64_t to_integer(const std::string& name, const std::string& text, int64_t smallest) {
  char* end = nullptr;
  const long long value = std::strtoll(text.c_str(), &end, 10);
  if (text.empty() || *end != '\0' || value < smallest || value > kLargest) {
    const std::string range = "between " + std::to_string(smallest) + " and " + std::to_string(kLargest);
    throw std::invalid_argument(name + " must be an integer " + range + "; got '" + text + "'");
  }
  return value;
}

DType to_dtype(const std::string& text) {
  for (const DType dtype : {DType::Float32, DType::BFloat16, DType::Float16}) {
    if (text == name_of(dtype)) return dtype;
  }
  throw std::invalid_argument("--dtype must be fp32, bf16 or fp16; got '" + text + "'");
}

DType to_cache_dtype(const std::string& text) {
  for (const DType dtype : {DType::Same, DType::Float8E4M3, DType::Int8}) {
    if (text == name_of(dtype)) return dtype;
  }
  throw std::invalid_argument("--cache-dtype must be same, e4m3 or int8; got '" + text + "'");
}

Device to_device(const std::string& text) {
  for (const Device device : {Device::Cpu, Device::Cuda}) {
    if (text == name_of(device)) return device;
  }
  throw std::invalid_argument("--device must be cpu or cuda; got '" + text + "'");
}

Timing to_timing(const std::string& text) {
  if (text == "events") return Timing::Events;
  if (text == "graph") return Timing::Graph;
  throw std::invalid_argument("--timing must be events or graph; got '" + text + "'");
}

Operation to_operation(const std::string& text) {
  for (const Operation operation : {Operation::Prefill, Operation::Decode, Operation::Append, Operation::Merge}) {
    if (text == name_of(operation)) return operation;
  }
  throw std::invalid_argument("the first argument must be prefill, decode, append or merge; got '" + text + "'");
}

struct Flag {
  std::string name;
  std::string value;
};

std::vector<Flag> to_flags(const std::vector<std::string>& arguments) {
  std::vector<Flag> flags;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const std::string& text = arguments[i];
    const size_t equals = text.find('=');
    const std::string name = text.substr(0, equals);
    if (name == "--verify" || name == "--no-ceiling") {
      if (equals != std::string::npos) throw std::invalid_argument(name + " takes no value; got '" + text + "'");
      flags.push_back({name, ""});
    } else if (equals != std::string::npos) {
      flags.push_back({name, text.substr(equals + 1)});
    } else {
      // Of an unknown name without a value, the name is the better complaint.
      flags.push_back({text, i + 1 < arguments.size() ? arguments[i + 1] : ""});
      ++i;
    }
  }
  return flags;
}

void set_flag(Options& options, const Flag& flag) {
  if (flag.name == "--no-ceiling") {
    options.ceiling = false;
  } else if (flag.name == "--verify") {
    options.verify = true;
  } else if (flag.name == "--device") {
    options.device = to_device(flag.value);
  } else if (flag.name == "--dtype") {
    options.dtype = to_dtype(flag.value);
  } else if (flag.name == "--cache-dtype") {
    options.cache_dtype = to_cache_dtype(flag.value);
  } else if (flag.name == "--timing") {
    if (options.device == Device::Cpu) throw std::invalid_argument("--timing needs --device=cuda");
    options.timing = to_timing(flag.value);
  } else if (flag.name == "--json") {
    if (flag.value.empty()) throw std::invalid_argument("--json must name a file; got none");
    options.json = flag.value;
  } else {
    for (const IntegerFlag& known : integer_flags()) {
      if (flag.name != known.name) continue;
      options.*known.field = to_integer(flag.name, flag.value, known.smallest);
      return;
    }
    throw std::invalid_argument("unknown option '" + flag.name + "'; dca_bench --help lists them");
  }
}

// What the library itself would refuse is left to it.
void complete(Options& options) {
  if (options.seqlen == 0) {
    options.seqlen = options.operation == Operation::Prefill  ? 4096
                     : options.operation == Operation::Decode ? 32768
                                                              : 16384;
  }
  if (options.max_position == 0) options.max_position = options.chunk_len + options.chunk_len / 5;
  const bool has_cache = options.operation == Operation::Decode || options.operation == Operation::Append;
  if (options.page_size > 0 && !has_cache) {
    throw std::invalid_argument(std::string("--page-size is for decode and append; got ") + name_of(options.operation));
  }
  if (options.cache_dtype != DType::Same && !has_cache) {
    throw std::invalid_argument(std::string("--cache-dtype is for decode and append; got ") +
                                name_of(options.operation));
  }
  if (options.cache_dtype == DType::Int8 && options.device != Device::Cpu) {
    throw std::invalid_argument(std::string("--cache-dtype=int8 is for --device=cpu; got ") + name_of(options.device));
  }
  if (options.json.empty()) return;
  const std::filesystem::path folder = std::filesystem::absolute(options.json).parent_path();
  if (!std::filesystem::is_directory(folder)) {  // said now, not after minutes of measuring
    throw std::invalid_argument("--json must name a file in an existing folder; there is no '" + folder.string() + "'");
  }
  if (std::filesystem::is_directory(options.json)) {
    throw std::invalid_argument("--json must name a file; '" + options.json + "' is a folder");
  }
}

}  // namespace

const char* name_of(Operation operation) {
  switch (operation) {
    case Operation::Prefill:
      return "prefill";
    case Operation::Decode:
      return "decode";
    case Operation::Append:
      return "append";
    default:
      return "merge";
  }
}

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::Same:
      return "same";
    case DType::Float32:
      return "fp32";
    case DType::BFloat16:
      return "bf16";
    case DType::Float16:
      return "fp16";
    case DType::Float8E4M3:
      return "e4m3";
    default:
      return "int8";
  }
}

const char* name_of(Device device) { return device == Device::Cpu ? "cpu" : "cuda"; }

Options parse_options(int argc, char** argv) {
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  for (const std::string& argument : arguments) {
    if (argument == "--help" || argument == "-h") print_help();
  }
  if (arguments.empty()) throw std::invalid_argument("say what to time, as dca_bench --help shows");
  Options options;
  options.operation = to_operation(arguments[0]);
  const std::vector<Flag> flags = to_flags({arguments.begin() + 1, arguments.end()});
  // The device first: defaults depend on it.
  for (const Flag& flag : flags) {
    if (flag.name == "--device") set_flag(options, flag);
  }
  if (options.device == Device::Cuda) {
    options.dtype = DType::BFloat16;
    options.timing = options.operation == Operation::Prefill ? Timing::Events : Timing::Graph;
  }
  for (const Flag& flag : flags) set_flag(options, flag);
  complete(options);
  return options;
}

}  // namespace dca::bench
