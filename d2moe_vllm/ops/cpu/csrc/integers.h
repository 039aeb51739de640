// Rows of bfloat16 times codes of fewer than 8 bits, in integers: on processors with AVX2 and no more, where a number of 32 bits
// takes twice the room of one of 16, and a code is the longer way to a float.
//
// A group's inputs are rounded to 16 bits of what is the largest among them: bfloat16 has 8. Products and their sums are then exact,
// whatever their order; the scales of the group and of its inputs come last.
#pragma once

#include "kernels.h"

#if defined(__AVX2__) && !defined(__AVX512F__)
#define D2MOE_INTEGERS 1

namespace d2moe {

// Inputs of a group whose sums of codes are within 31 bits, twice.
constexpr i64 MOST_OF_GROUP = 256;

// Inputs of a group that cannot be told from 0, of whatever scale.
constexpr float LEAST = 1e-30f;

// Rows as whole numbers, for factors whose inputs are grouped so: rounded once for all of their outputs.
struct Wholes {
  // Of every group as many inputs as fill units of any number of bits.
  static constexpr i64 UNIT = 32;

  // Tile by tile: [pairs of inputs][rows], [groups][rows] twice.
  std::vector<std::uint32_t> pairs;
  std::vector<float> scales;
  std::vector<i32> sums;
  i64 count = 0, inputs = 0, in = 0, group = 0, within = 0;

  void forget() { group = 0; }
  bool fits(const Groups& of) const { return in == of.in && group == of.group && within == of.within; }

  static i64 inputs_of(const Groups& groups, i64 g) { return ceil_div(groups.end(g) - groups.origin(g), UNIT) * UNIT; }
  // Inputs before a group's, in a row.
  static i64 place(const Groups& groups, i64 g) { return g ? inputs_of(groups, 0) + (g - 1) * inputs_of(groups, 1) : 0; }

  void fill(const Rows<BFloat16>& rows, const Groups& groups) {
    count = groups.count(), in = groups.in, group = groups.group, within = groups.within;
    inputs = count ? place(groups, count - 1) + inputs_of(groups, count - 1) : 0;
    pairs.resize(inputs / 2 * rows.n), scales.resize(count * rows.n), sums.resize(count * rows.n);
    for (i64 t = 0; t < rows.tiles; ++t)
      with_rows<FACTOR_ROWS>(rows.size(t), [&](auto m) { tile<decltype(m)::value>(rows.tile(t), groups, rows.first(t)); });
  }

 private:
  // x: a tile, whose first row is the `row`th.
  template <int M>
  void tile(const float* x, const Groups& groups, i64 row) {
    auto* to = reinterpret_cast<std::int16_t*>(pairs.data() + row * inputs / 2);
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
      round<M>(from, n, to, &scales[(row * count) + g * M], &sums[(row * count) + g * M]);
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
    for (int k = 0; k < M; ++k) store_ints(all + k * LANES, lanes[k]);
    for (i64 left = LANES / 2; left >= 2; left /= 2)
      for (i64 j = 0; j < left * M; ++j) all[j] = f(all[j], all[j + left * M]);
    for (i64 m = 0; m < M; ++m) to[m] = f(all[2 * m], all[2 * m + 1]);
  }
  static void store_ints(i32* to, const Ints& v) { store_parts(to, v); }

  // n inputs of M rows, a multiple of 16.
  template <int M>
  static void round(const float* x, i64 n, std::int16_t* to, float* scales, i32* sums) {
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
};

// 16 outputs of two inputs, side by side.
struct Line { __m256i part[2]; };

template <int BITS>
struct IntegerCodes {
  static constexpr i64 PAIRS = unit_inputs(BITS) / 2, BYTES = unit_bytes(BITS), LINES = BYTES / 64;
  // Codes are whole numbers from 0 up: half of this is what they are too large by.
  static constexpr i32 TWICE_ABOVE = BITS == 4 ? 16 : BITS == 3 ? 7 : 3;

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

  template <int M, int NB, int... P>
  D2MOE_INLINE static void unit(
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

// out[m][0 .. 16 NB) += x w^T for M rows from the `row`th on, a tile, over some groups.
template <int BITS, int M, int NB>
void some_integers(
    const Wholes& x, i64 row, const Groups& groups, const Stored& f, i64 first, i64 last, Next next, float* out, i64 ld) {
  using C = IntegerCodes<BITS>;
  const char* w = f.w + groups.unit(first, BITS) * C::BYTES;
  i64 wait = 0;
  for (i64 g = first; g < last; ++g) {
    const std::uint32_t* pairs = x.pairs.data() + row * x.inputs / 2 + Wholes::place(groups, g) / 2 * M;
    Ints sums[M][NB];
    for (auto& one : sums) for (Ints& sum : one) sum = Ints{};
    for (i64 units = groups.units_of(g, BITS); units; --units, w += C::BYTES, pairs += C::PAIRS * M) {
      for (i64 i = 0; i < C::LINES; ++i) next.step<NB, 3>(wait);
      C::template unit<M, NB>(pairs, w, f.stride, sums, std::make_integer_sequence<int, int(C::PAIRS)>{});
    }
    const float* of_inputs = x.scales.data() + row * x.count + g * M;
    const i32* all = x.sums.data() + row * x.count + g * M;
    for (int b = 0; b < NB; ++b) {
      const Floats scale = Kernel<BFloat16>::widen(f.scales + b * f.scale_stride + g * LANES);
      for (int m = 0; m < M; ++m) {
        float* to = out + m * ld + b * LANES;
        const Ints twice = sums[m][b] + sums[m][b] - C::TWICE_ABOVE * all[m];
        store(to, load(to) + convert<Floats>(twice) * (scale * (0.5f * of_inputs[m])));
      }
    }
  }
}

template <int BITS, int M, int NB>
void integers_tile(
    const Wholes& x, i64 row, const Groups& groups, const Stored& f, i64 first, i64 last, Next next, float* out, i64 ld) {
  constexpr int SOME = at_once<M, std::min(NB, 2)>();
  for (int b = 0; b < NB; b += SOME)
    some_integers<BITS, M, SOME>(x, row, groups, f.from(b), first, last, next.from(b), out + b * LANES, ld);
}

// Rows as whole numbers: as somebody has them, or in memory that is good until this thread rounds others.
inline const Wholes& wholes_of(const Rows<BFloat16>& rows, const Groups& groups) {
  if (rows.wholes && rows.wholes->fits(groups)) return *rows.wholes;
  thread_local Wholes own;
  own.fill(rows, groups);
  return own;
}

}  // namespace d2moe
#endif
