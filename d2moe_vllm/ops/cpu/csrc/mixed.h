// MoBE's V (METHODS 3): f(sum_j alpha_j B_j), mixed for the experts in use, tile by tile and never whole.
//
// Mixing is element by element, so the bases are packed in the order in which V's products read V: each as a factor, and of
// all m of them 16 elements together, two bases side by side, as a factor's inputs are: [size / 16][m / PAIR][16][PAIR].
// Mixing is then itself a product with a packed factor, of the experts' alphas. Where the last basis has no partner its 16
// elements are the last, and nothing is filled up.
//
// Bases in codes are opened first, the tile of all bases that is mixed next, in that order, and rounded to elements, as they would
// lie in a dense checkpoint.
//
// A task has some rows of V. Bases are read from memory once, some inputs at a time, and mixed for the experts in use while
// they are in the cache, as many experts at once as a product has rows; the experts' rows then meet their tiles at once.
#pragma once

#include "few_bits.h"
#include "routing.h"

namespace d2moe {

// Tiles of V that a thread has, times FACTOR_ROWS: bases that are in the cache are mixed for them all.
constexpr i64 TILES = 4;
// Inputs of a tile of V: where reading bases takes the time, as many as leave 16 rows of all bases in the nearest cache, 16 KB
// of bfloat16; where many experts' are mixed, so many that sums are not loaded and stored too often.
constexpr i64 mixed_inputs(i64 m, i64 experts) {
  return experts > TILES * FACTOR_ROWS ? 64 : std::clamp<i64>(512 / m / 16 * 16, 16, 64);
}
// Groups of 16 elements that f is applied to at once.
constexpr i64 GROUPS = 16;

// Some experts with the same bases in use, one behind the other among those in use.
template <class P>
struct Mixers {
  const typename P::Input* alphas;  // a tile of rows [m / PAIR][n][PAIR]
  i64 first, n;
  i64 begin, end;  // steps whose alphas are not all 0
};

// f of n values, a multiple of 16, rounded. Never inlined: it must not come out differently beside other code.
template <class P>
__attribute__((noinline)) void finish(Function f, const float* from, i64 n, typename P::Element* to) {
  auto each = [&](auto of) {
    for (i64 i = 0; i < n; i += LANES) Kernel<P>::narrow(of(load(from + i)), to + i);
  };
  if (f == Function::tanh) each([](Floats x) { return tanh(x); });
  else if (sizeof(*to) == 2) each([](Floats x) { return silu_16_bits(x); });
  else each([](Floats x) { return silu(x); });
}

// 16 NB elements of V of M experts before f, those of expert e at out + e * ld. w: the first of the bases' elements.
template <class P, int M, int NB>
void mix(const Mixers<P>& of, i64 m, const typename P::Element* w, Next next, float* out, i64 ld) {
  const i64 stride = LANES * m, whole = std::min(of.end, m / P::PAIR);
  Floats acc[M][NB] = {};
  Kernel<P>::template factor<M, NB>(
      of.alphas + of.begin * M * P::PAIR, w + of.begin * LANES * P::PAIR, stride, whole - of.begin, next, acc);
  if constexpr (P::PAIR == 2) {
    if (of.end > whole) {  // the basis without a partner
      const typename P::Input* last = of.alphas + whole * M * P::PAIR;
      for (int b = 0; b < NB; ++b) {
        const Floats line = Kernel<P>::widen(w + b * stride + whole * LANES * P::PAIR);
        for (int e = 0; e < M; ++e) acc[e][b] += line * P::of(last[e * P::PAIR]);
      }
    }
  }
  for (int e = 0; e < M; ++e)
    for (int b = 0; b < NB; ++b) store(out + e * ld + b * LANES, acc[e][b]);
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
      arrange(j, mixers[j]);
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

  // A task: `blocks` blocks of 16 rows of part j, some inputs of theirs, and the tiles of V that they are mixed to,
  // [TILES * FACTOR_ROWS][blocks][run][16][PAIR].
  struct Piece {
    int j;
    i64 block, blocks, step, steps, run;
    Element* v;

    i64 tile() const { return run * LANES * P::PAIR; }  // elements of one block
    Element* of(i64 expert, i64 b) const { return v + (expert * blocks + b) * tile(); }
  };

  // s of all pairs at some rows of part j.
  void rows(int j, const std::vector<Mixers<P>>& mixers, i64 block, i64 blocks) {
    const i64 steps = packed_inputs<P>(in_) / P::PAIR, all = i64(mixers.size());
    const i64 run = mixed_inputs(w_.mixed, i64(routing_.active.size())) / P::PAIR;
    thread_local std::vector<Element> v;
    thread_local std::vector<float> out;  // [pairs, SLICE]
    v.resize(std::min(all, TILES) * FACTOR_ROWS * blocks * run * LANES * P::PAIR);
    out.resize(routing_.all() * SLICE);
    for (i64 step = 0; step < steps; step += run) {
      const Piece piece{j, block, blocks, step, std::min(run, steps - step), run, v.data()};
      for (i64 first = 0; first < all; first += TILES) {
        const i64 n = std::min(TILES, all - first);
        const bool last = first + n == all;
        mix_all(piece, &mixers[first], n, last && step + run < steps);
        for (i64 t = 0; t < n; ++t)
          for (i64 i = 0; i < mixers[first + t].n; ++i)
            multiply(piece, routing_.active[mixers[first + t].first + i], piece.of(t * FACTOR_ROWS + i, 0), out.data());
      }
    }
    const i64 first = block * LANES, last = std::min(w_.rank[j], first + blocks * LANES);
    for (i64 e : routing_.active) {
      const Rows<P> to = routing_.rows_of<P>(half_.s[j], e, w_.rank[j]);
      for (i64 r = 0; r < to.n; ++r) {
        to.row(r).put(first, last, &out[(routing_.starts[e] + r) * SLICE]);
      }
    }
  }

  // The bases' elements for a block of 16 rows, from a step of inputs on; null where they are codes.
  const Element* bases(int j, i64 block, i64 step) const {
    if (w_.bases[j].first.how.bits) return nullptr;
    const auto* all = reinterpret_cast<const Element*>(w_.bases[j].first.w);
    return all + (block * (packed_inputs<P>(in_) / P::PAIR) + step) * LANES * P::PAIR * w_.mixed;
  }

  // The same from codes, for as many steps as a piece has, in memory that is good until this thread opens others.
  const Element* opened(const Piece& piece, i64 block) const {
    thread_local std::vector<Element> to;
    to.resize(piece.steps * LANES * P::PAIR * w_.mixed);
    switch (w_.bases[piece.j].first.how.bits) {
      case 8: open<8>(piece, block, to.data()); break;
      case 4: open<4>(piece, block, to.data()); break;
      case 3: open<3>(piece, block, to.data()); break;
      case 2: open<2>(piece, block, to.data()); break;
    }
    return to.data();
  }

  template <int BITS>
  void open(const Piece& piece, i64 block, Element* to) const {
    const i64 m = w_.mixed;
    for (i64 q = 0; q < m; q += P::PAIR) {
      Opened<P, BITS> bases[P::PAIR];
      const i64 beside = std::min(P::PAIR, m - q);
      for (i64 i = 0; i < beside; ++i) bases[i] = {w_.bases[piece.j].at(q + i).from(block * LANES)};
      for (i64 s = 0; s < piece.steps; ++s) {
        const i64 input = (piece.step + s) * P::PAIR;
        Element* group = to + s * P::PAIR * LANES * m + q * LANES;
        if constexpr (P::PAIR == 1) {
          Kernel<P>::narrow(bases[0](input), group);
        } else {
          // 8 outputs of two inputs after the other 8: of each two inputs, of each one basis or two.
          Words words[2] = {};
          for (i64 i = 0; i < beside; ++i)
            for (int r = 0; r < 2; ++r) words[r] |= Kernel<P>::rounded(bases[i](input + r)) << 16 * i;
          if (beside == 2) {
            Words low, high;
            interleave(words[0], words[1], low, high);
            store_words(group, low);
            store_words(group + LANES * m, high);
          } else {
            const Words both = words[0] | words[1] << 16;
            std::memcpy(group, &both, 32);
            std::memcpy(group + LANES * m, reinterpret_cast<const char*>(&both) + 32, 32);
          }
        }
      }
    }
  }

  // Tiles of n mixers. more: the next inputs are wanted next.
  void mix_all(const Piece& piece, const Mixers<P>* mixers, i64 n, bool more) const {
    for (i64 b = 0; b < piece.blocks; ++b) {
      const Element *w = bases(piece.j, piece.block + b, piece.step), *after = nullptr;
      if (!w) w = opened(piece, piece.block + b);
      if (b + 1 < piece.blocks) after = bases(piece.j, piece.block + b + 1, piece.step);
      else if (more) after = bases(piece.j, piece.block, piece.step + piece.run);
      for (i64 t = 0; t < n; ++t) {
        // Every tile asks for its share of what is next, as in a product.
        const i64 size = i64(sizeof(Element)), lines = after ? w_.mixed / P::PAIR * LANES * P::PAIR * size / 64 : 0;
        const Next next = Next{reinterpret_cast<const char*>(after), LANES * w_.mixed * size, lines}.share(t, n);
        with_rows<FACTOR_ROWS>(mixers[t].n, [&](auto m) {
          mix_block<decltype(m)::value>(piece, mixers[t], w, next, piece.of(t * FACTOR_ROWS, b));
        });
      }
    }
  }

  // One block for M experts.
  template <int M>
  void mix_block(const Piece& piece, const Mixers<P>& of, const Element* w, Next next, Element* to) const {
    const i64 m = w_.mixed, groups = piece.steps * P::PAIR;
    float mixed[M * GROUPS * LANES];
    for (i64 first = 0; first < groups; first += GROUPS) {
      const i64 last = std::min(groups, first + GROUPS);
      constexpr int SOME = at_once<M, 4>();
      i64 g = first;
      for (; g + SOME <= last; g += SOME) {
        Next here = next;
        if (here.lines) here.w += g * LANES * m * i64(sizeof(Element));
        mix<P, M, SOME>(of, m, w + g * LANES * m, here, mixed + (g - first) * LANES, GROUPS * LANES);
      }
      for (; g < last; ++g) mix<P, M, 1>(of, m, w + g * LANES * m, {}, mixed + (g - first) * LANES, GROUPS * LANES);
      for (int e = 0; e < M; ++e)
        finish<P>(w_.function, mixed + e * GROUPS * LANES, (last - first) * LANES,
                  to + e * piece.blocks * piece.tile() + first * LANES);
    }
  }

  // The rows of expert e times its tile of V.
  void multiply(const Piece& piece, i64 e, const Element* v, float* out) const {
    const Rows<P> x = routing_.rows_of<P>(half_.pairs, e, in_);
    for (i64 t = 0; t < x.tiles; ++t) {
      float* to = out + (routing_.starts[e] + x.first(t)) * SLICE;
      with_rows<FACTOR_ROWS>(x.size(t), [&](auto rows) {
        constexpr int M = decltype(rows)::value;
        const Input* from = x.tile(t) + piece.step * M * P::PAIR;
        const i64 stride = piece.tile();
        const bool more = piece.step > 0;
        if (piece.blocks == 4) return factor_tile<P, M, 4>(from, v, stride, piece.steps, more, {}, to, SLICE);
        for (i64 b = 0; b < piece.blocks; ++b)
          factor_tile<P, M, 1>(from, v + b * stride, stride, piece.steps, more, {}, to + b * LANES, SLICE);
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
