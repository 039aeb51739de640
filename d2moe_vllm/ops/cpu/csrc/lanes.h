// Sixteen numbers at once: one vector with AVX-512, else several of the processor's.
//
// GCC's and Clang's vector extensions become AVX-512, AVX2 or plain code by the compiler's -march. A vector larger than the
// processor's is no way to have several: GCC keeps it in memory and puts a scalar into it number by number, at a tenth of the
// speed. So Several is an array of vectors that fit, and what is done with it is done part by part.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace d2moe {

using i64 = std::int64_t;
using i32 = std::int32_t;

constexpr i64 LANES = 16;

template <class To, class From>
inline To bits(From from) {
  To to;
  static_assert(sizeof(to) == sizeof(from));
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// Without 32 registers what a compiler inlines by itself leaves sums in memory. Sanitizers compile what is inlined for hours.
#if defined(__AVX512F__) || defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define D2MOE_INLINE inline
#define D2MOE_APART inline
#define D2MOE_HERE
#else
#define D2MOE_UNROLLED 1
#define D2MOE_INLINE __attribute__((always_inline)) inline
#define D2MOE_APART __attribute__((noinline))
#define D2MOE_HERE __attribute__((always_inline))
#endif

#ifdef __AVX512F__

// Floats that registers hold as sums, beside what is added to them.
constexpr i64 SUMS = 24;

typedef float Floats __attribute__((vector_size(64), aligned(4), may_alias));
typedef std::uint32_t Words __attribute__((vector_size(64), aligned(4), may_alias));
typedef std::int32_t Ints __attribute__((vector_size(64), aligned(4), may_alias));

// f of all vectors.
template <class To, class F, class... Of>
inline To by_parts(F f, Of... of) { return f(of...); }

inline Floats load(const float* p) { return *reinterpret_cast<const Floats*>(p); }
inline void store(float* p, Floats v) { *reinterpret_cast<Floats*>(p) = v; }
inline Words load_words(const void* p) { return *static_cast<const Words*>(p); }
inline void store_words(void* p, Words v) { *static_cast<Words*>(p) = v; }

template <class To, class From>
inline To convert(From v) { return __builtin_convertvector(v, To); }

// Sixteen smaller numbers in memory, and back.
template <class To, class Small>
inline To widened(const Small* from) {
  typedef Small Vector __attribute__((vector_size(LANES * sizeof(Small)), aligned(sizeof(Small)), may_alias));
  return __builtin_convertvector(*reinterpret_cast<const Vector*>(from), To);
}
template <class Small, class From>
inline void narrowed(From v, Small* to) {
  typedef Small Vector __attribute__((vector_size(LANES * sizeof(Small)), aligned(sizeof(Small)), may_alias));
  *reinterpret_cast<Vector*>(to) = __builtin_convertvector(v, Vector);
}
inline Ints widened_bytes(const char* from) {
  return bits<Ints>(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
inline Floats widened_halves(const std::uint16_t* from) {
  return bits<Floats>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
}
inline void narrowed_to_halves(Floats v, std::uint16_t* to) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(bits<__m512>(v), _MM_FROUND_CUR_DIRECTION));
}

// a0 b0 a1 b1 ...
inline void interleave(Words a, Words b, Words& low, Words& high) {
  low = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  high = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}

#else

#ifdef __AVX2__
constexpr std::size_t REGISTER = 32;
#else
constexpr std::size_t REGISTER = 16;
#endif
constexpr int PARTS = int(LANES * 4 / REGISTER), OF_PART = int(LANES) / PARTS;
constexpr i64 SUMS = 6;

template <class T>
struct Several {
  static_assert(sizeof(T) == 4);
  typedef T Part __attribute__((vector_size(REGISTER), aligned(4), may_alias));
  Part part[PARTS];
};
using Floats = Several<float>;
using Words = Several<std::uint32_t>;
using Ints = Several<std::int32_t>;

// f of the corresponding parts of all.
template <class To, class F, class... T>
inline To by_parts(F f, const Several<T>&... of) {
  To to;
#pragma GCC unroll 4
  for (int p = 0; p < PARTS; ++p) to.part[p] = f(of.part[p]...);
  return to;
}

template <class V, class T>
inline V load_parts(const T* from) {
  V v;
#pragma GCC unroll 4
  for (int p = 0; p < PARTS; ++p) v.part[p] = reinterpret_cast<const typename V::Part*>(from)[p];
  return v;
}
template <class V, class T>
inline void store_parts(T* to, const V& v) {
#pragma GCC unroll 4
  for (int p = 0; p < PARTS; ++p) reinterpret_cast<typename V::Part*>(to)[p] = v.part[p];
}
inline Floats load(const float* p) { return load_parts<Floats>(p); }
inline void store(float* p, const Floats& v) { store_parts(p, v); }
inline Words load_words(const void* p) { return load_parts<Words>(static_cast<const char*>(p)); }
inline void store_words(void* p, const Words& v) { store_parts(static_cast<char*>(p), v); }

template <class To, class T>
inline To bits(const Several<T>& v) {
  return by_parts<To>([](auto part) { return (typename To::Part)part; }, v);
}
template <class To, class T>
inline To convert(const Several<T>& v) {
  return by_parts<To>([](auto part) { return __builtin_convertvector(part, typename To::Part); }, v);
}

template <class To, class Small>
inline To widened(const Small* from) {
  typedef Small Vector __attribute__((vector_size(OF_PART * sizeof(Small)), aligned(sizeof(Small)), may_alias));
  To to;
#pragma GCC unroll 4
  for (int p = 0; p < PARTS; ++p)
    to.part[p] = __builtin_convertvector(*reinterpret_cast<const Vector*>(from + p * OF_PART), typename To::Part);
  return to;
}
template <class Small, class T>
inline void narrowed(const Several<T>& v, Small* to) {
  typedef Small Vector __attribute__((vector_size(OF_PART * sizeof(Small)), aligned(sizeof(Small)), may_alias));
#pragma GCC unroll 4
  for (int p = 0; p < PARTS; ++p) *reinterpret_cast<Vector*>(to + p * OF_PART) = __builtin_convertvector(v.part[p], Vector);
}
#ifdef __AVX2__
// GCC 12 widens half a vector at a time by itself.
inline Ints widened_bytes(const char* from) {
  Ints to;
#pragma GCC unroll 2
  for (int p = 0; p < PARTS; ++p)
    to.part[p] = bits<Ints::Part>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + p * OF_PART))));
  return to;
}
template <>
inline Words widened<Words, std::uint16_t>(const std::uint16_t* from) {
  Words to;
#pragma GCC unroll 2
  for (int p = 0; p < PARTS; ++p)
    to.part[p] = bits<Words::Part>(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from) + p)));
  return to;
}
#else
inline Ints widened_bytes(const char* from) { return widened<Ints>(reinterpret_cast<const signed char*>(from)); }
#endif
#if defined(__F16C__) && defined(__AVX2__)
inline Floats widened_halves(const std::uint16_t* from) {
  const auto* parts = reinterpret_cast<const __m128i*>(from);
  return {{bits<Floats::Part>(_mm256_cvtph_ps(_mm_loadu_si128(parts))), bits<Floats::Part>(_mm256_cvtph_ps(_mm_loadu_si128(parts + 1)))}};
}
inline void narrowed_to_halves(const Floats& v, std::uint16_t* to) {
#pragma GCC unroll 2
  for (int p = 0; p < PARTS; ++p)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to) + p, _mm256_cvtps_ph(bits<__m256>(v.part[p]), _MM_FROUND_CUR_DIRECTION));
}
#else
inline Floats widened_halves(const std::uint16_t* from) { return widened<Floats>(reinterpret_cast<const _Float16*>(from)); }
inline void narrowed_to_halves(const Floats& v, std::uint16_t* to) { narrowed(v, reinterpret_cast<_Float16*>(to)); }
#endif

inline void interleave(const Words& a, const Words& b, Words& low, Words& high) {
  Words::Part to[2 * PARTS];
#pragma GCC unroll 4
  for (int p = 0; p < PARTS; ++p) {
    const auto x = a.part[p], y = b.part[p];
#ifdef __AVX2__
    to[2 * p] = __builtin_shufflevector(x, y, 0, 8, 1, 9, 2, 10, 3, 11);
    to[2 * p + 1] = __builtin_shufflevector(x, y, 4, 12, 5, 13, 6, 14, 7, 15);
#else
    to[2 * p] = __builtin_shufflevector(x, y, 0, 4, 1, 5);
    to[2 * p + 1] = __builtin_shufflevector(x, y, 2, 6, 3, 7);
#endif
  }
#pragma GCC unroll 4
  for (int p = 0; p < PARTS; ++p) low.part[p] = to[p], high.part[p] = to[PARTS + p];
}

#define D2MOE_OPERATOR(op)                                                            \
  template <class T>                                                                  \
  inline Several<T> operator op(const Several<T>& a, const Several<T>& b) {           \
    return by_parts<Several<T>>([](auto x, auto y) { return x op y; }, a, b);         \
  }                                                                                   \
  template <class T>                                                                  \
  inline Several<T> operator op(const Several<T>& a, decltype(T{}) b) {               \
    return by_parts<Several<T>>([b](auto x) { return x op b; }, a);                   \
  }                                                                                   \
  template <class T>                                                                  \
  inline Several<T> operator op(decltype(T{}) a, const Several<T>& b) {               \
    return by_parts<Several<T>>([a](auto y) { return a op y; }, b);                   \
  }                                                                                   \
  template <class T, class B>                                                         \
  inline Several<T>& operator op##=(Several<T>& a, const B& b) { return a = a op b; }
D2MOE_OPERATOR(+)
D2MOE_OPERATOR(-)
D2MOE_OPERATOR(*)
D2MOE_OPERATOR(/)
D2MOE_OPERATOR(&)
D2MOE_OPERATOR(|)
D2MOE_OPERATOR(^)
#undef D2MOE_OPERATOR

template <class T>
inline Several<T> operator-(const Several<T>& a) { return by_parts<Several<T>>([](auto x) { return -x; }, a); }
template <class T>
inline Several<T> operator<<(const Several<T>& a, int n) { return by_parts<Several<T>>([n](auto x) { return x << n; }, a); }
template <class T>
inline Several<T> operator>>(const Several<T>& a, int n) { return by_parts<Several<T>>([n](auto x) { return x >> n; }, a); }

#endif

inline Floats all(float value) { return value - Floats{}; }

// f of every number.
template <class F>
inline Floats each(F f, Floats v) {
  float numbers[LANES];
  store(numbers, v);
  for (float& number : numbers) number = f(number);
  return load(numbers);
}

}  // namespace d2moe
