// Scales of 4-bit weights: 8-bit codes of a map, times a scale of their own for each 256, plus an offset.
#pragma once
#include "api.h"
#include "simd.h"

namespace HERD_ISA {

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

}  // namespace HERD_ISA
