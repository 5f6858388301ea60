// Elementary functions over lanes, accurate to a few units in the last place of float32.
//
// The polynomials are least-squares fits, reweighted towards equal ripple, made for these intervals.
#pragma once

#include "vec.h"

namespace tokenmill {

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2High = 0.693359375f;  // exact in 10 bits, so that n * kLn2High is exact
constexpr float kLn2Low = -2.12194440054690583e-4f;

template <int N>
TM_INLINE F polynomial(F x, const float (&coefficients)[N]) {
  F r = splat(coefficients[N - 1]);
#pragma GCC unroll 12
  for (int i = N - 2; i >= 0; --i) r = fma(r, x, splat(coefficients[i]));
  return r;
}

// exp(0) is exactly 1 and exp(-inf) exactly 0; results below the smallest normal number are 0, and the
// argument saturates at 88.3. NaN stays NaN.
TM_INLINE F exp(F x) {
  constexpr float q[] = {5.000000101e-01f, 1.666651288e-01f, 4.166618734e-02f, 8.369598863e-03f, 1.395171317e-03f};
  const F shift = splat(12582912.0f);  // 1.5 * 2^23: adding it leaves the rounded integer in the low bits
  F bounded = min(splat(88.3f), x);
  F shifted = fma(bounded, splat(kLog2E), shift);
  F n = shifted - shift;
  F r = fma(n, splat(-kLn2Low), fma(n, splat(-kLn2High), bounded));
  F p = fma(r * r, polynomial(r, q), r) + splat(1.0f);
  I power = (bits_of<NativeI>(shifted) - bits_of<NativeI>(shift)) << 23;
  F result = bits_of<NativeF>(bits_of<NativeI>(p) + power);
  return select(x < splat(-87.3f), splat(0.0f), result);
}

// Natural logarithm of positive normal numbers.
TM_INLINE F log(F x) {
  constexpr float q[] = {3.333331044e-01f,  -2.499998661e-01f, 2.000222668e-01f,  -1.666925006e-01f, 1.421865639e-01f,
                         -1.238436051e-01f, 1.187299997e-01f,  -1.178974624e-01f, 6.915242938e-02f};
  I bits = bits_of<NativeI>(x);
  I exponent = (bits - splat(0x3F3504F3)) >> 23;  // of x over sqrt(1/2)
  F t = bits_of<NativeF>(bits - (exponent << 23)) - splat(1.0f);
  F e = to_float(exponent);
  F t2 = t * t;
  F tail = fma(t2 * t, polynomial(t, q), fma(e, splat(kLn2Low), splat(-0.5f) * t2));
  return fma(e, splat(kLn2High), t + tail);
}

// log(1 + x) for -1/2 <= x <= 1: what rounding 1 + x lost is put back to first order.
TM_INLINE F log1p(F x) {
  F whole = splat(1.0f) + x;
  return log(whole) + (x - (whole - splat(1.0f))) / whole;
}

// 1 / x to 2^-23 for normal numbers: an estimate of 14 bits and one step of Newton's, a third of a division's time.
TM_INLINE F reciprocal(F x) {
#if defined(__AVX512F__)
  const F y = {{(NativeF)_mm512_rcp14_ps((__m512)x.part[0])}};
  return fma(y, fma(-x, y, splat(1.0f)), y);
#else
  return splat(1.0f) / x;
#endif
}

TM_INLINE F sigmoid(F x) { return reciprocal(splat(1.0f) + exp(-x)); }

// Lambert's continued fraction near zero, where the formula over exp would cancel.
TM_INLINE F tanh(F x) {
  F x2 = x * x;
  F f = splat(9.0f) + x2 / splat(11.0f);
  f = splat(7.0f) + x2 / f;
  f = splat(5.0f) + x2 / f;
  f = splat(3.0f) + x2 / f;
  F near = x / (splat(1.0f) + x2 / f);
  F size = max(x, -x);
  F far = splat(1.0f) - splat(2.0f) / (exp(size + size) + splat(1.0f));
  far = select(x < splat(0.0f), -far, far);
  return select(x2 < splat(0.36f), near, far);
}

// 1 + erf(x), without cancellation for negative x: x * P(x^2) inside [-1, 1], exp(-x^2) * t * Q(t) outside.
TM_INLINE F one_plus_erf(F x) {
  constexpr float inner[] = {1.128379167e+00f, -3.761263848e-01f, 1.128378275e-01f, -2.686544581e-02f,
                             5.221074857e-03f, -8.484711138e-04f, 1.127054223e-04f, -9.680129939e-06f};
  constexpr float outer[] = {2.820929376e-01f, 2.821455455e-01f,  2.462490284e-01f,  1.799250984e-01f, 7.127522903e-02f,
                             1.502294590e-02f, -4.116748182e-02f, -1.795095794e-01f, 2.116536599e-01f,
                             -6.785674149e-02f};
  x = max(splat(-10.0f), min(splat(10.0f), x));
  F x2 = x * x;
  F near = fma(x, polynomial(x2, inner), splat(1.0f));
  F size = max(x, -x);
  F t = splat(1.0f) / fma(size, splat(0.5f), splat(1.0f));
  F square_rest = fma(size, size, -x2);  // what x * x lost, so that exp(-x^2) keeps its accuracy
  F complement = exp(-x2) * (splat(1.0f) - square_rest) * t * polynomial(t, outer);
  F far = select(x < splat(0.0f), complement, splat(2.0f) - complement);
  return select(x2 < splat(1.0f), near, far);
}

#if defined(__AVX512F__)
// 2^x to 3e-6, some thousandth of bfloat16's rounding; 2^0 is exactly 1 and 2^-inf exactly 0.
TM_INLINE F power_of_two(F x) {
  constexpr float q[] = {6.9304484e-01f, 2.4128021e-01f, 5.224247e-02f, 1.3426690e-02f};
  constexpr int kFloor = 0x09;
  const F r = {{(NativeF)_mm512_reduce_ps((__m512)x.part[0], kFloor)}};
  const F p = fma(r, polynomial(r, q), splat(1.0f));
  return {{(NativeF)_mm512_scalef_ps((__m512)p.part[0], (__m512)x.part[0])}};
}
#endif

// sigmoid, in half of the instructions where 6e-5 is enough for a result of type T.
template <class T>
TM_INLINE F sigmoid_for(F x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 2) {
    const F whole = splat(1.0f) + power_of_two(x * splat(-kLog2E));
    return {{(NativeF)_mm512_rcp14_ps((__m512)whole.part[0])}};
  }
#endif
  return sigmoid(x);
}

enum Activation { kNone = 0, kSilu = 1, kGelu = 2, kGeluTanh = 3, kSwigluOai = 4 };  // the last is a gate only

// An activation of x as a result of type T.
template <class T>
TM_INLINE F activate(F x, int activation) {
  switch (activation) {
    case kSilu:
      return x * sigmoid_for<T>(x);
    case kGelu:
      return splat(0.5f) * x * one_plus_erf(x * splat(0.70710678118654752f));
    case kGeluTanh: {
      F inner = splat(0.79788456080286536f) * fma(splat(0.044715f) * x * x, x, x);
      // 0.5 * (1 + tanh(u)) = sigmoid(2u), which does not cancel for negative u.
      return x * sigmoid_for<T>(inner + inner);
    }
    default:
      return x;
  }
}

// act(x) * up as a result of type T.
template <class T>
TM_INLINE F gated(F x, F up, int activation) {
  if (activation != kSwigluOai) return activate<T>(x, activation) * up;
  const F limit = splat(7.0f);
  x = min(limit, x);
  up = max(-limit, min(limit, up));
  return (up + splat(1.0f)) * (x * sigmoid_for<T>(x * splat(1.702f)));
}

}  // namespace tokenmill
