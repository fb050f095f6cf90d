// The CPU kernel of sparse attention: what it offers (always) and, once per instruction set, how it
// does it (under DALLE_ISA). No torch here.
//
// A task is one strip of 32 queries of one head, or, in the backward, a range of strips. A strip
// walks its tiles of 32 keys (sparse_attention_tiles.h); keys and values of a head are packed when
// first needed, transposed and converted to the accumulation type, so every product is one
// register-blocked micro-kernel over contiguous memory. Results do not depend on how tasks are
// spread over threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/isa.h"
#include "sparse_attention/sparse_attention.h"

namespace dalle {

constexpr int kTile = 32;  // queries of a strip, keys of a panel, bits of a mask word

struct AttentionTile {
  int32_t panel;  // keys panel * 32 .. panel * 32 + 31 of the walk
  int32_t mask;   // index into masks, -1: every query sees every key
};

struct AttentionTileMask {
  uint32_t rows[kTile];  // bit c of word r: query r of the strip sees key c of the panel
};

struct AttentionTileView {
  const int32_t* position;
  const int32_t* strip_begin;
  const AttentionTile* tiles;
  const AttentionTileMask* masks;
  int32_t num_strips;
};

// How the backward splits a head: segment g owns the strips [g n / segments, (g + 1) n / segments).
// With one segment a task writes grad_k and grad_v itself; with more it leaves sums in `partial`,
// and backward_reduce adds them in the order of the segments.
struct AttentionSegments {
  int32_t segments;
  const uint8_t* touched;  // [segments][num_strips]: whether the segment has a tile in the panel
  void* partial;           // [B * H * segments] buffers of partial_bytes each
};

struct SparseAttentionCpu {
  size_t (*forward_bytes)(const SparseAttentionParams&, const AttentionTileView&);
  size_t (*backward_bytes)(const SparseAttentionParams&, const AttentionTileView&);
  size_t (*partial_bytes)(const SparseAttentionParams&, const AttentionTileView&);
  // Tasks (b * H + h) * num_strips + strip. `workspace`: forward_bytes, a thread's own, aligned to
  // 64 bytes.
  void (*forward)(const SparseAttentionParams&, const AttentionTileView&, void* workspace,
                  int64_t task_begin, int64_t task_end);
  // Tasks (b * H + h) * segments + segment.
  void (*backward)(const SparseAttentionParams&, const AttentionTileView&, const AttentionSegments&,
                   void* workspace, int64_t task_begin, int64_t task_end);
  // Tasks (b * H + h) * num_strips + panel.
  void (*backward_reduce)(const SparseAttentionParams&, const AttentionTileView&,
                          const AttentionSegments&, int64_t task_begin, int64_t task_end);
};

DALLE_FOR_EACH_ISA(SparseAttentionCpu, sparse_attention_cpu)

}  // namespace dalle

#ifdef DALLE_ISA

#include "sparse_attention/sparse_attention_cpu_backward.h"

namespace dalle::DALLE_ISA_NAMESPACE {

const SparseAttentionCpu sparse_attention_cpu = {forward_bytes, backward_bytes, partial_bytes,
                                                 forward,       backward,       backward_reduce};

}  // namespace dalle::DALLE_ISA_NAMESPACE

#endif  // DALLE_ISA
