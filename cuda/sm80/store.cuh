// Epilogue: a warp's rows of o and lse, or of a gradient, to global memory.
#pragma once

#include "mma.cuh"
#include "schedule.cuh"

namespace jax_fa {

// Where the rows of a tile go.
template <class Traits>
struct TileRows {
  typename Traits::Element* gO;  // [rows, dims] from the tile's first row on
  int64_t stride;                // of rows of gO
  int rows, dims;
};

template <class Traits>
struct OutputRows : TileRows<Traits> {
  float* gLse;  // [rows]

  __device__ OutputRows(const AttentionParams& p, const QueryTile& tile) {
    this->stride = int64_t(p.heads_q) * p.head_dim_v;
    this->rows = tile.rows;
    this->dims = p.head_dim_v;
    this->gO = static_cast<typename Traits::Element*>(p.o) + tile.token0 * this->stride +
               tile.head * p.head_dim_v;
    gLse = p.lse + max(tile.b, 0) * p.lse_row_stride + tile.head * p.lse_head_stride +
           (p.q_start ? tile.token0 : int64_t(tile.row0));
  }
};

// Through this warp's own rows of shared memory, so that 8 lanes store 128 adjacent bytes.
template <class Traits>
  requires(Traits::kDType != DType::kF32)
__device__ void store_o(const TileRows<Traits>& out, const OutputTile<Traits>& o, int warp_row,
                        uint32_t sRows) {
  using Layout = TileLayout<Traits>;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < Traits::kMTiles; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int n = 0; n < kWarpDims<Traits> / 8; ++n) {
        ptx::store_shared(sRows + Layout::offset(m * 16 + h * 8 + lane / 4, n) + lane % 4 * 4,
                          Mma<Traits::kDType>::pack(o[m][n][2 * h], o[m][n][2 * h + 1]));
      }
    }
  }
  __syncwarp();  // the rows are written by all lanes before any lane reads them
#pragma unroll
  for (int r = 0; r < Traits::kMTiles * 16; r += 32 / Layout::kGroup) {
    const int row = r + lane / Layout::kGroup;
    if (warp_row + row >= out.rows) continue;
    auto* gRow = out.gO + (warp_row + row) * out.stride;
#pragma unroll
    for (int c = 0; c < kWarpDims<Traits> / 8; c += Layout::kGroup) {
      const int chunk = c + lane % Layout::kGroup;
      uint32_t x[4];
      ptx::load_shared_v4(x, sRows + Layout::offset(row, chunk));
      if (chunk * Layout::kChunkElements < out.dims) {
        *reinterpret_cast<uint4*>(gRow + chunk * Layout::kChunkElements) =
            make_uint4(x[0], x[1], x[2], x[3]);
      }
    }
  }
}

// Straight from registers: with gemm_pv's order of dims a lane holds 8 adjacent ones of every 32.
template <class Traits>
  requires(Traits::kDType == DType::kF32)
__device__ void store_o(const TileRows<Traits>& out, const OutputTile<Traits>& o, int warp_row,
                        uint32_t) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < Traits::kMTiles; ++m) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = warp_row + m * 16 + h * 8 + lane / 4;
      if (row >= out.rows) continue;
#pragma unroll
      for (int d = 0; d < kWarpDims<Traits> / 32; ++d) {
        const int dim = d * 32 + lane % 4 * 8;
        if (dim >= out.dims) continue;
        auto* gDims = reinterpret_cast<float4*>(out.gO + row * out.stride + dim);
#pragma unroll
        for (int e = 2 * h; e < 2 * h + 2; ++e) {
          gDims[e % 2] = make_float4(o[m][4 * d][e], o[m][4 * d + 1][e], o[m][4 * d + 2][e],
                                     o[m][4 * d + 3][e]);
        }
      }
    }
  }
}

}  // namespace jax_fa
