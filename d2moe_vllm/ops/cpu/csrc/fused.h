// A call's tensors and sizes as a layer of layer.h.
#pragma once

#include "call.h"
#include "run.h"

namespace d2moe {

template <class P>
Factor<P> factor(const MatricesC& from, i64 out, i64 in) {
  return {static_cast<const char*>(from.data), from.scales, {from.bits, from.group, from.bytes != 0}, out, in, from.first};
}

// What lies behind `places` factors like one.
template <class P>
Factor<P> behind(Factor<P> one, i64 places, i64 out, i64 in) {
  one.w += places * one.bytes();
  one.scales += places * one.scale_count();
  one.out = out, one.in = in;
  return one;
}

// Factors of experts that keep some channels only, by place, from one's beginning on: these are their outputs, or (wide) their
// inputs. Returns what lies behind them.
template <class P>
Factor<P> of_widths(const CallC& call, const i32* places, bool wide, Factor<P> one, std::vector<Factor<P>>& each) {
  const i64 out = one.out, in = one.in;
  for (i64 e = 0; e < call.experts; ++e) {
    if (places[e] < 0) continue;
    (wide ? one.in : one.out) = call.widths[e];
    if (wide) one.first = call.skipped[e];
    each.push_back(one);
    one = behind(one, 1, one.out, one.in);
  }
  one.out = out, one.in = in;
  return one;
}

// parts: gate and up, up alone, or down.
template <class P>
Weights<P> weights(const CallC& call, const HalfC& half, int parts, bool down, i64 out, i64 in) {
  using E = typename P::Element;
  Weights<P> w;
  // Experts' widths are inputs of down's matrices and V's, and outputs of gate's and up's matrices and U's.
  const bool ragged = call.widths;
  Factor<P> u = factor<P>(half.u, out, half.rank[0]);
  const i64 both = u.bytes() + (parts > 1 ? factor<P>(half.u, out, half.rank[1]).bytes() : 0);
  const i64 places = both ? half.u_bytes / both : 0;
  for (int j = 0; j < parts && half.u.data; ++j) {
    w.rank[j] = half.rank[j];
    u.in = half.rank[j];
    w.u[j] = u;
    if (ragged && (!down || half.whole)) u = of_widths(call, half.u_index, down, u, w.u[j].each);
    else u = behind(u, places, out, 0);
  }
  w.v.first = factor<P>(half.v, half.rank[0] + half.rank[1], in);
  if (ragged && down && half.v.data) of_widths(call, half.u_index, true, w.v.first, w.v.each);
  Factor<P> base = factor<P>(half.base, out, half.kept), base_u = factor<P>(half.base_u, out, half.base_rank[0]);
  for (int j = 0; j < parts; ++j) {
    if (half.base.data) {
      w.base[j] = base;
      if (half.by_columns) base.w += packed_base_size<P>(out, half.kept) * i64(sizeof(E));
      else base = behind(base, 1, out, half.kept);
    }
    if (half.base_u.data) {
      w.base_rank[j] = half.base_rank[j];
      base_u.in = half.base_rank[j];
      w.base_u[j] = base_u;
      base_u = behind(base_u, 1, out, 0);
    }
    const Factor<P> basis = factor<P>(half.bases, half.rank[0], in);
    if (half.bases.data) w.bases[j] = j ? behind(basis, half.mixed, half.rank[1], in) : basis;
  }
  w.columns = half.columns;
  w.shared_v = half.shared_v != 0;
  w.by_columns = half.by_columns != 0;
  w.selects = half.selects != 0;
  w.u_index = half.u_index;
  w.v_index = half.v_index;
  w.base_columns = half.base_columns;
  w.base_norms = half.base_norms;
  w.kept = half.kept;
  w.used = half.used;
  w.groups = half.groups;
  if (half.base_v.data) w.base_v = factor<P>(half.base_v, half.base_rank[0] + half.base_rank[1], in);
  w.whole = half.whole != 0;
  w.alpha = static_cast<const E*>(half.alpha);
  w.mixed = half.mixed;
  w.function = Function(half.function);
  w.bias = half.bias;
  w.bias_step = half.bias_step;
  return w;
}

template <class P>
void fused_experts(const CallC& call) {
  using E = typename P::Element;
  Layer<P> layer;
  layer.experts = call.experts;
  layer.hidden = call.hidden;
  layer.intermediate = call.intermediate;
  layer.scope = Scope(call.scope);
  layer.activation = Activation(call.activation);
  layer.swiglu = {call.swiglu[0], call.swiglu[1], call.swiglu[2]};
  layer.widths = call.widths;
  layer.channels = call.channels;
  layer.parts = int(call.parts);
  layer.w13 = weights<P>(call, call.w13, layer.parts, false, call.intermediate, call.hidden);
  layer.w2 = weights<P>(call, call.w2, 1, true, call.hidden, call.intermediate);
  const Batch<P> batch{static_cast<const E*>(call.x), call.gates, call.ids, call.padding,
                       call.tokens, call.top_k, static_cast<E*>(call.y)};
  const Parallel parallel = in_threads;
  thread_local Buffers<P> buffers;
  Run<P>(layer, batch, parallel, threads(), buffers)();
}

}  // namespace d2moe
