// The CPU kernel of decode attention: what it offers (always) and, once per instruction set, how it
// does it (under DALLE_ISA). No torch here.
//
// A task is one head of some samples of a caption: the text is a product for all of them at once,
// the image slots stream by sample. A sample's bits do not depend on what else is in its task.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/isa.h"
#include "decode_attention/decode_attention.h"

namespace dalle {

struct DecodeAttentionCpu {
  int32_t (*task_samples)(ElementKind);  // of a task, at most
  size_t (*workspace_bytes)(const DecodeAttentionParams&);
  // Tasks (b * H + h) * ceil(S / task_samples) + tile. `workspace`: a thread's own, aligned to 64
  // bytes.
  void (*run)(const DecodeAttentionParams&, int32_t slot, void* workspace, int64_t task_begin,
              int64_t task_end);
};

DALLE_FOR_EACH_ISA(DecodeAttentionCpu, decode_attention_cpu)

}  // namespace dalle

#ifdef DALLE_ISA

#include "decode_attention/decode_attention_cpu_image.h"
#include "decode_attention/decode_attention_cpu_text.h"

namespace dalle::DALLE_ISA_NAMESPACE {
namespace {

template <typename storage_t, typename operand_t>
struct Decode {
  using acc_t = Sum<operand_t>;
  const DecodeAttentionParams& p;
  int32_t slot;
  HeadSize<operand_t> size;
  DecodeSpace<operand_t> space;
  int num_places = 0;

  Decode(const DecodeAttentionParams& p, int32_t slot, Carver carver)
      : p(p), slot(slot), size(p.head_size), space(carver, size, decode_most_keys(p.rule)) {
    for (int i = 0; i < decode_num_ranges(p.rule); ++i) {
      const DecodeRange range = decode_range(p.rule, slot, i);
      for (int32_t c = range.begin; c < range.end; ++c) space.places[num_places++] = c;
    }
  }

  storage_t* row_of(const DecodeRows& rows, int64_t b, int64_t s, int64_t h) const {
    return static_cast<storage_t*>(rows.data) + b * rows.batch + s * rows.sample + h * rows.head;
  }

  // Writes the new slot of sample s, then attends to its slots; r: its place in the task.
  template <typename stored_t>
  void attend_slots(int64_t b, int64_t s, int64_t h, int r, acc_t factor) {
    const int64_t head = ((b * p.samples + s) * p.heads + h) * p.capacity;
    const int64_t place = decode_place(p.rule, slot);
    stored_t* keys = static_cast<stored_t*>(p.image_keys) + head * p.head_size;
    stored_t* values = static_cast<stored_t*>(p.image_values) + head * p.head_size;
    SampleSlots<stored_t> slots = {keys, values, nullptr, nullptr,
                                   int64_t{p.heads} * p.capacity * p.head_size};
    const storage_t *k = row_of(p.k, b, s, h), *v = row_of(p.v, b, s, h);
    keys += place * p.head_size, values += place * p.head_size;
    if constexpr (std::is_same_v<stored_t, int8_t>) {
      slots.key_scales = p.key_scales + head, slots.value_scales = p.value_scales + head;
      store_coded(k, p.head_size, keys, p.key_scales + head + place);
      store_coded(v, p.head_size, values, p.value_scales + head + place);
    } else {
      std::memcpy(keys, k, sizeof(storage_t) * p.head_size);
      std::memcpy(values, v, sizeof(storage_t) * p.head_size);
    }
    gather_row(row_of(p.q, b, s, h), p.head_size, size.padded, space.q_image);
    if (size.padded == size.size) {
      attend_image<true>(slots, num_places, r, size, factor, space);
    } else {
      attend_image<false>(slots, num_places, r, size, factor, space);
    }
  }

  void run(int64_t task_begin, int64_t task_end) {
    constexpr int kWidth = Lanes<acc_t>::kWidth;
    const acc_t factor = static_cast<acc_t>(p.scale * kLog2E);
    const int64_t tiles = ceil_div(p.samples, kSamples<acc_t>);
    for (int64_t task = task_begin; task < task_end; ++task) {
      const int64_t b = task / tiles / p.heads, h = task / tiles % p.heads;
      const int64_t first = task % tiles * kSamples<acc_t>;
      const int64_t left = p.samples - first;
      const int samples = left < kSamples<acc_t> ? static_cast<int>(left) : kSamples<acc_t>;
      for (int r = 0; r < samples; ++r) {
        gather_row(row_of(p.q, b, first + r, h), size.size, size.words, space.q + r * size.words);
      }
      std::memset(space.q + samples * size.words, 0,
                  sizeof(operand_t) * (kSamples<acc_t> - samples) * size.words);
      space.start(size.padded);
      const int64_t text = (b * p.heads + h) * p.rule.text_len * p.head_size;
      attend_text(static_cast<const storage_t*>(p.text_keys) + text,
                  static_cast<const storage_t*>(p.text_values) + text, p.rule.text_len, samples,
                  size, factor, space);
      for (int r = 0; r < samples; ++r) {
        if (p.coded) {
          attend_slots<int8_t>(b, first + r, h, r, factor);
        } else {
          attend_slots<storage_t>(b, first + r, h, r, factor);
        }
        const acc_t inverse = 1 / space.l[r], *from = space.out + r * size.padded;
        storage_t* out = row_of(p.out, b, first + r, h);
        for (int d = 0; d < size.size; d += kWidth) {
          const int some = size.size - d < kWidth ? size.size - d : kWidth;
          store_up_to(out + d, some, inverse * load(from + d));
        }
      }
    }
  }
};

void run(const DecodeAttentionParams& p, int32_t slot, void* workspace, int64_t task_begin,
         int64_t task_end) {
  for_type(p.type, [&](auto storage, auto operand) {
    const Carver carver{static_cast<char*>(workspace)};
    Decode<decltype(storage), decltype(operand)>(p, slot, carver).run(task_begin, task_end);
  });
}

size_t workspace_bytes(const DecodeAttentionParams& p) {
  Carver carver{nullptr};
  for_type(p.type, [&](auto, auto operand) {
    using operand_t = decltype(operand);
    DecodeSpace<operand_t>(carver, HeadSize<operand_t>(p.head_size), decode_most_keys(p.rule));
  });
  return carver.used;
}

int32_t task_samples(ElementKind type) {
  int32_t samples = 1;
  for_type(type, [&](auto, auto operand) { samples = kSamples<Sum<decltype(operand)>>; });
  return samples;
}

}  // namespace

const DecodeAttentionCpu decode_attention_cpu = {task_samples, workspace_bytes, run};

}  // namespace dalle::DALLE_ISA_NAMESPACE

#endif  // DALLE_ISA
