// 4-bit weights times activations in 8 bits: twice the products of an instruction, at some cost in
// accuracy. For instruction sets with products of bytes.
//
// Activations   Of each token, 64 columns share a scale, their largest magnitude over 127.
// Weights       The table's values times 127, rounded, plus 128: one factor has to be without sign.
//               What the 128 add to a block's sum is taken off where the sum begins.
// Arithmetic    A block's sum is exact. It is multiplied with both scales and added up in float32
//               along k, in the same order for any number of tokens.
#pragma once
#include "nf4.h"

#if defined(__AVX512VNNI__)

namespace HERD_ISA {

struct Int8Codes {
  typedef __m512i Values;                                 // [16] bytes, four times
  static constexpr long units_of_block = kBlock / 4 + 2;  // bytes, where the sum begins, the scale
  static inline Values values(const float* codebook) {
    const __m512 numbers = _mm512_mul_ps(_mm512_loadu_ps(codebook), _mm512_set1_ps(127.0f));
    const __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(numbers), _mm512_set1_epi32(128));
    return _mm512_broadcast_i32x4(_mm512_cvtepi32_epi8(biased));
  }
};

// The low halves of a word's bytes are its columns 0, 4, 1 and 5, the high ones 2, 6, 3 and 7.
template <int R, int T>
struct Product<Int8Codes, R, T> {
  static void add(const uint8_t* codes, const float* scales, const __m512i& values,
                  const uint32_t* x, long blocks, Vec* totals) {
    constexpr int C = T == 1 ? 2 : 1;  // sums of a block made at once
    const __m512i low_half = _mm512_set1_epi8(15);
    for (long b = 0; b < blocks; b++) {
      const uint32_t* start = x + kBlock / 4 * T;
      const uint32_t* scale_of_x = start + T;
      __m512i part[C][T][R];
#pragma GCC unroll 8
      for (int t = 0; t < T; t++)
#pragma GCC unroll 2
        for (int r = 0; r < R; r++) {
          part[0][t][r] = _mm512_set1_epi32((int)start[t]);
          if (C > 1) part[C - 1][t][r] = _mm512_setzero_si512();
        }
#pragma GCC unroll 4
      for (int d = 0; d < kWords; d++) {
        __m512i w[2][R];
#pragma GCC unroll 2
        for (int r = 0; r < R; r++) {
          const uint8_t* from = codes + d * kWordBytes + r * sizeof(__m512i);
          __m512i words = _mm512_loadu_si512(from);
          keep(words);
          __builtin_prefetch(from + kPrefetch);
          const __m512i high = _mm512_and_si512(_mm512_srli_epi16(words, 4), low_half);
          w[0][r] = _mm512_shuffle_epi8(values, _mm512_and_si512(words, low_half));
          w[1][r] = _mm512_shuffle_epi8(values, high);
        }
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++)
#pragma GCC unroll 8
          for (int t = 0; t < T; t++) {
            const __m512i four = _mm512_set1_epi32((int)x[(2 * d + i) * T + t]);
#pragma GCC unroll 2
            for (int r = 0; r < R; r++)
              part[i % C][t][r] = _mm512_dpbusd_epi32(part[i % C][t][r], w[i][r], four);
          }
      }
#pragma GCC unroll 2
      for (int r = 0; r < R; r++) {
        const Vec scale = load(scales + r * Vec::N);
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
          __m512i sum = part[0][t][r];
          if (C > 1) sum = _mm512_add_epi32(sum, part[C - 1][t][r]);
          float own;
          memcpy(&own, scale_of_x + t, sizeof own);
          totals[t * R + r] = fma(Vec{_mm512_cvtepi32_ps(sum)} * splat(own), scale, totals[t * R + r]);
        }
      }
      codes += kWords * kWordBytes;
      scales += kRows;
      x += Int8Codes::units_of_block * T;
    }
  }
};

// A block of one token's activations: units_of_block units.
template <typename E>
static inline void round_block(const E* x, uint32_t* to) {
  Vec values[4], largest = splat(0.0f), faults = splat(0.0f);
  for (int i = 0; i < 4; i++) {
    values[i] = load(x + i * Vec::N);
    largest = larger(largest, {_mm512_abs_ps(values[i].v)});
    faults = fma(values[i], splat(0.0f), faults);  // NaN where one is not finite
  }
  const float top = maximum(largest);
  const Vec factor = splat(top > 0.0f ? 127.0f / top : 0.0f);
  alignas(64) int8_t bytes[kBlock];
  for (int i = 0; i < 4; i++)
    _mm_store_si128((__m128i*)bytes + i,
                    _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32((values[i] * factor).v)));
  const __m512i all = _mm512_load_si512(bytes);
  const __m512i sums = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), all);
  const __m128i order = _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
  _mm512_storeu_si512(to, _mm512_shuffle_epi8(all, _mm512_broadcast_i32x4(order)));
  to[16] = (uint32_t)(-128 * _mm512_reduce_add_epi32(sums));
  const float scale = top / (127.0f * 127.0f) + sum(faults);
  memcpy(to + 17, &scale, sizeof scale);
}

template <typename E>
struct Rounding {
  const E* from;  // [num_tokens, blocks * kBlock]
  uint32_t* to;   // [num_tokens, units]
  long blocks, units;
};
template <typename E>
static void round_task(void* context, long token) {
  const Rounding<E>& call = *(const Rounding<E>*)context;
  for (long b = 0; b < call.blocks; b++)
    round_block(call.from + (token * call.blocks + b) * kBlock,
                call.to + token * call.units + b * Int8Codes::units_of_block);
}
template <typename E>
static const uint32_t* rounded_to_bytes(const E* x, long num_tokens, long k) {
  const long blocks = k / kBlock, units = padded_units(blocks * Int8Codes::units_of_block);
  Rounding<E> call = {
      x, (uint32_t*)herd::scratch(herd::kActivations, num_tokens * units * sizeof(uint32_t)), blocks,
      units};
  herd::run(round_task<E>, &call, num_tokens);
  return packed(call.to, num_tokens, units);
}

}  // namespace HERD_ISA
#endif
