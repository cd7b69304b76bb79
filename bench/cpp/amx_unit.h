// AMX's tile unit, for what measures it where kernels_use_amx(). Only files that are compiled with -mamx-tile and
// -mamx-bf16 include this.
#pragma once

#include <cstdint>

namespace dca::bench {

/// The tile registers of one thread: 16 rows of 64 bytes each, all of them 0, as subnormal numbers could be slow.
class Tiles {
 public:
  static constexpr double kFlopOfProduct = 2.0 * 16 * 16 * 32;

  Tiles() {
    asm volatile("ldtilecfg %0" : : "m"(config_));
    asm volatile(
        "tilezero %tmm0\n tilezero %tmm1\n tilezero %tmm2\n tilezero %tmm3\n"
        "tilezero %tmm4\n tilezero %tmm5\n tilezero %tmm6\n tilezero %tmm7");
  }
  ~Tiles() { asm volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

  /// `times` times four products of two tiles, none of which waits for another.
  static void multiply(int64_t times) {
    for (int64_t i = 0; i < times; ++i) {
      asm volatile(
          "tdpbf16ps %tmm6, %tmm4, %tmm0\n tdpbf16ps %tmm7, %tmm4, %tmm1\n"
          "tdpbf16ps %tmm6, %tmm5, %tmm2\n tdpbf16ps %tmm7, %tmm5, %tmm3");
    }
  }

 private:
  struct alignas(64) Config {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  Config config_;
};

}  // namespace dca::bench
