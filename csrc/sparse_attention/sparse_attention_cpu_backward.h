// Backward: probabilities are made again from log-sum-exp; five products per tile, each pair
// visited once. Included by sparse_attention_cpu.h only.
#pragma once

#include "sparse_attention/sparse_attention_cpu_forward.h"

namespace dalle::DALLE_ISA_NAMESPACE {
namespace {

template <typename acc_t>
struct BackwardSpace {
  acc_t *keys_t, *values_t, *keys, *rows, *q, *q_t, *grad_out, *grad_out_t, *grad_q;
  acc_t *p, *ds, *delta, *whole, *weight, *grad_k, *grad_v;
  uint8_t *ready, *touched;

  BackwardSpace(Carver& carver, int num_strips, int padded) {
    const size_t panel = static_cast<size_t>(kTile) * padded;
    keys_t = carver.take<acc_t>(panel * num_strips);    // [panel][D][32]
    values_t = carver.take<acc_t>(panel * num_strips);  // [panel][D][32]
    keys = carver.take<acc_t>(panel * num_strips);      // [panel][32][D]
    for (acc_t** strip : {&rows, &q, &q_t, &grad_out, &grad_out_t, &grad_q}) {
      *strip = carver.take<acc_t>(panel);
    }
    p = carver.take<acc_t>(kTile * kChunk);   // [32][chunk] probabilities
    ds = carver.take<acc_t>(kTile * kChunk);  // [32][chunk] gradient of the scores, without scale
    delta = carver.take<acc_t>(kTile);        // sum over D of out * grad_out
    whole = carver.take<acc_t>(kTile);        // log-sum-exp in units of log 2, rounded up
    weight = carver.take<acc_t>(kTile);       // 2^(whole - log-sum-exp)
    ready = carver.take<uint8_t>(num_strips);
    touched = carver.take<uint8_t>(num_strips);
    grad_k = carver.take<acc_t>(panel * num_strips * 2);  // [panel][32][D]; grad_v follows
    grad_v = grad_k + panel * num_strips;
  }
};

// From scores and grad_out * values (in ds) to probabilities and the gradient of the scores.
template <typename acc_t>
inline void softmax_gradient(BackwardSpace<acc_t>& space, const AttentionTile* tiles, int num_tiles,
                             const AttentionTileMask* masks, int count) {
  constexpr int kWidth = Lanes<acc_t>::kWidth;
  for (int r = 0; r < count; ++r) {
    acc_t *p = space.p + r * kChunk, *ds = space.ds + r * kChunk;
    const acc_t whole = space.whole[r], weight = space.weight[r], delta = space.delta[r];
    for (int t = 0; t < num_tiles; ++t) {
      const uint32_t bits = tiles[t].mask < 0 ? ~0u : masks[tiles[t].mask].rows[r];
      for (int c = 0; c < kTile; c += kWidth, p += kWidth, ds += kWidth) {
        Vec<acc_t> probability = exp2_vector<acc_t>(load(p) - whole) * weight;
        Vec<acc_t> gradient = probability * (load(ds) - delta);
        if (tiles[t].mask >= 0) {
          const IVec<acc_t> seen = lanes_of<acc_t>(bits, c);
          probability = seen ? probability : Vec<acc_t>{};
          gradient = seen ? gradient : Vec<acc_t>{};
        }
        store<acc_t>(p, probability);
        store<acc_t>(ds, gradient);
      }
    }
  }
}

// to[32 keys][block] (+)= transpose of factor[count][32 keys] * rows[count][block].
template <typename acc_t, int kVectors>
inline void add_to_keys(const acc_t* factor, const acc_t* rows, int count, int padded, bool first,
                        acc_t* to) {
  for (int key = 0; key < kTile; key += kMicroRows) {
    Vec<acc_t> sum[kMicroRows][kVectors] = {};
    if (!first) load_tile<acc_t, kVectors>(to + key * padded, padded, nullptr, sum);
    micro_tile<acc_t, kVectors, 1, kChunk>(factor + key, rows, padded, count, sum);
    store_tile<acc_t, kVectors>(to + key * padded, padded, sum);
  }
}

// All that one block of kVectors vectors of the head gets from one chunk of tiles.
template <typename acc_t, int kVectors>
inline void add_gradients(BackwardSpace<acc_t>& space, const AttentionTile* tiles, int num_tiles,
                          int count, int padded, int d) {
  for (int t = 0; t < num_tiles; ++t) {
    const int64_t offset = static_cast<int64_t>(tiles[t].panel) * kTile * padded + d;
    const bool first = !space.touched[tiles[t].panel];
    add_to_keys<acc_t, kVectors>(space.p + t * kTile, space.grad_out + d, count, padded, first,
                                 space.grad_v + offset);
    add_to_keys<acc_t, kVectors>(space.ds + t * kTile, space.q + d, count, padded, first,
                                 space.grad_k + offset);
  }
  for (int r = 0; r < count; r += kMicroRows) {
    Vec<acc_t> sum[kMicroRows][kVectors];
    load_tile<acc_t, kVectors>(space.grad_q + r * padded + d, padded, nullptr, sum);
    for (int t = 0; t < num_tiles; ++t) {
      const acc_t* keys = space.keys + static_cast<int64_t>(tiles[t].panel) * kTile * padded + d;
      micro_tile<acc_t, kVectors, kChunk, 1>(space.ds + r * kChunk + t * kTile, keys, padded, kTile,
                                             sum);
    }
    store_tile<acc_t, kVectors>(space.grad_q + r * padded + d, padded, sum);
  }
}

template <typename storage_t, typename acc_t>
struct Backward {
  const SparseAttentionParams& p;
  const AttentionTileView& view;
  BackwardSpace<acc_t>& space;
  const int padded;
  int64_t head;

  void gather(const AttentionRows& rows, int strip, acc_t* to) const {
    gather_strip<storage_t>(p, view, rows, head, strip, padded, to);
  }

  void pack_panel(int panel) const {
    const int64_t offset = static_cast<int64_t>(panel) * kTile * padded;
    gather(p.k, panel, space.keys + offset);
    transpose_panel<acc_t>(space.keys + offset, 1, padded, space.keys_t + offset);
    gather(p.v, panel, space.rows);
    transpose_panel<acc_t>(space.rows, 1, padded, space.values_t + offset);
    space.ready[panel] = 1;
  }

  void pack_strip(int strip) const {
    gather(p.q, strip, space.q);
    transpose_panel<acc_t>(space.q, static_cast<acc_t>(p.scale * kLog2E), padded, space.q_t);
    gather(p.grad_out, strip, space.grad_out);
    transpose_panel<acc_t>(space.grad_out, 1, padded, space.grad_out_t);
    gather(p.out, strip, space.rows);
    std::memset(space.grad_q, 0, sizeof(acc_t) * kTile * padded);
    for (int r = 0; r < kTile; ++r) {
      Vec<acc_t> delta = {};
      for (int d = 0; d < padded; d += Lanes<acc_t>::kWidth) {
        delta += load(space.rows + r * padded + d) * load(space.grad_out + r * padded + d);
      }
      space.delta[r] = sum_of<acc_t>(delta);
    }
    // 2^(score - lse) = 2^(score - whole) * 2^(whole - lse): the fraction of lse keeps its bits.
    const double* lse = p.lse + head * p.length;
    double fraction[kTile] = {};
    for (int r = 0; r < places_of(strip, p.length); ++r) {
      const double bits = lse[view.position[strip * kTile + r]] * kLog2E;
      space.whole[r] = static_cast<acc_t>(__builtin_ceil(bits));
      fraction[r] = __builtin_ceil(bits) - bits;
    }
    for (int r = 0; r < kTile; r += Lanes<double>::kWidth) {
      store<double>(fraction + r, exp2_vector<double>(load(fraction + r)));
    }
    for (int r = 0; r < kTile; ++r) space.weight[r] = static_cast<acc_t>(fraction[r]);
  }

  void run_strip(int strip) const {
    constexpr int kBlock = kMicroVectors * Lanes<acc_t>::kWidth;
    pack_strip(strip);
    const int count = places_of(strip, p.length);
    const AttentionTile* tiles = view.tiles + view.strip_begin[strip];
    const int num_tiles = view.strip_begin[strip + 1] - view.strip_begin[strip];
    for (int first = 0; first < num_tiles; first += kChunkTiles) {
      const int chunk = num_tiles - first < kChunkTiles ? num_tiles - first : kChunkTiles;
      for (int t = 0; t < chunk; ++t) {
        const int panel = tiles[first + t].panel;
        if (!space.ready[panel]) pack_panel(panel);
        const int64_t offset = static_cast<int64_t>(panel) * kTile * padded;
        strip_by_panel<acc_t, kChunk>(space.q_t, space.keys_t + offset, p.head_size, count,
                                      space.p + t * kTile);
        strip_by_panel<acc_t, kChunk>(space.grad_out_t, space.values_t + offset, p.head_size, count,
                                      space.ds + t * kTile);
      }
      softmax_gradient(space, tiles + first, chunk, view.masks, count);
      int d = 0;
      for (; d + kBlock <= padded; d += kBlock) {
        add_gradients<acc_t, kMicroVectors>(space, tiles + first, chunk, count, padded, d);
      }
      if (d < padded) add_gradients<acc_t, 1>(space, tiles + first, chunk, count, padded, d);
      for (int t = 0; t < chunk; ++t) space.touched[tiles[first + t].panel] = 1;
    }
    scatter_rows<storage_t, acc_t>(space.grad_q, static_cast<acc_t>(p.scale), padded,
                                   view.position + strip * kTile, count, p.head_size,
                                   head_of<storage_t>(p.grad_q, head, p.heads), p.grad_q.row);
  }

  void write_panel(int panel, const acc_t* grad_k, const acc_t* grad_v) const {
    const int32_t* position = view.position + panel * kTile;
    const int count = places_of(panel, p.length);
    scatter_rows<storage_t, acc_t>(grad_k, static_cast<acc_t>(p.scale), padded, position, count,
                                   p.head_size, head_of<storage_t>(p.grad_k, head, p.heads),
                                   p.grad_k.row);
    scatter_rows<storage_t, acc_t>(grad_v, 1, padded, position, count, p.head_size,
                                   head_of<storage_t>(p.grad_v, head, p.heads), p.grad_v.row);
  }
};

template <typename storage_t, typename acc_t>
void backward_typed(const SparseAttentionParams& p, const AttentionTileView& view,
                    const AttentionSegments& split, void* workspace, int64_t begin, int64_t end) {
  const int padded = padded_size<acc_t>(p.head_size);
  const int64_t panel = static_cast<int64_t>(kTile) * padded;
  Carver carver{static_cast<char*>(workspace)};
  BackwardSpace<acc_t> space(carver, view.num_strips, padded);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t head = task / split.segments, segment = task % split.segments;
    if (task == begin || segment == 0) std::memset(space.ready, 0, view.num_strips);
    std::memset(space.touched, 0, view.num_strips);
    if (split.segments > 1) {
      space.grad_k = static_cast<acc_t*>(split.partial) + task * view.num_strips * panel * 2;
      space.grad_v = space.grad_k + view.num_strips * panel;
    }
    const Backward<storage_t, acc_t> run{p, view, space, padded, head};
    const int64_t last = (segment + 1) * view.num_strips / split.segments;
    for (int64_t strip = segment * view.num_strips / split.segments; strip < last; ++strip) {
      run.run_strip(static_cast<int>(strip));
    }
    for (int s = 0; split.segments == 1 && s < view.num_strips; ++s) {
      run.write_panel(s, space.grad_k + s * panel, space.grad_v + s * panel);
    }
  }
}

template <typename storage_t, typename acc_t>
void reduce_typed(const SparseAttentionParams& p, const AttentionTileView& view,
                  const AttentionSegments& split, int64_t begin, int64_t end) {
  const int padded = padded_size<acc_t>(p.head_size);
  const int64_t panel = static_cast<int64_t>(kTile) * padded, values = view.num_strips * panel;
  Carver nothing{nullptr};
  BackwardSpace<acc_t> space(nothing, 0, 0);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t head = task / view.num_strips;
    const int strip = static_cast<int>(task % view.num_strips);
    acc_t* sum = nullptr;
    for (int g = 0; g < split.segments; ++g) {
      if (!split.touched[g * view.num_strips + strip]) continue;
      acc_t* part = static_cast<acc_t*>(split.partial) + (head * split.segments + g) * values * 2 +
                    strip * panel;
      for (int64_t i = 0; sum != nullptr && i < panel; i += Lanes<acc_t>::kWidth) {
        store<acc_t>(sum + i, load(sum + i) + load(part + i));
        store<acc_t>(sum + values + i, load(sum + values + i) + load(part + values + i));
      }
      if (sum == nullptr) sum = part;
    }
    const Backward<storage_t, acc_t> run{p, view, space, padded, head};
    run.write_panel(strip, sum, sum + values);
  }
}

void backward(const SparseAttentionParams& p, const AttentionTileView& view,
              const AttentionSegments& split, void* workspace, int64_t begin, int64_t end) {
  for_type(p.type, [&](auto storage, auto acc) {
    backward_typed<decltype(storage), decltype(acc)>(p, view, split, workspace, begin, end);
  });
}

void backward_reduce(const SparseAttentionParams& p, const AttentionTileView& view,
                     const AttentionSegments& split, int64_t begin, int64_t end) {
  for_type(p.type, [&](auto storage, auto acc) {
    reduce_typed<decltype(storage), decltype(acc)>(p, view, split, begin, end);
  });
}

size_t backward_bytes(const SparseAttentionParams& p, const AttentionTileView& view) {
  return bytes_of<BackwardSpace>(p, view);
}

size_t partial_bytes(const SparseAttentionParams& p, const AttentionTileView& view) {
  size_t bytes = 0;
  for_type(p.type, [&](auto, auto acc) {
    bytes = sizeof(acc) * 2 * kTile * padded_size<decltype(acc)>(p.head_size) * view.num_strips;
  });
  return bytes;
}

}  // namespace
}  // namespace dalle::DALLE_ISA_NAMESPACE
