// What the elements of a tensor are, where one kernel serves several storage types. No torch here.
#pragma once

namespace dalle {

enum class ElementKind : int { kNone, kFloat, kHalf, kBFloat16, kShort, kLong };

}  // namespace dalle
