// What the elements of a tensor are: the one such type of all ops. dalle_ext/_tensor_table.py has
// the same numbers. No torch here.
#pragma once

namespace dalle {

enum class ElementKind : int { kNone, kFloat, kHalf, kBFloat16, kShort, kLong, kDouble };

}  // namespace dalle
