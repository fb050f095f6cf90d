// The CPU kernel of decode attention: what it offers (always) and, once per instruction set, how it
// does it (under DALLE_ISA). No torch here.
//
// A task is one head of some samples of a caption. Their text is one product; their slots are read
// sample by sample, all heads of a thread in one stream. Each is a softmax of its own, the two are
// merged at last, so that a sample's bits depend neither on the order nor on what else is there.
#pragma once

#include <algorithm>
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
  acc_t factor;

  Decode(const DecodeAttentionParams& p, int32_t slot, Carver carver)
      : p(p),
        slot(slot),
        size(p.head_size),
        space(carver, size, p),
        factor(static_cast<acc_t>(p.scale * kLog2E)) {
    space.find_pieces(p.rule, slot);
  }

  storage_t* row_of(const DecodeRows& rows, int64_t b, int64_t s, int64_t h) const {
    return static_cast<storage_t*>(rows.data) + b * rows.batch + s * rows.sample + h * rows.head;
  }

  // Writes the new slot of sample s, then attends to its slots.
  template <typename stored_t>
  void attend_slots(int64_t b, int64_t s, int64_t h, const Sums<acc_t>& image) {
    const int64_t head = ((b * p.samples + s) * p.heads + h) * p.capacity;
    const int64_t place = decode_place(p.rule, slot);
    stored_t* keys = static_cast<stored_t*>(p.image_keys) + head * p.head_size;
    stored_t* values = static_cast<stored_t*>(p.image_values) + head * p.head_size;
    // Where all slots up to this one are read, heads are one stream. Else most of what follows a
    // row is not read, and the next head's row is prefetched.
    const bool stream = p.rule.kind == AttentionKind::kRow || p.rule.kind == AttentionKind::kCausal;
    const int64_t ahead = stream ? kAheadBytes / static_cast<int64_t>(sizeof(stored_t))
                                 : int64_t{p.capacity} * p.head_size;
    SampleSlots<stored_t> slots = {keys, values, nullptr, nullptr, ahead};
    const storage_t *k = row_of(p.k, b, s, h), *v = row_of(p.v, b, s, h);
    keys += place * p.head_size, values += place * p.head_size;
    if constexpr (std::is_same_v<stored_t, int8_t>) {
      slots.key_scales = p.key_scales + head, slots.value_scales = p.value_scales + head;
      store_coded(k, p.head_size, keys, p.key_scales + head + place);
      store_coded(v, p.head_size, values, p.value_scales + head + place);
    } else {
      copy_row(k, p.head_size, keys);
      copy_row(v, p.head_size, values);
    }
    gather_row(row_of(p.q, b, s, h), p.head_size, size.padded, space.q_image);
    const auto attend = [&](auto channels) {
      attend_image(slots, channels, size, factor, space, image);
    };
    if (size.size == 64) {  // the paper's
      attend(Channels<64, true>{});
    } else if (size.padded == size.size) {
      attend(Channels<0, true>{size.size});
    } else {
      attend(Channels<0, false>{size.size});
    }
  }
  void attend_slots(int64_t b, int64_t s, int64_t h, const Sums<acc_t>& image) {
    if (p.coded) {
      attend_slots<int8_t>(b, s, h, image);
    } else {
      attend_slots<storage_t>(b, s, h, image);
    }
  }

  void attend_text_of(int64_t b, int64_t first, int samples, int64_t h, const Sums<acc_t>& text) {
    for (int r = 0; r < samples; ++r) {
      gather_row(row_of(p.q, b, first + r, h), size.size, size.words, space.q + r * size.words);
    }
    std::memset(space.q + samples * size.words, 0,
                sizeof(operand_t) * (kSamples<acc_t> - samples) * size.words);
    const int64_t at = (b * p.heads + h) * p.rule.text_len * p.head_size;
    attend_text(static_cast<const storage_t*>(p.text_keys) + at,
                static_cast<const storage_t*>(p.text_values) + at, p.rule.text_len, samples, size,
                factor, space, text);
  }

  // Heads [begin, end), kHeads at most, of kTiles * kSamples samples of caption b at most. The text
  // goes head by head, whose keys samples share; the slots go sample by sample, whose heads lie
  // side by side.
  void attend(int64_t b, int64_t first, int samples, int64_t begin, int64_t end, bool text_first) {
    const Sums<acc_t>& now = space.now;
    const auto text = [&](int64_t h, const auto& use) {
      for (int tile = 0; tile < samples; tile += kSamples<acc_t>) {
        const int some = std::min(samples - tile, kSamples<acc_t>);
        attend_text_of(b, first + tile, some, h, now);
        for (int r = 0; r < some; ++r) use(now.row(r, size.padded), tile + r, h);
      }
    };
    const auto slots = [&](int r, int64_t h, const Sums<acc_t>& image) {
      attend_slots(b, first + r, h, image);
    };
    const auto kept = [&](int r, int64_t h) {
      return space.kept.row(r * kHeads + (h - begin), size.padded);
    };
    const auto finish = [&](const Sums<acc_t>& text, const Sums<acc_t>& image, int r, int64_t h) {
      merge(text, image, size.size, row_of(p.out, b, first + r, h));
    };
    if (text_first) {
      for (int64_t h = begin; h < end; ++h) {
        text(h,
             [&](const Sums<acc_t>& row, int r, int64_t h) { keep(row, size.padded, kept(r, h)); });
      }
      for (int r = 0; r < samples; ++r) {
        for (int64_t h = begin; h < end; ++h) {
          slots(r, h, now);
          finish(kept(r, h), now, r, h);
        }
      }
    } else {
      for (int r = 0; r < samples; ++r) {
        for (int64_t h = begin; h < end; ++h) slots(r, h, kept(r, h));
      }
      for (int64_t h = begin; h < end; ++h) {
        text(h, [&](const Sums<acc_t>& row, int r, int64_t h) { finish(row, kept(r, h), r, h); });
      }
    }
  }

  void run(int64_t task_begin, int64_t task_end) {
    // Text is bound by arithmetic, slots by memory: every other thread begins with the slots.
    const bool text_first = task_begin / (task_end - task_begin) % 2 == 0;
    const int64_t tiles = ceil_div(p.samples, kSamples<acc_t>), of_caption = tiles * p.heads;
    for (int64_t b = task_begin / of_caption; b * of_caption < task_end; ++b) {
      // Heads of a tile whose task (b * H + h) * tiles + tile is below a bound.
      const auto heads = [&](int64_t tile, int64_t bound) {
        const int64_t before = bound - b * of_caption - tile;
        return before <= 0 ? 0 : std::min<int64_t>(ceil_div(before, tiles), p.heads);
      };
      for (int64_t tile = 0, some; tile < tiles; tile += some) {
        const int64_t begin = heads(tile, task_begin), end = heads(tile, task_end);
        some = 1;
        while (some < kTiles && tile + some < tiles && heads(tile + some, task_begin) == begin &&
               heads(tile + some, task_end) == end) {
          ++some;
        }
        const int64_t first = tile * kSamples<acc_t>;
        const int64_t samples = std::min<int64_t>(p.samples - first, some * kSamples<acc_t>);
        for (int64_t h = begin; h < end; h += kHeads) {
          attend(b, first, static_cast<int>(samples), h, std::min<int64_t>(end, h + kHeads),
                 text_first);
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
    DecodeSpace<operand_t>(carver, HeadSize<operand_t>(p.head_size), p);
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
