// The two products everything is made of: rows times a packed factor, and rows times a packed base.
//
// A packed factor W [out, in] is blocks of 16 outputs: [out / 16][in / PAIR][16][PAIR]. A packed base [kept, out] is
// blocks of two lines of outputs: [out / FOLD][kept][FOLD], so that a column that is not selected is not read.
// Every element of a result is summed over its inputs in ascending order, whatever else is computed beside it: neither
// the other rows, nor the number of threads, nor how rows are cut into tiles changes a bit.
#pragma once

#include <algorithm>
#include <type_traits>

#include "vectors.h"

namespace d2moe {

// Of a tile, for one or two vectors of outputs and for up to four: 24 accumulators of AVX-512's 32 registers.
constexpr int MANY_ROWS = 12, FEW_ROWS = 6;
// Columns of a base that are multiplied with all rows before the next are read: 16 KB of bfloat16.
constexpr i64 COLUMNS = 128;

template <class P>
constexpr i64 fold() { return 2 * P::LINE; }

// Asks for the columns that the next run will need while this one is multiplied: otherwise memory would be idle
// whenever a run is used for a second tile of rows. Each pass over a run asks for its share of them.
template <class P>
struct Ahead {
  const typename P::Element* w;
  const i32* selected;
  i64 next, end;      // columns
  i64 passes, pass;   // over a run, and which this is

  void step() {
    if (next < end && next % passes == pass) {
      const auto* column = w + (selected ? selected[next] : next) * fold<P>();
      __builtin_prefetch(column, 0, 2);
      __builtin_prefetch(reinterpret_cast<const char*>(column) + 64, 0, 2);
    }
    ++next;
  }
};

template <class P>
struct Kernel;

// float32 and float16: widen the weights, multiply by each row's value.
template <class P>
struct Widening {
  using Element = typename P::Element;
  using Input = typename P::Input;

  static Floats widen(const Element* w) {
    if constexpr (sizeof(Element) == 4) {
      return load(reinterpret_cast<const float*>(w));
    } else {
      typedef _Float16 Halves __attribute__((vector_size(32), aligned(2), may_alias));
      return __builtin_convertvector(*reinterpret_cast<const Halves*>(w), Floats);
    }
  }

  template <int M, int NB>
  static void factor(const Input* const* x, const Element* w, i64 stride, i64 k, Floats (&acc)[M][NB]) {
    for (i64 i = 0; i < k; ++i) {
      for (int b = 0; b < NB; ++b) {
        const Floats line = widen(w + b * stride + i * LANES);
        for (int m = 0; m < M; ++m) acc[m][b] += line * x[m][i];
      }
    }
  }

  template <int M, int NL>
  static void base(
      const Input* const* x, const Element* w, const i32* selected, i64 begin, i64 end, Ahead<P> ahead,
      Floats (&acc)[M][NL]) {
    for (i64 i = begin; i < end; ++i) {
      ahead.step();
      const Element* column = w + (selected ? selected[i] : i) * fold<P>();
      for (int l = 0; l < NL; ++l) {
        const Floats line = widen(column + l * LANES);
        for (int m = 0; m < M; ++m) acc[m][l] += line * x[m][i];
      }
    }
  }
};

template <>
struct Kernel<Float32> : Widening<Float32> {
  static constexpr int VECTORS = 1;  // of a line
};
template <>
struct Kernel<Float16> : Widening<Float16> {
  static constexpr int VECTORS = 1;  // of a line
};

template <>
struct Kernel<BFloat16> {
  using Element = std::uint16_t;
  using Input = std::uint16_t;
  static constexpr int VECTORS = 2;  // of a line

  static std::uint32_t pair(const Input* x) {
    std::uint32_t both;
    std::memcpy(&both, x, 4);
    return both;
  }

#ifdef D2MOE_DPBF16
  using Line = __m512i;
  static Line line(const Element* w) { return _mm512_loadu_si512(w); }
  static Floats add(Floats sum, Line w, std::uint32_t both) {
    const __m512i x = _mm512_set1_epi32(int(both));
    return bits<Floats>(_mm512_dpbf16_ps(bits<__m512>(sum), bits<__m512bh>(w), bits<__m512bh>(x)));
  }
  static Line low(Line a, Line b) { return _mm512_unpacklo_epi16(a, b); }
  static Line high(Line a, Line b) { return _mm512_unpackhi_epi16(a, b); }
  static Line none() { return _mm512_setzero_si512(); }
  // Where in a line of a base an output's weight lies, so that low and high above have them in order.
  static constexpr i64 slot(i64 out) { return out % 16 / 4 * 8 + out / 16 * 4 + out % 4; }
#else
  using Line = Words;
  static Line line(const Element* w) { return *reinterpret_cast<const Words*>(w); }
  static Floats add(Floats sum, Line w, std::uint32_t both) {
    sum += bits<Floats>(w << 16) * bits<float>(both << 16);
    return sum + bits<Floats>(w & 0xffff0000u) * bits<float>(both & 0xffff0000u);
  }
  static Line low(Line a, Line b) { return (a & 0xffffu) | (b << 16); }
  static Line high(Line a, Line b) { return (a >> 16) | (b & 0xffff0000u); }
  static Line none() { return Line{}; }
  static constexpr i64 slot(i64 out) { return out % 16 * 2 + out / 16; }
#endif

  template <int M, int NB>
  static void factor(const Input* const* x, const Element* w, i64 stride, i64 k, Floats (&acc)[M][NB]) {
    const i64 pairs = k / 2;
    for (i64 i = 0; i < pairs; ++i) {
      Line lines[NB];
      for (int b = 0; b < NB; ++b) lines[b] = line(w + b * stride + i * 2 * LANES);
      for (int m = 0; m < M; ++m) {
        const std::uint32_t both = pair(x[m] + 2 * i);
        for (int b = 0; b < NB; ++b) acc[m][b] = add(acc[m][b], lines[b], both);
      }
    }
    if (k % 2) {  // The packed line's other half is zero, and so has to be what it is multiplied with.
      for (int m = 0; m < M; ++m) {
        for (int b = 0; b < NB; ++b) acc[m][b] = add(acc[m][b], line(w + b * stride + pairs * 2 * LANES), x[m][k - 1]);
      }
    }
  }

  template <int M, int NL>
  static void base(
      const Input* const* x, const Element* w, const i32* selected, i64 begin, i64 end, Ahead<BFloat16> ahead,
      Floats (&acc)[M][2 * NL]) {
    auto column = [&](i64 i) { return w + (selected ? selected[i] : i) * fold<BFloat16>(); };
    auto step = [&](const Element* a, const Element* b, auto both) {
      for (int l = 0; l < NL; ++l) {
        const Line first = line(a + 32 * l), second = b ? line(b + 32 * l) : none();
        const Line lo = low(first, second), hi = high(first, second);
        for (int m = 0; m < M; ++m) {
          acc[m][2 * l] = add(acc[m][2 * l], lo, both(m));
          acc[m][2 * l + 1] = add(acc[m][2 * l + 1], hi, both(m));
        }
      }
    };
    i64 i = begin;
    for (; i + 1 < end; i += 2) {
      ahead.step();
      ahead.step();
      step(column(i), column(i + 1), [&](int m) { return pair(x[m] + i); });
    }
    if (i < end) step(column(i), nullptr, [&](int m) { return std::uint32_t(x[m][i]); });
  }
};

// f(number of rows, first row) for tiles of up to MAX rows, each number compiled for itself.
template <int M, class F>
inline void with_rows(i64 rows, F&& f) {
  if constexpr (M == 1) {
    f(std::integral_constant<int, 1>{});
  } else {
    if (rows == M) f(std::integral_constant<int, M>{});
    else with_rows<M - 1>(rows, f);
  }
}

template <int MAX, class F>
inline void in_tiles(i64 rows, F&& f) {
  const i64 tiles = (rows + MAX - 1) / MAX;
  for (i64 t = 0; t < tiles; ++t) {
    const i64 first = rows * t / tiles, last = rows * (t + 1) / tiles;
    with_rows<MAX>(last - first, [&](auto m) { f(m, first); });
  }
}

template <class P, int MAX, int NB>
void factor_tiles(
    const typename P::Input* const* x, i64 rows, const typename P::Element* w, i64 stride, i64 k, float* out, i64 ld) {
  in_tiles<MAX>(rows, [&](auto m, i64 first) {
    constexpr int M = decltype(m)::value;
    Floats acc[M][NB] = {};
    Kernel<P>::template factor<M, NB>(x + first, w, stride, k, acc);
    for (int r = 0; r < M; ++r)
      for (int b = 0; b < NB; ++b) store(out + (first + r) * ld + b * LANES, acc[r][b]);
  });
}

// out[r][0 .. 16 blocks) = x[r] W^T for rows r of pointers x; w: the first of the blocks, `stride` elements apart.
template <class P>
void multiply_factor(
    const typename P::Input* const* x, i64 rows, const typename P::Element* w, i64 stride, i64 k, i64 blocks, float* out,
    i64 ld) {
  i64 b = 0;
  if (rows <= FEW_ROWS)
    for (; b + 4 <= blocks; b += 4) factor_tiles<P, FEW_ROWS, 4>(x, rows, w + b * stride, stride, k, out + b * LANES, ld);
  for (; b + 2 <= blocks; b += 2) factor_tiles<P, MANY_ROWS, 2>(x, rows, w + b * stride, stride, k, out + b * LANES, ld);
  if (b < blocks) factor_tiles<P, MANY_ROWS, 1>(x, rows, w + b * stride, stride, k, out + b * LANES, ld);
}

template <class P, int MAX, int NL>
void base_tiles(
    const typename P::Input* const* x, i64 rows, const typename P::Element* w, const i32* selected, i64 begin, i64 end,
    Ahead<P>& ahead, float* out, i64 ld) {
  constexpr int NV = NL * Kernel<P>::VECTORS;
  in_tiles<MAX>(rows, [&](auto m, i64 first) {
    constexpr int M = decltype(m)::value;
    Floats acc[M][NV];
    for (int r = 0; r < M; ++r)
      for (int v = 0; v < NV; ++v) acc[r][v] = load(out + (first + r) * ld + v * LANES);
    Kernel<P>::template base<M, NL>(x + first, w, selected, begin, end, ahead, acc);
    ++ahead.pass;
    for (int r = 0; r < M; ++r)
      for (int v = 0; v < NV; ++v) store(out + (first + r) * ld + v * LANES, acc[r][v]);
  });
}

// out[r][0 .. FOLD) += x[r] B for one block of a packed base; x[r][i] belongs to the base's row selected[i], or i.
template <class P>
void add_base(
    const typename P::Input* const* x, i64 rows, const typename P::Element* w, const i32* selected, i64 n, float* out,
    i64 ld) {
  for (i64 begin = 0; begin < n; begin += COLUMNS) {
    const i64 end = std::min(n, begin + COLUMNS);
    const bool few = rows <= FEW_ROWS;
    const i64 passes = few ? 1 : 2 * ((rows + MANY_ROWS - 1) / MANY_ROWS);
    Ahead<P> ahead{w, selected, end, std::min(n, end + COLUMNS), passes, 0};
    if (few) {
      base_tiles<P, FEW_ROWS, 2>(x, rows, w, selected, begin, end, ahead, out, ld);
    } else {
      base_tiles<P, MANY_ROWS, 1>(x, rows, w, selected, begin, end, ahead, out, ld);
      base_tiles<P, MANY_ROWS, 1>(x, rows, w + P::LINE, selected, begin, end, ahead, out + P::LINE, ld);
    }
  }
}

}  // namespace d2moe
