// All operations of one instruction set; compiled once for each, HERD_ISA being its name.
#include "linear.h"

namespace HERD_ISA {

static void linear_any(int32_t dtype, const herd::Matrix* slices, int num_slices, const void* x,
                       long num_tokens, void* y, long y_stride) {
  if (dtype == herd::kBfloat16)
    linear(slices, num_slices, (const bf16*)x, num_tokens, (bf16*)y, y_stride);
  else
    linear(slices, num_slices, (const float*)x, num_tokens, (float*)y, y_stride);
}

static void dequantize_any(int32_t dtype, const herd::Matrix* matrix, void* out) {
  if (dtype == herd::kBfloat16)
    dequantize(matrix, (bf16*)out);
  else
    dequantize(matrix, (float*)out);
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
    for (int j = 0; j < 8; j++)
      found[j] = larger(found[j], load(call.from + i + j * Vec::N));
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

extern const herd::Kernels kernels;
const herd::Kernels kernels = {HERD_TEXT(HERD_ISA), linear_any, dequantize_any, read_all};

}  // namespace HERD_ISA
