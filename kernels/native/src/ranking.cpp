// The nucleus' least of a row of probabilities, without sorting the row.
//
// Floats that are not negative are ordered as their bits are, so the upper bits name a bucket, and
// only the bucket in which the answer lies is sorted. The result is that of sorting it all.
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <functional>

#include "pool.h"

namespace herd {
namespace {

constexpr int kShift = 21;      // leaves the exponent and two bits of the mantissa
constexpr int kBuckets = 1024;  // of floats that are not negative
constexpr double kExact = 1L << 29;  // 53 bits of a double less 24 of a float

inline int bucket_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return (int)(bits >> kShift);
}

// The members of one bucket, the largest first; how many.
long sorted_bucket(const float* values, long count, int bucket, float* out) {
  long found = 0;
  for (long i = 0; i < count; i++)
    if (bucket_of(values[i]) == bucket) out[found++] = values[i];
  std::sort(out, out + found, std::greater<float>());
  return found;
}

// The first of the largest members with which their sum reaches top_p * total; the last of all where
// rounding keeps it below.
float nucleus_floor(const float* row, long size, double total, float top_p, float* found) {
  if (top_p >= 1.0f) return 0.0f;
  const double target = top_p * total;
  // Members of less weigh, all together, less than what the set may leave out.
  const float least = (float)((total - target) / (2 * size));
  long count = 0;
  for (long i = 0; i < size; i++) {
    found[count] = row[i];
    count += row[i] >= least;
  }
  float* in_order = found;
  double sum = 0.0;
  // Sums of such members have no rounding, so they may be taken bucket by bucket.
  if (total < least * kExact) {
    double sums[kBuckets] = {0.0};
    for (long i = 0; i < count; i++) sums[bucket_of(found[i])] += found[i];
    int bucket = kBuckets - 1, lowest = bucket_of(least);
    for (; bucket > lowest && sum + sums[bucket] < target; bucket--) sum += sums[bucket];
    in_order = found + size;
    const long in_bucket = sorted_bucket(found, count, bucket, in_order);
    if (!in_bucket) return *std::min_element(found, found + count);
    count = in_bucket;
  } else {
    std::sort(found, found + count, std::greater<float>());
  }
  for (long i = 0; i + 1 < count; i++) {
    sum += in_order[i];
    if (sum >= target) return in_order[i];
  }
  return in_order[count - 1];
}

struct Ranking {
  const float* probs;
  long size;
  const double* totals;
  const float* top_p;
  float* floors;
};

void ranking_task(void* context, long row) {
  const Ranking& call = *(const Ranking*)context;
  const float* probs = call.probs + row * call.size;
  float* found = (float*)scratch(kTotals, 2 * call.size * (long)sizeof(float));
  call.floors[row] = nucleus_floor(probs, call.size, call.totals[row], call.top_p[row], found);
}

}  // namespace
}  // namespace herd

// floors [num_rows] of probs [num_rows, size], which are finite and not negative.
extern "C" __attribute__((visibility("default"))) void herd_nucleus_floors(
    const float* probs, long num_rows, long size, const double* totals, const float* top_p,
    float* floors) {
  herd::Ranking call = {probs, size, totals, top_p, floors};
  herd::run(herd::ranking_task, &call, num_rows);
}
