// All operations of one instruction set; compiled once for each, HERD_ISA being its name.
#include "decoder.h"
#include "training.h"

namespace HERD_ISA {

using herd::Kernels;

// An operation for whichever dtype is asked for: CALL is written with E.
#define HERD_FOR(dtype, CALL)          \
  do {                                 \
    if ((dtype) == herd::kBfloat16) {  \
      typedef bf16 E;                  \
      CALL;                            \
    } else {                           \
      typedef float E;                 \
      CALL;                            \
    }                                  \
  } while (0)

static void linear_any(int32_t dtype, const herd::Matrix* slices, int num_slices, const void* x,
                       long num_tokens, void* y, long y_stride) {
  HERD_FOR(dtype, linear(slices, num_slices, (const E*)x, num_tokens, (E*)y, y_stride));
}

static void dequantize_any(int32_t dtype, const herd::Matrix* matrix, void* out) {
  HERD_FOR(dtype, dequantize(matrix, (E*)out));
}

static void rms_norm_any(int32_t dtype, const void* x, const void* weight, float eps,
                         long num_rows, long size, void* out) {
  HERD_FOR(dtype, rms_norm((const E*)x, (const E*)weight, eps, num_rows, size, (E*)out));
}

static void add_rms_norm_any(int32_t dtype, const void* x, const void* residual,
                             const void* weight, float eps, long num_rows, long size, void* out,
                             void* sums) {
  HERD_FOR(dtype, add_rms_norm((const E*)x, (const E*)residual, (const E*)weight, eps, num_rows,
                               size, (E*)out, (E*)sums));
}

static void rotate_any(int32_t dtype, const void* x, long x_stride, const float* cos,
                       const float* sin, long num_tokens, long num_heads, long head_dim,
                       void* out) {
  HERD_FOR(dtype, rotate((const E*)x, x_stride, cos, sin, num_tokens, num_heads, head_dim,
                         (E*)out, num_heads * head_dim));
}

static void silu_and_mul_any(int32_t dtype, const void* gate_up, long num_tokens, long size,
                             void* out) {
  HERD_FOR(dtype, silu_and_mul((const E*)gate_up, num_tokens, size, (E*)out));
}

static void write_kv_any(int32_t dtype, const void* k, const void* v, long k_stride, long v_stride,
                         void* k_cache, void* v_cache, const int64_t* slots, long num_tokens,
                         long size) {
  HERD_FOR(dtype, write_kv((const E*)k, (const E*)v, k_stride, v_stride, (E*)k_cache, (E*)v_cache,
                           slots, num_tokens, size));
}

static void attention_any(int32_t dtype, const herd::Attention* call) {
  HERD_FOR(dtype, attention<E>(*call));
}

static void add_lora_any(int32_t dtype, void* y, long y_stride, const void* x, long num_tokens,
                         long in_features, const herd::LoraSlice* slices, long num_slices,
                         const herd::LoraTokens* tokens) {
  HERD_FOR(dtype, add_lora((E*)y, y_stride, (const E*)x, num_tokens, in_features, slices,
                           num_slices, tokens));
}

static void rms_norm_backward_any(int32_t dtype, const void* x, const void* weight,
                                  const void* grad, float eps, long num_rows, long size,
                                  void* out) {
  HERD_FOR(dtype, rms_norm_backward((const E*)x, (const E*)weight, (const E*)grad, eps, num_rows,
                                    size, (E*)out));
}

static void silu_and_mul_backward_any(int32_t dtype, const void* gate_up, const void* grad,
                                      long num_tokens, long size, void* out) {
  HERD_FOR(dtype, silu_and_mul_backward((const E*)gate_up, (const E*)grad, num_tokens, size,
                                        (E*)out));
}

static void label_logps_any(int32_t dtype, void* logits, long num_rows, long size,
                            const int64_t* labels, float factor, const float* slopes, float* logps,
                            uint8_t* is_correct) {
  HERD_FOR(dtype, label_logps((E*)logits, num_rows, size, labels, factor, slopes, logps,
                              is_correct));
}

static void decode_any(const herd::Decoder* decoder, const herd::Step* step) {
  HERD_FOR(decoder->dtype, (Running<E>{*decoder, *step}.run()));
}

// Reads memory and does next to nothing with it: the speed that weights could be streamed at.
struct Reading {
  const float* from;
  long size;
};
static void read_task(void* context, long task) {
  const Reading& call = *(const Reading*)context;
  const long start = task * 65536, stop = least(start + 65536, call.size);
  Vec found[8];
  for (int j = 0; j < 8; j++) found[j] = splat(0.0f);
  for (long i = start; i + 8 * Vec::N <= stop; i += 8 * Vec::N) {
    for (int j = 0; j < 8; j++) found[j] = larger(found[j], load(call.from + i + j * Vec::N));
  }
  for (int j = 1; j < 8; j++) found[0] = larger(found[0], found[j]);
  volatile float kept = maximum(found[0]);
  (void)kept;
}
static void read_all(const void* from, long num_bytes) {
  Reading call = {(const float*)from, num_bytes / 4};
  herd::run(read_task, &call, ceil_div(call.size, 65536));
}

#define HERD_TEXT_OF(x) #x
#define HERD_TEXT(x) HERD_TEXT_OF(x)

extern const Kernels kernels;
const Kernels kernels = {
    HERD_TEXT(HERD_ISA),
#if defined(__AVX512VNNI__)
    true,
#else
    false,
#endif
    linear_any,   dequantize_any, rms_norm_any, add_rms_norm_any, rotate_any,
    silu_and_mul_any, write_kv_any, attention_any, add_lora_any, rms_norm_backward_any,
    silu_and_mul_backward_any, label_logps_any, decode_any, read_all,
};

}  // namespace HERD_ISA
