// The functions of common/ptx.cuh for g++; its comments say what they do. No torch here.
#pragma once

#include "emulator/device.h"

namespace dalle {

template <typename scalar_t>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], DALLE_HERE) {
  static_assert(std::is_same_v<scalar_t, __half> || std::is_same_v<scalar_t, __nv_bfloat16>);
  emulator::mma_m16n8k16(
      std::is_same_v<scalar_t, __half> ? emulator::Operand::kHalf : emulator::Operand::kBFloat16, d,
      a, b, location);
}

inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             DALLE_HERE) {
  emulator::mma_m16n8k8_tf32(d, a, b, location);
}

inline uint32_t to_tf32(float x) {
  const uint32_t word = __float_as_uint(x);
  const bool finite = (word & 0x7f800000u) != 0x7f800000u;
  return finite ? (word + 0x1000u) & 0xffffe000u : word & 0xffffe000u;
}

template <int kCount>
void ldmatrix(uint32_t (&words)[kCount], const void* row, DALLE_HERE) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4);
  emulator::ldmatrix(words, kCount, false, row, location);
}
template <int kCount>
void ldmatrix_trans(uint32_t (&words)[kCount], const void* row, DALLE_HERE) {
  static_assert(kCount == 1 || kCount == 2 || kCount == 4);
  emulator::ldmatrix(words, kCount, true, row, location);
}
inline uint32_t movmatrix_trans(uint32_t word, DALLE_HERE) {
  return emulator::movmatrix_trans(word, location);
}

template <int kBytes>
void cp_async(void* shared, const void* global, int valid_bytes = kBytes, DALLE_HERE) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  emulator::cp_async(shared, global, kBytes, valid_bytes, location);
}
inline void cp_async_commit() { emulator::cp_async_commit(); }
template <int kGroups>
void cp_async_wait() {
  emulator::cp_async_wait(kGroups);
}

inline float exp2_approx(float x) { return emulator::ex2(x); }
inline float log2_approx(float x) { return emulator::lg2(x); }
inline float reciprocal_approx(float x) { return emulator::rcp(x); }

// The copy is not instrumented: vector_access has checked it and told the race detector.
template <typename vector_t>
__attribute__((no_sanitize_thread)) vector_t load_vector(const void* at, DALLE_HERE) {
  emulator::vector_access(at, sizeof(vector_t), false, location);
  return *static_cast<const vector_t*>(at);
}
template <typename vector_t>
vector_t load_vector_once(const void* at, DALLE_HERE) {
  return load_vector<vector_t>(at, location);
}
template <typename vector_t>
__attribute__((no_sanitize_thread)) void store_vector(void* at, const vector_t& value, DALLE_HERE) {
  emulator::vector_access(at, sizeof(vector_t), true, location);
  *static_cast<vector_t*>(at) = value;
}
template <typename vector_t>
void store_vector_once(void* at, const vector_t& value, DALLE_HERE) {
  store_vector(at, value, location);
}

}  // namespace dalle
