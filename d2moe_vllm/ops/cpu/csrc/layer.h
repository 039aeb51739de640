// One MoE layer of a d2moe checkpoint (METHODS 1.5 and 1.6) over packed weights, without torch.
//
// Steps, each a set of tasks that write what no other task of the step writes:
//   1  select gate's and up's columns and gather the base's inputs; sort (token, expert) pairs by expert
//   2  shrink:        s = V x                                   per expert and 64 ranks
//   3  gate and up:   z = B x; h = act(z + U s) * (z + U s);    per 64 channels, the mix sum_e g_e h_e on the way
//   4  select down's columns of the mix, gather them
//   5  shrink:        s = V h
//   6  down:          y = B mix + sum_e g_e U s                 per 64 outputs
#pragma once

#include <algorithm>
#include <atomic>
#include <functional>
#include <vector>

#include "kernels.h"

namespace d2moe {

// Gate and up together, or down; null where a layer has none. Packed as in kernels.h.
template <class P>
struct Weights {
  using Element = typename P::Element;
  const Element* u[2] = {};     // gate and up, or down alone: [places] packed factors [out, rank[j]]
  i64 rank[2] = {};
  const Element* v = nullptr;   // [places or 1] packed factors [rank[0] + rank[1], in]
  const i32* columns = nullptr; // [places, rank], instead of v
  bool shared_v = false;
  const i32* u_index = nullptr; // [experts]
  const i32* v_index = nullptr;
  const Element* base[2] = {};  // packed bases [kept, out]
  const i32* base_columns = nullptr;
  const float* base_norms = nullptr;
  i64 kept = 0, used = 0, groups = 1;
  const Element* base_u[2] = {};
  const Element* base_v = nullptr;
  i64 base_rank[2] = {};

  i64 ranks() const { return rank[0] + rank[1]; }
  i64 base_ranks() const { return base_rank[0] + base_rank[1]; }
  bool based() const { return base[0] || base_u[0] || base_u[1]; }
};

enum class Scope { off, token, batch };
enum class Activation { silu, gelu, gelu_tanh };

template <class P>
struct Layer {
  Weights<P> w13, w2;
  i64 experts = 0, hidden = 0, intermediate = 0;
  Scope scope = Scope::off;
  Activation activation = Activation::silu;
};

// x, y: [tokens, hidden]; gates: [tokens, top_k]; ids: [tokens, top_k], outside 0 .. experts - 1: not here.
template <class P>
struct Batch {
  const typename P::Element* x = nullptr;
  const float* gates = nullptr;
  const i32* ids = nullptr;
  const bool* padding = nullptr;  // [tokens] or null
  i64 tokens = 0, top_k = 0;
  typename P::Element* y = nullptr;
};

// Runs f(0) .. f(n - 1), in any order and on any threads, and returns when all are done.
using Parallel = std::function<void(i64 n, const std::function<void(i64)>& f)>;

constexpr i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }
template <class P>
constexpr i64 packed_inputs(i64 k) { return ceil_div(k, P::PAIR) * P::PAIR; }
template <class P>
constexpr i64 packed_size(i64 out, i64 k) { return ceil_div(out, LANES) * LANES * packed_inputs<P>(k); }
template <class P>
constexpr i64 packed_base_size(i64 out, i64 kept) { return ceil_div(out, fold<P>()) * fold<P>() * kept; }

// Outputs that a task of steps 3 and 6 computes: four blocks of a factor, one or two of a base.
constexpr i64 SLICE = 64, SLICE_BLOCKS = SLICE / LANES;

inline float activate(Activation kind, float x) {
  if (kind == Activation::gelu) return 0.5f * x * (1.0f + std::erf(x * 0.70710678118654752f));
  return 0.5f * x * (1.0f + std::tanh(0.79788456080286536f * (x + 0.044715f * x * x * x)));
}

inline Floats activate(Activation kind, Floats x) {
  if (kind == Activation::silu) return x / (1.0f + exp(-x));
  for (int i = 0; i < LANES; ++i) x[i] = activate(kind, x[i]);
  return x;
}

struct Pair {
  i64 token;
  float gate;
};

// What a base's columns are multiplied with: per token n values, and which kept columns these are (none: all).
template <class P>
struct Gathered {
  std::vector<typename P::Input> values;
  std::vector<i32> selected;  // [n], or [tokens, n] in scope token
  i64 n = 0;
  bool per_token = false;
};

// All that a run needs besides the weights. Kept from run to run, it grows to what the largest batch needs and no more:
// memory that is asked for and given back by every call comes to more than that.
template <class P>
struct Buffers {
  using Input = typename P::Input;
  std::vector<i64> starts, next, active;
  std::vector<Pair> pairs;
  std::vector<Input> inputs, hidden, mixed, s13, s2, low13, low2;
  std::vector<float> mix, scores;
  std::vector<const Input*> by_token, by_pair;
  Gathered<P> base13, base2;
};

template <class P>
class Run {
  using Element = typename P::Element;
  using Input = typename P::Input;

 public:
  // buffers: for one run at a time.
  Run(const Layer<P>& layer, const Batch<P>& batch, const Parallel& parallel, Buffers<P>& buffers)
      : layer_(layer), batch_(batch), parallel_(parallel), starts_(buffers.starts), active_(buffers.active),
        pairs_(buffers.pairs), hidden_(buffers.hidden), s13_(buffers.s13), s2_(buffers.s2), low13_(buffers.low13),
        low2_(buffers.low2), mix_(buffers.mix), base13_(buffers.base13), base2_(buffers.base2), buffers_(buffers) {}

  void operator()() {
    const i64 tokens = batch_.tokens, hidden = layer_.hidden, intermediate = layer_.intermediate;
    sort_by_expert();
    auto& inputs = buffers_.inputs;
    auto& mixed = buffers_.mixed;
    auto& by_token = buffers_.by_token;
    auto& by_pair = buffers_.by_pair;
    inputs.resize(tokens * hidden);
    by_token.resize(tokens);
    by_pair.resize(pairs_.size());
    for (i64 t = 0; t < tokens; ++t) by_token[t] = &inputs[t * hidden];
    for (size_t p = 0; p < pairs_.size(); ++p) by_pair[p] = by_token[pairs_[p].token];
    gather(layer_.w13, base13_, [&](i64 t, i64 i) { return P::value(batch_.x[t * hidden + i]); });
    for (i64 i = 0; i < tokens * hidden; ++i) inputs[i] = as_input(batch_.x[i]);
    std::vector<Shrink> jobs;
    add_shrinks(layer_.w13, hidden, by_pair, by_token, by_token, s13_, low13_, jobs);
    shrink(jobs, hidden);
    pick(layer_.w13, by_pair, s13_);

    hidden_.resize(pairs_.size() * intermediate);
    mix_.resize(layer_.w2.based() ? tokens * intermediate : 0);
    parallel_(ceil_div(intermediate, SLICE), [&](i64 slice) { gate_up(slice * SLICE); });

    gather(layer_.w2, base2_, [&](i64 t, i64 i) { return mix_[t * intermediate + i]; });
    mixed.resize(layer_.w2.base_v ? mix_.size() : 0);
    for (size_t i = 0; i < mixed.size(); ++i) mixed[i] = P::input(mix_[i]);
    for (size_t p = 0; p < pairs_.size(); ++p) by_pair[p] = &hidden_[p * intermediate];
    for (i64 t = 0; t < tokens && !mixed.empty(); ++t) by_token[t] = &mixed[t * intermediate];
    jobs.clear();
    add_shrinks(layer_.w2, intermediate, by_pair, by_pair, by_token, s2_, low2_, jobs);
    shrink(jobs, intermediate);
    pick(layer_.w2, by_pair, s2_);
    parallel_(ceil_div(hidden, SLICE), [&](i64 slice) { down(slice * SLICE); });
  }

 private:
  static Input as_input(Element e) {
    if constexpr (std::is_same_v<Input, Element>) return e;
    else return P::value(e);
  }

  void sort_by_expert() {
    starts_.assign(layer_.experts + 1, 0);
    const i64 all = batch_.tokens * batch_.top_k;
    auto here = [&](i64 i) { return batch_.ids[i] >= 0 && batch_.ids[i] < layer_.experts; };
    for (i64 i = 0; i < all; ++i) if (here(i)) ++starts_[batch_.ids[i] + 1];
    for (i64 e = 0; e < layer_.experts; ++e) starts_[e + 1] += starts_[e];
    active_.clear();
    for (i64 e = 0; e < layer_.experts; ++e) if (starts_[e + 1] > starts_[e]) active_.push_back(e);
    pairs_.resize(starts_.back());
    auto& next = buffers_.next;
    next.assign(starts_.begin(), starts_.end() - 1);
    for (i64 i = 0; i < all; ++i) if (here(i)) pairs_[next[batch_.ids[i]]++] = {i / batch_.top_k, batch_.gates[i]};
  }

  // The used/groups best of every group of kept columns: scores descending, of equal ones the first.
  static void select(const std::vector<float>& scores, i64 groups, i64 used, i32* out) {
    const i64 size = i64(scores.size()) / groups, want = used / groups;
    thread_local std::vector<i32> order;
    order.resize(size);
    for (i64 g = 0; g < groups; ++g) {
      for (i64 i = 0; i < size; ++i) order[i] = i32(g * size + i);
      // NaN sorts as torch has it: above all numbers.
      auto better = [&](i32 a, i32 b) {
        const bool na = std::isnan(scores[a]), nb = std::isnan(scores[b]);
        if (na || nb) return na == nb ? a < b : na;
        return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
      };
      std::nth_element(order.begin(), order.begin() + want, order.end(), better);
      std::copy_n(order.begin(), want, out + g * want);
      std::sort(out + g * want, out + (g + 1) * want);
    }
  }

  template <class Value>
  void gather(const Weights<P>& w, Gathered<P>& found, Value value) const {
    if (!w.base[0]) return;
    const bool choose = layer_.scope != Scope::off && w.used < w.kept;
    found.n = choose ? w.used : w.kept;
    found.per_token = choose && layer_.scope == Scope::token;
    found.values.resize(batch_.tokens * found.n);
    found.selected.resize(choose ? (found.per_token ? batch_.tokens : 1) * found.n : 0);
    if (choose && !found.per_token) {
      auto& scores = buffers_.scores;
      scores.resize(w.kept);
      const i64 chunk = 64;
      parallel_(ceil_div(w.kept, chunk), [&](i64 c) {
        for (i64 i = c * chunk; i < std::min(w.kept, (c + 1) * chunk); ++i) {
          float sum = 0;
          for (i64 t = 0; t < batch_.tokens; ++t) {
            const float v = batch_.padding && batch_.padding[t] ? 0.0f : value(t, w.base_columns[i]);
            sum += v * v;
          }
          scores[i] = std::sqrt(sum) * w.base_norms[i];
        }
      });
      select(scores, w.groups, w.used, found.selected.data());
    }
    parallel_(batch_.tokens, [&](i64 t) {
      i32* chosen = found.selected.data() + (found.per_token ? t * found.n : 0);
      if (found.per_token) {
        thread_local std::vector<float> scores;
        scores.resize(w.kept);
        for (i64 i = 0; i < w.kept; ++i) scores[i] = std::fabs(value(t, w.base_columns[i])) * w.base_norms[i];
        select(scores, w.groups, w.used, chosen);
      }
      for (i64 i = 0; i < found.n; ++i) {
        found.values[t * found.n + i] = P::input(value(t, w.base_columns[choose ? chosen[i] : i]));
      }
    });
  }

  // Rows x to be multiplied by a packed factor with `out` outputs; results go to consecutive rows of `ld` at `to`.
  struct Shrink {
    const Input* const* rows;
    i64 n;
    const Element* v;
    i64 out;
    Input* to;
    i64 ld;
  };

  i64 u_place(const Weights<P>& w, i64 e) const { return w.u_index ? w.u_index[e] : e; }
  i64 v_place(const Weights<P>& w, i64 e) const { return w.v_index ? w.v_index[e] : e; }
  bool has_delta(const Weights<P>& w, i64 e) const { return w.ranks() && u_place(w, e) >= 0; }

  // The jobs of one half. rows: of each pair, by expert. Where a V is shared, the rows of `common` instead.
  // tokens: rows of the base. s and low get room for the results.
  void add_shrinks(
      const Weights<P>& w, i64 in, const std::vector<const Input*>& rows, const std::vector<const Input*>& common,
      const std::vector<const Input*>& tokens, std::vector<Input>& s, std::vector<Input>& low,
      std::vector<Shrink>& jobs) const {
    const i64 ranks = w.ranks();
    if (w.base_v) {
      low.resize(tokens.size() * w.base_ranks());
      jobs.push_back({tokens.data(), i64(tokens.size()), w.base_v, w.base_ranks(), low.data(), w.base_ranks()});
    }
    if (!ranks) return;
    s.resize((w.shared_v ? common.size() : rows.size()) * ranks);
    if (w.shared_v) jobs.push_back({common.data(), i64(common.size()), w.v, ranks, s.data(), ranks});
    if (w.shared_v || !w.v) return;
    for (i64 e : active_) {
      if (!has_delta(w, e)) continue;
      const Element* v = w.v + v_place(w, e) * packed_size<P>(ranks, in);
      jobs.push_back({rows.data() + starts_[e], starts_[e + 1] - starts_[e], v, ranks, s.data() + starts_[e] * ranks, ranks});
    }
  }

  void shrink(const std::vector<Shrink>& jobs, i64 in) const {
    struct Task {
      const Shrink* job;
      i64 block;
    };
    std::vector<Task> tasks;
    for (const Shrink& job : jobs)
      for (i64 b = 0; b < ceil_div(job.out, LANES); b += SLICE_BLOCKS) tasks.push_back({&job, b});
    parallel_(i64(tasks.size()), [&](i64 number) {
      const Shrink& job = *tasks[number].job;
      const i64 stride = LANES * packed_inputs<P>(in), last = std::min(ceil_div(job.out, LANES), tasks[number].block + SLICE_BLOCKS);
      thread_local std::vector<float> tile;
      tile.resize(job.n * SLICE);
      const i64 b = tasks[number].block, width = std::min(job.out, last * LANES) - b * LANES;
      multiply_factor<P>(job.rows, job.n, job.v + b * stride, stride, in, last - b, tile.data(), SLICE);
      for (i64 r = 0; r < job.n; ++r)
        for (i64 i = 0; i < width; ++i) job.to[r * job.ld + b * LANES + i] = P::input(tile[r * SLICE + i]);
    });
  }

  // Column deltas: s is the input itself.
  void pick(const Weights<P>& w, const std::vector<const Input*>& rows, std::vector<Input>& s) const {
    if (!w.columns || !w.ranks()) return;
    s.resize(rows.size() * w.ranks());
    for (i64 e : active_) {
      if (!has_delta(w, e)) continue;
      const i32* columns = w.columns + v_place(w, e) * w.ranks();
      for (i64 p = starts_[e]; p < starts_[e + 1]; ++p)
        for (i64 j = 0; j < w.ranks(); ++j) s[p * w.ranks() + j] = rows[p][columns[j]];
    }
  }

  static i64 blocks_from(i64 first, i64 out) { return std::min(SLICE_BLOCKS, ceil_div(out - first, LANES)); }

  // out [tokens, SLICE]: what the base adds to outputs first .. first + SLICE of its part j (gate, up; or down).
  void base_slice(const Weights<P>& w, const Gathered<P>& g, const std::vector<Input>& low, int j, i64 first, i64 out, float* z) const {
    const i64 tokens = batch_.tokens;
    std::fill_n(z, tokens * SLICE, 0.0f);
    thread_local std::vector<const Input*> rows;
    rows.resize(tokens);
    if (w.base[j]) {
      for (i64 t = 0; t < tokens; ++t) rows[t] = g.values.data() + t * g.n;
      const i32* selected = g.selected.empty() ? nullptr : g.selected.data();
      for (i64 o = 0; o < SLICE && first + o < out; o += fold<P>()) {
        const Element* block = w.base[j] + (first + o) * w.kept;
        if (g.per_token) {
          for (i64 t = 0; t < tokens; ++t) add_base<P>(&rows[t], 1, block, selected + t * g.n, g.n, z + t * SLICE + o, SLICE);
        } else {
          add_base<P>(rows.data(), tokens, block, selected, g.n, z + o, SLICE);
        }
      }
    } else if (w.base_rank[j]) {
      const i64 before = j ? w.base_rank[0] : 0, stride = LANES * packed_inputs<P>(w.base_rank[j]);
      for (i64 t = 0; t < tokens; ++t) rows[t] = low.data() + t * w.base_ranks() + before;
      multiply_factor<P>(rows.data(), tokens, w.base_u[j] + first / LANES * stride, stride, w.base_rank[j], blocks_from(first, out), z, SLICE);
    }
  }

  // out [rows of e, SLICE]: U s of part j; false where the expert has none.
  bool delta_slice(const Weights<P>& w, const std::vector<Input>& s, bool by_token, i64 e, int j, i64 first, i64 out, float* d) const {
    if (!w.rank[j] || !has_delta(w, e)) return false;
    const i64 n = starts_[e + 1] - starts_[e], before = j ? w.rank[0] : 0, stride = LANES * packed_inputs<P>(w.rank[j]);
    thread_local std::vector<const Input*> rows;
    rows.resize(n);
    for (i64 r = 0; r < n; ++r) {
      const i64 p = starts_[e] + r;
      rows[r] = s.data() + (by_token ? pairs_[p].token : p) * w.ranks() + before;
    }
    const Element* u = w.u[j] + u_place(w, e) * packed_size<P>(out, w.rank[j]);
    multiply_factor<P>(rows.data(), n, u + first / LANES * stride, stride, w.rank[j], blocks_from(first, out), d, SLICE);
    return true;
  }

  void gate_up(i64 first) {
    const i64 tokens = batch_.tokens, out = layer_.intermediate, width = std::min(SLICE, out - first);
    const Weights<P>& w = layer_.w13;
    thread_local std::vector<float> z[2], d[2];
    for (int j = 0; j < 2; ++j) {
      z[j].resize(tokens * SLICE);
      base_slice(w, base13_, low13_, j, first, out, z[j].data());
    }
    if (!mix_.empty()) for (i64 t = 0; t < tokens; ++t) std::fill_n(&mix_[t * out + first], width, 0.0f);
    for (i64 e : active_) {
      const i64 n = starts_[e + 1] - starts_[e];
      bool found[2];
      for (int j = 0; j < 2; ++j) {
        d[j].resize(n * SLICE);
        found[j] = delta_slice(w, s13_, w.shared_v, e, j, first, out, d[j].data());
      }
      for (i64 r = 0; r < n; ++r) {
        const Pair& pair = pairs_[starts_[e] + r];
        float h[SLICE];
        for (i64 i = 0; i < SLICE; i += LANES) {
          Floats part[2];
          for (int j = 0; j < 2; ++j) {
            part[j] = load(&z[j][pair.token * SLICE + i]);
            if (found[j]) part[j] += load(&d[j][r * SLICE + i]);
          }
          store(h + i, activate(layer_.activation, part[0]) * part[1]);
        }
        Input* to = &hidden_[(starts_[e] + r) * out + first];
        for (i64 i = 0; i < width; ++i) to[i] = P::input(h[i]);
        if (!mix_.empty()) {
          float* sum = &mix_[pair.token * out + first];
          for (i64 i = 0; i < width; ++i) sum[i] += pair.gate * h[i];
        }
      }
    }
  }

  void down(i64 first) {
    const i64 tokens = batch_.tokens, out = layer_.hidden, width = std::min(SLICE, out - first);
    const Weights<P>& w = layer_.w2;
    thread_local std::vector<float> y, d;
    y.resize(tokens * SLICE);
    base_slice(w, base2_, low2_, 0, first, out, y.data());
    for (i64 e : active_) {
      const i64 n = starts_[e + 1] - starts_[e];
      d.resize(n * SLICE);
      if (!delta_slice(w, s2_, false, e, 0, first, out, d.data())) continue;
      for (i64 r = 0; r < n; ++r) {
        const Pair& pair = pairs_[starts_[e] + r];
        for (i64 i = 0; i < SLICE; i += LANES) {
          float* sum = &y[pair.token * SLICE + i];
          store(sum, load(sum) + pair.gate * load(&d[r * SLICE + i]));
        }
      }
    }
    for (i64 t = 0; t < tokens; ++t)
      for (i64 i = 0; i < width; ++i) batch_.y[t * out + first + i] = P::element(y[t * SLICE + i]);
  }

  const Layer<P>& layer_;
  const Batch<P>& batch_;
  const Parallel& parallel_;
  std::vector<i64>&starts_, &active_;
  std::vector<Pair>& pairs_;
  std::vector<Input>&hidden_, &s13_, &s2_, &low13_, &low2_;
  std::vector<float>& mix_;
  Gathered<P>&base13_, &base2_;
  Buffers<P>& buffers_;
};

}  // namespace d2moe
