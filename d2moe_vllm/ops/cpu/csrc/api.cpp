// The C interface of layer.h, called from Python: pointers and sizes in, no torch. d2moe_vllm/ops/cpu/library.py has
// the same structures.
//
// Work runs on OpenMP threads. The library is linked to no OpenMP runtime: it uses the one torch has loaded, and so
// torch's own pool of threads.
#include <omp.h>
#include <sys/mman.h>  // Linux, as vLLM for CPUs

#include "pack.h"

namespace {

using namespace d2moe;

// A tensor that holds packed factors; scales: of codes. first: see Factor. bytes: for rows of 8 bits.
struct MatricesC {
  const void* data;
  const std::uint16_t* scales;
  i64 bits, group, first, bytes;
};

// One half's tensors and sizes; null and 0 where there is none.
struct HalfC {
  MatricesC u, v, base, base_u, base_v, bases;
  const void* alpha;
  const i32 *columns, *u_index, *v_index, *base_columns;
  const float *base_norms, *bias;
  i64 u_bytes, kept, used, groups, shared_v, by_columns, selects, whole, mixed, function, bias_step;  // u_bytes: of all of u
  i64 rank[2], base_rank[2];
};

struct CallC {
  HalfC w13, w2;
  const void* x;
  const float* gates;
  const i32* ids;
  const bool* padding;
  void* y;
  const i32 *widths, *skipped;  // [experts] or null: channels of each that are here, and that are elsewhere before them
  const std::uint8_t* channels;
  i64 tokens, top_k, experts, hidden, intermediate, dtype, scope, activation, parts;  // parts: of w13
  float swiglu[3];
};

enum Dtype : i64 { FLOAT32, FLOAT16, BFLOAT16 };

template <class F>
void by_dtype(i64 dtype, F&& f) {
  if (dtype == FLOAT32) f(Float32{});
  else if (dtype == FLOAT16) f(Float16{});
  else f(BFloat16{});
}

// Tasks are handed out one by one: which thread does which changes no result (kernels.h).
void in_threads(i64 n, const std::function<void(i64)>& f) {
  std::atomic<i64> next{0};
#pragma omp parallel num_threads(int(std::min<i64>(n, omp_get_max_threads()))) if (n > 1)
  for (i64 i = next++; i < n; i = next++) f(i);
}

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

}  // namespace

extern "C" {

void d2moe_fused_experts(const CallC* call) {
  by_dtype(call->dtype, [&](auto p) {
    using P = decltype(p);
    using E = typename P::Element;
    Layer<P> layer;
    layer.experts = call->experts;
    layer.hidden = call->hidden;
    layer.intermediate = call->intermediate;
    layer.scope = Scope(call->scope);
    layer.activation = Activation(call->activation);
    layer.swiglu = {call->swiglu[0], call->swiglu[1], call->swiglu[2]};
    layer.widths = call->widths;
    layer.channels = call->channels;
    layer.parts = int(call->parts);
    layer.w13 = weights<P>(*call, call->w13, layer.parts, false, call->intermediate, call->hidden);
    layer.w2 = weights<P>(*call, call->w2, 1, true, call->hidden, call->intermediate);
    const Batch<P> batch{static_cast<const E*>(call->x), call->gates, call->ids, call->padding,
                         call->tokens, call->top_k, static_cast<E*>(call->y)};
    const Parallel parallel = in_threads;
    thread_local Buffers<P> buffers;
    Run<P>(layer, batch, parallel, omp_get_max_threads(), buffers)();
  });
}

i64 d2moe_packed_size(i64 dtype, i64 out, i64 k) {
  i64 size = 0;
  by_dtype(dtype, [&](auto p) { size = packed_size<decltype(p)>(out, k); });
  return size;
}

// Of a factor in codes: bytes, and scales.
i64 d2moe_codes_size(i64 bits, i64 group, i64 first, i64 out, i64 in) {
  return Factor<BFloat16>{nullptr, nullptr, {bits, group}, out, in, first}.bytes();
}

i64 d2moe_scales_size(i64 bits, i64 group, i64 first, i64 out, i64 in) {
  return Factor<BFloat16>{nullptr, nullptr, {bits, group}, out, in, first}.scale_count();
}

// codes: [places, out, ...], with these strides in bytes, scales: likewise in scales. to: places * d2moe_codes_size bytes.
void d2moe_pack_codes(
    i64 bits, i64 group, i64 first, i64 bytes, const std::uint8_t* codes, const i64* strides, const std::uint16_t* scales,
    const i64* scale_strides, i64 places, i64 out, i64 in, char* to, std::uint16_t* to_scales) {
  const Factor<BFloat16> f{nullptr, nullptr, {bits, group, bytes != 0}, out, in, first};
  const i64 blocks = ceil_div(out, LANES);
  in_threads(places * blocks, [&](i64 task) {
    const i64 d = task / blocks;
    pack_codes(f, codes + d * strides[0], strides[1], scales + d * scale_strides[0], scale_strides[1], task % blocks,
               to + d * f.bytes(), to_scales + d * f.scale_count());
  });
}

i64 d2moe_packed_base_size(i64 dtype, i64 out, i64 kept) {
  i64 size = 0;
  by_dtype(dtype, [&](auto p) { size = packed_base_size<decltype(p)>(out, kept); });
  return size;
}

// w: [places, out, k] with these strides, in elements. to: places * packed_size elements.
void d2moe_pack_factors(i64 dtype, const void* w, const i64* strides, i64 places, i64 out, i64 k, void* to) {
  by_dtype(dtype, [&](auto p) {
    using P = decltype(p);
    using E = typename P::Element;
    in_threads(places, [&](i64 d) {
      pack_factor<P>(static_cast<const E*>(w) + d * strides[0], strides[1], strides[2], out, k,
                     static_cast<E*>(to) + d * packed_size<P>(out, k));
    });
  });
}

// w: m bases [m, out, k] with these strides, in elements, of which some experts mix their V's. to: m * packed_size elements.
void d2moe_pack_mixed(i64 dtype, const void* w, const i64* strides, i64 m, i64 out, i64 k, void* to) {
  by_dtype(dtype, [&](auto p) {
    using P = decltype(p);
    using E = typename P::Element;
    in_threads(ceil_div(out, LANES), [&](i64 block) {
      pack_mixed<P>(static_cast<const E*>(w), strides, m, out, k, block, static_cast<E*>(to));
    });
  });
}

// w: [kept, parts * out], rows `row` elements apart. to: parts * packed_base_size elements.
void d2moe_pack_bases(i64 dtype, const void* w, i64 row, i64 parts, i64 out, i64 kept, void* to) {
  by_dtype(dtype, [&](auto p) {
    using P = decltype(p);
    using E = typename P::Element;
    in_threads(parts, [&](i64 j) {
      pack_base<P>(static_cast<const E*>(w) + j * out, row, out, kept, static_cast<E*>(to) + j * packed_base_size<P>(out, kept));
    });
  });
}

// Asks for pages of 2 MiB under what is packed: reading it then misses the TLB less, and hardware prefetching, which ends
// at a page's end, runs on. A system that has none leaves it as it is.
void d2moe_huge_pages(void* data, i64 bytes) {
#ifdef MADV_HUGEPAGE
  const std::uintptr_t page = 2 << 20, first = (reinterpret_cast<std::uintptr_t>(data) + page - 1) / page * page;
  const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(data) + bytes) / page * page;
  if (first >= end) return;
  madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25  // Linux 6.1: those pages too that are there already
#endif
  madvise(reinterpret_cast<void*>(first), end - first, MADV_COLLAPSE);
#endif
}

}  // extern "C"
