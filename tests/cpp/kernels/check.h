// What the tests of tests/cpp/kernels have in common: the same numbers on every machine, storage
// formats by their definition, and the comparison. All in plain C++, compiled without contraction.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "common/element.h"

namespace dalle {

struct Checks {
  int64_t cases = 0, failures = 0;
  uint64_t hash = 0xCBF29CE484222325u;  // FNV-1a of all results whose bits are promised

  void fail(const char* what, int64_t at, double got, double want) {
    if (++failures <= 20) {
      std::printf("FAIL %s[%lld]: got %.9g, want %.9g\n", what, static_cast<long long>(at), got,
                  want);
    }
  }
  template <typename T>
  void same(const char* what, const std::vector<T>& got, const std::vector<T>& want) {
    ++cases;
    for (size_t i = 0; i < got.size(); ++i) {
      uint64_t bits = 0;
      if constexpr (sizeof(T) == sizeof(uint16_t)) {
        bits = got[i];
      } else if constexpr (sizeof(T) == sizeof(uint32_t)) {
        uint32_t word;
        std::memcpy(&word, &got[i], sizeof word);
        bits = word;
      } else {
        std::memcpy(&bits, &got[i], sizeof bits);
      }
      for (size_t b = 0; b < sizeof(T); ++b) {
        hash = (hash ^ ((bits >> (8 * b)) & 0xFF)) * 0x100000001B3u;
      }
      if (std::memcmp(&got[i], &want[i], sizeof(T)) != 0) {
        fail(what, static_cast<int64_t>(i), static_cast<double>(got[i]),
             static_cast<double>(want[i]));
      }
    }
  }
  // |got - want| <= tolerance * (1 + |want|).
  template <typename T>
  void close(const char* what, const std::vector<T>& got, const std::vector<double>& want,
             double tolerance) {
    ++cases;
    for (size_t i = 0; i < got.size(); ++i) {
      const double x = static_cast<double>(got[i]), error = std::fabs(x - want[i]);
      if (!(error <= tolerance * (1 + std::fabs(want[i])))) {
        fail(what, static_cast<int64_t>(i), x, want[i]);
      }
    }
  }
};

struct Random {  // xorshift
  uint64_t state = 88172645463325252u;
  uint32_t word() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return static_cast<uint32_t>(state >> 32);
  }
  float uniform() { return static_cast<float>(word() >> 8) * 0x1p-23f - 1.0f; }  // in [-1, 1)
  std::vector<float> floats(size_t count, float size = 1.0f) {
    std::vector<float> result(count);
    for (float& x : result) x = uniform() * size;
    return result;
  }
};

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float float_with(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline float value_of_half(uint16_t bits) {
  const int exponent = (bits >> 10) & 31, fraction = bits & 1023;
  if (exponent == 31 && fraction != 0) {
    return float_with((bits & 0x8000u) << 16 | 0x7FC00000u | static_cast<uint32_t>(fraction) << 13);
  }
  const double value = exponent == 31 ? HUGE_VAL
                       : exponent     ? std::ldexp(1024 + fraction, exponent - 25)
                                      : std::ldexp(fraction, -24);
  return static_cast<float>(bits & 0x8000 ? -value : value);
}
inline uint16_t half_of(float x) {  // to nearest, ties to even; NaN keeps its upper digits
  const uint32_t bits = bits_of(x), sign = (bits >> 16) & 0x8000u;
  const double magnitude = std::fabs(static_cast<double>(x));
  if (x != x) return static_cast<uint16_t>(sign | 0x7E00u | ((bits >> 13) & 0x3FFu));
  if (magnitude >= 65520) return static_cast<uint16_t>(sign | 0x7C00u);
  const int exponent = magnitude < 0x1p-14 ? -14 : std::ilogb(magnitude);
  const auto digits = static_cast<uint32_t>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  return static_cast<uint16_t>(sign | (digits + (static_cast<uint32_t>(exponent + 14) << 10)));
}
inline uint16_t bfloat16_of(float x) {
  const uint32_t bits = bits_of(x);
  if (x != x) return 0x7FC0;
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

// Numbers as a tensor stores them.
struct Stored {
  ElementKind kind;
  std::vector<float> floats;
  std::vector<uint16_t> shorts;

  explicit Stored(ElementKind kind, size_t count) : kind(kind) {
    if (kind == ElementKind::kFloat) floats.assign(count, 0.0f);
    if (kind != ElementKind::kFloat) shorts.assign(count, 0);
  }
  Stored(ElementKind kind, const std::vector<float>& values) : Stored(kind, values.size()) {
    for (size_t i = 0; i < values.size(); ++i) set(i, values[i]);
  }
  size_t size() const { return kind == ElementKind::kFloat ? floats.size() : shorts.size(); }
  void* data() {
    if (kind == ElementKind::kFloat) return floats.data();
    return shorts.data();
  }
  float at(size_t i) const {
    return kind == ElementKind::kFloat  ? floats[i]
           : kind == ElementKind::kHalf ? value_of_half(shorts[i])
                                        : float_with(static_cast<uint32_t>(shorts[i]) << 16);
  }
  void set(size_t i, float x) {
    if (kind == ElementKind::kFloat) {
      floats[i] = x;
    } else {
      shorts[i] = kind == ElementKind::kHalf ? half_of(x) : bfloat16_of(x);
    }
  }
  std::vector<float> values() const {
    std::vector<float> result(size());
    for (size_t i = 0; i < size(); ++i) result[i] = at(i);
    return result;
  }
};
inline void same(Checks& checks, const char* what, const Stored& got, const Stored& want) {
  if (got.kind == ElementKind::kFloat) return checks.same(what, got.floats, want.floats);
  checks.same(what, got.shorts, want.shorts);
}

constexpr ElementKind kStorageKinds[] = {ElementKind::kFloat, ElementKind::kHalf,
                                         ElementKind::kBFloat16};

// Ops whose bits are the same on every processor, and those that are close to exact arithmetic.
void test_formats(Checks& checks);
void test_adam16(Checks& checks);
void test_grad_scale(Checks& checks);
void test_gumbel_words(Checks& checks);
void test_powersgd(Checks& checks);
void test_gumbel_softmax(Checks& checks);
void test_sparse_attention(Checks& checks);
void test_decode_attention(Checks& checks);
void test_packed_linear(Checks& checks);
void test_team(Checks& checks);
void test_decode_layers(Checks& checks);

}  // namespace dalle
