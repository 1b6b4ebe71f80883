// dq = ds k of a tile of walked queries, summed over the blocks that own keys in float32.
//
// ds crosses shared memory, transposed as the warps hold it: [keys owned, queries walked]. The
// warps share the product by queries and dims. Sums lie as the accumulators do, so that a warp adds
// consecutive addresses; `sum_place` is what reads them back.
#pragma once

#include "bwd_products.cuh"
#include "bwd_scores.cuh"
#include "bwd_walk.cuh"

namespace jax_fa {

template <class Traits>
struct SumDq {
  using Element = typename Traits::Element;
  using Layout = TileLayout<Traits>;
  using DsLayout = ScoreLayout<Traits>;

  static constexpr int kDimWarps = Traits::kWarps == 8 && Traits::kHeadDim % 64 == 0 ? 4 : 2;
  static constexpr int kQueryWarps = Traits::kWarps / kDimWarps;
  static constexpr int kQTiles = Traits::kBlockN / kQueryWarps / 16;  // 16 queries each
  static constexpr int kDTiles = Traits::kHeadDim / kDimWarps / 8;    // 8 dims each
  // The widest product goes by halves where a single buffer of queries leaves it no registers.
  static constexpr int kPasses = kQTiles * kDTiles == 16 && Traits::kStages == 1 ? 2 : 1;
  static constexpr int kTileFloats = Traits::kBlockN * Traits::kHeadDim;
  static_assert(kQTiles * kQueryWarps * 16 == Traits::kBlockN && kDTiles % 2 == 0);

  // Where element e of lane `lane` of product (q, d) of a warp lies in the sums of its tile, and
  // which query and dim it stands for.
  struct Place {
    int index, query, dim;
  };
  __device__ static Place sum_place(int warp, int q, int d, int lane, int e) {
    // One 16-byte reduction a lane from sm_90 on, else four that each fill whole lines.
#if __CUDA_ARCH__ >= 900
    const int within = lane * 4 + e;
#else
    const int within = e * 32 + lane;
#endif
    const int query = (warp / kDimWarps * kQTiles + q) * 16 + lane / 4 + e / 2 * 8;
    const int dim = (warp % kDimWarps * kDTiles + d) * 8 + lane % 4 * 2 + e % 2;
    return {((warp * kQTiles + q) * kDTiles + d) * 128 + within, query, dim};
  }

  __device__ static void read(float (&x)[4], const float* gSums, int warp, int q, int d, int lane) {
#if __CUDA_ARCH__ >= 900
    const auto* gFour = gSums + sum_place(warp, q, d, lane, 0).index;
    const float4 four = *reinterpret_cast<const float4*>(gFour);
    x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
#else
#pragma unroll
    for (int e = 0; e < 4; ++e) x[e] = gSums[sum_place(warp, q, d, lane, e).index];
#endif
  }

  // gSums [kTileFloats] += ds k over the block's keys.
  __device__ static void add(float* gSums, uint32_t sDs, uint32_t sK) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int query0 = warp / kDimWarps * kQTiles * 16, dim0 = warp % kDimWarps * kDTiles * 8;
    constexpr int kPart = kDTiles / kPasses;
#pragma unroll
    for (int first = 0; first < kDTiles; first += kPart) {
      float dq[kQTiles][kPart][4] = {};
      gemm_shared<Traits::kDType, Traits::kBlockM, true, DsLayout, Layout>(dq, sDs, query0, sK,
                                                                           dim0 + first * 8);
#pragma unroll
      for (int q = 0; q < kQTiles; ++q) {
#pragma unroll
        for (int d = 0; d < kPart; ++d) {
#if __CUDA_ARCH__ >= 900
          ptx::red_add_v4(gSums + sum_place(warp, q, first + d, lane, 0).index, dq[q][d]);
#else
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            ptx::red_add(gSums + sum_place(warp, q, first + d, lane, e).index, dq[q][d][e]);
          }
#endif
        }
      }
    }
  }
};

// dq from its sums, and 0 for what is no query of any row.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 2)
    bwd_read_sums_sm80(const __grid_constant__ BackwardParams params) {
  using Sums = SumDq<Traits>;
  using Element = typename Traits::Element;
  constexpr int kBlockN = Traits::kBlockN;
  const AttentionParams& fwd = params.fwd;
  const QueryTile tile = locate_tile<kBlockN>(fwd);
  if (tile.rows <= 0) return;
  const bool some = tile.row0 < tile.len_q;
  const float* gSums = params.dq_sum + tile_of_sums(fwd, tile, kBlockN) * Sums::kTileFloats;
  auto* gDq = static_cast<Element*>(params.dq) + tile.token0 * params.dq_token_stride +
              tile.head * fwd.q_head_stride;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int q = 0; q < Sums::kQTiles; ++q) {
#pragma unroll
    for (int d = 0; d < Sums::kDTiles; d += 2) {
      float x[2][4] = {};
      if (some) {
        Sums::read(x[0], gSums, warp, q, d, lane);
        Sums::read(x[1], gSums, warp, q, d + 1, lane);
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        // Neighbours swap pairs of dims, so that a quad stores 32 adjacent bytes of a query.
        uint32_t two[2];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          two[n] = Mma<Traits::kDType>::pack(x[n][2 * h] * fwd.scale, x[n][2 * h + 1] * fwd.scale);
        }
        const uint32_t other = __shfl_xor_sync(0xffffffff, lane % 2 ? two[0] : two[1], 1);
        const auto place = Sums::sum_place(warp, q, d + lane % 2, lane & ~1, 2 * h);
        if (place.query >= tile.rows || place.dim >= fwd.head_dim) continue;
        *reinterpret_cast<uint2*>(gDq + place.query * params.dq_token_stride + place.dim) =
            lane % 2 ? make_uint2(other, two[1]) : make_uint2(two[0], other);
      }
    }
  }
}

// Sums start from 0; launch_keys adds to them; what they come to is dq.
template <class Traits, class Launch>
cudaError_t launch_with_sums(const BackwardParams& params, cudaStream_t stream,
                             Launch launch_keys) {
  const AttentionParams& fwd = params.fwd;
  const int64_t slots =
      bwd_sum_slots(fwd.q_start != nullptr, fwd.batch, fwd.len_q, fwd.total_q, Traits::kBlockN);
  const int64_t bytes = slots * fwd.heads_q * SumDq<Traits>::kTileFloats * sizeof(float);
  cudaError_t error = cudaMemsetAsync(params.dq_sum, 0, bytes, stream);
  if (error != cudaSuccess) return error;
  error = launch_keys();
  if (error != cudaSuccess) return error;
  const FwdGrid grid = fwd_sm80_grid(fwd, FwdTile{Traits::kBlockN, 0, Traits::kWarps, 1});
  const dim3 blocks(grid.section, grid.tiles, grid.sections);
  bwd_read_sums_sm80<Traits><<<blocks, Traits::kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace jax_fa
