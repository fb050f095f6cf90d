// CUDA registration of powersgd: guard, allocate, launch, check.
#include "common/stream.hpp"
#include "powersgd/powersgd.hpp"
#include "powersgd/powersgd_cuda.cuh"

namespace dalle {
namespace {

int64_t size_of(const std::vector<PowerMatrix>& matrices) {
  return static_cast<int64_t>(matrices.size());
}

// compress or project of matrices whose depth may be split: with room for their partial sums.
template <bool kProject>
void launch_factor(const char* op, std::vector<PowerMatrix>& matrices, const PowerFactors& f,
                   bool fast, const Tensor& beside) {
  const DeviceScope on(beside);
  const int64_t floats[] = {split_matrices<kProject>(matrices.data(), size_of(matrices))};
  const Tensor work = torch::stable::new_empty(beside, floats, ScalarType::Float);
  check_launch(op, launch_powersgd_factor<kProject>(matrices.data(), size_of(matrices), f,
                                                    static_cast<float*>(work.mutable_data_ptr()),
                                                    fast, on.stream()));
}

void compress_(Tensors errors, Tensors grads, Tensors qs, Tensors ps,
               const std::optional<Tensor>& scale, double error_scale,
               const std::optional<Tensor>& skip, bool fast) {
  const char* const op = "powersgd_compress_";
  auto matrices = prepare_matrices(op, errors, grads, {}, qs, ps);
  const PowerFactors f = prepare_factors(op, scale, skip, error_scale, 0, errors[0]);
  launch_factor<false>(op, matrices, f, fast, errors[0]);
}

void project(Tensors errors, Tensors ps, Tensors qs, double error_scale, bool fast) {
  const char* const op = "powersgd_project";
  auto matrices = prepare_matrices(op, errors, {}, ps, {}, qs);
  const PowerFactors f = prepare_factors(op, {}, {}, error_scale, 0, errors[0]);
  launch_factor<true>(op, matrices, f, fast, errors[0]);
}

void decompress_(Tensors errors, Tensors ps, Tensors qs, Tensors grads, double feedback,
                 const std::optional<Tensor>& skip, bool fast) {
  const char* const op = "powersgd_decompress_";
  const auto matrices = prepare_matrices(op, errors, {}, ps, qs, grads);
  const DeviceScope on(errors[0]);
  const PowerFactors f = prepare_factors(op, {}, skip, 1, feedback, errors[0]);
  check_launch(
      op, launch_powersgd_decompress(matrices.data(), size_of(matrices), f, fast, on.stream()));
}

Tensor orthogonalize(const Tensor& p, double eps) {
  const char* const op = "orthogonalize";
  DALLE_CHECK(p.dim() == 3 && p.scalar_type() == ScalarType::Float && p.is_contiguous() &&
                  p.size(1) >= p.size(2) && p.size(2) >= 1,
              op, "P", "contiguous float32 (batch, n, r) with n >= r >= 1", shape_text(p));
  const DeviceScope on(p);
  const int64_t sizes[] = {p.size(0), householder_floats(p.size(1), p.size(2))};
  const Tensor work = torch::stable::new_empty(p, sizes);
  Tensor out = torch::stable::new_empty(p, p.sizes());
  const OrthogonalizeArgs args{static_cast<const float*>(p.const_data_ptr()),
                               static_cast<float*>(work.mutable_data_ptr()),
                               static_cast<float*>(out.mutable_data_ptr()),
                               p.size(0),
                               p.size(1),
                               p.size(2),
                               sizes[1],
                               static_cast<float>(eps)};
  check_launch(op, launch_powersgd_orthogonalize(args, on.stream()));
  return out;
}

}  // namespace
}  // namespace dalle

STABLE_TORCH_LIBRARY_IMPL(dalle_ext, DALLE_CUDA_KEY, m) {
  m.impl("_powersgd_compress_", TORCH_BOX(&dalle::compress_));
  m.impl("_powersgd_project", TORCH_BOX(&dalle::project));
  m.impl("_powersgd_decompress_", TORCH_BOX(&dalle::decompress_));
  m.impl("_powersgd_orthogonalize", TORCH_BOX(&dalle::orthogonalize));
}
