// Decode attention against its definition in double, whose last bits depend on the processor.
#include <algorithm>
#include <memory>
#include <new>

#include "check.h"
#include "decode_attention/decode_attention_cpu.h"

namespace dalle {
namespace {

constexpr int32_t kCaptions = 2, kHeads = 2;

// Numbers in their storage type, and as doubles.
struct Numbers {
  ElementKind kind;
  Stored stored;
  std::vector<double> doubles;

  Numbers(ElementKind kind, const std::vector<float>& values)
      : kind(kind), stored(kind == ElementKind::kDouble ? ElementKind::kFloat : kind, values) {
    for (size_t i = 0; i < values.size(); ++i) doubles.push_back(stored.at(i));
  }
  void* data() { return kind == ElementKind::kDouble ? doubles.data() : stored.data(); }
  std::vector<double> values() const {
    if (kind == ElementKind::kDouble) return doubles;
    const std::vector<float> floats = stored.values();
    return {floats.begin(), floats.end()};
  }
};

void test_decode_attention_of(Checks& checks, const AttentionRule& rule, ElementKind kind,
                              int32_t samples, int32_t size, bool coded) {
  const DecodeAttentionCpu& cpu = kind == ElementKind::kBFloat16
                                      ? DALLE_SELECT_ISA_BFLOAT16(decode_attention_cpu)
                                      : DALLE_SELECT_ISA(decode_attention_cpu);
  const int32_t capacity = decode_capacity(rule), text = rule.text_len;
  const int32_t slot = rule.rows * rule.columns - 2;
  const int64_t rows = int64_t{kCaptions} * samples * kHeads, heads = kCaptions * kHeads;
  Random random;
  Numbers q(kind, random.floats(rows * size, 2)), k(kind, random.floats(rows * size, 2));
  Numbers v(kind, random.floats(rows * size)), out(kind, random.floats(rows * size, 0));
  Numbers text_keys(kind, random.floats(heads * text * size, 2));
  Numbers text_values(kind, random.floats(heads * text * size));
  Numbers keys(kind, random.floats(rows * capacity * size, 2));
  Numbers values(kind, random.floats(rows * capacity * size));
  std::vector<int8_t> key_codes(rows * capacity * size), value_codes(rows * capacity * size);
  std::vector<float> key_scales(rows * capacity, 0.01f), value_scales(rows * capacity, 0.01f);
  for (size_t i = 0; coded && i < key_codes.size(); ++i) {
    keys.doubles[i] = double{0.01f} * (key_codes[i] = static_cast<int8_t>(random.word() >> 24));
    values.doubles[i] = double{0.01f} * (value_codes[i] = static_cast<int8_t>(random.word() >> 24));
  }
  const auto rows_of = [&](Numbers& x) {
    return DecodeRows{x.data(), int64_t{samples} * kHeads * size, int64_t{kHeads} * size, size};
  };
  DecodeAttentionParams p = {};
  p.rule = rule, p.capacity = capacity, p.type = kind, p.coded = coded;
  p.batch = kCaptions, p.samples = samples, p.heads = kHeads, p.head_size = size;
  p.scale = 0.25;
  p.q = rows_of(q), p.k = rows_of(k), p.v = rows_of(v), p.out = rows_of(out);
  p.text_keys = text_keys.data(), p.text_values = text_values.data();
  p.image_keys = coded ? key_codes.data() : keys.data();
  p.image_values = coded ? value_codes.data() : values.data();
  p.key_scales = key_scales.data(), p.value_scales = value_scales.data();
  void* const space = ::operator new(cpu.workspace_bytes(p) + 64, std::align_val_t{64});
  const int64_t tasks = heads * ceil_div(samples, cpu.task_samples(kind));
  cpu.run(p, slot, space, 0, tasks / 2);
  cpu.run(p, slot, space, tasks / 2, tasks);
  ::operator delete(space, std::align_val_t{64});

  std::vector<double> want(rows * size);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t b = row / kHeads / samples, head = (b * kHeads + row % kHeads) * text;
    const int64_t place = row * capacity + decode_place(rule, slot);
    for (int32_t d = 0; d < size; ++d) {
      const size_t at = place * size + d;
      keys.doubles[at] =
          coded ? key_codes[at] * double{key_scales[place]} : k.doubles[row * size + d];
      values.doubles[at] =
          coded ? value_codes[at] * double{value_scales[place]} : v.doubles[row * size + d];
      // A code is off by half its scale at most.
      const double off = std::fabs(keys.doubles[at] - k.doubles[row * size + d]);
      if (coded && off > 0.501 * key_scales[place])
        checks.fail("decode_attention code", at, off, 0);
    }
    std::vector<std::pair<const double*, const double*>> seen;
    for (int32_t t = 0; t < text; ++t) {
      const size_t at = (head + t) * size;
      seen.emplace_back(&text_keys.doubles[at], &text_values.doubles[at]);
    }
    for (int32_t o = 0; o <= slot; ++o) {
      if (!attends_offset(rule, o)) continue;
      const size_t at = (row * capacity + decode_place(rule, slot - o)) * size;
      seen.emplace_back(&keys.doubles[at], &values.doubles[at]);
    }
    std::vector<double> scores;
    for (const auto& [key, value] : seen) {
      double sum = 0;
      for (int32_t d = 0; d < size; ++d) sum += q.doubles[row * size + d] * key[d];
      scores.push_back(sum * p.scale);
    }
    const double most = *std::max_element(scores.begin(), scores.end());
    double sum = 0;
    for (double& s : scores) sum += s = std::exp(s - most);
    for (size_t i = 0; i < seen.size(); ++i) {
      for (int32_t d = 0; d < size; ++d)
        want[row * size + d] += scores[i] / sum * seen[i].second[d];
    }
  }
  const double tolerance = kind == ElementKind::kDouble  ? 1e-12
                           : kind == ElementKind::kFloat ? 1e-5
                           : kind == ElementKind::kHalf  ? 6e-4
                                                         : 1e-2;
  checks.close("decode_attention", out.values(), want, tolerance);
}

}  // namespace

void test_decode_attention(Checks& checks) {
  const AttentionRule rules[] = {{AttentionKind::kRow, 7, 6, 6, 0, {}},
                                 {AttentionKind::kColumn, 67, 6, 6, 0, {}},
                                 {AttentionKind::kOffsets, 0, 6, 6, 2, {0, 2, 5, 8}},
                                 {AttentionKind::kCausal, 130, 9, 8, 0, {}}};
  for (const AttentionRule& rule : rules) {
    for (const ElementKind kind :
         {ElementKind::kFloat, ElementKind::kDouble, ElementKind::kHalf, ElementKind::kBFloat16}) {
      for (const int32_t samples : {1, 3, 7, 40}) {
        for (const int32_t size : {20, 64}) {
          test_decode_attention_of(checks, rule, kind, samples, size, false);
          if (!reads_runs(rule.kind))
            test_decode_attention_of(checks, rule, kind, samples, size, true);
        }
      }
    }
  }
}

}  // namespace dalle
