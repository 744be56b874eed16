// Products of tokens with weight rows, 4-bit, 8-bit or dense: y[t][n] = sum over k of x[t][k] w[n][k].
//
// 4-bit layout  Rows in groups of 8 (the last may have fewer). A group's bytes are, for each block of
//               64 columns, 32 bytes of each of its rows: one stream from beginning to end. Byte i
//               of the 32 has element i in its low half and element i + 32 in its high half, so a
//               look-up yields neighbours, in the order of x.
// Arithmetic    The group's scale is multiplied into the 16 values of the table, which are rounded
//               to x's dtype: weights are what dequantising gives, to the bit. Sums are float32,
//               one set of lanes per (token, row), along k from beginning to end, and the lanes are
//               added at the end. That order is the same for any number of tokens; how many share
//               a weight's decoding is a matter of speed alone.
#pragma once
#include "api.h"
#include "pool.h"
#include "simd.h"

namespace HERD_ISA {

constexpr int kRows = 8;         // rows interleaved
constexpr int kBlock = 64;       // columns of a block
constexpr int kRowBytes = 32;    // of one row in a block
constexpr long kPrefetch = 4096; // bytes ahead in the stream

// How weights and activations meet. step: elements of one vector of either.
template <typename E>
struct Float32Dot {  // E: the activations' dtype, to which weights are rounded
  typedef float X;   // activations are widened once per call
  typedef Vec V;
  static constexpr int step = Vec::N;
  static inline V load_x(const float* p) { return load(p); }
  static inline V load_w(const E* p) { return load(p); }
  static inline V load_w(const int8_t* p) { return load(p); }
  static inline Vec mac(Vec acc, V w, V x) { return fma(w, x, acc); }
  static inline Table scaled(const Table& table, float scale) {
    Table out;
    for (int i = 0; i < 16 / Vec::N; i++) {
      out.part[i] = table.part[i] * splat(scale);
      if (sizeof(E) == 2) out.part[i] = round_to_bf16(out.part[i]);
    }
    return out;
  }
  // Elements v * step .. of a block of one row.
  static inline V decode(const Table& scaled, const uint8_t* p, int v) {
    const int start = v * step;
    return look_up(scaled, p + start % kRowBytes, start < kRowBytes ? 0 : 4);
  }
  static inline void keep(E* p, V w) { store(p, w); }
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
  // 32 entries, the 16 values twice: an index has 5 bits then, and the fifth, the neighbour's, does
  // not matter.
  struct Table32 {
    __m512i v;
  };
  static inline Table32 scaled(const Table& table, float scale) {
    const __m512 values = _mm512_mul_ps(table.part[0].v, _mm512_set1_ps(scale));
    return {(__m512i)_mm512_cvtne2ps_pbh(values, values)};
  }
  static inline V decode(const Table32& scaled, const uint8_t* p, int v) {
    __m512i index = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)p));
    if (v) index = _mm512_srli_epi16(index, 4);
    return (__m512bh)_mm512_permutexvar_epi16(index, scaled.v);
  }
  static inline void keep(bf16* p, V w) { _mm512_storeu_si512(p, (__m512i)w); }
};
template <typename E>
struct Chosen {
  typedef Float32Dot<E> Dot;
};
template <>
struct Chosen<bf16> {
  typedef Bfloat16Dot Dot;
};
#else
template <typename E>
struct Chosen {
  typedef Float32Dot<E> Dot;
};
#endif

static inline Table load_table(const float* codebook) {
  Table table;
  for (int i = 0; i < 16 / Vec::N; i++) table.part[i] = load(codebook + i * Vec::N);
  return table;
}

// The map's values for 8-bit codes.
#if defined(__AVX512VBMI__)
// 64 at a time: each of the four bytes of a value is looked up in 256, then they are put together.
static void map_codes(const uint8_t* codes, long count, float* values) {
  __m512i plane[4][4];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++)
    plane[i / 4][i % 4] = _mm512_load_si512(herd::dynamic_map_bytes[i / 4] + i % 4 * 64);
  // Unpacking goes by 128-bit lanes: with this order of words the values come out in theirs.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  for (long i = 0; i < count; i += 64) {
    const __mmask64 there = count - i < 64 ? ((__mmask64)1 << (count - i)) - 1 : ~(__mmask64)0;
    const __m512i code = _mm512_permutexvar_epi32(order, _mm512_maskz_loadu_epi8(there, codes + i));
    const __mmask64 is_upper = _mm512_movepi8_mask(code);
    __m512i byte[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++)
      byte[j] = _mm512_mask_blend_epi8(
          is_upper, _mm512_permutex2var_epi8(plane[j][0], code, plane[j][1]),
          _mm512_permutex2var_epi8(plane[j][2], code, plane[j][3]));
    const __m512i low[2] = {_mm512_unpacklo_epi8(byte[0], byte[1]),
                            _mm512_unpackhi_epi8(byte[0], byte[1])};
    const __m512i high[2] = {_mm512_unpacklo_epi8(byte[2], byte[3]),
                             _mm512_unpackhi_epi8(byte[2], byte[3])};
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      float* out = values + i + 32 * j;
      const uint32_t part = (uint32_t)(there >> 32 * j);
      _mm512_mask_storeu_epi32(out, (__mmask16)part, _mm512_unpacklo_epi16(low[j], high[j]));
      _mm512_mask_storeu_epi32(out + 16, (__mmask16)(part >> 16),
                               _mm512_unpackhi_epi16(low[j], high[j]));
    }
  }
}
#else
// One by one: vector look-ups of words in a table of 256 are slower, and the volatile stores keep
// compilers from building vectors out of single loads, which is slower too.
static void map_codes(const uint8_t* codes, long count, float* values) {
  const float* map = herd::dynamic_map;
  volatile float* out = values;
  long i = 0;
  for (; i + 8 <= count; i += 8) {
    uint64_t eight;
    memcpy(&eight, codes + i, 8);
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++) out[i + j] = map[eight >> (8 * j) & 255];
  }
  for (; i < count; i++) out[i] = map[codes[i]];
}
#endif

// Scales of the blocks of some rows: float32 [num_rows, in / 64].
static void decode_scales(const herd::Matrix& m, long row, long num_rows, float* scales) {
  const long repeat = m.group_size / kBlock, groups = m.in_features / m.group_size;
  const long first = row * groups, count = num_rows * groups;
  if (!m.codes) {
    memcpy(scales, m.nested_absmax + first, count * sizeof(float));
  } else {
    map_codes(m.codes + first, count, scales);
    for (long i = 0; i < count;) {
      const long stop = least(count, ((first + i) / 256 + 1) * 256 - first);
      const float nested = m.nested_absmax[(first + i) / 256];
      for (; i + Vec::N <= stop; i += Vec::N)
        store(scales + i, load(scales + i) * splat(nested) + splat(m.nested_offset));
      for (; i < stop; i++) {
        const float scale = scales[i] * nested;
        scales[i] = scale + m.nested_offset;
      }
    }
  }
  if (repeat > 1)
    for (long i = count * repeat - 1; i >= 0; i--) scales[i] = scales[i / repeat];
}

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

// R rows and tokens t .. t + T, straight from the codes.
template <class Dot, typename E, int R, int T>
static void nf4_rows(const uint8_t* codes, long block_stride, const float* scales,
                     const Table& table, const typename Dot::X* x, long k, long n, long t,
                     const Output<E>& out) {
  Sums<R, T> sums;
  sums.clear();
  x += t * k;
  const long blocks = k / kBlock;
  long b = 0;
  do {
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const auto scaled = Dot::scaled(table, scales[r * blocks + b]);
#pragma GCC unroll 16
      for (int v = 0; v < kBlock / Dot::step; v++) {
        const auto w = Dot::decode(scaled, codes + r * kRowBytes, v);
#pragma GCC unroll 8
        for (int j = 0; j < T; j++)
          sums.of[r][j] =
              Dot::mac(sums.of[r][j], w, Dot::load_x(x + j * k + b * kBlock + v * Dot::step));
      }
    }
    for (int r = 0; r < R; r += 2) __builtin_prefetch(codes + kPrefetch + r * kRowBytes);
    codes += block_stride;
  } while (++b < blocks);
  sums.write(out, n, t);
}

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
    for (int r = 0; r < R; r++) w[r] = Dot::load_w(rows + r * row_stride + i);
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

// Registers: AVX-512 and NEON have 32, so 24 sums at a time, AVX2 16.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = 4;
constexpr int kTileTokens = 6;
constexpr int kDirectTokens = 6;  // up to so many, weights are not kept decoded
#else
constexpr int kTileRows = 2;
constexpr int kTileTokens = 4;
constexpr int kDirectTokens = 4;
#endif

constexpr int kFewTokens = 32;
constexpr int kTileSums = kTileRows * kTileTokens;
constexpr long kStretch = 2048;  // columns of x for a tile's tokens that stay in the first cache

// Part of the product of some rows with all tokens: columns start .. start + size.
template <class Dot, typename E, typename W>
struct Panel {
  const W* rows;  // at column start
  long row_stride;
  const typename Dot::X* x;  // at column start
  long k, size, n, num_rows;
  Vec* kept;
  bool is_first, is_last;
  const Output<E>& out;

  template <int R, int T>
  inline void tile(long r, long t) const {
    dense_rows<Dot, E, R, T>(rows + r * row_stride, row_stride, x + t * k, k, size, n + r, t,
                             kept + r * kTileTokens, is_first, is_last, out);
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
#endif
    }
  }
  inline void run(long t, long count) const {
    long r = 0;
    for (; r + kTileRows <= num_rows; r += kTileRows) tokens<kTileRows>(r, t, count);
    for (; r < num_rows; r++) tokens<1>(r, t, count);
  }
};

// num_rows rows from n on, all tokens.
template <class Dot, typename E, typename W>
static void dense_panel(const W* rows, long row_stride, const typename Dot::X* x, long k, long n,
                        long num_rows, long num_tokens, const Output<E>& out) {
  const long tiles = ceil_div(num_tokens, kTileTokens), stretches = ceil_div(k, kStretch);
  const long size = ceil_div(k, stretches * kBlock) * kBlock;
  Vec* kept = (Vec*)herd::scratch(herd::kSums, num_rows * kTileTokens * (long)sizeof(Vec));
  for (long tile = 0; tile < tiles; tile++) {
    const long t = num_tokens * tile / tiles, count = num_tokens * (tile + 1) / tiles - t;
    for (long start = 0; start < k; start += size) {
      const Panel<Dot, E, W> panel = {rows + start, row_stride, x + start, k, least(size, k - start),
                                   n, num_rows, kept, start == 0, start + size >= k, out};
      panel.run(t, count);
    }
  }
}

template <class Dot, typename E, int R>
static void nf4_tokens(const uint8_t* codes, long block_stride, const float* scales,
                       const Table& table, const typename Dot::X* x, long k, long n,
                       long num_tokens, const Output<E>& out) {
  switch (num_tokens) {
    case 1: return nf4_rows<Dot, E, R, 1>(codes, block_stride, scales, table, x, k, n, 0, out);
    case 2: return nf4_rows<Dot, E, R, 2>(codes, block_stride, scales, table, x, k, n, 0, out);
    case 3: return nf4_rows<Dot, E, R, 3>(codes, block_stride, scales, table, x, k, n, 0, out);
  }
}

template <class Dot, typename E, int R>
static void nf4_more_tokens(const uint8_t* codes, long block_stride, const float* scales,
                            const Table& table, const typename Dot::X* x, long k, long n,
                            long num_tokens, const Output<E>& out) {
  switch (num_tokens) {
    case 4: return nf4_rows<Dot, E, R, 4>(codes, block_stride, scales, table, x, k, n, 0, out);
#if defined(__AVX512F__) || defined(__aarch64__)
    case 5: return nf4_rows<Dot, E, R, 5>(codes, block_stride, scales, table, x, k, n, 0, out);
    case 6: return nf4_rows<Dot, E, R, 6>(codes, block_stride, scales, table, x, k, n, 0, out);
#endif
  }
}

// Decodes rows of one group into numbers: E [num_rows, k].
template <class Dot, typename E>
static void decode_rows(const uint8_t* codes, long block_stride, const float* scales,
                        const Table& table, long k, long num_rows, E* out) {
  const long blocks = k / kBlock;
  for (long b = 0; b < blocks; b++, codes += block_stride) {
    for (long r = 0; r < num_rows; r++) {
      const auto scaled = Dot::scaled(table, scales[r * blocks + b]);
#pragma GCC unroll 16
      for (int v = 0; v < kBlock / Dot::step; v++)
        Dot::keep(out + r * k + b * kBlock + v * Dot::step,
                  Dot::decode(scaled, codes + r * kRowBytes, v));
    }
    __builtin_prefetch(codes + kPrefetch);
    __builtin_prefetch(codes + kPrefetch + 64);
    __builtin_prefetch(codes + kPrefetch + 128);
    __builtin_prefetch(codes + kPrefetch + 192);
  }
}

// One call: slices side by side in y, cut into tasks of task_rows rows.
template <typename E>
struct LinearCall {
  const herd::Matrix* slices;
  int num_slices;
  const void* x;  // as Dot wants it
  long num_tokens;
  E* y;
  long y_stride;
  long task_rows;
};

template <class Dot, typename E>
static void nf4_task(const LinearCall<E>& call, const herd::Matrix& m, long first, long stop,
                     E* y) {
  const long k = m.in_features, blocks = k / kBlock, num_tokens = call.num_tokens;
  const typename Dot::X* x = (const typename Dot::X*)call.x;
  const Output<E> out = {y, call.y_stride, (const E*)m.bias};
  const Table table = load_table(m.codebook);
  float* scales = (float*)herd::scratch(herd::kScales, kRows * blocks * sizeof(float));
  const bool direct = num_tokens <= kDirectTokens;
  const bool is_few = num_tokens <= kFewTokens;  // multiply each group while it is in the first cache
  const long panel_rows = direct ? 0 : is_few ? kRows : stop - first;
  E* panel = (E*)herd::scratch(herd::kPanel, panel_rows * k * (long)sizeof(E));
  for (long n = first; n < stop; n += kRows) {
    const long rows = least(kRows, m.out_features - n);
    decode_scales(m, n, rows, scales);
    const uint8_t* codes = (const uint8_t*)m.data + n * (k / 2);
    const long stride = rows * kRowBytes;
    if (!direct) {
      decode_rows<Dot, E>(codes, stride, scales, table, k, rows, panel + (is_few ? 0 : n - first) * k);
      if (is_few) dense_panel<Dot, E>(panel, k, x, k, n, rows, num_tokens, out);
      continue;
    }
    long r = 0;
    if (num_tokens <= 3) {
      if (rows == kRows && kTileRows == 4) {
        nf4_tokens<Dot, E, kRows>(codes, stride, scales, table, x, k, n, num_tokens, out);
        r = kRows;
      }
      for (; r + 2 <= rows; r += 2)
        nf4_tokens<Dot, E, 2>(codes + r * kRowBytes, stride, scales + r * blocks, table, x, k,
                              n + r, num_tokens, out);
      for (; r < rows; r++)
        nf4_tokens<Dot, E, 1>(codes + r * kRowBytes, stride, scales + r * blocks, table, x, k,
                              n + r, num_tokens, out);
    } else {
      for (; r + kTileRows <= rows; r += kTileRows)
        nf4_more_tokens<Dot, E, kTileRows>(codes + r * kRowBytes, stride, scales + r * blocks,
                                           table, x, k, n + r, num_tokens, out);
      for (; r < rows; r++)
        nf4_more_tokens<Dot, E, 1>(codes + r * kRowBytes, stride, scales + r * blocks, table, x, k,
                                   n + r, num_tokens, out);
    }
  }
  if (!direct && !is_few)
    dense_panel<Dot, E>(panel, k, x, k, first, stop - first, num_tokens, out);
}

template <class Dot, typename E>
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
    if (m.codebook) return nf4_task<Dot, E>(call, m, first, stop, y);
    const long k = m.in_features;
    const typename Dot::X* x = (const typename Dot::X*)call.x;
    const Output<E> out = {y, call.y_stride, (const E*)m.bias, m.nested_absmax};
    const long rows = stop - first;
    if (m.nested_absmax)
      dense_panel<Dot, E>((const int8_t*)m.data + first * k, k, x, k, first, rows, call.num_tokens,
                          out);
    else
      dense_panel<Dot, E>((const E*)m.data + first * k, k, x, k, first, rows, call.num_tokens, out);
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

// x [num_tokens, in_features], contiguous.
template <typename E>
static void linear(const herd::Matrix* slices, int num_slices, const E* x, long num_tokens, E* y,
                   long y_stride) {
  typedef typename Chosen<E>::Dot Dot;
  const long k = slices[0].in_features;
  long rows_in_all = 0;
  for (int i = 0; i < num_slices; i++) rows_in_all += slices[i].out_features;
  // About 32 KB of 4-bit codes for a few tokens; for many, a panel that stays in the second cache
  // while all tokens pass by, but tasks enough for every thread.
  long task_rows = num_tokens <= kDirectTokens ? 65536 / k : 131072 / k;
  if (num_tokens > 32) task_rows = 262144 / k;
  task_rows = least(task_rows, ceil_div(rows_in_all, 4L * herd::num_threads()));
  task_rows = most(kRows, task_rows / kRows * kRows);
  LinearCall<E> call = {slices, num_slices, Prepared<typename Dot::X, E>::of(x, num_tokens * k),
                        num_tokens, y, y_stride, task_rows};
  long tasks = 0;
  for (int i = 0; i < num_slices; i++) tasks += ceil_div(slices[i].out_features, task_rows);
  herd::run(linear_task<Dot, E>, &call, tasks);
}

template <typename E>
struct DequantizeCall {
  const herd::Matrix* m;
  E* out;
};

template <typename E>
static void dequantize_task(void* context, long task) {
  typedef typename Chosen<E>::Dot Dot;
  const DequantizeCall<E>& call = *(const DequantizeCall<E>*)context;
  const herd::Matrix& m = *call.m;
  const long k = m.in_features, blocks = k / kBlock, n = task * kRows;
  const long rows = least(kRows, m.out_features - n);
  float* scales = (float*)herd::scratch(herd::kScales, kRows * blocks * (long)sizeof(float));
  decode_scales(m, n, rows, scales);
  decode_rows<Dot, E>((const uint8_t*)m.data + n * (k / 2), rows * kRowBytes, scales,
                      load_table(m.codebook), k, rows, call.out + n * k);
}

// out [out_features, in_features].
template <typename E>
static void dequantize(const herd::Matrix* m, E* out) {
  DequantizeCall<E> call = {m, out};
  herd::run(dequantize_task<E>, &call, ceil_div(m->out_features, kRows));
}

}  // namespace HERD_ISA
