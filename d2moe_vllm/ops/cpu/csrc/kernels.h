// The two products everything is made of: rows times a packed factor, and rows times a base packed by columns.
//
// A packed factor W [out, in] is blocks of 16 outputs: [out / 16][in / PAIR][16][PAIR], or codes (storage.h). A base packed by
// columns, [kept, out], is folded at so many outputs: [out / fold][kept][fold], so that a column that is not selected is not read.
// Every element of a result is summed over its inputs in ascending order, whatever else is computed beside it:
// neither the other rows, nor the number of threads, nor how rows are cut into tiles changes a bit.
#pragma once

#include "storage.h"

namespace d2moe {

// Outputs that a task computes: four blocks of a factor.
constexpr i64 SLICE = 64, SLICE_BLOCKS = SLICE / LANES;
// Inputs of a factor that are multiplied with all rows before the next are read: 16 KB of bfloat16.
constexpr i64 INPUTS = 128;

// Where a base packed by columns is folded. Memory reads on past the end of what is asked for: pieces of 1 KB leave half as
// much of that as pieces of 128 bytes, which for a small layer make more tasks.
constexpr i64 fold(i64 out) { return out >= 4096 ? 8 * SLICE : SLICE; }
// Columns of such a base that are multiplied with all rows before the next are read, of so many slices of outputs.
constexpr i64 columns_at_once(i64 slices, i64 tiles) { return slices == 1 ? 128 : tiles == 1 ? 16 : 32; }

// Weights are asked for one run ahead, by every tile of rows that the present run is multiplied with, at an even pace:
// memory would otherwise be idle while a run that is already here is multiplied with its second tile.

// Columns of a folded base that are wanted next: lines of 64 bytes, line by line and column by column.
template <class P>
struct Ahead {
  const typename P::Element* w;
  const i32* selected;
  i64 fold, column;        // elements from one column to the next; lines of one that are wanted
  i64 next, end, at_once;  // lines

  void step() {
    const i64 until = std::min(end, next + at_once);
    for (; next < until; ++next)
      __builtin_prefetch(reinterpret_cast<const char*>(w + selected[next / column] * fold) + next % column * 64, 0, 0);
  }
  // The same columns, nothing of which is wanted any more.
  Ahead none() const { return {w, selected, fold, column, end, end, at_once}; }
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
      return widened_halves(w);
    }
  }

  static void narrow(Floats v, Element* to) {
    if constexpr (sizeof(Element) == 4) store(reinterpret_cast<float*>(to), v);
    else narrowed_to_halves(v, to);
  }

  template <int M, int NB>
  static void factor(const Input* x, const Element* w, i64 stride, i64 steps, Next next, Floats (&acc)[M][NB]) {
    i64 wait = 0;
    for (i64 i = 0; i < steps; ++i, x += M) {
      next.step<NB>(wait);
      for (int b = 0; b < NB; ++b) {
        const Floats line = widen(w + b * stride + i * LANES);
#pragma GCC unroll 6
        for (int m = 0; m < M; ++m) acc[m][b] += line * x[m];
      }
    }
  }

  // NB of the four vectors of a slice.
  template <int M, int NB>
  static void base(
      const Input* x, const Element* w, const i32* selected, i64 begin, i64 end, Ahead<P> ahead, Floats (&acc)[M][NB]) {
    for (i64 i = begin; i < end; ++i) {
      ahead.step();
      const Element* column = w + selected[i] * ahead.fold;
      for (int l = 0; l < NB; ++l) {
        const Floats line = widen(column + l * LANES);
#pragma GCC unroll 6
        for (int m = 0; m < M; ++m) acc[m][l] += line * x[i * M + m];
      }
    }
  }
};

template <>
struct Kernel<Float32> : Widening<Float32> {};
template <>
struct Kernel<Float16> : Widening<Float16> {};

template <>
struct Kernel<BFloat16> {
  using Element = std::uint16_t;
  using Input = BFloat16::Input;

  static Floats widen(const Element* w) { return bits<Floats>(widened<Words>(w) << 16); }

  static void narrow(Floats v, Element* to) {
#ifdef D2MOE_DPBF16
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bits<__m256i>(_mm512_cvtneps_pbh(bits<__m512>(v))));
#else
    narrowed(nearest(v), to);
#endif
  }

  // In the lower half of each word, for what is no NaN.
  static Words rounded(Floats v) {
    const Words w = bits<Words>(v);
    return (w + 0x7fffu + ((w >> 16) & 1)) >> 16;
  }

#ifdef D2MOE_DPBF16
  static void inputs(Floats v, Input* to) { narrow(v, to); }

  using Pair = std::uint32_t;
  static Pair pair(const Input* x) {
    Pair both;
    std::memcpy(&both, x, 4);
    return both;
  }

  using Line = __m512i;
  static Line line(const Element* w) { return _mm512_loadu_si512(w); }
  static Floats add(Floats sum, Line w, Pair both) {
    const __m512i x = _mm512_set1_epi32(int(both));
    return bits<Floats>(_mm512_dpbf16_ps(bits<__m512>(sum), bits<__m512bh>(w), bits<__m512bh>(x)));
  }
  static Line low(Line a, Line b) { return _mm512_unpacklo_epi16(a, b); }
  static Line high(Line a, Line b) { return _mm512_unpackhi_epi16(a, b); }
  static Line none() { return _mm512_setzero_si512(); }
  // Where in a line of a base an output's weight lies, so that low and high above have them in order.
  static constexpr i64 slot(i64 out) { return out % 16 / 4 * 8 + out / 16 * 4 + out % 4; }
#else
  // As `rounded`; a NaN stays one.
  static Words nearest(Floats v) {
    const Words w = bits<Words>(v);
    return by_parts<Words>([](auto f, auto w, auto near) {
      return f != f ? (w >> 16) | 0x40 : near;
    }, v, w, rounded(v));
  }
  static void inputs(Floats v, Input* to) { store(to, bits<Floats>(nearest(v) << 16)); }

  struct Pair { float first, second; };
  static Pair pair(const Input* x) { return {x[0], x[1]}; }

  using Line = Words;
  static Line line(const Element* w) { return load_words(w); }
  static Floats add(Floats sum, Line w, Pair both) {
    sum += bits<Floats>(w << 16) * both.first;
    return sum + bits<Floats>(w & 0xffff0000u) * both.second;
  }
  static Line low(Line a, Line b) { return (a & 0xffffu) | (b << 16); }
  static Line high(Line a, Line b) { return (a >> 16) | (b & 0xffff0000u); }
  static Line none() { return Line{}; }
  static constexpr i64 slot(i64 out) { return out % 16 * 2 + out / 16; }
#endif

  template <int M, int NB>
  static void factor(
      const Input* x, const Element* w, i64 stride, i64 steps, Next next, Floats (&acc)[M][NB]) {
    i64 wait = 0;
    for (i64 i = 0; i < steps; ++i, x += 2 * M) {
      next.step<NB>(wait);
      Line lines[NB];
      for (int b = 0; b < NB; ++b) lines[b] = line(w + b * stride + i * 2 * LANES);
#pragma GCC unroll 6
      for (int m = 0; m < M; ++m) {
        const Pair both = pair(x + 2 * m);
        for (int b = 0; b < NB; ++b) acc[m][b] = add(acc[m][b], lines[b], both);
      }
    }
  }

  template <int M, int NB>
  static void base(
      const Input* x, const Element* w, const i32* selected, i64 begin, i64 end, Ahead<BFloat16> ahead,
      Floats (&acc)[M][NB]) {
    auto column = [&](i64 i) { return w + selected[i] * ahead.fold; };
    for (i64 i = begin; i < end; i += 2) {
      ahead.step();
      const Element *a = column(i), *b = i + 1 < end ? column(i + 1) : nullptr;
      for (int l = 0; l < NB / 2; ++l) {
        const Line first = line(a + 32 * l), second = b ? line(b + 32 * l) : none();
        const Line lo = low(first, second), hi = high(first, second);
#pragma GCC unroll 6
        for (int m = 0; m < M; ++m) {
          const Pair both = pair(x + i * M + 2 * m);
          acc[m][2 * l] = add(acc[m][2 * l], lo, both);
          acc[m][2 * l + 1] = add(acc[m][2 * l + 1], hi, both);
        }
      }
    }
  }
};

// n numbers as they are stored.
template <class P>
void round_to(const float* from, i64 n, typename P::Element* to) {
  i64 i = 0;
  for (; i + LANES <= n; i += LANES) Kernel<P>::narrow(load(from + i), to + i);
  for (; i < n; ++i) to[i] = P::element(from[i]);
}

// f(number of rows as a constant), each number compiled for itself.
template <int MAX, class F>
inline void with_rows(i64 rows, F&& f) {
  if constexpr (MAX == 1) {
    f(std::integral_constant<int, 1>{});
  } else {
    if (rows == MAX) f(std::integral_constant<int, MAX>{});
    else with_rows<MAX - 1>(rows, f);
  }
}

// out[m][0 .. 16 NB) = x w^T for a tile of M rows over some steps, or += where there were steps before.
template <class P, int M, int NB>
void some_blocks(
    const typename P::Input* x, const typename P::Element* w, i64 stride, i64 steps, bool more, Next next, float* out,
    i64 ld) {
  Floats acc[M][NB] = {};
  if (more)
    for (int m = 0; m < M; ++m)
      for (int b = 0; b < NB; ++b) acc[m][b] = load(out + m * ld + b * LANES);
  Kernel<P>::template factor<M, NB>(x, w, stride, steps, next, acc);
  for (int m = 0; m < M; ++m)
    for (int b = 0; b < NB; ++b) store(out + m * ld + b * LANES, acc[m][b]);
}

// The same, as many blocks at once as registers hold.
template <class P, int M, int NB>
void factor_tile(
    const typename P::Input* x, const typename P::Element* w, i64 stride, i64 steps, bool more, Next next, float* out,
    i64 ld) {
  constexpr int SOME = at_once<M, NB>();
  for (int b = 0; b < NB; b += SOME)
    some_blocks<P, M, SOME>(x, w + b * stride, stride, steps, more, next.from(b), out + b * LANES, ld);
}

template <class P, int NB>
void factor_blocks(const Rows<P>& x, const Factor<P>& f, Next after, float* out, i64 ld) {
  using Element = typename P::Element;
  constexpr i64 STEP = LANES * P::PAIR * i64(sizeof(Element));  // bytes of a block that a step reads
  const i64 steps = packed_inputs<P>(x.k) / P::PAIR, run = INPUTS / P::PAIR, stride = f.stride();
  for (i64 step = 0; step < steps; step += run) {
    const i64 n = std::min(run, steps - step);
    Next next{f.w + (step + run) * STEP, stride, std::min(run, steps - step - run) * STEP / 64};
    if (step + run >= steps) next = {after.w, after.stride, std::min(run * STEP / 64, after.lines)};
    for (i64 t = 0; t < x.tiles; ++t) {
      with_rows<FACTOR_ROWS>(x.size(t), [&](auto m) {
        constexpr int M = decltype(m)::value;
        factor_tile<P, M, NB>(
            x.tile(t) + step * M * P::PAIR, reinterpret_cast<const Element*>(f.w + step * STEP),
            stride / i64(sizeof(Element)), n, step > 0, next.share(t, x.tiles), out + x.first(t) * ld, ld);
      });
    }
  }
}

// out[s][r][0 .. SLICE) += x[r] B for some slices s within a fold of a base, w: the first of them; x[r][i] belongs to the
// base's row selected[i]. Slices are `rows` rows of SLICE floats apart.
template <class P>
void add_base(
    const Rows<P>& x, const typename P::Element* w, i64 fold, i64 slices, const i32* selected, float* out, i64 rows) {
  const i64 run = columns_at_once(slices, x.tiles), passes = slices * x.tiles;
  const i64 lines = slices * SLICE * i64(sizeof(*w)) / 64;
  for (i64 begin = 0; begin < x.k; begin += run) {
    const i64 end = std::min(x.k, begin + run), last = std::min(x.k, end + run), more = (last - end) * lines;
    for (i64 pass = 0; pass < passes; ++pass) {
      const i64 slice = pass / x.tiles, t = pass % x.tiles, from = end * lines;
      const i64 share = more * (pass + 1) / passes - more * pass / passes, steps = ceil_div(end - begin, P::PAIR);
      const Ahead<P> ahead{
          w, selected, fold, lines, from + more * pass / passes, from + more * (pass + 1) / passes, ceil_div(share, steps)};
      with_rows<BASE_ROWS>(x.size(t), [&](auto m) {
        constexpr int M = decltype(m)::value, NB = at_once<M, 4>();
        static_assert(NB * LANES >= P::LINE);
        for (int b = 0; b < 4; b += NB) {
          float* to = out + (slice * rows + x.first(t)) * SLICE + b * LANES;
          Floats acc[M][NB];
          for (int r = 0; r < M; ++r)
            for (int v = 0; v < NB; ++v) acc[r][v] = load(to + r * SLICE + v * LANES);
          Kernel<P>::template base<M, NB>(
              x.tile(t), w + slice * SLICE + b * LANES, selected, begin, end, b ? ahead.none() : ahead, acc);
          for (int r = 0; r < M; ++r)
            for (int v = 0; v < NB; ++v) store(to + r * SLICE + v * LANES, acc[r][v]);
        }
      });
    }
  }
}

}  // namespace d2moe
