// Rows of a matrix in the order in which the kernels read them.
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>

#include "vectors.h"

namespace d2moe {

// Rows of a tile: of a factor's product, and of a product with a base by columns. Times four vectors of outputs they fill
// AVX-512's 32 registers, in the second case with room for what puts two columns together; other processors have a quarter of
// that, and are given fewer vectors at once.
constexpr i64 FACTOR_ROWS = 6, BASE_ROWS = SUMS >= 24 ? 5 : 3;

// Of NB vectors of outputs as many as registers hold the sums of, for M rows.
template <int M, int NB>
constexpr int at_once() {
  if constexpr (NB == 1 || M * NB <= SUMS) return NB;
  else return at_once<M, NB / 2>();
}

constexpr i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }
template <class P>
constexpr i64 packed_inputs(i64 k) { return ceil_div(k, P::PAIR) * P::PAIR; }

template <class P>
struct Kernel;

// One row within its tile.
template <class P>
struct Row {
  typename P::Input* data;
  i64 step;  // elements from one pair of inputs to the next

  typename P::Input operator[](i64 i) const { return data[i / P::PAIR * step + i % P::PAIR]; }

  // Inputs begin .. end by value(i); begin is even, and end too unless it is the row's.
  template <class Value>
  void fill(i64 begin, i64 end, Value value) const {
    typename P::Input* to = data + begin / P::PAIR * step;
    for (i64 i = begin; i < end; i += P::PAIR, to += step) {
      to[0] = value(i);
      if (P::PAIR > 1) to[P::PAIR - 1] = i + 1 < end ? value(i + 1) : typename P::Input{};
    }
  }

  // The same from numbers that lie one behind the other: 16 are rounded at once.
  void put(i64 begin, i64 end, const float* from) const {
    i64 i = begin;
    if constexpr (P::PAIR == 2) {
      typename P::Input *to = data + begin / 2 * step, some[LANES];
      for (; i + LANES <= end; i += LANES) {
        Kernel<P>::inputs(load(from + i - begin), some);
        for (i64 l = 0; l < LANES; l += 2, to += step) std::memcpy(to, some + l, 2 * sizeof(*to));
      }
    }
    fill(i, end, [&](i64 k) { return P::input(from[k - begin]); });
  }
};

struct Rounded;

// [n, k], cut into tiles of about equal size; of a tile [k / PAIR][rows][PAIR]: what a step of a product needs of all its
// rows lies together, and needs one pointer instead of one per row. What fills up k is zero.
template <class P>
struct Rows {
  typename P::Input* data = nullptr;
  i64 n = 0, k = 0, tiles = 1;
  const Rounded* rounded = nullptr;  // the same as whole numbers, where `rounds` of what they meet

  i64 first(i64 tile) const { return n * tile / tiles; }
  i64 size(i64 tile) const { return first(tile + 1) - first(tile); }
  typename P::Input* tile(i64 number) const { return data + first(number) * packed_inputs<P>(k); }

  Row<P> row(i64 r) const {
    const i64 t = ((r + 1) * tiles - 1) / n;
    return {tile(t) + (r - first(t)) * P::PAIR, size(t) * P::PAIR};
  }

  // Inputs begin .. end of a row from numbers that lie one behind the other; either may be odd. Whoever writes the last
  // input fills up its pair, so that nobody else writes to it.
  void put(i64 r, i64 begin, i64 end, const float* from) const {
    const Row<P> to = row(r);
    auto one = [&](i64 i) { to.data[i / P::PAIR * to.step + i % P::PAIR] = P::input(from[i - begin]); };
    i64 i = begin;
    if (i < end && i % P::PAIR) one(i++);
    const i64 even = end == k ? end : end / P::PAIR * P::PAIR;
    if (i < even) {
      to.put(i, even, from + i - begin);
      i = even;
    }
    if (i < end) one(i);
  }
};

template <class P>
Rows<P> factor_rows(typename P::Input* data, i64 n, i64 k) { return {data, n, k, ceil_div(n, FACTOR_ROWS)}; }
template <class P>
Rows<P> base_rows(typename P::Input* data, i64 n, i64 k) { return {data, n, k, ceil_div(n, BASE_ROWS)}; }

}  // namespace d2moe
