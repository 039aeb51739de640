// One MoE layer of a d2moe checkpoint over packed weights, without torch: what it consists of.
#pragma once

#include <functional>
#include <vector>

#include "few_bits.h"

namespace d2moe {

enum class Function { silu, tanh };

// Gate and up together, up alone, in gate's place, where experts have no gate, or down; none where a layer has none.
// Packed as in storage.h, or as each says.
template <class P>
struct Weights {
  using Element = typename P::Element;
  // Gate and up, or down alone: by place [out, rank[j]]. Of whole matrices both have the same groups of inputs, as a base has.
  Factors<P> u[2];
  i64 rank[2] = {};
  Factors<P> v;                 // by place, or one for all, [rank[0] + rank[1], in]
  const i32* columns = nullptr; // [places, rank], instead of v
  bool shared_v = false;
  const i32* u_index = nullptr; // [experts]
  const i32* v_index = nullptr;
  Factor<P> base[2];            // [out, kept]: a factor where all are always used, or by columns as in kernels.h
  bool by_columns = false;
  bool selects = false;         // leaves out columns; those of a factor are multiplied with zeros
  const i32* base_columns = nullptr;  // null: all inputs
  const float* base_norms = nullptr;
  i64 kept = 0, used = 0, groups = 1;
  Factor<P> base_u[2], base_v;
  i64 base_rank[2] = {};
  bool whole = false;           // u is the expert's matrix itself, rank its inputs, at most
  Factors<P> bases[2];          // instead of v: `mixed` of [rank[j], in], as elements packed together as in mixed.h
  const Element* alpha = nullptr; // [experts, 2 * mixed]
  i64 mixed = 0;
  Function function = Function::silu;
  const float* bias = nullptr;  // [experts, bias_step]: of gate's outputs and then, half a step on, of up's; or of down's
  i64 bias_step = 0;

  const float* bias_of(i64 e, int j) const { return bias + e * bias_step + j * (bias_step / 2); }
  i64 ranks() const { return rank[0] + rank[1]; }
  i64 base_ranks() const { return base_rank[0] + base_rank[1]; }
  bool based() const { return base[0].w || base_u[0].w || base_u[1].w; }
  i64 u_place(i64 e) const { return u_index ? u_index[e] : e; }
  i64 v_place(i64 e) const { return v_index ? v_index[e] : e; }
  bool has_delta(i64 e) const { return ranks() && u_place(e) >= 0; }
};

enum class Scope { off, token, batch };
enum class Activation { silu, gelu, gelu_tanh, relu2 };
// With g = min(gate, limit) and u = up within -limit .. limit: g * sigmoid(alpha * g) * (u + beta). Limit 0: not this.
struct Swiglu { float limit, alpha, beta; };

template <class P>
struct Layer {
  Weights<P> w13, w2;
  i64 experts = 0, hidden = 0;
  int parts = 2;                  // of w13: 1 where experts have no gate, and h is activation(up)
  i64 intermediate = 0;           // channels of the base, and of every expert, but where those keep some only
  const i32* widths = nullptr;    // [experts], then: how many
  const std::uint8_t* channels = nullptr;  // [experts, intermediate / 8], beside a base: which of its, lowest bits first
  Scope scope = Scope::off;
  Activation activation = Activation::silu;
  Swiglu swiglu = {};  // in place of activation(gate) * up

  i64 width(i64 e) const { return widths ? widths[e] : intermediate; }
  i64 widest() const {
    i64 most = widths ? 0 : intermediate;
    for (i64 e = 0; widths && e < experts; ++e) most = std::max<i64>(most, widths[e]);
    return most;
  }
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

template <class P>
constexpr i64 packed_size(i64 out, i64 k) { return ceil_div(out, LANES) * LANES * packed_inputs<P>(k); }
template <class P>
constexpr i64 packed_base_size(i64 out, i64 kept) { return ceil_div(out, fold(out)) * fold(out) * kept; }

inline float activate(Activation kind, float x) {
  if (kind == Activation::gelu) return 0.5f * x * (1.0f + std::erf(x * 0.70710678118654752f));
  return 0.5f * x * (1.0f + std::tanh(0.79788456080286536f * (x + 0.044715f * x * x * x)));
}

inline Floats activate(Activation kind, Floats x) {
  if (kind == Activation::silu) return silu(x);
  if (kind == Activation::relu2) {
    x = each([](float v) { return v < 0.0f ? 0.0f : v; }, x);  // what is no number stays none
    return x * x;
  }
  return each([kind](float v) { return activate(kind, v); }, x);
}

inline Floats clamped(const Swiglu& s, Floats gate, Floats up) {
  // What is no number stays none.
  gate = each([&](float v) { return v > s.limit ? s.limit : v; }, gate);
  up = each([&](float v) { return v > s.limit ? s.limit : v < -s.limit ? -s.limit : v; }, up);
  return gate / (1.0f + exp(-s.alpha * gate)) * (up + s.beta);
}

}  // namespace d2moe
