// A part of a product. Those of quantized weights are computed in a unit of their own (linear_quantized.cpp), so that
// the compiler works on both halves at once.
#pragma once

#include "epilogue.h"
#include "integers.h"
#include "operand.h"

namespace tokenmill {

// The pairs [begin, end) times rows [first, last).
struct Part {
  int64_t begin, end, first, last;
};

void multiply_quantized(const Call& call, const Operand<bf16>& operand, const Part& part);  // on the matrix unit
void multiply_quantized(const Call& call, const Operand<float>& operand, const Part& part);
void multiply_integers(const Call& call, const IntegerRows& operand, const Part& part);  // where there is no such unit

}  // namespace tokenmill
