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
  dense_panel<Dot, E>((const E*)pair.a + first * k, k, c.x + start * k, k, first, stop - first,
                      c.starts[group + 1] - start, out);
}

// y += scale * (down b^T) for one adapter, slice and share of the columns.
template <typename E>
static void lora_up_task(void* context, long task) {
  const LoraCall<E>& c = *(const LoraCall<E>*)context;
  const long group = task / (c.num_slices * c.pieces), slice = task / c.pieces % c.num_slices;
  const herd::LoraSlice& part = c.slices[slice];
  const herd::LoraPair& pair = part.rows[c.groups[group]];
  if (!pair.a) return;
  const long width = part.stop - part.start, rank = pair.rank;
  const long share = ceil_div(ceil_div(width, c.pieces), 4) * 4;
  const long first = least(width, task % c.pieces * share), stop = least(width, first + share);
  for (long row = c.starts[group]; row < c.starts[group + 1]; row++) {
    const long token = c.order[row];
    const E* down = c.down + row * c.down_stride + c.columns[slice];
    const float scale = c.tokens->scales[token];
    E* y = c.y + token * c.y_stride + part.start;
    for (long n = first; n < stop; n += 4) {
      const long count = least(4, stop - n);
      Vec acc[4];
      for (int i = 0; i < 4; i++) acc[i] = splat(0.0f);
      for (long r = 0; r < rank; r += Vec::N) {
        const Vec weight = load_some(down + r, rank - r);
        for (long i = 0; i < count; i++)
          acc[i] = fma(load_some((const E*)pair.b + (n + i) * rank + r, rank - r), weight, acc[i]);
      }
      float totals[4];
      sums(acc[0], acc[1], acc[2], acc[3], totals);
      for (long i = 0; i < count; i++) {
        E update;
        set(&update, totals[i]);
        const float scaled = to_float(update) * scale;
        set(y + n + i, to_float(y[n + i]) + scaled);
      }
    }
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
