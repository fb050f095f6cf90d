// The approximate instructions keep within what the PTX ISA and the CUDA C++ programming guide
// allow; the emulator's are as far off as that, in both directions.
#include <cmath>

#include "cases.h"

namespace approximate {

using cases::Buffer;
using cases::expect;
using cases::finish;
using dalle::launch;

constexpr int kCount = 4096;

__global__ void approximate(const float* in, float* exp2s, float* log2s, float* reciprocals) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  exp2s[i] = dalle::exp2_approx(in[i] - 8.0f);
  log2s[i] = dalle::log2_approx(in[i]);
  reciprocals[i] = dalle::reciprocal_approx(in[i]);
}

struct Range {
  double least = 0, most = 0;  // of errors over what is allowed
  void add(double error, double allowed) {
    least = std::fmin(least, error / allowed);
    most = std::fmax(most, error / allowed);
  }
  void check(const char* name) const {
    expect(least >= -1 && most <= 1, std::string(name) + " within the documented error");
#if !defined(__CUDACC__)
    expect(least < -0.7 && most > 0.7, std::string(name) + " as far off as documented");
#endif
  }
};

CASE(approximate_instructions) {
  Buffer<float> in(kCount), exp2s(kCount), log2s(kCount), reciprocals(kCount);
  for (int i = 0; i < kCount; ++i) in[i] = static_cast<float>(std::exp(i * 0.005 - 12.0));
  for (int i = 0; i < kCount; ++i) in[i] = i % 2 ? in[i] : 0.25f + i * 0.0005f;
  finish(launch(approximate, kCount / 128, 128, 0, nullptr, in.data(), exp2s.data(), log2s.data(),
                reciprocals.data()));
  Range exp2_range, log2_range, reciprocal_range;
  for (int i = 0; i < kCount; ++i) {
    const double x = in[i], log = std::log2(x),
                 power = std::exp2(static_cast<double>(in[i] - 8.0f));
    if (power < 0x1p127) exp2_range.add(exp2s[i] - power, 0x1p-22 * power);
    log2_range.add(log2s[i] - log, x >= 0.5 && x <= 2 ? 0x1p-22 : 0x1p-22 * std::fabs(log));
    reciprocal_range.add(reciprocals[i] - 1 / x, std::ldexp(1.0, std::ilogb(1 / x) - 23));
  }
  exp2_range.check("ex2");
  log2_range.check("lg2");
  reciprocal_range.check("rcp");
}

__global__ void limits(float* out) {
  out[0] = dalle::exp2_approx(0.0f);
  out[1] = dalle::exp2_approx(-INFINITY);
  out[2] = dalle::exp2_approx(-127.0f);  // flushed
  out[3] = dalle::log2_approx(0.0f);
  out[4] = dalle::log2_approx(INFINITY);
  out[5] = dalle::reciprocal_approx(INFINITY);
}
CASE(approximate_limits) {
  Buffer<float> out(6);
  finish(launch(limits, 1, 1, 0, nullptr, out.data()));
  const float wanted[] = {1, 0, 0, -INFINITY, INFINITY, 0};
  for (int i = 0; i < 6; ++i) expect(out[i] == wanted[i], "limit " + std::to_string(i));
}

constexpr int kProducts = 256;

// Each product of a row and a column is 16 x 8 equal sums of 8 terms.
__global__ void truncated(const float* a, const float* b, float* out) {
  const int i = static_cast<int>(blockIdx.x), t = static_cast<int>(threadIdx.x) % 4;
  const float *row = a + i * 8, *column = b + i * 8;
  const uint32_t left[4] = {dalle::to_tf32(row[t]), dalle::to_tf32(row[t]),
                            dalle::to_tf32(row[t + 4]), dalle::to_tf32(row[t + 4])};
  const uint32_t right[2] = {dalle::to_tf32(column[t]), dalle::to_tf32(column[t + 4])};
  float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  dalle::mma_m16n8k8_tf32(sums, left, right);
  if (threadIdx.x == 0) out[i] = sums[0];
}
// Positive terms, so that the power of two of a sum is at least that of each term: at most 10 cuts
// of 2^-24 of it, and two to a float, all towards zero.
CASE(approximate_tf32_sums) {
  Buffer<float> a(kProducts * 8), b(kProducts * 8), out(kProducts);
  const auto tf32 = [](float x) { return std::ldexp(std::floor(std::ldexp(x, 10)), -10); };
  for (int i = 0; i < kProducts * 8; ++i) {
    a[i] = tf32(1.0f + 0.99f * std::fabs(std::sin(1.7f * i)));
    b[i] = tf32(1.0f + 0.99f * std::fabs(std::cos(2.3f * i)));
  }
  finish(launch(truncated, kProducts, 32, 0, nullptr, a.data(), b.data(), out.data()));
  Range range;
  for (int i = 0; i < kProducts; ++i) {
    double exact = 0;
    for (int k = 0; k < 8; ++k) exact += static_cast<double>(a[i * 8 + k]) * b[i * 8 + k];
    range.add(out[i] - exact, std::ldexp(14.0, std::ilogb(exact) - 24));
  }
  expect(range.least >= -1 && range.most <= 0, "tf32 sums cut towards zero, within the bound");
}

}  // namespace approximate
