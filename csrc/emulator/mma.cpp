// mma.sync: fragments of 32 lanes to matrices and back. Products of 16 bits are added in float one
// after another, ascending in k; the hardware's order and rounding differ. Products of tf32 are
// added as badly as hardware may.
#include <bit>
#include <vector>

#include "emulator/approximate.h"
#include "emulator/block.h"

namespace dalle::emulator {
namespace {

constexpr int kRows = 16, kColumns = 8;

struct Operands {
  float* d;
  const uint32_t *a, *b;
};

float float_of_half(uint32_t half) {
  const uint32_t sign = (half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 0x3ff;
  if (exponent == 0) {
    const float size = static_cast<float>(fraction) * 0x1p-24f;
    return sign ? -size : size;
  }
  const uint32_t wide = exponent == 31 ? 255 : exponent + 112;
  return std::bit_cast<float>(sign | wide << 23 | fraction << 13);
}

// All of them, because a warp converts 384 for each mma.
const std::vector<float>& halves() {
  static const std::vector<float> table = [] {
    std::vector<float> all(1 << 16);
    for (uint32_t i = 0; i < all.size(); ++i) all[i] = float_of_half(i);
    return all;
  }();
  return table;
}

// d + a b of 8 products of tf32, as measured on an A100 and an H100 (Fasi et al., "Numerical
// behavior of NVIDIA tensor cores", 2021; Xie et al., "MMA-Sim", 2025): terms are exact, then cut
// towards zero to a grid that hangs from the power of two of the largest, 2^-24 of it (A100; 2^-25
// on an H100), added exactly, and the sum is cut to a float. An A100 takes two halves of 4 one
// after the other, an H100 all 8 at once; a hash of operands and seed decides here. Each cut term
// loses the whole of what a cut can take, 2^-24.
float cut_to_float(double x) {
  const float nearest = static_cast<float>(x);
  return std::fabs(static_cast<double>(nearest)) > std::fabs(x) ? std::nextafter(nearest, 0.0f)
                                                                : nearest;
}
template <int kCount>
float truncated_terms(float d, const float* a, const float* b) {
  double terms[kCount + 1] = {d}, largest = std::fabs(terms[0]), sum = 0;
  for (int k = 0; k < kCount; ++k) {
    terms[k + 1] = static_cast<double>(a[k]) * b[k * kColumns];
    sum += terms[k + 1];
    largest = std::fmax(largest, std::fabs(terms[k + 1]));
  }
  if (!std::isfinite(sum + d)) return static_cast<float>(sum + d);
  if (largest == 0) return 0;
  // The power of two of `largest`, times 2^-24, from its exponent bits: products of floats are
  // normal doubles.
  const uint64_t power = std::bit_cast<uint64_t>(largest) & 0x7ff0000000000000u;
  const double grid = std::bit_cast<double>(power) * 0x1p-24, inverse = 1 / grid;
  double left = 0;
  for (const double term : terms) {
    const double exact = term * inverse;
    const bool fits = static_cast<double>(static_cast<int64_t>(exact)) == exact;
    left += fits ? exact : exact > 1 ? exact - 1 : exact < -1 ? exact + 1 : 0.0;
  }
  return cut_to_float(left * grid);
}
float truncated_sum(float d, const float* a, const float* b) {
  const float operands = d + a[0] * b[0] + a[7] * b[7 * kColumns];
  if (hashed_bit(operands)) return truncated_terms<8>(d, a, b);
  return truncated_terms<4>(truncated_terms<4>(d, a, b), a + 4, b + 4 * kColumns);
}

template <int kDepth>
struct Matrices {
  float a[kRows][kDepth], b[kDepth][kColumns], d[kRows][kColumns];

  void multiply() {
    if constexpr (kDepth == 8) {
      for (int i = 0; i < kRows; ++i) {
        for (int j = 0; j < kColumns; ++j) d[i][j] = truncated_sum(d[i][j], a[i], b[0] + j);
      }
      return;
    }
    for (int k = 0; k < kDepth; ++k) {
      for (int i = 0; i < kRows; ++i) {
        for (int j = 0; j < kColumns; ++j) d[i][j] += a[i][k] * b[k][j];
      }
    }
  }
  // Where lane (g, t) keeps d, in the order of its four floats.
  template <typename Visit>
  void each_d(int g, int t, const Visit& visit) {
    visit(0, d[g][2 * t]);
    visit(1, d[g][2 * t + 1]);
    visit(2, d[g + 8][2 * t]);
    visit(3, d[g + 8][2 * t + 1]);
  }
};

template <typename Fill, int kDepth>
void run_mma(void* const* arguments, Matrices<kDepth>& m, const Fill& fill) {
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const auto& x = *static_cast<const Operands*>(arguments[lane]);
    fill(x, lane / 4, lane % 4);
    m.each_d(lane / 4, lane % 4, [&](int i, float& d) { d = x.d[i]; });
  }
  m.multiply();
  ++counts.mma;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const auto& x = *static_cast<const Operands*>(arguments[lane]);
    m.each_d(lane / 4, lane % 4, [&](int i, float& d) { x.d[i] = d; });
  }
}

// Two 16-bit elements of a word, the low one first; `widen` makes a float of one.
template <typename Widen>
void mma_16(void* const* arguments, const Widen& widen) {
  Matrices<16> m;
  run_mma(arguments, m, [&](const Operands& x, int g, int t) {
    for (int j = 0; j < 2; ++j) {
      const auto element = [&](uint32_t word) { return widen(word >> (16 * j) & 0xffff); };
      m.a[g][2 * t + j] = element(x.a[0]);
      m.a[g + 8][2 * t + j] = element(x.a[1]);
      m.a[g][2 * t + 8 + j] = element(x.a[2]);
      m.a[g + 8][2 * t + 8 + j] = element(x.a[3]);
      m.b[2 * t + j][g] = element(x.b[0]);
      m.b[2 * t + 8 + j][g] = element(x.b[1]);
    }
  });
}

void finish_half(void* const* arguments, uint32_t lanes) {
  require_warp("mma.sync", lanes);
  const float* table = halves().data();
  mma_16(arguments, [table](uint32_t half) { return table[half]; });
}

void finish_bfloat16(void* const* arguments, uint32_t lanes) {
  require_warp("mma.sync", lanes);
  mma_16(arguments, [](uint32_t word) { return std::bit_cast<float>(word << 16); });
}

void finish_tf32(void* const* arguments, uint32_t lanes) {
  require_warp("mma.sync", lanes);
  // The hardware ignores the 13 low bits, which to_tf32 leaves zero.
  const auto widen = [](uint32_t word) { return std::bit_cast<float>(word & 0xffffe000u); };
  Matrices<8> m;
  run_mma(arguments, m, [&](const Operands& x, int g, int t) {
    m.a[g][t] = widen(x.a[0]);
    m.a[g + 8][t] = widen(x.a[1]);
    m.a[g][t + 4] = widen(x.a[2]);
    m.a[g + 8][t + 4] = widen(x.a[3]);
    m.b[t][g] = widen(x.b[0]);
    m.b[t + 4][g] = widen(x.b[1]);
  });
}

}  // namespace

void mma_m16n8k16(Operand type, float* d, const uint32_t* a, const uint32_t* b, Location location) {
  Operands operands = {d, a, b};
  rendezvous("mma.m16n8k16", kAllLanes, &operands,
             type == Operand::kHalf ? &finish_half : &finish_bfloat16, location);
}

void mma_m16n8k8_tf32(float* d, const uint32_t* a, const uint32_t* b, Location location) {
  Operands operands = {d, a, b};
  rendezvous("mma.m16n8k8", kAllLanes, &operands, &finish_tf32, location);
}

}  // namespace dalle::emulator
