// Dynamic column selection (METHODS 1.5), and what a base is multiplied with.
#pragma once

#include "layer.h"

namespace d2moe {

// The `want` best of `size` scores from `first` on, ascending: scores descending, of equal ones the first.
inline void best(const float* scores, i64 first, i64 size, i64 want, i32* out) {
  thread_local std::vector<i32> order;
  order.resize(size);
  for (i64 i = 0; i < size; ++i) order[i] = i32(first + i);
  // NaN sorts as torch has it: above all numbers.
  auto better = [&](i32 a, i32 b) {
    const bool na = std::isnan(scores[a]), nb = std::isnan(scores[b]);
    if (na || nb) return na == nb ? a < b : na;
    return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
  };
  std::nth_element(order.begin(), order.begin() + want, order.end(), better);
  std::copy_n(order.begin(), want, out);
  std::sort(out, out + want);
}

// Per token the inputs of a base, and which kept columns they belong to (none: all).
template <class P>
struct Gathered {
  std::vector<typename P::Input> values;
  std::vector<i32> selected;  // [used], or [tokens, used] in scope token
  std::vector<float> scores;
  i64 n = 0;
  bool per_token = false;

  // Rows for the base's product; by columns and in scope token each token is one by itself.
  Rows<P> rows(i64 tokens, bool by_columns) {
    if (!by_columns) return factor_rows<P>(values.data(), tokens, n);
    auto rows = base_rows<P>(values.data(), tokens, n);
    if (per_token) rows.tiles = tokens;
    return rows;
  }

  // value(t, i): input i of token t.
  template <class Value>
  void gather(
      const Weights<P>& w, Scope scope, i64 tokens, const bool* padding, const Parallel& parallel, Value value) {
    n = w.by_columns ? w.used : w.kept;
    per_token = w.selects && scope == Scope::token;
    values.resize(tokens * packed_inputs<P>(n));
    selected.resize(w.selects ? (per_token ? tokens : 1) * w.used : 0);
    if (w.selects && !per_token) select_for_all(w, tokens, padding, parallel, value);
    const auto to = rows(tokens, w.by_columns);
    parallel(tokens, [&](i64 t) {
      const i32* chosen = nullptr;
      if (per_token) {
        thread_local std::vector<float> own;
        own.resize(w.kept);
        for (i64 i = 0; i < w.kept; ++i) own[i] = std::fabs(value(t, w.base_columns[i])) * w.base_norms[i];
        i32* mine = selected.data() + t * w.used;
        const i64 size = w.kept / w.groups, want = w.used / w.groups;
        for (i64 g = 0; g < w.groups; ++g) best(own.data(), g * size, size, want, mine + g * want);
        chosen = mine;
      } else if (w.selects) {
        chosen = selected.data();
      }
      thread_local std::vector<float> inputs;
      inputs.assign(n, 0.0f);
      auto input = [&](i64 kept) { return value(t, w.base_columns ? w.base_columns[kept] : kept); };
      if (w.by_columns) for (i64 i = 0; i < n; ++i) inputs[i] = input(chosen[i]);
      else if (w.selects) for (i64 i = 0; i < w.used; ++i) inputs[chosen[i]] = input(chosen[i]);
      else for (i64 i = 0; i < n; ++i) inputs[i] = input(i);
      to.row(t).put(0, n, inputs.data());
    });
  }

 private:
  template <class Value>
  void select_for_all(const Weights<P>& w, i64 tokens, const bool* padding, const Parallel& parallel, Value value) {
    scores.resize(w.kept);
    const i64 size = w.kept / w.groups, want = w.used / w.groups;
    parallel(w.groups, [&](i64 g) {
      for (i64 i = g * size; i < (g + 1) * size; ++i) {
        float sum = 0;
        for (i64 t = 0; t < tokens; ++t) {
          const float v = padding && padding[t] ? 0.0f : value(t, w.base_columns[i]);
          sum += v * v;
        }
        scores[i] = std::sqrt(sum) * w.base_norms[i];
      }
      best(scores.data(), g * size, size, want, selected.data() + g * want);
    });
  }
};

}  // namespace d2moe
