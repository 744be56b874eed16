// Products of tokens with 4-bit weight rows, and the rows dequantised.
//
// Layout        Rows in groups of 32 (the last may have fewer), a row to each lane of a vector: for
//               every 8 columns a word of 32 bits from each row, column 2 j in bits 4 j .. 4 j + 3 and
//               column 2 j + 1 sixteen bits above. A group is one stream from beginning to end.
// Arithmetic    The table's 16 values are rounded to x's dtype, multiplied with x and added up in
//               float32 over a block of 64 columns, in four sums: of the columns 0 and 1 of every 8,
//               2 and 3, and so on. The four are added in turn, and the scale is multiplied in once.
//               This rounds less than dequantising to 16 bits does, where every product of value and
//               scale is rounded. The order is the same for any number of tokens: how many of them
//               share a weight's decoding is a matter of speed alone.
#pragma once
#include "api.h"
#include "dense.h"
#include "pool.h"
#include "scales.h"
#include "simd.h"

namespace HERD_ISA {

constexpr int kRows = 32;                  // of a group
constexpr int kColumns = 8;                // of a word
constexpr int kWords = kBlock / kColumns;  // of a row in a block
constexpr int kWordBytes = kRows * 4;      // one word of each row
constexpr int kSums = 4;                   // of a block's products
constexpr long kPrefetch = 16384;          // bytes ahead in the stream

static inline Table load_table(const float* codebook) {
  Table table;
  for (int i = 0; i < 16 / Vec::N; i++) table.part[i] = load(codebook + i * Vec::N);
  return table;
}

// Keeps a vector in its register; compilers would rather load it again for each use, and loads are
// what these loops have least time for.
template <typename V>
static inline void keep(V& vector) {
#if defined(__AVX512F__)
  asm("" : "+v"(vector));
#elif defined(__AVX2__)
  asm("" : "+x"(vector));
#elif defined(__aarch64__)
  asm("" : "+w"(vector));
#else
  (void)vector;
#endif
}

// How codes and activations meet.
//   steps           look-ups that a word takes, kSums or twice as many
//   units_of_block  activations of a token for a block, in units of 32 bits
template <typename E>
struct Float32Codes {  // E: the activations' dtype
  typedef float X;     // activations are widened once per call
  typedef Vec V;       // one column
  typedef Table Values;
  static constexpr int steps = 8;
  static constexpr long units_of_block = kWords * steps;
  static inline Values values(const float* codebook) {
    Table table = load_table(codebook);
    if (sizeof(E) == 2)
      for (int i = 0; i < 16 / Vec::N; i++) table.part[i] = round_to_bf16(table.part[i]);
    return table;
  }
  static inline V weights(const Values& values, Words codes, int step) {
    return look_up(values, codes, step % 2 * 16 + step / 2 * 4);
  }
  static inline V activations(const uint32_t* x) {
    float one;
    memcpy(&one, x, 4);
    return splat(one);
  }
  static inline Vec mac(Vec acc, V w, V x) { return fma(w, x, acc); }
  // A row's block: out[kBlock].
  static inline void dequantize(const Table& table, float scale, const uint32_t* row, E* out) {
#pragma GCC unroll 16
    for (int start = 0; start < kBlock; start += Vec::N)
      store(out + start, look_up(table, codes_of_row(row, start), 0) * splat(scale));
  }
};

#if defined(__AVX512BF16__)
struct Bfloat16Codes {
  typedef bf16 X;
  typedef __m512bh V;  // two columns, side by side
  // 32 entries, the 16 values twice: an index has 5 bits then, and the fifth, the neighbour's, does
  // not matter.
  struct Values {
    __m512i v;
  };
  static constexpr int steps = 4;
  static constexpr long units_of_block = kWords * steps;
  static inline Values scaled(const Table& table, float scale) {
    const __m512 values = _mm512_mul_ps(table.part[0].v, _mm512_set1_ps(scale));
    return {(__m512i)_mm512_cvtne2ps_pbh(values, values)};
  }
  static inline Values values(const float* codebook) { return scaled(load_table(codebook), 1.0f); }
  static inline V weights(const Values& values, Words codes, int step) {
    const __m512i index = step ? _mm512_srli_epi16(codes.v, 4 * step) : codes.v;
    return (__m512bh)_mm512_permutexvar_epi16(index, values.v);
  }
  static inline V activations(const uint32_t* x) { return (__m512bh)_mm512_set1_epi32((int)*x); }
  static inline Vec mac(Vec acc, V w, V x) { return {_mm512_dpbf16_ps(acc.v, w, x)}; }
  static inline void dequantize(const Table& table, float scale, const uint32_t* row, bf16* out) {
    const __m512i values = scaled(table, scale).v;
    const __m512i which = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    const __m512i shifts = _mm512_broadcast_i32x4(
        _mm_setr_epi32(0, 4 << 16 | 4, 8 << 16 | 8, 12 << 16 | 12));
#pragma GCC unroll 2
    for (int start = 0; start < kBlock; start += 32) {
      const __m128i four = _mm_loadu_si128((const __m128i*)(row + start / kColumns));
      const __m512i words = _mm512_permutexvar_epi32(which, _mm512_castsi128_si512(four));
      const __m512i index = _mm512_srlv_epi16(words, shifts);
      _mm512_storeu_si512(out + start, _mm512_permutexvar_epi16(index, values));
    }
  }
};
#endif

// Tokens are multiplied kTokens at a time with kTogether vectors of rows: the most whose sums stay in
// registers, where one of a block's kSums is made after the other. With fewer tokens several are
// made at once.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTogether = 2, kTokens = 8;
#else
constexpr int kTogether = 1, kTokens = 8;
#endif
constexpr int sums_at_once(int num_vectors, int num_tokens) {
  const int size = num_vectors * num_tokens;
  return kTogether == 2 ? (size <= 6 ? 4 : size <= 10 ? 2 : 1) : (size <= 2 ? 4 : size <= 3 ? 2 : 1);
}

// R vectors of rows and T tokens over some blocks; specialised where codes meet 8-bit activations.
//   codes, scales  of the first vector, at the first block
//   x              [columns, T] units
//   totals         [T, R], what earlier blocks gave; this adds to it
template <class Codes, int R, int T>
struct Product {
  static void add(const uint8_t* codes, const float* scales, const typename Codes::Values& values,
                  const uint32_t* x, long blocks, Vec* totals);
};

template <class Codes, int R, int T>
void Product<Codes, R, T>::add(const uint8_t* codes, const float* scales,
                               const typename Codes::Values& values, const uint32_t* x,
                               long blocks, Vec* totals) {
  constexpr int C = sums_at_once(R, T), steps = Codes::steps / kSums;
  for (long b = 0; b < blocks; b++) {
    Vec sum[T][R];
#pragma GCC unroll 4
    for (int first = 0; first < kSums; first += C) {
      Vec part[C][T][R];
#pragma GCC unroll 4
      for (int c = 0; c < C; c++)
#pragma GCC unroll 12
        for (int t = 0; t < T; t++)
#pragma GCC unroll 2
          for (int r = 0; r < R; r++) part[c][t][r] = splat(0.0f);
#pragma GCC unroll 2
      for (int d = 0; d < kWords; d++) {
        Words words[R];
#pragma GCC unroll 2
        for (int r = 0; r < R; r++) {
          const uint8_t* from = codes + d * kWordBytes + r * sizeof(Words);
          words[r] = load_words(from);
          if (C > 1) keep(words[r].v);
          if (first == 0) __builtin_prefetch(from + kPrefetch);
        }
#pragma GCC unroll 8
        for (int c = 0; c < C; c++)
#pragma GCC unroll 2
          for (int i = 0; i < steps; i++) {
            const int step = (first + c) * steps + i;
            typename Codes::V w[R];
#pragma GCC unroll 2
            for (int r = 0; r < R; r++) w[r] = Codes::weights(values, words[r], step);
#pragma GCC unroll 12
            for (int t = 0; t < T; t++) {
              const auto activations = Codes::activations(x + (d * Codes::steps + step) * T + t);
#pragma GCC unroll 2
              for (int r = 0; r < R; r++)
                part[c][t][r] = Codes::mac(part[c][t][r], w[r], activations);
            }
          }
      }
#pragma GCC unroll 4
      for (int c = 0; c < C; c++)
#pragma GCC unroll 12
        for (int t = 0; t < T; t++)
#pragma GCC unroll 2
          for (int r = 0; r < R; r++)
            sum[t][r] = first + c == 0 ? part[c][t][r] : sum[t][r] + part[c][t][r];
    }
#pragma GCC unroll 2
    for (int r = 0; r < R; r++) {
      const Vec scale = load(scales + r * Vec::N);
#pragma GCC unroll 12
      for (int t = 0; t < T; t++) totals[t * R + r] = fma(sum[t][r], scale, totals[t * R + r]);
    }
    codes += kWords * kWordBytes;
    scales += kRows;
    x += Codes::units_of_block * T;
  }
}

// The same with the number of tokens known at run time.
template <class Codes, int R>
static void multiply_tokens(const uint8_t* codes, const float* scales,
                            const typename Codes::Values& values, const uint32_t* x, long blocks,
                            long num_tokens, Vec* totals) {
  switch (num_tokens) {
#define HERD_TOKENS(T) \
  case T: return Product<Codes, R, T>::add(codes, scales, values, x, blocks, totals);
    HERD_TOKENS(1)
    HERD_TOKENS(2)
    HERD_TOKENS(3)
    HERD_TOKENS(4)
    HERD_TOKENS(5)
    HERD_TOKENS(6)
    HERD_TOKENS(7)
    HERD_TOKENS(8)
#undef HERD_TOKENS
  }
}

// Activations as the kernel reads them: tiles of up to kTokens tokens side by side, [columns, T]
// units of 32 bits in each. A single token is that already.
struct Packing {
  const uint32_t* from;  // [num_tokens, units]
  uint32_t* to;
  long num_tokens, units;
};
// A token's units in memory: whole vectors.
static inline long padded_units(long units) { return ceil_div(units, 16) * 16; }
static inline long num_tiles(long num_tokens) { return ceil_div(num_tokens, kTokens); }
static inline long tile_start(long num_tokens, long tile) {
  return num_tokens * tile / num_tiles(num_tokens);
}
static void pack_task(void* context, long task) {
  const Packing& call = *(const Packing*)context;
  const long tiles = num_tiles(call.num_tokens), tile = task % tiles, first = task / tiles * 256;
  const long t = tile_start(call.num_tokens, tile), T = tile_start(call.num_tokens, tile + 1) - t;
  const uint32_t* from = call.from + t * call.units;
  uint32_t* to = call.to + t * call.units;
  for (long i = first; i < least(first + 256, call.units); i += 16) {
    uint32_t by_token[16][16], by_unit[16][16];
    for (long j = 0; j < T; j++) memcpy(by_token[j], from + j * call.units + i, 64);
    transpose_words(by_token[0], 16, by_unit[0], 16);
    for (long j = 0; j < 16; j++) memcpy(to + (i + j) * T, by_unit[j], T * sizeof(uint32_t));
  }
}
static const uint32_t* packed(const void* x, long num_tokens, long units) {
  if (num_tokens == 1) return (const uint32_t*)x;
  const long num_bytes = num_tokens * units * (long)sizeof(uint32_t);
  Packing call = {(const uint32_t*)x, (uint32_t*)herd::scratch(herd::kPacked, num_bytes),
                  num_tokens, units};
  herd::run(pack_task, &call, num_tiles(num_tokens) * ceil_div(units, 256));
  return call.to;
}

// A group's codes, [in / 8, kRows] words: where they are, or, of a last group with fewer rows, a copy
// that has zeros for the others.
static inline const uint8_t* group_codes(const herd::Matrix& m, long n) {
  const long rows = m.out_features - n, words = m.in_features / kColumns;
  const uint8_t* codes = (const uint8_t*)m.data + n * (m.in_features / 2);
  if (rows >= kRows) return codes;
  uint8_t* padded = (uint8_t*)herd::scratch(herd::kCodes, words * kWordBytes);
  memset(padded, 0, words * kWordBytes);
  for (long w = 0; w < words; w++) memcpy(padded + w * kWordBytes, codes + w * rows * 4, rows * 4);
  return padded;
}

static inline void prefetch(const void* from, long num_bytes) {
  for (long i = 0; i < num_bytes; i += 64) __builtin_prefetch((const uint8_t*)from + i);
}

// A group's scales, a row to each lane: [in / 64, kRows].
static inline const float* group_scales(const herd::Matrix& m, long n) {
  const long blocks = m.in_features / kBlock, size = ceil_div(blocks, 16) * 16 * kRows;
  float* by_row = (float*)herd::scratch(herd::kScales, (2 * size + 16) * (long)sizeof(float));
  float* lanes = by_row + size + 16;
  decode_scales(m, n, least(kRows, m.out_features - n), by_row);
  // The next group's come from memory too, in pieces too small to be guessed.
  const long groups = m.in_features / m.group_size, next = (n + kRows) * groups;
  prefetch(m.codes ? m.codes + next : (const uint8_t*)(m.nested_absmax + next),
           kRows * groups * (m.codes ? 1 : 4));
  if (m.codes) prefetch(m.nested_absmax + next / 256, 1);
  for (long b = 0; b < blocks; b += 16)  // what lies beyond the last block or row is never read
    for (long r = 0; r < kRows; r += 16)
      transpose_words((const uint32_t*)(by_row + r * blocks + b), blocks,
                      (uint32_t*)(lanes + b * kRows + r), kRows);
  return lanes;
}

// Rows first .. stop with all tokens. x: packed.
template <class Codes, typename E>
static void multiply_rows(const herd::Matrix& m, long first, long stop, const uint32_t* x,
                          long num_tokens, const Output<E>& out) {
  constexpr int R = kTogether;
  constexpr long units_of_block = Codes::units_of_block;
  const long blocks = m.in_features / kBlock, units = padded_units(blocks * units_of_block);
  const long tiles = num_tiles(num_tokens);
  // Columns at a time: so many that a tile's part of x stays in the first cache.
  const long stretch = most(1, 16384 / (units_of_block * 4 * ceil_div(num_tokens, tiles)));
  const typename Codes::Values values = Codes::values(m.codebook);
  Vec* totals = (Vec*)herd::scratch(herd::kTotals, num_tokens * R * (long)sizeof(Vec));
  for (long group = first; group < stop; group += kRows) {
    const uint8_t* codes = group_codes(m, group);
    const float* scales = group_scales(m, group);
    for (long lane = 0; lane < kRows && group + lane < stop; lane += R * Vec::N) {
      for (long i = 0; i < num_tokens * R; i++) totals[i] = splat(0.0f);
      for (long b = 0; b < blocks; b += stretch)
        for (long tile = 0; tile < tiles; tile++) {
          const long t = tile_start(num_tokens, tile), T = tile_start(num_tokens, tile + 1) - t;
          multiply_tokens<Codes, R>(codes + b * kWords * kWordBytes + lane * 4,
                                    scales + b * kRows + lane, values,
                                    x + t * units + b * units_of_block * T,
                                    least(stretch, blocks - b), T, totals + t * R);
        }
      for (long t = 0; t < num_tokens; t++)
        for (long r = 0; r < R; r++) {
          const long n = group + lane + r * Vec::N;
          if (n < stop) out.write_lanes(totals[t * R + r], n, stop - n, t);
        }
    }
  }
}

template <typename E>
struct DequantizeCall {
  const herd::Matrix* m;
  E* out;
};

// One group of rows.
template <class Codes, typename E>
static void dequantize_task(void* context, long task) {
  const DequantizeCall<E>& call = *(const DequantizeCall<E>*)context;
  const herd::Matrix& m = *call.m;
  const long k = m.in_features, blocks = k / kBlock, n = task * kRows;
  const long rows = least(kRows, m.out_features - n);
  const Table table = load_table(m.codebook);
  const uint32_t* codes = (const uint32_t*)group_codes(m, n);
  float* scales = (float*)herd::scratch(herd::kScales, kRows * blocks * (long)sizeof(float));
  decode_scales(m, n, rows, scales);
  constexpr long several = 8;  // blocks, whose words are brought into the order of rows
  alignas(64) uint32_t by_row[16][several * kWords], last[16][kRows];
  for (long first = 0; first < rows; first += 16)
    for (long b = 0; b < blocks; b += several) {
      const long stop = least(b + several, blocks);
      for (long i = b; i < stop; i += 2) {  // two blocks are 16 words
        const uint32_t* words = codes + i * kWords * kRows;
        if (i + 1 == blocks) words = (const uint32_t*)memcpy(last, words, sizeof last / 2);
        transpose_words(words + first, kRows, by_row[0] + (i - b) * kWords, several * kWords);
      }
      for (long r = first; r < least(first + 16, rows); r++)
        for (long i = b; i < stop; i++)
          Codes::dequantize(table, scales[r * blocks + i], by_row[r - first] + (i - b) * kWords,
                            call.out + (n + r) * k + i * kBlock);
    }
}

}  // namespace HERD_ISA
