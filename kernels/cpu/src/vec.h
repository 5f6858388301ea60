// Sixteen lanes of float, int or unsigned on every instruction set: the one vector type of all kernels.
//
//   Lanes<NativeF>  =  [ native | native | ... ]      1 x 512 bits (AVX-512), 2 x 256 (AVX2), 4 x 128 (else)
//
// Arithmetic, comparisons and selection use the compiler's own vector extension; intrinsics appear only
// where that has no word: fused multiply-add, reductions, and rounding to bfloat16. The build forbids
// contraction, so `fma` is the only place where a product isn't rounded: results depend on the instruction
// set, never on how the compiler arranged a loop.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace tokenmill {

#if defined(__AVX512F__)
constexpr int kNative = 16;
#elif defined(__AVX2__)
constexpr int kNative = 8;
#else
constexpr int kNative = 4;
#endif
constexpr int kLanes = 16;
constexpr int kParts = kLanes / kNative;

using NativeF = float __attribute__((vector_size(kNative * 4)));
using NativeI = int32_t __attribute__((vector_size(kNative * 4)));
using NativeU = uint32_t __attribute__((vector_size(kNative * 4)));
using NativeU16 = uint16_t __attribute__((vector_size(kNative * 2)));
using NativeS8 = int8_t __attribute__((vector_size(kNative)));

struct bf16 {
  uint16_t bits;
};

template <class N>
struct Lanes {
  N part[kParts];
};
using F = Lanes<NativeF>;
using I = Lanes<NativeI>;
using U = Lanes<NativeU>;

#define TM_INLINE inline __attribute__((always_inline))
#define TM_EACH _Pragma("GCC unroll 4") for (int p = 0; p < kParts; ++p)

#define TM_BINARY(op)                                      \
  template <class N>                                       \
  TM_INLINE Lanes<N> operator op(Lanes<N> a, Lanes<N> b) { \
    Lanes<N> r;                                            \
    TM_EACH r.part[p] = a.part[p] op b.part[p];            \
    return r;                                              \
  }
TM_BINARY(+)
TM_BINARY(-)
TM_BINARY(*)
TM_BINARY(/)
TM_BINARY(&)
TM_BINARY(|)
TM_BINARY(^)
#undef TM_BINARY

// Comparisons give -1 in lanes where they hold, 0 elsewhere.
#define TM_COMPARE(op)                                    \
  template <class N>                                      \
  TM_INLINE I operator op(Lanes<N> a, Lanes<N> b) {       \
    I r;                                                  \
    TM_EACH r.part[p] = (NativeI)(a.part[p] op b.part[p]); \
    return r;                                             \
  }
TM_COMPARE(<)
TM_COMPARE(<=)
TM_COMPARE(>)
TM_COMPARE(>=)
TM_COMPARE(==)
TM_COMPARE(!=)
#undef TM_COMPARE

template <class N>
TM_INLINE Lanes<N> operator<<(Lanes<N> a, int bits) {
  Lanes<N> r;
  TM_EACH r.part[p] = a.part[p] << bits;
  return r;
}

template <class N>
TM_INLINE Lanes<N> operator>>(Lanes<N> a, int bits) {
  Lanes<N> r;
  TM_EACH r.part[p] = a.part[p] >> bits;
  return r;
}

TM_INLINE F operator-(F a) {
  TM_EACH a.part[p] = -a.part[p];
  return a;
}

template <class N>
TM_INLINE Lanes<N> select(I mask, Lanes<N> yes, Lanes<N> no) {
  TM_EACH yes.part[p] = mask.part[p] ? yes.part[p] : no.part[p];
  return yes;
}

TM_INLINE F splat(float x) {
  F r;
  TM_EACH r.part[p] = x - NativeF{};
  return r;
}

TM_INLINE I splat(int32_t x) {
  I r;
  TM_EACH r.part[p] = x - NativeI{};
  return r;
}

TM_INLINE U splat(uint32_t x) {
  U r;
  TM_EACH r.part[p] = x - NativeU{};
  return r;
}

template <class To, class From>
TM_INLINE Lanes<To> bits_of(Lanes<From> a) {
  Lanes<To> r;
  TM_EACH r.part[p] = (To)a.part[p];
  return r;
}

TM_INLINE F to_float(I a) {
  F r;
  TM_EACH r.part[p] = __builtin_convertvector(a.part[p], NativeF);
  return r;
}

// Towards zero.
TM_INLINE I to_int(F a) {
  I r;
  TM_EACH r.part[p] = __builtin_convertvector(a.part[p], NativeI);
  return r;
}

TM_INLINE I lane_index() {
  I r;
  TM_EACH for (int i = 0; i < kNative; ++i) r.part[p][i] = p * kNative + i;
  return r;
}

// Largest and smallest; a NaN in `a` is dropped, one in `b` is kept.
TM_INLINE F max(F a, F b) {
#if defined(__AVX512F__)
  a.part[0] = (NativeF)_mm512_max_ps((__m512)a.part[0], (__m512)b.part[0]);
  return a;
#elif defined(__AVX2__)
  TM_EACH a.part[p] = (NativeF)_mm256_max_ps((__m256)a.part[p], (__m256)b.part[p]);
  return a;
#else
  return select(a > b, a, b);
#endif
}

TM_INLINE F min(F a, F b) {
#if defined(__AVX512F__)
  a.part[0] = (NativeF)_mm512_min_ps((__m512)a.part[0], (__m512)b.part[0]);
  return a;
#elif defined(__AVX2__)
  TM_EACH a.part[p] = (NativeF)_mm256_min_ps((__m256)a.part[p], (__m256)b.part[p]);
  return a;
#else
  return select(a < b, a, b);
#endif
}

TM_INLINE F fma(F a, F b, F c) {
#if defined(__AVX512F__)
  c.part[0] = (NativeF)_mm512_fmadd_ps((__m512)a.part[0], (__m512)b.part[0], (__m512)c.part[0]);
#elif defined(__AVX2__)
  TM_EACH c.part[p] = (NativeF)_mm256_fmadd_ps((__m256)a.part[p], (__m256)b.part[p], (__m256)c.part[p]);
#elif defined(__ARM_NEON)
  TM_EACH c.part[p] = (NativeF)vfmaq_f32((float32x4_t)c.part[p], (float32x4_t)a.part[p], (float32x4_t)b.part[p]);
#else
  TM_EACH c.part[p] = a.part[p] * b.part[p] + c.part[p];
#endif
  return c;
}

// ---- memory: float and bfloat16 look alike to the kernels -------------------------------------------

// Part by part: gcc copies a structure of two registers by way of the stack, in pieces that it then waits for.
template <class N, class T>
TM_INLINE Lanes<N> load_bits(const T* from) {
  Lanes<N> r;
  TM_EACH std::memcpy(&r.part[p], reinterpret_cast<const char*>(from) + p * sizeof(N), sizeof(N));
  return r;
}

TM_INLINE F load(const float* from) { return load_bits<NativeF>(from); }

TM_INLINE F load(const bf16* from) {
  F r;
#if defined(__AVX512F__)
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  r.part[0] = (NativeF)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
#else
  TM_EACH {
    NativeU16 half;
    std::memcpy(&half, from + p * kNative, sizeof half);
    r.part[p] = (NativeF)(__builtin_convertvector(half, NativeU) << 16);
  }
#endif
  return r;
}

TM_INLINE I load(const int8_t* from) {
  I r;
#if defined(__AVX512F__)
  r.part[0] = (NativeI)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif defined(__AVX2__)
  TM_EACH r.part[p] = (NativeI)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + p * 8)));
#else
  TM_EACH {
    NativeS8 narrow;
    std::memcpy(&narrow, from + p * kNative, sizeof narrow);
    r.part[p] = __builtin_convertvector(narrow, NativeI);
  }
#endif
  return r;
}

TM_INLINE I load(const int32_t* from) { return load_bits<NativeI>(from); }

TM_INLINE void store(float* to, F a) {
  TM_EACH std::memcpy(to + p * kNative, &a.part[p], sizeof a.part[p]);
}

// Round to nearest even; NaN becomes the quiet NaN.
TM_INLINE U round_bf16(F a) {
  U u = bits_of<NativeU>(a);
  U rounded = (u + splat(0x7FFFu) + ((u >> 16) & splat(1u))) >> 16;
  return select(a == a, rounded, splat(0x7FC0u));
}

TM_INLINE void store(bf16* to, F a) {
#if defined(__AVX512BF16__)
  auto half = _mm512_cvtneps_pbh((__m512)a.part[0]);
  std::memcpy(to, &half, sizeof half);
#else
  U rounded = round_bf16(a);
  TM_EACH {
    NativeU16 half = __builtin_convertvector(rounded.part[p], NativeU16);
    std::memcpy(to + p * kNative, &half, sizeof half);
  }
#endif
}

// The first n < 16 lanes only; the others read as zero.
template <class T>
TM_INLINE auto load_first(const T* from, int n) {
  T part[kLanes] = {};
  std::memcpy(part, from, n * sizeof(T));
  return load(part);
}

template <class T>
TM_INLINE void store_first(T* to, F a, int n) {
  T part[kLanes];
  store(part, a);
  std::memcpy(to, part, n * sizeof(T));
}

template <class T>
TM_INLINE F load_up_to(const T* from, int64_t n) {
  return n >= kLanes ? load(from) : load_first(from, static_cast<int>(n));
}

template <class T>
TM_INLINE void store_up_to(T* to, F a, int64_t n) {
  if (n >= kLanes) {
    store(to, a);
  } else {
    store_first(to, a, static_cast<int>(n));
  }
}

// body(i, n) for each vector of `size` elements, at i; n of its lanes exist. Whole vectors are told by a constant.
template <class Body>
TM_INLINE void for_lanes(int64_t size, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) body(i, static_cast<int64_t>(kLanes));
  if (i < size) body(i, size - i);
}

TM_INLINE float to_float(float x) { return x; }

TM_INLINE float to_float(bf16 x) {
  uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
  float r;
  std::memcpy(&r, &wide, sizeof r);
  return r;
}

// ---- across lanes -----------------------------------------------------------------------------------

template <class Op>
TM_INLINE float reduce(F a, Op op) {
  float lane[kLanes];
  store(lane, a);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] = op(lane[i], lane[i + width]);
  }
  return lane[0];
}

TM_INLINE float reduce_add(F a) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)a.part[0]);
#else
  return reduce(a, [](float x, float y) { return x + y; });
#endif
}

TM_INLINE float reduce_max(F a) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)a.part[0]);
#else
  return reduce(a, [](float x, float y) { return x > y ? x : y; });
#endif
}

#if defined(__AVX512F__)
// The largest lane of each of 16 vectors, in their order: pairs of vectors halve what is left of each, four times.
TM_INLINE F row_maxima(const F* rows) {
  __m512 two[8], four[4], eight[2];
  for (int i = 0; i < 8; ++i) {
    const __m512 a = (__m512)rows[2 * i].part[0], b = (__m512)rows[2 * i + 1].part[0];
    two[i] = _mm512_max_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  }
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(two[2 * i]), b = _mm512_castps_pd(two[2 * i + 1]);
    four[i] = _mm512_max_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  for (int i = 0; i < 2; ++i) {
    const __m512 a = four[2 * i], b = four[2 * i + 1];
    eight[i] = _mm512_max_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
  }
  return {{(NativeF)_mm512_max_ps(_mm512_shuffle_f32x4(eight[0], eight[1], 0x88),
                                  _mm512_shuffle_f32x4(eight[0], eight[1], 0xDD))}};
}
#endif

// One bit a lane of a comparison's result, lane 0 lowest.
TM_INLINE uint32_t mask_bits(I mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask.part[0]);
#elif defined(__AVX2__)
  uint32_t bits = 0;
  TM_EACH bits |= static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask.part[p])) << (p * kNative);
  return bits;
#else
  uint32_t bits = 0;
  TM_EACH for (int i = 0; i < kNative; ++i) bits |= (mask.part[p][i] & 1u) << (p * kNative + i);
  return bits;
#endif
}

}  // namespace tokenmill
