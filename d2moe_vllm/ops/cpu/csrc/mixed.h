// MoBE's V (METHODS 3): f(sum_j alpha_j B_j), mixed for the experts in use, tile by tile and never whole.
//
// Mixing is element by element, so the bases are packed in the order in which V's products read V: each as a factor, and of
// all m of them 16 elements together, two bases side by side, as a factor's inputs are: [size / 16][m / PAIR][16][PAIR].
// Mixing is then itself a product with a packed factor, of the experts' alphas. Where the last basis has no partner its 16
// elements are the last, and nothing is filled up.
//
// A task has some rows of V. Bases are read from memory once, MIXED inputs at a time, and mixed for all experts while they
// are in the cache, as many experts at once as a product has rows; the experts' rows then meet their tiles at once.
#pragma once

#include "routing.h"

namespace d2moe {

// Inputs of a tile of V: with 64 rows 8 KB of bfloat16 for an expert, of 32 bases 256 KB.
constexpr i64 MIXED = 64;

// Elements of V of some experts, before f and after.
template <class P>
struct MixedTile {
  std::vector<typename P::Element> v;  // [experts][blocks][MIXED / PAIR][16][PAIR]
  std::vector<float> out;              // [pairs][SLICE]
};

// Some experts with the same bases in use, one behind the other among those in use.
template <class P>
struct Mixers {
  const typename P::Input* alphas;  // a tile of rows [m / PAIR][n][PAIR]
  i64 first, n;
  i64 begin, end;  // steps whose alphas are not all 0
};

// f of 16 * `vectors` values, rounded. Never inlined: it must not come out differently beside other code.
template <class P>
__attribute__((noinline)) void finish(Function f, const float* from, i64 vectors, typename P::Element* to) {
  for (i64 i = 0; i < vectors * LANES; i += LANES) {
    const Floats x = load(from + i);
    const Floats y = f == Function::tanh ? tanh(x) : sizeof(*to) == 2 ? silu_16_bits(x) : silu(x);
    Kernel<P>::narrow(y, to + i);
  }
}

// 16 * NB elements of V of M experts; element 16 b of expert e goes to v + e * step + 16 b. w: the first of the bases'
// elements; alone: whether the last basis has no partner and is in use.
template <class P, int M, int NB>
void mix(const Mixers<P>& of, i64 m, Function f, const typename P::Element* w, Next<P> next, typename P::Element* v, i64 step) {
  const i64 stride = LANES * m, whole = std::min(of.end, m / P::PAIR);
  Floats acc[M][NB] = {};
  Kernel<P>::template factor<M, NB>(
      of.alphas + of.begin * M * P::PAIR, w + of.begin * LANES * P::PAIR, stride, whole - of.begin, next, acc);
  if constexpr (P::PAIR == 2) {
    if (of.end > whole) {
      const typename P::Input* last = of.alphas + whole * M * P::PAIR;
      for (int b = 0; b < NB; ++b) {
        const Floats line = Kernel<P>::widen(w + b * stride + whole * LANES * P::PAIR);
        for (int e = 0; e < M; ++e) acc[e][b] += line * P::value(last[e * P::PAIR]);
      }
    }
  }
  float mixed[NB * LANES];
  for (int e = 0; e < M; ++e) {
    for (int b = 0; b < NB; ++b) store(mixed + b * LANES, acc[e][b]);
    finish<P>(f, mixed, NB, v + e * step);
  }
}

template <class P>
class Mixing {
  using Element = typename P::Element;
  using Input = typename P::Input;

 public:
  // half's pairs are filled; its s gets room here.
  Mixing(const Weights<P>& w, Half<P>& half, const Routing& routing, const Parallel& parallel, i64 threads, i64 in)
      : w_(w), half_(half), routing_(routing), parallel_(parallel), threads_(threads), in_(in) {}

  void operator()() {
    std::vector<Mixers<P>> mixers[2];
    for (int j = 0; j < 2; ++j) {
      half_.s[j].resize(routing_.all() * packed_inputs<P>(w_.rank[j]));
      if (w_.rank[j]) arrange(j, mixers[j]);
    }
    // Fewer rows a task where there are too few tasks.
    i64 blocks = SLICE_BLOCKS;
    while (blocks > 1 && ceil_div(w_.ranks(), blocks * LANES) < 4 * threads_) blocks /= 2;
    const i64 of_gate = ceil_div(w_.rank[0], blocks * LANES), of_up = ceil_div(w_.rank[1], blocks * LANES);
    parallel_(of_gate + of_up, [&](i64 task) {
      const int j = task < of_gate ? 0 : 1;
      const i64 first = (task - (j ? of_gate : 0)) * blocks;
      rows(j, mixers[j], first, std::min(blocks, ceil_div(w_.rank[j], LANES) - first));
    });
  }

 private:
  // Experts in use, as many at once as a product has rows, cut where other bases are in use.
  void arrange(int j, std::vector<Mixers<P>>& mixers) {
    const i64 m = w_.mixed, size = packed_inputs<P>(m), experts = i64(routing_.active.size());
    half_.alphas[j].resize(experts * size);
    auto alpha = [&](i64 number, i64 i) { return w_.alpha[(routing_.active[number] * 2 + j) * m + i]; };
    auto in_use = [&](i64 number) {
      i64 begin = 0, end = m;
      while (begin < end && P::value(alpha(number, begin)) == 0.0f) ++begin;
      while (end > begin && P::value(alpha(number, end - 1)) == 0.0f) --end;
      return std::make_pair(begin / P::PAIR, ceil_div(end, P::PAIR));
    };
    for (i64 first = 0, last; first < experts; first = last) {
      const auto steps = in_use(first);
      for (last = first + 1; last < experts && in_use(last) == steps;) ++last;
      const Rows<P> alphas = factor_rows<P>(half_.alphas[j].data() + first * size, last - first, m);
      for (i64 r = 0; r < alphas.n; ++r)
        alphas.row(r).fill(0, m, [&](i64 i) { return P::as_input(alpha(first + r, i)); });
      for (i64 t = 0; t < alphas.tiles; ++t)
        mixers.push_back({alphas.tile(t), first + alphas.first(t), alphas.size(t), steps.first, steps.second});
    }
  }

  // s of all pairs at `blocks` blocks of 16 ranks of part j.
  void rows(int j, const std::vector<Mixers<P>>& mixers, i64 block, i64 blocks) {
    const i64 steps = packed_inputs<P>(in_) / P::PAIR, run = MIXED / P::PAIR, size = LANES * P::PAIR;
    thread_local MixedTile<P> tile;
    tile.v.resize(FACTOR_ROWS * blocks * run * size);
    tile.out.resize(routing_.all() * SLICE);
    for (i64 step = 0; step < steps; step += run) {
      const i64 n = std::min(run, steps - step);
      for (const Mixers<P>& of : mixers) {
        for (i64 b = 0; b < blocks; ++b) {
          const Element* w = w_.bases[j] + ((block + b) * steps + step) * size * w_.mixed;
          with_rows<FACTOR_ROWS>(of.n, [&](auto m) {
            mix_block<decltype(m)::value>(of, w, n * P::PAIR, tile.v.data() + b * run * size, blocks * run * size);
          });
        }
        for (i64 i = 0; i < of.n; ++i)
          multiply(routing_.active[of.first + i], tile.v.data() + i * blocks * run * size, blocks, step, n, tile.out.data());
      }
    }
    const i64 first = block * LANES, last = std::min(w_.rank[j], first + blocks * LANES);
    for (i64 e : routing_.active) {
      const Rows<P> to = routing_.rows_of<P>(half_.s[j], e, w_.rank[j]);
      for (i64 r = 0; r < to.n; ++r) {
        const float* from = &tile.out[(routing_.starts[e] + r) * SLICE];
        to.row(r).put(first, last, from);
      }
    }
  }

  // `groups` times 16 elements of a block.
  template <int M>
  void mix_block(const Mixers<P>& of, const Element* w, i64 groups, Element* v, i64 step) const {
    const i64 m = w_.mixed;
    i64 g = 0;
    for (; g + 4 <= groups; g += 4) mix<P, M, 4>(of, m, w_.function, w + g * LANES * m, {}, v + g * LANES, step);
    for (; g < groups; ++g) mix<P, M, 1>(of, m, w_.function, w + g * LANES * m, {}, v + g * LANES, step);
  }

  // The rows of expert e times its tile of V, over n steps from `step` on.
  void multiply(i64 e, const Element* v, i64 blocks, i64 step, i64 n, float* out) {
    const Rows<P> x = routing_.rows_of<P>(half_.pairs, e, in_);
    const i64 stride = MIXED * LANES;
    for (i64 t = 0; t < x.tiles; ++t) {
      float* to = out + (routing_.starts[e] + x.first(t)) * SLICE;
      with_rows<FACTOR_ROWS>(x.size(t), [&](auto rows) {
        constexpr int M = decltype(rows)::value;
        const Input* from = x.tile(t) + step * M * P::PAIR;
        if (blocks == 4) return factor_tile<P, M, 4>(from, v, stride, n, step > 0, {}, to, SLICE);
        for (i64 b = 0; b < blocks; ++b)
          factor_tile<P, M, 1>(from, v + b * stride, stride, n, step > 0, {}, to + b * LANES, SLICE);
      });
    }
  }

  const Weights<P>& w_;
  Half<P>& half_;
  const Routing& routing_;
  const Parallel& parallel_;
  const i64 threads_, in_;
};

}  // namespace d2moe
