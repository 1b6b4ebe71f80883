// Queries on their way to shared memory, as operands of the scores.
#pragma once

#include "decode/fragments.cuh"
#include "decode/work.cuh"
#include "params.h"

namespace jax_fa::decode {

// Q^T as B fragments, by way of registers. Lane (g, c) of step i holds, for column g, the four dims
// that lane (., c) takes from a row of K in step i. Columns and dims that do not exist are zero.
template <typename T>
struct QueryLoader {
  static constexpr int kLanes = T::kQSteps * T::kColumnTiles * 32;
  // Of one tile of columns by many warps, the last of these: they copy keys only where there are
  // many.
  static constexpr int kWarps = T::kWide && T::kColumnTiles == 1 ? T::kWarps / 2 : T::kWarps;
  static constexpr int kVectors = (kLanes + kWarps * 32 - 1) / (kWarps * 32);
  uint2 rQ[kVectors];

  static __device__ int warp_of(int vector) {
    return vector * kWarps + int(threadIdx.x / 32) - (T::kWarps - kWarps);
  }

  template <bool kPacked>
  __device__ void load(const AttentionParams& p, const Row<kPacked>& row, int head_kv,
                       int heads_group, int column_group) {
    constexpr int kElements = T::KeyFormat::kElements, kStepsPerVector = kElements / 4;
    if (warp_of(0) < 0) return;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int lane = threadIdx.x % 32, warp = warp_of(v);
      const int tile = warp % T::kColumnTiles, step = warp / T::kColumnTiles;
      const Query query = query_of(row, head_kv, heads_group,
                                   (column_group * T::kColumnTiles + tile) * 8 + lane / 4);
      const int dim =
          (step / kStepsPerVector * 4 + lane % 4) * kElements + step % kStepsPerVector * 4;
      rQ[v] = {};
      if (query.token < 0 || dim >= p.head_dim || step >= T::kQSteps) continue;
      const int64_t offset =
          (row.token0 + query.token) * p.q_token_stride + query.head * p.q_head_stride + dim;
      rQ[v] = __ldg(reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(p.q) + offset));
    }
  }

  __device__ void store(typename T::Shared& smem, DType dtype) const {
    using Format = typename T::KeyFormat;
    uint2* const sQ = &smem.q[0][0][0];
    if (warp_of(0) < 0) return;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int i = warp_of(v) * 32 + threadIdx.x % 32;
      uint2 x = rQ[v];
      if (Format::kAnyQueries && dtype == DType::kBF16) {
        const float2 lo = unpack<DType::kBF16>(x.x), hi = unpack<DType::kBF16>(x.y);
        x = {pack<Format::kMma>(lo.x, lo.y), pack<Format::kMma>(hi.x, hi.y)};
      }
      if (kLanes % (kWarps * 32) == 0 || i < kLanes) sQ[i] = x;
    }
  }
};

}  // namespace jax_fa::decode
