// pybind11 module _host: plain C++ for the host. No torch header, so it compiles in seconds and
// never conflicts with the pybind11 that torch carries.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>

#include "host/area_resize.h"

namespace py = pybind11;

namespace {

using Image = py::array_t<uint8_t, py::array::c_style>;

Image area_resize(const Image& image, int64_t height, int64_t width) {
  if (image.ndim() != 3 || image.size() == 0) {
    throw py::value_error("area_resize: image must be a nonempty (H, W, C) array, got " +
                          std::to_string(image.ndim()) + " axes and " +
                          std::to_string(image.size()) + " values");
  }
  if (height < 1 || width < 1) {
    throw py::value_error("area_resize: height and width must be positive, got " +
                          std::to_string(height) + " and " + std::to_string(width));
  }
  Image out({static_cast<py::ssize_t>(height), static_cast<py::ssize_t>(width), image.shape(2)});
  const uint8_t* source = image.data();
  uint8_t* target = out.mutable_data();
  const int64_t rows = image.shape(0), cols = image.shape(1), channels = image.shape(2);
  py::gil_scoped_release release;
  dalle::area_resize(source, rows, cols, channels, target, height, width);
  return out;
}

py::dict build_info() {
  py::dict info;
  info["torch"] = DALLE_TORCH_VERSION;
  info["source"] = DALLE_SOURCE_VERSION;
  info["compiler"] = DALLE_COMPILER;
  info["cuda_architectures"] = DALLE_CUDA_ARCHITECTURES;
  return info;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host-side helpers of dalle_ext without tensors.";
  m.def("area_resize", &area_resize, py::arg("image").noconvert(), py::arg("height"),
        py::arg("width"), "AREA resize with aligned corners of a uint8 (H, W, C) image.");
  m.def("build_info", &build_info, "What the native objects were built with.");
}
