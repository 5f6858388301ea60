// A part of a product, for weights as they lie and for those that are unpacked on the way.
#pragma once

#include "fold_task.h"
#include "part.h"
#include "piece_task.h"
#include "ring_task.h"

namespace tokenmill {

template <class T, class Source>
void by_pieces(const Call& call, const Operand<T>& operand, const Part& part) {
  PieceTask<T, Source>(call, operand, part.first, part.last).run(part.begin, part.end);
}

template <class Steps, class T>
void unpacked(const Call& call, const Operand<T>& operand, const Part& part) {
#if defined(__AMX_BF16__)
  if constexpr (kAmx<T, bf16>) {
    if (part.last - part.first <= kBlock) {
      RingTask<Steps>(call, operand, part.first, part.last).run(part.begin, part.end);
    } else {
      by_pieces<T, Unpacked<Steps>>(call, operand, part);
    }
  } else
#endif
  {
    FoldTask<T, Steps>(call, operand, part.first, part.last).run(part.begin, part.end);
  }
}

}  // namespace tokenmill
