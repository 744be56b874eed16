// Products of tokens with rows of numbers, 16-bit, 32-bit or 8-bit: y[t][n] = sum over k of x[t][k] w[n][k].
//
// Sums are float32, one set of lanes per (token, row), along k from beginning to end, and the lanes
// are added at the end. That order is the same for any number of tokens.
#pragma once
#include "api.h"
#include "pool.h"
#include "simd.h"

namespace HERD_ISA {

// How numbers of weights and activations meet. step: elements of one vector of either.
template <typename E>
struct Float32Dot {  // E: the activations' dtype
  typedef float X;   // activations are widened once per call
  typedef Vec V;
  static constexpr int step = Vec::N;
  static inline V load_x(const float* p) { return load(p); }
  static inline V load_w(const E* p) { return load(p); }
  static inline V load_w(const int8_t* p) { return load(p); }
  static inline Vec mac(Vec acc, V w, V x) { return fma(w, x, acc); }
};

#if defined(__AVX512BF16__)
struct Bfloat16Dot {
  typedef bf16 X;
  typedef __m512bh V;
  static constexpr int step = 32;
  static inline V load_x(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static inline V load_w(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static inline V load_w(const int8_t* p) {
    return _mm512_cvtne2ps_pbh(load(p + Vec::N).v, load(p).v);
  }
  static inline Vec mac(Vec acc, V w, V x) { return {_mm512_dpbf16_ps(acc.v, w, x)}; }
};
#endif

// Where results go: y[t * stride + n].
template <typename E>
struct Output {
  E* y;
  long stride;
  const E* bias;
  const float* row_scales = nullptr;  // multiplied into the sums, where there are any
  // One token's results for up to four rows.
  template <int R>
  inline void write(float* totals, long n, long t) const {
    E* to = y + t * stride + n;
    if (row_scales)
      for (int r = 0; r < R; r++) totals[r] *= row_scales[n + r];
    if (bias)
      for (int r = 0; r < R; r++) totals[r] += to_float(bias[n + r]);
    if (R == 4)
      set_four(to, totals);
    else
      for (int r = 0; r < R; r++) set(to + r, totals[r]);
  }
  // One token's results for up to `count` rows, a row to each lane.
  inline void write_lanes(Vec totals, long n, long count, long t) const {
    E* to = y + t * stride + n;
    if (count >= Vec::N) return store(to, bias ? totals + load(bias + n) : totals);
    float lanes[Vec::N];
    store(lanes, totals);
    for (long r = 0; r < count; r++)
      set(to + r, bias ? lanes[r] + to_float(bias[n + r]) : lanes[r]);
  }
};

// The sums of R rows with T tokens.
template <int R, int T>
struct Sums {
  Vec of[R][T];
  inline void clear() {
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int t = 0; t < T; t++) of[r][t] = splat(0.0f);
  }
  template <typename E>
  inline void write(const Output<E>& out, long n, long first) const {
    constexpr int Q = R < 4 ? R : 4;
#pragma GCC unroll 8
    for (int t = 0; t < T; t++)
#pragma GCC unroll 2
      for (int r = 0; r < R; r += Q) {
        float totals[4];
        sums(of[r][t], of[r + (Q > 1)][t], of[r + 2 * (Q > 2)][t], of[r + 3 * (Q > 3)][t], totals);
        out.template write<Q>(totals, n + r, first + t);
      }
  }
};

// A stretch of columns: products of R rows of numbers with T tokens. Sums over several stretches
// are kept in between; kept: [R * T], or null for the whole row at once.
template <class Dot, typename E, int R, int T, typename W>
static void dense_rows(const W* rows, long row_stride, const typename Dot::X* x, long x_stride,
                       long size, long n, long t, Vec* kept, bool is_first, bool is_last,
                       const Output<E>& out) {
  Sums<R, T> sums;
  if (is_first)
    sums.clear();
  else
    memcpy(&sums, kept, sizeof sums);
  long i = 0;
  do {
    typename Dot::V w[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      w[r] = Dot::load_w(rows + r * row_stride + i);
      // The next rows: with several tokens there is time to fetch them meanwhile.
      if (T > 1) __builtin_prefetch(rows + (r + R) * row_stride + i);
    }
#pragma GCC unroll 8
    for (int j = 0; j < T; j++) {
      const auto activations = Dot::load_x(x + j * x_stride + i);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) sums.of[r][j] = Dot::mac(sums.of[r][j], w[r], activations);
    }
    i += Dot::step;
  } while (i < size);
  if (is_last)
    sums.write(out, n, t);
  else
    memcpy(kept, &sums, sizeof sums);
}

// Registers: AVX-512 and NEON have 32, so up to 24 sums at a time, AVX2 16. Up to kTileTokens tokens
// meet kTileRows rows at a time; more, half as many rows, so that up to kWideTokens need one pass
// over the weights.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = 4, kTileTokens = 6, kWideTokens = 8;
#else
constexpr int kTileRows = 2, kTileTokens = 4, kWideTokens = 4;
#endif
constexpr long kStretch = 2048;  // columns of x for a tile's tokens that stay in the first cache

// Part of the product of some rows with all tokens: columns start .. start + size.
template <class Dot, typename E, typename W>
struct Panel {
  const W* rows;  // at column start
  long row_stride;
  const typename Dot::X* x;  // at column start
  long x_stride, size, n, num_rows;
  Vec* kept;
  bool is_first, is_last;
  const Output<E>& out;

  template <int R, int T>
  inline void tile(long r, long t) const {
    dense_rows<Dot, E, R, T>(rows + r * row_stride, row_stride, x + t * x_stride, x_stride, size,
                             n + r, t, kept + r * kWideTokens, is_first, is_last, out);
  }
  template <int R>
  inline void tokens(long r, long t, long count) const {
    switch (count) {
      case 1: return tile<R, 1>(r, t);
      case 2: return tile<R, 2>(r, t);
      case 3: return tile<R, 3>(r, t);
      case 4: return tile<R, 4>(r, t);
#if defined(__AVX512F__) || defined(__aarch64__)
      case 5: return tile<R, 5>(r, t);
      case 6: return tile<R, 6>(r, t);
      case 7: return tile<R, 7>(r, t);
      case 8: return tile<R, 8>(r, t);
#endif
    }
  }
  inline void run(long t, long count) const {
    constexpr int half = kTileRows / 2;
    long r = 0;
    if (count <= kTileTokens)
      for (; r + kTileRows <= num_rows; r += kTileRows) tokens<kTileRows>(r, t, count);
    for (; r + half <= num_rows; r += half) tokens<half>(r, t, count);
    for (; r < num_rows; r++) tokens<1>(r, t, count);
  }
};

// Elements from one token's activations to the next. Where whole pages lay between them, all would
// want the same few places of the first cache.
static inline long activations_stride(long k, long element_size) {
  return k * element_size % 2048 ? k : k + 64 / element_size;
}

// num_rows rows of k columns from n on, all tokens.
template <class Dot, typename E, typename W>
static void dense_panel(const W* rows, const typename Dot::X* x, long x_stride, long k, long n,
                        long num_rows, long num_tokens, const Output<E>& out) {
  const long tiles = ceil_div(num_tokens, kWideTokens), stretches = ceil_div(k, kStretch);
  const long size = ceil_div(k, stretches * kBlock) * kBlock;
  Vec* kept = (Vec*)herd::scratch(herd::kTotals, num_rows * kWideTokens * (long)sizeof(Vec));
  for (long tile = 0; tile < tiles; tile++) {
    const long t = num_tokens * tile / tiles, count = num_tokens * (tile + 1) / tiles - t;
    for (long start = 0; start < k; start += size) {
      const Panel<Dot, E, W> panel = {
          rows + start, k,        x + start, x_stride,   least(size, k - start), n,
          num_rows,     kept,     start == 0, start + size >= k, out};
      panel.run(t, count);
    }
  }
}

}  // namespace HERD_ISA
