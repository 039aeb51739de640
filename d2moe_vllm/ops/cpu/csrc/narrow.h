// Experts that keep some channels only, beside a base: which these are, and the way between the base's channels and theirs.
#pragma once

#include "routing.h"

namespace d2moe {

struct Narrow {
  // Channels of the base that a task mixes.
  static constexpr i64 AT_ONCE = 1024;

  i64 widest = 0;             // channels of the expert that has most
  std::vector<i32> channels;  // [experts in use, widest]
  std::vector<float> z[2];    // the base's share of gate and up [slices of the base's channels, tokens, SLICE]
  std::vector<float> h;       // of all pairs [pairs, widest], not rounded

  // By the bits that are set.
  template <class P>
  void find_channels(const Layer<P>& layer, const Routing& routing, i64 most, const Parallel& parallel) {
    widest = most;
    channels.resize(i64(routing.active.size()) * widest);
    parallel(i64(routing.active.size()), [&](i64 number) {
      const i64 e = routing.active[number];
      const std::uint8_t* bits = layer.channels + e * ceil_div(layer.intermediate, 8);
      i32* to = channels.data() + number * widest;
      i64 left = layer.width(e);
      for (i64 c = 0; c < layer.intermediate && left; ++c)
        if (bits[c / 8] >> c % 8 & 1) *to++ = i32(c), --left;
    });
  }

  // z of part j at channels first .. of the `number`th expert in use, which has `width` of them: [SLICE], or what there is.
  void gather(i64 number, i64 token, int j, i64 first, i64 width, i64 tokens, float* to) const {
    const i32* own = channels.data() + number * widest + first;
    for (i64 i = 0; i < std::min(SLICE, width - first); ++i)
      to[i] = z[j][(own[i] / SLICE * tokens + token) * SLICE + own[i] % SLICE];
  }

  // to [tokens, step] = sum_e g_e h_e by the base's channels, expert by expert as elsewhere.
  template <class P>
  void mix(const Layer<P>& layer, const Routing& routing, i64 tokens, i64 step, const Parallel& parallel, float* to) const {
    parallel(ceil_div(layer.intermediate, AT_ONCE), [&](i64 task) {
      const i64 first = task * AT_ONCE, end = std::min(layer.intermediate, first + AT_ONCE);
      for (i64 t = 0; t < tokens; ++t) std::fill_n(to + t * step + first, end - first, 0.0f);
      for (i64 number = 0; number < i64(routing.active.size()); ++number) {
        const i64 e = routing.active[number];
        const i32 *own = channels.data() + number * widest, *last = own + layer.width(e);
        const i32* begin = std::lower_bound(own, last, i32(first));
        const i32* until = std::lower_bound(begin, last, i32(end));
        for (i64 p = routing.starts[e]; p < routing.starts[e + 1]; ++p) {
          const Pair& pair = routing.pairs[p];
          for (const i32* c = begin; c < until; ++c) to[pair.token * step + *c] += pair.gate * h[p * widest + (c - own)];
        }
      }
    });
  }
};

}  // namespace d2moe
