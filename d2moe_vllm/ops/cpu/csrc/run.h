// The steps of a layer (METHODS 1.5 and 1.6), each a set of tasks that write what no other task of the step writes:
//   1  sort (token, expert) pairs by expert; select gate's and up's columns and gather the base's inputs
//   2  shrink:        s = V x                                   per expert and 64 ranks
//   3  gate and up:   z = B x; h = act(z + U s) * (z + U s);    per 64 channels, the mix sum_e g_e h_e on the way
//   4  select down's columns of the mix, gather them
//   5  shrink:        s = V h
//   6  down:          y = B mix + sum_e g_e U s                 per 64 outputs
#pragma once

#include <atomic>

#include "columns.h"

namespace d2moe {

// Inputs that a task of rearranging rows moves.
constexpr i64 CHUNK = 1024;

struct Pair {
  i64 token, expert;
  float gate;
};

// One half's intermediate rows. Of two: gate's and up's, or down's alone.
template <class P>
struct Half {
  using Input = typename P::Input;
  std::vector<Input> pairs, tokens;            // inputs, expert by expert and token by token
  std::vector<Input> s[2], common[2], low[2];  // V x by expert; of a V that is shared; of a base's V
  Gathered<P> base;
};

// All that a run needs besides the weights. Kept from run to run, it grows to what the largest batch needs and no more:
// memory that is asked for and given back by every call comes to more than that.
template <class P>
struct Buffers {
  std::vector<i64> starts, next, active;
  std::vector<Pair> pairs;
  std::vector<float> mix;
  Half<P> half13, half2;
};

template <class P>
class Run {
  using Element = typename P::Element;
  using Input = typename P::Input;

 public:
  // buffers: for one run at a time. threads: that `parallel` runs on; they change how work is cut, and no result.
  Run(const Layer<P>& layer, const Batch<P>& batch, const Parallel& parallel, i64 threads, Buffers<P>& buffers)
      : layer_(layer), batch_(batch), parallel_(parallel), threads_(threads), b_(buffers) {}

  void operator()() {
    const i64 hidden = layer_.hidden, intermediate = layer_.intermediate;
    const Weights<P>&w13 = layer_.w13, &w2 = layer_.w2;
    sort_by_expert();
    gather(w13, b_.half13, [&](i64 t, i64 i) { return P::value(batch_.x[t * hidden + i]); });
    auto x = [&](i64 t, i64 i) { return input(batch_.x[t * hidden + i]); };
    if (w13.base_v || w13.shared_v) fill_tokens(b_.half13, hidden, x);
    if (w13.v && !w13.shared_v) fill_pairs(w13, hidden, x);
    if (w13.shared_v) shrink(w13, b_.half13, hidden, tokens_of(b_.half13, hidden), [&](i64 p) { return b_.pairs[p].token; });
    else shrink(w13, b_.half13, hidden, {}, {});
    if (w13.columns) pick(w13, b_.half13, [&](i64 p, i64 i) { return x(b_.pairs[p].token, i); });

    b_.half2.pairs.resize(all() * packed_inputs<P>(intermediate));
    mix_step_ = w2.based() ? ceil_div(intermediate, SLICE) * SLICE : 0;
    b_.mix.resize(batch_.tokens * mix_step_);
    in_slices(w13, intermediate, [&](i64 first, i64 end) { gate_up(first, end); });

    auto mix = [&](i64 t, i64 i) { return b_.mix[t * mix_step_ + i]; };
    gather(w2, b_.half2, mix);
    if (w2.base_v) fill_tokens(b_.half2, intermediate, [&](i64 t, i64 i) { return P::input(mix(t, i)); });
    if (w2.shared_v) shrink(w2, b_.half2, intermediate, hidden_rows(), [](i64 p) { return p; });
    else shrink(w2, b_.half2, intermediate, {}, {});
    if (w2.columns) pick(w2, b_.half2, [&](i64 p, i64 i) { return hidden_row(p)[i]; });
    in_slices(w2, hidden, [&](i64 first, i64 end) { down(first, end); });
  }

 private:
  static Input input(Element e) {
    if constexpr (std::is_same_v<Input, Element>) return e;
    else return P::value(e);
  }

  i64 all() const { return i64(b_.pairs.size()); }
  i64 count(i64 e) const { return b_.starts[e + 1] - b_.starts[e]; }
  // An expert's rows in a buffer that has those of all pairs.
  Rows<P> rows_of(std::vector<Input>& of, i64 e, i64 k) const {
    return factor_rows<P>(of.data() + b_.starts[e] * packed_inputs<P>(k), count(e), k);
  }
  Rows<P> tokens_of(Half<P>& half, i64 in) const { return factor_rows<P>(half.tokens.data(), batch_.tokens, in); }
  // h_e: all in one, where all experts have one V, or expert by expert.
  Rows<P> hidden_rows() const { return factor_rows<P>(b_.half2.pairs.data(), all(), layer_.intermediate); }
  Row<P> hidden_row(i64 p) const {
    if (layer_.w2.shared_v) return hidden_rows().row(p);
    const i64 e = b_.pairs[p].expert;
    return rows_of(b_.half2.pairs, e, layer_.intermediate).row(p - b_.starts[e]);
  }

  void sort_by_expert() {
    b_.starts.assign(layer_.experts + 1, 0);
    const i64 routed = batch_.tokens * batch_.top_k;
    auto here = [&](i64 i) { return batch_.ids[i] >= 0 && batch_.ids[i] < layer_.experts; };
    for (i64 i = 0; i < routed; ++i) if (here(i)) ++b_.starts[batch_.ids[i] + 1];
    for (i64 e = 0; e < layer_.experts; ++e) b_.starts[e + 1] += b_.starts[e];
    b_.active.clear();
    for (i64 e = 0; e < layer_.experts; ++e) if (count(e)) b_.active.push_back(e);
    b_.pairs.resize(b_.starts.back());
    b_.next.assign(b_.starts.begin(), b_.starts.end() - 1);
    for (i64 i = 0; i < routed; ++i)
      if (here(i)) b_.pairs[b_.next[batch_.ids[i]]++] = {i / batch_.top_k, batch_.ids[i], batch_.gates[i]};
  }

  template <class Value>
  void gather(const Weights<P>& w, Half<P>& half, Value value) const {
    if (w.base[0]) half.base.gather(w, layer_.scope, batch_.tokens, batch_.padding, parallel_, value);
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
    const Rows<P> rows = tokens_of(half, in);
    in_chunks(rows.tiles, in, [&](i64 tile, i64 begin, i64 end) {
      for (i64 t = rows.first(tile); t < rows.first(tile + 1); ++t) rows.row(t).fill(begin, end, [&](i64 i) { return value(t, i); });
    });
  }

  template <class Value>
  void fill_pairs(const Weights<P>& w, i64 in, Value value) {
    b_.half13.pairs.resize(all() * packed_inputs<P>(in));
    in_chunks(i64(b_.active.size()), in, [&](i64 number, i64 begin, i64 end) {
      const i64 e = b_.active[number];
      if (!w.has_delta(e)) return;
      const Rows<P> rows = rows_of(b_.half13.pairs, e, in);
      for (i64 r = 0; r < rows.n; ++r) {
        const i64 t = b_.pairs[b_.starts[e] + r].token;
        rows.row(r).fill(begin, end, [&](i64 i) { return value(t, i); });
      }
    });
  }

  // Rows to be multiplied by a packed factor with `out` outputs, gate's before up's.
  struct Shrink {
    Rows<P> rows;
    const Element* v;
    i64 out;
    Rows<P> to[2];
  };

  // The `n` rows from `first` on of buffers that have `total`.
  static void make_room(std::vector<Input>* of, i64 total, i64 first, i64 n, const i64* rank, Rows<P>* to) {
    for (int j = 0; j < 2; ++j) {
      const i64 k = packed_inputs<P>(rank[j]);
      of[j].resize(total * k);
      to[j] = factor_rows<P>(of[j].data() + first * k, n, rank[j]);
    }
  }

  // s = V x of all pairs, and of all tokens where the base is of low rank. common: the rows of a V that all experts
  // share, and of_pair(p): which of them is pair p's.
  void shrink(const Weights<P>& w, Half<P>& half, i64 in, Rows<P> common, const std::function<i64(i64)>& of_pair) {
    std::vector<Shrink> jobs;
    if (w.base_v) {
      jobs.push_back({tokens_of(half, in), w.base_v, w.base_ranks(), {}});
      make_room(half.low, batch_.tokens, 0, batch_.tokens, w.base_rank, jobs.back().to);
    }
    if (w.shared_v && w.ranks()) {
      jobs.push_back({common, w.v, w.ranks(), {}});
      make_room(half.common, common.n, 0, common.n, w.rank, jobs.back().to);
    } else if (w.v && w.ranks()) {
      for (i64 e : b_.active) {
        if (!w.has_delta(e)) continue;
        jobs.push_back({rows_of(half.pairs, e, in), w.v + w.v_place(e) * packed_size<P>(w.ranks(), in), w.ranks(), {}});
        make_room(half.s, all(), b_.starts[e], count(e), w.rank, jobs.back().to);
      }
    }
    run(jobs);
    if (!w.shared_v || !w.ranks()) return;
    Rows<P> rows[2];
    make_room(half.common, common.n, 0, common.n, w.rank, rows);
    spread(w, half, [&](int j, i64 p, i64 i) { return rows[j].row(of_pair(p))[i]; });
  }

  void run(const std::vector<Shrink>& jobs) const {
    std::vector<std::pair<const Shrink*, i64>> tasks;  // and the first block
    for (const Shrink& job : jobs)
      for (i64 b = 0; b < ceil_div(job.out, LANES); b += SLICE_BLOCKS) tasks.push_back({&job, b});
    parallel_(i64(tasks.size()), [&](i64 number) {
      const auto [job, block] = tasks[number];
      const Rows<P>& rows = job->rows;
      const i64 stride = LANES * packed_inputs<P>(rows.k), first = block * LANES;
      const i64 blocks = std::min(SLICE_BLOCKS, ceil_div(job->out, LANES) - block), last = std::min(job->out, first + SLICE);
      thread_local std::vector<float> tile;
      tile.resize(rows.n * SLICE);
      multiply_factor<P>(rows, job->v + block * stride, stride, blocks, {}, tile.data(), SLICE);
      for (i64 r = 0; r < rows.n; ++r) {
        const float* from = &tile[r * SLICE];
        const i64 gate = job->to[0].k, middle = std::clamp(gate, first, last);
        for (i64 i = first; i < middle; ++i) job->to[0].set(r, i, P::input(from[i - first]));
        for (i64 i = middle; i < last; ++i) job->to[1].set(r, i - gate, P::input(from[i - first]));
      }
    });
  }

  // s of every pair by value(part, pair, i).
  template <class Value>
  void spread(const Weights<P>& w, Half<P>& half, Value value) {
    for (int j = 0; j < 2; ++j) half.s[j].resize(all() * packed_inputs<P>(w.rank[j]));
    parallel_(i64(b_.active.size()), [&](i64 number) {
      const i64 e = b_.active[number];
      if (!w.has_delta(e)) return;
      for (int j = 0; j < 2; ++j) {
        const Rows<P> rows = rows_of(half.s[j], e, w.rank[j]);
        for (i64 r = 0; r < rows.n; ++r)
          rows.row(r).fill(0, w.rank[j], [&](i64 i) { return value(j, b_.starts[e] + r, i); });
      }
    });
  }

  // Column deltas: s is the input itself. value(p, i): input i of pair p.
  template <class Value>
  void pick(const Weights<P>& w, Half<P>& half, Value value) {
    if (!w.ranks()) return;
    spread(w, half, [&](int j, i64 p, i64 i) {
      return value(p, w.columns[w.v_place(b_.pairs[p].expert) * w.ranks() + (j ? w.rank[0] : 0) + i]);
    });
  }

  // f(first, end) for all outputs: slices, or as much of a fold of a base that is packed by columns as leaves each thread
  // some tasks.
  template <class F>
  void in_slices(const Weights<P>& w, i64 out, F f) const {
    i64 size = w.base[0] && w.by_columns ? fold(out) : SLICE;
    while (size > SLICE && ceil_div(out, size) < 4 * threads_) size /= 2;
    parallel_(ceil_div(out, size), [&](i64 task) { f(task * size, std::min(out, (task + 1) * size)); });
  }

  static i64 blocks_from(i64 first, i64 out) { return std::min(SLICE_BLOCKS, ceil_div(out - first, LANES)); }

  // The U of part j of the `number`th active expert, for asking ahead; nothing where there is none.
  Next<P> u_of(const Weights<P>& w, i64 number, int j, i64 first, i64 out) const {
    if (number >= i64(b_.active.size()) || !w.rank[j] || !w.has_delta(b_.active[number])) return {};
    const i64 steps = packed_inputs<P>(w.rank[j]) / P::PAIR, stride = LANES * steps * P::PAIR;
    return {w.u[j] + w.u_place(b_.active[number]) * packed_size<P>(out, w.rank[j]) + first / LANES * stride, stride, steps};
  }

  Next<P> base_of(const Weights<P>& w, int j, i64 first) const {
    if (!w.base[j] || w.by_columns) return {};
    const i64 steps = packed_inputs<P>(w.kept) / P::PAIR, stride = LANES * steps * P::PAIR;
    return {w.base[j] + first / LANES * stride, stride, steps};
  }

  // z [slices, tokens, SLICE]: what the base adds to outputs first .. end of its part j.
  void base_slices(const Weights<P>& w, Half<P>& half, int j, i64 first, i64 end, i64 out, Next<P> after, float* z) const {
    const i64 tokens = batch_.tokens;
    std::fill_n(z, ceil_div(end - first, SLICE) * tokens * SLICE, 0.0f);
    if (w.base[j] && w.by_columns) {
      const Gathered<P>& g = half.base;
      const Rows<P> rows = half.base.rows(tokens, true);
      const i64 in_fold = first % fold(out), slices = ceil_div(end - first, SLICE);
      const Element* block = w.base[j] + (first - in_fold) * w.kept + in_fold;
      for (i64 t = 0; t < (g.per_token ? tokens : 1); ++t) {
        const Rows<P> some = g.per_token ? Rows<P>{rows.tile(t), 1, g.n, 1} : rows;
        add_base<P>(some, block, fold(out), slices, g.selected.data() + t * g.n, z + t * SLICE, tokens);
      }
    } else if (w.base[j] || w.base_rank[j]) {
      const Rows<P> rows = w.base[j] ? half.base.rows(tokens, false) : factor_rows<P>(half.low[j].data(), tokens, w.base_rank[j]);
      const i64 stride = LANES * packed_inputs<P>(rows.k);
      const Element* from = (w.base[j] ? w.base[j] : w.base_u[j]) + first / LANES * stride;
      multiply_factor<P>(rows, from, stride, blocks_from(first, out), after, z, SLICE);
    }
  }

  // d [rows of e, SLICE]: U s of part j; false where the expert has none.
  bool delta_slice(const Weights<P>& w, Half<P>& half, i64 e, int j, i64 first, i64 out, Next<P> after, float* d) const {
    if (!w.rank[j] || !w.has_delta(e)) return false;
    const i64 stride = LANES * packed_inputs<P>(w.rank[j]);
    const Element* u = w.u[j] + w.u_place(e) * packed_size<P>(out, w.rank[j]) + first / LANES * stride;
    multiply_factor<P>(rows_of(half.s[j], e, w.rank[j]), u, stride, blocks_from(first, out), after, d, SLICE);
    return true;
  }

  void gate_up(i64 first, i64 end) {
    const i64 size = ceil_div(end - first, SLICE) * batch_.tokens * SLICE, out = layer_.intermediate;
    const Weights<P>& w = layer_.w13;
    thread_local std::vector<float> z[2];
    for (int j = 0; j < 2; ++j) {
      z[j].resize(size);
      base_slices(w, b_.half13, j, first, end, out, j ? u_of(w, 0, 0, first, out) : base_of(w, 1, first), z[j].data());
    }
    for (i64 i = first; i < end; i += SLICE) {
      const float* of_slice[2];
      for (int j = 0; j < 2; ++j) of_slice[j] = z[j].data() + (i - first) * batch_.tokens;
      experts_slice(i, of_slice);
    }
  }

  // h of all pairs, channels first .. first + SLICE, and the mix; z [tokens, SLICE]: the base's share.
  void experts_slice(i64 first, const float* const (&z)[2]) {
    const i64 tokens = batch_.tokens, out = layer_.intermediate, last = std::min(out, first + SLICE);
    const Weights<P>& w = layer_.w13;
    thread_local std::vector<float> d[2];
    if (mix_step_) for (i64 t = 0; t < tokens; ++t) std::fill_n(&b_.mix[t * mix_step_ + first], SLICE, 0.0f);
    for (i64 number = 0; number < i64(b_.active.size()); ++number) {
      const i64 e = b_.active[number];
      bool found[2];
      for (int j = 0; j < 2; ++j) {
        d[j].resize(count(e) * SLICE);
        found[j] = delta_slice(w, b_.half13, e, j, first, out, u_of(w, number + j, !j, first, out), d[j].data());
      }
      for (i64 p = b_.starts[e]; p < b_.starts[e + 1]; ++p) {
        const Pair& pair = b_.pairs[p];
        float h[SLICE];
        for (i64 i = 0; i < SLICE; i += LANES) {
          Floats part[2];
          for (int j = 0; j < 2; ++j) {
            part[j] = load(&z[j][pair.token * SLICE + i]);
            if (found[j]) part[j] += load(&d[j][(p - b_.starts[e]) * SLICE + i]);
          }
          const Floats value = activate(layer_.activation, part[0]) * part[1];
          store(h + i, value);
          if (mix_step_) {
            float* sum = &b_.mix[pair.token * mix_step_ + first + i];
            store(sum, load(sum) + pair.gate * value);
          }
        }
        hidden_row(p).fill(first, last, [&](i64 i) { return P::input(h[i - first]); });
      }
    }
  }

  void down(i64 first, i64 end) {
    const i64 out = layer_.hidden;
    const Weights<P>& w = layer_.w2;
    thread_local std::vector<float> y;
    y.resize(ceil_div(end - first, SLICE) * batch_.tokens * SLICE);
    base_slices(w, b_.half2, 0, first, end, out, u_of(w, 0, 0, first, out), y.data());
    for (i64 i = first; i < end; i += SLICE) outputs_slice(i, y.data() + (i - first) * batch_.tokens);
  }

  // Outputs first .. first + SLICE of all tokens; y [tokens, SLICE]: the base's share.
  void outputs_slice(i64 first, float* y) {
    const i64 out = layer_.hidden, last = std::min(out, first + SLICE);
    const Weights<P>& w = layer_.w2;
    thread_local std::vector<float> d;
    for (i64 number = 0; number < i64(b_.active.size()); ++number) {
      const i64 e = b_.active[number];
      d.resize(count(e) * SLICE);
      if (!delta_slice(w, b_.half2, e, 0, first, out, u_of(w, number + 1, 0, first, out), d.data())) continue;
      for (i64 r = 0; r < count(e); ++r) {
        const Pair& pair = b_.pairs[b_.starts[e] + r];
        for (i64 i = 0; i < SLICE; i += LANES) {
          float* sum = &y[pair.token * SLICE + i];
          store(sum, load(sum) + pair.gate * load(&d[r * SLICE + i]));
        }
      }
    }
    for (i64 t = 0; t < batch_.tokens; ++t)
      for (i64 i = first; i < last; ++i) batch_.y[t * out + i] = P::element(y[t * SLICE + i - first]);
  }

  const Layer<P>& layer_;
  const Batch<P>& batch_;
  const Parallel& parallel_;
  const i64 threads_;
  Buffers<P>& b_;
  i64 mix_step_ = 0;  // floats from one token's mix to the next's; 0: no base needs it
};

}  // namespace d2moe
