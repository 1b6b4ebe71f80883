// Queries beside keys that products take as they are stored: sums of two numbers of e4m3, in units
// of the row, in which its largest element is below 2^8. So they have the 8 digits of bfloat16 down
// to 2^-9 of the largest, and are off by at most 2^-18 of that below.
#pragma once

#include "../decode/fragments.cuh"
#include "block.cuh"

namespace jax_fa {

// A pair of halves to a pair of e4m3 and another of what is left of them.
__device__ inline uint2 split_e4m3(uint32_t x) {
  const uint16_t upper = ptx::narrow_e4m3(x);
  const uint32_t wide = ptx::widen_e4m3(upper);
  const __half2 rest =
      __hsub2(reinterpret_cast<const __half2&>(x), reinterpret_cast<const __half2&>(wide));
  return {upper, ptx::narrow_e4m3(reinterpret_cast<const uint32_t&>(rest))};
}

// Of a warp's 16 rows from `row0` on: the first panel of each becomes the upper parts of all its
// elements, the second the lower ones. `unit` becomes that of this lane's two rows of an
// accumulator, NaN where a query is not finite.
template <class Traits>
__device__ void split_queries(typename HopperStorage<Traits>::Queries& sQ, int row0,
                              float (&unit)[2]) {
  static_assert(Traits::kHeadDim == 128 && Traits::kDType == DType::kBF16);
  constexpr int kPanelBytes = sizeof(sQ[0]);
  const int lane = threadIdx.x % 32, row = lane / 2, odd = lane % 2;  // a lane for half a row
  const uint32_t sRow = ptx::shared_address(sQ[0][row0 + row]);
  const auto place = [&](int panel, int chunk) {  // of 16 bytes
    return sRow + panel * kPanelBytes + (chunk ^ row % 8) * 16;
  };
  uint32_t x[8][4], most = 0;  // of magnitudes
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    ptx::load_shared_v4(x[i], place(odd, i));
#pragma unroll
    for (const uint32_t pair : x[i]) {
      most = max(most, max(pair << 16 & 0x7fff0000u, pair & 0x7fff0000u));
    }
  }
  most = max(most, __shfl_xor_sync(0xffffffff, most, 1));
  const int exponent = min(max(int(most >> 23), 8), 254) - 127;  // both powers are normal floats
  const float inverse = power_of_two(7 - exponent);
  __syncwarp();  // all lanes have read the rows
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t upper[4], lower[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      uint2 parts[2];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int pair = j * 2 + k;
        const float2 two = decode::unpack<DType::kBF16>(x[i * 2 + pair / 4][pair % 4]);
        parts[k] = split_e4m3(ptx::pack_f16(two.x * inverse, two.y * inverse));
      }
      upper[j] = parts[0].x | parts[1].x << 16;
      lower[j] = parts[0].y | parts[1].y << 16;
    }
    ptx::store_shared_v4(place(0, odd * 4 + i), {upper[0], upper[1], upper[2], upper[3]});
    ptx::store_shared_v4(place(1, odd * 4 + i), {lower[0], lower[1], lower[2], lower[3]});
  }
  ptx::fence_async_proxy();
  const float mine = most < 0x7f800000u ? power_of_two(exponent - 7) : __int_as_float(0x7fffffff);
  unit[0] = __shfl_sync(0xffffffff, mine, lane / 4 * 2);
  unit[1] = __shfl_sync(0xffffffff, mine, lane / 4 * 2 + 16);
}

}  // namespace jax_fa
