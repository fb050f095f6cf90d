// The bfloat16 pairs of the CPU kernel, lane by lane against plain arithmetic. Compiled and run by
// tests/ops/test_sparse_attention_cpu.py for each instruction set: the processor's instructions and
// the definition that stands in for them obey the same test.
#include <cmath>
#include <cstdio>
#include <cstring>

#include "common/host_device.h"
#include "common/pairs.h"

using namespace dalle;
using namespace dalle::DALLE_ISA_NAMESPACE;

namespace {

constexpr int kWidth = Lanes<Pair>::kWidth;
int failures = 0;

void expect(bool holds, const char* what, double a, double b) {
  if (holds) return;
  if (++failures <= 20) std::printf("FAIL %s: %.9g, %.9g\n", what, a, b);
}

float of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
float first_of(uint32_t pair) { return of_bits(pair << 16); }
float second_of(uint32_t pair) { return of_bits(pair & 0xffff0000u); }

// The nearest number of 8 bits, the even one of two.
float rounded_plainly(float x) {
  if (!std::isfinite(x) || x == 0) return x;
  int exponent;
  std::frexp(x, &exponent);
  const double unit = std::ldexp(1.0, exponent - 8);
  return static_cast<float>(std::nearbyint(x / unit) * unit);
}

uint64_t state = 88172645463325252u;
uint32_t random32() {  // xorshift
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return static_cast<uint32_t>(state >> 32);
}

void rounding(const float* x) {
  const Vec<float> a = load(x), b = load(x + kWidth);
  const Vec<Pair> along = pairs_along(a, b), across = pairs_across(a, b);
  for (int i = 0; i < kWidth; ++i) {
    const float want[] = {rounded_plainly(x[2 * i]), rounded_plainly(x[2 * i + 1]),
                          rounded_plainly(x[i]), rounded_plainly(x[kWidth + i])};
    const float got[] = {first_of(along[i]), second_of(along[i]), first_of(across[i]),
                         second_of(across[i])};
    for (int j = 0; j < 4; ++j) {
      expect(got[j] == want[j] || (got[j] != got[j] && want[j] != want[j]), "rounding", got[j],
             want[j]);
    }
  }
}

void roundings() {
  float x[2 * kWidth];
  for (int round = 0; round < 20000; ++round) {
    for (float& value : x) {
      const uint32_t bits = random32();  // a quarter are ties; no subnormal numbers
      const uint32_t exponent = 1 + (bits >> 23 & 0xffu) % 253;
      const uint32_t digits = bits & (random32() % 4 == 0 ? 0x7f8000u : 0x7fffffu);
      value = of_bits((bits & 0x80000000u) | exponent << 23 | digits);
    }
    rounding(x);
  }
  for (int i = 0; i < 2 * kWidth; ++i) {
    const float special[] = {0.0f, -0.0f, INFINITY, -INFINITY, NAN, -1.5f, 1.17549435e-38f, 1.0f};
    x[i] = special[i % 8];
  }
  x[5] = of_bits(0x7f7f7fffu);  // rounds down to the largest, not up to infinity
  rounding(x);
  const Vec<float> nan = splat<float>(of_bits(0x7f800001u));  // all its digits are cut off
  expect(std::isnan(first_of(pairs_along(nan, nan)[0])), "NaN along", 0, 0);
  expect(std::isnan(second_of(pairs_across(nan, nan)[0])), "NaN across", 0, 0);
}

void products() {
  for (int round = 0; round < 20000; ++round) {
    Vec<Pair> a, b;
    Vec<float> sum;
    for (int i = 0; i < kWidth; ++i) {
      a[i] = (random32() & 0x80ff80ffu) + 0x3f003f00u;  // from 1/2 to 2, and negative
      b[i] = (random32() & 0x80ff80ffu) + 0x3f003f00u;
      sum[i] = round % 2 == 0 ? 0.0f : first_of((random32() & 0x80ffu) + 0x3f00u);
    }
    const Vec<float> got = multiply_add(a, b, sum);
    for (int i = 0; i < kWidth; ++i) {
      const double first = double{first_of(a[i])} * first_of(b[i]);
      const double second = double{second_of(a[i])} * second_of(b[i]);
      const double size = std::fabs(first) + std::fabs(second) + std::fabs(sum[i]);
      const double want = sum[i] + first + second;
      expect(std::fabs(got[i] - want) <= 2e-7 * size, "product", got[i], want);
    }
  }
}

void interleaving() {
  Vec<Pair> a, b;
  for (int i = 0; i < kWidth; ++i) {
    a[i] = (2u * i + 1) << 16 | 2u * i;
    b[i] = (2u * i + 101) << 16 | (2u * i + 100);
  }
  const Vec<Pair> low = interleave_low(a, b), high = interleave_high(a, b);
  for (uint32_t i = 0; i < kWidth; ++i) {
    expect(low[i] == ((i + 100) << 16 | i), "interleave low", low[i], i);
    const uint32_t at = kWidth + i;
    expect(high[i] == ((at + 100) << 16 | at), "interleave high", high[i], at);
  }
}

}  // namespace

int main() {
  roundings();
  products();
  interleaving();
  if (failures > 0) std::printf("%d failures\n", failures);
  return failures > 0;
}
