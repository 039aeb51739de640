// How a packed factor lies in memory: in elements of P, or in codes of 8, 4, 3 or 2 bits.
//
// A factor [out, in] is blocks of 16 outputs. In elements a block is [in / PAIR][16][PAIR]. In codes it is units, each of
// as many inputs as fill whole lines of 64 bytes, group by group: `group` inputs of a row share a scale, and the scales,
// bfloat16, lie by themselves, [out / 16][groups][16]. A group begins with a unit of its own. Within a unit two inputs lie
// side by side, as in elements of bfloat16: output o and input i are in the 16-bit word 2 o + i % 2,
//   4 and 2 bits: at bit i / 2 * bits of it;
//   3 bits: five pairs to each of three lines, and the sixteenth in the top bits that are left;
//   8 bits: a byte each, [4][16], with its sign.
// For rows of 8 bits (bytes.h) four inputs lie side by side instead: output o and input i are in the byte 4 o + i % 4,
//   4 and 2 bits: at bit i / 4 * bits of it;
//   3 bits: two codes to a byte of each of three lines, and the last two in the bits that are left: their lower two bits in the
//   first line and the second, their highest ones in the third.
// Weights are widened in registers, by few_bits.h.
#pragma once

#include "rows.h"

namespace d2moe {

// 0 bits: elements of P, not codes. group: inputs that share a scale. bytes: for rows of 8 bits.
struct Storage {
  i64 bits = 0, group = 1;
  bool bytes = false;
};

constexpr i64 unit_inputs(i64 bits) { return bits == 8 ? 4 : bits == 4 ? 8 : bits == 3 ? 32 : 16; }
constexpr i64 unit_bytes(i64 bits) { return unit_inputs(bits) * LANES * bits / 8; }

// The groups of inputs 0 .. in of a row whose first is the `within`th of its group.
struct Groups {
  i64 in, group, within;

  Groups(Storage how, i64 in, i64 first) : in(in), group(how.group), within(first % how.group) {}

  i64 count() const { return in ? ceil_div(within + in, group) : 0; }
  i64 begin(i64 g) const { return std::max<i64>(0, g * group - within); }
  i64 end(i64 g) const { return std::min(in, (g + 1) * group - within); }
  // Where a group's unit begins: at an even input, as pairs of inputs do.
  i64 origin(i64 g) const { return begin(g) / 2 * 2; }
  i64 units_of(i64 g, i64 bits) const { return ceil_div(ceil_div(end(g), 2) * 2 - origin(g), unit_inputs(bits)); }
  // The first unit of a group; of count(): all units.
  i64 unit(i64 g, i64 bits) const {
    if (g == 0) return 0;
    const i64 between = std::min(g, count() - 1) - 1, last = g == count() && g > 1 ? units_of(g - 1, bits) : 0;
    return units_of(0, bits) + (between > 0 ? between * units_of(1, bits) : 0) + last;
  }
};

// Groups that are multiplied with all rows at once, at most.
constexpr i64 MOST_GROUPS = 64;

// Where the codes and the scales of some blocks lie.
struct Stored {
  const char* w;
  i64 stride;
  const std::uint16_t* scales;
  i64 scale_stride;

  Stored from(i64 b) const { return {w + b * stride, stride, scales + b * scale_stride, scale_stride}; }
};

// What is asked for ahead: lines of 64 bytes, of blocks that are `stride` bytes apart.
struct Next {
  const char* w = nullptr;
  i64 stride = 0, lines = 0, every = 1;  // one line is asked for per so many that are multiplied

  // LOCALITY: the compiler's; 0 leaves the second cache out on some processors.
  template <int NB, int LOCALITY = 0>
  void step(i64& wait) {
    if (lines && --wait <= 0) {
      for (int b = 0; b < NB; ++b) __builtin_prefetch(w + b * stride, 0, LOCALITY);
      w += 64;
      --lines;
      wait = every;
    }
  }

  // Of the blocks from the `b`th on.
  Next from(i64 b) const { return {w + b * stride, stride, lines, every}; }

  // The `t`th of n shares.
  Next share(i64 t, i64 n) const {
    const i64 begin = lines * t / n, end = lines * (t + 1) / n;
    return {w + begin * 64, stride, end - begin, n};
  }
};

// One packed factor [out, in], or its blocks from some output on. first: place of its first input in the row that groups
// count from.
template <class P>
struct Factor {
  const char* w = nullptr;
  const std::uint16_t* scales = nullptr;
  Storage how;
  i64 out = 0, in = 0, first = 0;

  explicit operator bool() const { return w && in; }
  Groups groups() const { return {how, in, first}; }
  // Of a block of 16 outputs: bytes, and scales.
  i64 stride() const {
    if (how.bits) return groups().unit(groups().count(), how.bits) * unit_bytes(how.bits);
    return LANES * packed_inputs<P>(in) * i64(sizeof(typename P::Element));
  }
  i64 scale_stride() const { return how.bits ? groups().count() * LANES : 0; }
  // Of all blocks.
  i64 bytes() const { return ceil_div(out, LANES) * stride(); }
  i64 scale_count() const { return ceil_div(out, LANES) * scale_stride(); }

  Factor from(i64 output) const {
    Factor rest = *this;
    rest.w += output / LANES * stride();
    rest.scales += output / LANES * scale_stride();
    rest.out -= output;
    return rest;
  }

  // All of a block's lines.
  Next ahead() const { return {w, stride(), stride() / 64}; }
};

// Factors one behind the other: all of one size, or each of its own.
template <class P>
struct Factors {
  Factor<P> first;
  std::vector<Factor<P>> each;  // of unequal sizes

  Factors() = default;
  Factors(Factor<P> first) : first(first) {}
  explicit operator bool() const { return first.w; }

  Factor<P> at(i64 place) const {
    if (!each.empty()) return each[place];
    Factor<P> one = first;
    one.w += place * one.bytes();
    one.scales += place * one.scale_count();
    return one;
  }
};

}  // namespace d2moe
