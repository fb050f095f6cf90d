// A stack of decoding layers: one thread and any number leave the same bits, in the caches too.
// Under ThreadSanitizer (.ci/night) this is a test of what the phases of a team write and read.
#include <algorithm>
#include <barrier>
#include <thread>

#include "check.h"
#include "decode_layers/decode_layers.h"

namespace dalle {
namespace {

constexpr int32_t kCaptions = 2, kSamples = 9, kHeads = 3, kSize = 5;
constexpr int64_t kRows = kCaptions * kSamples, kInner = kHeads * kSize, kWidth = 21, kHidden = 100;

// Weights, caches and buffers of a step, whose width, inner width and rows are odd.
struct Stack {
  Random random;
  ElementKind kind;
  std::vector<Stored> numbers;
  std::vector<DecodeLayer> layers;
  DecodeLayersArgs all{};
  const PackedLinearCpu* linear;
  const DecodeAttentionCpu* attention;

  explicit Stack(bool rounded) : kind(rounded ? ElementKind::kBFloat16 : ElementKind::kFloat) {
    linear = rounded ? &DALLE_SELECT_ISA_BFLOAT16(packed_linear_cpu)
                     : &DALLE_SELECT_ISA(packed_linear_cpu);
    attention = rounded ? &DALLE_SELECT_ISA_BFLOAT16(decode_attention_cpu)
                        : &DALLE_SELECT_ISA(decode_attention_cpu);
    numbers.reserve(200);                  // pointers into it stay
    const int64_t row = kInner + rounded;  // of an odd length, with a zero behind it
    all.rows = kRows, all.slot = 2;
    all.x = floats(kRows * kWidth);
    all.qkv = floats(kRows * 3 * kInner), all.middle = floats(kRows * kWidth);
    all.hidden = floats(kRows * kHidden), all.normed = floats(kRows * (kHidden + 1));
    all.result = floats(kRows * kWidth);
    all.attended = stored(kind, kRows * row, 0);
    const int64_t packed = rounded ? 3 * kInner + 1 : 3 * kInner;
    all.stored = rounded ? stored(kind, kRows * packed) : nullptr;
    const AttentionRule rules[] = {{AttentionKind::kRow, 7, 2, 3, 0, {}},
                                   {AttentionKind::kColumn, 0, 2, 3, 0, {}},
                                   {AttentionKind::kCausal, 3, 2, 3, 0, {}}};
    for (const AttentionRule& rule : rules) {
      DecodeLayer layer{};
      layer.qkv = product(kWidth, 3 * kInner, true), layer.out = product(kInner, kWidth, false);
      layer.wide_in = product(kWidth, kHidden, true);
      layer.wide_out = product(kHidden, kWidth, false);
      layer.wide_in.slope = 1.702f;
      DecodeAttentionParams& p = layer.attention;
      p.rule = rule, p.capacity = decode_capacity(rule), p.type = kind, p.scale = 0.4;
      p.batch = kCaptions, p.samples = kSamples, p.heads = kHeads, p.head_size = kSize;
      char* const q = static_cast<char*>(rounded ? all.stored : all.qkv);
      const auto part = [&](int64_t i) {
        return DecodeRows{q + i * kInner * (rounded ? 2 : 4), kSamples * packed, packed, kSize};
      };
      p.q = part(0), p.k = part(1), p.v = part(2);
      p.out = {all.attended, kSamples * row, row, kSize};
      const int64_t text = int64_t{kCaptions} * rule.text_len * kInner;
      const int64_t image = kRows * kInner * p.capacity;
      p.text_keys = stored(kind, text), p.text_values = stored(kind, text);
      p.image_keys = stored(kind, image), p.image_values = stored(kind, image);
      all.workspace_bytes = std::max<int64_t>(
          all.workspace_bytes, static_cast<int64_t>(attention->workspace_bytes(p) + 63) / 64 * 64);
      layers.push_back(layer);
    }
    all.layers = layers.data(), all.num_layers = static_cast<int64_t>(layers.size());
  }

  void* stored(ElementKind of, int64_t count, float size = 1) {
    return numbers.emplace_back(of, random.floats(count, size)).data();
  }
  float* floats(int64_t count) { return static_cast<float*>(stored(ElementKind::kFloat, count)); }

  PackedLinearArgs product(int64_t inputs, int64_t outputs, bool normed) {
    PackedLinearArgs args{};
    args.inputs = inputs, args.outputs = outputs, args.eps = 1e-5f;
    args.pairs = kind == ElementKind::kBFloat16;
    const int64_t panels = ceil_div(outputs, kLinearColumns);
    args.weight = stored(kind, panels * (inputs + args.pairs * (inputs % 2)) * kLinearColumns, .3f);
    args.bias = floats(outputs);
    if (normed) args.gain = floats(inputs), args.shift = floats(inputs);
    return args;
  }

  void run(int64_t threads) {
    std::vector<char> space(threads * all.workspace_bytes + 64);
    all.threads = threads;
    all.workspace =
        reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(space.data()) + 63) / 64 * 64);
    Team team(kDecodePhases * all.num_layers);
    std::barrier start(threads);
    const auto work = [&] {
      start.arrive_and_wait();
      Member member(team);
      run_decode_layers(member, *linear, *attention, all);
    };
    std::vector<std::thread> others;
    for (int64_t i = 1; i < threads; ++i) others.emplace_back(work);
    work();
    for (std::thread& other : others) other.join();
  }
};

}  // namespace

void test_decode_layers(Checks& checks) {
  for (const bool rounded : {false, true}) {
    Stack alone(rounded);
    alone.run(1);
    for (const int64_t threads : {2, 3, 8}) {
      Stack many(rounded);
      many.run(threads);
      for (size_t i = 0; i < many.numbers.size(); ++i) {
        const std::vector<float> got = many.numbers[i].values(), want = alone.numbers[i].values();
        for (size_t j = 0; j < got.size(); ++j) {
          if (bits_of(got[j]) != bits_of(want[j])) {
            checks.fail("decode_layers of several threads", static_cast<int64_t>(j), got[j],
                        want[j]);
          }
        }
      }
      for (int64_t j = 0; j < kRows * kWidth; ++j) {
        if (!std::isfinite(many.all.result[j]))
          checks.fail("decode_layers", j, many.all.result[j], 0);
      }
      ++checks.cases;
    }
  }
}

}  // namespace dalle
