// Forward: online softmax over chunks of tiles. Included by sparse_attention_cpu.h only.
#pragma once

#include <cmath>  // INFINITY

#include "sparse_attention/sparse_attention_cpu_product.h"

namespace dalle::DALLE_ISA_NAMESPACE {
namespace {

constexpr int kChunkTiles = 2;  // tiles between two updates of the running maximum
constexpr int kChunk = kChunkTiles * kTile;

// Packed keys and values of the head at work; panels are made when first needed.
template <typename operand_t>
struct ForwardSpace {
  using acc_t = Sum<operand_t>;
  operand_t *keys, *values, *rows, *q, *weights;
  acc_t *scores, *out, *m, *shift, *rescale;
  Vec<acc_t>* l;
  uint8_t* ready;

  ForwardSpace(Carver& carver, int num_strips, const HeadSize<operand_t>& size) {
    constexpr int kPer = kElements<operand_t>;
    const size_t by_channels = static_cast<size_t>(kTile) * size.words;
    const size_t by_rows = static_cast<size_t>(kTile) / kPer * size.padded;
    keys = carver.take<operand_t>(by_channels * num_strips);
    values = carver.take<operand_t>(by_rows * num_strips);
    rows = carver.take<operand_t>(by_channels);
    q = carver.take<operand_t>(by_channels);
    out = carver.take<acc_t>(kTile * size.padded);  // [32][padded]
    scores = carver.take<acc_t>(kTile * kChunk);    // [32][chunk]
    // 2^(score - m) as an operand, [32][chunk / kElements]
    if constexpr (kPer == 1) weights = scores;
    if constexpr (kPer == 2) weights = carver.take<operand_t>(kTile * kChunk / kPer);
    m = carver.take<acc_t>(kTile);        // running maximum of the scores
    shift = carver.take<acc_t>(kTile);    // maximum of the chunk, then m, or 0 where m is -inf
    rescale = carver.take<acc_t>(kTile);  // 2^(old m - new m)
    l = carver.take<Vec<acc_t>>(kTile);   // running sum of the weights, lane by lane
    ready = carver.take<uint8_t>(num_strips);
  }
};

// Masks one row of scores in place and returns its lanewise maximum.
template <typename acc_t>
inline Vec<acc_t> mask_and_max(acc_t* scores, const AttentionTile* tiles, int num_tiles,
                               const AttentionTileMask* masks, int row) {
  constexpr int kWidth = Lanes<acc_t>::kWidth;
  const Vec<acc_t> minus_infinity = splat<acc_t>(-INFINITY);
  Vec<acc_t> row_max = minus_infinity;
  for (int t = 0; t < num_tiles; ++t, scores += kTile) {
    if (tiles[t].mask >= 0) {
      const uint32_t bits = masks[tiles[t].mask].rows[row];
#pragma GCC unroll 16
      for (int c = 0; c < kTile; c += kWidth) {
        const Vec<acc_t> s = lanes_of<acc_t>(bits, c) ? load(scores + c) : minus_infinity;
        store(scores + c, s);
        row_max = s > row_max ? s : row_max;
      }
    } else {
#pragma GCC unroll 16
      for (int c = 0; c < kTile; c += kWidth) {
        const Vec<acc_t> s = load(scores + c);
        row_max = s > row_max ? s : row_max;
      }
    }
  }
  return row_max;
}

// Turns the scores of one chunk into 2^(score - m) and updates m and l.
template <typename operand_t>
inline void softmax_chunk(ForwardSpace<operand_t>& space, const AttentionTile* tiles, int num_tiles,
                          const AttentionTileMask* masks, int num_rows) {
  using acc_t = Sum<operand_t>;
  constexpr int kWidth = Lanes<acc_t>::kWidth;
  for (int r = 0; r < num_rows; ++r) {
    acc_t* scores = space.scores + r * kChunk;
    space.shift[r] = max_of<acc_t>(mask_and_max(scores, tiles, num_tiles, masks, r));
  }
  const Vec<acc_t> minus_infinity = splat<acc_t>(-INFINITY);
  for (int r = 0; r < num_rows; r += kWidth) {
    const Vec<acc_t> m_old = load(space.m + r), chunk_max = load(space.shift + r);
    const Vec<acc_t> m_new = chunk_max > m_old ? chunk_max : m_old;
    // A row that has no visible key yet has no maximum; 0 keeps -inf - (-inf) away.
    const Vec<acc_t> shift = m_new == minus_infinity ? Vec<acc_t>{} : m_new;
    store(space.rescale + r, exp2_of<acc_t>(m_old - shift));
    store(space.m + r, m_new);
    store(space.shift + r, shift);
  }
  for (int r = 0; r < num_rows; ++r) {
    const acc_t* scores = space.scores + r * kChunk;
    operand_t* weights = space.weights + r * kChunk / kElements<operand_t>;
    const acc_t shift = space.shift[r];
    Vec<acc_t> l = space.l[r] * space.rescale[r];
    for (int c = 0; c < num_tiles * kTile; c += 2 * kWidth) {
      const Vec<acc_t> p0 = exp2_of<acc_t>(load(scores + c) - shift);
      const Vec<acc_t> p1 = exp2_of<acc_t>(load(scores + c + kWidth) - shift);
      store_along(weights + c / kElements<operand_t>, p0, p1);
      l += p0;
      l += p1;
    }
    space.l[r] = l;
  }
}

// out = rescale * out + probabilities * values, for one block of kVectors vectors of the head.
template <typename operand_t, int kVectors>
inline void weigh_values(ForwardSpace<operand_t>& space, const AttentionTile* tiles, int num_tiles,
                         int num_rows, int padded, int d) {
  constexpr int kRow = kChunk / kElements<operand_t>, kDepth = kTile / kElements<operand_t>;
  for (int r = 0; r < num_rows; r += kMicroRows) {
    MicroTile<Sum<operand_t>, kVectors> sum;
    load_tile<Sum<operand_t>, kVectors>(space.out + r * padded + d, padded, space.rescale + r, sum);
    for (int t = 0; t < num_tiles; ++t) {
      const int64_t panel = static_cast<int64_t>(tiles[t].panel) * kDepth * padded;
      micro_tile<operand_t, kVectors>(space.weights + r * kRow + t * kDepth, kRow, 1,
                                      space.values + panel + d, padded, kDepth, sum);
    }
    store_tile<Sum<operand_t>, kVectors>(space.out + r * padded + d, padded, sum);
  }
}

template <typename storage_t, typename operand_t>
void forward_typed(const SparseAttentionParams& p, const AttentionTileView& view, void* workspace,
                   int64_t task_begin, int64_t task_end) {
  using acc_t = Sum<operand_t>;
  constexpr int kBlock = kMicroVectors * Lanes<acc_t>::kWidth;
  const HeadSize<operand_t> size(p.head_size);
  const int64_t by_channels = int64_t{kTile} * size.words;
  const int64_t by_rows = int64_t{kTile} / kElements<operand_t> * size.padded;
  const acc_t scale = static_cast<acc_t>(p.scale * kLog2E);
  Carver carver{static_cast<char*>(workspace)};
  ForwardSpace<operand_t> space(carver, view.num_strips, size);
  int64_t packed_head = -1;
  for (int64_t task = task_begin; task < task_end; ++task) {
    const int64_t head = task / view.num_strips;
    const int strip = static_cast<int>(task % view.num_strips);
    if (head != packed_head) std::memset(space.ready, 0, view.num_strips);
    packed_head = head;

    const int count = strip_size(strip, p.length);
    const int num_rows = (count + kMicroRows - 1) / kMicroRows * kMicroRows;
    const int32_t* position = view.position + strip * kTile;
    gather_strip<storage_t>(p, view, p.q, head, strip, size.words, space.rows);
    transpose_panel(space.rows, kTile, size.words, space.q);
    std::memset(space.out, 0, sizeof(acc_t) * kTile * size.padded);
    for (int r = 0; r < kTile; ++r) {
      space.m[r] = -INFINITY;
      space.l[r] = Vec<acc_t>{};
    }

    const AttentionTile* tiles = view.tiles + view.strip_begin[strip];
    const int num_tiles = view.strip_begin[strip + 1] - view.strip_begin[strip];
    for (int first = 0; first < num_tiles; first += kChunkTiles) {
      const int chunk = num_tiles - first < kChunkTiles ? num_tiles - first : kChunkTiles;
      for (int t = 0; t < chunk; ++t) {
        const int panel = tiles[first + t].panel;
        operand_t* keys = space.keys + panel * by_channels;
        if (!space.ready[panel]) {
          gather_strip<storage_t>(p, view, p.k, head, panel, size.words, space.rows);
          transpose_panel(space.rows, kTile, size.words, keys);
          gather_across<storage_t>(p, view, p.v, head, panel, size, space.rows,
                                   space.values + panel * by_rows);
          space.ready[panel] = 1;
        }
        strip_by_panel<operand_t, kChunk>(space.q, keys, scale, size.depth, num_rows,
                                          space.scores + t * kTile);
      }
      softmax_chunk(space, tiles + first, chunk, view.masks, num_rows);
      int d = 0;
      for (; d + kBlock <= size.padded; d += kBlock) {
        weigh_values<operand_t, kMicroVectors>(space, tiles + first, chunk, num_rows, size.padded,
                                               d);
      }
      if (d < size.padded) {
        weigh_values<operand_t, 1>(space, tiles + first, chunk, num_rows, size.padded, d);
      }
    }

    storage_t* out = head_of<storage_t>(p.out, head, p.heads);
    double* lse = p.lse + head * p.length;
    for (int r = 0; r < count; ++r) {
      const acc_t l = sum_of<acc_t>(space.l[r]);
      scatter_rows<storage_t, acc_t>(space.out + r * size.padded, 1 / l, size.padded, position + r,
                                     1, p.head_size, out, p.out.row);
      lse[position[r]] = space.m[r] / kLog2E + __builtin_log(l);
    }
  }
}

void forward(const SparseAttentionParams& p, const AttentionTileView& view, void* workspace,
             int64_t task_begin, int64_t task_end) {
  for_type(p.type, [&](auto storage, auto operand) {
    forward_typed<decltype(storage), decltype(operand)>(p, view, workspace, task_begin, task_end);
  });
}

size_t forward_bytes(const SparseAttentionParams& p, const AttentionTileView& view) {
  return bytes_of<ForwardSpace>(p, view);
}

}  // namespace
}  // namespace dalle::DALLE_ISA_NAMESPACE
