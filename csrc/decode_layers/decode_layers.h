// A stack of transformer layers for one decoding step, CPU only: the kernels of packed_linear and
// decode_attention, one after the other, in one team of threads. No torch here.
//
// Letters: R rows, d width, H heads, D head size, F inner width of the MLP. A layer is
//   x = x + out(attend(qkv(norm(x))))
//   x = x + wide_out(act(wide_in(norm(x))))
#pragma once

#include <algorithm>

#include "common/team.h"
#include "decode_attention/decode_attention_cpu.h"
#include "packed_linear/packed_linear_cpu.h"

namespace dalle {

// Without what depends on the step: x, residual, normed, out and rows of the products; q, k, v and
// out of the attention point into the buffers of DecodeLayersArgs.
struct DecodeLayer {
  PackedLinearArgs qkv, out, wide_in, wide_out;
  DecodeAttentionParams attention;
};

struct DecodeLayersArgs {
  const DecodeLayer* layers;
  int64_t num_layers, rows;
  int32_t slot;
  const float* x;  // (R, d)
  // What the layers share: qkv (R, 3 H D); attended (R, H D); middle (R, d); hidden (R, F); normed,
  // what a product reads. Of a bfloat16 cache `stored` is qkv in bfloat16, else null; rows of it
  // and of `attended` have an even length then, with a zero behind an odd one.
  float *qkv, *middle, *hidden, *normed;
  void *stored, *attended;
  float* result;  // (R, d)
  int64_t threads;
  void* workspace;  // of attention: `threads` times workspace_bytes, each aligned to 64 bytes
  int64_t workspace_bytes;
};

constexpr int64_t kDecodePhases = 10;   // of a layer, at most: four products and what they read
constexpr int64_t kRowsPrepared = 16;   // rows of a task that norms them
constexpr int64_t kTasksOfAThread = 3;  // of a product: some, so that a late thread is made up for

inline void run_prepare(Member& member, const PackedLinearCpu& cpu, const PackedLinearArgs& args) {
  member.run(ceil_div(args.rows, kRowsPrepared), [&](int64_t task) {
    const int64_t begin = task * kRowsPrepared;
    cpu.prepare(args, begin, std::min(args.rows, begin + kRowsPrepared));
  });
}

// One product of a layer for all rows, of args.x, or of args.normed where that is set. A task is
// some panels of 16 outputs.
inline void run_product(Member& member, const PackedLinearCpu& cpu, const DecodeLayersArgs& all,
                        PackedLinearArgs args) {
  args.rows = all.rows;
  if (args.normed == nullptr && (args.gain != nullptr || args.pairs)) {
    args.normed = all.normed;
    run_prepare(member, cpu, args);
  } else if (args.normed == nullptr) {
    args.normed = const_cast<float*>(args.x);  // read only
  }
  // As many panels as a tile of products is wide with AVX-512; less wide ones fit as well.
  const int64_t panels = ceil_div(args.outputs, kLinearColumns), tile = all.rows <= 2 ? 4 : 3;
  const int64_t some = tile * ceil_div(panels, tile * all.threads * kTasksOfAThread);
  member.run(ceil_div(panels, some), [&](int64_t task) {
    cpu.run(args, task * some, std::min(panels, (task + 1) * some));
  });
}

// What each thread of a team does.
inline void run_decode_layers(Member& member, const PackedLinearCpu& linear,
                              const DecodeAttentionCpu& attention, const DecodeLayersArgs& all) {
  const float* x = all.x;
  for (int64_t i = 0; i < all.num_layers; ++i) {
    const DecodeLayer& layer = all.layers[i];
    const DecodeAttentionParams& p = layer.attention;
    PackedLinearArgs qkv = layer.qkv, out = layer.out;
    PackedLinearArgs wide_in = layer.wide_in, wide_out = layer.wide_out;
    qkv.x = x, qkv.out = all.qkv;
    out.residual = x, out.out = all.middle;
    wide_in.x = all.middle, wide_in.out = all.hidden;
    wide_out.x = all.hidden, wide_out.residual = all.middle, wide_out.out = all.result;
    run_product(member, linear, all, qkv);
    if (all.stored == nullptr) {
      out.x = static_cast<const float*>(all.attended);
    } else {
      PackedLinearArgs rounded{};
      rounded.x = all.qkv, rounded.rows = all.rows, rounded.inputs = qkv.outputs;
      rounded.normed = static_cast<float*>(all.stored), rounded.pairs = true;
      run_prepare(member, linear, rounded);
      out.normed = static_cast<float*>(all.attended);
    }
    const int64_t tiles = ceil_div(p.samples, attention.task_samples(p.type));
    const int64_t tasks = int64_t{p.batch} * p.heads * tiles;
    const int64_t pieces = std::min(all.threads, tasks);
    member.run(pieces, [&](int64_t piece) {
      char* const space = static_cast<char*>(all.workspace) + piece * all.workspace_bytes;
      attention.run(p, all.slot, space, piece * tasks / pieces, (piece + 1) * tasks / pieces);
    });
    run_product(member, linear, all, out);
    run_product(member, linear, all, wide_in);
    run_product(member, linear, all, wide_out);
    x = all.result;
  }
}

}  // namespace dalle
