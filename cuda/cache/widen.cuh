// What copies of keys and values of 8 bits do with an element. Each product with a scale is rounded
// once.
#pragma once

#include "../decode/fragments.cuh"
#include "copied.h"

namespace jax_fa::widen {

// Four values to halves, exactly.
__device__ __forceinline__ uint2 to_halves(DType format, uint32_t bytes) {
  if (format == DType::kInt8) return decode::widen_int8(bytes);
  return format == DType::kE4M3 ? decode::widen_e4m3(bytes) : decode::widen_e5m2(bytes);
}

// Eight halves times their scale.
template <DType kDType>
__device__ __forceinline__ uint4 scaled(uint2 lower, uint2 upper, float scale) {
  const auto scaled = [&](uint32_t halves) {
    const float2 x = decode::unpack<DType::kF16>(halves);
    return decode::pack<kDType>(x.x * scale, x.y * scale);
  };
  return {scaled(lower.x), scaled(lower.y), scaled(upper.x), scaled(upper.y)};
}

}  // namespace jax_fa::widen
