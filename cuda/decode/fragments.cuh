// From a cache's bytes to mma operands, one struct for each way that a cache may be stored.
//
// The order of the dims inside a product is free as long as both operands agree. So a lane owns
// `kElements` consecutive dims of a row, moved at once, and these are what it feeds to the mma:
// four at a time along K's rows (A[token, dim] of S^T = K Q^T), two at a time across pairs of V's
// rows (A[dim, token] of O^T = V^T P^T): nothing is transposed.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "params.h"
#include "ptx.cuh"

namespace jax_fa::decode {

__device__ __forceinline__ uint32_t pack(DType dtype, float lo, float hi) {
  return dtype == DType::kBF16 ? ptx::pack_bf16(lo, hi) : ptx::pack_f16(lo, hi);
}

template <DType kDType>
__device__ __forceinline__ uint32_t pack(float lo, float hi) {
  return pack(kDType, lo, hi);
}

template <DType kDType>
__device__ __forceinline__ float2 unpack(uint32_t x) {
  if constexpr (kDType == DType::kBF16) {
    return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(x));
  } else {
    return __half22float2(reinterpret_cast<const __half2&>(x));
  }
}

template <DType kDType>
__device__ __forceinline__ void mma(float (&d)[4], const uint32_t (&a)[4], uint2 b) {
  if constexpr (kDType == DType::kBF16) {
    ptx::mma_bf16(d, a, b.x, b.y);
  } else {
    ptx::mma_f16(d, a, b.x, b.y);
  }
}

// Four 8-bit values to four halves, in order and exactly.
__device__ __forceinline__ uint2 widen_int8(uint32_t x) {
  // the bytes become the mantissas of halves at 1024: 0x6400 | (value + 128) is 1152 + value
  const uint32_t biased = x ^ 0x80808080u;
  const __half2 bias = __half2half2(__ushort_as_half(0x6480));
  const auto unbias = [&](uint32_t h) {
    const __half2 value = __hsub2(reinterpret_cast<const __half2&>(h), bias);
    return reinterpret_cast<const uint32_t&>(value);
  };
  return {unbias(__byte_perm(biased, 0x64646464u, 0x4140)),
          unbias(__byte_perm(biased, 0x64646464u, 0x4342))};
}

__device__ __forceinline__ uint2 widen_e5m2(uint32_t x) {  // e5m2 is the upper byte of a half
  return {__byte_perm(x, 0, 0x1404), __byte_perm(x, 0, 0x3424)};
}

__device__ __forceinline__ uint2 widen_e4m3(uint32_t x) {
#if __CUDA_ARCH__ >= 890
  return {ptx::widen_e4m3(uint16_t(x)), ptx::widen_e4m3(uint16_t(x >> 16))};
#else
  // The exponent and mantissa, moved to a half's place, are the value times 2^-8 (the difference
  // of the biases). 480 does not exist in e4m3: its pattern is NaN.
  const auto widen = [](uint32_t h) {  // two bytes, each in the upper half of 16 bits
    const uint32_t bits = (h & 0x80008000u) | ((h & 0x7f007f00u) >> 1);
    const __half2 value = __hmul2(reinterpret_cast<const __half2&>(bits), __float2half2_rn(256.f));
    return reinterpret_cast<const uint32_t&>(value) |
           __hgt2_mask(__habs2(value), __float2half2_rn(448.f));
  };
  return {widen(__byte_perm(x, 0, 0x1404)), widen(__byte_perm(x, 0, 0x3424))};
#endif
}

// Bytes {x[2i], y[2i], x[2i + 1], y[2i + 1]} of two words, i = 0 or 1.
__device__ __forceinline__ uint32_t interleave(uint32_t x, uint32_t y, int i) {
  return __byte_perm(x, y, i == 0 ? 0x5140 : 0x7362);
}

// What all formats offer:
//   kMma            what their values become, and so what queries and probabilities must be
//   kAnyQueries     whether queries may be of another type than that, known at run time
//   kTokenScale     may have a scale for a row, which multiplies scores and probabilities
//   kGroupScale     may have scales for groups of dims, which multiply elements
//   kGroupShare     as halves, which leave the row's magnitude to a scale for the row
//   kUnit           what products of elements are multiplied by to be those of values
//   Lane            a lane's part of one row: kElements elements, kBytes bytes
//   kCopyBytes      what rows are aligned to
//   along(x, i)     elements 4i .. 4i + 3 of one row
//   across(x, y, i) elements 2i and 2i + 1 of two rows: {x[2i], y[2i]}, {x[2i + 1], y[2i + 1]}

template <int kSize>
struct alignas(kSize) Bytes {
  uint32_t words[kSize / 4];
};

template <DType kDType>
struct Float16 {
  static constexpr DType kMma = kDType;
  static constexpr bool kAnyQueries = false;
  static constexpr bool kTokenScale = false, kGroupScale = false, kGroupShare = false;
  static constexpr float kUnit = 1.f;
  static constexpr int kBytes = 16, kElements = 8, kCopyBytes = 16;

  struct Lane {
    Bytes<kBytes> x;
  };

  __device__ explicit Float16(const KvTensor&) {}

  __device__ uint2 along(const Lane& a, int i) const {
    return {a.x.words[2 * i], a.x.words[2 * i + 1]};
  }
  __device__ uint2 across(const Lane& a, const Lane& b, int i) const {
    return {__byte_perm(a.x.words[i], b.x.words[i], 0x5410),
            __byte_perm(a.x.words[i], b.x.words[i], 0x7632)};
  }
};

// 8-bit caches whose dtype is known when compiled, without scales or with one for a row.
template <DType kDType, int kLaneBytes>
struct Byte {
  static constexpr DType kMma = DType::kF16;
  static constexpr bool kAnyQueries = true;
  static constexpr bool kTokenScale = true, kGroupScale = false, kGroupShare = false;
  static constexpr float kUnit = 1.f;
  static constexpr int kBytes = kLaneBytes, kElements = kLaneBytes, kCopyBytes = 16;

  struct Lane {
    Bytes<kBytes> x;
  };

  __device__ explicit Byte(const KvTensor&) {}

  static __device__ uint2 widen(uint32_t x) {
    if constexpr (kDType == DType::kInt8) return widen_int8(x);
    if constexpr (kDType == DType::kE4M3) return widen_e4m3(x);
    if constexpr (kDType == DType::kE5M2) return widen_e5m2(x);
  }

  __device__ uint2 along(const Lane& a, int i) const { return widen(a.x.words[i]); }
  __device__ uint2 across(const Lane& a, const Lane& b, int i) const {
    return widen(interleave(a.x.words[i / 2], b.x.words[i / 2], i % 2));
  }
};

// 8-bit caches whose dtype is known when compiled, with scales for groups of lanes' parts. An
// element is multiplied by its scale's share of a power of two above the row's largest scale, which
// then is the row's scale: shares are below 1.
template <DType kDType, int kLaneBytes>
struct GroupedByte {
  static constexpr DType kMma = DType::kF16;
  static constexpr bool kAnyQueries = true;
  static constexpr bool kTokenScale = true, kGroupScale = true, kGroupShare = true;
  static constexpr int kBytes = kLaneBytes, kElements = kLaneBytes, kCopyBytes = 16;

  // int8 that becomes a half by its place alone is small, and its factor as much larger than a
  // share as halves allow
  static constexpr bool kSmall = kDType == DType::kInt8;
  static constexpr float kUnit = kSmall ? 0x1p9f : 1.f;
  static constexpr int kFactorLog2 = kSmall ? 15 : 0;

  struct Lane {
    Bytes<kBytes> x;
    __half2 factors;  // of a row of K, twice; of a pair of rows of V
  };

  __device__ explicit GroupedByte(const KvTensor&) {}

  __device__ uint2 along(const Lane& a, int i) const { return scaled(a.x.words[i], a.factors); }
  __device__ uint2 across(const Lane& a, const Lane& b, int i) const {
    return scaled(interleave(a.x.words[i / 2], b.x.words[i / 2], i % 2), a.factors);
  }

 private:
  static __device__ uint2 scaled(uint32_t x, __half2 factors) {
    uint2 halves;
    if constexpr (kSmall) {  // value + 128 is a subnormal half, times 2^24
      const uint32_t biased = x ^ 0x80808080u;
      halves = {__byte_perm(biased, 0, 0x4140), __byte_perm(biased, 0, 0x4342)};
    } else {
      halves = Byte<kDType, kLaneBytes>::widen(x);
    }
    const auto scale = [&](uint32_t pair) {
      const __half2 value = reinterpret_cast<const __half2&>(pair);
      const __half2 bias = __hmul2(factors, __float2half2_rn(-0x1p-17f));  // 128 of these units
      const __half2 y = kSmall ? __hfma2(value, factors, bias) : __hmul2(value, factors);
      return reinterpret_cast<const uint32_t&>(y);
    };
    return {scale(halves.x), scale(halves.y)};
  }
};

// The slow way for all other 8-bit caches: the dtype is looked up, elements are scaled by their
// group and rounded to the queries' dtype, whose range the original had. Without groups that is
// exact, and a scale for the row is applied as above.
template <DType kDType>
struct AnyByte {
  static constexpr DType kMma = kDType;
  static constexpr bool kAnyQueries = false;
  static constexpr bool kTokenScale = true, kGroupScale = true, kGroupShare = false;
  static constexpr float kUnit = 1.f;
  static constexpr int kBytes = 8, kElements = 8, kCopyBytes = 8;

  struct Lane {
    Bytes<kBytes> x;
    float scale;  // of the group that holds all these elements
  };

  DType dtype;

  __device__ explicit AnyByte(const KvTensor& tensor) : dtype(tensor.dtype) {}

  __device__ uint2 along(const Lane& a, int i) const {
    const uint2 halves = widen(a.x.words[i]);
    const float2 lo = unpack<DType::kF16>(halves.x), hi = unpack<DType::kF16>(halves.y);
    return {pack<kDType>(lo.x * a.scale, lo.y * a.scale),
            pack<kDType>(hi.x * a.scale, hi.y * a.scale)};
  }
  __device__ uint2 across(const Lane& a, const Lane& b, int i) const {
    const uint2 halves = widen(interleave(a.x.words[i / 2], b.x.words[i / 2], i % 2));
    const float2 lo = unpack<DType::kF16>(halves.x), hi = unpack<DType::kF16>(halves.y);
    return {pack<kDType>(lo.x * a.scale, lo.y * b.scale),
            pack<kDType>(hi.x * a.scale, hi.y * b.scale)};
  }

 private:
  __device__ uint2 widen(uint32_t x) const {
    if (dtype == DType::kInt8) return widen_int8(x);
    return dtype == DType::kE4M3 ? widen_e4m3(x) : widen_e5m2(x);
  }
};

}  // namespace jax_fa::decode
