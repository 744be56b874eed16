// What only training needs: gradients of the norm and of SiLU times up, and of log-probabilities.
// All arithmetic is float32, rounded once when it is written.
#pragma once
#include "rows.h"

namespace HERD_ISA {

// With n = x / rms(x) and g = grad * weight: (g - n * mean(g * n)) / rms(x).
template <typename E>
static void rms_norm_backward_row(const E* x, const E* weight, const E* grad, float eps, long size,
                                  E* out) {
  Vec squares = splat(0.0f), products = splat(0.0f);
  for (long i = 0; i < size; i += Vec::N) {
    const long left = size - i;
    const Vec value = load_some(x + i, left);
    squares = fma(value, value, squares);
    products = fma(load_some(grad + i, left) * load_some(weight + i, left), value, products);
  }
  const float factor = 1.0f / __builtin_sqrtf(sum(squares) / (float)size + eps);
  const float mean = sum(products) * factor / (float)size;
  for (long i = 0; i < size; i += Vec::N) {
    const long left = size - i;
    const Vec normal = load_some(x + i, left) * splat(factor * mean);
    const Vec slope = load_some(grad + i, left) * load_some(weight + i, left);
    store_some(out + i, (slope - normal) * splat(factor), left);
  }
}

template <typename E>
static void rms_norm_backward(const E* x, const E* weight, const E* grad, float eps, long num_rows,
                              long size, E* out) {
  for_rows(num_rows, size, [=](long first, long stop) {
    for (long i = first; i < stop; i++)
      rms_norm_backward_row(x + i * size, weight, grad + i * size, eps, size, out + i * size);
  });
}

// gate_up [num_tokens, 2 * size], grad [num_tokens, size] -> out [num_tokens, 2 * size].
template <typename E>
static void silu_and_mul_backward(const E* gate_up, const E* grad, long num_tokens, long size,
                                  E* out) {
  for_rows(num_tokens, size * 8, [=](long first, long stop) {
    const Vec one = splat(1.0f), zero = splat(0.0f);
    for (long t = first; t < stop; t++) {
      const E *gate = gate_up + t * 2 * size, *up = gate + size, *from = grad + t * size;
      E *to_gate = out + t * 2 * size, *to_up = to_gate + size;
      for (long i = 0; i < size; i += Vec::N) {
        const long left = size - i;
        const Vec g = load_some(gate + i, left), slope = load_some(from + i, left);
        const Vec sigmoid = one / (one + exponential(zero - g)), silu = g * sigmoid;
        store_some(to_up + i, slope * silu, left);
        store_some(to_gate + i,
                   slope * load_some(up + i, left) * sigmoid * (one + g - silu), left);
      }
    }
  });
}

// One row of logits: its label's log-probability, whether that is the first of the largest, and
// with a slope the logits replaced by slope * (one-hot(label) - softmax).
template <typename E>
static void label_row(E* logits, long size, long label, float factor, const float* slope,
                      float* logp, uint8_t* is_correct) {
  const long full = size / Vec::N * Vec::N;
  Vec largest = splat(to_float(logits[0]));
  for (long i = 0; i < full; i += Vec::N) largest = larger(largest, load(logits + i));
  float top = maximum(largest);
  for (long i = full; i < size; i++) top = top < to_float(logits[i]) ? to_float(logits[i]) : top;
  const float own = to_float(logits[label]);
  bool is_first = own == top;
  for (long i = 0; is_first && i < label; i++) is_first = to_float(logits[i]) != top;
  *is_correct = is_first;

  const Vec scale = splat(factor), offset = splat(-top * factor);
  Vec total = splat(0.0f);
  for (long i = 0; i < full; i += Vec::N)
    total = total + exponential(fma(load(logits + i), scale, offset));
  float sum_of_all = sum(total);
  for (long i = full; i < size; i++)
    sum_of_all += __builtin_expf((to_float(logits[i]) - top) * factor);
  *logp = (own - top) * factor - __builtin_logf(sum_of_all);
  if (!slope) return;

  const float share = -*slope / sum_of_all;
  for (long i = 0; i < full; i += Vec::N)
    store(logits + i, exponential(fma(load(logits + i), scale, offset)) * splat(share));
  for (long i = full; i < size; i++)
    set(logits + i, __builtin_expf((to_float(logits[i]) - top) * factor) * share);
  set(logits + label, *slope + share * __builtin_expf((own - top) * factor));
}

// logits [num_rows, size]; factor: one over the temperature; slopes: [num_rows], or null.
template <typename E>
static void label_logps(E* logits, long num_rows, long size, const int64_t* labels, float factor,
                        const float* slopes, float* logps, uint8_t* is_correct) {
  for_rows(num_rows, size, [=](long first, long stop) {
    for (long i = first; i < stop; i++)
      label_row(logits + i * size, size, labels[i], factor, slopes ? slopes + i : nullptr,
                logps + i, is_correct + i);
  });
}

}  // namespace HERD_ISA
