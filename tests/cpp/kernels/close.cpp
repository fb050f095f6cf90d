// The ops whose last bits depend on the processor, against their definition in double.
#include <algorithm>
#include <memory>
#include <new>

#include "check.h"
#include "gumbel_softmax/gumbel_softmax_cpu.h"
#include "powersgd/powersgd_pack.h"
#include "sparse_attention/sparse_attention_cpu.h"
#include "sparse_attention/sparse_attention_tiles.h"

namespace dalle {
namespace {

struct AlignedDelete {
  void operator()(char* p) const { ::operator delete(p, std::align_val_t{64}); }
};
std::unique_ptr<char, AlignedDelete> aligned(size_t bytes) {
  return std::unique_ptr<char, AlignedDelete>(
      static_cast<char*>(::operator new(bytes + 64, std::align_val_t{64})));
}

// Half a unit in the last place of a storage format, and what the kernels add to it.
double tolerance_of(ElementKind kind) {
  return kind == ElementKind::kDouble  ? 1e-12
         : kind == ElementKind::kFloat ? 1e-5
         : kind == ElementKind::kHalf  ? 6e-4
                                       : 5e-3;
}

double value_of_code(uint16_t code) { return float_with(decode<Format::k169>(uint32_t{code})); }
std::vector<double> values_of_codes(const std::vector<uint16_t>& codes) {
  std::vector<double> result;
  for (const uint16_t code : codes) result.push_back(value_of_code(code));
  return result;
}

void test_powersgd_of(Checks& checks, ElementKind kind, int64_t rows, int64_t columns,
                      int64_t rank) {
  const PowersgdCpu& cpu = DALLE_SELECT_ISA(powersgd_cpu);
  Random random;
  Stored grad(kind, random.floats(rows * columns));
  const std::vector<float> q = random.floats(columns * rank), p = random.floats(rows * rank);
  std::vector<uint16_t> error(rows * columns);
  for (uint16_t& code : error) {
    code = static_cast<uint16_t>(encode<Format::k169>(bits_of(random.uniform()), 0u));
  }
  const std::vector<double> before = values_of_codes(error);
  const float scale = 2.0f;
  PowerMatrix m = {};
  m.rows = rows, m.columns = columns, m.rank = rank, m.grad_kind = kind, m.error = error.data();
  PowerFactors f = {&scale, nullptr, 4.0f, 0.0f};
  std::vector<float> scratch(scratch_floats(m));

  std::vector<float> out(rows * rank);
  m.grad = grad.data(), m.right = q.data(), m.out = out.data();
  const std::vector<float> right = packed_with_tail(m);
  for (int64_t i = 0; i < ceil_div(rows, kPanelRows); ++i) {
    cpu.compress(m, f, right.data(), scratch.data(), i);
  }
  std::vector<double> sums, want(rows * rank, 0.0);
  for (int64_t i = 0; i < rows * columns; ++i) sums.push_back(before[i] + grad.at(i) * 2.0);
  checks.close("powersgd error", values_of_codes(error), sums, 0x1p-9);
  for (int64_t i = 0; i < rows * rank; ++i) {
    for (int64_t k = 0; k < columns; ++k) {
      want[i] += value_of_code(error[i / rank * columns + k]) * q[k * rank + i % rank] / 4.0;
    }
  }
  checks.close("powersgd compress", out, want, 1e-4);

  std::vector<float> back(columns * rank);
  m.left = p.data(), m.out = back.data();
  const std::vector<float> left = packed_blocks(p.data(), rows, rank, rank, 1);
  for (int64_t i = 0; i < ceil_div(columns, kPanelColumns); ++i) {
    cpu.project(m, f, left.data(), scratch.data(), i);
  }
  want.assign(columns * rank, 0.0);
  for (int64_t i = 0; i < columns * rank; ++i) {
    for (int64_t k = 0; k < rows; ++k) {
      want[i] += value_of_code(error[k * columns + i / rank]) * p[k * rank + i % rank] / 4.0;
    }
  }
  checks.close("powersgd project", back, want, 1e-4);

  std::vector<float> product(rows * columns);
  f.error_scale = 1.0f, f.feedback = 0.5f;
  m.out = product.data();
  const std::vector<double> kept = values_of_codes(error);
  const std::vector<float> transposed = packed_blocks(q.data(), rank, columns, 1, rank);
  for (int64_t i = 0; i < ceil_div(rows, kPanelRows); ++i) {
    cpu.decompress(m, f, transposed.data(), scratch.data(), i);
  }
  want.assign(rows * columns, 0.0);
  std::vector<double> rest;
  for (int64_t i = 0; i < rows * columns; ++i) {
    for (int64_t k = 0; k < rank; ++k) {
      want[i] += double{p[i / columns * rank + k]} * q[i % columns * rank + k];
    }
    rest.push_back(kept[i] - want[i] / 2);
  }
  checks.close("powersgd decompress", product, want, 1e-5);
  checks.close("powersgd feedback", values_of_codes(error), rest, 0x1p-9);
}

void test_gumbel_softmax_of(Checks& checks, ElementKind kind, int64_t outer, int64_t codes,
                            int64_t inner) {
  const GumbelSoftmaxCpu& cpu = DALLE_SELECT_ISA(gumbel_softmax_cpu);
  Random random;
  const GumbelSoftmaxParams p = {outer, codes, inner, kind, 3};
  const size_t n = outer * codes * inner, rows = num_rows(p);
  const double tau = 0.75;
  const int64_t seed = 11;
  Stored logits(kind, random.floats(n, 4.0f)), grad_sample(kind, random.floats(n));
  Stored sample(kind, n), grad_logits(kind, n);
  const std::vector<float> grad_kl = random.floats(rows);
  std::vector<int64_t> index(rows);
  std::vector<float> kl(rows), stats(rows * kNumStats);
  const auto scratch = aligned(cpu.scratch_floats(p) * sizeof(float));
  float* const floats = reinterpret_cast<float*>(scratch.get());
  cpu.forward(
      p, {logits.data(), &tau, &seed, sample.data(), index.data(), kl.data(), stats.data(), false},
      0, cpu.num_units(p), floats);
  cpu.backward(p,
               {grad_sample.data(), grad_kl.data(), logits.data(), &tau, &seed, kl.data(),
                stats.data(), grad_logits.data()},
               0, cpu.num_units(p), floats);
  std::vector<double> want_sample(n), want_grad(n), want_kl(rows), want_index(rows);
  for (size_t row = 0; row < rows; ++row) {
    std::vector<double> l(codes), noisy(codes), y(codes), g(codes);
    for (int64_t k = 0; k < codes; ++k) {
      const uint64_t e = element_of(p, row) + k;
      const double u = (philox_subsequence(e / 4, seed).word[e % 4] + 0.5) * 0x1p-32;
      l[k] = logits.at(offset_of(p, row, k));
      g[k] = grad_sample.at(offset_of(p, row, k));
      noisy[k] = l[k] - std::log(-std::log(u));
    }
    const auto best = std::max_element(noisy.begin(), noisy.end());
    const double most = *std::max_element(l.begin(), l.end());
    want_index[row] = static_cast<double>(best - noisy.begin());
    double sum = 0, plain = 0, dot = 0;
    for (int64_t k = 0; k < codes; ++k) sum += y[k] = std::exp((noisy[k] - *best) / tau);
    for (int64_t k = 0; k < codes; ++k) plain += std::exp(l[k] - most);
    for (int64_t k = 0; k < codes; ++k) dot += (y[k] /= sum) * g[k];
    want_kl[row] = std::log(static_cast<double>(codes));
    for (int64_t k = 0; k < codes; ++k) {
      want_kl[row] += std::exp(l[k] - most) / plain * (l[k] - most - std::log(plain));
    }
    for (int64_t k = 0; k < codes; ++k) {
      const double log_p = l[k] - most - std::log(plain), gap = std::log(codes) - want_kl[row];
      want_sample[offset_of(p, row, k)] = y[k];
      want_grad[offset_of(p, row, k)] =
          y[k] * (g[k] - dot) / tau + grad_kl[row] * std::exp(log_p) * (log_p + gap);
    }
  }
  checks.close("gumbel_softmax index", index, want_index, 0);
  checks.close("gumbel_softmax kl", kl, want_kl, 1e-5);
  checks.close("gumbel_softmax sample", sample.values(), want_sample, tolerance_of(kind));
  checks.close("gumbel_softmax gradient", grad_logits.values(), want_grad, tolerance_of(kind));
}

constexpr int32_t kHeads = 2, kBatch = 2;

// One (B, H, T, D) tensor of any type, and the same numbers in double.
struct Tensor4 {
  ElementKind kind;
  Stored stored;
  std::vector<double> doubles;
  int64_t length, size;

  Tensor4(ElementKind kind, int64_t length, int64_t size, const std::vector<float>& values)
      : kind(kind),
        stored(kind == ElementKind::kDouble ? ElementKind::kFloat : kind, values),
        length(length),
        size(size) {
    for (size_t i = 0; i < values.size(); ++i) doubles.push_back(stored.at(i));
  }
  AttentionRows rows() {
    void* const data = kind == ElementKind::kDouble ? doubles.data() : stored.data();
    return {data, kHeads * length * size, length * size, size};
  }
  std::vector<double> values() const {
    if (kind == ElementKind::kDouble) return doubles;
    const std::vector<float> floats = stored.values();
    return {floats.begin(), floats.end()};
  }
};

const SparseAttentionCpu& attention_kernels(ElementKind kind) {
  if (kind == ElementKind::kBFloat16) return DALLE_SELECT_ISA_BFLOAT16(sparse_attention_cpu);
  return DALLE_SELECT_ISA(sparse_attention_cpu);
}

void test_sparse_attention_of(Checks& checks, const AttentionRule& rule, ElementKind kind,
                              int32_t size) {
  const SparseAttentionCpu& cpu = attention_kernels(kind);
  const int32_t length = rule.text_len + rule.rows * rule.columns;
  const size_t n = static_cast<size_t>(kBatch) * kHeads * length * size;
  Random random;
  const auto fresh = [&](float scale) {
    return Tensor4(kind, length, size, random.floats(n, scale));
  };
  Tensor4 q = fresh(2), k = fresh(2), v = fresh(1), grad_out = fresh(1);
  Tensor4 out = fresh(0), grad_q = fresh(0), grad_k = fresh(0), grad_v = fresh(0);
  std::vector<double> lse(n / size);
  const SparseAttentionParams p = {rule,          kind,          kBatch,        kHeads,
                                   length,        size,          0.25,          q.rows(),
                                   k.rows(),      v.rows(),      out.rows(),    grad_out.rows(),
                                   grad_q.rows(), grad_k.rows(), grad_v.rows(), lse.data()};
  const AttentionTiles walk(rule);
  const AttentionTileView view = walk.view();
  const int64_t heads = kBatch * kHeads;
  cpu.forward(p, view, aligned(cpu.forward_bytes(p, view)).get(), 0, heads * view.num_strips);

  std::vector<double> want_out(n), want_lse(n / size), want_q(n), want_k(n), want_v(n);
  for (int64_t row = 0; row < heads * length; ++row) {
    const int64_t head = row / length * length;
    const int32_t position = static_cast<int32_t>(row - head);
    std::vector<double> weight(length), grad_weight(length);
    double most = -HUGE_VAL, sum = 0, delta = 0;
    for (int32_t j = 0; j < length; ++j) {
      if (!attends(rule, position, j)) continue;
      for (int d = 0; d < size; ++d) {
        weight[j] += q.doubles[row * size + d] * k.doubles[(head + j) * size + d] * p.scale;
        grad_weight[j] += grad_out.doubles[row * size + d] * v.doubles[(head + j) * size + d];
      }
      most = std::max(most, weight[j]);
    }
    for (int32_t j = 0; j < length; ++j) {
      weight[j] = attends(rule, position, j) ? std::exp(weight[j] - most) : 0;
      sum += weight[j];
    }
    want_lse[row] = most + std::log(sum);
    for (int32_t j = 0; j < length; ++j) delta += (weight[j] /= sum) * grad_weight[j];
    for (int32_t j = 0; j < length; ++j) {
      const double grad_score = weight[j] * (grad_weight[j] - delta) * p.scale;
      for (int d = 0; d < size; ++d) {
        const int64_t query = row * size + d, key = (head + j) * size + d;
        want_out[query] += weight[j] * v.doubles[key];
        want_v[key] += weight[j] * grad_out.doubles[query];
        want_q[query] += grad_score * k.doubles[key];
        want_k[key] += grad_score * q.doubles[query];
      }
    }
  }
  // Probabilities are rounded to bfloat16 where its products run in pairs.
  const double tolerance = tolerance_of(kind) * (kind == ElementKind::kBFloat16 ? 2 : 1);
  checks.close("sparse_attention output", out.values(), want_out, tolerance);
  checks.close("sparse_attention lse", lse, want_lse, kind == ElementKind::kDouble ? 1e-12 : 1e-5);

  for (const int32_t segments : {1, std::min(2, view.num_strips)}) {
    std::vector<uint8_t> touched(segments * view.num_strips);
    for (int32_t g = 0; g < segments; ++g) {
      const int32_t first = view.strip_begin[g * view.num_strips / segments];
      const int32_t last = view.strip_begin[(g + 1) * view.num_strips / segments];
      for (int32_t t = first; t < last; ++t) touched[g * view.num_strips + view.tiles[t].panel] = 1;
    }
    const auto partial = aligned(heads * segments * cpu.partial_bytes(p, view));
    const AttentionSegments split = {segments, touched.data(), partial.get()};
    cpu.backward(p, view, split, aligned(cpu.backward_bytes(p, view)).get(), 0, heads * segments);
    if (segments > 1) cpu.backward_reduce(p, view, split, 0, heads * view.num_strips);
    checks.close("sparse_attention grad_q", grad_q.values(), want_q, 4 * tolerance);
    checks.close("sparse_attention grad_k", grad_k.values(), want_k, 4 * tolerance);
    checks.close("sparse_attention grad_v", grad_v.values(), want_v, 4 * tolerance);
  }
}

}  // namespace

void test_powersgd(Checks& checks) {
  for (const ElementKind kind : kStorageKinds) {
    test_powersgd_of(checks, kind, 37, 131, 5);
    test_powersgd_of(checks, kind, 70, 96, 33);
    test_powersgd_of(checks, kind, 12, 200, 20);
  }
}

void test_gumbel_softmax(Checks& checks) {
  for (const ElementKind kind : kStorageKinds) {
    test_gumbel_softmax_of(checks, kind, 5, 1027, 1);
    test_gumbel_softmax_of(checks, kind, 2, 100, 37);
  }
}

void test_sparse_attention(Checks& checks) {
  const AttentionRule rules[] = {{AttentionKind::kRow, 7, 6, 6, 0, {}},
                                 {AttentionKind::kColumn, 7, 6, 6, 0, {}},
                                 {AttentionKind::kOffsets, 35, 6, 6, 2, {0, 2, 5, 8}},
                                 {AttentionKind::kCausal, 40, 4, 5, 0, {}}};
  for (const AttentionRule& rule : rules) {
    for (const ElementKind kind :
         {ElementKind::kFloat, ElementKind::kDouble, ElementKind::kHalf, ElementKind::kBFloat16}) {
      test_sparse_attention_of(checks, rule, kind, 20);
      test_sparse_attention_of(checks, rule, kind, 64);
    }
  }
}

}  // namespace dalle
