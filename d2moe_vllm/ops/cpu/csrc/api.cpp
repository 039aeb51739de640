// The C interface of layer.h, called from Python: pointers and sizes in, no torch. d2moe_vllm/ops/cpu/library.py has
// the same structures.
//
// Work runs on OpenMP threads. The library is linked to no OpenMP runtime: it uses the one torch has loaded, and so
// torch's own pool of threads.
#include <omp.h>
#include <sys/mman.h>  // Linux, as vLLM for CPUs

#include "call.h"
#include "pack.h"

namespace {

using namespace d2moe;

enum Dtype : i64 { FLOAT32, FLOAT16, BFLOAT16 };

template <class F>
void by_dtype(i64 dtype, F&& f) {
  if (dtype == FLOAT32) f(Float32{});
  else if (dtype == FLOAT16) f(Float16{});
  else f(BFloat16{});
}

}  // namespace

// Tasks are handed out one by one: which thread does which changes no result (kernels.h).
void d2moe::in_threads(i64 n, const std::function<void(i64)>& f) {
  std::atomic<i64> next{0};
#pragma omp parallel num_threads(int(std::min<i64>(n, omp_get_max_threads()))) if (n > 1)
  for (i64 i = next++; i < n; i = next++) f(i);
}
i64 d2moe::threads() { return omp_get_max_threads(); }

extern "C" {

void d2moe_fused_experts(const CallC* call) {
  by_dtype(call->dtype, [&](auto p) { fused_experts<decltype(p)>(*call); });
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
