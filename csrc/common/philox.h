// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers, as easy as 1, 2, 3; 2011),
// host and device. No torch here.
//
// Counter mapping of every op of this library: the key is a 64-bit seed, subsequence s has the
// counter (0, 0, low(s), high(s)) (cuRAND's offset 0 of subsequence s), and one call gives the four
// words of four consecutive elements: element e takes word e % 4 of subsequence e / 4. CPU, CUDA
// and emulated kernels therefore draw the same integers, whatever their grid.
#pragma once

#include "common/host_device.h"

namespace dalle {

inline constexpr uint32_t kPhiloxMultiply0 = 0xD2511F53u;
inline constexpr uint32_t kPhiloxMultiply1 = 0xCD9E8D57u;
inline constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u;
inline constexpr uint32_t kPhiloxWeyl1 = 0xBB67AE85u;
inline constexpr int kPhiloxRounds = 10;

struct PhiloxWords {
  uint32_t word[4];
};

DALLE_HOST_DEVICE PhiloxWords philox(const PhiloxWords& counter, uint64_t seed) {
  PhiloxWords c = counter;
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(kPhiloxMultiply0) * c.word[0];
    const uint64_t product1 = static_cast<uint64_t>(kPhiloxMultiply1) * c.word[2];
    c = {{static_cast<uint32_t>(product1 >> 32) ^ c.word[1] ^ key0, static_cast<uint32_t>(product1),
          static_cast<uint32_t>(product0 >> 32) ^ c.word[3] ^ key1,
          static_cast<uint32_t>(product0)}};
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  return c;
}

// The four words of subsequence s: elements 4 s to 4 s + 3.
DALLE_HOST_DEVICE PhiloxWords philox_subsequence(uint64_t s, uint64_t seed) {
  return philox({{0, 0, static_cast<uint32_t>(s), static_cast<uint32_t>(s >> 32)}}, seed);
}

}  // namespace dalle
