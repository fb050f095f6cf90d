// Checks the arguments of decode_layers once and makes plain data of them.
#pragma once

#include <cmath>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "decode_attention/decode_attention.hpp"
#include "decode_layers/decode_layers.h"
#include "packed_linear/packed_linear.hpp"

namespace dalle {

using Tensors = std::vector<Tensor>;

constexpr const char* kDecodeLayers = "DecodeLayers";  // what begins a message
#define DALLE_LAYERS_CHECK(condition, argument, requirement, ...) \
  DALLE_CHECK(condition, kDecodeLayers, argument, requirement, __VA_ARGS__)

// Of each layer in `parameters`: gain, shift, weight and bias of qkv; weight and bias of out; gain,
// shift, weight and bias of wide_in; weight and bias of wide_out.
constexpr size_t kLayerParameters = 12;

struct DecodeLayersTensors {
  const Tensors &parameters, &text, &image, &scales;  // the others keys, values of each layer
  const std::vector<double>& eps;                     // of both norms of each layer
};

// A product by its packed weight and its bias.
inline PackedLinearArgs check_product(const Tensor& weight, const Tensor& bias, int64_t inputs,
                                      int64_t outputs, bool pairs) {
  PackedLinearArgs args = check_packed_weight(
      kDecodeLayers, weight, inputs, outputs,
      "packed for " + std::to_string(inputs) + " inputs, " + std::to_string(outputs) + " outputs");
  DALLE_LAYERS_CHECK(args.pairs == pairs, "weights", "of one dtype",
                     dtype_text(weight.scalar_type()));
  args.bias = check_floats(kDecodeLayers, "bias", bias, {outputs});
  return args;
}

// Where the patterns of the layers are read from; goes on from layer to layer.
struct DecodeRules {
  std::istringstream kinds;
  const std::vector<int64_t>& numbers;
  size_t at = 0;
};

// All but what depends on the buffers. `shape` is that of q, the same for all layers.
inline DecodeLayer check_decode_layer(size_t i, const DecodeLayersTensors& given,
                                      DecodeRules& rules, const DecodeSizes& shape,
                                      const Tensor& slot, int64_t width, double slope) {
  DecodeLayer layer{};
  const Tensor* p = &given.parameters[i * kLayerParameters];
  const int64_t inner = shape.h * shape.d;
  const bool pairs = given.parameters[2].scalar_type() == ScalarType::BFloat16;
  DALLE_LAYERS_CHECK(p[9].dim() == 1, "bias", "(F)", shape_text(p[9]));
  const int64_t hidden = p[9].size(0);
  layer.qkv = check_product(p[2], p[3], width, 3 * inner, pairs);
  layer.out = check_product(p[4], p[5], inner, width, pairs);
  layer.wide_in = check_product(p[8], p[9], width, hidden, pairs);
  layer.wide_out = check_product(p[10], p[11], hidden, width, pairs);
  layer.qkv.gain = check_floats(kDecodeLayers, "gain", p[0], {width});
  layer.qkv.shift = check_floats(kDecodeLayers, "shift", p[1], {width});
  layer.wide_in.gain = check_floats(kDecodeLayers, "gain", p[6], {width});
  layer.wide_in.shift = check_floats(kDecodeLayers, "shift", p[7], {width});
  layer.qkv.eps = static_cast<float>(given.eps[2 * i]);
  layer.wide_in.eps = static_cast<float>(given.eps[2 * i + 1]);
  layer.wide_in.slope = static_cast<float>(slope);

  std::string kind;
  rules.kinds >> kind;
  const std::vector<int64_t>& numbers = rules.numbers;
  const size_t first = rules.at + 3;
  const bool there = first <= numbers.size() && numbers[first - 1] >= 0 &&
                     first + static_cast<size_t>(numbers[first - 1]) <= numbers.size();
  DALLE_LAYERS_CHECK(there, "rules", "rows, columns, a count and so many bounds for each layer",
                     numbers.size(), " numbers");
  const auto bounds = numbers.begin() + static_cast<int64_t>(first);
  const std::vector<int64_t> runs(bounds, bounds + numbers[first - 1]);
  std::optional<Tensor> key_scales, value_scales;
  if (given.image[2 * i].scalar_type() == ScalarType::Char) {  // else the scales are not read
    key_scales = given.scales[2 * i], value_scales = given.scales[2 * i + 1];
  }
  const DecodeTensors cache = {given.text[2 * i],  given.text[2 * i + 1],
                               given.image[2 * i], given.image[2 * i + 1],
                               key_scales,         value_scales};
  layer.attention =
      check_decode_cache(kDecodeLayers, slot, shape, cache, slot, kind, numbers[first - 3],
                         numbers[first - 2], runs, 1 / std::sqrt(static_cast<double>(shape.d)));
  rules.at = first + runs.size();
  return layer;
}

}  // namespace dalle
