// The two products everything is made of: rows times a packed factor, and rows times a packed base.
//
// A packed factor W [out, in] is blocks of 16 outputs: [out / 16][in / PAIR][16][PAIR]. A packed base [kept, out] is
// blocks of FOLD outputs: [out / FOLD][kept][FOLD], so that a column that is not selected is a line that is not read.
// Every element of a result is summed over its inputs in ascending order, whatever else is computed beside it: neither
// the other rows, nor the number of threads, nor how rows are cut into tiles changes a bit.
#pragma once

#include "vectors.h"

namespace d2moe {

constexpr i64 MAX_ROWS = 12;  // of a tile: 24 accumulators of the 32 registers of AVX-512

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

  template <int M>
  static void base(const Input* const* x, const Element* w, const i32* selected, i64 n, Floats (&acc)[M][1]) {
    for (i64 i = 0; i < n; ++i) {
      const Floats line = widen(w + (selected ? selected[i] : i) * LANES);
      for (int m = 0; m < M; ++m) acc[m][0] += line * x[m][i];
    }
  }
};

template <>
struct Kernel<Float32> : Widening<Float32> {
  static constexpr int BASE_VECTORS = 1;
};
template <>
struct Kernel<Float16> : Widening<Float16> {
  static constexpr int BASE_VECTORS = 1;
};

template <>
struct Kernel<BFloat16> {
  using Element = std::uint16_t;
  using Input = std::uint16_t;
  static constexpr int BASE_VECTORS = 2;

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

  template <int M>
  static void base(const Input* const* x, const Element* w, const i32* selected, i64 n, Floats (&acc)[M][2]) {
    for (i64 i = 0; i + 1 < n; i += 2) {
      const Line a = line(w + (selected ? selected[i] : i) * 32), b = line(w + (selected ? selected[i + 1] : i + 1) * 32);
      const Line lo = low(a, b), hi = high(a, b);
      for (int m = 0; m < M; ++m) {
        const std::uint32_t both = pair(x[m] + i);
        acc[m][0] = add(acc[m][0], lo, both);
        acc[m][1] = add(acc[m][1], hi, both);
      }
    }
    if (n % 2) {
      const Line a = line(w + (selected ? selected[n - 1] : n - 1) * 32);
      const Line lo = low(a, none()), hi = high(a, none());
      for (int m = 0; m < M; ++m) {
        acc[m][0] = add(acc[m][0], lo, x[m][n - 1]);
        acc[m][1] = add(acc[m][1], hi, x[m][n - 1]);
      }
    }
  }
};

// Tiles of up to MAX_ROWS rows, each count compiled for itself: calls done<M>(first row, accumulators).
template <int M, class F>
inline void with_rows(i64 rows, F&& f) {
  if constexpr (M == 1) {
    f(std::integral_constant<int, 1>{});
  } else {
    if (rows == M) {
      f(std::integral_constant<int, M>{});
    } else {
      with_rows<M - 1>(rows, f);
    }
  }
}

template <class F>
inline void in_tiles(i64 rows, F&& f) {
  const i64 tiles = (rows + MAX_ROWS - 1) / MAX_ROWS;
  for (i64 t = 0; t < tiles; ++t) {
    const i64 first = rows * t / tiles, last = rows * (t + 1) / tiles;
    with_rows<int(MAX_ROWS)>(last - first, [&](auto m) { f(m, first); });
  }
}

// out[r][0 .. 16 NB) = x[r] W^T for rows r of pointers x; w: the first of NB blocks, `stride` elements apart.
template <class P, int NB>
void multiply_factor(
    const typename P::Input* const* x, i64 rows, const typename P::Element* w, i64 stride, i64 k, float* out, i64 ld) {
  in_tiles(rows, [&](auto m, i64 first) {
    constexpr int M = decltype(m)::value;
    Floats acc[M][NB] = {};
    Kernel<P>::template factor<M, NB>(x + first, w, stride, k, acc);
    for (int r = 0; r < M; ++r)
      for (int b = 0; b < NB; ++b) store(out + (first + r) * ld + b * LANES, acc[r][b]);
  });
}

// out[r][0 .. FOLD) = x[r] B for one block of a packed base; x[r][i] belongs to the base's row selected[i], or i.
template <class P>
void multiply_base(
    const typename P::Input* const* x, i64 rows, const typename P::Element* w, const i32* selected, i64 n, float* out,
    i64 ld) {
  constexpr int NV = Kernel<P>::BASE_VECTORS;
  in_tiles(rows, [&](auto m, i64 first) {
    constexpr int M = decltype(m)::value;
    Floats acc[M][NV] = {};
    Kernel<P>::template base<M>(x + first, w, selected, n, acc);
    for (int r = 0; r < M; ++r)
      for (int v = 0; v < NV; ++v) store(out + (first + r) * ld + v * LANES, acc[r][v]);
  });
}

}  // namespace d2moe
