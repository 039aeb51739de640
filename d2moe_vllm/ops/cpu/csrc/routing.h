// Which tokens each expert has, and the rows of a half that belong to them.
#pragma once

#include "columns.h"

namespace d2moe {

struct Pair {
  i64 token, expert;
  float gate;
};

// (token, expert) pairs, expert by expert.
struct Routing {
  std::vector<i64> starts, next, active;  // first pair of each expert; experts that have any
  std::vector<Pair> pairs;

  i64 all() const { return i64(pairs.size()); }
  i64 count(i64 e) const { return starts[e + 1] - starts[e]; }

  // An expert's rows in a buffer that has room for k inputs of all pairs, or for `room` of them.
  template <class P>
  Rows<P> rows_of(std::vector<typename P::Input>& of, i64 e, i64 k, i64 room = 0) const {
    return factor_rows<P>(of.data() + starts[e] * packed_inputs<P>(room ? room : k), count(e), k);
  }

  // Experts without channels add no more than a bias, and without one have no pairs.
  template <class P>
  void sort(const Batch<P>& batch, const Layer<P>& layer) {
    const i64 experts = layer.experts;
    starts.assign(experts + 1, 0);
    const i64 routed = batch.tokens * batch.top_k;
    auto gives = [&](i64 e) { return layer.w2.bias || layer.width(e); };
    auto here = [&](i64 i) { return batch.ids[i] >= 0 && batch.ids[i] < experts && gives(batch.ids[i]); };
    for (i64 i = 0; i < routed; ++i) if (here(i)) ++starts[batch.ids[i] + 1];
    for (i64 e = 0; e < experts; ++e) starts[e + 1] += starts[e];
    active.clear();
    for (i64 e = 0; e < experts; ++e) if (count(e)) active.push_back(e);
    pairs.resize(starts.back());
    next.assign(starts.begin(), starts.end() - 1);
    for (i64 i = 0; i < routed; ++i)
      if (here(i)) pairs[next[batch.ids[i]]++] = {i / batch.top_k, batch.ids[i], batch.gates[i]};
  }
};

// One half's intermediate rows. Of two: gate's and up's, or down's alone.
template <class P>
struct Half {
  using Input = typename P::Input;
  std::vector<Input> pairs, tokens;            // inputs, expert by expert and token by token
  std::vector<Input> s[2], common[2], low[2];  // V x by expert; of a V that is shared; of a base's V
  std::vector<Input> alphas[2];                // of the experts in use
  Gathered<P> base;
  // The same as whole numbers: for V's, job by job; for U's, expert by expert; for a base, or for its U's.
  std::vector<Rounded> of_v, of_u[2];
  Rounded of_base[2];

  Rows<P> rows_of_tokens(i64 n, i64 in) { return factor_rows<P>(tokens.data(), n, in); }
};

}  // namespace d2moe
