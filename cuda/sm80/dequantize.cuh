// Movement of 8-bit keys and values: widened to the type of the products on the way into shared
// memory. Scales of a whole row of elements stay out of it (they multiply a column of the scores or
// of the probabilities); scales of groups multiply the elements here.
#pragma once

#include <cuda_fp8.h>

#include "mma.cuh"

namespace jax_fa {

// Where a scale multiplies a column, the elements carry this factor and the scale its inverse: a
// scale is max|x| over the largest number of its format, and probabilities times that would sink
// into the subnormals of float16. A power of two that brings the largest number near 1.
__device__ inline float downscale(DType dtype) {
  return dtype == DType::kE5M2 ? 1.f / (1 << 14) : 1.f / (1 << 7);
}

__device__ inline float2 widen(uint32_t two, DType dtype) {
  if (dtype == DType::kInt8) return {float(int8_t(two)), float(int8_t(two >> 8))};
  const auto format = dtype == DType::kE4M3 ? __NV_E4M3 : __NV_E5M2;
  const __nv_fp8x2_storage_t storage = two & 0xffff;
  return __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(storage, format)));
}

// 8 elements of key `key` from `dim` on, with the scale that applies to elements.
__device__ inline void read_quantized(float (&out)[8], const KvTensor& x, const KvHead& kv, int key,
                                      int dim, int head_dim) {
  const KvSlot slot = kv.where(key);
  const char* gElements = static_cast<const char*>(x.data) + kv_offset(x, slot, kv.head) + dim;
  const uint2 bits = *reinterpret_cast<const uint2*>(gElements);
  const float* gScale = x.groups > 1 ? x.scale + scale_offset(x, slot, kv.head) : nullptr;
  const float row_factor = x.scale ? downscale(x.dtype) : 1.f;
  const int group_size = head_dim / max(x.groups, 1);
#pragma unroll
  for (int e = 0; e < 8; e += 2) {
    const float2 two = widen((e < 4 ? bits.x : bits.y) >> (e % 4 * 8), x.dtype);
    out[e] = two.x * (gScale ? gScale[(dim + e) / group_size] : row_factor);
    out[e + 1] = two.y * (gScale ? gScale[(dim + e + 1) / group_size] : row_factor);
  }
}

// The factor of a key's whole column: its scale, 1 where there is none, 0 past the last key.
__device__ inline float column_scale(const KvTensor& x, const KvHead& kv, int key) {
  if (key >= kv.len) return 0.f;
  if (!x.scale || x.groups > 1) return 1.f;
  return x.scale[scale_offset(x, kv.where(key), kv.head)] / downscale(x.dtype);
}

// As load_kv, for keys of 8 bits or of the type of the queries, which is of 16; sScale gets their
// columns' factors.
template <class Traits, int kRows>
__device__ void load_kv_quantized(uint32_t sTile, float* sScale, const PageSlots<kRows>& slots,
                                  const KvTensor& x, const KvHead& kv, int first, int head_dim) {
  using Layout = TileLayout<Traits>;
  if (threadIdx.x < kRows) sScale[threadIdx.x] = column_scale(x, kv, first + threadIdx.x);
  if (x.dtype == Traits::kDType) {
    load_kv<Traits, kRows>(sTile, slots, x, kv, first, head_dim);
    return;
  }
  static_assert(Layout::kChunkElements == 8);
  constexpr int kSteps = Traits::kHeadDim / 8;
#pragma unroll 1
  for (int i = threadIdx.x; i < kRows * kSteps; i += Traits::kThreads) {
    const int row = i / kSteps, dim = i % kSteps * 8;
    float elements[8] = {};
    if (first + row < kv.len && dim < head_dim) {
      read_quantized(elements, x, kv, first + row, dim, head_dim);
    }
    uint32_t chunk[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      chunk[c] = Mma<Traits::kDType>::pack(elements[2 * c], elements[2 * c + 1]);
    }
    ptx::store_shared_v4(sTile + Layout::offset(row, dim / 8), chunk);
  }
}

}  // namespace jax_fa
