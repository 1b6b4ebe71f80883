// Online softmax of a block of rows that lies in a warp as the accumulators of m16n8 products: of
// every 16 rows a lane holds rows g and g + 8 (g = lane / 4), each shared with the 3 other lanes of
// its quad.
#pragma once

#include "ptx.cuh"
#include "score.cuh"

namespace jax_fa {

template <class T>
__device__ T quad_max(T x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}

template <class T>
__device__ T quad_sum(T x) {
  x += __shfl_xor_sync(0xffffffff, x, 1);
  return x + __shfl_xor_sync(0xffffffff, x, 2);
}

// kSlackLog2: the maximum that scales a row moves only when a score outgrows it by 2^kSlackLog2, so
// that most tiles rescale nothing. Exact in any case; probabilities grow up to 2^kSlackLog2, which
// must suit their type, or shrink() has to follow. Rows choose one by one: a row's bits do not
// depend on its neighbours.
template <int kMTiles, int kSlackLog2>
struct OnlineSoftmax {
  float max[kMTiles][2];    // in the score's domain
  float sum[kMTiles][2];    // of this lane's columns only
  float added[kMTiles][2];  // to it by the last tile

  __device__ OnlineSoftmax() {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
      max[m][0] = max[m][1] = -INFINITY;
      sum[m][0] = sum[m][1] = 0.f;
    }
  }

  // Turns scores into probabilities relative to `max`. Where a row's maximum has moved, `rescale`
  // is what its output so far must be multiplied by, else 1. Returns whether any of the warp moved.
  // to_log2(h): what takes scores of rows h to log2 units.
  template <int kNTiles, class ToLog2>
  __device__ bool step(float (&s)[kMTiles][kNTiles][4], ToLog2 to_log2,
                       float (&rescale)[kMTiles][2]) {
    bool moved = false;
    const float factor[2] = {to_log2(0), to_log2(1)};
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
      float max_log2[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        moved |= move(s, m, h, factor[h], rescale[m][h]);
        // A row that has seen no key yet has no maximum to subtract: exp2(-inf - 0) = 0.
        max_log2[h] = max[m][h] == -INFINITY ? 0.f : max[m][h] * factor[h];
      }
      exponentiate(s[m], factor, max_log2, added[m]);
#pragma unroll
      for (int h = 0; h < 2; ++h) sum[m][h] = sum[m][h] * rescale[m][h] + added[m][h];
    }
    return __any_sync(0xffffffff, moved);
  }

  // The same where nothing moves `max`, which is not looked for. `most` becomes the largest sum
  // that a row has added, NaN if one has. Where has_outgrown() says so of it, a maximum might have
  // moved, and that row is worth nothing; else all bits are those of step().
  template <int kNTiles, class ToLog2>
  __device__ void follow(float (&s)[kMTiles][kNTiles][4], ToLog2 to_log2, float& most) {
    const float factor[2] = {to_log2(0), to_log2(1)};
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
      const float max_log2[2] = {max[m][0] * factor[0], max[m][1] * factor[1]};
      exponentiate(s[m], factor, max_log2, added[m]);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        sum[m][h] += added[m][h];
        most = ptx::max_nan(most, added[m][h]);
      }
    }
  }

  // Whether a row of the warp may have a probability of 2^kLimitLog2 or more in the last tile.
  template <int kLimitLog2>
  __device__ bool exceeds() const {
    float largest = 0.f;
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) largest = fmaxf(largest, fmaxf(added[m][0], added[m][1]));
    return __any_sync(0xffffffff, largest >= float(1ull << kLimitLog2));
  }

  // Takes such rows down by a power of two, which needs no scores: the probabilities of the last
  // tile, `s`, and the sum; the output so far must be multiplied by `rescale`. Rows whose sums are
  // not finite are worth nothing before and after.
  template <int kLimitLog2, int kNTiles, class ToLog2>
  __device__ void shrink(float (&s)[kMTiles][kNTiles][4], ToLog2 to_log2,
                         float (&rescale)[kMTiles][2]) {
    constexpr float kLimit = 1ull << kLimitLog2;
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float row_added = quad_max(added[m][h]);
        const int log2 = row_added >= kLimit ? min(__float_as_int(row_added) >> 23, 253) - 127 : 0;
        if (log2 > 0) max[m][h] += __fdividef(log2, to_log2(h));
        rescale[m][h] = __int_as_float((127 - log2) << 23);
        sum[m][h] *= rescale[m][h];
#pragma unroll
        for (float (&x)[4] : s[m]) {
          x[2 * h] *= rescale[m][h];
          x[2 * h + 1] *= rescale[m][h];
        }
      }
    }
  }

  __device__ static bool has_outgrown(float most) {
    return !(most <= float(1ull << (kSlackLog2 - 1)));
  }

  struct Result {
    float normalize;  // what the row's accumulated output must be multiplied by
    float lse;        // natural log
    bool empty;       // no key had any weight: the output is 0
  };

  // Closes a row; a sink (-inf: none) is a key with a logit and no value.
  __device__ Result finish(int m, int h, float to_log2, float sink) const {
    const float keys = quad_sum(sum[m][h]);
    if (keys == 0.f) return {0.f, sink, true};
    const float max_log2 = max[m][h] * to_log2, sink_log2 = sink * kLog2e;
    const float base = fmaxf(max_log2, sink_log2);
    const float weight = ptx::exp2(max_log2 - base);
    const float total = keys * weight + ptx::exp2(sink_log2 - base);
    return {weight * ptx::rcp(total), (base + ptx::log2(total)) * kLn2, false};
  }

 private:
  // Whether the row's maximum moves.
  template <int kNTiles>
  __device__ bool move(const float (&s)[kMTiles][kNTiles][4], int m, int h, float to_log2,
                       float& rescale) {
    float maxima[4] = {max[m][h], -INFINITY, -INFINITY, -INFINITY};  // chains of their own
#pragma unroll
    for (int n = 0; n < kNTiles; ++n) {
      float& chain = maxima[n % 4];
      chain = fmaxf(chain, fmaxf(s[m][n][2 * h], s[m][n][2 * h + 1]));
    }
    const float row_max = quad_max(fmaxf(fmaxf(maxima[0], maxima[1]), fmaxf(maxima[2], maxima[3])));
    const bool moves = (row_max - max[m][h]) * to_log2 > kSlackLog2;  // -inf to -inf: false
    rescale = moves ? ptx::exp2((max[m][h] - row_max) * to_log2) : 1.f;
    max[m][h] = moves ? row_max : max[m][h];
    return moves;
  }

  // Both rows abreast: their sums are chains of their own. `row_sum` is what this adds to them.
  template <int kNTiles>
  __device__ static void exponentiate(float (&s)[kNTiles][4], const float (&to_log2)[2],
                                      const float (&max_log2)[2], float (&row_sum)[2]) {
    row_sum[0] = row_sum[1] = 0.f;
#pragma unroll
    for (float (&x)[4] : s) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int e = 2 * h; e < 2 * h + 2; ++e) {
          x[e] = ptx::exp2(fmaf(x[e], to_log2[h], -max_log2[h]));
        }
        row_sum[h] += x[2 * h] + x[2 * h + 1];
      }
    }
  }
};

}  // namespace jax_fa
