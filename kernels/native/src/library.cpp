// The library's entry points, and the choice of the instruction set.
#include <string.h>

#include "api.h"
#include "pool.h"

#define HERD_DECLARE(isa) \
  namespace isa {         \
  extern const herd::Kernels kernels; \
  }
HERD_BUILT_SETS(HERD_DECLARE)

namespace herd {

const float* dynamic_map = nullptr;
alignas(64) uint8_t dynamic_map_bytes[4][256];

namespace {

const Kernels* const kBuilt[] = {
#define HERD_ADDRESS(isa) &isa::kernels,
    HERD_BUILT_SETS(HERD_ADDRESS)};
const Kernels* chosen = nullptr;

bool can_run(const char* name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  if (!strcmp(name, "avx512_bf16"))
    return avx512 && __builtin_cpu_supports("avx512bf16") &&
           __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
  if (!strcmp(name, "avx512")) return avx512;
  if (!strcmp(name, "avx2")) return avx2;
#endif
  return true;  // NEON belongs to every 64-bit ARM
}

constexpr int kRows = 32;  // of a group in our layout (nf4.h)

// The low halves of a word's bytes, side by side in its lower 16 bits, and back.
uint32_t gather(uint32_t word) {
  word &= 0x0f0f0f0fu;
  word = (word | word >> 4) & 0x00ff00ffu;
  return (word | word >> 8) & 0xffffu;
}
uint32_t scatter(uint32_t word) {
  word = (word | word << 8) & 0x00ff00ffu;
  return (word | word << 4) & 0x0f0f0f0fu;
}

// One group of rows between the checkpoint's layout and ours.
struct Relayout {
  const uint32_t* from;
  uint32_t* to;
  long num_rows, row_words;
  bool is_back;
};

void relayout_task(void* context, long task) {
  const Relayout& call = *(const Relayout*)context;
  const long first = task * kRows;
  const long rows = call.num_rows - first < kRows ? call.num_rows - first : kRows;
  const uint32_t* from = call.from + first * call.row_words;
  uint32_t* to = call.to + first * call.row_words;
  for (long w = 0; w < call.row_words; w++)
    for (long r = 0; r < rows; r++) {
      const long stored = r * call.row_words + w, ours = w * rows + r;
      // Even columns are the high halves of the checkpoint's bytes, and the lower half of our word.
      if (call.is_back)
        to[stored] = scatter(from[ours] & 0xffffu) << 4 | scatter(from[ours] >> 16);
      else
        to[ours] = gather(from[stored] >> 4) | gather(from[stored]) << 16;
    }
}

}  // namespace
}  // namespace herd

#define HERD_EXPORT extern "C" __attribute__((visibility("default")))

// Names of the sets that this machine can run, best first, separated by blanks.
HERD_EXPORT const char* herd_instruction_sets() {
  static char names[256];
  names[0] = 0;
  for (const herd::Kernels* kernels : herd::kBuilt)
    if (herd::can_run(kernels->name)) {
      if (names[0]) strcat(names, " ");
      strcat(names, kernels->name);
    }
  return names;
}

// 1 if the set is there and can run. dynamic_map: float32 [256], kept.
HERD_EXPORT int herd_choose(const char* name, const float* dynamic_map) {
  for (const herd::Kernels* kernels : herd::kBuilt)
    if (!strcmp(kernels->name, name) && herd::can_run(name)) {
      herd::chosen = kernels;
      herd::dynamic_map = dynamic_map;
      for (int i = 0; i < 4 * 256; i++)
        herd::dynamic_map_bytes[i % 4][i / 4] = ((const uint8_t*)dynamic_map)[i];
      return 1;
    }
  return 0;
}

// Whether the chosen set has products of 8-bit activations.
HERD_EXPORT int herd_has_int8_activations() { return herd::chosen->has_int8_activations; }

HERD_EXPORT void herd_set_num_threads(int num_threads) { herd::set_num_threads(num_threads); }

HERD_EXPORT void herd_free_scratch() { herd::free_scratch(); }

HERD_EXPORT int herd_num_threads() { return herd::num_threads(); }

// Codes of a weight [num_rows, 2 * row_bytes]; from and to do not overlap.
HERD_EXPORT void herd_relayout(const uint8_t* from, uint8_t* to, long num_rows, long row_bytes,
                               int is_back) {
  herd::Relayout call = {(const uint32_t*)from, (uint32_t*)to, num_rows, row_bytes / 4, is_back != 0};
  herd::run(herd::relayout_task, &call, (num_rows + herd::kRows - 1) / herd::kRows);
}

HERD_EXPORT void herd_linear(int dtype, const herd::Matrix* slices, int num_slices, const void* x,
                             long num_tokens, void* y, long y_stride) {
  herd::chosen->linear(dtype, slices, num_slices, x, num_tokens, y, y_stride);
}

HERD_EXPORT void herd_dequantize(int dtype, const herd::Matrix* matrix, void* out) {
  herd::chosen->dequantize(dtype, matrix, out);
}

HERD_EXPORT void herd_read(const void* from, long num_bytes) {
  herd::chosen->read(from, num_bytes);
}

HERD_EXPORT void herd_rms_norm(int dtype, const void* x, const void* weight, float eps,
                               long num_rows, long size, void* out) {
  herd::chosen->rms_norm(dtype, x, weight, eps, num_rows, size, out);
}

HERD_EXPORT void herd_add_rms_norm(int dtype, const void* x, const void* residual,
                                   const void* weight, float eps, long num_rows, long size,
                                   void* out, void* sums) {
  herd::chosen->add_rms_norm(dtype, x, residual, weight, eps, num_rows, size, out, sums);
}

HERD_EXPORT void herd_rotate(int dtype, const void* x, long x_stride, const float* cos,
                             const float* sin, long num_tokens, long num_heads, long head_dim,
                             void* out) {
  herd::chosen->rotate(dtype, x, x_stride, cos, sin, num_tokens, num_heads, head_dim, out);
}

HERD_EXPORT void herd_silu_and_mul(int dtype, const void* gate_up, long num_tokens, long size,
                                   void* out) {
  herd::chosen->silu_and_mul(dtype, gate_up, num_tokens, size, out);
}

HERD_EXPORT void herd_write_kv(int dtype, const void* k, const void* v, long k_stride,
                               long v_stride, void* k_cache, void* v_cache, const int64_t* slots,
                               long num_tokens, long size) {
  herd::chosen->write_kv(dtype, k, v, k_stride, v_stride, k_cache, v_cache, slots, num_tokens,
                         size);
}

HERD_EXPORT void herd_attention(int dtype, const herd::Attention* call) {
  herd::chosen->attention(dtype, call);
}

HERD_EXPORT void herd_add_lora(int dtype, void* y, long y_stride, const void* x, long num_tokens,
                               long in_features, const herd::LoraSlice* slices, long num_slices,
                               const herd::LoraTokens* tokens) {
  herd::chosen->add_lora(dtype, y, y_stride, x, num_tokens, in_features, slices, num_slices,
                         tokens);
}

HERD_EXPORT void herd_rms_norm_backward(int dtype, const void* x, const void* weight,
                                        const void* grad, float eps, long num_rows, long size,
                                        void* out) {
  herd::chosen->rms_norm_backward(dtype, x, weight, grad, eps, num_rows, size, out);
}

HERD_EXPORT void herd_silu_and_mul_backward(int dtype, const void* gate_up, const void* grad,
                                            long num_tokens, long size, void* out) {
  herd::chosen->silu_and_mul_backward(dtype, gate_up, grad, num_tokens, size, out);
}

HERD_EXPORT void herd_label_logps(int dtype, void* logits, long num_rows, long size,
                                  const int64_t* labels, float factor, const float* slopes,
                                  float* logps, uint8_t* is_correct) {
  herd::chosen->label_logps(dtype, logits, num_rows, size, labels, factor, slopes, logps,
                            is_correct);
}

HERD_EXPORT void herd_decode(const herd::Decoder* decoder, const herd::Step* step) {
  herd::chosen->decode(decoder, step);
}
