// The packed linear layer against its definition in double; a row has the same bits alone.
#include <algorithm>

#include "check.h"
#include "packed_linear/packed_linear_cpu.h"

namespace dalle {
namespace {

void test_packed_linear_of(Checks& checks, int64_t rows, int64_t outputs, int64_t inputs,
                           bool pairs) {
  const PackedLinearCpu& cpu =
      pairs ? DALLE_SELECT_ISA_BFLOAT16(packed_linear_cpu) : DALLE_SELECT_ISA(packed_linear_cpu);
  const int64_t panels = ceil_div(outputs, kLinearColumns), width = inputs + pairs * (inputs % 2);
  const ElementKind kind = pairs ? ElementKind::kBFloat16 : ElementKind::kFloat;
  Random random;
  const Stored x(kind, random.floats(rows * inputs)), w(kind, random.floats(outputs * inputs));
  const std::vector<float> bias = random.floats(outputs), add = random.floats(rows * outputs);
  Stored packed(kind, panels * width * kLinearColumns);
  for (int64_t n = 0; n < outputs; ++n) {
    for (int64_t k = 0; k < inputs; ++k) {
      const int64_t group = pairs ? 2 : 1, panel = n / kLinearColumns * width * kLinearColumns;
      const int64_t step = k / group * kLinearColumns + n % kLinearColumns;
      packed.set(panel + step * group + k % group, w.at(n * inputs + k));
    }
  }
  const std::vector<float> floats = x.values();
  std::vector<float> normed(rows * width), out(rows * outputs), alone(rows * outputs);
  PackedLinearArgs args{};
  args.weight = packed.data(), args.bias = bias.data();
  args.inputs = inputs, args.outputs = outputs, args.pairs = pairs, args.normed = normed.data();
  const auto run = [&](int64_t first, int64_t count, float* to) {
    args.x = floats.data() + first * inputs, args.residual = add.data() + first * outputs;
    args.rows = count, args.out = to;
    cpu.prepare(args, 0, count);
    cpu.run(args, 0, panels);
  };
  run(0, rows, out.data());
  for (int64_t row = 0; row < rows; ++row) run(row, 1, alone.data() + row * outputs);
  std::vector<double> want(rows * outputs);
  for (int64_t i = 0; i < rows * outputs; ++i) {
    const int64_t m = i / outputs, n = i % outputs;
    want[i] = double{bias[n]} + add[i];
    for (int64_t k = 0; k < inputs; ++k)
      want[i] += double{x.at(m * inputs + k)} * w.at(n * inputs + k);
    if (bits_of(out[i]) != bits_of(alone[i]))
      checks.fail("packed_linear of one row", i, alone[i], out[i]);
  }
  checks.close("packed_linear", out, want, 2e-5);
}

}  // namespace

void test_packed_linear(Checks& checks) {
  for (const bool pairs : {false, true}) {
    test_packed_linear_of(checks, 1, 7, 5, pairs);
    test_packed_linear_of(checks, 9, 48, 33, pairs);
    test_packed_linear_of(checks, 17, 100, 401, pairs);
  }
}

}  // namespace dalle
