// s = V x, what U is multiplied with: of every pair, of what all experts share, of a low-rank base.
#pragma once

#include "routing.h"

namespace d2moe {

template <class P>
class Shrink {
  using Input = typename P::Input;

 public:
  // Of one half, whose weights have `in` inputs, or at most so many; its pairs' and tokens' rows are filled where they are
  // needed.
  Shrink(const Weights<P>& w, Half<P>& half, const Routing& routing, const Parallel& parallel, i64 threads, i64 tokens, i64 in)
      : w_(w), half_(half), routing_(routing), parallel_(parallel), threads_(threads), tokens_(tokens), in_(in) {}

  // common: the rows of a V that all experts share, and of_pair(p): which of them is pair p's.
  void operator()(Rows<P> common, const std::function<i64(i64)>& of_pair) const {
    std::vector<Job> jobs;
    if (w_.base_v) {
      jobs.push_back({half_.rows_of_tokens(tokens_, w_.base_v.in), w_.base_v, {}});
      make_room(half_.low, tokens_, 0, tokens_, w_.base_rank, jobs.back().to);
    }
    if (w_.shared_v && w_.ranks()) {
      jobs.push_back({common, w_.v.first, {}});
      make_room(half_.common, common.n, 0, common.n, w_.rank, jobs.back().to);
    } else if (w_.v && w_.ranks()) {
      for (i64 e : routing_.active) {
        if (!w_.has_delta(e)) continue;
        const Factor<P> v = w_.v.at(w_.v_place(e));
        jobs.push_back({routing_.rows_of<P>(half_.pairs, e, v.in, in_), v, {}});
        make_room(half_.s, routing_.all(), routing_.starts[e], routing_.count(e), w_.rank, jobs.back().to);
      }
    }
    run(jobs);
    if (!w_.shared_v || !w_.ranks()) return;
    Rows<P> rows[2];
    make_room(half_.common, common.n, 0, common.n, w_.rank, rows);
    spread([&](int j, i64 p, i64 i) { return rows[j].row(of_pair(p))[i]; });
  }

  // Column deltas: s is the input itself. value(p, i): input i of pair p.
  template <class Value>
  void pick(Value value) const {
    if (!w_.ranks()) return;
    spread([&](int j, i64 p, i64 i) {
      return value(p, w_.columns[w_.v_place(routing_.pairs[p].expert) * w_.ranks() + (j ? w_.rank[0] : 0) + i]);
    });
  }

 private:
  // Rows to be multiplied by a packed factor with `out` outputs, gate's before up's.
  struct Job {
    Rows<P> rows;
    Factor<P> v;
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

  void run(std::vector<Job>& jobs) const {
    half_.of_v.resize(std::max(half_.of_v.size(), jobs.size()));
    std::vector<ToRound<P>> rounding;
    for (size_t i = 0; i < jobs.size(); ++i) {
      if (!rounds<P>(jobs[i].v.how)) continue;
      rounding.push_back({&half_.of_v[i], jobs[i].rows, &jobs[i].v});
      jobs[i].rows.rounded = &half_.of_v[i];
    }
    round_rows(rounding, parallel_);
    // Two slices a task where that leaves enough of them: the second's weights are asked for during the first.
    i64 slices = 0;
    for (const Job& job : jobs) slices += ceil_div(job.v.out, SLICE);
    const i64 at_once = slices >= 16 * threads_ ? 2 * SLICE_BLOCKS : SLICE_BLOCKS, width = at_once * LANES;
    std::vector<std::pair<const Job*, i64>> tasks;  // and the first block
    for (const Job& job : jobs)
      for (i64 b = 0; b < ceil_div(job.v.out, LANES); b += at_once) tasks.push_back({&job, b});
    parallel_(i64(tasks.size()), [&](i64 number) {
      const auto [job, block] = tasks[number];
      const Rows<P>& rows = job->rows;
      const i64 first = block * LANES;
      const i64 blocks = std::min(at_once, ceil_div(job->v.out, LANES) - block), last = std::min(job->v.out, first + width);
      thread_local std::vector<float> tile;
      tile.resize(rows.n * width);
      multiply_factor<P>(rows, job->v.from(first), blocks, {}, tile.data(), width);
      for (i64 r = 0; r < rows.n; ++r) {
        const float* from = &tile[r * width];
        const i64 gate = job->to[0].k, middle = std::clamp(gate, first, last);
        if (first < middle) job->to[0].put(r, first, middle, from);
        if (middle < last) job->to[1].put(r, middle - gate, last - gate, from + middle - first);
      }
    });
  }

  // s of every pair by value(part, pair, i).
  template <class Value>
  void spread(Value value) const {
    for (int j = 0; j < 2; ++j) half_.s[j].resize(routing_.all() * packed_inputs<P>(w_.rank[j]));
    parallel_(i64(routing_.active.size()), [&](i64 number) {
      const i64 e = routing_.active[number];
      if (!w_.has_delta(e)) return;
      for (int j = 0; j < 2; ++j) {
        const Rows<P> rows = routing_.rows_of<P>(half_.s[j], e, w_.rank[j]);
        for (i64 r = 0; r < rows.n; ++r)
          rows.row(r).fill(0, w_.rank[j], [&](i64 i) { return value(j, routing_.starts[e] + r, i); });
      }
    });
  }

  const Weights<P>& w_;
  Half<P>& half_;
  const Routing& routing_;
  const Parallel& parallel_;
  const i64 threads_, tokens_, in_;
};

}  // namespace d2moe
