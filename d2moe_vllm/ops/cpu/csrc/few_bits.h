// Rows times a factor of 8, 4, 3 or 2 bits (storage.h): codes are widened in registers.
//
// The codes of a group are multiplied as the whole or half numbers that they are, and their sum by the group's scale: weights
// are exact, and there is one rounding less than with weights that were widened to 16 bits. With bfloat16's dot product a line
// of 2 inputs x 16 outputs is a shift of words and a lookup in a table of 32 words, which repeats
// every 2^bits, so that what is above a code needs no mask. Bytes become floats: as bfloat16 they take longer to make than their
// products save.
#pragma once

#include "bytes.h"
#include "integers.h"

namespace d2moe {

// The number that a code of fewer than 8 bits stands for.
template <int BITS>
constexpr float meaning(int code) { return BITS == 4 ? float(code - 8) : BITS == 3 ? code - 3.5f : code - 1.5f; }

// Groups of so many inputs that are multiplied with all rows before the next are read: as many as take 16 KB for four blocks.
constexpr i64 groups_at_once(i64 bits, i64 group) { return std::clamp<i64>(INPUTS * 16 / bits / group, 1, MOST_GROUPS); }

template <int BITS>
struct Codes {
  static constexpr i64 INPUTS_OF_UNIT = unit_inputs(BITS), BYTES = unit_bytes(BITS), LINES = BYTES / 64;

  static Words words(const char* w) { return load_words(w); }

  // What the lowest bits stand for.
  static Floats value(Words code) {
#ifdef __AVX512F__
    alignas(64) static constexpr float TABLE[16] = {
        meaning<BITS>(0), meaning<BITS>(1 & MASK), meaning<BITS>(2 & MASK), meaning<BITS>(3 & MASK),
        meaning<BITS>(4 & MASK), meaning<BITS>(5 & MASK), meaning<BITS>(6 & MASK), meaning<BITS>(7 & MASK),
        meaning<BITS>(8 & MASK), meaning<BITS>(9 & MASK), meaning<BITS>(10 & MASK), meaning<BITS>(11 & MASK),
        meaning<BITS>(12 & MASK), meaning<BITS>(13 & MASK), meaning<BITS>(14 & MASK), meaning<BITS>(15 & MASK)};
    return bits<Floats>(_mm512_permutexvar_ps(bits<__m512i>(code), _mm512_load_ps(TABLE)));
#else
    return convert<Floats>(bits<Ints>(code & std::uint32_t(MASK))) + meaning<BITS>(0);
#endif
  }
  static constexpr int MASK = (1 << BITS) - 1;

  // Of 16 bytes, with their signs.
  static Floats bytes(const char* w) { return convert<Floats>(widened_bytes(w)); }

  // A unit's weights of input i.
  D2MOE_INLINE static Floats weights(const char* w, i64 i) {
    if constexpr (BITS == 8) {
      return bytes(w + i * LANES);
    } else {
      const int line = int(i / 2), half = int(i % 2) * 16;
      if constexpr (BITS == 3) {
        if (line == 15) {
          const int top = half + 15;
          return value((words(w) >> top & 1) | (words(w + 64) >> top & 1) << 1 | (words(w + 128) >> top & 1) << 2);
        }
        return value(words(w + line / 5 * 64) >> (half + line % 5 * 3));
      } else {
        return value(words(w) >> (half + line * BITS));
      }
    }
  }

  // sums[m][b] += the weights of inputs begin .. end, of a unit that begins at `origin`, times theirs of M rows.
  // Rarely: where something has cut a group. Never inlined, so that it asks no registers of the rest.
  template <class P, int M, int NB>
  D2MOE_APART static void some(
      const typename P::Input* x, const char* w, i64 stride, i64 origin, i64 begin, i64 end, Floats (&sums)[M][NB]) {
    for (i64 i = begin; i < end; ++i) {
      Floats lines[NB];
      for (int b = 0; b < NB; ++b) lines[b] = weights(w + b * stride, i - origin);
      add<P>(x, i, lines, sums);
    }
  }

  // x: the rows from the unit's first input on.
  template <class P, int M, int NB>
  D2MOE_INLINE static void all_of(const typename P::Input* x, const char* w, i64 stride, Floats (&sums)[M][NB]) {
    auto one = [&](i64 i) D2MOE_HERE {
      Floats lines[NB];
      for (int b = 0; b < NB; ++b) lines[b] = weights(w + b * stride, i);
      add<P>(x, i, lines, sums);
    };
#ifdef D2MOE_UNROLLED
    every(one, std::make_integer_sequence<i64, INPUTS_OF_UNIT>{});
#else
#pragma GCC unroll 4
    for (i64 i = 0; i < INPUTS_OF_UNIT; ++i) one(i);
#endif
  }
  // Shifts by constants, which a loop does not promise.
  template <class F, i64... I>
  D2MOE_INLINE static void every(F f, std::integer_sequence<i64, I...>) { (f(I), ...); }

  template <class P, int M, int NB>
  D2MOE_INLINE static void add(
      const typename P::Input* x, i64 i, const Floats (&lines)[NB], Floats (&sums)[M][NB]) {
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) {
#ifdef D2MOE_DPBF16
      if constexpr (P::PAIR == 2) {
        const Words both = Words{} + Kernel<P>::pair(x + (i / 2 * M + m) * 2);
        const Floats value = bits<Floats>(i % 2 ? both & 0xffff0000u : both << 16);
        for (int b = 0; b < NB; ++b) sums[m][b] += lines[b] * value;
        continue;
      }
#endif
      const float value = x[i / P::PAIR * M * P::PAIR + m * P::PAIR + i % P::PAIR];
      for (int b = 0; b < NB; ++b) sums[m][b] += lines[b] * value;
    }
  }

#ifdef D2MOE_DPBF16
  static __m512i load(const char* w) { return _mm512_loadu_si512(w); }

  static __m512i table() {
    alignas(64) static constexpr std::uint16_t TABLE[32] = {
        WORD(0), WORD(1), WORD(2), WORD(3), WORD(4), WORD(5), WORD(6), WORD(7), WORD(8), WORD(9), WORD(10),
        WORD(11), WORD(12), WORD(13), WORD(14), WORD(15), WORD(0), WORD(1), WORD(2), WORD(3), WORD(4), WORD(5),
        WORD(6), WORD(7), WORD(8), WORD(9), WORD(10), WORD(11), WORD(12), WORD(13), WORD(14), WORD(15)};
    return _mm512_load_si512(TABLE);
  }
  // bfloat16 of what a code stands for: none has more than four significant bits.
  static constexpr std::uint16_t WORD(int code) {
    const float f = meaning<BITS>(code & MASK), size = f < 0 ? -f : f;
    if (size == 0) return 0;
    int exponent = 127;
    float s = size;
    for (; s >= 2; s /= 2) ++exponent;
    for (; s < 1; s *= 2) --exponent;
    return std::uint16_t((f < 0 ? 0x8000 : 0) | exponent << 7 | int((s - 1) * 128));
  }

  static constexpr int OF_LINE = BITS == 3 ? 5 : 16 / BITS;  // pairs of inputs in 64 bytes

  // The weights of two inputs, side by side: the l-th pair of 64 bytes; of 3 bits the sixteenth of a unit, too.
  static __m512i pair_of(const char* w, int l, __m512i table) {
    if (BITS == 3 && l == 15) {
      // Of each word the top bit; what is above the third bit of a code does not count.
      const __m512i low = _mm512_srli_epi16(load(w), 15), middle = _mm512_srli_epi16(load(w + 64), 14);
      const __m512i both = _mm512_ternarylogic_epi32(_mm512_set1_epi16(2), middle, low, 0xca);
      const __m512i code = _mm512_ternarylogic_epi32(_mm512_set1_epi16(4), _mm512_srli_epi16(load(w + 128), 13), both, 0xca);
      return _mm512_permutexvar_epi16(code, table);
    }
    return _mm512_permutexvar_epi16(_mm512_srl_epi16(load(w), _mm_cvtsi32_si128(l * BITS)), table);
  }

  template <int M, int NB>
  static void add_pair(const std::uint16_t* x, const char* w, i64 stride, int l, std::uint32_t mask, Floats (&sums)[M][NB]) {
    using K = Kernel<BFloat16>;
    __m512i lines[NB];
    for (int b = 0; b < NB; ++b) lines[b] = pair_of(w + b * stride, l, table());
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) {
      const std::uint32_t both = K::pair(x + 2 * m) & mask;
      for (int b = 0; b < NB; ++b) sums[m][b] = K::add(sums[m][b], lines[b], both);
    }
  }

  // A whole unit; x: the rows from its first input on.
  template <int M, int NB>
  static void add_unit(const std::uint16_t* x, const char* w, i64 stride, Floats (&sums)[M][NB]) {
#pragma GCC unroll 1
    for (int line = 0; line < LINES; ++line) {
#pragma GCC unroll 8
      for (int l = 0; l < OF_LINE; ++l, x += 2 * M) add_pair<M, NB>(x, w + line * 64, stride, l, ~0u, sums);
    }
    if (BITS == 3) add_pair<M, NB>(x, w, stride, 15, ~0u, sums);
  }
#endif

  // sums[m][b] += of inputs begin .. end of a group. x: a tile of M rows; w: the group's first unit, which begins at
  // `origin`; in: of the row. Inlined, so that sums stay in registers.
  template <class P, int M, int NB>
  D2MOE_INLINE static void group(
      const typename P::Input* x, const char* w, i64 stride, i64 origin, i64 begin, i64 end, i64 in, Next& next, i64& wait,
      Floats (&sums)[M][NB]) {
    x += origin * M;
    begin -= origin, end -= origin, in -= origin;
    auto ask = [&] { for (i64 i = 0; i < LINES; ++i) next.step<NB, 3>(wait); };
#ifdef D2MOE_DPBF16
    if constexpr (P::PAIR == 2 && BITS < 8) {
      constexpr i64 PAIRS = INPUTS_OF_UNIT / 2;
      // An input of another group beside the first or the last is left out.
      const bool cut_last = end % 2 && end < in;
      const i64 pairs = ceil_div(end, 2), whole = begin ? 0 : (pairs - cut_last) / PAIRS;
      for (i64 u = 0; u < whole; ++u, w += BYTES, x += INPUTS_OF_UNIT * M) {
        ask();
        add_unit<M, NB>(x, w, stride, sums);
      }
      for (i64 p = whole * PAIRS; p < pairs; ++p, x += 2 * M) {
        if (p % PAIRS == 0) ask();
        const std::uint32_t mask = (p == 0 && begin ? 0xffff0000u : ~0u) & (p == pairs - 1 && cut_last ? 0xffffu : ~0u);
        const char* unit = w + (p / PAIRS - whole) * BYTES;
        const int l = int(p % PAIRS);
        if (BITS == 3 && l == 15) add_pair<M, NB>(x, unit, stride, l, mask, sums);
        else add_pair<M, NB>(x, unit + l / OF_LINE * 64, stride, l % OF_LINE, mask, sums);
      }
      return;
    }
#endif
    auto part = [&](i64 unit, i64 first, i64 last) {
      ask();
      Floats own[M][NB];
      for (int m = 0; m < M; ++m) for (int b = 0; b < NB; ++b) own[m][b] = sums[m][b];
      some<P>(x, w, stride, unit, first, last, own);
      for (int m = 0; m < M; ++m) for (int b = 0; b < NB; ++b) sums[m][b] = own[m][b];
    };
    i64 unit = 0;
    if (begin) {
      part(0, begin, std::min(INPUTS_OF_UNIT, end));
      unit += INPUTS_OF_UNIT, w += BYTES;
    }
    for (; unit + INPUTS_OF_UNIT <= end; unit += INPUTS_OF_UNIT, w += BYTES) {
      ask();
      all_of<P>(x + unit * M, w, stride, sums);
    }
    if (unit < end) part(unit, unit, end);
  }
};

// A block of 16 outputs of a factor in codes, weight by weight.
template <class P, int BITS>
struct Opened {
  Factor<P> f;

  // Of an input, 0 beyond the last.
  Floats operator()(i64 input) const {
    if (input >= f.in) return Floats{};
    const Groups groups = f.groups();
    const i64 g = (input + groups.within) / groups.group, at = input - groups.origin(g), inputs = unit_inputs(BITS);
    const char* unit = f.w + (groups.unit(g, BITS) + at / inputs) * unit_bytes(BITS);
    return Codes<BITS>::weights(unit, at % inputs) * Kernel<BFloat16>::widen(f.scales + g * LANES);
  }
};

// out[m][0 .. 16 NB) += x w^T for a tile of M rows over some groups.
template <class P, int BITS, int M, int NB>
void some_codes(
    const typename P::Input* x, const Groups& groups, const Stored& f, i64 first, i64 last, Next next, float* out, i64 ld) {
  using Widen = Kernel<BFloat16>;  // scales
  const char* w = f.w + groups.unit(first, BITS) * Codes<BITS>::BYTES;
  i64 wait = 0;
  for (i64 g = first; g < last; w += groups.units_of(g++, BITS) * Codes<BITS>::BYTES) {
    Floats sums[M][NB];
    for (auto& row : sums) for (Floats& sum : row) sum = Floats{};
    Codes<BITS>::template group<P>(
        x, w, f.stride, groups.origin(g), groups.begin(g), groups.end(g), groups.in, next, wait, sums);
    for (int b = 0; b < NB; ++b) {
      const Floats scale = Widen::widen(f.scales + b * f.scale_stride + g * LANES);
      for (int m = 0; m < M; ++m) {
        float* to = out + m * ld + b * LANES;
        store(to, load(to) + sums[m][b] * scale);
      }
    }
  }
}

// The same, as many blocks at once as registers hold, which words of codes want as well.
template <class P, int BITS, int M, int NB>
void codes_tile(
    const typename P::Input* x, const Groups& groups, const Stored& f, i64 first, i64 last, Next next, float* out, i64 ld) {
  constexpr int SOME = at_once<M, SUMS >= 24 ? NB : std::min(NB, 2)>();
  for (int b = 0; b < NB; b += SOME)
    some_codes<P, BITS, M, SOME>(x, groups, f.from(b), first, last, next.from(b), out + b * LANES, ld);
}

template <class P, int BITS, int NB>
void codes_blocks(const Rows<P>& x, const Factor<P>& f, Next after, float* out, i64 ld) {
  const Groups groups = f.groups();
  const i64 count = groups.count(), run = groups_at_once(BITS, groups.group), stride = f.stride();
  const Stored stored{f.w, stride, f.scales, f.scale_stride()};
  auto lines = [&](i64 from, i64 to) { return (groups.unit(to, BITS) - groups.unit(from, BITS)) * Codes<BITS>::LINES; };
  // Not by the first group instead: products that are added to nothing may be rounded twice, for some numbers of rows.
  for (i64 r = 0; r < x.n; ++r) std::fill_n(out + r * ld, NB * LANES, 0.0f);
  for (i64 first = 0; first < count; first += run) {
    const i64 last = std::min(count, first + run), own = lines(first, last);
    Next next{after.w, after.stride, std::min(own, after.lines)};
    if (last < count) next = {f.w + groups.unit(last, BITS) * Codes<BITS>::BYTES, stride, lines(last, std::min(count, last + run))};
    for (i64 t = 0; t < x.tiles; ++t) {
      with_rows<FACTOR_ROWS>(x.size(t), [&](auto m) {
        constexpr int M = decltype(m)::value;
        const Next own = next.share(t, x.tiles);
        float* to = out + x.first(t) * ld;
        auto by_rounded = [&](auto codes) {
          rounded_tile<decltype(codes), BITS, M, NB>(*x.rounded, x.first(t), groups, stored, first, last, own, to, ld);
        };
        if constexpr (BITS < 8)
          if (f.how.bytes) return by_rounded(ByteCodes<BITS>{});
#ifdef D2MOE_INTEGERS
        if constexpr (P::PAIR == 2 && BITS < 8)
          if (rounds<P>(f.how)) return by_rounded(IntegerCodes<BITS>{});
#endif
        codes_tile<P, BITS, M, NB>(x.tile(t), groups, stored, first, last, own, to, ld);
      });
    }
  }
}

template <class P, int NB>
void blocks_of(const Rows<P>& x, const Factor<P>& f, Next after, float* out, i64 ld) {
  if (!f.how.bits) return factor_blocks<P, NB>(x, f, after, out, ld);
  // What rows are held in is all that matters: float16's are float32's.
  using Q = std::conditional_t<P::PAIR == 1, Float32, P>;
  const Rows<Q> rows{x.data, x.n, x.k, x.tiles, x.rounded};
  const Factor<Q> codes{f.w, f.scales, f.how, f.out, f.in, f.first};
  switch (f.how.bits) {
    case 8: return codes_blocks<Q, 8, NB>(rows, codes, after, out, ld);
    case 4: return codes_blocks<Q, 4, NB>(rows, codes, after, out, ld);
    case 3: return codes_blocks<Q, 3, NB>(rows, codes, after, out, ld);
    case 2: return codes_blocks<Q, 2, NB>(rows, codes, after, out, ld);
  }
}

// out[r][0 .. 16 blocks) = x[r] W^T by the factor's first blocks; x.rounded where that `rounds`. after: what is read next.
template <class P>
void multiply_factor(const Rows<P>& x, const Factor<P>& f, i64 blocks, Next after, float* out, i64 ld) {
  i64 b = 0;
  for (; b + 4 <= blocks; b += 4) {
    const Next more = b + 8 <= blocks ? f.from((b + 4) * LANES).ahead() : after;
    blocks_of<P, 4>(x, f.from(b * LANES), more, out + b * LANES, ld);
  }
  for (; b < blocks; ++b) blocks_of<P, 1>(x, f.from(b * LANES), after, out + b * LANES, ld);
}

}  // namespace d2moe
