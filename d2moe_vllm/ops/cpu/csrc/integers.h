// Rows of bfloat16 times codes of fewer than 8 bits, in integers of 16 bits (rounded.h): on processors with AVX2 and no more, where
// a number of 32 bits takes twice the room of one of 16, and a code is the longer way to a float. bfloat16 has 8 bits: 16 of the
// largest of a group's inputs lose none that count.
#pragma once

#include "rounded.h"

#ifdef D2MOE_INTEGERS

namespace d2moe {

// 16 outputs of two inputs, side by side.
struct Line { __m256i part[2]; };

template <int BITS>
struct IntegerCodes {
  static constexpr i64 PAIRS = unit_inputs(BITS) / 2, WORDS = PAIRS;

  static __m256i load(const char* w) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)); }

  D2MOE_INLINE static Line pair(const char* w, int p) {
    Line line;
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const char* half = w + 32 * h;
      if (BITS == 3 && p == 15) {
        const __m256i low = _mm256_srli_epi16(load(half), 15);
        const __m256i middle = _mm256_and_si256(_mm256_srli_epi16(load(half + 64), 14), _mm256_set1_epi16(2));
        const __m256i top = _mm256_and_si256(_mm256_srli_epi16(load(half + 128), 13), _mm256_set1_epi16(4));
        line.part[h] = _mm256_or_si256(low, _mm256_or_si256(middle, top));
      } else {
        const int of_line = BITS == 3 ? 5 : int(PAIRS), shift = p % of_line * BITS;
        const __m256i code = _mm256_srli_epi16(load(half + (BITS == 3 ? p / 5 * 64 : 0)), shift);
        line.part[h] = _mm256_and_si256(code, _mm256_set1_epi16((1 << BITS) - 1));
      }
    }
    return line;
  }

  template <int M, int NB>
  D2MOE_INLINE static void unit(const std::uint32_t* x, const char* w, i64 stride, Ints (&sums)[M][NB]) {
    pairs<M, NB>(x, w, stride, sums, std::make_integer_sequence<int, int(PAIRS)>{});
  }

  template <int M, int NB, int... P>
  D2MOE_INLINE static void pairs(
      const std::uint32_t* x, const char* w, i64 stride, Ints (&sums)[M][NB], std::integer_sequence<int, P...>) {
    auto one = [&](int p) D2MOE_HERE {
      Line lines[NB];
#pragma GCC unroll 4
      for (int b = 0; b < NB; ++b) lines[b] = pair(w + b * stride, p);
#pragma GCC unroll 6
      for (int m = 0; m < M; ++m) {
        const __m256i both = _mm256_set1_epi32(int(x[p * M + m]));
#pragma GCC unroll 4
        for (int b = 0; b < NB; ++b)
#pragma GCC unroll 2
          for (int h = 0; h < 2; ++h) sums[m][b].part[h] += bits<Ints::Part>(_mm256_madd_epi16(lines[b].part[h], both));
      }
    };
    (one(P), ...);
  }
};

}  // namespace d2moe
#endif
