// The error rule of the library, in this one place, for the tests and for dca_bench --verify.
//
//   fp32        max |error| <= 1e-5 * max |exact|
//   bf16, fp16  max |error| <= 2 * max |error of the baseline| + 2 ulp of max |exact|
//   LSE         |error| <= 1e-3; where queries are rounded to bf16 or fp16 for matrix units, which moves the logits
//               themselves, <= 2 * max |error of the baseline's LSE| + 1e-3
//   rotation    one rounding: half an ulp of the element, and fp32's own error
//
// NaN and infinities come first: where there is one, there must be the same one; a comparison of sizes passes over NaN.
#pragma once

#include <algorithm>
#include <cmath>
#include <sstream>
#include <string>
#include <vector>

#include "dca/params.h"

namespace dca::error_rule {

struct Verdict {
  bool ok;
  std::string message;  ///< what the error was and what is allowed
};

template <class... Parts>
Verdict verdict(bool ok, const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  return {ok, message.str()};
}

inline double epsilon(DType dtype) {
  if (dtype == DType::Float8E4M3) return 0x1p-3;
  if (dtype == DType::Int8) return 1.0;
  return std::ldexp(1.0, dtype == DType::Float32 ? -23 : dtype == DType::BFloat16 ? -7 : -10);
}

/// Distance between neighbouring numbers of dtype at x.
inline double ulp(double x, DType dtype) {
  if (dtype == DType::Int8) return epsilon(dtype);
  const int smallest_exponent = dtype == DType::Float8E4M3 ? -6 : dtype == DType::Float16 ? -14 : -126;
  const int exponent = x == 0.0 ? smallest_exponent : std::max(std::ilogb(x), smallest_exponent);
  return std::ldexp(epsilon(dtype), exponent);
}

inline double largest_magnitude(const std::vector<double>& values) {
  double largest = 0.0;
  for (const double x : values) largest = std::max(largest, std::fabs(x));
  return largest;
}

/// Of the finite ones; the others are equal.
inline double largest_error(const std::vector<double>& actual, const std::vector<double>& exact) {
  double largest = 0.0;
  for (size_t i = 0; i < exact.size(); ++i) {
    if (std::isfinite(exact[i])) largest = std::max(largest, std::fabs(actual[i] - exact[i]));
  }
  return largest;
}

inline Verdict special_values(const std::vector<double>& actual, const std::vector<double>& exact) {
  if (actual.size() != exact.size()) return verdict(false, actual.size(), " values instead of ", exact.size());
  for (size_t i = 0; i < exact.size(); ++i) {
    const bool special = !std::isfinite(exact[i]) || !std::isfinite(actual[i]);
    const bool equal = actual[i] == exact[i] || (std::isnan(actual[i]) && std::isnan(exact[i]));
    if (special && !equal) return verdict(false, "[", i, "] is ", actual[i], ", not ", exact[i]);
  }
  return {true, ""};
}

/// `baseline` is not looked at for fp32.
inline Verdict attention(const std::vector<double>& actual, const std::vector<double>& exact,
                         const std::vector<double>& baseline, DType dtype) {
  if (Verdict same = special_values(actual, exact); !same.ok) return same;
  const double largest = largest_magnitude(exact);
  const double allowed =
      dtype == DType::Float32 ? 1e-5 * largest : 2.0 * largest_error(baseline, exact) + 2.0 * ulp(largest, dtype);
  const double error = largest_error(actual, exact);
  return verdict(error <= allowed, "max error ", error, ", allowed ", allowed);
}

/// `baseline` is empty where queries are not rounded.
inline Verdict lse(const std::vector<double>& actual, const std::vector<double>& exact,
                   const std::vector<double>& baseline = {}) {
  if (Verdict same = special_values(actual, exact); !same.ok) return same;
  const double allowed = 1e-3 + (baseline.empty() ? 0.0 : 2.0 * largest_error(baseline, exact));
  const double error = largest_error(actual, exact);
  return verdict(error <= allowed, "max error of lse ", error, ", allowed ", allowed);
}

/// Values that were computed in fp32 from inputs of at most `magnitude`, and rounded once.
inline Verdict rotation(const std::vector<double>& actual, const std::vector<double>& exact, double magnitude,
                        DType dtype) {
  if (Verdict same = special_values(actual, exact); !same.ok) return same;
  const double fp32_error = 4.0 * magnitude * epsilon(DType::Float32);
  for (size_t i = 0; i < exact.size(); ++i) {
    // The fp32 error can carry a value over into the next binade, whose spacing is the larger one.
    const double allowed = 0.5 * ulp(std::fabs(exact[i]) + fp32_error, dtype) + fp32_error;
    const double error = std::fabs(actual[i] - exact[i]);
    if (std::isfinite(exact[i]) && error > allowed) {
      return verdict(false, "[", i, "] is ", actual[i], ", not ", exact[i]);
    }
  }
  return verdict(true, "max error ", largest_error(actual, exact), ", one rounding each");
}

}  // namespace dca::error_rule
