// From a key's scales for groups of dims to what multiplies its elements, as halves.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

namespace jax_fa::decode {

// The scales of one row of a tile for its groups, which become factors and a scale for the row.
template <typename Format>
struct RowScales {
  bool given;           // else 1
  const float* scales;  // of groups
  __half* factors;      // 16 from one group to the next
  float* row_scale;
  int groups;

  __device__ void share() const {
    constexpr uint32_t kExponent = 0x7f800000, kOne = 1 << 23;
    float largest = 0.f;
    for_each([&](int, float x) { largest = fmaxf(largest, fabsf(x)); });
    // the power of two above it, not so small that the inverse would not exist
    const uint32_t power = max(__float_as_uint(largest) & kExponent, 20 * kOne) + kOne;
    const float inverse = __uint_as_float((254 + Format::kFactorLog2) * kOne - power);
    for_each([&](int i, float x) { factors[i * 16] = __float2half_rn(x * inverse); });
    *row_scale = __uint_as_float(power);
  }

 private:
  // f(group, its scale)
  template <typename F>
  __device__ void for_each(F f) const {
    if (given && groups % 4 == 0) {
#pragma unroll 1
      for (int i = 0; i < groups; i += 4) {
        const float4 x = *reinterpret_cast<const float4*>(scales + i);
        f(i, x.x), f(i + 1, x.y), f(i + 2, x.z), f(i + 3, x.w);
      }
    } else {
#pragma unroll 1
      for (int i = 0; i < groups; ++i) f(i, given ? scales[i] : 1.f);
    }
  }
};

// Each member by itself: as a whole they would go through local memory.
template <typename Format>
__device__ RowScales<Format> choose(bool first, const RowScales<Format>& x,
                                    const RowScales<Format>& y) {
  return {first ? x.given : y.given, first ? x.scales : y.scales, first ? x.factors : y.factors,
          first ? x.row_scale : y.row_scale, first ? x.groups : y.groups};
}

}  // namespace jax_fa::decode
