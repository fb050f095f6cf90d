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

}  // namespace approximate
