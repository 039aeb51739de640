// The structures of the C interface (api.cpp), and what runs a call for one dtype: each dtype's kernels are compiled by
// themselves, side by side.
#pragma once

#include <functional>

#include "vectors.h"

namespace d2moe {

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

// f(0) .. f(n - 1) on OpenMP's threads.
void in_threads(i64 n, const std::function<void(i64)>& f);
// How many there are.
i64 threads();

// Instantiated by fused_*.cpp.
template <class P>
void fused_experts(const CallC& call);

}  // namespace d2moe
