// Causal attention over the paged cache. Numerics as kernels/paged_attention.py: float32 throughout.
// A row, one query head of one token, meets its keys in splits of kKeys positions counted from 0,
// each split from its first visible key to its last. Rows that are handled together share loads and
// nothing else, so a row's bits do not depend on which these are.
#pragma once
#include "api.h"
#include "rows.h"

namespace HERD_ISA {

constexpr long kKeys = 64;
constexpr long kAttentionRows = 32;  // rows of a task, unless one token has more
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kQueries = 4;  // rows that share the loads of four keys; AVX2 has 16 registers
#else
constexpr int kQueries = 2;
#endif

template <typename E>
struct AttentionCall {
  const herd::Attention* a;
  long queries_at_once;
  const long* first_tasks;  // [num_seqs + 1], prefix sums
};

// acc[r] += p[r][j] * values[j] for keys first .. stop, in this order for every element.
template <int R>
static inline void add_values(const float* p, const float* values, long head_dim, long first,
                              long stop, float* acc) {
  constexpr int D = 4;  // vectors of a head at a time
  for (long d = 0; d < head_dim; d += D * Vec::N) {
    const long width = least(D, (head_dim - d) / Vec::N);
    if (width == D) {
      Vec sums[R][D];
      for (int r = 0; r < R; r++)
        for (int i = 0; i < D; i++) sums[r][i] = load(acc + r * head_dim + d + i * Vec::N);
      for (long j = first; j < stop; j++) {
        Vec v[D];
        for (int i = 0; i < D; i++) v[i] = load(values + j * head_dim + d + i * Vec::N);
        for (int r = 0; r < R; r++) {
          const Vec weight = splat(p[r * kKeys + j]);
          for (int i = 0; i < D; i++) sums[r][i] = fma(weight, v[i], sums[r][i]);
        }
      }
      for (int r = 0; r < R; r++)
        for (int i = 0; i < D; i++) store(acc + r * head_dim + d + i * Vec::N, sums[r][i]);
    } else {
      for (long i = 0; i < width; i++)
        for (int r = 0; r < R; r++) {
          float* to = acc + r * head_dim + d + i * Vec::N;
          Vec total = load(to);
          for (long j = first; j < stop; j++)
            total = fma(splat(p[r * kKeys + j]), load(values + j * head_dim + d + i * Vec::N),
                        total);
          store(to, total);
        }
    }
  }
}

// Four scores each of R queries, side by side, with four keys.
template <int R>
static inline void four_scores(const float* queries, const float* keys, long head_dim, float* out) {
  Vec acc[R][4];
#pragma GCC unroll 4
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) acc[r][i] = splat(0.0f);
  for (long d = 0; d < head_dim; d += Vec::N) {
    Vec k[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) k[i] = load(keys + i * head_dim + d);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const Vec q = load(queries + r * head_dim + d);
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) acc[r][i] = fma(q, k[i], acc[r][i]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) sums(acc[r][0], acc[r][1], acc[r][2], acc[r][3], out + r * kKeys);
}

// Positions first .. stop of a sequence, widened: float32 [kKeys, head_dim] from position `split`.
template <typename E>
static void gather(const herd::Attention& a, const void* cache, const int32_t* table, long kv_head,
                   long split, long first, long stop, float* out) {
  const long slot_size = a.num_kv_heads * a.head_dim;
  for (long position = first; position < stop; position++) {
    const long block = table[position / a.block_size];
    const E* from = (const E*)cache +
                    (block * a.block_size + position % a.block_size) * slot_size +
                    kv_head * a.head_dim;
    float* to = out + (position - split) * a.head_dim;
    // The next head, most likely this thread's next task, lies behind this one.
    for (long d = 0; d < a.head_dim; d += 64 / (long)sizeof(E))
      __builtin_prefetch(from + a.head_dim + d);
    for (long d = 0; d < a.head_dim; d += Vec::N) store(to + d, load(from + d));
  }
}

template <typename E>
static void attention_task(void* context, long task) {
  const AttentionCall<E>& call = *(const AttentionCall<E>*)context;
  const herd::Attention& a = *call.a;
  long seq = 0;
  while (call.first_tasks[seq + 1] <= task) seq++;
  const long index = task - call.first_tasks[seq];
  const long kv_head = index % a.num_kv_heads, chunk = index / a.num_kv_heads;
  const long group = a.num_heads / a.num_kv_heads, head_dim = a.head_dim;
  const long first_token = a.cu_seqlens_q[seq], num_new = a.cu_seqlens_q[seq + 1] - first_token;
  const long query = chunk * call.queries_at_once;
  const long num_queries = least(call.queries_at_once, num_new - query);
  const long num_rows = num_queries * group;
  const long first_position = a.context_lens[seq] - num_new + query;
  const int32_t* table = a.block_tables + seq * a.table_stride;

  float* memory = (float*)herd::scratch(
      herd::kAttention,
      (2 * kKeys * head_dim + num_rows * (2 * head_dim + kKeys + 2)) * (long)sizeof(float));
  float* keys = memory;
  float* values = keys + kKeys * head_dim;
  float* queries = values + kKeys * head_dim;  // [num_rows, head_dim], times the scale
  float* acc = queries + num_rows * head_dim;  // [num_rows, head_dim]
  float* p = acc + num_rows * head_dim;        // [num_rows, kKeys]
  float* maxima = p + num_rows * kKeys;
  float* totals = maxima + num_rows;
  for (long r = 0; r < num_rows; r++) {
    const E* q = (const E*)a.q + (first_token + query + r / group) * a.q_stride +
                 (kv_head * group + r % group) * head_dim;
    for (long d = 0; d < head_dim; d += Vec::N) {
      store(queries + r * head_dim + d, load(q + d) * splat(a.scale));
      store(acc + r * head_dim + d, splat(0.0f));
    }
    maxima[r] = -1e30f;
    totals[r] = 0.0f;
  }
  const long reach = a.sliding_window > 0 ? a.sliding_window : (long)1 << 40;
  const long last_position = first_position + num_queries - 1;
  const long earliest = most(0, first_position - reach + 1);
  for (long split = earliest / kKeys * kKeys; split <= last_position; split += kKeys) {
    const long needed = most(split, earliest), end = least(split + kKeys, last_position + 1);
    gather<E>(a, a.k_cache, table, kv_head, split, needed, end, keys);
    gather<E>(a, a.v_cache, table, kv_head, split, needed, end, values);
    // Of all rows with all keys that a row can see, in fours filled up with zeros; what a single
    // row cannot see is dropped after.
    const long start = (needed - split) / 4 * 4, last = ceil_div(end - split, 4) * 4;
    for (long j = start; j < needed - split; j++) memset(keys + j * head_dim, 0, head_dim * 4);
    for (long j = end - split; j < last; j++) memset(keys + j * head_dim, 0, head_dim * 4);
    for (long j = start; j < last; j += 4) {
      long r = 0;
      for (; r + kQueries <= num_rows; r += kQueries)
        four_scores<kQueries>(queries + r * head_dim, keys + j * head_dim, head_dim,
                              p + r * kKeys + j);
      for (; r < num_rows; r++)
        four_scores<1>(queries + r * head_dim, keys + j * head_dim, head_dim, p + r * kKeys + j);
    }
    for (long r = 0; r < num_rows; r++) {
      const long position = first_position + r / group;
      const long from = most(0, position - reach + 1 - split);
      const long to = least(kKeys, position + 1 - split);
      if (from >= to) continue;
      float* scores = p + r * kKeys;
      for (long j = 0; j < from; j++) scores[j] = -3e38f;
      for (long j = to; j < kKeys; j++) scores[j] = -3e38f;
      Vec found = splat(maxima[r]);
      for (long j = 0; j < kKeys; j += Vec::N) found = larger(found, load(scores + j));
      const float shift = maximum(found);
      Vec total = splat(0.0f);
      for (long j = 0; j < kKeys; j += Vec::N) {
        const Vec weight = exponential(load(scores + j) - splat(shift));
        store(scores + j, weight);
      }
      for (long j = 0; j < from; j++) scores[j] = 0.0f;
      for (long j = to; j < kKeys; j++) scores[j] = 0.0f;
      for (long j = 0; j < kKeys; j += Vec::N) total = total + load(scores + j);
      float lanes[Vec::N];
      store(lanes, exponential(splat(maxima[r] - shift)));
      const float shrink = lanes[0];
      totals[r] = totals[r] * shrink + sum(total);
      maxima[r] = shift;
      for (long d = 0; d < head_dim; d += Vec::N)
        store(acc + r * head_dim + d, load(acc + r * head_dim + d) * splat(shrink));
    }
    for (long r = 0; r < num_rows; r += 4) {
      const long rows = least(4, num_rows - r);
      long froms[4], tos[4], from = 0, to = kKeys;
      for (long i = 0; i < rows; i++) {
        const long position = first_position + (r + i) / group;
        froms[i] = most(0, position - reach + 1 - split);
        tos[i] = most(froms[i], least(kKeys, position + 1 - split));
        from = most(from, froms[i]);
        to = least(to, tos[i]);
      }
      float* weights = p + r * kKeys;
      float* out = acc + r * head_dim;
      if (rows == 4 && from < to) {
        for (long i = 0; i < 4; i++)
          add_values<1>(weights + i * kKeys, values, head_dim, froms[i], from, out + i * head_dim);
        add_values<4>(weights, values, head_dim, from, to, out);
        for (long i = 0; i < 4; i++)
          add_values<1>(weights + i * kKeys, values, head_dim, to, tos[i], out + i * head_dim);
      } else {
        for (long i = 0; i < rows; i++)
          add_values<1>(weights + i * kKeys, values, head_dim, froms[i], tos[i],
                        out + i * head_dim);
      }
    }
  }
  for (long r = 0; r < num_rows; r++) {
    E* to = (E*)a.out + (first_token + query + r / group) * a.out_stride +
            (kv_head * group + r % group) * head_dim;
    for (long d = 0; d < head_dim; d += Vec::N)
      store(to + d, load(acc + r * head_dim + d) / splat(totals[r]));
  }
}

template <typename E>
static void attention(const herd::Attention& a) {
  const long group = a.num_heads / a.num_kv_heads;
  const long queries_at_once = most(1, kAttentionRows / group);
  long* first_tasks =
      (long*)herd::scratch(herd::kTasks, (a.num_seqs + 1) * (long)sizeof(long));
  first_tasks[0] = 0;
  for (long seq = 0; seq < a.num_seqs; seq++) {
    const long num_new = a.cu_seqlens_q[seq + 1] - a.cu_seqlens_q[seq];
    first_tasks[seq + 1] =
        first_tasks[seq] + ceil_div(num_new, queries_at_once) * a.num_kv_heads;
  }
  AttentionCall<E> call = {&a, queries_at_once, first_tasks};
  herd::run(attention_task<E>, &call, first_tasks[a.num_seqs]);
}

// k, v: rows of num_kv_heads * head_dim elements.
template <typename E>
static void write_kv(const E* k, const E* v, long k_stride, long v_stride, E* k_cache, E* v_cache,
                     const int64_t* slots, long num_tokens, long size) {
  for (long t = 0; t < num_tokens; t++) {
    if (slots[t] < 0) continue;
    memcpy(k_cache + slots[t] * size, k + t * k_stride, size * sizeof(E));
    memcpy(v_cache + slots[t] * size, v + t * v_stride, size * sizeof(E));
  }
}

}  // namespace HERD_ISA
