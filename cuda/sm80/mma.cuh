// The two products of a tile, on mma.sync, from shared memory and registers. Addresses of rows are
// those of the first dim that the warp multiplies.
//
// Both element widths share the fragments of Q K^T: a 16-byte chunk of a row holds 8 elements of 16
// bits (two chunks are the k = 16 of m16n8k16) or 4 of tf32 (two chunks are the k = 8 of m16n8k8),
// and ldmatrix hands out the same 4 bytes to the same lane.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "load.cuh"

namespace jax_fa {

template <DType kDType>
struct Mma;

template <>
struct Mma<DType::kF16> {
  using Element = __half;
  __device__ static void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    ptx::mma_f16(d, a, b0, b1);
  }
  __device__ static uint32_t pack(float lo, float hi) { return ptx::pack_f16(lo, hi); }
  __device__ static float2 unpack(uint32_t x) {
    return __half22float2(reinterpret_cast<const __half2&>(x));
  }
};

template <>
struct Mma<DType::kBF16> {
  using Element = __nv_bfloat16;
  __device__ static void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    ptx::mma_bf16(d, a, b0, b1);
  }
  __device__ static uint32_t pack(float lo, float hi) { return ptx::pack_bf16(lo, hi); }
  __device__ static float2 unpack(uint32_t x) {
    return {__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000)};
  }
};

template <>
struct Mma<DType::kF32> {
  using Element = float;
  __device__ static void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    ptx::mma_tf32(d, a, b0, b1);
  }
};

// Scores or probabilities of a warp: [m, n][e] is element e of the accumulator of rows m * 16 and
// keys n * 8 onwards.
template <class Traits>
using ScoreTile = float[Traits::kMTiles][Traits::kBlockN / 8][4];

// Dims of a row that one warp multiplies, from a multiple of 64 on: all, unless warps share rows.
template <class Traits>
constexpr int kWarpDims = Traits::kHeadDim / Traits::kTile.dim_parts;

// Output of a warp: as ScoreTile over dims, but for float32 in the order that store.cuh undoes.
template <class Traits>
using OutputTile = float[Traits::kMTiles][kWarpDims<Traits> / 8][4];

template <class Traits>
__device__ void round_operand(uint32_t (&x)[4]) {
  if constexpr (Traits::kDType == DType::kF32) {
#pragma unroll
    for (uint32_t& y : x) y = ptx::tf32(__uint_as_float(y));
  }
}

// s = q k^T.
template <class Traits>
__device__ void gemm_qk(ScoreTile<Traits>& s, uint32_t sQ, uint32_t sK) {
  using Layout = TileLayout<Traits>;
  const int lane = threadIdx.x % 32;
  const uint32_t q_place = Layout::offset(lane % 16, lane / 16);
  // The two chunks of 8 keys arrive in adjacent registers, as the right operand needs them.
  const uint32_t k_place = Layout::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
#pragma unroll
  for (auto& row : s) {
#pragma unroll
    for (auto& tile : row) tile[0] = tile[1] = tile[2] = tile[3] = 0.f;
  }
#pragma unroll
  for (int k = 0; k < kWarpDims<Traits> / Layout::kChunkElements / 2; ++k) {
    uint32_t q[Traits::kMTiles][4];
#pragma unroll
    for (int m = 0; m < Traits::kMTiles; ++m) {
      ptx::ldmatrix_x4(q[m], sQ + Layout::advance(q_place, 2 * k) + m * 16 * Layout::kRowBytes);
      round_operand<Traits>(q[m]);
    }
#pragma unroll
    for (int n = 0; n < Traits::kBlockN / 16; ++n) {
      uint32_t keys[4];  // two blocks of 8 keys, two chunks of each
      ptx::ldmatrix_x4(keys, sK + Layout::advance(k_place, 2 * k) + n * 16 * Layout::kRowBytes);
      round_operand<Traits>(keys);
#pragma unroll
      for (int m = 0; m < Traits::kMTiles; ++m) {
        Mma<Traits::kDType>::mma(s[m][2 * n], q[m], keys[0], keys[1]);
        Mma<Traits::kDType>::mma(s[m][2 * n + 1], q[m], keys[2], keys[3]);
      }
    }
  }
}

// o += p v. Accumulators of 16 keys become the left operand of m16n8k16 by packing column pairs.
template <class Traits>
  requires(Traits::kDType != DType::kF32)
__device__ void gemm_pv(OutputTile<Traits>& o, const ScoreTile<Traits>& p, uint32_t sV) {
  using Layout = TileLayout<Traits>;
  using Product = Mma<Traits::kDType>;
  const uint32_t place = Layout::offset(threadIdx.x % 16, threadIdx.x % 32 / 16);
#pragma unroll
  for (int k = 0; k < Traits::kBlockN / 16; ++k) {
    uint32_t weights[Traits::kMTiles][4];
#pragma unroll
    for (int m = 0; m < Traits::kMTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float (&pair)[4] = p[m][2 * k + i / 2];
        weights[m][i] = Product::pack(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
      }
    }
#pragma unroll
    for (int d = 0; d < kWarpDims<Traits> / 16; ++d) {
      uint32_t values[4];  // two blocks of 8 dims, two blocks of 8 keys of each
      const uint32_t sBlock = sV + k * 16 * Layout::kRowBytes;
      ptx::ldmatrix_x4_trans(values, sBlock + Layout::advance(place, 2 * d));
#pragma unroll
      for (int m = 0; m < Traits::kMTiles; ++m) {
        Product::mma(o[m][2 * d], weights[m], values[0], values[1]);
        Product::mma(o[m][2 * d + 1], weights[m], values[2], values[3]);
      }
    }
  }
}

// o += p v in tf32. The order of keys inside a product is free: slot t takes key 2t and slot t + 4
// key 2t + 1, which is where the accumulators of p already lie. So is the order of dims among
// products: a lane reads 4 adjacent dims at once and hands them to 4 products, so that column c of
// product 4 * i + j stands for dim 32 * i + 4 * c + j.
template <class Traits>
  requires(Traits::kDType == DType::kF32)
__device__ void gemm_pv(OutputTile<Traits>& o, const ScoreTile<Traits>& p, uint32_t sV) {
  using Layout = TileLayout<Traits>;
  const int lane = threadIdx.x % 32;
  const uint32_t sEven = sV + Layout::offset(lane % 4 * 2, lane / 4);
  const uint32_t sOdd = sV + Layout::offset(lane % 4 * 2 + 1, lane / 4);
#pragma unroll
  for (int k = 0; k < Traits::kBlockN / 8; ++k) {
    uint32_t weights[Traits::kMTiles][4];
#pragma unroll
    for (int m = 0; m < Traits::kMTiles; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) weights[m][i] = ptx::tf32(p[m][k][i % 2 * 2 + i / 2]);
    }
#pragma unroll
    for (int d = 0; d < kWarpDims<Traits> / 32; ++d) {
      uint32_t even[4], odd[4];
      ptx::load_shared_v4(even, sEven + k * 8 * Layout::kRowBytes + d * 128);
      ptx::load_shared_v4(odd, sOdd + k * 8 * Layout::kRowBytes + d * 128);
      round_operand<Traits>(even);
      round_operand<Traits>(odd);
#pragma unroll
      for (int m = 0; m < Traits::kMTiles; ++m) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          Mma<Traits::kDType>::mma(o[m][4 * d + j], weights[m], even[j], odd[j]);
        }
      }
    }
  }
}

}  // namespace jax_fa
