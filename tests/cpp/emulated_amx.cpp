// AMX for machines without it: the tests' program has this in place of the library's dca_cpu_request_amx (the linker's
// --wrap). Each instruction on tiles is then an invalid one, and the handler of that signal does what it would have
// done, after Intel's manual (Software Developer's Manual, volume 2). Everything else of the kernels runs as it is.
//
// Stricter than a processor: tiles are configured before their first use and released after their last, and all of them
// hold NaN until they are written.
#include <signal.h>
#include <ucontext.h>

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

constexpr int kTiles = 8;
constexpr int kMaxRows = 16;
constexpr int kMaxBytes = 64;

[[noreturn]] void fail(const char* why) {
  std::fprintf(stderr, "emulated AMX: %s\n", why);
  std::abort();
}

struct Tile {
  uint8_t bytes[kMaxRows][kMaxBytes];
};

// The registers of a thread, and what ldtilecfg says of them.
struct Registers {
  bool configured = false;
  int rows[kTiles];
  int row_bytes[kTiles];
  Tile tiles[kTiles];

  void configure(const uint8_t* config) {
    if (configured) fail("ldtilecfg: tiles were not released");
    if (config[0] != 1) fail("ldtilecfg: palettes other than 1");
    for (int t = 0; t < kTiles; ++t) {
      uint16_t width;
      std::memcpy(&width, config + 16 + 2 * t, sizeof width);
      row_bytes[t] = width;
      rows[t] = config[48 + t];
      if (rows[t] > kMaxRows || row_bytes[t] > kMaxBytes) fail("ldtilecfg: a tile is too large");
    }
    configured = true;
    std::memset(tiles, 0xff, sizeof tiles);
  }

  Tile& tile(int t) {
    if (!configured) fail("a tile is used that is not configured");
    if (rows[t] == 0 || row_bytes[t] == 0) fail("a tile without rows is used");
    return tiles[t];
  }
};

thread_local Registers registers;

// The products take subnormal numbers for 0, and leave none.
float without_subnormal(float x) { return std::fabs(x) < FLT_MIN ? 0.0f : x; }

float from_bfloat16(const uint8_t* p) {
  const uint32_t word = static_cast<uint32_t>(p[0]) << 16 | static_cast<uint32_t>(p[1]) << 24;
  float x;
  std::memcpy(&x, &word, sizeof x);
  return without_subnormal(x);
}

// sum (rows of a, columns of b) += a * b, pairs of numbers at a time.
void multiply(int sum, int a, int b) {
  Tile& result = registers.tile(sum);
  const Tile& left = registers.tile(a);
  const Tile& right = registers.tile(b);
  const int pairs = registers.row_bytes[a] / 4;
  if (registers.rows[a] != registers.rows[sum] || registers.rows[b] != pairs ||
      registers.row_bytes[b] != registers.row_bytes[sum]) {
    fail("tdpbf16ps: the tiles' sizes do not fit");
  }
  for (int m = 0; m < registers.rows[sum]; ++m) {
    for (int n = 0; n < registers.row_bytes[sum] / 4; ++n) {
      float first = 0.0f;
      float second = 0.0f;
      for (int k = 0; k < pairs; ++k) {
        first += from_bfloat16(left.bytes[m] + 4 * k) * from_bfloat16(right.bytes[k] + 4 * n);
        second += from_bfloat16(left.bytes[m] + 4 * k + 2) * from_bfloat16(right.bytes[k] + 4 * n + 2);
      }
      float x;
      std::memcpy(&x, result.bytes[m] + 4 * n, sizeof x);
      x = without_subnormal(without_subnormal(x) + without_subnormal(first + second));
      std::memcpy(result.bytes[m] + 4 * n, &x, sizeof x);
    }
  }
}

// --- One instruction: C4, two bytes of VEX, opcode, ModRM, and for operands in memory SIB and displacement ---

class Instruction {
 public:
  Instruction(const uint8_t* code, const greg_t* general) : code_(code), general_(general) {
    known_ = code[0] == 0xc4 && (code[1] & 0x1f) == 2 && (code[2] & 0x84) == 0;
  }

  bool known() const { return known_; }
  int prefix() const { return code_[2] & 3; }  // 0: none, 1: 66, 2: F3, 3: F2
  int opcode() const { return code_[3]; }
  bool in_memory() const { return mod() != 3; }
  int reg() const { return code_[4] >> 3 & 7; }
  int rm() const { return code_[4] & 7; }
  int vvvv() const { return ~code_[2] >> 3 & 15; }

  uint8_t* address() const { return reinterpret_cast<uint8_t*>(base() + displacement()); }
  int64_t stride() const {
    const int index = (sib() >> 3 & 7) | ((code_[1] & 0x40) != 0 ? 0 : 8);
    return index == 4 ? 0 : general(index) << (sib() >> 6);
  }
  int length() const {
    if (!in_memory()) return 5;
    return 5 + (has_sib() ? 1 : 0) + displacement_bytes();
  }

 private:
  int mod() const { return code_[4] >> 6; }
  bool has_sib() const { return rm() == 4; }
  uint8_t sib() const { return code_[5]; }
  const uint8_t* behind_operand() const { return code_ + (has_sib() ? 6 : 5); }

  int64_t base() const {
    const int low = has_sib() ? sib() & 7 : rm();
    if (mod() == 0 && low == 5) {
      if (has_sib()) return 0;
      return reinterpret_cast<int64_t>(code_) + length();  // relative to the next instruction
    }
    return general(low | ((code_[1] & 0x20) != 0 ? 0 : 8));
  }
  int displacement_bytes() const {
    if (mod() == 1) return 1;
    const int low = has_sib() ? sib() & 7 : rm();
    return mod() == 2 || low == 5 ? 4 : 0;
  }
  int64_t displacement() const {
    if (displacement_bytes() == 0) return 0;
    if (displacement_bytes() == 1) return static_cast<int8_t>(behind_operand()[0]);
    int32_t d;
    std::memcpy(&d, behind_operand(), sizeof d);
    return d;
  }
  int64_t general(int number) const {
    static constexpr int kPlaces[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                      REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return general_[kPlaces[number]];
  }

  const uint8_t* code_;
  const greg_t* general_;
  bool known_;
};

// Returns whether it was one of AMX's.
bool execute(const Instruction& i) {
  if (!i.known()) return false;
  const int operation = i.opcode() << 4 | i.prefix();
  if (operation == 0x490 && i.in_memory()) {  // ldtilecfg
    registers.configure(i.address());
  } else if (operation == 0x490) {  // tilerelease
    registers.configured = false;
  } else if (operation == 0x493) {  // tilezero
    registers.tile(i.reg()) = {};
  } else if (operation == 0x4b3 || operation == 0x4b1) {  // tileloadd, tileloaddt1
    Tile& tile = registers.tile(i.reg());
    for (int r = 0; r < registers.rows[i.reg()]; ++r) {
      std::memcpy(tile.bytes[r], i.address() + r * i.stride(), static_cast<size_t>(registers.row_bytes[i.reg()]));
    }
  } else if (operation == 0x4b2) {  // tilestored
    const Tile& tile = registers.tile(i.reg());
    for (int r = 0; r < registers.rows[i.reg()]; ++r) {
      std::memcpy(i.address() + r * i.stride(), tile.bytes[r], static_cast<size_t>(registers.row_bytes[i.reg()]));
    }
  } else if (operation == 0x5c2) {  // tdpbf16ps
    multiply(i.reg(), i.rm(), i.vvvv());
  } else {
    return false;
  }
  return true;
}

void on_invalid_instruction(int, siginfo_t*, void* context) {
  greg_t* const general = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const Instruction instruction(reinterpret_cast<const uint8_t*>(general[REG_RIP]), general);
  if (!execute(instruction)) {
    signal(SIGILL, SIG_DFL);  // the instruction runs again, and ends the program
    return;
  }
  general[REG_RIP] += instruction.length();
}

bool emulate() {
  struct sigaction action = {};
  action.sa_sigaction = on_invalid_instruction;
  action.sa_flags = SA_SIGINFO;
  if (sigaction(SIGILL, &action, nullptr) != 0) return false;
  std::printf("AMX is emulated\n");
  return true;
}

}  // namespace

extern "C" bool __real_dca_cpu_request_amx();

extern "C" bool __wrap_dca_cpu_request_amx() {
  const char* isa = std::getenv("DCA_CPU_ISA");
  const bool asked_for = isa != nullptr && std::strcmp(isa, "amx_bf16") == 0;
  return __real_dca_cpu_request_amx() || (asked_for && emulate());
}
