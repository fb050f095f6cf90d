// AREA resize with aligned corners, the one the paper's augmentations name (listings 1 and 2).
//
// Output pixel y averages the input interval [y * s, (y + 1) * s) with s = (in - 1) / (out - 1) (s
// = in / out when out is 1); the part of the interval past the border repeats the last pixel. These
// are TensorFlow's rules for resize_area with align_corners=True.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace dalle {

// The weights of one output pixel along one axis: pixels first .. first + weights.size() - 1.
struct AreaSpan {
  int64_t first;
  std::vector<float> weights;  // sum to 1
};

inline std::vector<AreaSpan> area_spans(int64_t in_size, int64_t out_size) {
  const double scale = out_size > 1 ? static_cast<double>(in_size - 1) / (out_size - 1)
                                    : static_cast<double>(in_size) / out_size;
  std::vector<AreaSpan> spans(out_size);
  for (int64_t out = 0; out < out_size; ++out) {
    const double begin = out * scale, end = (out + 1) * scale;
    const int64_t first = std::min<int64_t>(static_cast<int64_t>(std::floor(begin)), in_size - 1);
    AreaSpan& span = spans[out];
    span.first = first;
    if (scale <= 0) {  // one input pixel
      span.weights = {1.0f};
      continue;
    }
    double sum = 0;
    std::vector<double> weights;
    for (int64_t pixel = static_cast<int64_t>(std::floor(begin)); pixel < end; ++pixel) {
      const double cover = std::min<double>(pixel + 1, end) - std::max<double>(pixel, begin);
      const int64_t inside = std::min(pixel, in_size - 1) - first;
      if (inside >= static_cast<int64_t>(weights.size())) weights.resize(inside + 1, 0.0);
      weights[inside] += cover;
      sum += cover;
    }
    for (double weight : weights) span.weights.push_back(static_cast<float>(weight / sum));
  }
  return spans;
}

// (in_rows, in_cols, channels) uint8 -> (out_rows, out_cols, channels) uint8, rounded to nearest
// (halves up) and clipped to 0 .. 255.
inline void area_resize(const uint8_t* image, int64_t in_rows, int64_t in_cols, int64_t channels,
                        uint8_t* out, int64_t out_rows, int64_t out_cols) {
  const std::vector<AreaSpan> rows = area_spans(in_rows, out_rows);
  const std::vector<AreaSpan> cols = area_spans(in_cols, out_cols);
  std::vector<float> line(in_cols * channels);
  for (int64_t r = 0; r < out_rows; ++r) {
    std::fill(line.begin(), line.end(), 0.0f);
    for (size_t k = 0; k < rows[r].weights.size(); ++k) {
      const uint8_t* source = image + (rows[r].first + k) * in_cols * channels;
      const float weight = rows[r].weights[k];
      for (int64_t i = 0; i < in_cols * channels; ++i) line[i] += weight * source[i];
    }
    for (int64_t c = 0; c < out_cols; ++c) {
      for (int64_t ch = 0; ch < channels; ++ch) {
        float value = 0;
        for (size_t k = 0; k < cols[c].weights.size(); ++k) {
          value += cols[c].weights[k] * line[(cols[c].first + k) * channels + ch];
        }
        const float rounded = std::floor(value + 0.5f);
        out[(r * out_cols + c) * channels + ch] =
            static_cast<uint8_t>(std::clamp(rounded, 0.0f, 255.0f));
      }
    }
  }
}

}  // namespace dalle
