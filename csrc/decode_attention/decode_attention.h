// The rules of decode attention that host and device share: where the cache of a pattern keeps an
// image slot, which places a slot reads, the 8-bit form. No torch here.
//
// Letters: B captions, S samples of each, H heads, D head size, T text positions, N = rows *
// columns image slots in raster order, C slots that the cache holds. The query at slot p sees all
// text, and the image slots p - o for every offset o <= p of the pattern, itself (o = 0) included.
//
// Three ways to store, by the pattern's kind:
//   causal   all N slots in raster order
//   column   all N slots column by column, so that the keys of a query are neighbours
//   others   a ring: slot p lies at p % C, C one more than the largest offset (row: columns + 1)
//
// Image keys and values are (B, S, H, C, D), text keys and values (B, H, T, D), each contiguous.
#pragma once

#include "common/host_device.h"
#include "sparse_attention/sparse_attention.h"

namespace dalle {

constexpr float kMaxCode = 127.0f;  // of the 8-bit form: code = round(x / scale), ties to even

// A (B, S, H, D) tensor with contiguous D; strides in elements.
struct DecodeRows {
  void* data;
  int64_t batch, sample, head;
};

// Everything a kernel needs. `slot` lies on the device of the tensors. The kernel writes k and v of
// the slot into the cache before it reads from there, and out (contiguous).
struct DecodeAttentionParams {
  AttentionRule rule;
  int32_t capacity;  // C
  ElementKind type;  // kFloat, kDouble, kHalf or kBFloat16, of all but codes and scales
  bool coded;        // image_keys and image_values are int8 codes, with one scale a slot and head
  int32_t batch, samples, heads, head_size;
  double scale;  // factor on q k^T
  const int64_t* slot;
  DecodeRows q, k, v, out;
  const void *text_keys, *text_values;
  void *image_keys, *image_values;
  float *key_scales, *value_scales;  // (B, S, H, C), where coded
};

// C.
DALLE_HOST_DEVICE int32_t decode_capacity(const AttentionRule& rule) {
  const int32_t slots = rule.rows * rule.columns;
  int32_t reach = slots;
  switch (rule.kind) {
    case AttentionKind::kRow:
      reach = rule.columns + 1;
      break;
    case AttentionKind::kOffsets:
      reach = end_of_runs(rule);
      break;
    case AttentionKind::kColumn:
    case AttentionKind::kCausal:
      break;
  }
  return reach < slots ? reach : slots;
}

// Where the cache keeps an image slot.
DALLE_HOST_DEVICE int32_t decode_place(const AttentionRule& rule, int32_t slot) {
  switch (rule.kind) {
    case AttentionKind::kColumn:
      return slot % rule.columns * rule.rows + slot / rule.columns;
    case AttentionKind::kCausal:
      return slot;
    case AttentionKind::kRow:
    case AttentionKind::kOffsets:
      break;
  }
  return slot % decode_capacity(rule);
}

// Places [begin, end) of the cache; empty where end <= begin.
struct DecodeRange {
  int32_t begin, end;
};

// How many ranges a query reads: one, or two for each run of offsets, whose keys may go over the
// end of the ring.
DALLE_HOST_DEVICE int32_t decode_num_ranges(const AttentionRule& rule) {
  return reads_runs(rule.kind) ? 2 * rule.num_runs : 1;
}

// Range `index` of what the query at `slot` reads. The ranges of a slot are disjoint and hold each
// visible key once.
DALLE_HOST_DEVICE DecodeRange decode_range(const AttentionRule& rule, int32_t slot, int32_t index) {
  switch (rule.kind) {
    case AttentionKind::kColumn: {
      const int32_t first = slot % rule.columns * rule.rows;
      return {first, first + slot / rule.columns + 1};
    }
    case AttentionKind::kRow:  // all that the ring holds
    case AttentionKind::kCausal: {
      const int32_t capacity = decode_capacity(rule);
      return {0, slot + 1 < capacity ? slot + 1 : capacity};
    }
    case AttentionKind::kOffsets:
      break;
  }
  const int32_t capacity = decode_capacity(rule), begin = rule.runs[index / 2 * 2];
  int32_t end = rule.runs[index / 2 * 2 + 1];
  end = end < slot + 1 ? end : slot + 1;  // offsets [begin, end)
  if (end <= begin) return {0, 0};
  const int32_t first = (slot - end + 1) % capacity, last = first + end - begin;
  if (index % 2 == 0) return {first, last < capacity ? last : capacity};
  return {0, last - capacity};
}

// Most keys that a query reads beside the text.
DALLE_HOST_DEVICE int32_t decode_most_keys(const AttentionRule& rule) {
  return rule.kind == AttentionKind::kColumn ? rule.rows : decode_capacity(rule);
}

}  // namespace dalle
