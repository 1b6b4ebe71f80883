// Products whose left operand crosses shared memory, where warps share the work in other ways than
// they did to make it.
#pragma once

#include "mma.cuh"

namespace jax_fa {

// Probabilities or gradients of scores in shared memory: [keys owned, queries walked], 16 bits.
template <class Traits>
struct ScoreRow {
  using Element = typename Traits::Element;
  static constexpr int kHeadDim = Traits::kBlockN;
};
template <class Traits>
using ScoreLayout = TileLayout<ScoreRow<Traits>>;

// Writes a warp's part, whose first row and column in the block's tile these are.
template <class Traits, int kMTiles, int kNTiles>
__device__ void store_scores(uint32_t sScores, const float (&x)[kMTiles][kNTiles][4], int row0,
                             int col0) {
  using Layout = ScoreLayout<Traits>;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = row0 + m * 16 + h * 8 + lane / 4;
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
        ptx::store_shared(sScores + Layout::offset(row, col0 / 8 + n) + lane % 4 * 4,
                          Mma<Traits::kDType>::pack(x[m][n][2 * h], x[m][n][2 * h + 1]));
      }
    }
  }
}

// d += a b for rows row0 onwards and dims dim0 onwards of a product of depth kDepth, with b as
// [kDepth, dims] and a as [rows, kDepth] or, kTransposed, [kDepth, rows].
template <DType kDType, int kDepth, bool kTransposed, class LayoutA, class LayoutB, int kRowTiles,
          int kDimTiles>
__device__ void gemm_shared(float (&d)[kRowTiles][kDimTiles][4], uint32_t sA, int row0, uint32_t sB,
                            int dim0) {
  static_assert(kDimTiles % 2 == 0);
  const int lane = threadIdx.x % 32;
  uint32_t a_place[kRowTiles], b_place[kDimTiles / 2];
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
    const int row = row0 + m * 16;
    a_place[m] =
        sA + (kTransposed ? LayoutA::offset(lane % 8 + lane / 16 * 8, row / 8 + lane / 8 % 2)
                          : LayoutA::offset(row + lane % 16, lane / 16));
  }
#pragma unroll
  for (int n = 0; n < kDimTiles / 2; ++n) {
    b_place[n] = sB + LayoutB::offset(lane % 16, dim0 / 8 + n * 2 + lane / 16);
  }
#pragma unroll
  for (int k = 0; k < kDepth / 16; ++k) {
    uint32_t a[kRowTiles][4];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      if constexpr (kTransposed) {
        ptx::ldmatrix_x4_trans(a[m], a_place[m] + k * 16 * LayoutA::kRowBytes);
      } else {
        ptx::ldmatrix_x4(a[m], LayoutA::advance(a_place[m], 2 * k));
      }
    }
#pragma unroll
    for (int n = 0; n < kDimTiles / 2; ++n) {
      uint32_t b[4];  // two blocks of 8 dims, two blocks of 8 rows of each
      ptx::ldmatrix_x4_trans(b, b_place[n] + k * 16 * LayoutB::kRowBytes);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        Mma<kDType>::mma(d[m][2 * n], a[m], b[0], b[1]);
        Mma<kDType>::mma(d[m][2 * n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

}  // namespace jax_fa
