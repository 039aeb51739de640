// Vectors of 16 floats and the three weight types, without torch.
//
// GCC's and Clang's vector extensions become AVX-512, AVX2 or plain code by the compiler's -march; only bfloat16's
// dot product is an intrinsic. A packed matrix is defined by the build that packed it (see pack.h).
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define D2MOE_DPBF16 1
#include <immintrin.h>
#endif

namespace d2moe {

using i64 = std::int64_t;
using i32 = std::int32_t;

constexpr i64 LANES = 16;

typedef float Floats __attribute__((vector_size(64), aligned(4), may_alias));
typedef std::uint32_t Words __attribute__((vector_size(64), aligned(4), may_alias));
typedef std::int32_t Ints __attribute__((vector_size(64), aligned(4), may_alias));

inline Floats load(const float* p) { return *reinterpret_cast<const Floats*>(p); }
inline void store(float* p, Floats v) { *reinterpret_cast<Floats*>(p) = v; }
inline Floats all(float value) { return value - Floats{}; }

template <class To, class From>
inline To bits(From from) {
  To to;
  static_assert(sizeof(to) == sizeof(from));
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline float from_bf16(std::uint16_t h) { return bits<float>(std::uint32_t(h) << 16); }
inline std::uint16_t to_bf16(float f) {
  std::uint32_t u = bits<std::uint32_t>(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return std::uint16_t((u >> 16) | 0x40);  // a NaN stays one
  return std::uint16_t((u + 0x7fffu + ((u >> 16) & 1)) >> 16);                   // to the nearest, ties to even
}

// e^x to about 2 ulp (Cephes): 0 below -104, infinity above 89, NaN for NaN.
inline Floats exp(Floats x) {
  const Floats low = all(-104.0f), high = all(89.0f);
  Floats y = x < low ? low : x;
  y = y > high ? high : y;
  const Floats magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  const Floats n = (y * 1.44269504088896341f + magic) - magic;
  const Floats r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // In two steps, since 2^n alone may be no normal number.
  const Ints whole = __builtin_convertvector(n, Ints), half = whole >> 1;
  const Floats scaled = p * bits<Floats>((half + 127) << 23) * bits<Floats>((whole - half + 127) << 23);
  return x != x ? x : scaled;
}

// The weight types. Element: as stored; Input: what a row to be multiplied is held in; PAIR: consecutive inputs whose
// weights lie together; LINE: outputs whose weights for one column of a packed base are loaded together.
struct Float32 {
  using Element = float;
  using Input = float;
  static constexpr i64 PAIR = 1, LINE = 16;
  static float value(Element e) { return e; }
  static Element element(float f) { return f; }
  static Input input(float f) { return f; }
};

struct Float16 {
  using Element = std::uint16_t;
  using Input = float;
  static constexpr i64 PAIR = 1, LINE = 16;
  static float value(Element e) { return float(bits<_Float16>(e)); }
  static Element element(float f) { return bits<Element>(_Float16(f)); }
  static Input input(float f) { return value(element(f)); }
};

struct BFloat16 {
  using Element = std::uint16_t;
  using Input = std::uint16_t;
  static constexpr i64 PAIR = 2, LINE = 32;
  static float value(Element e) { return from_bf16(e); }
  static Element element(float f) { return to_bf16(f); }
  static Input input(float f) { return to_bf16(f); }
};

}  // namespace d2moe
