// What a mixture of experts is made of; mixture.py fills in the same structures.
#pragma once

#include <cstdint>

#include "packed.h"

namespace tokenmill {

// As `Routing` of kernels/reference.py.
struct Routing {
  int64_t experts;
  int64_t top;
  int64_t groups;
  int64_t top_groups;
  const float* bias;   // [experts], or null
  const float* gains;  // the same
  float scale;
  int32_t sigmoid;
  int32_t renormalize;
};

struct Mixture {
  const Packed* const* ups;    // [experts], gate and up rows
  const Packed* const* downs;  // [experts]
  int64_t experts;
};

}  // namespace tokenmill
