// How the work of decode attention on CUDA is cut, and how it is assigned to blocks. The cut into
// chunks hangs on the pattern alone and decides every bit of a result; the schedule hangs on the
// batch and the device and decides none. No CUDA and no torch here. The times are predicted from
// byte counts; none is measured on a GPU.
//
// Letters: see decode_attention.h. A tile is 16 samples of one caption and head.
#pragma once

#include <algorithm>
#include <cmath>

#include "common/device_limits.h"
#include "decode_attention/decode_attention.h"

namespace dalle {

constexpr int kTileSamples = 16;    // the rows of mma.m16n8k16
constexpr int kTextChunks = 8;      // parts of the text, one a warp
constexpr int kMaxImageChunks = 8;  // parts of a sample's image keys
constexpr int kChunkKeys = 72;      // of the image, for each of them

// The most image keys of a query.
DALLE_HOST_DEVICE int32_t most_image_keys(const AttentionRule& rule) {
  if (!reads_runs(rule.kind)) return decode_most_keys(rule);
  int32_t keys = 0;
  for (int32_t i = 0; i < rule.num_runs; ++i) keys += rule.runs[2 * i + 1] - rule.runs[2 * i];
  return keys;
}

// Parts of the image keys of a sample. Row, column and conv patterns of 32 x 32 have one.
DALLE_HOST_DEVICE int32_t image_chunks(const AttentionRule& rule) {
  const int64_t chunks = ceil_div(most_image_keys(rule), kChunkKeys);
  return static_cast<int32_t>(chunks < kMaxImageChunks ? chunks : kMaxImageChunks);
}

struct DecodeShape {
  int64_t heads;       // B * H
  int64_t samples;     // S
  double text_bytes;   // keys and values of a head
  double image_bytes;  // keys and values of a sample and head, in the mean over the slots
  int32_t chunks;      // of them
};

struct DecodePlan {
  int32_t tiles = 1;   // of a block, one after another: they share the text
  int32_t splits = 1;  // blocks of a tile, each with some chunks; a second kernel adds them up
  double microseconds = HUGE_VAL;
};

// What a multiprocessor can take from L2, and its share of the memory, in bytes a microsecond; the
// time in which a tile waits for its first bytes and for its slowest warp; that of a second kernel.
constexpr double kBytesFromL2 = 45e3, kBytesFromMemory = 32e3, kTileWaits = 1.5, kSecondKernel = 2;

inline double decode_microseconds(const DecodeShape& shape, const DecodePlan& plan,
                                  const DeviceLimits& device) {
  const double heads = static_cast<double>(shape.heads);
  const double samples = static_cast<double>(shape.samples);
  const int64_t tiles = ceil_div(shape.samples, kTileSamples);
  const int64_t blocks = shape.heads * ceil_div(tiles, plan.tiles) * plan.splits;
  const int64_t side_by_side = blocks > device.multiprocessors ? 2 : 1;
  const double rounds =
      static_cast<double>(ceil_div(blocks, side_by_side * device.multiprocessors));
  const double most = static_cast<double>(
      std::min<int64_t>(shape.samples, int64_t{plan.tiles} * kTileSamples));  // of a block
  const double chunks = static_cast<double>(ceil_div(shape.chunks, plan.splits));
  const double bytes =
      shape.text_bytes / plan.splits + most * shape.image_bytes * chunks / shape.chunks;
  const double from_l2 = rounds * static_cast<double>(side_by_side) * bytes / kBytesFromL2;
  const double from_memory = heads * (shape.text_bytes + samples * shape.image_bytes) /
                             (static_cast<double>(device.multiprocessors) * kBytesFromMemory);
  const double waits = rounds * plan.tiles * kTileWaits / static_cast<double>(side_by_side);
  return std::max(from_l2, from_memory) + waits + (plan.splits > 1 ? kSecondKernel : 0);
}

// The plan that is predicted to end first: of several tiles a block, or of several blocks a tile.
inline DecodePlan plan_decode(const DecodeShape& shape, const DeviceLimits& device) {
  DecodePlan best;
  const auto consider = [&](int32_t tiles, int32_t splits) {
    DecodePlan plan = {tiles, splits};
    plan.microseconds = decode_microseconds(shape, plan, device);
    if (plan.microseconds < 0.99 * best.microseconds) best = plan;
  };
  const int64_t tiles = ceil_div(shape.samples, kTileSamples);
  for (int32_t n = 1; n == 1 || (n < 2 * tiles && n <= 16); n *= 2) consider(n, 1);
  for (int32_t n = 2; n <= kTextChunks; n *= 2) consider(1, n);
  return best;
}

// Image keys of a query, in the mean over the slots where their number grows with the slot.
inline double mean_image_keys(const AttentionRule& rule) {
  switch (rule.kind) {
    case AttentionKind::kColumn:
    case AttentionKind::kCausal:
      return (most_image_keys(rule) + 1) / 2.0;
    case AttentionKind::kRow:
    case AttentionKind::kOffsets:
      break;
  }
  return most_image_keys(rule);
}

inline DecodeShape decode_shape(const DecodeAttentionParams& p, int64_t element_bytes) {
  const double row = static_cast<double>(p.head_size) * static_cast<double>(element_bytes);
  const double stored = p.coded ? p.head_size + 4.0 : row;
  return {int64_t{p.batch} * p.heads, p.samples, 2 * p.rule.text_len * row,
          2 * mean_image_keys(p.rule) * stored, image_chunks(p.rule)};
}

}  // namespace dalle
