// dq = ds k of a tile of walked queries, summed over the blocks that own keys in float32.
//
// ds crosses shared memory, transposed as the warps hold it: [keys owned, queries walked]. The
// warps share the product by queries and dims. Sums lie as the accumulators do, so that a warp adds
// consecutive addresses; `sum_place` is what reads them back.
#pragma once

#include "bwd_scores.cuh"

namespace jax_fa {

template <class Traits>
struct SumDq {
  using Element = typename Traits::Element;
  using Layout = TileLayout<Traits>;
  struct DsTraits {
    using Element = typename Traits::Element;
    static constexpr int kHeadDim = Traits::kBlockN;
  };
  using DsLayout = TileLayout<DsTraits>;

  static constexpr int kDimWarps = Traits::kWarps == 8 && Traits::kHeadDim % 64 == 0 ? 4 : 2;
  static constexpr int kQueryWarps = Traits::kWarps / kDimWarps;
  static constexpr int kQTiles = Traits::kBlockN / kQueryWarps / 16;  // 16 queries each
  static constexpr int kDTiles = Traits::kHeadDim / kDimWarps / 8;    // 8 dims each
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

  // The rows of this warp; zeros where it has none to add.
  __device__ static void store_ds(uint32_t sDs, const ScoreTile<Traits>& ds, int warp_row) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < Traits::kMTiles; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = warp_row + m * 16 + h * 8 + lane / 4;
#pragma unroll
        for (int n = 0; n < Traits::kBlockN / 8; ++n) {
          ptx::store_shared(sDs + DsLayout::offset(row, n) + lane % 4 * 4,
                            Mma<Traits::kDType>::pack(ds[m][n][2 * h], ds[m][n][2 * h + 1]));
        }
      }
    }
  }

  // gSums [kTileFloats] += ds k over the block's keys.
  __device__ static void add(float* gSums, uint32_t sDs, uint32_t sK) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint32_t ds_place[kQTiles], k_place[kDTiles / 2];
#pragma unroll
    for (int q = 0; q < kQTiles; ++q) {
      const int chunk = (warp / kDimWarps * kQTiles + q) * 2 + lane / 8 % 2;
      ds_place[q] = sDs + DsLayout::offset(lane % 8 + lane / 16 * 8, chunk);
    }
#pragma unroll
    for (int d = 0; d < kDTiles / 2; ++d) {
      const int chunk = warp % kDimWarps * kDTiles + d * 2 + lane / 16;
      k_place[d] = sK + Layout::offset(lane % 16, chunk);
    }
    float dq[kQTiles][kDTiles][4] = {};
#pragma unroll
    for (int k = 0; k < Traits::kBlockM / 16; ++k) {
      uint32_t left[kQTiles][4];
#pragma unroll
      for (int q = 0; q < kQTiles; ++q) {
        ptx::ldmatrix_x4_trans(left[q], ds_place[q] + k * 16 * DsLayout::kRowBytes);
      }
#pragma unroll
      for (int d = 0; d < kDTiles / 2; ++d) {
        uint32_t keys[4];  // two blocks of 8 dims, two blocks of 8 keys of each
        ptx::ldmatrix_x4_trans(keys, k_place[d] + k * 16 * Layout::kRowBytes);
#pragma unroll
        for (int q = 0; q < kQTiles; ++q) {
          Mma<Traits::kDType>::mma(dq[q][2 * d], left[q], keys[0], keys[1]);
          Mma<Traits::kDType>::mma(dq[q][2 * d + 1], left[q], keys[2], keys[3]);
        }
      }
    }
#pragma unroll
    for (int q = 0; q < kQTiles; ++q) {
#pragma unroll
      for (int d = 0; d < kDTiles; ++d) {
#if __CUDA_ARCH__ >= 900
        ptx::red_add_v4(gSums + sum_place(warp, q, d, lane, 0).index, dq[q][d]);
#else
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          ptx::red_add(gSums + sum_place(warp, q, d, lane, e).index, dq[q][d][e]);
        }
#endif
      }
    }
  }
};

}  // namespace jax_fa
