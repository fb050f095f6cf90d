// The torch-facing half of element.h.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include "common/checks.hpp"
#include "common/element.h"

namespace dalle {

// kNone for types that no op here takes.
inline ElementKind element_kind(torch::headeronly::ScalarType type) {
  using torch::headeronly::ScalarType;
  switch (type) {
    case ScalarType::Float:
      return ElementKind::kFloat;
    case ScalarType::Half:
      return ElementKind::kHalf;
    case ScalarType::BFloat16:
      return ElementKind::kBFloat16;
    case ScalarType::Short:
      return ElementKind::kShort;
    case ScalarType::Long:
      return ElementKind::kLong;
    case ScalarType::Double:
      return ElementKind::kDouble;
    default:
      return ElementKind::kNone;
  }
}

inline ElementKind check_floating(const char* op, const char* name,
                                  torch::headeronly::ScalarType type) {
  const ElementKind kind = element_kind(type);
  const bool holds =
      kind == ElementKind::kFloat || kind == ElementKind::kHalf || kind == ElementKind::kBFloat16;
  DALLE_CHECK(holds, op, name, "float32, float16 or bfloat16", dtype_text(type));
  return kind;
}

}  // namespace dalle
