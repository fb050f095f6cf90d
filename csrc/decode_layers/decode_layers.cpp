// Schema and CPU registration of a stack of decoding layers.
#include "decode_layers/decode_layers.hpp"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>

#include "common/carver.h"
#include "common/isa.h"
#include "common/tasks.hpp"

namespace dalle {
namespace {

constexpr int64_t kProductsOfAThread = 1 << 16;  // fewer are not worth another thread

// Buffers of a step, and where the layers' attention finds its rows.
void place_buffers(DecodeLayersArgs& all, std::vector<DecodeLayer>& layers, Carver& carver) {
  const DecodeAttentionParams& first = layers[0].attention;
  const bool rounded = first.type == ElementKind::kBFloat16;
  const int64_t inner = int64_t{first.heads} * first.head_size;
  const int64_t packed = rounded ? 3 * inner + inner % 2 : 3 * inner;
  const int64_t attended = rounded ? inner + inner % 2 : inner;
  const int64_t element = rounded ? 2 : 4;
  int64_t read = 0, hidden = 0;  // widest rows of a product's input
  for (const DecodeLayer& layer : layers) {
    hidden = std::max(hidden, layer.wide_out.inputs);
    read = std::max({read, layer.qkv.inputs, layer.out.inputs, layer.wide_out.inputs});
  }
  all.qkv = carver.take<float>(all.rows * 3 * inner);
  all.stored = rounded ? carver.take<char>(all.rows * packed * element) : nullptr;
  all.attended = carver.take<char>(all.rows * attended * element);
  all.middle = carver.take<float>(all.rows * layers[0].qkv.inputs);
  all.hidden = carver.take<float>(all.rows * hidden);
  all.normed = carver.take<float>(all.rows * read);
  all.workspace = carver.take<char>(all.threads * all.workspace_bytes);
  if (carver.base == nullptr) return;
  if (attended > inner) std::memset(all.attended, 0, all.rows * attended * element);
  char* const rows = rounded ? static_cast<char*>(all.stored) : reinterpret_cast<char*>(all.qkv);
  for (DecodeLayer& layer : layers) {
    DecodeAttentionParams& p = layer.attention;
    const auto part = [&](int64_t i) {
      return DecodeRows{rows + i * inner * element, p.samples * packed, packed, p.head_size};
    };
    p.q = part(0), p.k = part(1), p.v = part(2);
    p.out = {all.attended, p.samples * attended, attended, p.head_size};
  }
}

Tensor decode_layers(const Tensor& x, const Tensor& slot, Tensors parameters, Tensors text,
                     Tensors image, Tensors scales, std::string kinds, std::vector<int64_t> rules,
                     std::vector<double> eps, double slope) {
  const size_t count = parameters.size() / kLayerParameters;
  const bool whole = count > 0 && parameters.size() == count * kLayerParameters &&
                     text.size() == 2 * count && image.size() == 2 * count &&
                     scales.size() == 2 * count && eps.size() == 2 * count;
  DALLE_LAYERS_CHECK(whole, "layers", "at least one, each with all its tensors", count);
  const bool holds = x.dim() == 2 && x.scalar_type() == ScalarType::Float && x.is_contiguous();
  DALLE_LAYERS_CHECK(holds, "x", "contiguous float32, (R, d)", tensor_text(x));
  const Tensor& keys = image[0];
  DALLE_LAYERS_CHECK(keys.dim() == 5, "image_keys", "(B, S, H, C, D)", shape_text(keys));
  const DecodeSizes shape = {keys.size(0), keys.size(1), keys.size(2), keys.size(4),
                             text[0].scalar_type()};
  DALLE_LAYERS_CHECK(x.size(0) == shape.b * shape.s, "x",
                     "of " + std::to_string(shape.b * shape.s) + " rows", shape_text(x));
  DecodeRules order = {std::istringstream(kinds), rules};
  const DecodeLayersTensors given = {parameters, text, image, scales, eps};
  DecodeLayersArgs all{};
  std::vector<DecodeLayer> layers;
  double products = 0;
  for (size_t i = 0; i < count; ++i) {
    layers.push_back(check_decode_layer(i, given, order, shape, slot, x.size(1), slope));
    const DecodeLayer& last = layers.back();
    all.slot = checked_slot(kDecodeLayers, last.attention);
    products += static_cast<double>(last.qkv.inputs) * last.qkv.outputs +
                2.0 * last.wide_in.inputs * last.wide_in.outputs;
  }
  const ElementKind type = layers[0].attention.type;
  const bool pairs = layers[0].qkv.pairs;
  DALLE_LAYERS_CHECK(type == ElementKind::kFloat || (type == ElementKind::kBFloat16 && pairs),
                     "cache", "float32, or bfloat16 with weights of bfloat16",
                     dtype_text(shape.type));
  Tensor result = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  if (x.numel() == 0) return result;

  const PackedLinearCpu& linear =
      pairs ? DALLE_SELECT_ISA_BFLOAT16(packed_linear_cpu) : DALLE_SELECT_ISA(packed_linear_cpu);
  const DecodeAttentionCpu& attention = type == ElementKind::kBFloat16
                                            ? DALLE_SELECT_ISA_BFLOAT16(decode_attention_cpu)
                                            : DALLE_SELECT_ISA(decode_attention_cpu);
  all.layers = layers.data(), all.num_layers = static_cast<int64_t>(count);
  all.rows = x.size(0), all.x = static_cast<const float*>(x.const_data_ptr());
  all.result = static_cast<float*>(result.mutable_data_ptr());
  for (const DecodeLayer& layer : layers) {
    all.workspace_bytes = std::max<int64_t>(
        all.workspace_bytes,
        static_cast<int64_t>(attention.workspace_bytes(layer.attention) + 63) / 64 * 64);
  }
  const double work = products * static_cast<double>(all.rows) / kProductsOfAThread;
  const int64_t most = torch::stable::get_num_threads();
  all.threads = static_cast<int64_t>(std::clamp(work, 1.0, static_cast<double>(most)));
  Carver counted{nullptr};
  place_buffers(all, layers, counted);
  const auto bytes = static_cast<int64_t>(counted.used);
  Tensor space = torch::stable::new_empty(x, {bytes + 64}, ScalarType::Byte);
  Carver carver{aligned_memory(space)};
  place_buffers(all, layers, carver);
  Team team(kDecodePhases * all.num_layers);
  torch::stable::parallel_for(0, all.threads, 1, [&](int64_t, int64_t) {
    Member member(team);
    run_decode_layers(member, linear, attention, all);
  });
  return result;
}

}  // namespace
}  // namespace dalle

STABLE_TORCH_LIBRARY_FRAGMENT(dalle_ext, m) {
  m.def(
      "_decode_layers(Tensor x, Tensor slot, Tensor[] parameters, Tensor[] text,"
      " Tensor(a!)[] image, Tensor(b!)[] scales, str kinds, int[] rules, float[] eps, float slope)"
      " -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(dalle_ext, CPU, m) {
  m.impl("_decode_layers", TORCH_BOX(&dalle::decode_layers));
}
