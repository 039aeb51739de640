// Weights as a checkpoint has them -> the layouts of kernels.h. What fills a block up is zero.
#pragma once

#include "run.h"

namespace d2moe {

// w: [out, k], rows `row` elements apart, columns `column`. to: packed_size(out, k) elements.
template <class P>
void pack_factor(const typename P::Element* w, i64 row, i64 column, i64 out, i64 k, typename P::Element* to) {
  std::fill_n(to, packed_size<P>(out, k), typename P::Element{});
  for (i64 o = 0; o < out; ++o) {
    auto* block = to + o / LANES * LANES * packed_inputs<P>(k);
    for (i64 i = 0; i < k; ++i) block[(i / P::PAIR * LANES + o % LANES) * P::PAIR + i % P::PAIR] = w[o * row + i * column];
  }
}

// w: [kept, out], rows `row` elements apart. to: packed_base_size(out, kept) elements.
template <class P>
void pack_base(const typename P::Element* w, i64 row, i64 out, i64 kept, typename P::Element* to) {
  const i64 at = fold(out);
  std::fill_n(to, packed_base_size<P>(out, kept), typename P::Element{});
  for (i64 o = 0; o < out; ++o) {
    i64 slot = o % at;
    if constexpr (P::LINE == 32) slot = slot / 32 * 32 + Kernel<P>::slot(slot % 32);
    for (i64 i = 0; i < kept; ++i) to[(o / at * kept + i) * at + slot] = w[i * row + o];
  }
}

}  // namespace d2moe
