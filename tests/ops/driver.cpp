// The core of the CPU backend by itself: random layers of every kind on plain threads, for the sanitizers.
// Prints a checksum per case; the same layer on 1, 2 and 5 threads must give the same bits, or it ends with 1.
#include <cstdio>
#include <memory>
#include <random>
#include <thread>

#include "pack.h"

using namespace d2moe;

namespace {

std::mt19937 random_bits(7);

i64 below(i64 n) { return i64(random_bits() % std::uint64_t(n)); }

template <class P>
struct Owned {
  std::vector<std::unique_ptr<typename P::Element[]>> memory;

  // Exactly as much as needed, so that any step too far is seen.
  typename P::Element* values(i64 n, float scale) {
    memory.emplace_back(new typename P::Element[n]);
    std::normal_distribution<float> normal(0, scale);
    for (i64 i = 0; i < n; ++i) memory.back()[i] = P::element(normal(random_bits));
    return memory.back().get();
  }

  std::vector<std::unique_ptr<char[]>> bytes;

  char* room(i64 n) {
    bytes.emplace_back(new char[n]);
    return bytes.back().get();
  }

  // One factor, of numbers or of codes, among them all that there are.
  Factor<P> factor(Storage how, i64 out, i64 k, i64 first = 0) {
    Factor<P> f{nullptr, nullptr, how, out, k, how.bits ? first : 0};
    char* packed = room(f.bytes());
    f.w = packed;
    if (!how.bits) {
      pack_factor<P>(values(out * k, 0.3f), k, 1, out, k, reinterpret_cast<typename P::Element*>(packed));
      return f;
    }
    const i64 row = ceil_div(k * how.bits, 8), groups = f.groups().count();
    auto* codes = reinterpret_cast<std::uint8_t*>(room(out * row));
    for (i64 i = 0; i < out * row; ++i) codes[i] = std::uint8_t(random_bits());
    auto* scales = reinterpret_cast<std::uint16_t*>(room(out * groups * 2));
    for (i64 i = 0; i < out * groups; ++i) scales[i] = to_bf16(0.1f * float(below(20)) / float(1 << how.bits));
    auto* to_scales = reinterpret_cast<std::uint16_t*>(room(f.scale_count() * 2));
    for (i64 block = 0; block < ceil_div(out, LANES); ++block)
      pack_codes(f, codes, row, scales, groups, block, packed, to_scales);
    f.scales = to_scales;
    return f;
  }

  // Several of one size.
  Factors<P> factors(Storage how, i64 places, i64 out, i64 k, i64 first = 0) {
    Factors<P> all;
    for (i64 d = 0; d < places; ++d) all.each.push_back(factor(how, out, k, first));
    all.first = all.each[0];
    return all;
  }

  // Bases of which V's are mixed.
  Factors<P> mixed(Storage how, i64 m, i64 out, i64 k) {
    if (how.bits) return factors({how.bits, how.group}, m, out, k);
    const i64 strides[] = {out * k, k, 1};
    auto *bases = values(m * out * k, 0.5f), *packed = values(m * packed_size<P>(out, k), 0);
    for (i64 block = 0; block < ceil_div(out, LANES); ++block) pack_mixed<P>(bases, strides, m, out, k, block, packed);
    return Factor<P>{reinterpret_cast<const char*>(packed), nullptr, {}, out, k, 0};
  }

  Factor<P> base(Storage how, i64 out, i64 kept, bool by_columns, i64 first) {
    if (!by_columns) return factor(how, out, kept, first);
    auto* packed = values(packed_base_size<P>(out, kept), 0);
    pack_base<P>(values(out * kept, 0.2f), out, out, kept, packed);
    return {reinterpret_cast<const char*>(packed), nullptr, {}, out, kept, 0};
  }
};

// Some of `rows` rows of m alphas at their ends, as where experts mix from the bases of their own group only.
template <class Element>
Element* zeros_between(Element* alpha, i64 rows, i64 m) {
  for (i64 r = 0; r < rows; ++r) {
    const i64 first = below(3) ? 0 : below(m), last = below(3) ? m : first + below(m - first + 1);
    for (i64 i = 0; i < m; ++i) if (i < first || i >= last) alpha[r * m + i] = Element{};
  }
  return alpha;
}

float lane(Floats v, i64 i) {
  float numbers[LANES];
  store(numbers, v);
  return numbers[i];
}

// The functions of vectors.h against the C library's in double precision, where results are normal numbers.
bool close(const char* name, Floats (*f)(Floats), double (*exact)(double), double tolerance) {
  for (i64 i = 0; i < 400000; ++i) {
    // Both signs, from 1e-30 to 80, all of about the same number of values.
    const float x = float((i % 2 ? 1 : -1) * std::exp(-69.0 + 73.3 * double(i) / 400000));
    const double expected = exact(x);
    if (std::fabs(lane(f(all(x)), i % LANES) - expected) <= tolerance * std::fabs(expected)) continue;
    std::printf("%s(%g) is %g\n", name, x, lane(f(all(x)), i % LANES));
    return false;
  }
  return true;
}

double exact_silu(double x) { return x / (1 + std::exp(-x)); }
double exact_tanh(double x) { return std::tanh(x); }
double exact_exp(double x) { return std::exp(x); }

bool functions() {
  const float limits = lane(tanh(all(INFINITY)), 0) + lane(tanh(all(-INFINITY)), 1) + lane(exp(all(-INFINITY)), 0) +
                       lane(silu_16_bits(all(0)), 0);
  return limits == 0 && std::isnan(lane(tanh(all(NAN)), 2)) && close("exp", exp, exact_exp, 2e-7) &&
         close("silu", silu, exact_silu, 4e-7) && close("silu_16_bits", silu_16_bits, exact_silu, 1e-5) &&
         close("tanh", tanh, exact_tanh, 4e-7);
}

Parallel on_threads(int count) {
  return [count](i64 n, const std::function<void(i64)>& f) {
    std::atomic<i64> next{0};
    std::vector<std::thread> threads;
    for (int t = 0; t < count; ++t)
      threads.emplace_back([&] { for (i64 i = next++; i < n; i = next++) f(i); });
    for (auto& thread : threads) thread.join();
  };
}

// One half of a layer whose experts keep some channels: dense or factors, on a full base or on none.
template <class P>
void narrow_half(Owned<P>& own, const Layer<P>& layer, Weights<P>& w, int half, Storage of_delta, Storage of_base, bool based) {
  const int parts = half ? 1 : layer.parts;
  const i64 hidden = layer.hidden, channels = layer.intermediate;
  w.whole = below(2);
  for (int j = 0; j < parts; ++j) w.rank[j] = !w.whole ? 1 + below(40) : half ? layer.widest() : hidden;
  for (i64 e = 0; e < layer.experts; ++e) {
    const i64 width = layer.widths[e], skipped = below(100);
    for (int j = 0; j < parts; ++j) {
      const i64 in = w.whole && half ? width : w.rank[j];
      w.u[j].each.push_back(own.factor(of_delta, half ? hidden : width, in, w.whole && half ? skipped : 0));
      w.u[j].first = w.u[j].each[0];
    }
    if (w.whole) continue;
    w.v.each.push_back(own.factor(of_delta, w.ranks(), half ? width : hidden, half ? skipped : 0));
    w.v.first = w.v.each[0];
  }
  const i64 first = below(100);
  for (int j = 0; j < parts && based; ++j)
    w.base[j] = own.base(of_base, half ? hidden : channels, half ? channels : hidden, false, first);
  w.kept = half ? channels : hidden;
}

template <class P>
bool one(int number) {
  Owned<P> own;
  Layer<P> layer;
  // Now and then more than are mixed at once, and more ranks than one task shrinks to.
  layer.experts = number % 6 == 4 ? 1 + below(45) : 1 + below(6);
  const i64 ranks = number % 6 == 4 ? 170 : 40;
  // Now and then as large as a base by columns is folded at more outputs, with a last fold that is not whole.
  layer.hidden = number % 12 == 5 ? 4096 + 4 * below(100) : 4 * (1 + below(20));
  layer.intermediate = number % 12 == 11 ? 4160 : 4 * (1 + below(20));
  layer.scope = Scope(below(3));
  layer.activation = Activation(below(4));
  // Now and then without a gate, and then without what needs one.
  layer.parts = number % 7 == 2 ? 1 : 2;
  std::vector<i32> index(layer.experts), columns[2], deltas[2];
  std::vector<float> norms(layer.hidden + layer.intermediate, 1.0f);
  const bool trimmed = below(3) == 0;
  // Few bits, and experts that keep some channels, some of them none.
  auto storage = [] {
    if (below(2)) return Storage{};
    const i64 bits = (const i64[]){8, 4, 3, 2}[below(4)];
    return Storage{bits, 32 << below(3), bits < 8 && below(2)};
  };
  std::vector<i32> widths;
  const bool narrow = number % 4 == 3, based = below(2);
  if (narrow) {
    for (i64 e = 0; e < layer.experts; ++e) widths.push_back(i32(below(4) ? 1 + below(layer.intermediate) : 0));
    layer.widths = widths.data();
  }
  for (i64 e = 0; e < layer.experts; ++e) index[e] = trimmed && below(2) ? -1 : i32(e);
  for (int half = 0; half < 2; ++half) {
    Weights<P>& w = half ? layer.w2 : layer.w13;
    const i64 in = half ? layer.intermediate : layer.hidden, out = half ? layer.hidden : layer.intermediate;
    const int parts = half ? 1 : layer.parts;
    const Storage of_delta = storage(), of_base = storage();
    if (narrow) {
      narrow_half(own, layer, w, half, of_delta, of_base, based);
      if (trimmed && based) w.u_index = w.v_index = index.data();
      continue;
    }
    for (int j = 0; j < parts; ++j) {
      w.rank[j] = 1 + below(ranks);
      w.u[j] = own.factors(of_delta, layer.experts, out, w.rank[j]);
    }
    // The last kind: mixed from bases, or whole.
    const i64 kind = below(trimmed ? 3 : 4);
    if (trimmed) w.u_index = w.v_index = index.data();
    if (kind == 0) w.v = own.factors(of_delta, layer.experts, w.ranks(), in, below(100));
    if (kind == 1) w.v = own.factors(of_delta, 1, w.ranks(), in), w.shared_v = true;
    if (kind == 2) {
      for (i64 i = 0; i < layer.experts * w.ranks(); ++i) deltas[half].push_back(i32(below(in)));
      w.columns = deltas[half].data();
    }
    if (kind == 3 && half == 0 && layer.parts == 2 && below(2)) {
      w.mixed = 1 + below(70);
      w.function = Function(below(2));
      for (int j = 0; j < 2; ++j) w.bases[j] = own.mixed(of_delta, w.mixed, w.rank[j], in);
      w.alpha = zeros_between(own.values(layer.experts * 2 * w.mixed, 0.3f), layer.experts * 2, w.mixed);
    } else if (kind == 3) {
      w.whole = true;
      const i64 first = below(100);
      for (int j = 0; j < parts; ++j) w.rank[j] = in, w.u[j] = own.factors(of_delta, layer.experts, out, in, first);
    }
    const i64 base = below(3);
    if (base == 0) {
      w.groups = 2;
      w.kept = 2 * (1 + below(std::min<i64>(in, 80) / 2));
      w.used = 2 * (1 + below(w.kept / 2));
      for (i64 i = 0; i < w.kept; ++i) columns[half].push_back(i32(i));
      w.base_columns = columns[half].data();
      w.base_norms = norms.data();
      w.selects = layer.scope != Scope::off && w.used < w.kept;
      w.by_columns = w.selects && !of_base.bits;
      const i64 first = below(100);
      for (int j = 0; j < parts; ++j) w.base[j] = own.base(of_base, out, w.kept, w.by_columns, first);
    } else if (base == 1 || trimmed) {
      for (int j = 0; j < parts; ++j) w.base_rank[j] = 1 + below(9);
      for (int j = 0; j < parts; ++j) w.base_u[j] = own.factor(of_base, out, w.base_rank[j]);
      w.base_v = own.factor(of_base, w.base_ranks(), in, below(100));
    }
  }
  // Which channels: the first ones.
  std::vector<std::uint8_t> channels(layer.experts * ceil_div(layer.intermediate, 8));
  for (i64 e = 0; narrow && e < layer.experts; ++e)
    for (i64 c = 0; c < widths[e]; ++c) channels[e * ceil_div(layer.intermediate, 8) + c / 8] |= 1 << c % 8;
  std::unique_ptr<float[]> biases[2];
  if (number % 5 < 2) {
    const i64 steps[] = {layer.parts * ceil_div(layer.widest(), SLICE) * SLICE, ceil_div(layer.hidden, SLICE) * SLICE};
    for (int half = 0; half < 2; ++half) {
      const i64 n = layer.experts * steps[half];
      biases[half].reset(new float[n]);
      for (i64 i = 0; i < n; ++i) biases[half][i] = 0.1f * float(below(20));
      Weights<P>& w = half ? layer.w2 : layer.w13;
      w.bias = biases[half].get(), w.bias_step = steps[half];
    }
  }
  if (number % 5 == 1 && layer.parts == 2) layer.swiglu = {1.5f, 1.702f, 1.0f};
  if (narrow && based) layer.channels = channels.data();
  else if (narrow) layer.intermediate = 0;
  Batch<P> batch;
  batch.tokens = 1 + below(40);
  batch.top_k = 1 + below(layer.experts);
  std::vector<float> gates(batch.tokens * batch.top_k, 0.5f);
  std::vector<i32> ids;
  for (size_t i = 0; i < gates.size(); ++i) ids.push_back(i32(below(layer.experts + 2)) - 1);
  std::unique_ptr<bool[]> padding(new bool[batch.tokens]);
  for (i64 t = 0; t < batch.tokens; ++t) padding[t] = below(4) == 0;
  batch.x = own.values(batch.tokens * layer.hidden, 1);
  batch.gates = gates.data();
  batch.ids = ids.data();
  batch.padding = padding.get();
  const i64 size = batch.tokens * layer.hidden;
  std::vector<typename P::Element> results[3];
  const int threads[] = {1, 2, 5};
  double sum = 0;
  // Kept from case to case, or new, so that what was left over hides nothing.
  static Buffers<P> kept;
  Buffers<P> own_buffers;
  Buffers<P>& buffers = number % 2 ? kept : own_buffers;
  for (int i = 0; i < 3; ++i) {
    results[i].resize(size);
    batch.y = results[i].data();
    const Parallel parallel = on_threads(threads[i]);
    Run<P>(layer, batch, parallel, threads[i], buffers)();
  }
  for (auto value : results[0]) sum += P::value(value);
  std::printf("%d %.6g\n", number, sum);
  return std::memcmp(results[0].data(), results[1].data(), size * sizeof(results[0][0])) == 0 &&
         std::memcmp(results[0].data(), results[2].data(), size * sizeof(results[0][0])) == 0;
}

}  // namespace

int main(int count, char** arguments) {
  const int cases = count > 1 ? std::atoi(arguments[1]) : 60;
  if (!functions()) return 1;
  for (int i = 0; i < cases; ++i) {
    if (!(i % 3 == 0 ? one<BFloat16>(i) : i % 3 == 1 ? one<Float16>(i) : one<Float32>(i))) {
      std::printf("case %d: bits depend on the number of threads\n", i);
      return 1;
    }
  }
  return 0;
}
