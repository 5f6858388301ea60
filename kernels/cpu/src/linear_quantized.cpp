// Parts of products with quantized weights (linear.cpp).
#include "grouped_task.h"
#include "part.h"
#include "single_row.h"
#include "unpack.h"
#include "unpacked.h"

namespace tokenmill {

#if defined(__AMX_BF16__)
void multiply_quantized(const Call& call, const Operand<bf16>& operand, const Part& part) {
  if (call.weight.nibbles()) return unpacked<ValueSteps<kInt4>>(call, operand, part);
  if (!call.weight.row_wide()) return unpacked<ValueSteps<kInt8>>(call, operand, part);
  if (part.last - part.first > 1) return unpacked<ByteSteps>(call, operand, part);
  single_row_task(call, operand, part.begin, part.end, part.first);
}

void multiply_integers(const Call&, const IntegerRows&, const Part&) {}
#else
void multiply_quantized(const Call&, const Operand<bf16>&, const Part&) {}

void multiply_integers(const Call& call, const IntegerRows& operand, const Part& part) {
  IntegerTask task(call, operand, part.first, part.last);
  for (int64_t pair = part.begin; pair < part.end; ++pair) task.run(pair);
}
#endif

void multiply_quantized(const Call& call, const Operand<float>& operand, const Part& part) {
  for (int64_t pair = part.begin; pair < part.end; ++pair) {
    GroupedTask<float>(call, operand, pair, part.first, part.last).run();
  }
}

}  // namespace tokenmill
