// What Python hands over: plain structures, mirrored in kernels/native/library.py field by field.
#pragma once
#include <stdint.h>

namespace herd {

enum Dtype : int32_t { kFloat32 = 0, kBfloat16 = 1 };

// One slice of a fused projection: y = x W^T + bias.
struct Matrix {
  const void* data;           // 4-bit: packed codes, interleaved (see linear.h); else [out, in]
  const uint8_t* codes;       // u8 [num_groups], double quantisation; null: scales in nested_absmax
  const float* nested_absmax; // 4-bit: [ceil(num_groups / 256)], or [num_groups] without codes;
                              // 8-bit: a scale for each row [out]; dense: null
  const float* codebook;      // [16]; null: dense of the activations' dtype, or int8 with scales
  const void* bias;           // [out] of the activations' dtype, or null
  float nested_offset;
  int32_t out_features;
  int32_t in_features;        // a multiple of 64, and of group_size
  int32_t group_size;         // a multiple of 64
};

extern const float* dynamic_map;  // [256], what the 8-bit code of a scale stands for

// The operations of one instruction set. x is contiguous; strides are in elements.
struct Kernels {
  const char* name;
  void (*linear)(int32_t dtype, const Matrix* slices, int num_slices, const void* x,
                 long num_tokens, void* y, long y_stride);
  void (*dequantize)(int32_t dtype, const Matrix* matrix, void* out);
  void (*read)(const void* from, long num_bytes);
};

}  // namespace herd
