// CPU kernels of formats on raw pointers. The table below is what formats.cpp sees; the kernels are
// compiled once per instruction set (csrc/common/isa.h). No torch here.
//
// A unit of work is kFormatsUnit elements, a multiple of a Philox call; bits do not depend on the
// threads.
#pragma once

#include "common/isa.h"
#include "formats/formats.h"

namespace dalle {

inline constexpr int64_t kFormatsUnit = 4096;

struct FormatsCpu {
  void (*pack)(const PackArgs& args, int64_t unit_begin, int64_t unit_end);
  void (*unpack)(const UnpackArgs& args, int64_t unit_begin, int64_t unit_end);
  void (*reduce)(const ReduceArgs& args, int64_t unit_begin, int64_t unit_end);
};

DALLE_FOR_EACH_ISA(FormatsCpu, formats_cpu)

}  // namespace dalle

#ifdef DALLE_ISA

#include "common/philox_lanes.h"
#include "common/vector.h"

namespace dalle {
namespace DALLE_ISA_NAMESPACE {
namespace {

// Encodes vectors of neighbouring elements and counts saturated, flushed and nonfinite ones.
template <Format kFormat>
class Encoder {
 public:
  Encoder(const int64_t* seed, int64_t* counts) : counts_(counts), stochastic_(seed != nullptr) {
    if (stochastic_) keys_ = philox_keys(static_cast<uint64_t>(*seed));
  }
  ~Encoder() {
    if (counts_ == nullptr) return;
    for (int c = 0; c < kNumCounts; ++c) {
      int64_t total = 0;
      for (int i = 0; i < kLanes; ++i) total += lane_counts_[c][i];
      __atomic_fetch_add(counts_ + c, total, __ATOMIC_RELAXED);
    }
  }

  // Two vectors from `element` on, a multiple of 2 kLanes. Unused lanes are 0.
  void encode_two(int64_t element, const Float (&x)[2], Word (&codes)[2]) {
    Word added[2] = {Word{} + FormatOf<kFormat>::kHalfUlp, Word{} + FormatOf<kFormat>::kHalfUlp};
    if (stochastic_) {
      const TwoWords random = two_words(keys_, static_cast<uint64_t>(element) / 4);
      for (int j = 0; j < 2; ++j) added[j] = stochastic<kFormat>(random.word[j]);
    }
    for (int j = 0; j < 2; ++j) {
      const Word bits = (Word)x[j];
      codes[j] = encode<kFormat>(bits, added[j]);
      if (counts_ == nullptr) continue;
      const Word magnitude = bits & 0x7FFFFFFFu;
      const Word finite = (Word)(magnitude < 0x7F800000u);
      const Word flushed = (Word)(magnitude != 0) & (Word)(codes[j] == 0) & finite;
      const Word beyond = (Word)(magnitude > FormatOf<kFormat>::kMax) & finite & ~flushed;
      lane_counts_[kSaturated] -= beyond;  // a mask is -1 where it holds
      lane_counts_[kFlushed] -= flushed;
      lane_counts_[kNonfinite] -= ~finite;
    }
  }

 private:
  int64_t* counts_;
  bool stochastic_;
  PhiloxKeys keys_;
  Word lane_counts_[kNumCounts] = {};  // a lane counts less than 2^32 elements of a task
};

// `for_pairs` of the elements of units; body gets the element.
template <typename Body>
inline void for_pairs_of_units(int64_t numel, int64_t unit_begin, int64_t unit_end,
                               const Body& body) {
  const int64_t begin = unit_begin * kFormatsUnit;
  const int64_t end = unit_end * kFormatsUnit < numel ? unit_end * kFormatsUnit : numel;
  for_pairs(end - begin,
            [&](int64_t i, int64_t first, int64_t second) { body(begin + i, first, second); });
}

template <Format kFormat, typename scalar_t>
void pack_units(const PackArgs& args, int64_t begin, int64_t end) {
  const scalar_t* const x = static_cast<const scalar_t*>(args.x);
  Encoder<kFormat> encoder(args.seed, args.counts);
  for_pairs_of_units(args.numel, begin, end, [&](int64_t i, int64_t first, int64_t second) {
    const int64_t counts[2] = {first, second};
    Float values[2];
    Word codes[2];
    for (int j = 0; j < 2; ++j) {
      const scalar_t* const from = x + i + j * kLanes;
      values[j] = load_up_to(from, counts[j], 0.0f);
    }
    encoder.encode_two(i, values, codes);
    for (int j = 0; j < 2; ++j) store_codes(args.codes + i + j * kLanes, counts[j], codes[j]);
  });
}

template <Format kFormat, typename scalar_t>
void unpack_units(const UnpackArgs& args, int64_t begin, int64_t end) {
  scalar_t* const x = static_cast<scalar_t*>(args.x);
  for_pairs_of_units(args.numel, begin, end, [&](int64_t i, int64_t first, int64_t second) {
    const int64_t counts[2] = {first, second};
    for (int j = 0; j < 2; ++j) {
      const int64_t at = i + j * kLanes;
      store_up_to(x + at, counts[j],
                  (Float)decode<kFormat>(load_codes(args.codes + at, counts[j])));
    }
  });
}

template <Format kFormat>
void reduce_units(const ReduceArgs& args, int64_t begin, int64_t end) {
  Encoder<kFormat> encoder(args.seed, args.counts);
  constexpr int64_t kPart = 1024;  // sums stay in L1, one buffer is read after the other
  float totals[kPart];
  const int64_t last = end * kFormatsUnit < args.numel ? end * kFormatsUnit : args.numel;
  for (int64_t part = begin * kFormatsUnit; part < last; part += kPart) {
    const int64_t count = last - part < kPart ? last - part : kPart;
    __builtin_memset(totals, 0, sizeof totals);
    for (int64_t r = 0; r < args.num_buffers; ++r) {
      const uint16_t* const from = args.codes + r * args.numel + part;
      for_vectors(0, count, [&](int64_t i, int64_t some) {
        const Float value = (Float)decode<kFormat>(load_codes(from + i, some));
        store(totals + i, load(totals + i) + value);
      });
    }
    for_pairs(count, [&](int64_t i, int64_t first, int64_t second) {
      const Float total[2] = {load(totals + i), load(totals + i + kLanes)};
      Word codes[2];
      encoder.encode_two(part + i, total, codes);
      store_codes(args.sum + part + i, first, codes[0]);
      store_codes(args.sum + part + i + kLanes, second, codes[1]);
    });
  }
}

void pack(const PackArgs& args, int64_t begin, int64_t end) {
  with_scalar(args.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    if (args.format == Format::k169) return pack_units<Format::k169, scalar_t>(args, begin, end);
    pack_units<Format::k0610, scalar_t>(args, begin, end);
  });
}

void unpack(const UnpackArgs& args, int64_t begin, int64_t end) {
  with_scalar(args.dtype, [&](auto scalar) {
    using scalar_t = decltype(scalar);
    if (args.format == Format::k169) return unpack_units<Format::k169, scalar_t>(args, begin, end);
    unpack_units<Format::k0610, scalar_t>(args, begin, end);
  });
}

void reduce(const ReduceArgs& args, int64_t begin, int64_t end) {
  if (args.format == Format::k169) return reduce_units<Format::k169>(args, begin, end);
  reduce_units<Format::k0610>(args, begin, end);
}

}  // namespace

extern const FormatsCpu formats_cpu = {pack, unpack, reduce};

}  // namespace DALLE_ISA_NAMESPACE
}  // namespace dalle

#endif  // DALLE_ISA
