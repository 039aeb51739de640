// The thin layer between torch and layer.h: shapes are checked here, and work is given to torch's own threads.
#include <ATen/Parallel.h>
#include <torch/extension.h>

#include "layer.h"
#include "pack.h"

namespace {

using torch::Tensor;
using Optional = std::optional<Tensor>;
using namespace d2moe;

template <class F>
auto by_dtype(torch::ScalarType dtype, F&& f) {
  switch (dtype) {
    case torch::kBFloat16: return f(BFloat16{});
    case torch::kHalf: return f(Float16{});
    case torch::kFloat: return f(Float32{});
    default: TORCH_CHECK(false, "d2moe: weights are ", dtype, ", not bfloat16, float16 or float32");
  }
}

// Tasks are handed out one by one: which thread does which changes no result (kernels.h).
void in_torch_threads(i64 n, const std::function<void(i64)>& f) {
  std::atomic<i64> next{0};
  const i64 threads = std::min<i64>(n, at::get_num_threads());
  at::parallel_for(0, threads, 1, [&](i64 begin, i64 end) {
    for (i64 thread = begin; thread < end; ++thread)
      for (i64 i = next++; i < n; i = next++) f(i);
  });
}

template <class T>
T* data(const Optional& tensor) {
  return tensor ? reinterpret_cast<T*>(tensor->data_ptr()) : nullptr;
}

// One half's tensors, in the order of d2moe_vllm.ops.reference.Weights.
struct Half {
  std::vector<Optional> tensors;
  const Optional& delta_u() const { return tensors[0]; }
  const Optional& delta_v() const { return tensors[1]; }
  const Optional& delta_columns() const { return tensors[2]; }
  const Optional& shared_v() const { return tensors[3]; }
  const Optional& u_index() const { return tensors[4]; }
  const Optional& v_index() const { return tensors[5]; }
  const Optional& base() const { return tensors[6]; }
  const Optional& base_columns() const { return tensors[7]; }
  const Optional& base_norms() const { return tensors[8]; }
  const Optional& base_u() const { return tensors[9]; }
  const Optional& base_v() const { return tensors[10]; }
};

// parts: gate and up, or down alone; rank, base_rank: of each.
template <class P>
Weights<P> weights(
    const Half& half, int parts, i64 out, std::array<i64, 2> rank, std::array<i64, 2> base_rank, i64 groups, i64 used) {
  using E = typename P::Element;
  Weights<P> w;
  const bool stored = half.delta_u() && half.delta_u()->size(0) > 0;
  if (stored) {
    const i64 places = half.delta_u()->size(0);
    for (int j = 0; j < parts; ++j) {
      w.rank[j] = rank[j];
      w.u[j] = data<E>(half.delta_u()) + (j ? places * packed_size<P>(out, rank[0]) : 0);
    }
    w.shared_v = half.shared_v().has_value();
    w.v = w.shared_v ? data<E>(half.shared_v()) : data<E>(half.delta_v());
    w.columns = data<i32>(half.delta_columns());
    w.u_index = data<i32>(half.u_index());
    w.v_index = data<i32>(half.v_index());
  }
  if (half.base()) {
    w.kept = half.base_columns()->numel();
    for (int j = 0; j < parts; ++j) w.base[j] = data<E>(half.base()) + j * packed_base_size<P>(out, w.kept);
    w.base_columns = data<i32>(half.base_columns());
    w.base_norms = data<float>(half.base_norms());
    w.groups = groups;
    w.used = used;
  }
  if (half.base_u()) {
    for (int j = 0; j < parts; ++j) {
      w.base_rank[j] = base_rank[j];
      w.base_u[j] = data<E>(half.base_u()) + (j ? packed_size<P>(out, base_rank[0]) : 0);
    }
    w.base_v = data<E>(half.base_v());
  }
  return w;
}

Scope scope_of(const std::string& name) {
  if (name == "off") return Scope::off;
  if (name == "token") return Scope::token;
  TORCH_CHECK(name == "batch", "scope is '", name, "', not batch, token or off");
  return Scope::batch;
}

Activation activation_of(const std::string& name) {
  if (name == "silu") return Activation::silu;
  if (name == "gelu") return Activation::gelu;
  TORCH_CHECK(name == "gelu_tanh", "d2moe does not support the activation '", name, "'");
  return Activation::gelu_tanh;
}

Tensor fused_experts(
    const Tensor& x, const Tensor& gates, const Tensor& ids, std::vector<Optional> w13, std::vector<Optional> w2,
    const Optional& padding, i64 experts, i64 intermediate, std::array<i64, 3> rank, std::array<i64, 3> base_rank,
    const std::string& activation, const std::string& scope, std::array<i64, 2> groups, std::array<i64, 2> used) {
  const Tensor rows = x.contiguous(), g = gates.to(torch::kFloat).contiguous(), i = ids.to(torch::kInt).contiguous();
  Tensor y = torch::empty_like(rows);
  if (!rows.size(0)) return y;
  const Optional mask = padding ? Optional(padding->contiguous()) : padding;
  by_dtype(rows.scalar_type(), [&](auto p) {
    using P = decltype(p);
    Layer<P> layer;
    layer.experts = experts;
    layer.hidden = rows.size(1);
    layer.intermediate = intermediate;
    layer.scope = scope_of(scope);
    layer.activation = activation_of(activation);
    layer.w13 = weights<P>({w13}, 2, intermediate, {rank[0], rank[1]}, {base_rank[0], base_rank[1]}, groups[0], used[0]);
    layer.w2 = weights<P>({w2}, 1, layer.hidden, {rank[2], 0}, {base_rank[2], 0}, groups[1], used[1]);
    Batch<P> batch;
    batch.x = reinterpret_cast<const typename P::Element*>(rows.data_ptr());
    batch.gates = g.data_ptr<float>();
    batch.ids = i.data_ptr<i32>();
    batch.padding = mask ? mask->data_ptr<bool>() : nullptr;
    batch.tokens = rows.size(0);
    batch.top_k = i.size(1);
    batch.y = reinterpret_cast<typename P::Element*>(y.data_ptr());
    const Parallel parallel = in_torch_threads;
    Run<P> run(layer, batch, parallel);
    run();
  });
  return y;
}

// w [places, out, k] -> flat, per place a packed factor.
Tensor pack_factors(const Tensor& w) {
  return by_dtype(w.scalar_type(), [&](auto p) {
    using P = decltype(p);
    using E = typename P::Element;
    const i64 size = packed_size<P>(w.size(1), w.size(2));
    Tensor packed = torch::empty({w.size(0) * size}, w.options());
    in_torch_threads(w.size(0), [&](i64 d) {
      const E* from = reinterpret_cast<const E*>(w.data_ptr()) + d * w.stride(0);
      pack_factor<P>(from, w.stride(1), w.stride(2), w.size(1), w.size(2), reinterpret_cast<E*>(packed.data_ptr()) + d * size);
    });
    return packed;
  });
}

// w [kept, parts * out] -> flat, per part a packed base.
Tensor pack_bases(const Tensor& w, i64 parts) {
  return by_dtype(w.scalar_type(), [&](auto p) {
    using P = decltype(p);
    using E = typename P::Element;
    TORCH_CHECK(w.stride(1) == 1);
    const i64 out = w.size(1) / parts, size = packed_base_size<P>(out, w.size(0));
    Tensor packed = torch::empty({parts * size}, w.options());
    for (i64 j = 0; j < parts; ++j) {
      pack_base<P>(reinterpret_cast<const E*>(w.data_ptr()) + j * out, w.stride(0), out, w.size(0), reinterpret_cast<E*>(packed.data_ptr()) + j * size);
    }
    return packed;
  });
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("fused_experts", &fused_experts);
  m.def("pack_factors", &pack_factors);
  m.def("pack_bases", &pack_bases);
}
