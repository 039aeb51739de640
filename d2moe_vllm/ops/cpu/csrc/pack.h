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

// Code i of a row of them, a string of bits of which the lowest are the first.
inline int code_of(const std::uint8_t* row, i64 bits, i64 i) {
  const i64 at = i * bits, within = at % 8;
  int both = row[at / 8];
  if (within + bits > 8) both |= row[at / 8 + 1] << 8;
  return both >> within & ((1 << bits) - 1);
}

// The `v`th code of an output and of every fourth input of a unit for rows of 8 bits: byte is that of the first line.
inline void put_byte(unsigned char* byte, i64 bits, i64 v, int code) {
  auto put = [&](i64 line, i64 bit, int value) { byte[line * 64] |= static_cast<unsigned char>(value << bit); };
  if (bits != 3) put(0, v * bits, code);
  else if (v < 6) put(v / 2, v % 2 * 3, code);
  else put(v - 6, 6, code & 3), put(2, v, code >> 2);
}

// Block `block` of 16 outputs of a factor in codes. codes: [out, ...], rows `row` bytes apart; scales: [out, groups], rows `scale_row`
// apart. f: what it becomes; to, to_scales: all of its blocks.
template <class P>
void pack_codes(
    const Factor<P>& f, const std::uint8_t* codes, i64 row, const std::uint16_t* scales, i64 scale_row, i64 block, char* to,
    std::uint16_t* to_scales) {
  const Groups groups = f.groups();
  const i64 bits = f.how.bits, inputs = unit_inputs(bits), bytes = unit_bytes(bits);
  to += block * f.stride();
  to_scales += block * f.scale_stride();
  std::fill_n(to, f.stride(), char{});
  std::fill_n(to_scales, f.scale_stride(), std::uint16_t{});
  auto* unsigned_to = reinterpret_cast<unsigned char*>(to);
  const i64 outputs = std::min(LANES, f.out - block * LANES);
  for (i64 g = 0; g < groups.count(); ++g) {
    auto* units = unsigned_to + groups.unit(g, bits) * bytes;
    for (i64 o = 0; o < outputs; ++o) {
      const std::uint8_t* from = codes + (block * LANES + o) * row;
      to_scales[g * LANES + o] = scales[(block * LANES + o) * scale_row + g];
      for (i64 i = groups.begin(g); i < groups.end(g); ++i) {
        const i64 at = i - groups.origin(g), within = at % inputs, line = within / 2;
        auto* unit = units + at / inputs * bytes;
        const int code = code_of(from, bits, i);
        // Sets some bits of the 16-bit word that belongs to this output and input.
        auto put = [&](i64 of_line, i64 bit, int value) {
          auto* word = unit + of_line * 64 + (2 * o + within % 2) * 2;
          word[0] |= value << bit & 255;
          word[1] |= value << bit >> 8;
        };
        if (f.how.bytes) put_byte(unit + 4 * o + within % 4, bits, within / 4, code);
        else if (bits == 8) unit[within * LANES + o] = static_cast<unsigned char>(code ^ 128);
        else if (bits != 3) put(0, line * bits, code);
        else if (line < 15) put(line / 5, line % 5 * 3, code);
        else for (i64 b = 0; b < 3; ++b) put(b, 15, code >> b & 1);
      }
    }
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
