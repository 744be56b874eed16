// Low-rank updates for a batch in which every token names its own adapter. Tokens of one adapter are
// brought together; each token's sums run over its own adapter's rank, in one order.
#pragma once
#include "linear.h"
#include "rows.h"

namespace HERD_ISA {

template <typename E>
struct LoraCall {
  E* y;
  long y_stride;
  const typename Chosen<E>::Dot::X* x;  // [num_adapted, in], tokens of one adapter together
  long in_features;
  const herd::LoraSlice* slices;
  long num_slices;
  const herd::LoraTokens* tokens;
  const int32_t* order;   // [num_adapted]: the token of each row of x
  const long* starts;     // [num_groups + 1]: rows of x by adapter
  const int32_t* groups;  // [num_groups]: lora index
  E* down;                // [num_adapted, down_stride]: x a^T of all slices
  long down_stride;
  const long* columns;    // [num_slices]: where a slice's part of down begins
  long num_groups;
  long pieces;            // of a slice's work
};

// down = x a^T for one adapter, slice and share of the rank.
template <typename E>
static void lora_down_task(void* context, long task) {
  typedef typename Chosen<E>::Dot Dot;
  const LoraCall<E>& c = *(const LoraCall<E>*)context;
  const long group = task / (c.num_slices * c.pieces), slice = task / c.pieces % c.num_slices;
  const herd::LoraPair& pair = c.slices[slice].rows[c.groups[group]];
  if (!pair.a) return;
  const long share = ceil_div(ceil_div(pair.rank, c.pieces), kTileRows) * kTileRows;
  const long first = least(pair.rank, task % c.pieces * share);
  const long stop = least(pair.rank, first + share);
  if (first == stop) return;
  const long start = c.starts[group], k = c.in_features;
  const Output<E> out = {c.down + start * c.down_stride + c.columns[slice], c.down_stride, nullptr};
  dense_panel<Dot, E>((const E*)pair.a + first * k, c.x + start * k, k, k, first, stop - first,
                      c.starts[group + 1] - start, out);
}

// Elements of a row of b ahead: rows lie too far apart for the processor to foresee them all.
constexpr long kAhead = 256;

// Up to T tokens and C vectors of columns: the sums run over the rank, from its beginning to its end.
template <typename E, int T, int C>
static inline void lora_up_tile(const LoraCall<E>& c, const herd::LoraPair& pair, long width,
                                long row, const E* down, E* y, long n) {
  Vec sums[T][C];
#pragma GCC unroll 4
  for (int t = 0; t < T; t++)
#pragma GCC unroll 4
    for (int i = 0; i < C; i++) sums[t][i] = splat(0.0f);
  const E* b = (const E*)pair.b + n;
  for (long r = 0; r < pair.rank; r++, b += width) {
    Vec weights[C];
#pragma GCC unroll 4
    for (int i = 0; i < C; i++) weights[i] = load(b + i * Vec::N);
    for (int i = 0; i < C; i += 2) __builtin_prefetch(b + i * Vec::N + kAhead);
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) {
      const Vec factor = splat(to_float(down[t * c.down_stride + r]));
#pragma GCC unroll 4
      for (int i = 0; i < C; i++) sums[t][i] = fma(factor, weights[i], sums[t][i]);
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < T; t++) {
    const long token = c.order[row + t];
    const Vec scale = splat(c.tokens->scales[token]);
    E* to = y + token * c.y_stride + n;
#pragma GCC unroll 4
    for (int i = 0; i < C; i++)
      store(to + i * Vec::N, load(to + i * Vec::N) + rounded(sums[t][i], down) * scale);
  }
}

// The columns that fill no vector.
template <typename E>
static void lora_up_rest(const LoraCall<E>& c, const herd::LoraPair& pair, long width, long row,
                         const E* down, E* y, long n, long stop) {
  const long token = c.order[row];
  for (; n < stop; n++) {
    float total = 0.0f;
    const E* b = (const E*)pair.b + n;
    for (long r = 0; r < pair.rank; r++)
      total = __builtin_fmaf(to_float(down[r]), to_float(b[r * width]), total);
    E update, *to = y + token * c.y_stride + n;
    set(&update, total);
    const float scaled = to_float(update) * c.tokens->scales[token];
    set(to, to_float(*to) + scaled);
  }
}

// y += scale * (down b^T) for one adapter, slice and share of the columns.
template <typename E>
static void lora_up_task(void* context, long task) {
  constexpr int T = 4, C = 2;
  const LoraCall<E>& c = *(const LoraCall<E>*)context;
  const long group = task / (c.num_slices * c.pieces), slice = task / c.pieces % c.num_slices;
  const herd::LoraSlice& part = c.slices[slice];
  const herd::LoraPair& pair = part.rows[c.groups[group]];
  if (!pair.a) return;
  const long width = part.stop - part.start, step = C * Vec::N;
  const long share = ceil_div(ceil_div(width, c.pieces), step) * step;
  const long first = least(width, task % c.pieces * share), stop = least(width, first + share);
  E* y = c.y + part.start;
  for (long row = c.starts[group]; row < c.starts[group + 1];) {
    const E* down = c.down + row * c.down_stride + c.columns[slice];
    const bool is_full = row + T <= c.starts[group + 1];
    long n = first;
    for (; !is_full && n + 2 * step <= stop; n += 2 * step)
      lora_up_tile<E, 1, 2 * C>(c, pair, width, row, down, y, n);
    for (; n + step <= stop; n += step) {
      if (is_full)
        lora_up_tile<E, T, C>(c, pair, width, row, down, y, n);
      else
        lora_up_tile<E, 1, C>(c, pair, width, row, down, y, n);
    }
    for (int t = 0; t < (is_full ? T : 1); t++)
      lora_up_rest(c, pair, width, row + t, down + t * c.down_stride, y, n, stop);
    row += is_full ? T : 1;
  }
}

template <typename E>
static void add_lora(E* y, long y_stride, const E* x, long num_tokens, long in_features,
                     const herd::LoraSlice* slices, long num_slices,
                     const herd::LoraTokens* tokens) {
  typedef typename Chosen<E>::Dot Dot;
  const long num_rows = tokens->num_rows;
  // Count the tokens of each adapter, then put their numbers one adapter after another.
  long down_stride = 0;
  long* memory = (long*)herd::scratch(
      herd::kTasks, (2 * num_rows + 2 + num_slices) * (long)sizeof(long) +
                        (num_tokens + num_rows) * (long)sizeof(int32_t));
  long* starts = memory;                  // [num_rows + 1]
  long* next = starts + num_rows + 1;     // [num_rows]
  long* columns = next + num_rows + 1;    // [num_slices]
  int32_t* order = (int32_t*)(columns + num_slices);
  int32_t* groups = order + num_tokens;
  for (long s = 0; s < num_slices; s++) {
    long largest = 0;
    for (long i = 0; i < num_rows; i++)
      if (slices[s].rows[i].a) largest = most(largest, slices[s].rows[i].rank);
    columns[s] = down_stride;
    down_stride += largest;
  }
  for (long i = 0; i < num_rows; i++) next[i] = 0;
  for (long t = 0; t < num_tokens; t++)
    if (tokens->indices[t] >= 0) next[tokens->indices[t]]++;
  long num_groups = 0, total = 0;
  for (long i = 0; i < num_rows; i++) {
    if (!next[i]) continue;
    groups[num_groups] = (int32_t)i;
    starts[num_groups++] = total;
    const long count = next[i];
    next[i] = total;
    total += count;
  }
  starts[num_groups] = total;
  if (!total || !down_stride) return;
  bool in_order = total == num_tokens;
  for (long t = 0; t < num_tokens; t++) {
    const int32_t index = tokens->indices[t];
    if (index < 0) continue;
    in_order = in_order && next[index] == t;
    order[next[index]++] = (int32_t)t;
  }
  char* buffers = (char*)herd::scratch(
      herd::kLora, (total * (in_features + down_stride) + 64) * (long)sizeof(E));
  E* gathered = (E*)buffers;
  E* down = gathered + total * in_features;
  if (!in_order)
    for (long row = 0; row < total; row++)
      memcpy(gathered + row * in_features, x + order[row] * in_features, in_features * sizeof(E));
  const E* rows = in_order ? x : gathered;
  // Small products are shared between threads only as far as it pays.
  const long work = total * in_features * down_stride;
  const long pieces = least(work < 100000 ? 1 : 4, 4);
  LoraCall<E> call = {y, y_stride, Prepared<typename Dot::X, E>::of(rows, total * in_features),
                      in_features, slices, num_slices, tokens, order, starts, groups, down,
                      down_stride, columns, num_groups, pieces};
  herd::run(lora_down_task<E>, &call, num_groups * num_slices * pieces);
  call.pieces = 8;
  herd::run(lora_up_task<E>, &call, num_groups * num_slices * call.pieces);
}

}  // namespace HERD_ISA
