// The CPU kernel of decode attention: what it offers (always) and, once per instruction set, how it
// does it (under DALLE_ISA). No torch here.
//
// A task is one head of some samples of a caption.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/isa.h"
#include "decode_attention/decode_attention.h"

namespace dalle {

struct DecodeAttentionCpu {
  int32_t samples;  // of a task
  size_t (*workspace_bytes)(const DecodeAttentionParams&);
  // Tasks (b * H + h) * ceil(S / samples) + tile. `workspace`: a thread's own, aligned to 64 bytes.
  void (*run)(const DecodeAttentionParams&, int32_t slot, void* workspace, int64_t task_begin,
              int64_t task_end);
};

DALLE_FOR_EACH_ISA(DecodeAttentionCpu, decode_attention_cpu)

}  // namespace dalle

#ifdef DALLE_ISA

#include <cmath>  // INFINITY
#include <cstring>

#include "common/vector.h"

namespace dalle::DALLE_ISA_NAMESPACE {
namespace {

constexpr double kLog2E = 1.4426950408889634;
constexpr int kSamples = 1;

// Codes as numbers.
inline Float widen(const int8_t* p) {
  typedef int8_t codes_t __attribute__((vector_size(kBytes / 4)));
  return __builtin_convertvector(load_as<codes_t>(p), Float);
}

template <typename acc_t, typename stored_t>
inline acc_t element(const stored_t* p) {
  if constexpr (std::is_same_v<stored_t, int8_t> || std::is_same_v<stored_t, acc_t>) {
    return static_cast<acc_t>(*p);
  } else {
    return load_some(p, 1, 0)[0];
  }
}

template <typename stored_t, typename acc_t>
inline acc_t dot(const stored_t* row, const acc_t* q, int size) {
  acc_t sum = 0;
  for (int d = 0; d < size; ++d) sum += element<acc_t>(row + d) * q[d];
  return sum;
}
template <typename stored_t, typename acc_t>
inline void add_row(const stored_t* row, acc_t factor, acc_t* out, int size) {
  for (int d = 0; d < size; ++d) out[d] += factor * element<acc_t>(row + d);
}

template <typename scalar_t>
void store_codes(const scalar_t* row, int size, int8_t* to, float* scale) {
  using acc_t = Computed<scalar_t>;
  acc_t largest = 0;
  bool number = true;
  for (int d = 0; d < size; ++d) {
    const acc_t x = element<acc_t>(row + d), magnitude = x < 0 ? -x : x;
    number = number && x == x;
    largest = magnitude > largest ? magnitude : largest;
  }
  *scale = number ? static_cast<float>(largest) / kMaxCode : NAN;
  const bool codes = *scale > 0 && *scale < INFINITY;
  for (int d = 0; d < size; ++d) {
    to[d] = codes ? static_cast<int8_t>(__builtin_rint(element<acc_t>(row + d) / *scale)) : 0;
  }
}

template <typename scalar_t, typename stored_t>
void run_typed(const DecodeAttentionParams& p, int32_t slot, void* workspace, int64_t task_begin,
               int64_t task_end) {
  using acc_t = Computed<scalar_t>;
  constexpr bool kCoded = std::is_same_v<stored_t, int8_t>;
  const int size = p.head_size, text = p.rule.text_len;
  acc_t* q = static_cast<acc_t*>(workspace);
  acc_t *out = q + kMaxHeadSize, *scores = out + kMaxHeadSize;
  const int32_t place = decode_place(p.rule, slot);
  for (int64_t task = task_begin; task < task_end; ++task) {
    const int64_t b = task / p.samples / p.heads, h = task / p.samples % p.heads;
    const int64_t s = task % p.samples;
    auto row_of = [&](const DecodeRows& rows) {
      return static_cast<scalar_t*>(rows.data) + b * rows.batch + s * rows.sample + h * rows.head;
    };
    const int64_t head = ((b * p.samples + s) * p.heads + h) * p.capacity;
    stored_t* keys = static_cast<stored_t*>(p.image_keys) + head * size;
    stored_t* values = static_cast<stored_t*>(p.image_values) + head * size;
    const float *key_scales = p.key_scales + head, *value_scales = p.value_scales + head;
    if constexpr (kCoded) {
      store_codes(row_of(p.k), size, keys + place * size, p.key_scales + head + place);
      store_codes(row_of(p.v), size, values + place * size, p.value_scales + head + place);
    } else {
      std::memcpy(keys + int64_t{place} * size, row_of(p.k), sizeof(scalar_t) * size);
      std::memcpy(values + int64_t{place} * size, row_of(p.v), sizeof(scalar_t) * size);
    }
    const auto text_of = [&](const void* data) {
      return static_cast<const scalar_t*>(data) + (b * p.heads + h) * text * size;
    };
    const acc_t factor = static_cast<acc_t>(p.scale * kLog2E);
    for (int d = 0; d < size; ++d) q[d] = element<acc_t>(row_of(p.q) + d);
    int64_t count = 0;
    acc_t largest = -INFINITY;
    const auto add_score = [&](acc_t score) {
      scores[count++] = score;
      largest = largest < score ? score : largest;
    };
    for (int t = 0; t < text; ++t) {
      add_score(factor * dot(text_of(p.text_keys) + int64_t{t} * size, q, size));
    }
    const int ranges = decode_num_ranges(p.rule);
    for (int i = 0; i < ranges; ++i) {
      const DecodeRange range = decode_range(p.rule, slot, i);
      for (int64_t c = range.begin; c < range.end; ++c) {
        const acc_t once = kCoded ? factor * key_scales[c] : factor;
        add_score(once * dot(keys + c * size, q, size));
      }
    }
    acc_t sum = 0;
    std::memset(out, 0, sizeof(acc_t) * size);
    count = 0;
    const auto weight = [&] {
      const acc_t w = exp2_of<acc_t>(splat<acc_t>(scores[count++] - largest))[0];
      sum += w;
      return w;
    };
    for (int t = 0; t < text; ++t) {
      add_row(text_of(p.text_values) + int64_t{t} * size, weight(), out, size);
    }
    for (int i = 0; i < ranges; ++i) {
      const DecodeRange range = decode_range(p.rule, slot, i);
      for (int64_t c = range.begin; c < range.end; ++c) {
        acc_t w = weight();
        if (kCoded) w *= value_scales[c];
        add_row(values + c * size, w, out, size);
      }
    }
    for (int d = 0; d < size; ++d) {
      store_some(row_of(p.out) + d, 1, splat<acc_t>(out[d] / sum));
    }
  }
}

void run(const DecodeAttentionParams& p, int32_t slot, void* workspace, int64_t task_begin,
         int64_t task_end) {
  const auto body = [&](auto scalar) {
    using scalar_t = decltype(scalar);
    if (p.coded) {
      run_typed<scalar_t, int8_t>(p, slot, workspace, task_begin, task_end);
    } else {
      run_typed<scalar_t, scalar_t>(p, slot, workspace, task_begin, task_end);
    }
  };
  if (p.type == ElementKind::kDouble) {
    body(double());
  } else {
    with_scalar(p.type, body);
  }
}

size_t workspace_bytes(const DecodeAttentionParams& p) {
  return sizeof(double) * (2 * kMaxHeadSize + p.rule.text_len + decode_most_keys(p.rule));
}

}  // namespace

const DecodeAttentionCpu decode_attention_cpu = {kSamples, workspace_bytes, run};

}  // namespace dalle::DALLE_ISA_NAMESPACE

#endif  // DALLE_ISA
