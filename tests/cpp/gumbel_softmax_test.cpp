// Philox, the Gumbel transform, exp2 and the 16-bit formats of the CPU kernel, lane by lane against
// plain arithmetic in double. Compiled and run by tests/ops/test_gumbel_softmax_noise.py for each
// instruction set.
#include <cmath>
#include <cstdio>
#include <initializer_list>

#include "gumbel_softmax/gumbel_softmax_vector.h"

using namespace dalle;
using namespace dalle::DALLE_ISA_NAMESPACE;

namespace {

int failures = 0;

void expect(bool holds, const char* what, double a, double b) {
  if (holds) return;
  if (++failures <= 20) std::printf("FAIL %s: %.9g, %.9g\n", what, a, b);
}

uint64_t state = 88172645463325252u;
uint64_t random64() {  // xorshift, so that the test does not lean on what it tests
  state ^= state << 13;
  state ^= state >> 7;
  return state ^= state << 17;
}

void known_answers() {  // Random123's vectors for philox4x32-10
  const uint32_t ones = 0xFFFFFFFFu;
  const struct {
    PhiloxWords counter;
    uint64_t seed;
    PhiloxWords words;
  } cases[] = {
      {{{0, 0, 0, 0}}, 0, {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}}},
      {{{ones, ones, ones, ones}}, ~0ull, {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}}},
      {{{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}},
       0x299f31d0a4093822ull,
       {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}},
  };
  for (const auto& c : cases) {
    const PhiloxWords got = philox(c.counter, c.seed);
    for (int i = 0; i < 4; ++i) expect(got.word[i] == c.words.word[i], "philox", got.word[i], i);
  }
}

void lanes_draw_the_words_of_their_subsequence() {
  const uint64_t firsts[] = {0, 3, 0xFFFFFFFEull, (1ull << 40) + 5};  // across 2^32 as well
  for (const uint64_t first : firsts) {
    for (const uint64_t seed : {0ull, 42ull, ~0ull, 0x123456789ABCDEFull}) {
      uint32_t words[2 * kLanes];
      random_words(philox_keys(seed), first, words);
      for (int e = 0; e < 2 * kLanes; ++e) {
        const PhiloxWords plain = philox_subsequence(first + e / 4, seed);
        expect(words[e] == plain.word[e % 4], "random_words", words[e], e);
      }
    }
  }
}

double worst_noise(Word words, double logit) {
  const Float got = add_gumbel(splat(static_cast<float>(logit)), words);
  double worst = 0;
  for (int i = 0; i < kLanes; ++i) {
    const double u = (words[i] + 0.5) * 0x1p-32, exact = logit - std::log(-std::log(u));
    const double rounding = std::fabs(exact) * 0x1p-24;
    worst = std::fmax(worst, std::fabs(got[i] - exact) - rounding);
  }
  return worst;
}

void noise_is_accurate() {
  double worst = 0;
  for (uint32_t i = 0; i < 60000; ++i) {
    Word random, low, high, near;
    for (int j = 0; j < kLanes; ++j) {
      random[j] = static_cast<uint32_t>(random64() >> 32);
      low[j] = i * kLanes + j;
      high[j] = ~low[j];
      near[j] = kNearOne - 30000 + i;
    }
    for (const Word words : {random, low, high, near})
      worst = std::fmax(worst, worst_noise(words, 0));
    worst = std::fmax(worst, worst_noise(random, 3.0));
  }
  std::printf("noise: %.3g beyond one rounding\n", worst);
  expect(worst < 3e-7, "add_gumbel", worst, 3e-7);
}

void exp2_is_accurate() {
  double worst = 0;
  for (int i = 0; i < 200000; ++i) {
    Float x;
    for (int j = 0; j < kLanes; ++j)
      x[j] = -static_cast<float>(random64() >> 40) * 0x1p-24f * 126.0f;
    const Float y = exp2_of<float>(x);
    for (int j = 0; j < kLanes; ++j) {
      worst = std::fmax(worst, std::fabs(y[j] / std::exp2(static_cast<double>(x[j])) - 1));
    }
  }
  std::printf("exp2: %.3g relative\n", worst);
  expect(worst < 1e-7, "exp2_of", worst, 1e-7);
  expect(exp2_of<float>(splat(0.0f))[0] == 1.0f, "exp2_of(0)", exp2_of<float>(splat(0.0f))[0], 1);
  for (const float x : {-126.5f, -1e30f, -__builtin_inff()}) {
    expect(exp2_of<float>(splat(x))[0] == 0.0f, "exp2_of vanishes", x, exp2_of<float>(splat(x))[0]);
  }
}

// The value of a half, by its definition.
double half_value(uint16_t bits) {
  const int exponent = (bits >> 10) & 31, fraction = bits & 1023;
  double value = exponent == 31 ? (fraction ? NAN : INFINITY)
                 : exponent     ? std::ldexp(1024 + fraction, exponent - 25)
                                : std::ldexp(fraction, -24);
  return bits & 0x8000 ? -value : value;
}

bool same(double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); }

void halves_are_exact() {
  Half in[kLanes], out[kLanes];
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    for (auto& h : in) h.bits = static_cast<uint16_t>(bits);
    const Float v = widen(in);
    expect(same(v[0], half_value(in[0].bits)), "load half", v[0], bits);
    narrow(out, v);
    // A NaN becomes a quiet one, and keeps its other digits.
    expect(out[0].bits == (std::isnan(v[0]) ? bits | 0x200 : bits), "store half", out[0].bits,
           bits);
    expect(!std::isnan(v[0]) ||
               ((Word)v)[0] == ((bits & 0x8000) << 16 | 0x7FC00000 | (bits & 0x3FF) << 13),
           "load NaN", ((Word)v)[0], bits);
  }
  // Between neighbours, and the tie to the even one.
  for (uint32_t bits = 0; bits < 0x7BFF; ++bits) {
    const double a = half_value(bits), b = half_value(bits + 1), middle = (a + b) / 2;
    const struct {
      double value;
      uint32_t want;
    } cases[] = {{std::nextafter(static_cast<float>(middle), 0.0f), bits},
                 {middle, bits + (bits & 1)},
                 {std::nextafter(static_cast<float>(middle), 1e9f), bits + 1}};
    for (const auto& c : cases) {
      narrow(out, splat(static_cast<float>(c.value)));
      expect(out[0].bits == c.want, "round half", c.value, out[0].bits);
    }
  }
  narrow(out, splat(65519.0f));
  expect(out[0].bits == 0x7BFF, "half below overflow", out[0].bits, 0x7BFF);
  narrow(out, splat(65520.0f));
  expect(out[0].bits == 0x7C00, "half overflow", out[0].bits, 0x7C00);
}

void bfloat16s_are_exact() {
  BFloat16 in[kLanes], out[kLanes];
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    for (auto& h : in) h.bits = static_cast<uint16_t>(bits);
    const Float v = widen(in);
    narrow(out, v);
    expect(out[0].bits == (std::isnan(v[0]) ? 0x7FC0 : bits), "bfloat16", out[0].bits, bits);
    if ((bits & 0x7F80) == 0x7F80) continue;
    const Word tie = (Word)v + 0x8000;
    narrow(out, (Float)tie);
    expect(out[0].bits == bits + (bits & 1), "bfloat16 tie", out[0].bits, bits);
    narrow(out, (Float)(tie + 1));
    expect(out[0].bits == bits + 1, "bfloat16 up", out[0].bits, bits);
  }
}

}  // namespace

int main() {
  known_answers();
  lanes_draw_the_words_of_their_subsequence();
  noise_is_accurate();
  exp2_is_accurate();
  halves_are_exact();
  bfloat16s_are_exact();
  std::printf("%d failures\n", failures);
  return failures != 0;
}
