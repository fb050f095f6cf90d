// Backward: probabilities are computed again from log-sum-exp; five products per tile, each pair
// visited once. Included by sparse_attention_cpu.h only.
#pragma once

#include "sparse_attention/sparse_attention_cpu_forward.h"

namespace dalle::DALLE_ISA_NAMESPACE {
namespace {

template <typename operand_t>
struct BackwardSpace {
  using acc_t = Sum<operand_t>;
  static constexpr int kPer = kElements<operand_t>;
  // Summed over channels: keys_t, values_t, q_t, grad_out_t; over rows: keys, q, grad_out.
  operand_t *keys_t, *values_t, *keys, *rows, *grad_out_rows, *q, *q_t, *grad_out, *grad_out_t;
  acc_t *p, *ds, *grad_q, *delta, *lse_ceil, *correction, *grad_k, *grad_v;
  // Operands for the products with p and ds: neighbours are two queries (p_across, ds_across), or
  // two keys.
  operand_t *p_across, *ds_across, *ds_along;
  uint8_t *ready, *touched;

  BackwardSpace(Carver& carver, int num_strips, const HeadSize<operand_t>& size) {
    const size_t by_channels = static_cast<size_t>(kTile) * size.words;
    const size_t by_rows = static_cast<size_t>(kTile) / kPer * size.padded;
    const size_t panel = static_cast<size_t>(kTile) * size.padded;
    keys_t = carver.take<operand_t>(by_channels * num_strips);
    values_t = carver.take<operand_t>(by_channels * num_strips);
    keys = carver.take<operand_t>(by_rows * num_strips);
    for (operand_t** strip : {&rows, &grad_out_rows, &q_t, &grad_out_t}) {
      *strip = carver.take<operand_t>(by_channels);
    }
    for (operand_t** strip : {&q, &grad_out}) *strip = carver.take<operand_t>(by_rows);
    grad_q = carver.take<acc_t>(panel);
    p = carver.take<acc_t>(kTile * kChunk);   // [32][chunk] scores, then probabilities
    ds = carver.take<acc_t>(kTile * kChunk);  // [32][chunk] gradient of the scores, without scale
    if constexpr (kPer == 1) {
      p_across = p;
      ds_across = ds_along = ds;
    } else {
      for (operand_t** operand : {&p_across, &ds_across, &ds_along}) {
        *operand = carver.take<operand_t>(kTile * kChunk / kPer);
      }
    }
    delta = carver.take<acc_t>(kTile);       // sum over D of out * grad_out
    lse_ceil = carver.take<acc_t>(kTile);    // log-sum-exp to base 2, rounded up
    correction = carver.take<acc_t>(kTile);  // 2^(lse_ceil - log-sum-exp to base 2)
    ready = carver.take<uint8_t>(num_strips);
    touched = carver.take<uint8_t>(num_strips);
    grad_k = carver.take<acc_t>(panel * num_strips * 2);  // [panel][32][D]; grad_v follows
    grad_v = grad_k + panel * num_strips;
  }

  // Two rows, two vectors of p and ds each, into the operands.
  inline void store_operands(int row, int c, const Vec<acc_t> (&probability)[2][2],
                             const Vec<acc_t> (&gradient)[2][2]) {
    constexpr int kWidth = Lanes<acc_t>::kWidth;
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      store_along(ds_along + ((row + i) * kChunk + c) / kPer, gradient[i][0], gradient[i][1]);
      if constexpr (kPer == 1) {
        store_along(p + (row + i) * kChunk + c, probability[i][0], probability[i][1]);
      } else {
        const int at = row / kPer * kChunk + c + i * kWidth;
        store(p_across + at, pairs_across(probability[0][i], probability[1][i]));
        store(ds_across + at, pairs_across(gradient[0][i], gradient[1][i]));
      }
    }
  }
};

// From scores and grad_out * values (in ds) to probabilities and the gradient of the scores.
template <typename operand_t>
inline void softmax_gradient(BackwardSpace<operand_t>& space, const AttentionTile* tiles,
                             int num_tiles, const AttentionTileMask* masks, int count) {
  using acc_t = Sum<operand_t>;
  constexpr int kWidth = Lanes<acc_t>::kWidth;
  for (int r = 0; r < count; r += 2) {
    for (int t = 0; t < num_tiles; ++t) {
      for (int c = 0; c < kTile; c += 2 * kWidth) {
        Vec<acc_t> probability[2][2], gradient[2][2];
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          const acc_t lse_ceil = space.lse_ceil[r + i], correction = space.correction[r + i];
          const acc_t delta = space.delta[r + i];
#pragma GCC unroll 2
          for (int j = 0; j < 2; ++j) {
            const int at = (r + i) * kChunk + t * kTile + c + j * kWidth;
            probability[i][j] = exp2_of<acc_t>(load(space.p + at) - lse_ceil) * correction;
            gradient[i][j] = probability[i][j] * (load(space.ds + at) - delta);
            if (tiles[t].mask >= 0) {
              const uint32_t bits = masks[tiles[t].mask].rows[r + i];
              const IVec<acc_t> visible = lanes_of<acc_t>(bits, c + j * kWidth);
              probability[i][j] = visible ? probability[i][j] : Vec<acc_t>{};
              gradient[i][j] = visible ? gradient[i][j] : Vec<acc_t>{};
            }
          }
        }
        space.store_operands(r, t * kTile + c, probability, gradient);
      }
    }
  }
}

// to[32 keys][block] (+)= transpose of factor[count][32 keys] * rows[count][block].
template <typename operand_t, int kVectors>
inline void add_to_keys(const operand_t* factor, const operand_t* rows, int count, int padded,
                        bool first, Sum<operand_t>* to) {
  const int depth = (count + kElements<operand_t> - 1) / kElements<operand_t>;
  for (int key = 0; key < kTile; key += kMicroRows) {
    MicroTile<Sum<operand_t>, kVectors> sum = {};
    if (!first) load_tile<Sum<operand_t>, kVectors>(to + key * padded, padded, nullptr, sum);
    micro_tile<operand_t, kVectors>(factor + key, 1, kChunk, rows, padded, depth, sum);
    store_tile<Sum<operand_t>, kVectors>(to + key * padded, padded, sum);
  }
}

// All that one block of kVectors vectors of the head gets from one chunk of tiles.
template <typename operand_t, int kVectors>
inline void add_gradients(BackwardSpace<operand_t>& space, const AttentionTile* tiles,
                          int num_tiles, int count, int padded, int d) {
  constexpr int kRow = kChunk / kElements<operand_t>, kDepth = kTile / kElements<operand_t>;
  for (int t = 0; t < num_tiles; ++t) {
    const int64_t offset = static_cast<int64_t>(tiles[t].panel) * kTile * padded + d;
    const bool first = !space.touched[tiles[t].panel];
    add_to_keys<operand_t, kVectors>(space.p_across + t * kTile, space.grad_out + d, count, padded,
                                     first, space.grad_v + offset);
    add_to_keys<operand_t, kVectors>(space.ds_across + t * kTile, space.q + d, count, padded, first,
                                     space.grad_k + offset);
  }
  for (int r = 0; r < count; r += kMicroRows) {
    MicroTile<Sum<operand_t>, kVectors> sum;
    load_tile<Sum<operand_t>, kVectors>(space.grad_q + r * padded + d, padded, nullptr, sum);
    for (int t = 0; t < num_tiles; ++t) {
      const int64_t panel = static_cast<int64_t>(tiles[t].panel) * kDepth * padded;
      micro_tile<operand_t, kVectors>(space.ds_along + r * kRow + t * kDepth, kRow, 1,
                                      space.keys + panel + d, padded, kDepth, sum);
    }
    store_tile<Sum<operand_t>, kVectors>(space.grad_q + r * padded + d, padded, sum);
  }
}

template <typename storage_t, typename operand_t>
struct Backward {
  using acc_t = Sum<operand_t>;
  const SparseAttentionParams& p;
  const AttentionTileView& view;
  BackwardSpace<operand_t>& space;
  const HeadSize<operand_t> size;
  int64_t head;

  void gather(const AttentionRows& rows, int strip, operand_t* to) const {
    gather_strip<storage_t>(p, view, rows, head, strip, size.words, to);
  }
  const operand_t* gather_and_transpose(const AttentionRows& rows, int strip, operand_t* scratch,
                                        operand_t* across, operand_t* transposed) const {
    const operand_t* gathered =
        gather_across<storage_t>(p, view, rows, head, strip, size, scratch, across);
    transpose_panel(gathered, kTile, size.words, transposed);
    return gathered;
  }

  void pack_panel(int panel) const {
    const int64_t by_channels = int64_t{panel} * kTile * size.words;
    const int64_t by_rows = int64_t{panel} * (kTile / kElements<operand_t>)*size.padded;
    gather_and_transpose(p.k, panel, space.rows, space.keys + by_rows, space.keys_t + by_channels);
    gather(p.v, panel, space.rows);
    transpose_panel(space.rows, kTile, size.words, space.values_t + by_channels);
    space.ready[panel] = 1;
  }

  void pack_strip(int strip) const {
    gather_and_transpose(p.q, strip, space.rows, space.q, space.q_t);
    const operand_t* grad_out = gather_and_transpose(p.grad_out, strip, space.grad_out_rows,
                                                     space.grad_out, space.grad_out_t);
    gather(p.out, strip, space.rows);
    std::memset(space.grad_q, 0, sizeof(acc_t) * kTile * size.padded);
    for (int r = 0; r < kTile; ++r) {
      Vec<acc_t> delta = {};
      for (int d = 0; d < size.words; d += Lanes<acc_t>::kWidth) {
        const int at = r * size.words + d;
        delta = multiply_add(load(space.rows + at), load(grad_out + at), delta);
      }
      space.delta[r] = sum_of<acc_t>(delta);
    }
    // 2^(score - lse) = 2^(score - lse_ceil) * 2^(lse_ceil - lse): the fraction of lse keeps its
    // bits. Rows beyond the end get probability 0: the last query of an odd number shares a pair
    // with one.
    const double* lse = p.lse + head * p.length;
    const int count = strip_size(strip, p.length);
    double fraction[kTile] = {};
    for (int r = 0; r < count; ++r) {
      const double lse_log2 = lse[view.position[strip * kTile + r]] * kLog2E;
      space.lse_ceil[r] = static_cast<acc_t>(__builtin_ceil(lse_log2));
      fraction[r] = __builtin_ceil(lse_log2) - lse_log2;
    }
    for (int r = 0; r < kTile; r += Lanes<double>::kWidth) {
      store(fraction + r, exp2_of<double>(load(fraction + r)));
    }
    for (int r = 0; r < kTile; ++r) {
      space.correction[r] = r < count ? static_cast<acc_t>(fraction[r]) : 0;
      if (r >= count) space.lse_ceil[r] = 0;
    }
  }

  void run_strip(int strip) const {
    constexpr int kBlock = kMicroVectors * Lanes<acc_t>::kWidth;
    const acc_t scale = static_cast<acc_t>(p.scale * kLog2E);
    pack_strip(strip);
    const int count = strip_size(strip, p.length);
    const AttentionTile* tiles = view.tiles + view.strip_begin[strip];
    const int num_tiles = view.strip_begin[strip + 1] - view.strip_begin[strip];
    for (int first = 0; first < num_tiles; first += kChunkTiles) {
      const int chunk = num_tiles - first < kChunkTiles ? num_tiles - first : kChunkTiles;
      for (int t = 0; t < chunk; ++t) {
        const int panel = tiles[first + t].panel;
        if (!space.ready[panel]) pack_panel(panel);
        const int64_t offset = int64_t{panel} * kTile * size.words;
        strip_by_panel<operand_t, kChunk>(space.q_t, space.keys_t + offset, scale, size.depth,
                                          count, space.p + t * kTile);
        strip_by_panel<operand_t, kChunk>(space.grad_out_t, space.values_t + offset, 1, size.depth,
                                          count, space.ds + t * kTile);
      }
      softmax_gradient(space, tiles + first, chunk, view.masks, count);
      int d = 0;
      for (; d + kBlock <= size.padded; d += kBlock) {
        add_gradients<operand_t, kMicroVectors>(space, tiles + first, chunk, count, size.padded, d);
      }
      if (d < size.padded) {
        add_gradients<operand_t, 1>(space, tiles + first, chunk, count, size.padded, d);
      }
      for (int t = 0; t < chunk; ++t) space.touched[tiles[first + t].panel] = 1;
    }
    scatter_rows<storage_t, acc_t>(space.grad_q, static_cast<acc_t>(p.scale), size.padded,
                                   view.position + strip * kTile, count, p.head_size,
                                   head_of<storage_t>(p.grad_q, head, p.heads), p.grad_q.row);
  }

  void write_panel(int panel, const acc_t* grad_k, const acc_t* grad_v) const {
    const int32_t* position = view.position + panel * kTile;
    const int count = strip_size(panel, p.length);
    scatter_rows<storage_t, acc_t>(grad_k, static_cast<acc_t>(p.scale), size.padded, position,
                                   count, p.head_size, head_of<storage_t>(p.grad_k, head, p.heads),
                                   p.grad_k.row);
    scatter_rows<storage_t, acc_t>(grad_v, 1, size.padded, position, count, p.head_size,
                                   head_of<storage_t>(p.grad_v, head, p.heads), p.grad_v.row);
  }
};

template <typename storage_t, typename operand_t>
void backward_typed(const SparseAttentionParams& p, const AttentionTileView& view,
                    const AttentionSegments& split, void* workspace, int64_t begin, int64_t end) {
  using acc_t = Sum<operand_t>;
  const HeadSize<operand_t> size(p.head_size);
  const int64_t panel = int64_t{kTile} * size.padded;
  Carver carver{static_cast<char*>(workspace)};
  BackwardSpace<operand_t> space(carver, view.num_strips, size);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t head = task / split.segments, segment = task % split.segments;
    if (task == begin || segment == 0) std::memset(space.ready, 0, view.num_strips);
    std::memset(space.touched, 0, view.num_strips);
    if (split.segments > 1) {
      space.grad_k = static_cast<acc_t*>(split.partial) + task * view.num_strips * panel * 2;
      space.grad_v = space.grad_k + view.num_strips * panel;
    }
    const Backward<storage_t, operand_t> run{p, view, space, size, head};
    const int64_t last = (segment + 1) * view.num_strips / split.segments;
    for (int64_t strip = segment * view.num_strips / split.segments; strip < last; ++strip) {
      run.run_strip(static_cast<int>(strip));
    }
    for (int s = 0; split.segments == 1 && s < view.num_strips; ++s) {
      run.write_panel(s, space.grad_k + s * panel, space.grad_v + s * panel);
    }
  }
}

template <typename storage_t, typename operand_t>
void reduce_typed(const SparseAttentionParams& p, const AttentionTileView& view,
                  const AttentionSegments& split, int64_t begin, int64_t end) {
  using acc_t = Sum<operand_t>;
  const HeadSize<operand_t> size(p.head_size);
  const int64_t panel = int64_t{kTile} * size.padded, grad_k_size = view.num_strips * panel;
  Carver no_workspace{nullptr};
  BackwardSpace<operand_t> space(no_workspace, 0, size);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t head = task / view.num_strips;
    const int strip = static_cast<int>(task % view.num_strips);
    acc_t* sum = nullptr;
    for (int g = 0; g < split.segments; ++g) {
      if (!split.touched[g * view.num_strips + strip]) continue;
      acc_t* part = static_cast<acc_t*>(split.partial) +
                    (head * split.segments + g) * grad_k_size * 2 + strip * panel;
      for (int64_t i = 0; sum != nullptr && i < panel; i += Lanes<acc_t>::kWidth) {
        store(sum + i, load(sum + i) + load(part + i));
        store(sum + grad_k_size + i, load(sum + grad_k_size + i) + load(part + grad_k_size + i));
      }
      if (sum == nullptr) sum = part;
    }
    const Backward<storage_t, operand_t> run{p, view, space, size, head};
    run.write_panel(strip, sum, sum + grad_k_size);
  }
}

void backward(const SparseAttentionParams& p, const AttentionTileView& view,
              const AttentionSegments& split, void* workspace, int64_t begin, int64_t end) {
  for_type(p.type, [&](auto storage, auto operand) {
    backward_typed<decltype(storage), decltype(operand)>(p, view, split, workspace, begin, end);
  });
}

void backward_reduce(const SparseAttentionParams& p, const AttentionTileView& view,
                     const AttentionSegments& split, int64_t begin, int64_t end) {
  for_type(p.type, [&](auto storage, auto operand) {
    reduce_typed<decltype(storage), decltype(operand)>(p, view, split, begin, end);
  });
}

size_t backward_bytes(const SparseAttentionParams& p, const AttentionTileView& view) {
  return bytes_of<BackwardSpace>(p, view);
}

size_t partial_bytes(const SparseAttentionParams& p, const AttentionTileView& view) {
  size_t bytes = 0;
  for_type(p.type, [&](auto, auto operand) {
    using operand_t = decltype(operand);
    const HeadSize<operand_t> size(p.head_size);
    bytes = sizeof(Sum<operand_t>) * 2 * kTile * size.padded * view.num_strips;
  });
  return bytes;
}

}  // namespace
}  // namespace dalle::DALLE_ISA_NAMESPACE
