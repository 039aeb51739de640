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

// One half's tensors and sizes; null and 0 where there is none. parts: gate and up, or down alone.
struct HalfC {
  const void *u, *v, *base, *base_u, *base_v, *bases, *alpha;
  const i32 *columns, *u_index, *v_index, *base_columns;
  const float* base_norms;
  i64 u_size, kept, used, groups, shared_v, by_columns, whole, mixed, function;  // u_size: elements of u
  i64 rank[2], base_rank[2];
};

struct CallC {
  HalfC w13, w2;
  const void* x;
  const float* gates;
  const i32* ids;
  const bool* padding;
  void* y;
  i64 tokens, top_k, experts, hidden, intermediate, dtype, scope, activation;
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
Weights<P> weights(const HalfC& half, int parts, i64 out, i64 in) {
  using E = typename P::Element;
  Weights<P> w;
  const i64 first = packed_size<P>(out, half.rank[0]), both = first + (parts > 1 ? packed_size<P>(out, half.rank[1]) : 0);
  for (int j = 0; j < parts; ++j) {
    if (half.u) {
      w.rank[j] = half.rank[j];
      w.u[j] = static_cast<const E*>(half.u) + (j ? half.u_size / both * first : 0);
    }
    const i64 base_size = half.by_columns ? packed_base_size<P>(out, half.kept) : packed_size<P>(out, half.kept);
    if (half.base) w.base[j] = static_cast<const E*>(half.base) + j * base_size;
    if (half.base_u) {
      w.base_rank[j] = half.base_rank[j];
      w.base_u[j] = static_cast<const E*>(half.base_u) + (j ? packed_size<P>(out, half.base_rank[0]) : 0);
    }
    const i64 of_first = half.mixed * packed_size<P>(half.rank[0], in);
    if (half.bases) w.bases[j] = static_cast<const E*>(half.bases) + (j ? of_first : 0);
  }
  w.v = static_cast<const E*>(half.v);
  w.columns = half.columns;
  w.shared_v = half.shared_v != 0;
  w.by_columns = half.by_columns != 0;
  w.u_index = half.u_index;
  w.v_index = half.v_index;
  w.base_columns = half.base_columns;
  w.base_norms = half.base_norms;
  w.kept = half.kept;
  w.used = half.used;
  w.groups = half.groups;
  w.base_v = static_cast<const E*>(half.base_v);
  w.whole = half.whole != 0;
  w.alpha = static_cast<const E*>(half.alpha);
  w.mixed = half.mixed;
  w.function = Function(half.function);
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
    layer.w13 = weights<P>(call->w13, 2, call->intermediate, call->hidden);
    layer.w2 = weights<P>(call->w2, 1, call->hidden, call->intermediate);
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
