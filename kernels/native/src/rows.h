// The small operations between products, row by row: norms, rotation, SiLU times up. They round
// where kernels/fused.py rounds.
#pragma once
#include "pool.h"
#include "simd.h"

namespace HERD_ISA {

// The last count < N elements of a row; the other lanes are zero.
template <typename E>
static inline Vec load_part(const E* p, long count) {
  float lanes[Vec::N] = {0};
  for (long i = 0; i < count; i++) lanes[i] = to_float(p[i]);
  return load(lanes);
}
template <typename E>
static inline void store_part(E* p, Vec a, long count) {
  float lanes[Vec::N];
  store(lanes, a);
  for (long i = 0; i < count; i++) set(p + i, lanes[i]);
}
template <typename E>
static inline Vec load_some(const E* p, long left) {
  return left >= Vec::N ? load(p) : load_part(p, left);
}
template <typename E>
static inline void store_some(E* p, Vec a, long left) {
  if (left >= Vec::N)
    store(p, a);
  else
    store_part(p, a, left);
}
static inline Vec rounded(Vec a, const float*) { return a; }
static inline Vec rounded(Vec a, const bf16*) { return round_to_bf16(a); }

template <typename E>
static void rms_norm_row(const E* x, const E* weight, float eps, long size, E* out) {
  Vec squares = splat(0.0f);
  for (long i = 0; i < size; i += Vec::N) {
    const Vec value = load_some(x + i, size - i);
    squares = fma(value, value, squares);
  }
  const float factor = 1.0f / __builtin_sqrtf(sum(squares) / (float)size + eps);
  for (long i = 0; i < size; i += Vec::N) {
    const Vec normal = rounded(load_some(x + i, size - i) * splat(factor), x);
    store_some(out + i, load_some(weight + i, size - i) * normal, size - i);
  }
}

template <typename E>
static void add_row(const E* x, const E* residual, long size, E* out) {
  for (long i = 0; i < size; i += Vec::N) {
    const long left = size - i;
    store_some(out + i, load_some(residual + i, left) + load_some(x + i, left), left);
  }
}

// One head; cos and sin: float32 [head_dim / 2].
template <typename E>
static void rotate_head(const E* x, const float* cos, const float* sin, long head_dim, E* out) {
  const long half = head_dim / 2;
  for (long i = 0; i < half; i += Vec::N) {
    const long left = half - i;
    const Vec c = rounded(load_some(cos + i, left), x), s = rounded(load_some(sin + i, left), x);
    const Vec first = load_some(x + i, left), second = load_some(x + half + i, left);
    store_some(out + i, rounded(first * c, x) - rounded(second * s, x), left);
    store_some(out + half + i, rounded(second * c, x) + rounded(first * s, x), left);
  }
}

template <typename E>
static void silu_and_mul_row(const E* gate, const E* up, long size, E* out) {
  const Vec one = splat(1.0f), zero = splat(0.0f);
  for (long i = 0; i < size; i += Vec::N) {
    const Vec g = load_some(gate + i, size - i);
    const Vec silu = rounded(g / (one + exponential(zero - g)), gate);
    store_some(out + i, silu * load_some(up + i, size - i), size - i);
  }
}

// Runs body(first, stop) over stretches of the rows; a few rows are not worth a second thread.
template <class Body>
static void for_rows(long num_rows, long elements, const Body& body) {
  struct Call {
    const Body* body;
    long num_rows, at_once;
  };
  const long at_once = most(1, 16384 / most(1, elements));
  Call call = {&body, num_rows, at_once};
  herd::run(
      [](void* context, long task) {
        const Call& mine = *(const Call*)context;
        const long first = task * mine.at_once;
        (*mine.body)(first, least(first + mine.at_once, mine.num_rows));
      },
      &call, ceil_div(num_rows, at_once));
}

template <typename E>
static void rms_norm(const E* x, const E* weight, float eps, long num_rows, long size, E* out) {
  for_rows(num_rows, size, [=](long first, long stop) {
    for (long i = first; i < stop; i++)
      rms_norm_row(x + i * size, weight, eps, size, out + i * size);
  });
}

// sums: [num_rows, size], may be residual.
template <typename E>
static void add_rms_norm(const E* x, const E* residual, const E* weight, float eps, long num_rows,
                         long size, E* out, E* sums) {
  for_rows(num_rows, size, [=](long first, long stop) {
    for (long i = first; i < stop; i++) {
      add_row(x + i * size, residual + i * size, size, sums + i * size);
      rms_norm_row(sums + i * size, weight, eps, size, out + i * size);
    }
  });
}

// Rotates num_heads heads of each token; rows of x and out are strides apart, and may be the same.
template <typename E>
static void rotate(const E* x, long x_stride, const float* cos, const float* sin, long num_tokens,
                   long num_heads, long head_dim, E* out, long out_stride) {
  for_rows(num_tokens, num_heads * head_dim, [=](long first, long stop) {
    for (long t = first; t < stop; t++)
      for (long h = 0; h < num_heads; h++)
        rotate_head(x + t * x_stride + h * head_dim, cos + t * (head_dim / 2),
                    sin + t * (head_dim / 2), head_dim, out + t * out_stride + h * head_dim);
  });
}

// gate_up [num_tokens, 2 * size] -> out [num_tokens, size].
template <typename E>
static void silu_and_mul(const E* gate_up, long num_tokens, long size, E* out) {
  // Pieces of a row, so that one token's row is shared too.
  const long pieces = ceil_div(size, 2048);
  for_rows(num_tokens * pieces, least(size, 2048) * 4, [=](long first, long stop) {
    for (long i = first; i < stop; i++) {
      const long token = i / pieces, start = i % pieces * 2048;
      const E* row = gate_up + token * 2 * size + start;
      silu_and_mul_row(row, row + size, least(2048, size - start), out + token * size + start);
    }
  });
}

}  // namespace HERD_ISA
