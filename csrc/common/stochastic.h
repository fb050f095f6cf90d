// Stochastic rounding of floats to half and bfloat16, for parameters that are kept in them. word_t
// is uint32_t or a vector of them. No torch here.
#pragma once

#include "common/element.h"
#include "common/host_device.h"

namespace dalle {

// The bits of a float that the storage type holds exactly, next below or above the one with these
// bits; above with the probability that makes the mean right. Of the random word the upper bits
// count. Subnormal results as well; infinities and NaN stay.
template <ElementKind kKind, typename word_t>
DALLE_HOST_DEVICE word_t round_stochastically(word_t bits, word_t random) {
  if constexpr (kKind == ElementKind::kFloat) return bits;
  const word_t sign = bits & 0x80000000u, magnitude = bits ^ sign;
  const word_t special = magnitude & 0x7F800000u;
  if constexpr (kKind == ElementKind::kBFloat16) {  // subnormals are those of float
    const word_t rounded = (magnitude + (random >> 16)) & 0xFFFF0000u;
    return special == 0x7F800000u ? bits : rounded | sign;
  }
  // Half: 13 bits are dropped, below 2^-14 one more for every power of two.
  const word_t exponent = magnitude >> 23;
  const word_t below = exponent < 113 ? 113 - exponent : word_t{};
  const word_t dropped = 13 + (below < 10 ? below : word_t{} + 10);
  const word_t mask = ((word_t{} + 1) << dropped) - 1;
  const word_t rounded = (magnitude + (random >> (32 - dropped))) & ~mask;
  // Below 2^-24 the float is a 32-bit fraction of it.
  const word_t mantissa = ((magnitude & 0x007FFFFFu) | 0x00800000u) << 8;
  const word_t shift = exponent < 103 ? 102 - exponent : word_t{};
  const word_t fraction = mantissa >> (shift < 31 ? shift : word_t{} + 31);
  const word_t tiny = random < fraction ? word_t{} + 0x33800000u : word_t{};
  const word_t result = exponent < 103 ? tiny : rounded;
  return special == 0x7F800000u ? bits : result | sign;
}

}  // namespace dalle
