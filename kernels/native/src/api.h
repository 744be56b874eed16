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
  int32_t int8_activations;   // 4-bit, the same for all slices: round x to 8 bits (nf4_int8.h)
};

// One adapter's low-rank pair for one slice: y += scale * (x a^T) b^T. Dtype: the activations'.
struct LoraPair {
  const void* a;  // [rank, in], or null: the adapter leaves the slice alone
  const void* b;  // transposed: [rank, stop - start]
  int64_t rank;
};

// What the adapters do to columns start .. stop of a projection's output.
struct LoraSlice {
  const LoraPair* rows;  // [num_rows], by lora index
  int64_t start, stop;
};

// The adapters of a step's tokens.
struct LoraTokens {
  const int32_t* indices;  // [num_tokens], -1 = none
  const float* scales;     // [num_tokens]
  int64_t num_rows;        // of the pool
};

struct Attention {
  const void* q;
  const void* k_cache;  // [num_blocks, block_size, num_kv_heads, head_dim]
  const void* v_cache;
  void* out;
  const int32_t* block_tables;  // [num_seqs, table_stride]
  const int32_t* context_lens;  // [num_seqs]
  const int32_t* cu_seqlens_q;  // [num_seqs + 1]
  int64_t q_stride, out_stride, table_stride, num_seqs;
  int64_t num_heads, num_kv_heads, head_dim, block_size;
  int64_t sliding_window;  // 0: none
  float scale;
};

// The decoder, described once.
struct Projection {
  const Matrix* slices;
  int64_t num_slices;
};
struct Layer {
  Projection qkv, o, gate_up, down;
  const void* input_norm;   // [hidden_size]
  const void* post_norm;
  const void* q_norm;       // [head_dim], or null, as k_norm
  const void* k_norm;
  int64_t sliding_window;   // 0: none
};
struct Decoder {
  const Layer* layers;
  const void* norm;
  int64_t dtype, num_layers, hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim;
  float eps, scale;
};

// One step of it.
struct Step {
  void* hidden;  // [num_tokens, hidden_size]: embedded tokens in, the last norm's output back
  const float* cos;  // [num_tokens, head_dim / 2]
  const float* sin;
  const int64_t* slot_mapping;  // [num_tokens]
  const int32_t* block_tables;
  const int32_t* context_lens;
  const int32_t* cu_seqlens_q;
  void* const* caches;              // [2 * num_layers]: k_cache, v_cache of each layer
  const LoraSlice* const* adapters; // [4 * num_layers] by projection, null where there is none; or
                                    // null without adapters
  const int64_t* num_adapted;       // [4 * num_layers]: slices of each
  LoraTokens tokens;
  int64_t num_tokens, num_seqs, table_stride, block_size;
};

extern const float* dynamic_map;  // [256], what the 8-bit code of a scale stands for
extern uint8_t dynamic_map_bytes[4][256];  // the same, byte by byte, the lowest first; aligned

// The operations of one instruction set. x is contiguous; strides are in elements.
struct Kernels {
  const char* name;
  bool has_int8_activations;
  void (*linear)(int32_t dtype, const Matrix* slices, int num_slices, const void* x,
                 long num_tokens, void* y, long y_stride);
  void (*dequantize)(int32_t dtype, const Matrix* matrix, void* out);
  void (*rms_norm)(int32_t dtype, const void* x, const void* weight, float eps, long num_rows,
                   long size, void* out);
  void (*add_rms_norm)(int32_t dtype, const void* x, const void* residual, const void* weight,
                       float eps, long num_rows, long size, void* out, void* sums);
  void (*rotate)(int32_t dtype, const void* x, long x_stride, const float* cos, const float* sin,
                 long num_tokens, long num_heads, long head_dim, void* out);
  void (*silu_and_mul)(int32_t dtype, const void* gate_up, long num_tokens, long size, void* out);
  void (*write_kv)(int32_t dtype, const void* k, const void* v, long k_stride, long v_stride,
                   void* k_cache, void* v_cache, const int64_t* slots, long num_tokens, long size);
  void (*attention)(int32_t dtype, const Attention* call);
  void (*add_lora)(int32_t dtype, void* y, long y_stride, const void* x, long num_tokens,
                   long in_features, const LoraSlice* slices, long num_slices,
                   const LoraTokens* tokens);
  void (*rms_norm_backward)(int32_t dtype, const void* x, const void* weight, const void* grad,
                            float eps, long num_rows, long size, void* out);
  void (*silu_and_mul_backward)(int32_t dtype, const void* gate_up, const void* grad,
                                long num_tokens, long size, void* out);
  void (*label_logps)(int32_t dtype, void* logits, long num_rows, long size, const int64_t* labels,
                      float factor, const float* slopes, float* logps, uint8_t* is_correct);
  void (*decode)(const Decoder* decoder, const Step* step);
  void (*read)(const void* from, long num_bytes);
};

}  // namespace herd
