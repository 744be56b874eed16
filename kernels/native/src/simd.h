// Vectors of float32 for each instruction set, with one set of names; all algorithms are written in
// these. Which set is meant says the build: HERD_ISA is the namespace, and so each is compiled into
// names of its own. No header with inline functions of others is used beyond this point: the linker
// would be free to take the copy that the newest instructions were compiled into.
#pragma once
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace HERD_ISA {

struct bf16 {
  uint16_t bits;
};

static inline float to_float(bf16 x) {
  uint32_t word = (uint32_t)x.bits << 16;
  float value;
  memcpy(&value, &word, 4);
  return value;
}
static inline float to_float(float x) { return x; }

// Round to nearest, ties to even, as torch does.
static inline void set(bf16* out, float value) {
  uint32_t word;
  memcpy(&word, &value, 4);
  const uint32_t is_nan = -(uint32_t)((word & 0x7fffffffu) > 0x7f800000u);
  const uint32_t rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
  out->bits = (uint16_t)((rounded & ~is_nan) | (0x7fc0 & is_nan));
}
static inline void set(float* out, float value) { *out = value; }
static inline void set_four(float* out, const float* values) { memcpy(out, values, 16); }
#if defined(__AVX2__)
static inline void set_four(bf16* out, const float* values) {
  const __m128 four = _mm_loadu_ps(values);
  const __m128i word = _mm_castps_si128(four);
  const __m128i odd = _mm_and_si128(_mm_srli_epi32(word, 16), _mm_set1_epi32(1));
  const __m128i sum = _mm_add_epi32(_mm_add_epi32(word, _mm_set1_epi32(0x7fff)), odd);
  const __m128i is_nan = _mm_castps_si128(_mm_cmpunord_ps(four, four));
  const __m128i bits = _mm_blendv_epi8(_mm_srli_epi32(sum, 16), _mm_set1_epi32(0x7fc0), is_nan);
  _mm_storel_epi64((__m128i*)out, _mm_packus_epi32(bits, bits));
}
#else
static inline void set_four(bf16* out, const float* values) {
  for (int i = 0; i < 4; i++) set(out + i, values[i]);
}
#endif

static constexpr long least(long a, long b) { return a < b ? a : b; }
static constexpr long most(long a, long b) { return a > b ? a : b; }
constexpr long ceil_div(long a, long b) { return (a + b - 1) / b; }

constexpr int kBlock = 64;  // columns that share a scale; every width is a multiple of it

// ---------------------------------------------------------------------------------------------
#if defined(__AVX512F__)

struct Vec {
  static constexpr int N = 16;
  __m512 v;
};
static inline Vec splat(float x) { return {_mm512_set1_ps(x)}; }
static inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
static inline Vec load(const int8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))};
}
static inline Vec load(const bf16* p) {
  const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(words, 16))};
}
static inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
static inline Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
static inline Vec larger(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
static inline Vec smaller(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
static inline __m256 halved(Vec a) {
  return _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
}
static inline float maximum(Vec a) { return _mm512_reduce_max_ps(a.v); }
static inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
static inline __m512i rounded_words(Vec a) {  // a bfloat16 in the upper half of each word
  const __m512i word = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(word, 16), _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(word, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return _mm512_mask_mov_epi32(sum, nan, _mm512_set1_epi32(0x7fc00000));
}
static inline void store(bf16* p, Vec a) {
  const __m512i words = _mm512_srli_epi32(rounded_words(a), 16);
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(words));
}
static inline Vec round_to_bf16(Vec a) {
  const __m512i mask = _mm512_set1_epi32((int)0xffff0000u);
  return {_mm512_castsi512_ps(_mm512_and_si512(rounded_words(a), mask))};
}
// a * 2^n for whole numbers n.
static inline Vec scale_by_power(Vec a, Vec n) { return {_mm512_scalef_ps(a.v, n.v)}; }
static inline Vec nearest_whole(Vec a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}

struct Words {
  __m512i v;
};
static inline Words load_words(const void* p) { return {_mm512_loadu_si512(p)}; }
// Codes of the columns start .. start + N of a row, one in the lowest 4 bits of each word.
static inline Words codes_of_row(const uint32_t* row, int start) {
  const __m512i shifts = _mm512_setr_epi32(0, 16, 4, 20, 8, 24, 12, 28, 0, 16, 4, 20, 8, 24, 12, 28);
  const __m512i which = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
  const __m128i two = _mm_loadl_epi64((const __m128i*)(row + start / 8));
  const __m512i words = _mm512_permutexvar_epi32(which, _mm512_castsi128_si512(two));
  return {_mm512_srlv_epi32(words, shifts)};
}

struct Table {
  Vec part[1];
};
// The table's values for 4 bits of each word, from bit `shift` on.
static inline Vec look_up(const Table& table, Words codes, int shift) {
  const __m512i index = shift ? _mm512_srli_epi32(codes.v, shift) : codes.v;
  return {_mm512_permutexvar_ps(index, table.part[0].v)};  // reads 4 bits of each index
}

// ---------------------------------------------------------------------------------------------
#elif defined(__AVX2__)

struct Vec {
  static constexpr int N = 8;
  __m256 v;
};
static inline Vec splat(float x) { return {_mm256_set1_ps(x)}; }
static inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
static inline Vec load(const int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)))};
}
static inline Vec load(const bf16* p) {
  const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(words, 16))};
}
static inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
static inline Vec operator-(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
static inline Vec operator*(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
static inline Vec operator/(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
static inline Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
static inline Vec larger(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
static inline Vec smaller(Vec a, Vec b) { return {_mm256_min_ps(a.v, b.v)}; }
static inline __m256 halved(Vec a) { return a.v; }
static inline float maximum(Vec a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
}
static inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
static inline __m256i rounded_words(Vec a) {
  const __m256i word = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(word, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(word, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(sum, _mm256_set1_epi32(0x7fc00000), nan);
}
static inline void store(bf16* p, Vec a) {
  const __m256i words = _mm256_srli_epi32(rounded_words(a), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(packed));
}
static inline Vec round_to_bf16(Vec a) {
  const __m256i mask = _mm256_set1_epi32((int)0xffff0000u);
  return {_mm256_castsi256_ps(_mm256_and_si256(rounded_words(a), mask))};
}
static inline Vec scale_by_power(Vec a, Vec n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127));
  return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)))};
}
static inline Vec nearest_whole(Vec a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}

struct Words {
  __m256i v;
};
static inline Words load_words(const void* p) { return {_mm256_loadu_si256((const __m256i*)p)}; }
static inline Words codes_of_row(const uint32_t* row, int start) {
  const __m256i shifts = _mm256_setr_epi32(0, 16, 4, 20, 8, 24, 12, 28);
  return {_mm256_srlv_epi32(_mm256_set1_epi32((int)row[start / 8]), shifts)};
}

struct Table {
  Vec part[2];
};
static inline Vec look_up(const Table& table, Words codes, int shift) {
  const __m256i index = shift ? _mm256_srli_epi32(codes.v, shift) : codes.v;
  const __m256 low = _mm256_permutevar8x32_ps(table.part[0].v, index);  // reads 3 bits
  const __m256 high = _mm256_permutevar8x32_ps(table.part[1].v, index);
  const __m256 bit_3 = _mm256_castsi256_ps(_mm256_slli_epi32(codes.v, 28 - shift));
  return {_mm256_blendv_ps(low, high, bit_3)};
}

// ---------------------------------------------------------------------------------------------
#elif defined(__ARM_NEON) && defined(__aarch64__)

struct Vec {
  static constexpr int N = 4;
  float32x4_t v;
};
static inline Vec splat(float x) { return {vdupq_n_f32(x)}; }
static inline Vec load(const float* p) { return {vld1q_f32(p)}; }
static inline Vec load(const int8_t* p) {
  int32_t four;
  memcpy(&four, p, 4);
  const int16x8_t words = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)));
  return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(words)))};
}
static inline Vec load(const bf16* p) {
  return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16((const uint16_t*)p), 16))};
}
static inline Vec operator+(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
static inline Vec operator-(Vec a, Vec b) { return {vsubq_f32(a.v, b.v)}; }
static inline Vec operator*(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
static inline Vec operator/(Vec a, Vec b) { return {vdivq_f32(a.v, b.v)}; }
static inline Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
static inline Vec larger(Vec a, Vec b) { return {vmaxq_f32(a.v, b.v)}; }
static inline Vec smaller(Vec a, Vec b) { return {vminq_f32(a.v, b.v)}; }
static inline void sums(Vec a, Vec b, Vec c, Vec d, float* out) {
  vst1q_f32(out, vpaddq_f32(vpaddq_f32(a.v, b.v), vpaddq_f32(c.v, d.v)));
}
static inline float maximum(Vec a) { return vmaxvq_f32(a.v); }
static inline void store(float* p, Vec a) { vst1q_f32(p, a.v); }
static inline uint32x4_t rounded_words(Vec a) {
  const uint32x4_t word = vreinterpretq_u32_f32(a.v);
  const uint32x4_t odd = vandq_u32(vshrq_n_u32(word, 16), vdupq_n_u32(1));
  const uint32x4_t sum = vaddq_u32(vaddq_u32(word, vdupq_n_u32(0x7fff)), odd);
  return vbslq_u32(vceqq_f32(a.v, a.v), sum, vdupq_n_u32(0x7fc00000));
}
static inline void store(bf16* p, Vec a) {
  vst1_u16((uint16_t*)p, vshrn_n_u32(rounded_words(a), 16));
}
static inline Vec round_to_bf16(Vec a) {
  return {vreinterpretq_f32_u32(vandq_u32(rounded_words(a), vdupq_n_u32(0xffff0000u)))};
}
static inline Vec scale_by_power(Vec a, Vec n) {
  const int32x4_t exponent = vaddq_s32(vcvtnq_s32_f32(n.v), vdupq_n_s32(127));
  return {vmulq_f32(a.v, vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)))};
}
static inline Vec nearest_whole(Vec a) { return {vrndnq_f32(a.v)}; }

struct Words {
  uint32x4_t v;
};
static inline Words load_words(const void* p) { return {vld1q_u32((const uint32_t*)p)}; }
static inline Words codes_of_row(const uint32_t* row, int start) {
  const int32_t shifts[4] = {0, -16, -4, -20};  // to the right
  return {vshlq_u32(vdupq_n_u32(row[start / 8] >> (start % 8 ? 8 : 0)), vld1q_s32(shifts))};
}

struct Table {
  Vec part[4];
};
static inline Vec look_up(const Table& table, Words codes, int shift) {
  const uint32x4_t shifted = vshlq_u32(codes.v, vdupq_n_s32(-shift));
  uint32x4_t index = vandq_u32(shifted, vdupq_n_u32(15));
  // Each value is four bytes of the table: byte 4 i + k for k of 0..3.
  index = vmlaq_u32(vdupq_n_u32(0x03020100u), index, vdupq_n_u32(0x04040404u));
  uint8x16x4_t values;
  for (int i = 0; i < 4; i++) values.val[i] = vreinterpretq_u8_f32(table.part[i].v);
  return {vreinterpretq_f32_u8(vqtbl4q_u8(values, vreinterpretq_u8_u32(index)))};
}

// ---------------------------------------------------------------------------------------------
#else  // plain C++, which compilers turn into whatever vectors there are

struct Vec {
  static constexpr int N = 8;
  float v[N];
};
#define HERD_EACH(expression)                     \
  Vec out;                                        \
  for (int i = 0; i < Vec::N; i++) out.v[i] = expression; \
  return out;
static inline Vec splat(float x) { HERD_EACH(x) }
static inline Vec load(const float* p) { HERD_EACH(p[i]) }
static inline Vec load(const int8_t* p) { HERD_EACH((float)p[i]) }
static inline Vec load(const bf16* p) { HERD_EACH(to_float(p[i])) }
static inline Vec operator+(Vec a, Vec b) { HERD_EACH(a.v[i] + b.v[i]) }
static inline Vec operator-(Vec a, Vec b) { HERD_EACH(a.v[i] - b.v[i]) }
static inline Vec operator*(Vec a, Vec b) { HERD_EACH(a.v[i] * b.v[i]) }
static inline Vec operator/(Vec a, Vec b) { HERD_EACH(a.v[i] / b.v[i]) }
static inline Vec fma(Vec a, Vec b, Vec c) { HERD_EACH(a.v[i] * b.v[i] + c.v[i]) }
static inline Vec larger(Vec a, Vec b) { HERD_EACH(a.v[i] > b.v[i] ? a.v[i] : b.v[i]) }
static inline Vec smaller(Vec a, Vec b) { HERD_EACH(a.v[i] < b.v[i] ? a.v[i] : b.v[i]) }
static inline float sum_of_lanes(const float* v) {
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}
static inline void sums(Vec a, Vec b, Vec c, Vec d, float* out) {
  out[0] = sum_of_lanes(a.v);
  out[1] = sum_of_lanes(b.v);
  out[2] = sum_of_lanes(c.v);
  out[3] = sum_of_lanes(d.v);
}
static inline float maximum(Vec a) {
  float found = a.v[0];
  for (int i = 1; i < Vec::N; i++) found = a.v[i] > found ? a.v[i] : found;
  return found;
}
static inline void store(float* p, Vec a) {
  for (int i = 0; i < Vec::N; i++) p[i] = a.v[i];
}
static inline void store(bf16* p, Vec a) {
  for (int i = 0; i < Vec::N; i++) set(p + i, a.v[i]);
}
static inline float rounded_float(float value) {
  bf16 out;
  set(&out, value);
  return to_float(out);
}
static inline Vec round_to_bf16(Vec a) { HERD_EACH(rounded_float(a.v[i])) }
static inline float power_of_two(float n) {
  uint32_t word = (uint32_t)((int)n + 127) << 23;
  float value;
  memcpy(&value, &word, 4);
  return value;
}
static inline Vec scale_by_power(Vec a, Vec n) { HERD_EACH(a.v[i] * power_of_two(n.v[i])) }
static inline Vec nearest_whole(Vec a) { HERD_EACH((float)(int)(a.v[i] + (a.v[i] < 0 ? -0.5f : 0.5f))) }

struct Words {
  uint32_t v[Vec::N];
};
static inline Words load_words(const void* p) {
  Words out;
  memcpy(&out, p, sizeof out);
  return out;
}
static inline Words codes_of_row(const uint32_t* row, int start) {
  Words out;
  for (int i = 0; i < Vec::N; i++) out.v[i] = row[start / 8] >> (i % 2 * 16 + i / 2 * 4);
  return out;
}

struct Table {
  Vec part[2];
};
static inline Vec look_up(const Table& table, Words codes, int shift) {
  HERD_EACH(table.part[(codes.v[i] >> shift & 15) >> 3].v[codes.v[i] >> shift & 7])
}
#undef HERD_EACH
#endif

#if defined(__AVX2__)
// The lanes of four vectors added up, each in one fixed order.
static inline void sums(Vec a, Vec b, Vec c, Vec d, float* out) {
  const __m256 ha = halved(a), hb = halved(b), hc = halved(c), hd = halved(d);
  const __m256 ab = _mm256_add_ps(_mm256_permute2f128_ps(ha, hb, 0x20),
                                  _mm256_permute2f128_ps(ha, hb, 0x31));
  const __m256 cd = _mm256_add_ps(_mm256_permute2f128_ps(hc, hd, 0x20),
                                  _mm256_permute2f128_ps(hc, hd, 0x31));
  const __m256d abd = _mm256_castps_pd(ab), cdd = _mm256_castps_pd(cd);
  const __m256 pairs = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(abd, cdd)),
                                     _mm256_castpd_ps(_mm256_unpackhi_pd(abd, cdd)));
  const __m256 all = _mm256_add_ps(pairs, _mm256_movehdup_ps(pairs));  // a . c . | b . d .
  const __m128 ac = _mm_permute_ps(_mm256_castps256_ps128(all), 0x08);
  const __m128 bd = _mm_permute_ps(_mm256_extractf128_ps(all, 1), 0x08);
  _mm_storeu_ps(out, _mm_unpacklo_ps(ac, bd));
}
#endif

// Rows of 16 words become columns; strides are in words.
#if defined(__AVX512F__)
static inline void transpose_words(const uint32_t* in, long in_stride, uint32_t* out,
                                   long out_stride) {
  __m512i rows[16], pairs[16], fours[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) rows[i] = _mm512_loadu_si512(in + i * in_stride);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    fours[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
    fours[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
    fours[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
    fours[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
  }
  // fours[4 q + c]: in its quarter L, rows 4 q .. 4 q + 3 of column 4 L + c.
#pragma GCC unroll 4
  for (int c = 0; c < 4; c++) {
    const __m512i even_low = _mm512_shuffle_i32x4(fours[c], fours[4 + c], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(fours[c], fours[4 + c], 0xdd);
    const __m512i even_high = _mm512_shuffle_i32x4(fours[8 + c], fours[12 + c], 0x88);
    const __m512i odd_high = _mm512_shuffle_i32x4(fours[8 + c], fours[12 + c], 0xdd);
    _mm512_storeu_si512(out + c * out_stride, _mm512_shuffle_i32x4(even_low, even_high, 0x88));
    _mm512_storeu_si512(out + (4 + c) * out_stride, _mm512_shuffle_i32x4(odd_low, odd_high, 0x88));
    _mm512_storeu_si512(out + (8 + c) * out_stride,
                        _mm512_shuffle_i32x4(even_low, even_high, 0xdd));
    _mm512_storeu_si512(out + (12 + c) * out_stride,
                        _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd));
  }
}
#else
static inline void transpose_words(const uint32_t* in, long in_stride, uint32_t* out,
                                   long out_stride) {
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 16; j++) out[i * out_stride + j] = in[j * in_stride + i];
}
#endif

static inline float sum(Vec a) {
  float out[4];
  sums(a, a, a, a, out);
  return out[0];
}

// e^x to about one unit in the last place, for x limited to what float32 can say; NaN stays NaN,
// because minima and maxima of these sets give their second operand then.
static inline Vec exponential(Vec x) {
  const Vec limited = larger(splat(-87.3f), smaller(splat(88.0f), x));
  const Vec n = nearest_whole(limited * splat(1.44269504f));
  // ln 2 in two parts, the first exact in few bits: r = x - n ln 2 keeps its last bits.
  Vec r = fma(n, splat(-0.693359375f), limited);
  r = fma(n, splat(2.12194440e-4f), r);
  Vec p = splat(1.0f / 5040);
  p = fma(p, r, splat(1.0f / 720));
  p = fma(p, r, splat(1.0f / 120));
  p = fma(p, r, splat(1.0f / 24));
  p = fma(p, r, splat(1.0f / 6));
  p = fma(p, r, splat(0.5f));
  p = fma(p, r, splat(1.0f));
  p = fma(p, r, splat(1.0f));
  return scale_by_power(p, n);
}

}  // namespace HERD_ISA
