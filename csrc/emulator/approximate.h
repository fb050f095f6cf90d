// The instructions and functions of CUDA that round further than IEEE 754, as wrong as NVIDIA's
// documentation allows: PTX ISA (ex2, lg2, rcp: .approx.ftz) and the CUDA C++ programming guide
// (mathematical functions). The error has its largest size at every operand; its sign is a hash of
// the operand and DALLE_EMULATOR_SEED, so that the same operand always has the same result.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace dalle::emulator {

extern uint64_t approximation_seed;  // of the launch

inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }

inline bool hashed_bit(float operand) {
  uint32_t bits;
  std::memcpy(&bits, &operand, sizeof bits);
  uint64_t hash = (bits ^ approximation_seed << 32) * 0x9E3779B97F4A7C15ull;
  hash = (hash ^ hash >> 32) * 0xD6E8FEB86659FD93ull;
  return hash >> 63;
}

// One of the floats that are furthest from `exact` within `error`.
inline float approximated(double exact, double error, float operand) {
  if (!(std::fabs(exact) <= 0x1p127)) return static_cast<float>(exact);
  const float result = static_cast<float>(exact + (hashed_bit(operand) ? error : -error));
  const bool within = std::fabs(static_cast<double>(result) - exact) <= error;
  return within ? result : std::nextafter(result, static_cast<float>(exact));
}

// `count` units in the last place of `exact` rounded to float.
inline double ulps(double exact, double count) {
  return exact == 0 ? 0 : count * std::ldexp(1.0, std::ilogb(exact) - 23);
}

// 2^-22 between 1/2 and 2, elsewhere `beyond`.
inline double error_of_log(float x, double near_one, double beyond) {
  return x >= 0.5f && x <= 2.0f ? near_one : beyond;
}

inline float ex2(float x) {  // 2^-22 of the result
  const double exact = std::exp2(static_cast<double>(flushed(x)));
  return x == 0 ? 1.0f : flushed(approximated(exact, 0x1p-22 * exact, x));
}
inline float lg2(float x) {  // 2^-22 between 1/2 and 2, elsewhere 2^-22 of the result
  const double exact = std::log2(static_cast<double>(flushed(x)));
  return approximated(exact, error_of_log(x, 0x1p-22, 0x1p-22 * std::fabs(exact)), x);
}
inline float rcp(float x) {  // 1 ulp
  const double exact = 1.0 / flushed(x);
  return flushed(approximated(exact, ulps(exact, 1), x));
}
inline float rsqrt(float x) {  // 2 ulp
  const double exact = 1.0 / std::sqrt(static_cast<double>(x));
  return approximated(exact, ulps(exact, 2), x);
}
inline float fast_exp(float x) {  // 2 + floor(|1.173 x|) ulp
  const double exact = std::exp(static_cast<double>(x));
  return approximated(exact, ulps(exact, 2 + std::floor(std::fabs(1.173 * x))), x);
}
inline float fast_log(float x) {  // 2^-21.41 between 1/2 and 2, elsewhere 3 ulp
  const double exact = std::log(static_cast<double>(x));
  return approximated(exact, error_of_log(x, 3.589e-7, ulps(exact, 3)), x);
}
inline float fast_log2(float x) {  // 2^-22 between 1/2 and 2, elsewhere 2 ulp
  const double exact = std::log2(static_cast<double>(x));
  return approximated(exact, error_of_log(x, 0x1p-22, ulps(exact, 2)), x);
}
inline float fast_divide(float a, float b) {  // 2 ulp for |b| within 2^-126 .. 2^126
  const double exact = static_cast<double>(a) / b;
  return approximated(exact, ulps(exact, 2), a + b);
}

}  // namespace dalle::emulator
