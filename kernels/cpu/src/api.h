// Marks of the C interface, and the element types that cross it.
#pragma once

#define TM_API extern "C" __attribute__((visibility("default")))

#include <cmath>

#include "vec.h"

namespace tokenmill {

enum Type { kTypeBf16 = 0, kTypeF32 = 1 };

// Calls body(T{}) with the element type that `type` names.
template <class Body>
inline void with_type(int type, const Body& body) {
  if (type == kTypeBf16) {
    body(bf16{});
  } else {
    body(0.0f);
  }
}

}  // namespace tokenmill
