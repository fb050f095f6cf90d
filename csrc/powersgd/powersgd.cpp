// Schemas of powersgd and its CPU registration, which has one way of products, whatever `fast`
// says. (orthogonalize has no kernel here: on the CPU it is LAPACK, through torch.)
#include "powersgd/powersgd.hpp"

#include "common/isa.h"
#include "powersgd/powersgd_cpu.h"
#include "powersgd/powersgd_pack.h"

namespace dalle {
namespace {

using Kernel = decltype(PowersgdCpu::compress);

// Calls the kernel for every panel of every matrix, in parallel.
void for_panels(const std::vector<PowerMatrix>& matrices, int64_t panels, const PowerFactors& f,
                const std::vector<std::vector<float>>& packed, Kernel kernel) {
  int64_t floats = 0;
  for (const PowerMatrix& m : matrices) {
    floats = scratch_floats(m) > floats ? scratch_floats(m) : floats;
  }
  torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(static_cast<size_t>(floats));
    size_t at = 0;
    for (int64_t panel = begin; panel < end; ++panel) {
      while (at + 1 < matrices.size() && panel >= matrices[at + 1].tile_begin) ++at;
      kernel(matrices[at], f, packed[at].data(), scratch.data(), panel - matrices[at].tile_begin);
    }
  });
}

int64_t row_panels(const PowerMatrix& m) { return ceil_div(m.rows, kPanelRows); }
int64_t column_panels(const PowerMatrix& m) { return ceil_div(m.columns, kPanelColumns); }

void compress_(Tensors errors, Tensors grads, Tensors qs, Tensors ps,
               const std::optional<Tensor>& scale, double error_scale,
               const std::optional<Tensor>& skip, bool /*fast*/) {
  const char* const op = "powersgd_compress_";
  std::vector<PowerMatrix> matrices = prepare_matrices(op, errors, grads, {}, qs, ps);
  const PowerFactors f = prepare_factors(op, scale, skip, error_scale, 0, errors[0]);
  std::vector<std::vector<float>> packed;
  for (const PowerMatrix& m : matrices) {
    packed.push_back(packed_with_tail(m));
  }
  const int64_t panels = number_tiles(matrices, row_panels);
  for_panels(matrices, panels, f, packed, DALLE_SELECT_ISA(powersgd_cpu).compress);
}

void project(Tensors errors, Tensors ps, Tensors qs, double error_scale, bool /*fast*/) {
  const char* const op = "powersgd_project";
  std::vector<PowerMatrix> matrices = prepare_matrices(op, errors, {}, ps, {}, qs);
  const PowerFactors f = prepare_factors(op, {}, {}, error_scale, 0, errors[0]);
  std::vector<std::vector<float>> packed;
  for (const PowerMatrix& m : matrices) {
    packed.push_back(packed_blocks(m.left, m.rows, m.rank, m.rank, 1));
  }
  const int64_t panels = number_tiles(matrices, column_panels);
  for_panels(matrices, panels, f, packed, DALLE_SELECT_ISA(powersgd_cpu).project);
}

void decompress_(Tensors errors, Tensors ps, Tensors qs, Tensors grads, double feedback,
                 const std::optional<Tensor>& skip, bool /*fast*/) {
  const char* const op = "powersgd_decompress_";
  std::vector<PowerMatrix> matrices = prepare_matrices(op, errors, {}, ps, qs, grads);
  const PowerFactors f = prepare_factors(op, {}, skip, 1, feedback, errors[0]);
  std::vector<std::vector<float>> packed;
  for (const PowerMatrix& m : matrices) {
    packed.push_back(packed_blocks(m.right, m.rank, m.columns, 1, m.rank));
  }
  const int64_t panels = number_tiles(matrices, row_panels);
  for_panels(matrices, panels, f, packed, DALLE_SELECT_ISA(powersgd_cpu).decompress);
}

}  // namespace
}  // namespace dalle

STABLE_TORCH_LIBRARY_FRAGMENT(dalle_ext, m) {
  m.def(
      "_powersgd_compress_(Tensor(a!)[] errors, Tensor[] grads, Tensor[] qs, Tensor(b!)[] ps,"
      " Tensor? scale, float error_scale, Tensor? skip, bool fast) -> ()");
  m.def(
      "_powersgd_project(Tensor[] errors, Tensor[] ps, Tensor(a!)[] qs, float error_scale,"
      " bool fast) -> ()");
  m.def(
      "_powersgd_decompress_(Tensor(a!)[] errors, Tensor[] ps, Tensor[] qs, Tensor(b!)[] grads,"
      " float feedback, Tensor? skip, bool fast) -> ()");
  m.def("_powersgd_orthogonalize(Tensor p, float eps) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(dalle_ext, CPU, m) {
  m.impl("_powersgd_compress_", TORCH_BOX(&dalle::compress_));
  m.impl("_powersgd_project", TORCH_BOX(&dalle::project));
  m.impl("_powersgd_decompress_", TORCH_BOX(&dalle::decompress_));
}
