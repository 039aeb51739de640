// Rows as whole numbers, for products with codes of fewer than 8 bits: of 16 bits, where a processor multiplies those best
// (integers.h), or of 8, where somebody asked for that (bytes.h).
//
// A group's inputs are rounded to so many bits of what is the largest among them. Products and their sums are then exact, whatever
// their order; the scales of the group and of its inputs come last. Rows are rounded once for all outputs.
#pragma once

#include "kernels.h"

#if defined(__AVX2__) && !defined(__AVX512F__)
#define D2MOE_INTEGERS 1
#endif

namespace d2moe {

// Inputs of a group whose sums of codes are within 31 bits, twice, in 16 bits; in 8 no group is too large.
constexpr i64 MOST_OF_GROUP = 256;

// Inputs of a group that cannot be told from 0, of whatever scale.
constexpr float LEAST = 1e-30f;

// Whether rows are rounded before they meet a factor that is stored so.
template <class P>
constexpr bool rounds(Storage how) {
#ifdef D2MOE_INTEGERS
  if (P::PAIR == 2 && how.bits && how.bits < 8 && how.group <= MOST_OF_GROUP) return true;
#endif
  return how.bytes;
}

struct Rounded {
  // Of every group as many inputs as fill units of any number of bits.
  static constexpr i64 UNIT = 32;

  // Tile by tile: [inputs / per_word][rows], the first input lowest; [groups][rows] twice.
  std::vector<std::uint32_t> words;
  std::vector<float> scales;
  std::vector<i32> sums;
  i64 count = 0, inputs = 0, per_word = 2;

  static i64 inputs_of(const Groups& groups, i64 g) { return ceil_div(groups.end(g) - groups.origin(g), UNIT) * UNIT; }
  // Inputs before a group's, in a row.
  static i64 place(const Groups& groups, i64 g) { return g ? inputs_of(groups, 0) + (g - 1) * inputs_of(groups, 1) : 0; }

  // Of a tile of `rows` rows, whose first is the `row`th: its words from a group on, and the group's scales and sums.
  const std::uint32_t* words_at(i64 row, const Groups& groups, i64 g, i64 rows) const {
    return words.data() + (row * inputs + place(groups, g) * rows) / per_word;
  }
  const float* scales_at(i64 row, i64 g, i64 rows) const { return scales.data() + row * count + g * rows; }
  const i32* sums_at(i64 row, i64 g, i64 rows) const { return sums.data() + row * count + g * rows; }

  // For `rows` rows that will meet a factor of these groups; then `fill` for each of their tiles, in any order.
  void prepare(i64 rows, const Groups& groups, bool bytes) {
    count = groups.count(), per_word = bytes ? 4 : 2;
    inputs = count ? place(groups, count - 1) + inputs_of(groups, count - 1) : 0;
    words.resize(inputs / per_word * rows), scales.resize(count * rows), sums.resize(count * rows);
  }

  template <class P>
  void fill(const Rows<P>& rows, i64 tile, const Groups& groups) {
    const i64 row = rows.first(tile);
    with_rows<FACTOR_ROWS>(rows.size(tile), [&](auto m) {
      constexpr int M = decltype(m)::value;
      if (per_word == 4) return in_bytes<P, M>(rows.tile(tile), groups, row);
#ifdef D2MOE_INTEGERS
      if constexpr (P::PAIR == 2) in_pairs<M>(rows.tile(tile), groups, row);
#endif
    });
  }

 private:
  // x: a tile, whose first row is the `row`th. Row by row.
  template <class P, int M>
  void in_bytes(const typename P::Input* x, const Groups& groups, i64 row) {
    thread_local std::vector<float> some;
    auto* to = reinterpret_cast<std::int8_t*>(words.data() + row * inputs / 4);
    for (i64 g = 0; g < count; ++g) {
      const i64 origin = groups.origin(g), begin = groups.begin(g), end = groups.end(g), n = inputs_of(groups, g);
      some.assign(n, 0.0f);
      for (i64 m = 0; m < M; ++m) {
        for (i64 i = begin; i < end; ++i)
          some[i - origin] = P::of(x[M == 1 ? i : i / P::PAIR * M * P::PAIR + m * P::PAIR + i % P::PAIR]);
        bytes_of(some.data(), n, to + m * 4, M * 4, scales[row * count + g * M + m], sums[row * count + g * M + m]);
      }
      to += n * M;
    }
  }

  // n inputs, a multiple of 16, four side by side every `step` bytes.
  static void bytes_of(const float* x, i64 n, std::int8_t* to, i64 step, float& scale, i32& sum) {
    // Sizes as whole numbers: one that is no number is the largest.
    Ints most{};
    for (i64 i = 0; i < n; i += LANES)
      most = by_parts<Ints>([](auto a, auto b) {
        const auto size = b & 0x7fffffff;
        return a > size ? a : size;
      }, most, bits<Ints>(load(x + i)));
    i32 lanes[LANES], largest = 0;
    put(lanes, most);
    for (const i32 lane : lanes) largest = std::max(largest, lane);
    const float size = bits<float>(largest);
    const bool finite = largest < 0x7f800000;
    sum = 0;
    scale = !finite ? NAN : size < LEAST ? 0.0f : size / 127.0f;
    if (scale == 0.0f || !finite) {
      for (i64 i = 0; i < n; i += 4) std::memset(to + i / 4 * step, 0, 4);
      return;
    }
    const float inverse = 127.0f / size, magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    Ints total{};
    for (i64 i = 0; i < n; i += LANES) {
      const Ints whole = convert<Ints>((load(x + i) * inverse + magic) - magic);
      std::int8_t small[LANES];
      narrowed(whole, small);
      for (i64 l = 0; l < LANES; l += 4) std::memcpy(to + (i + l) / 4 * step, small + l, 4);
      total += whole;
    }
    put(lanes, total);
    for (const i32 lane : lanes) sum += lane;
  }
  static void put(i32* to, const Ints& v) { store_words(to, bits<Words>(v)); }

#ifdef D2MOE_INTEGERS
  // x: a tile, whose first row is the `row`th.
  template <int M>
  void in_pairs(const float* x, const Groups& groups, i64 row) {
    auto* to = reinterpret_cast<std::int16_t*>(words.data() + row * inputs / 2);
    for (i64 g = 0; g < count; ++g) {
      const i64 origin = groups.origin(g), begin = groups.begin(g), end = groups.end(g), n = inputs_of(groups, g);
      const float* from = x + origin * M;
      float copy[(MOST_OF_GROUP + 2 * UNIT) * M];
      if (begin != origin || end - origin != n) {
        std::fill_n(copy, n * M, 0.0f);
        for (i64 i = begin - origin; i < end - origin; ++i)
          for (i64 m = 0; m < M; ++m) copy[i / 2 * 2 * M + m * 2 + i % 2] = from[i / 2 * 2 * M + m * 2 + i % 2];
        from = copy;
      }
      pairs_of<M>(from, n, to, &scales[(row * count) + g * M], &sums[(row * count) + g * M]);
      to += n * M;
    }
  }

  // f of all of a row's lanes.
  template <int M, class F>
  static void joined(const Ints (&lanes)[M], F f, i32* to) {
    if constexpr (M == 1) {
      typedef i32 Four __attribute__((vector_size(16)));
      const auto eight = f(lanes[0].part[0], lanes[0].part[1]);
      Four four = f(Four(__builtin_shufflevector(eight, eight, 0, 1, 2, 3)), Four(__builtin_shufflevector(eight, eight, 4, 5, 6, 7)));
      four = f(four, __builtin_shufflevector(four, four, 2, 3, 0, 1));
      to[0] = f(four, __builtin_shufflevector(four, four, 1, 0, 3, 2))[0];
      return;
    }
    i32 all[LANES * M];
    for (int k = 0; k < M; ++k) put(all + k * LANES, lanes[k]);
    for (i64 left = LANES / 2; left >= 2; left /= 2)
      for (i64 j = 0; j < left * M; ++j) all[j] = f(all[j], all[j + left * M]);
    for (i64 m = 0; m < M; ++m) to[m] = f(all[2 * m], all[2 * m + 1]);
  }

  // n inputs of M rows, a multiple of 16.
  template <int M>
  static void pairs_of(const float* x, i64 n, std::int16_t* to, float* scales, i32* sums) {
    // Sizes as whole numbers: one that is no number is the largest.
    Ints most[M];
    for (auto& one : most) one = Ints{};
    for (i64 i = 0; i < n; i += LANES)
      for (int k = 0; k < M; ++k)
        most[k] = by_parts<Ints>([](auto a, auto b) {
          const auto size = b & 0x7fffffff;
          return a > size ? a : size;
        }, most[k], bits<Ints>(load(x + i * M + k * LANES)));
    i32 largest[M];
    joined<M>(most, [](auto a, auto b) { return a > b ? a : b; }, largest);
    float inverse[LANES * M], of_row[M];
    for (int m = 0; m < M; ++m) {
      const float size = bits<float>(largest[m]);
      const bool finite = largest[m] < 0x7f800000;
      scales[m] = !finite ? NAN : size < LEAST ? 0.0f : size / 32767.0f;
      of_row[m] = !finite || size < LEAST ? 0.0f : 32767.0f / size;
    }
    for (i64 j = 0; j < LANES * M; ++j) inverse[j] = of_row[j / 2 % M];
    Ints total[M];
    for (auto& one : total) one = Ints{};
    for (i64 i = 0; i < n; i += LANES)
      for (int k = 0; k < M; ++k) {
        const Floats v = load(x + i * M + k * LANES) * (M == 1 ? all(of_row[0]) : load(inverse + k * LANES));
        const __m256i low = _mm256_cvtps_epi32(bits<__m256>(v.part[0])), high = _mm256_cvtps_epi32(bits<__m256>(v.part[1]));
        total[k].part[0] += bits<Ints::Part>(low), total[k].part[1] += bits<Ints::Part>(high);
        const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i * M + k * LANES), packed);
      }
    joined<M>(total, [](auto a, auto b) { return a + b; }, sums);
  }
#endif
};

// out[m][0 .. 16 NB) += what a group's sums of codes stand for: codes are whole numbers from 0 up. all: the sum of its inputs.
template <int BITS, int M, int NB>
D2MOE_INLINE void add_group(
    const Ints (&sums)[M][NB], const Stored& f, i64 g, const float* of_inputs, const i32* all, float* out, i64 ld) {
  // Half of this is what codes are too large by.
  constexpr i32 TWICE_ABOVE = BITS == 4 ? 16 : BITS == 3 ? 7 : 3;
  for (int b = 0; b < NB; ++b) {
    const Floats scale = Kernel<BFloat16>::widen(f.scales + b * f.scale_stride + g * LANES);
    for (int m = 0; m < M; ++m) {
      float* to = out + m * ld + b * LANES;
      const Ints twice = sums[m][b] + sums[m][b] - TWICE_ABOVE * all[m];
      store(to, load(to) + convert<Floats>(twice) * (scale * (0.5f * of_inputs[m])));
    }
  }
}

// out[m][0 .. 16 NB) += x w^T for M rows from the `row`th on, a tile, over some groups. Codes: how a unit of them is multiplied,
// with WORDS words of each row.
template <class Codes, int BITS, int M, int NB>
void some_rounded(
    const Rounded& x, i64 row, const Groups& groups, const Stored& f, i64 first, i64 last, Next next, float* out, i64 ld) {
  constexpr i64 BYTES = unit_bytes(BITS);
  const char* w = f.w + groups.unit(first, BITS) * BYTES;
  i64 wait = 0;
  for (i64 g = first; g < last; ++g) {
    const std::uint32_t* words = x.words_at(row, groups, g, M);
    Ints sums[M][NB];
    for (auto& one : sums) for (Ints& sum : one) sum = Ints{};
    for (i64 units = groups.units_of(g, BITS); units; --units, w += BYTES, words += Codes::WORDS * M) {
      for (i64 i = 0; i < BYTES / 64; ++i) next.step<NB, 3>(wait);
      Codes::template unit<M, NB>(words, w, f.stride, sums);
    }
    add_group<BITS>(sums, f, g, x.scales_at(row, g, M), x.sums_at(row, g, M), out, ld);
  }
}

// The same, as many blocks at once as registers hold, which words of codes want as well.
template <class Codes, int BITS, int M, int NB>
void rounded_tile(
    const Rounded& x, i64 row, const Groups& groups, const Stored& f, i64 first, i64 last, Next next, float* out, i64 ld) {
  constexpr int SOME = at_once<M, SUMS >= 24 ? NB : std::min(NB, 2)>();
  for (int b = 0; b < NB; b += SOME)
    some_rounded<Codes, BITS, M, SOME>(x, row, groups, f.from(b), first, last, next.from(b), out + b * LANES, ld);
}

// Rows that are to be rounded for a factor.
template <class P>
struct ToRound {
  Rounded* to;
  Rows<P> rows;
  const Factor<P>* factor;
};

// All tiles of all rows, each a task.
template <class P, class Parallel>
void round_rows(const std::vector<ToRound<P>>& all, const Parallel& parallel) {
  std::vector<std::pair<const ToRound<P>*, i64>> tasks;
  for (const ToRound<P>& one : all) {
    one.to->prepare(one.rows.n, one.factor->groups(), one.factor->how.bytes);
    for (i64 t = 0; t < one.rows.tiles; ++t) tasks.push_back({&one, t});
  }
  parallel(i64(tasks.size()), [&](i64 number) {
    const auto [one, tile] = tasks[number];
    one->to->fill(one->rows, tile, one->factor->groups());
  });
}

}  // namespace d2moe
