#include "report.h"

#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <variant>

#include "dca/dca.h"

namespace dca::bench {
namespace {

// 1.5e9 as "1.50 G".
std::string with_prefix(double value) {
  const char* prefixes[] = {"", "k", "M", "G", "T", "P"};
  int index = 0;
  for (; value >= 1000.0 && index < 5; ++index) value /= 1000.0;
  char text[32];
  std::snprintf(text, sizeof text, "%.2f %s", value, prefixes[index]);
  return text;
}

bool write_text(const std::filesystem::path& path, const std::string& text) {
  std::ofstream file(path, std::ios::trunc);
  file << text << std::flush;
  return file.good();
}

std::string utc_now() {
  const std::time_t now = std::time(nullptr);
  char text[32];
  std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", std::gmtime(&now));
  return text;
}

// The environment's word first: it can know a tree that was copied without its history.
std::string commit() {
  const char* given = std::getenv("DCA_COMMIT");
  return given != nullptr ? given : DCA_BENCH_COMMIT;
}

std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') result += '\\';
    result += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
  }
  return result + '"';
}

class JsonLine {
 public:
  void add(const char* name, const std::string& text) { add_raw(name, quoted(text)); }
  void add(const char* name, int64_t value) { add_raw(name, std::to_string(value)); }
  void add(const char* name, double value) {
    std::ostringstream text;
    text.precision(9);
    text << value;
    add_raw(name, text.str());
  }
  std::string text() const { return "{" + members_ + "}\n"; }

 private:
  void add_raw(const char* name, const std::string& value) {
    members_ += (members_.empty() ? "" : ", ") + quoted(name) + ": " + value;
  }

  std::string members_;
};

std::string json_of(const Options& o, const Result& r) {
  const double median = quantile(r.seconds, 0.5);
  const BuildInfo info = build_info();
  JsonLine line;
  line.add("benchmark", std::string(name_of(o.operation)));
  line.add("device", std::string(name_of(o.device)));
  line.add("kernel", r.kernel);
  line.add("dtype", std::string(name_of(o.dtype)));
  if (o.cache_dtype != DType::Same) line.add("cache_dtype", std::string(name_of(o.cache_dtype)));
  line.add("batch", o.batch);
  if (o.operation != Operation::Append) line.add("heads", o.heads);
  if (o.operation != Operation::Merge) line.add("kv_heads", o.kv_heads);
  line.add("head_dim", o.head_dim);
  line.add("seqlen", o.seqlen);
  if (o.operation == Operation::Decode) line.add("queries", o.queries);
  if (o.page_size > 0) line.add("page_size", o.page_size);
  if (o.operation == Operation::Merge) {
    line.add("parts", o.parts);
  } else {
    line.add("chunk_len", o.chunk_len);
    line.add("max_position", o.max_position);
  }
  if (o.device == Device::Cpu) line.add("threads", static_cast<int64_t>(r.threads));
  if (o.operation == Operation::Prefill || o.operation == Operation::Decode) line.add("splits", o.splits);
  line.add("repeat", o.repeat);
  line.add("median_ms", 1e3 * median);
  line.add("p10_ms", 1e3 * quantile(r.seconds, 0.1));
  line.add("p90_ms", 1e3 * quantile(r.seconds, 0.9));
  if (o.operation == Operation::Prefill) line.add("rotate_keys_ms", 1e3 * r.rotate_keys_seconds);
  line.add("work", r.work);
  line.add("work_unit", std::string(r.work_unit));
  line.add("rate_per_s", r.work / median);
  if (o.ceiling) {
    line.add("ceiling_per_s", r.ceiling.per_second);
    line.add("ceiling", r.ceiling.name);
    line.add("percent_of_ceiling", 100.0 * r.work / median / r.ceiling.per_second);
  }
  if (o.verify) line.add("verified", r.verified);
  line.add("machine", r.machine);
  for (const auto& [name, value] : r.facts) {
    std::visit([&line, &fact = name](const auto& x) { line.add(fact.c_str(), x); }, value);
  }
  line.add("compiler", std::string(info.compiler));
  line.add("version", std::string(info.version));
  if (const std::string known = commit(); !known.empty()) line.add("commit", known);
  line.add("date", utc_now());
  return line.text();
}

std::string shape_of(const Options& o) {
  const auto number = [](int64_t value) { return std::to_string(value); };
  const std::string batch = "batch " + number(o.batch);
  const std::string size = ", head_dim " + number(o.head_dim) + ", seqlen " + number(o.seqlen);
  const std::string paged = o.page_size > 0 ? ", page_size " + number(o.page_size) : "";
  const std::string cache = o.cache_dtype != DType::Same ? std::string(", cache ") + name_of(o.cache_dtype) : "";
  const std::string queries = o.queries > 1 ? ", queries " + number(o.queries) : "";
  const std::string chunks = ", chunk_len " + number(o.chunk_len) + ", max_position " + number(o.max_position);
  switch (o.operation) {
    case Operation::Merge:
      return batch + ", heads " + number(o.heads) + size + ", parts " + number(o.parts);
    case Operation::Append:
      return batch + ", kv heads " + number(o.kv_heads) + size + cache + paged + chunks;
    default:
      return batch + ", heads " + number(o.heads) + "/" + number(o.kv_heads) + size + cache + queries + paged + chunks;
  }
}

}  // namespace

void print_table(const Options& o, const Result& r) {
  const double median = quantile(r.seconds, 0.5);
  const double rate = r.work / median;
  const std::string where = o.device == Device::Cpu ? std::to_string(r.threads) + " threads" : r.machine;
  std::printf("%s  %s  %s  %s  %s\n", name_of(o.operation), r.kernel.c_str(), name_of(o.dtype), where.c_str(),
              shape_of(o).c_str());
  std::printf("  time         %.4f ms  median of %zu; p10 %.4f, p90 %.4f\n", 1e3 * median, r.seconds.size(),
              1e3 * quantile(r.seconds, 0.1), 1e3 * quantile(r.seconds, 0.9));
  if (o.operation == Operation::Prefill) {
    std::printf("  rotate_keys  %.4f ms  not part of the above\n", 1e3 * r.rotate_keys_seconds);
  }
  std::printf("  work         %s%s\n", with_prefix(r.work).c_str(), r.work_unit);
  std::printf("  rate         %s%s/s", with_prefix(rate).c_str(), r.work_unit);
  if (o.ceiling) {
    std::printf("  %.1f %% of %s%s/s (%s, this run)", 100.0 * rate / r.ceiling.per_second,
                with_prefix(r.ceiling.per_second).c_str(), r.work_unit, r.ceiling.name.c_str());
  }
  std::printf("\n");
  if (o.verify) std::printf("  verified     %s\n", r.verified.c_str());
}

void write_json(const Options& options, const Result& result) {
  namespace fs = std::filesystem;
  const std::string text = json_of(options, result);
  std::error_code error;
  const fs::path path = fs::weakly_canonical(options.json, error);  // the file behind a link, and not the link
  bool written = !error;
  if (written && fs::exists(path) && !fs::is_regular_file(path)) {
    written = write_text(path, text);  // a pipe or a device stays what it is
  } else if (written) {
    const fs::path temporary = path.string() + ".tmp" + std::to_string(getpid());
    written = write_text(temporary, text);
    if (written) fs::rename(temporary, path, error);  // replaces the old file in one step
    std::error_code ignored;
    fs::remove(temporary, ignored);
  }
  if (!written || error) {
    throw std::runtime_error("--json: cannot write '" + options.json + "'" + (error ? ": " + error.message() : ""));
  }
}

}  // namespace dca::bench
