// The steps of a layer (METHODS 1.5 and 1.6), each a set of tasks that write what no other task of the step writes:
//   1  sort (token, expert) pairs by expert; select gate's and up's columns and gather the base's inputs
//   2  shrink:        s = V x                                   per expert and 64 ranks; mixed V's of all experts at once
//   3  gate and up:   z = B x + b; h = act(z + U s) * (z + U s);  per 64 channels, the mix sum_e g_e h_e on the way
//      or up alone:   h = act(z + U s)
//   4  select down's columns of the mix, gather them
//   5  shrink:        s = V h
//   6  down:          y = B mix + sum_e g_e (U s + b)                 per 64 outputs
#pragma once

#include <atomic>

#include "mixed.h"
#include "narrow.h"
#include "shrink.h"

namespace d2moe {

// Inputs that a task of rearranging rows moves.
constexpr i64 CHUNK = 1024;

// All that a run needs besides the weights. Kept from run to run, at most twice what the largest batch needs: memory
// that is asked for and given back by every call comes to more than that.
template <class P>
struct Buffers {
  Routing routing;
  std::vector<float> mix;
  Half<P> half13, half2;
  Narrow narrow;
};

template <class P>
class Run {
  using Element = typename P::Element;
  using Input = typename P::Input;

 public:
  // buffers: for one run at a time. threads: that `parallel` runs on; they change how work is cut, and no result.
  Run(const Layer<P>& layer, const Batch<P>& batch, const Parallel& parallel, i64 threads, Buffers<P>& buffers)
      : layer_(layer), batch_(batch), parallel_(parallel), threads_(threads), b_(buffers), r_(buffers.routing) {}

  void operator()() {
    const i64 hidden = layer_.hidden, intermediate = layer_.intermediate;
    const Weights<P>&w13 = layer_.w13, &w2 = layer_.w2;
    r_.sort(batch_, layer_);
    widest_ = layer_.widest();
    gather(w13, b_.half13, [&](i64 t, i64 i) { return P::value(batch_.x[t * hidden + i]); });
    auto x = [&](i64 t, i64 i) { return P::as_input(batch_.x[t * hidden + i]); };
    if (w13.base_v || w13.shared_v) fill_tokens(b_.half13, hidden, x);
    if ((w13.v && !w13.shared_v) || w13.mixed || w13.whole) fill_pairs(w13, hidden, x);
    const Shrink<P> shrink13(w13, b_.half13, r_, parallel_, threads_, batch_.tokens, hidden);
    if (w13.shared_v) shrink13(b_.half13.rows_of_tokens(batch_.tokens, hidden), [&](i64 p) { return r_.pairs[p].token; });
    else shrink13({}, {});
    if (w13.mixed) Mixing<P>(w13, b_.half13, r_, parallel_, threads_, hidden)();
    if (w13.columns) shrink13.pick([&](i64 p, i64 i) { return x(r_.pairs[p].token, i); });
    round_all(w13, b_.half13);

    b_.half2.pairs.resize(r_.all() * packed_inputs<P>(widest_));
    mix_step_ = w2.based() ? ceil_div(intermediate, SLICE) * SLICE : 0;
    b_.mix.resize(batch_.tokens * mix_step_);
    if (layer_.widths) narrow_gate_up();
    else in_slices(w13, intermediate, [&](i64 first, i64 end) { gate_up(first, end); });

    auto mix = [&](i64 t, i64 i) { return b_.mix[t * mix_step_ + i]; };
    gather(w2, b_.half2, mix);
    if (w2.base_v) fill_tokens(b_.half2, intermediate, [&](i64 t, i64 i) { return P::input(mix(t, i)); });
    const Shrink<P> shrink2(w2, b_.half2, r_, parallel_, threads_, batch_.tokens, widest_);
    if (w2.shared_v) shrink2(hidden_rows(), [](i64 p) { return p; });
    else shrink2({}, {});
    if (w2.columns) shrink2.pick([&](i64 p, i64 i) { return hidden_row(p)[i]; });
    round_all(w2, b_.half2);
    in_slices(w2, hidden, [&](i64 first, i64 end) { down(first, end); });
  }

 private:
  // h_e: all in one, where all experts have one V, or expert by expert.
  Rows<P> hidden_rows() const { return factor_rows<P>(b_.half2.pairs.data(), r_.all(), layer_.intermediate); }
  Row<P> hidden_row(i64 p) const {
    if (layer_.w2.shared_v) return hidden_rows().row(p);
    const i64 e = r_.pairs[p].expert;
    return r_.rows_of<P>(b_.half2.pairs, e, layer_.width(e), widest_).row(p - r_.starts[e]);
  }

  template <class Value>
  void gather(const Weights<P>& w, Half<P>& half, Value value) const {
    if (w.base[0].w) half.base.gather(w, layer_.scope, batch_.tokens, batch_.padding, parallel_, value);
  }

  // f(n, begin, end) for n things and chunks of k inputs.
  template <class F>
  void in_chunks(i64 n, i64 k, F f) const {
    const i64 chunks = ceil_div(k, CHUNK);
    parallel_(n * chunks, [&](i64 task) {
      const i64 begin = task % chunks * CHUNK;
      f(task / chunks, begin, std::min(k, begin + CHUNK));
    });
  }

  template <class Value>
  void fill_tokens(Half<P>& half, i64 in, Value value) {
    half.tokens.resize(batch_.tokens * packed_inputs<P>(in));
    const Rows<P> rows = half.rows_of_tokens(batch_.tokens, in);
    in_chunks(rows.tiles, in, [&](i64 tile, i64 begin, i64 end) {
      for (i64 t = rows.first(tile); t < rows.first(tile + 1); ++t) rows.row(t).fill(begin, end, [&](i64 i) { return value(t, i); });
    });
  }

  template <class Value>
  void fill_pairs(const Weights<P>& w, i64 in, Value value) {
    b_.half13.pairs.resize(r_.all() * packed_inputs<P>(in));
    in_chunks(i64(r_.active.size()), in, [&](i64 number, i64 begin, i64 end) {
      const i64 e = r_.active[number];
      if (!w.has_delta(e)) return;
      const Rows<P> rows = r_.rows_of<P>(b_.half13.pairs, e, in);
      for (i64 r = 0; r < rows.n; ++r) {
        const i64 t = r_.pairs[r_.starts[e] + r].token;
        rows.row(r).fill(begin, end, [&](i64 i) { return value(t, i); });
      }
    });
  }

  // The rows that all slices of a base's matrices and of U's are multiplied with.
  void round_all(const Weights<P>& w, Half<P>& half) const {
    std::vector<ToRound<P>> all;
    std::vector<Factor<P>> factors;
    factors.reserve(2 + 2 * r_.active.size());
    auto add = [&](Rounded& to, const Rows<P>& rows, const Factor<P>& factor) {
      if (!factor || !rounds<P>(factor.how)) return;
      factors.push_back(factor);
      all.push_back({&to, rows, &factors.back()});
    };
    for (int j = 0; j < 2; ++j) {
      if (w.base_rank[j]) add(half.of_base[j], low_rows(w, half, j), w.base_u[j]);
      half.of_u[j].resize(layer_.experts);
    }
    if (!w.by_columns) add(half.of_base[0], half.base.rows(batch_.tokens, false), w.base[0]);
    for (i64 e : r_.active)
      for (int j = 0; j < (w.whole ? 1 : 2); ++j)
        if (w.rank[j] && w.has_delta(e) && layer_.width(e)) {
          const Factor<P> u = w.u[j].at(w.u_place(e));
          add(half.of_u[j][e], rows_of_u(w, half, e, j, u.in), u);
        }
    round_rows(all, parallel_);
  }

  // What a base's U's are multiplied with, and the U, or whole matrix, of expert e with `in` inputs.
  Rows<P> low_rows(const Weights<P>& w, Half<P>& half, int j) const {
    return factor_rows<P>(half.low[j].data(), batch_.tokens, w.base_rank[j]);
  }
  // Rows lie as far apart as the widest expert's.
  Rows<P> rows_of_u(const Weights<P>& w, Half<P>& half, i64 e, int j, i64 in) const {
    return r_.rows_of<P>(w.whole ? half.pairs : half.s[j], e, in, w.rank[j]);
  }

  // f(first, end) for all outputs: slices, or as much of a fold of a base that is packed by columns as leaves each thread
  // some tasks.
  template <class F>
  void in_slices(const Weights<P>& w, i64 out, F f) const {
    i64 size = w.base[0].w && w.by_columns ? fold(out) : SLICE;
    while (size > SLICE && ceil_div(out, size) < 4 * threads_) size /= 2;
    parallel_(ceil_div(out, size), [&](i64 task) { f(task * size, std::min(out, (task + 1) * size)); });
  }

  static i64 blocks_from(i64 first, i64 out) { return std::min(SLICE_BLOCKS, ceil_div(out - first, LANES)); }

  // The U of part j of the `number`th active expert, for asking ahead; nothing where there is none.
  Next u_of(const Weights<P>& w, i64 number, int j, i64 first) const {
    if (number >= i64(r_.active.size()) || !w.rank[j] || !w.has_delta(r_.active[number])) return {};
    const Factor<P> u = w.u[j].at(w.u_place(r_.active[number]));
    return first < u.out ? u.from(first).ahead() : Next{};
  }

  Next base_of(const Weights<P>& w, int j, i64 first) const {
    return w.base[j].w && !w.by_columns ? w.base[j].from(first).ahead() : Next{};
  }

  // z [slices, tokens, SLICE]: what the base adds to outputs first .. end of its part j.
  void base_slices(const Weights<P>& w, Half<P>& half, int j, i64 first, i64 end, i64 out, Next after, float* z) const {
    const i64 tokens = batch_.tokens;
    std::fill_n(z, ceil_div(end - first, SLICE) * tokens * SLICE, 0.0f);
    if (w.base[j].w && w.by_columns) {
      const Gathered<P>& g = half.base;
      const Rows<P> rows = half.base.rows(tokens, true);
      const i64 in_fold = first % fold(out), slices = ceil_div(end - first, SLICE);
      const Element* block = reinterpret_cast<const Element*>(w.base[j].w) + (first - in_fold) * w.kept + in_fold;
      for (i64 t = 0; t < (g.per_token ? tokens : 1); ++t) {
        const Rows<P> some = g.per_token ? Rows<P>{rows.tile(t), 1, g.n, 1} : rows;
        add_base<P>(some, block, fold(out), slices, g.selected.data() + t * g.n, z + t * SLICE, tokens);
      }
    } else if (w.base[j] || w.base_rank[j]) {
      const bool whole = bool(w.base[j]);
      Rows<P> rows = whole ? half.base.rows(tokens, false) : low_rows(w, half, j);
      rows.rounded = &half.of_base[whole ? 0 : j];
      multiply_factor<P>(rows, (whole ? w.base[j] : w.base_u[j]).from(first), blocks_from(first, out), after, z, SLICE);
    }
  }

  // d [rows of e, SLICE]: U s of part j; false where the expert has none.
  bool delta_slice(const Weights<P>& w, Half<P>& half, i64 e, int j, i64 first, Next after, float* d) const {
    if (!w.rank[j] || !w.has_delta(e) || !layer_.width(e)) return false;
    const Factor<P> u = w.u[j].at(w.u_place(e));
    Rows<P> rows = rows_of_u(w, half, e, j, u.in);
    rows.rounded = &half.of_u[w.whole ? 0 : j][e];
    multiply_factor<P>(rows, u.from(first), blocks_from(first, u.out), after, d, SLICE);
    return true;
  }

  void gate_up(i64 first, i64 end) {
    const i64 size = ceil_div(end - first, SLICE) * batch_.tokens * SLICE, out = layer_.intermediate;
    const Weights<P>& w = layer_.w13;
    thread_local std::vector<float> z[2];
    for (int j = 0; j < layer_.parts; ++j) {
      z[j].resize(size);
      base_slices(w, b_.half13, j, first, end, out, j ? u_of(w, 0, 0, first) : base_of(w, 1, first), z[j].data());
    }
    for (i64 i = first; i < end; i += SLICE) {
      const float* of_slice[2];
      for (int j = 0; j < layer_.parts; ++j) of_slice[j] = z[j].data() + (i - first) * batch_.tokens;
      experts_slice(i, [&](i64, i64 token, i64, int j) { return of_slice[j] + token * SLICE; });
    }
  }

  // Where experts keep some channels only: first the base, for all channels that any of them has, then slices of what each
  // keeps, those that most experts have first. Tasks that others outlast are the small ones.
  void narrow_gate_up() {
    const Weights<P>& w = layer_.w13;
    Narrow& n = b_.narrow;
    if (!layer_.channels) {  // no base
      static const float none[SLICE] = {};
      parallel_(ceil_div(widest_, SLICE), [&](i64 task) {
        experts_slice(task * SLICE, [](i64, i64, i64, int) { return &none[0]; });
      });
      return;
    }
    const i64 out = layer_.intermediate, tokens = batch_.tokens;
    n.find_channels(layer_, r_, widest_, parallel_);
    for (auto& z : n.z) z.resize(ceil_div(out, SLICE) * tokens * SLICE);
    in_slices(w, out, [&](i64 first, i64 end) {
      for (int j = 0; j < layer_.parts; ++j)
        base_slices(w, b_.half13, j, first, end, out, j ? Next{} : base_of(w, 1, first), n.z[j].data() + first * tokens);
    });
    n.h.resize(mix_step_ ? r_.all() * widest_ : 0);
    parallel_(ceil_div(widest_, SLICE), [&](i64 task) {
      thread_local float own[2][SLICE];
      experts_slice(task * SLICE, [&](i64 number, i64 token, i64 width, int j) {
        n.gather(number, token, j, task * SLICE, width, tokens, own[j]);
        return &own[j][0];
      });
    });
    if (mix_step_) n.mix(layer_, r_, tokens, mix_step_, parallel_, b_.mix.data());
  }

  // h of all pairs, channels first .. first + SLICE of theirs, and, where all experts have all channels, the mix.
  // base(number of the expert, token, width of the expert, part): the base's share [SLICE].
  template <class Base>
  void experts_slice(i64 first, Base base) {
    const i64 tokens = batch_.tokens;
    const Weights<P>& w = layer_.w13;
    const bool mixing = mix_step_ && !layer_.widths;
    thread_local std::vector<float> d[2];
    if (mixing) for (i64 t = 0; t < tokens; ++t) std::fill_n(&b_.mix[t * mix_step_ + first], SLICE, 0.0f);
    for (i64 number = 0; number < i64(r_.active.size()); ++number) {
      const i64 e = r_.active[number], width = layer_.width(e), last = std::min(width, first + SLICE);
      if (first >= width) continue;
      bool found[2];
      for (int j = 0; j < layer_.parts; ++j) {
        d[j].resize(r_.count(e) * SLICE);
        found[j] = delta_slice(w, b_.half13, e, j, first, u_of(w, number + j, !j, first), d[j].data());
      }
      for (i64 p = r_.starts[e]; p < r_.starts[e + 1]; ++p) {
        const Pair& pair = r_.pairs[p];
        const float* z[2];
        for (int j = 0; j < layer_.parts; ++j) z[j] = base(number, pair.token, width, j);
        float h[SLICE];
        for (i64 i = 0; i < SLICE; i += LANES) {
          Floats part[2];
          for (int j = 0; j < layer_.parts; ++j) {
            part[j] = load(z[j] + i);
            if (found[j]) part[j] += load(&d[j][(p - r_.starts[e]) * SLICE + i]);
            if (w.bias) part[j] += load(w.bias_of(e, j) + first + i);
          }
          const Floats value = layer_.swiglu.limit ? clamped(layer_.swiglu, part[0], part[1])
                               : layer_.parts == 2 ? activate(layer_.activation, part[0]) * part[1]
                                                   : activate(layer_.activation, part[0]);
          store(h + i, value);
          if (mixing) {
            float* sum = &b_.mix[pair.token * mix_step_ + first + i];
            store(sum, load(sum) + pair.gate * value);
          }
        }
        if (mix_step_ && layer_.widths) std::copy_n(h, last - first, &b_.narrow.h[p * widest_ + first]);
        hidden_row(p).put(first, last, h);
      }
    }
  }

  void down(i64 first, i64 end) {
    const i64 out = layer_.hidden;
    const Weights<P>& w = layer_.w2;
    thread_local std::vector<float> y;
    y.resize(ceil_div(end - first, SLICE) * batch_.tokens * SLICE);
    base_slices(w, b_.half2, 0, first, end, out, u_of(w, 0, 0, first), y.data());
    for (i64 i = first; i < end; i += SLICE) outputs_slice(i, y.data() + (i - first) * batch_.tokens);
  }

  // Outputs first .. first + SLICE of all tokens; y [tokens, SLICE]: the base's share.
  void outputs_slice(i64 first, float* y) {
    const i64 out = layer_.hidden, last = std::min(out, first + SLICE);
    const Weights<P>& w = layer_.w2;
    thread_local std::vector<float> d;
    for (i64 number = 0; number < i64(r_.active.size()); ++number) {
      const i64 e = r_.active[number];
      d.resize(r_.count(e) * SLICE);
      const bool found = delta_slice(w, b_.half2, e, 0, first, u_of(w, number + 1, 0, first), d.data());
      if (!found && !w.bias) continue;
      for (i64 r = 0; r < r_.count(e); ++r) {
        const Pair& pair = r_.pairs[r_.starts[e] + r];
        for (i64 i = 0; i < SLICE; i += LANES) {
          float* sum = &y[pair.token * SLICE + i];
          Floats gives = {};
          if (found) gives = load(&d[r * SLICE + i]);
          if (w.bias) gives += load(w.bias_of(e, 0) + first + i);
          store(sum, load(sum) + pair.gate * gives);
        }
      }
    }
    for (i64 t = 0; t < batch_.tokens; ++t)
      round_to<P>(&y[t * SLICE], last - first, &batch_.y[t * out + first]);
  }

  const Layer<P>& layer_;
  const Batch<P>& batch_;
  const Parallel& parallel_;
  const i64 threads_;
  Buffers<P>& b_;
  Routing& r_;
  i64 widest_ = 0;    // channels of the expert that has most
  i64 mix_step_ = 0;  // floats from one token's mix to the next's; 0: no base needs it
};

}  // namespace d2moe
