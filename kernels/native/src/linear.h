// Projections: slices side by side, 4-bit, 8-bit or dense, cut into tasks for all threads.
#pragma once
#include "dense.h"
#include "nf4_int8.h"

namespace HERD_ISA {

// How weights and activations of a dtype meet: numbers, and codes.
template <typename E>
struct Chosen {
  typedef Float32Dot<E> Dot;
  typedef Float32Codes<E> Codes;
};
#if defined(__AVX512BF16__)
template <>
struct Chosen<bf16> {
  typedef Bfloat16Dot Dot;
  typedef Bfloat16Codes Codes;
};
#endif

// One call: slices side by side in y, cut into tasks of task_rows rows.
template <typename E>
struct LinearCall {
  const herd::Matrix* slices;
  int num_slices;
  const void* x;           // as Dot wants it, for dense slices
  long x_stride;
  const uint32_t* packed;  // the same for 4-bit slices (nf4.h)
  long num_tokens;
  E* y;
  long y_stride;
  long task_rows;
};

template <class Dot, class Codes, typename E>
static void linear_task(void* context, long task) {
  const LinearCall<E>& call = *(const LinearCall<E>*)context;
  E* y = call.y;
  for (int i = 0; i < call.num_slices; i++) {
    const herd::Matrix& m = call.slices[i];
    const long tasks = ceil_div(m.out_features, call.task_rows);
    if (task >= tasks) {
      task -= tasks;
      y += m.out_features;
      continue;
    }
    const long first = task * call.task_rows, stop = least(first + call.task_rows, m.out_features);
    const long k = m.in_features, rows = stop - first;
    const typename Dot::X* x = (const typename Dot::X*)call.x;
    const Output<E> out = {y, call.y_stride, (const E*)m.bias, m.codebook ? nullptr : m.nested_absmax};
    if (m.codebook && !m.int8_activations)
      multiply_rows<Codes>(m, first, stop, call.packed, call.num_tokens, out);
#if defined(__AVX512VNNI__)
    else if (m.codebook)
      multiply_rows<Int8Codes>(m, first, stop, call.packed, call.num_tokens, out);
#endif
    else if (m.nested_absmax)
      dense_panel<Dot, E>((const int8_t*)m.data + first * k, x, call.x_stride, k, first, rows,
                          call.num_tokens, out);
    else
      dense_panel<Dot, E>((const E*)m.data + first * k, x, call.x_stride, k, first, rows,
                          call.num_tokens, out);
    return;
  }
}

struct Widening {
  const void* from;
  float* to;
  long size;
};
static void widen_task(void* context, long task) {
  const Widening& call = *(const Widening*)context;
  const long start = task * 16384, stop = least(start + 16384, call.size);
  const bf16* from = (const bf16*)call.from;
  long i = start;
  for (; i + Vec::N <= stop; i += Vec::N) store(call.to + i, load(from + i));
  for (; i < stop; i++) call.to[i] = to_float(from[i]);
}

template <typename X>
static const X* prepared(const X* x, long) { return x; }
static const float* prepared_float(const bf16* x, long size) {
  float* widened = (float*)herd::scratch(herd::kActivations, size * (long)sizeof(float));
  Widening call = {x, widened, size};
  herd::run(widen_task, &call, ceil_div(size, 16384));
  return widened;
}
template <class X, typename E>
struct Prepared {
  static const X* of(const E* x, long size) { return prepared(x, size); }
};
template <>
struct Prepared<float, bf16> {
  static const float* of(const bf16* x, long size) { return prepared_float(x, size); }
};

// Activations for dense slices, a token's `stride` elements behind the one before.
template <typename X>
static const X* spread(const X* x, long num_tokens, long k, long stride) {
  if (stride == k || num_tokens == 1) return x;
  X* out = (X*)herd::scratch(herd::kSpread, num_tokens * stride * (long)sizeof(X));
  for (long t = 0; t < num_tokens; t++) memcpy(out + t * stride, x + t * k, k * sizeof(X));
  return out;
}

// x [num_tokens, in_features], contiguous.
template <typename E>
static void linear(const herd::Matrix* slices, int num_slices, const E* x, long num_tokens, E* y,
                   long y_stride) {
  typedef typename Chosen<E>::Dot Dot;
  typedef typename Dot::X X;
  const long k = slices[0].in_features;
  long rows_in_all = 0;
  bool has_codes = false, has_int8 = false, has_dense = false;
  for (int i = 0; i < num_slices; i++) {
    rows_in_all += slices[i].out_features;
    has_codes = has_codes || slices[i].codebook;
    has_int8 = has_int8 || slices[i].int8_activations;
    has_dense = has_dense || !slices[i].codebook;
  }
  // About 32 KB of 4-bit codes for a few tokens; for many, dense weights that stay in the second
  // cache while all tokens pass by, but tasks enough for every thread.
  long task_rows = (num_tokens <= 32 ? 65536 : 262144) / k;
  task_rows = least(task_rows, ceil_div(rows_in_all, 4L * herd::num_threads()));
  task_rows = most(kRows, task_rows / kRows * kRows);
  const long stride = activations_stride(k, sizeof(X)), units = k * (long)sizeof(X) / 4;
  LinearCall<E> call = {slices, num_slices, nullptr, stride, nullptr, num_tokens, y, y_stride,
                        task_rows};
  if (has_dense || !has_int8) {
    const X* prepared = Prepared<X, E>::of(x, num_tokens * k);
    if (has_dense) call.x = spread(prepared, num_tokens, k, stride);
    if (has_codes && !has_int8) call.packed = packed(prepared, num_tokens, units);
  }
#if defined(__AVX512VNNI__)
  if (has_int8) call.packed = rounded_to_bytes(x, num_tokens, k);
#endif
  long tasks = 0;
  for (int i = 0; i < num_slices; i++) tasks += ceil_div(slices[i].out_features, task_rows);
  herd::run(linear_task<Dot, typename Chosen<E>::Codes, E>, &call, tasks);
}

// out [out_features, in_features].
template <typename E>
static void dequantize(const herd::Matrix* m, E* out) {
  DequantizeCall<E> call = {m, out};
  herd::run(dequantize_task<typename Chosen<E>::Codes, E>, &call, ceil_div(m->out_features, kRows));
}

}  // namespace HERD_ISA
