// Score modifiers: the map from a raw product q.k to the logit that the softmax sees, applied to a
// whole tile at a time, and its derivative. A tile is given as a function for_each that calls
// f(float& x, Place i, Place j) for every element x of query i and key j (within their batch row).
//
// apply() is cap(), which alone depends on more than a sum with q.k and whose derivative slope()
// gives from the value it left, and then shift().
//
// A score leaves the tile in a domain of its own: the logit in log2 units is to_log2() * x, a
// factor that the softmax folds into the argument of exp2.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "mask.cuh"
#include "params.h"
#include "ptx.cuh"

namespace jax_fa {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// A position in two parts, the second known at compile time where loops are unrolled.
struct Place {
  int base, step;

  __device__ operator int() const { return base + step; }
};

// How far key j lies before the place that query i is aligned with: one conversion for all elements
// of a thread, exact up to 2^24.
__device__ inline float distance(Place i, Place j, int diagonal) {
  return float(i.base + diagonal - j.base) + float(i.step - j.step);
}

// scale * q.k. The scale must be positive, as the maximum of the row is taken before scaling.
struct ScaledScore {
  float scale;

  __device__ ScaledScore(const AttentionParams& params, int, int, int, const IntervalMask&)
      : scale(params.scale) {}

  static constexpr bool kHasSlope = false, kDropout = false;

  template <class ForEach>
  __device__ void apply(ForEach) const {}
  template <class ForEach>
  __device__ void cap(ForEach) const {}
  template <class ForEach>
  __device__ void shift(ForEach) const {}
  __device__ float to_log2() const { return scale * kLog2e; }
};

// cap * tanh(x / cap), through exp2: absolute error 2^-22 cap, where tanh.approx has 2^-11 cap.
struct Softcap {
  float cap, inverse = 1.f / cap;

  __device__ float operator()(float x) const {
    return cap - 2.f * cap * ptx::rcp(1.f + ptx::exp2(x * (2.f * kLog2e * inverse)));
  }
  __device__ float grad(float capped) const {
    const float t = capped * inverse;
    return 1.f - t * t;
  }
};

// Everything at run time: softcap(scale * q.k) - slope * |i + diagonal - j| + bias[i, j].
struct GeneralScore {
  const AttentionParams& params;
  int b, head, len_q;
  const IntervalMask& mask;

  __device__ GeneralScore(const AttentionParams& params, int b, int head, int len_q,
                          const IntervalMask& mask)
      : params(params), b(b), head(head), len_q(len_q), mask(mask) {}

  static constexpr bool kHasSlope = true, kDropout = false;

  template <class ForEach>
  __device__ void apply(ForEach for_each) const {
    cap(for_each);
    shift(for_each);
  }

  template <class ForEach>
  __device__ void cap(ForEach for_each) const {
    const float scale = params.scale;
    for_each([=](float& x, Place, Place) { x *= scale; });
    if (params.softcap > 0.f) {
      const Softcap softcap{params.softcap};
      for_each([=](float& x, Place, Place) { x = softcap(x); });
    }
  }

  // d(score) / d(scale * q.k) of an element that cap() has left.
  __device__ float slope(float capped) const {
    return params.softcap > 0.f ? Softcap{params.softcap}.grad(capped) : 1.f;
  }

  template <class ForEach>
  __device__ void shift(ForEach for_each) const {
    add_slopes(for_each);
    add_bias(for_each);
  }

  template <class ForEach>
  __device__ void add_slopes(ForEach for_each) const {
    if (params.alibi_slopes) {
      const float slope = params.alibi_slopes[int64_t(b) * params.heads_q + head];
      const int diagonal = mask.diagonal;
      for_each([=](float& x, Place i, Place j) { x -= slope * fabsf(distance(i, j, diagonal)); });
    }
  }

  __device__ float to_log2() const { return kLog2e; }

 private:
  template <class ForEach>
  __device__ void add_bias(ForEach for_each) const {
    if (!params.bias) return;
    if (params.bias_dtype == DType::kF16) add_bias_of<__half>(for_each);
    if (params.bias_dtype == DType::kBF16) add_bias_of<__nv_bfloat16>(for_each);
    if (params.bias_dtype == DType::kF32) add_bias_of<float>(for_each);
  }

  // Elements past the last query or key may lie outside the array; the mask hides them.
  template <class T, class ForEach>
  __device__ void add_bias_of(ForEach for_each) const {
    const T* gBias = static_cast<const T*>(params.bias) +
                     b % params.bias_rows * params.bias_row_stride + head * params.bias_head_stride;
    for_each([&](float& x, Place i, Place j) {
      if (i >= len_q || j >= mask.len_kv) return;
      x += float(gBias[i * params.bias_query_stride + j * params.bias_key_stride]);
    });
  }
};

// The same where there is no bias.
struct GeneralScoreWithoutBias : GeneralScore {
  using GeneralScore::GeneralScore;

  template <class ForEach>
  __device__ void shift(ForEach for_each) const {
    add_slopes(for_each);
  }
};

// The same where probabilities are dropped (dropout.cuh).
template <class Score>
struct Dropped : Score {
  using Score::Score;

  static constexpr bool kDropout = true;
};

// What all scores of a launch without a bias have in common. They are counted in units of the
// softcap, or else of a positive scale, so that neither costs a product of its own.
struct ScoreUnits {
  float unit, factor;  // score before softcap and slopes = unit * factor * q.k
  float to_log2;       // unit in log2 units
  bool capped;
  // tanh(factor * x) is x (c[0] + c[1] x^2 + c[2] x^4) within 2.3e-5 of itself where x^2 < range.
  float c[3], range;

  explicit ScoreUnits(const AttentionParams& p)
      : unit(p.softcap > 0.f ? p.softcap
             : p.scale > 0.f ? p.scale
                             : 1.f),
        factor(p.softcap > 0.f || p.scale <= 0.f ? p.scale / unit : 1.f),
        to_log2(unit * kLog2e),
        capped(p.softcap > 0.f) {
    const float square = factor * factor;
    c[0] = 0.999977436f * factor;
    c[1] = -0.331691508f * factor * square;
    c[2] = 0.115209761f * factor * square * square;
    range = 0.25f / square;
  }
};

// The scores of one head of one row: tanh instead of itself past a softcap, less slope * distance.
struct UnbiasedScore {
  const ScoreUnits& units;
  float slope;  // in units
  int diagonal;

  // All lanes of a warp call it. `own`: all queries and keys are the row's, none lies past a
  // length.
  template <class ForEach>
  __device__ void apply(ForEach for_each, bool own) const {
    if (units.capped) {
      cap(for_each, own);
    } else if (units.factor != 1.f) {
      for_each([&](float& x, Place, Place) { x *= units.factor; });
    }
    if (slope == 0.f) return;
    for_each(
        [&](float& x, Place i, Place j) { x = fmaf(-slope, fabsf(distance(i, j, diagonal)), x); });
  }

  __device__ float to_log2() const { return units.to_log2; }

 private:
  // By the polynomial, unless the sum of a few squares is past its range; nor where what lies past
  // a length would have a say in that, and so in the last bits of the row.
  template <class ForEach>
  __device__ void cap(ForEach for_each, bool own) const {
    constexpr int kSums = 4;
    float sums[kSums] = {};
    for_each([&](float& x, Place, Place j) {
      float& sum = sums[j.step / 8 % kSums];
      sum = fmaf(x, x, sum);
    });
    bool within = own;
#pragma unroll
    for (const float sum : sums) within = within && sum < units.range;
    if (__all_sync(0xffffffff, within)) {
      for_each([&](float& x, Place, Place) {
        const float square = x * x;
        x *= fmaf(square, fmaf(square, units.c[2], units.c[1]), units.c[0]);
      });
    } else {
      const float twice_log2 = units.factor * (2.f * kLog2e);
      for_each([&](float& x, Place, Place) {
        x = 1.f - 2.f * ptx::rcp(1.f + ptx::exp2(x * twice_log2));
      });
    }
  }
};

}  // namespace jax_fa
