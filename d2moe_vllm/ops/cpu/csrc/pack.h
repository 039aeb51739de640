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

// Block `block` of 16 outputs of m bases, of which V's are mixed. w: [m, out, k] with these strides. to: m * packed_size(out, k)
// elements for all blocks (mixed.h).
template <class P>
void pack_mixed(const typename P::Element* w, const i64* strides, i64 m, i64 out, i64 k, i64 block, typename P::Element* to) {
  const i64 size = LANES * packed_inputs<P>(k);
  for (i64 at = 0; at < size; at += LANES) {
    auto* group = to + (block * size + at) * m;
    for (i64 lane = 0; lane < LANES; ++lane) {
      // Where this element lies in a factor's block.
      const i64 pair = (at + lane) / P::PAIR, output = block * LANES + pair % LANES;
      const i64 input = pair / LANES * P::PAIR + (at + lane) % P::PAIR;
      const bool there = output < out && input < k;
      for (i64 j = 0; j < m; ++j) {
        const i64 first = j / P::PAIR * P::PAIR, beside = std::min(P::PAIR, m - first);
        group[first * LANES + lane * beside + j - first] =
            there ? w[j * strides[0] + output * strides[1] + input * strides[2]] : typename P::Element{};
      }
    }
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
