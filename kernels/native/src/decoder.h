// All layers of a step in one call: what engine/layers.py does operation by operation, with the same
// operations and so the same bits, without returning to Python in between.
#pragma once
#include "attention.h"
#include "linear.h"
#include "lora.h"
#include "rows.h"

namespace HERD_ISA {

template <typename E>
struct Running {
  const herd::Decoder& decoder;
  const herd::Step& step;

  // y = projection `index` (of 4) of a layer, adapters included.
  void project(const herd::Projection& projection, long layer, long index, const E* x, E* y,
               long y_stride) const {
    linear(projection.slices, (int)projection.num_slices, x, step.num_tokens, y, y_stride);
    if (!step.adapters) return;
    const herd::LoraSlice* slices = step.adapters[4 * layer + index];
    if (slices)
      add_lora(y, y_stride, x, step.num_tokens, (long)projection.slices[0].in_features, slices,
               step.num_adapted[4 * layer + index], &step.tokens);
  }

  void run() const {
    const herd::Decoder& d = decoder;
    const long num_tokens = step.num_tokens, hidden_size = d.hidden_size;
    const long q_size = d.num_heads * d.head_dim, kv_size = d.num_kv_heads * d.head_dim;
    const long qkv_size = q_size + 2 * kv_size, inner = d.intermediate_size;
    const long wide = most(qkv_size + q_size, 3 * inner);
    E* residual = (E*)herd::scratch(
        herd::kStep, num_tokens * (2 * hidden_size + wide) * (long)sizeof(E) + 256);
    E* x = residual + num_tokens * hidden_size;
    E* qkv = x + num_tokens * hidden_size;  // [num_tokens, qkv_size], then attended
    E* attended = qkv + num_tokens * qkv_size;
    E* gate_up = qkv;
    E* activated = gate_up + num_tokens * 2 * inner;
    E* hidden = (E*)step.hidden;
    for (long i = 0; i < d.num_layers; i++) {
      const herd::Layer& layer = d.layers[i];
      if (i == 0) {
        memcpy(residual, hidden, num_tokens * hidden_size * sizeof(E));
        rms_norm(hidden, (const E*)layer.input_norm, d.eps, num_tokens, hidden_size, x);
      } else {
        add_rms_norm(hidden, residual, (const E*)layer.input_norm, d.eps, num_tokens, hidden_size,
                     x, residual);
      }
      project(layer.qkv, i, 0, x, qkv, qkv_size);
      E* k = qkv + q_size;
      if (layer.q_norm && layer.k_norm)
        for_rows(num_tokens, qkv_size, [&](long first, long stop) {
          for (long t = first; t < stop; t++) {
            for (long h = 0; h < d.num_heads; h++) {
              E* head = qkv + t * qkv_size + h * d.head_dim;
              rms_norm_row(head, (const E*)layer.q_norm, d.eps, d.head_dim, head);
            }
            for (long h = 0; h < d.num_kv_heads; h++) {
              E* head = k + t * qkv_size + h * d.head_dim;
              rms_norm_row(head, (const E*)layer.k_norm, d.eps, d.head_dim, head);
            }
          }
        });
      // Queries and keys lie side by side: one rotation for both.
      rotate(qkv, qkv_size, step.cos, step.sin, num_tokens, d.num_heads + d.num_kv_heads,
             d.head_dim, qkv, qkv_size);
      E* k_cache = (E*)step.caches[2 * i];
      E* v_cache = (E*)step.caches[2 * i + 1];
      write_kv(k, k + kv_size, qkv_size, qkv_size, k_cache, v_cache, step.slot_mapping, num_tokens,
               kv_size);
      const herd::Attention call = {
          qkv, k_cache, v_cache, attended, step.block_tables, step.context_lens, step.cu_seqlens_q,
          qkv_size, q_size, step.table_stride, step.num_seqs, d.num_heads, d.num_kv_heads,
          d.head_dim, step.block_size, layer.sliding_window, d.scale};
      attention<E>(call);
      project(layer.o, i, 1, attended, hidden, hidden_size);
      add_rms_norm(hidden, residual, (const E*)layer.post_norm, d.eps, num_tokens, hidden_size, x,
                   residual);
      project(layer.gate_up, i, 2, x, gate_up, 2 * inner);
      silu_and_mul(gate_up, num_tokens, inner, activated);
      project(layer.down, i, 3, activated, hidden, hidden_size);
    }
    add_rms_norm(hidden, residual, (const E*)d.norm, d.eps, num_tokens, hidden_size, hidden,
                 residual);
  }
};

}  // namespace HERD_ISA
