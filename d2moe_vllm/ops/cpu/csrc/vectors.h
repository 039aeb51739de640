// Functions of 16 floats and the three weight types, without torch.
//
// A packed matrix is defined by the build that packed it (see pack.h).
#pragma once

#include <cmath>

#include "lanes.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define D2MOE_DPBF16 1
#endif

namespace d2moe {

inline float from_bf16(std::uint16_t h) { return bits<float>(std::uint32_t(h) << 16); }
inline std::uint16_t to_bf16(float f) {
  std::uint32_t u = bits<std::uint32_t>(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return std::uint16_t((u >> 16) | 0x40);  // a NaN stays one
  return std::uint16_t((u + 0x7fffu + ((u >> 16) & 1)) >> 16);                   // to the nearest, ties to even
}

// x = n ln 2 + r with a whole n and r within half of ln 2: returns e^r - 1, accurate near 0, too (Cephes). NaN for NaN.
inline Floats exp_of_rest(Floats x, Floats& n) {
  const Floats magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  n = (x * 1.44269504088896341f + magic) - magic;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return p * r * r + r;
}

// p 2^n, n whole and within -151 .. 129.
inline Floats times_power(Floats p, Floats n) {
#ifdef __AVX512F__
  return bits<Floats>(_mm512_scalef_ps(bits<__m512>(p), bits<__m512>(n)));
#else
  // In two steps, since 2^n alone may be no normal number.
  const Ints whole = convert<Ints>(n), half = whole >> 1;
  return p * bits<Floats>((half + 127) << 23) * bits<Floats>((whole - half + 127) << 23);
#endif
}

// Within low .. high; NaN stays one.
inline Floats clamp(Floats x, float low, float high) {
#ifdef __AVX512F__
  const __m512 above = _mm512_max_ps(_mm512_set1_ps(low), bits<__m512>(x));
  return bits<Floats>(_mm512_min_ps(_mm512_set1_ps(high), above));
#else
  return by_parts<Floats>([=](auto v) {
    const decltype(v) least = low - decltype(v){}, most = high - decltype(v){}, above = least > v ? least : v;
    return most < above ? most : above;
  }, x);
#endif
}

// e^x to about 2 ulp: 0 below -104, infinity above 89, NaN for NaN.
inline Floats exp(Floats x) {
  Floats n;
  const Floats rest = exp_of_rest(clamp(x, -104.0f, 89.0f), n);
  return times_power(rest + 1.0f, n);
}

inline Floats silu(Floats x) { return x / (1.0f + exp(-x)); }

// The same to 2^-18 of it, in half the time where the processor can: for what is rounded to 16 bits next.
inline Floats silu_16_bits(Floats x) {
#ifdef __AVX512DQ__
  const __m512 t = bits<__m512>(x * -1.44269504088896341f), r = _mm512_reduce_ps(t, 1);  // what is above the next whole
  const Floats f = bits<Floats>(r);
  Floats p = f * 1.3426684774e-2f + 5.2242472768e-2f;  // 2^f, from 0 to 1 nowhere off by more than 3e-6 of it
  p = p * f + 2.4128019810e-1f;
  p = p * f + 6.9304484129e-1f;
  p = p * f + 1.0f;
  return x / (1.0f + bits<Floats>(_mm512_scalef_ps(bits<__m512>(p), t)));
#else
  return silu(x);
#endif
}

// (e^2|x| - 1) / (e^2|x| + 1) with the sign of x: nothing cancels near 0.
inline Floats tanh(Floats x) {
  const Words sign = bits<Words>(x) & 0x80000000u;
  Floats n;  // from x = 9.1 on it is 1 to the last bit
  const Floats rest = exp_of_rest(clamp(2.0f * bits<Floats>(bits<Words>(x) ^ sign), 0.0f, 40.0f), n);
  const Floats power = times_power(all(1.0f), n);
  const Floats less_one = rest * power + (power - 1.0f);
  return bits<Floats>(bits<Words>(less_one / (less_one + 2.0f)) | sign);
}

// The weight types. Element: as stored; Input: what a row to be multiplied is held in, bfloat16 only for its dot product;
// PAIR: consecutive inputs whose weights lie together; LINE: outputs whose weights for one column of a packed base are
// loaded together.
struct Float32 {
  using Element = float;
  using Input = float;
  static constexpr i64 PAIR = 1, LINE = 16;
  static float value(Element e) { return e; }
  static Element element(float f) { return f; }
  static Input input(float f) { return f; }
  static Input as_input(Element e) { return e; }
  static float of(Input x) { return x; }
};

struct Float16 {
  using Element = std::uint16_t;
  using Input = float;
  static constexpr i64 PAIR = 1, LINE = 16;
  static float value(Element e) { return float(bits<_Float16>(e)); }
  static Element element(float f) { return bits<Element>(_Float16(f)); }
  static Input input(float f) { return value(element(f)); }
  static Input as_input(Element e) { return value(e); }
  static float of(Input x) { return x; }
};

struct BFloat16 {
  using Element = std::uint16_t;
  static constexpr i64 PAIR = 2, LINE = 32;
  static float value(Element e) { return from_bf16(e); }
  static Element element(float f) { return to_bf16(f); }
#ifdef D2MOE_DPBF16
  using Input = std::uint16_t;
  static Input input(float f) { return to_bf16(f); }
  static Input as_input(Element e) { return e; }
  static float of(Input x) { return from_bf16(x); }
#else
  using Input = float;
  static Input input(float f) { return value(element(f)); }
  static Input as_input(Element e) { return value(e); }
  static float of(Input x) { return x; }
#endif
};

}  // namespace d2moe
