// One MoE layer of a d2moe checkpoint over packed weights, without torch: what it consists of.
#pragma once

#include <functional>
#include <vector>

#include "kernels.h"

namespace d2moe {

enum class Function { silu, tanh };

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
  const Element* base[2] = {};  // packed bases [kept, out]: by columns, or as factors where all are always used
  bool by_columns = false;
  const i32* base_columns = nullptr;
  const float* base_norms = nullptr;
  i64 kept = 0, used = 0, groups = 1;
  const Element* base_u[2] = {};
  const Element* base_v = nullptr;
  i64 base_rank[2] = {};
  bool whole = false;           // u is the expert's matrix itself, rank its inputs
  const Element* bases[2] = {}; // instead of v: [rank[j], in] times `mixed` together, packed as in mixed.h
  const Element* alpha = nullptr; // [experts, 2 * mixed]
  i64 mixed = 0;
  Function function = Function::silu;

  i64 ranks() const { return rank[0] + rank[1]; }
  i64 base_ranks() const { return base_rank[0] + base_rank[1]; }
  bool based() const { return base[0] || base_u[0] || base_u[1]; }
  i64 u_place(i64 e) const { return u_index ? u_index[e] : e; }
  i64 v_place(i64 e) const { return v_index ? v_index[e] : e; }
  bool has_delta(i64 e) const { return ranks() && u_place(e) >= 0; }
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
  for (int i = 0; i < LANES; ++i) x[i] = activate(kind, x[i]);
  return x;
}

}  // namespace d2moe
