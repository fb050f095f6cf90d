// Forward: online softmax over chunks of tiles. Included by sparse_attention_cpu.h only.
#pragma once

#include "sparse_attention/sparse_attention_cpu_pack.h"

namespace dalle::DALLE_ISA_NAMESPACE {
namespace {

constexpr int kChunkTiles = 2;  // tiles between two looks at the running maximum
constexpr int kChunk = kChunkTiles * kTile;
constexpr int kMostDepth = 128;  // products added up before they meet another sum
constexpr double kLog2E = 1.4426950408889634;

// Packed keys and values of the head at work; panels are made when first needed.
template <typename acc_t>
struct ForwardSpace {
  acc_t *keys, *values, *rows, *q, *scores, *out, *largest, *now, *rescale;
  Vec<acc_t>* total;
  uint8_t* ready;

  ForwardSpace(Carver& carver, int num_strips, int padded) {
    const size_t panel = static_cast<size_t>(kTile) * padded;
    keys = carver.take<acc_t>(panel * num_strips);    // [panel][D][32]
    values = carver.take<acc_t>(panel * num_strips);  // [panel][32][D]
    rows = carver.take<acc_t>(panel);
    q = carver.take<acc_t>(panel);                // [D][32], times scale * log2(e)
    out = carver.take<acc_t>(panel);              // [32][D]
    scores = carver.take<acc_t>(kTile * kChunk);  // [32][chunk]
    largest = carver.take<acc_t>(kTile);
    now = carver.take<acc_t>(kTile);
    rescale = carver.take<acc_t>(kTile);
    total = carver.take<Vec<acc_t>>(kTile);
    ready = carver.take<uint8_t>(num_strips);
  }
};

// to[32][32 of kLead] = the product of a transposed strip [depth][32] and a transposed panel
// [depth][32].
template <typename acc_t, int kLead>
inline void strip_by_panel(const acc_t* strip, const acc_t* panel, int depth, int num_rows,
                           acc_t* to) {
  constexpr int kBlock = kMicroVectors * Lanes<acc_t>::kWidth;
  for (int c = 0; c < kTile; c += kBlock) {
    for (int r = 0; r < num_rows; r += kMicroRows) {
      // Two shorter sums round less than one long one.
      for (int d = 0; d < depth; d += kMostDepth) {
        const int step = depth - d < kMostDepth ? depth - d : kMostDepth;
        Vec<acc_t> sum[kMicroRows][kMicroVectors] = {}, before[kMicroRows][kMicroVectors];
        micro_tile<acc_t, kMicroVectors, 1, kTile>(strip + d * kTile + r, panel + d * kTile + c,
                                                   kTile, step, sum);
        if (d > 0) {
          load_tile<acc_t, kMicroVectors>(to + r * kLead + c, kLead, nullptr, before);
          for (int i = 0; i < kMicroRows; ++i) {
            for (int j = 0; j < kMicroVectors; ++j) sum[i][j] += before[i][j];
          }
        }
        store_tile<acc_t, kMicroVectors>(to + r * kLead + c, kLead, sum);
      }
    }
  }
}

// Masks one row of scores in place and returns the lanewise maximum of it and `largest`.
template <typename acc_t>
inline Vec<acc_t> mask_and_max(acc_t* scores, const AttentionTile* tiles, int num_tiles,
                               const AttentionTileMask* masks, int row) {
  constexpr int kWidth = Lanes<acc_t>::kWidth;
  const Vec<acc_t> minus_infinity = splat<acc_t>(-INFINITY);
  Vec<acc_t> largest = minus_infinity;
  for (int t = 0; t < num_tiles; ++t, scores += kTile) {
    if (tiles[t].mask >= 0) {
      const uint32_t bits = masks[tiles[t].mask].rows[row];
#pragma GCC unroll 16
      for (int c = 0; c < kTile; c += kWidth) {
        const Vec<acc_t> s = lanes_of<acc_t>(bits, c) ? load(scores + c) : minus_infinity;
        store<acc_t>(scores + c, s);
        largest = s > largest ? s : largest;
      }
    } else {
#pragma GCC unroll 16
      for (int c = 0; c < kTile; c += kWidth) {
        const Vec<acc_t> s = load(scores + c);
        largest = s > largest ? s : largest;
      }
    }
  }
  return largest;
}

// Turns the scores of one chunk into 2^(score - running maximum) and updates the running sums.
template <typename acc_t>
inline void softmax_chunk(ForwardSpace<acc_t>& space, const AttentionTile* tiles, int num_tiles,
                          const AttentionTileMask* masks, int num_rows) {
  constexpr int kWidth = Lanes<acc_t>::kWidth;
  for (int r = 0; r < num_rows; ++r) {
    acc_t* scores = space.scores + r * kChunk;
    space.now[r] = max_of<acc_t>(mask_and_max(scores, tiles, num_tiles, masks, r));
  }
  const Vec<acc_t> minus_infinity = splat<acc_t>(-INFINITY);
  for (int r = 0; r < num_rows; r += kWidth) {
    const Vec<acc_t> before = load(space.largest + r), chunk = load(space.now + r);
    const Vec<acc_t> now = chunk > before ? chunk : before;
    // A row that has seen no key yet has no maximum; 0 keeps -inf - (-inf) away.
    const Vec<acc_t> origin = now == minus_infinity ? Vec<acc_t>{} : now;
    store<acc_t>(space.rescale + r, exp2_vector<acc_t>(before - origin));
    store<acc_t>(space.largest + r, now);
    store<acc_t>(space.now + r, origin);
  }
  for (int r = 0; r < num_rows; ++r) {
    acc_t* scores = space.scores + r * kChunk;
    const acc_t origin = space.now[r];
    Vec<acc_t> total = space.total[r] * space.rescale[r];
    for (int c = 0; c < num_tiles * kTile; c += kWidth) {
      const Vec<acc_t> p = exp2_vector<acc_t>(load(scores + c) - origin);
      store<acc_t>(scores + c, p);
      total += p;
    }
    space.total[r] = total;
  }
}

// out = rescale * out + probabilities * values, for one block of kVectors vectors of the head.
template <typename acc_t, int kVectors>
inline void weigh_values(ForwardSpace<acc_t>& space, const AttentionTile* tiles, int num_tiles,
                         int num_rows, int padded, int d) {
  for (int r = 0; r < num_rows; r += kMicroRows) {
    Vec<acc_t> sum[kMicroRows][kVectors];
    load_tile<acc_t, kVectors>(space.out + r * padded + d, padded, space.rescale + r, sum);
    for (int t = 0; t < num_tiles; ++t) {
      const acc_t* values =
          space.values + static_cast<int64_t>(tiles[t].panel) * kTile * padded + d;
      micro_tile<acc_t, kVectors, kChunk, 1>(space.scores + r * kChunk + t * kTile, values, padded,
                                             kTile, sum);
    }
    store_tile<acc_t, kVectors>(space.out + r * padded + d, padded, sum);
  }
}

template <typename storage_t, typename acc_t>
void forward_typed(const SparseAttentionParams& p, const AttentionTileView& view, void* workspace,
                   int64_t task_begin, int64_t task_end) {
  constexpr int kWidth = Lanes<acc_t>::kWidth;
  const int padded = padded_size<acc_t>(p.head_size);
  Carver carver{static_cast<char*>(workspace)};
  ForwardSpace<acc_t> space(carver, view.num_strips, padded);
  int64_t packed_head = -1;
  for (int64_t task = task_begin; task < task_end; ++task) {
    const int64_t head = task / view.num_strips;
    const int strip = static_cast<int>(task % view.num_strips);
    if (head != packed_head) std::memset(space.ready, 0, view.num_strips);
    packed_head = head;

    const int count = places_of(strip, p.length);
    const int num_rows = (count + kMicroRows - 1) / kMicroRows * kMicroRows;
    const int32_t* position = view.position + strip * kTile;
    gather_strip<storage_t>(p, view, p.q, head, strip, padded, space.rows);
    transpose_panel<acc_t>(space.rows, static_cast<acc_t>(p.scale * kLog2E), padded, space.q);
    std::memset(space.out, 0, sizeof(acc_t) * kTile * padded);
    for (int r = 0; r < kTile; ++r) {
      space.largest[r] = -INFINITY;
      space.total[r] = Vec<acc_t>{};
    }

    const AttentionTile* tiles = view.tiles + view.strip_begin[strip];
    const int num_tiles = view.strip_begin[strip + 1] - view.strip_begin[strip];
    for (int first = 0; first < num_tiles; first += kChunkTiles) {
      const int chunk = num_tiles - first < kChunkTiles ? num_tiles - first : kChunkTiles;
      for (int t = 0; t < chunk; ++t) {
        const int panel = tiles[first + t].panel;
        const int64_t offset = static_cast<int64_t>(panel) * kTile * padded;
        if (!space.ready[panel]) {
          gather_strip<storage_t>(p, view, p.k, head, panel, padded, space.rows);
          transpose_panel<acc_t>(space.rows, 1, padded, space.keys + offset);
          gather_strip<storage_t>(p, view, p.v, head, panel, padded, space.values + offset);
          space.ready[panel] = 1;
        }
        strip_by_panel<acc_t, kChunk>(space.q, space.keys + offset, p.head_size, num_rows,
                                      space.scores + t * kTile);
      }
      softmax_chunk(space, tiles + first, chunk, view.masks, num_rows);
      int d = 0;
      for (; d + kMicroVectors * kWidth <= padded; d += kMicroVectors * kWidth) {
        weigh_values<acc_t, kMicroVectors>(space, tiles + first, chunk, num_rows, padded, d);
      }
      if (d < padded) weigh_values<acc_t, 1>(space, tiles + first, chunk, num_rows, padded, d);
    }

    storage_t* out = head_of<storage_t>(p.out, head, p.heads);
    double* lse = p.lse + head * p.length;
    for (int r = 0; r < count; ++r) {
      const acc_t total = sum_of<acc_t>(space.total[r]);
      scatter_rows<storage_t, acc_t>(space.out + r * padded, 1 / total, padded, position + r, 1,
                                     p.head_size, out, p.out.row);
      lse[position[r]] = space.largest[r] / kLog2E + __builtin_log(total);
    }
  }
}

void forward(const SparseAttentionParams& p, const AttentionTileView& view, void* workspace,
             int64_t task_begin, int64_t task_end) {
  for_type(p.type, [&](auto storage, auto acc) {
    forward_typed<decltype(storage), decltype(acc)>(p, view, workspace, task_begin, task_end);
  });
}

size_t forward_bytes(const SparseAttentionParams& p, const AttentionTileView& view) {
  return bytes_of<ForwardSpace>(p, view);
}

}  // namespace
}  // namespace dalle::DALLE_ISA_NAMESPACE
