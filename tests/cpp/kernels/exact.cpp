// The ops that come to the same bits everywhere, against their definition element by element.
#include <algorithm>
#include <iterator>

#include "adam16/adam16_cpu.h"
#include "check.h"
#include "formats/formats_cpu.h"
#include "grad_scale/grad_scale_cpu.h"
#include "gumbel_softmax/gumbel_softmax_cpu.h"

namespace dalle {
namespace {

// Numbers of all sizes, and the special ones.
std::vector<float> mixed(size_t count, Random& random) {
  std::vector<float> result(count);
  for (float& x : result) {
    const int exponent = static_cast<int>(random.word() % 90) - 70;
    x = std::ldexp(random.uniform(), exponent);
  }
  const float special[] = {0.0f, -0.0f, HUGE_VALF, -HUGE_VALF, NAN, 16.0f, 15.99f, 0x1p-60f};
  for (size_t i = 0; i < std::size(special) && 3 * i < count; ++i) result[3 * i] = special[i];
  return result;
}

uint32_t word_of(uint64_t element, uint64_t seed) {
  return philox_subsequence(element / 4, seed).word[element % 4];
}

int64_t units_of(int64_t numel, int64_t unit) { return ceil_div(numel, unit); }

template <Format kFormat>
void test_format(Checks& checks, ElementKind kind, bool drawn) {
  const FormatsCpu& cpu = DALLE_SELECT_ISA(formats_cpu);
  const int64_t n = 5003, seed = -77;
  Random random;
  Stored x(kind, mixed(n, random)), back(kind, n), expected_back(kind, n);
  std::vector<uint16_t> codes(n), expected(n);
  std::vector<int64_t> counts(kNumCounts, 0), expected_counts(kNumCounts, 0);
  cpu.pack({x.data(), drawn ? &seed : nullptr, codes.data(), counts.data(), n, kFormat, kind}, 0,
           units_of(n, kFormatsUnit));
  const auto encoded = [&](float value, int64_t i, std::vector<int64_t>& found) {
    const uint32_t added =
        drawn ? stochastic<kFormat>(word_of(i, seed)) : uint32_t{FormatOf<kFormat>::kHalfUlp};
    const uint32_t bits = bits_of(value), magnitude = bits & 0x7FFFFFFFu;
    const uint32_t code = encode<kFormat>(bits, added);
    const bool finite = std::isfinite(value), flushed = finite && value != 0 && code == 0;
    found[kNonfinite] += !finite;
    found[kFlushed] += flushed;
    found[kSaturated] += finite && !flushed && magnitude > FormatOf<kFormat>::kMax;
    return static_cast<uint16_t>(code);
  };
  for (int64_t i = 0; i < n; ++i) expected[i] = encoded(x.at(i), i, expected_counts);
  checks.same("pack", codes, expected);
  checks.same("pack counts", counts, expected_counts);

  cpu.unpack({codes.data(), back.data(), n, kFormat, kind}, 0, units_of(n, kFormatsUnit));
  for (int64_t i = 0; i < n; ++i) {
    expected_back.set(i, float_with(decode<kFormat>(uint32_t{codes[i]})));
  }
  same(checks, "unpack", back, expected_back);

  constexpr int64_t kBuffers = 3;
  const int64_t length = n / kBuffers;
  std::vector<uint16_t> sum(length), expected_sum(length);
  std::fill(counts.begin(), counts.end(), 0);
  std::fill(expected_counts.begin(), expected_counts.end(), 0);
  cpu.reduce(
      {codes.data(), drawn ? &seed : nullptr, sum.data(), counts.data(), kBuffers, length, kFormat},
      0, units_of(length, kFormatsUnit));
  for (int64_t i = 0; i < length; ++i) {
    float total = 0;
    for (int64_t r = 0; r < kBuffers; ++r) {
      total += float_with(decode<kFormat>(uint32_t{codes[r * length + i]}));
    }
    expected_sum[i] = encoded(total, i, expected_counts);
  }
  checks.same("sum_codes", sum, expected_sum);
  checks.same("sum_codes counts", counts, expected_counts);
}

template <ElementKind kKind>
float rounded(float x, uint32_t word) {
  return float_with(round_stochastically<kKind>(bits_of(x), word));
}
float rounded(ElementKind kind, float x, uint32_t word) {
  if (kind == ElementKind::kHalf) return rounded<ElementKind::kHalf>(x, word);
  if (kind == ElementKind::kBFloat16) return rounded<ElementKind::kBFloat16>(x, word);
  return x;
}

// One tensor of AdamW, and what three updates make of it.
struct AdamCase {
  Stored param, grad;
  std::vector<uint16_t> mean, variance;           // codes
  std::vector<float> exact_mean, exact_variance;  // or floats
  bool coded;
  int64_t step = 0;

  void update(const AdamArgs& args, const TableRow& row) {
    for (size_t i = 0; i < param.size(); ++i) {
      const int64_t chunk = row.first_chunk + static_cast<int64_t>(i) / kTableChunk;
      const int64_t at = static_cast<int64_t>(i) % kTableChunk;
      const AdamFactors f = adam_factors(args, row, chunk);
      const float g = grad.at(i) * f.grad_factor;
      const float m = coded ? float_with(decode<Format::k169>(uint32_t{mean[i]})) : exact_mean[i];
      const float v =
          coded ? float_with(decode<Format::k0610>(uint32_t{variance[i]})) : exact_variance[i];
      const float new_mean = f.beta1 * m + f.one_minus_beta1 * g;
      float new_variance = f.beta2 * v + f.one_minus_beta2 * (g * g);
      new_variance = new_variance > f.variance_max ? f.variance_max : new_variance;
      const float update =
          new_mean / (std::sqrt(new_variance) * f.inverse_sqrt_correction2 + f.eps);
      float value = param.at(i) * f.decay - f.step_size * update;
      if (coded) {
        const uint32_t word = moments_word(f.offset + static_cast<uint32_t>(at) * kWeylIncrement);
        const uint32_t bits = bits_of(new_variance);
        const float scaled = new_variance * kProbabilityScale;
        const auto probability = bits < kCode1 ? static_cast<uint32_t>(scaled) : 0;
        mean[i] = static_cast<uint16_t>(mean_code(bits_of(new_mean), word));
        variance[i] = static_cast<uint16_t>(variance_code(bits, probability, word));
      } else {
        exact_mean[i] = new_mean;
        exact_variance[i] = new_variance;
      }
      if (args.stochastic) {
        const uint64_t call = first_call(chunk) + static_cast<uint64_t>(at) / 4;
        value = rounded(param.kind, value, philox_subsequence(call, f.seed).word[at % 4]);
      }
      param.set(i, value);
    }
  }
};

TableRow row_of(std::initializer_list<const void*> data, std::initializer_list<ElementKind> kinds,
                int64_t numel, int64_t first_chunk, int64_t group) {
  TableRow row = {};
  int column = 0;
  for (const void* p : data)
    row.data[column++] = static_cast<int64_t>(reinterpret_cast<intptr_t>(p));
  column = 0;
  for (const ElementKind kind : kinds)
    row.kinds |= int64_t{static_cast<int>(kind)} << (4 * column++);
  row.numel = numel;
  row.first_chunk = first_chunk;
  row.group = group;
  return row;
}

}  // namespace

void test_formats(Checks& checks) {
  for (const ElementKind kind : kStorageKinds) {
    for (const bool drawn : {false, true}) {
      test_format<Format::k169>(checks, kind, drawn);
      test_format<Format::k0610>(checks, kind, drawn);
    }
  }
}

void test_adam16(Checks& checks) {
  Random random;
  std::vector<AdamCase> cases;
  for (const ElementKind param : kStorageKinds) {
    for (const ElementKind grad : kStorageKinds) {
      for (const bool coded : {false, true}) {
        const size_t n = cases.empty() ? 33000 : 517 + cases.size();
        const size_t codes = coded ? n : 0, floats = coded ? 0 : n;
        cases.push_back({Stored(param, random.floats(n)), Stored(grad, n),
                         std::vector<uint16_t>(codes), std::vector<uint16_t>(codes),
                         std::vector<float>(floats), std::vector<float>(floats), coded});
      }
    }
  }
  std::vector<AdamCase> expected = cases;
  const float scale = 2.0f, clip = 0.75f;
  const int64_t seed = 5;
  for (const float size : {1.0f, 1e-4f, 3e-9f}) {
    std::vector<TableRow> rows, expected_rows;
    int64_t chunks = 0;
    for (size_t i = 0; i < cases.size(); ++i) {
      const std::vector<float> grads = random.floats(cases[i].param.size(), size);
      for (AdamCase* one : {&cases[i], &expected[i]}) {
        one->grad = Stored(one->grad.kind, grads);
        const ElementKind moments = one->coded ? ElementKind::kShort : ElementKind::kFloat;
        const void* mean =
            one->coded ? static_cast<void*>(one->mean.data()) : one->exact_mean.data();
        const void* variance =
            one->coded ? static_cast<void*>(one->variance.data()) : one->exact_variance.data();
        (one == &cases[i] ? rows : expected_rows)
            .push_back(
                row_of({one->param.data(), one->grad.data(), mean, variance, &one->step},
                       {one->param.kind, one->grad.kind, moments, moments, ElementKind::kLong},
                       static_cast<int64_t>(grads.size()), chunks, 0));
      }
      chunks += ceil_div(static_cast<int64_t>(grads.size()), kTableChunk);
    }
    AdamArgs args = {};
    args.table = {rows.data(), static_cast<int64_t>(rows.size()), chunks};
    args.scales = &scale;
    args.clip_factor = &clip;
    args.seed = &seed;
    args.stochastic = size < 1.0f;
    args.lr = 1e-2, args.beta1 = 0.9, args.beta2 = 0.999, args.eps = 1e-8;
    args.weight_decay = 0.1, args.variance_clip = 5.0;
    DALLE_SELECT_ISA(adam16_cpu).chunks(args, 0, chunks);
    for (size_t i = 0; i < cases.size(); ++i) {
      expected[i].update(args, expected_rows[i]);
      same(checks, "adam16 parameters", cases[i].param, expected[i].param);
      checks.same("adam16 mean codes", cases[i].mean, expected[i].mean);
      checks.same("adam16 variance codes", cases[i].variance, expected[i].variance);
      checks.same("adam16 means", cases[i].exact_mean, expected[i].exact_mean);
      checks.same("adam16 variances", cases[i].exact_variance, expected[i].exact_variance);
      ++cases[i].step;
      ++expected[i].step;
    }
  }
}

void test_grad_scale(Checks& checks) {
  const GradScaleCpu& cpu = DALLE_SELECT_ISA(grad_scale_cpu);
  Random random;
  const int64_t n = 9001;
  const float scale = 0x1.8p5f;
  for (const ElementKind from : kStorageKinds) {
    Stored grad(from, mixed(n, random));
    for (const ElementKind to : kStorageKinds) {
      Stored out(to, n), expected(to, n);
      std::vector<int64_t> counts(kNumScaleCounts, 0);
      cpu.scale({grad.data(), &scale, out.data(), counts.data(), n, from, to}, 0,
                units_of(n, kGradScaleUnit));
      for (int64_t i = 0; i < n; ++i) {
        const float x = grad.at(i);
        expected.set(i, x * scale);
        const bool fits = std::isfinite(x) && std::isfinite(expected.at(i));
        if (!fits) expected.set(i, 0.0f);
      }
      same(checks, "scale_gradient", out, expected);
      checks.same("scale_gradient counts", counts, counts);  // into the hash
    }
    const std::vector<float> stream = random.floats(n);
    std::vector<float> out(n), expected(n);
    cpu.unscale({stream.data(), grad.data(), &scale, out.data(), n, from}, 0,
                units_of(n, kGradScaleUnit));
    for (int64_t i = 0; i < n; ++i) {
      const float quotient = grad.at(i) / scale;
      expected[i] = stream[i] + (std::isfinite(quotient) ? quotient : 0.0f);
    }
    checks.same("unscale_gradient", out, expected);
  }
  for (const ElementKind kind : kStorageKinds) {
    for (const bool finite : {true, false}) {
      const int64_t count = kTableChunk + 4133;
      std::vector<float> values = random.floats(count, 1e-3f);
      if (!finite) values = mixed(count, random);
      Stored grads(kind, values), expected(kind, values);
      const TableRow row = row_of({grads.data()}, {kind}, count, 0, 0);
      ChunkStats stats[2] = {};
      GroupStatsArgs args = {};
      args.table = {&row, 1, 2};
      args.scales = &scale;
      args.chunks = stats;
      args.num_groups = 1;
      cpu.chunks(args, 0, 2);
      std::vector<double> squares, expected_squares;
      std::vector<int64_t> counts, expected_counts;
      for (int chunk = 0; chunk < 2; ++chunk) {
        const ChunkSpan span = span_of(row, chunk);
        double sums[16] = {}, total = 0;
        int64_t nonfinite = 0, zeros = 0;
        for (int64_t begin = 0; begin < span.count; begin += 4096) {
          float part[16] = {};
          for (int64_t i = begin; i < std::min(begin + 4096, span.count); ++i) {
            const float x = expected.at(span.begin + i);
            nonfinite += !std::isfinite(x);
            zeros += x == 0;
            if (std::isfinite(x)) part[i % 16] += x * x;
          }
          for (int s = 0; s < 16; ++s) sums[s] += part[s];
        }
        for (const double sum : sums) total += sum;
        squares.push_back(stats[chunk].squares);
        expected_squares.push_back(total);
        counts.insert(counts.end(), {stats[chunk].counts[0], stats[chunk].counts[1]});
        expected_counts.insert(expected_counts.end(), {nonfinite, zeros});
      }
      for (int64_t i = 0; i < count; ++i) expected.set(i, expected.at(i) / scale);
      checks.same("unscale_gradients squares", squares, expected_squares);
      checks.same("unscale_gradients counts", counts, expected_counts);
      same(checks, "unscale_gradients", grads, expected);
    }
  }
}

void test_gumbel_words(Checks& checks) {
  for (const uint64_t seed : {uint64_t{0}, uint64_t{42}, ~uint64_t{0}}) {
    std::vector<uint32_t> words(4096), expected(4096);
    DALLE_SELECT_ISA(gumbel_softmax_cpu).words(seed, 4096, words.data());
    for (size_t e = 0; e < words.size(); ++e) expected[e] = word_of(e, seed);
    checks.same("gumbel_softmax words", words, expected);
  }
}

}  // namespace dalle
