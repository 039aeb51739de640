// Rows of 8 bits times codes of fewer than 8, in integers: for whoever asked for it, since rounding rows so costs some of their
// digits. Every processor has an instruction that multiplies bytes four at a time or two; codes are bytes after a shift and a
// mask for all of them, and half the work of the 16 bits that they otherwise are.
#pragma once

#include "rounded.h"

namespace d2moe {

// A unit of codes, in the order of storage.h for bytes: VECTORS times four inputs of 16 outputs.
template <int BITS>
struct ByteCodes {
  static constexpr int VECTORS = int(unit_inputs(BITS)) / 4;
  static constexpr i64 WORDS = VECTORS;

  // Four codes of each output, side by side.
  template <int V>
  D2MOE_INLINE static Words vector(const char* w) {
    constexpr std::uint32_t EACH = 0x01010101u, MASK = ((1u << BITS) - 1) * EACH;
    if constexpr (BITS != 3) return load_words(w) >> V * BITS & MASK;
    else if constexpr (V < 6) return load_words(w + V / 2 * 64) >> V % 2 * 3 & MASK;
    else return (load_words(w + (V - 6) * 64) >> 6 & 3 * EACH) | (load_words(w + 128) >> (V - 2) & 4 * EACH);
  }

  template <int... V>
  D2MOE_INLINE static void vectors(const char* w, Words (&to)[VECTORS], std::integer_sequence<int, V...>) {
    ((to[V] = vector<V>(w)), ...);
  }

  // sum + the products of all of a unit's inputs, those of VECTORS words x, `step` words apart.
  D2MOE_INLINE static Ints dots(Ints sum, const Words (&codes)[VECTORS], const std::uint32_t* x, int step) {
#if defined(__AVX512VNNI__)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) {
      const __m512i four = _mm512_set1_epi32(int(x[v * step]));
      sum = bits<Ints>(_mm512_dpbusd_epi32(bits<__m512i>(sum), bits<__m512i>(codes[v]), four));
    }
    return sum;
#elif defined(__AVX512BW__)
    // Of two products each: 8 of the largest are within 16 bits.
    __m512i pairs = _mm512_maddubs_epi16(bits<__m512i>(codes[0]), _mm512_set1_epi32(int(x[0])));
#pragma GCC unroll 8
    for (int v = 1; v < VECTORS; ++v)
      pairs = _mm512_add_epi16(pairs, _mm512_maddubs_epi16(bits<__m512i>(codes[v]), _mm512_set1_epi32(int(x[v * step]))));
    return sum + bits<Ints>(_mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
#elif defined(__AVX2__)
#pragma GCC unroll 2
    for (int p = 0; p < PARTS; ++p) {
      __m256i pairs = _mm256_maddubs_epi16(bits<__m256i>(codes[0].part[p]), _mm256_set1_epi32(int(x[0])));
#pragma GCC unroll 8
      for (int v = 1; v < VECTORS; ++v) {
        const __m256i four = _mm256_set1_epi32(int(x[v * step]));
        pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(bits<__m256i>(codes[v].part[p]), four));
      }
      sum.part[p] += bits<Ints::Part>(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    return sum;
#else
    for (int v = 0; v < VECTORS; ++v)
      for (int i = 0; i < 32; i += 8) sum += bits<Ints>(codes[v] >> i & 255u) * i32(std::int8_t(x[v * step] >> i));
    return sum;
#endif
  }

  template <int M, int NB>
  D2MOE_INLINE static void unit(const std::uint32_t* x, const char* w, i64 stride, Ints (&sums)[M][NB]) {
#pragma GCC unroll 4
    for (int b = 0; b < NB; ++b) {
      Words codes[VECTORS];
      vectors(w + b * stride, codes, std::make_integer_sequence<int, VECTORS>{});
#pragma GCC unroll 6
      for (int m = 0; m < M; ++m) sums[m][b] = dots(sums[m][b], codes, x + m, M);
    }
  }
};

}  // namespace d2moe
