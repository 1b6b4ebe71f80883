// Epilogues of the Hopper backward kernel: a warp's rows of dk or dv, and dq from its sums.
#pragma once

#include "bwd_block.cuh"
#include "store.cuh"

namespace jax_fa {

// Writes a warp's 16 rows of x, times scale, as 16 bytes a lane. `at(row)`: where its h-th row of
// the lane's two goes, null for nowhere; a row that is not `live` is 0.
template <class Traits, class At>
__device__ void store_rows(const float (&x)[Traits::kHeadDim / 2], float scale, int dims,
                           const bool (&live)[2], At at) {
  using Element = typename Traits::Element;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    Element* gRow = at(h);
    const float factor = live[h] ? scale : 0.f;
#pragma unroll
    for (int d = 0; d < Traits::kHeadDim / 32; ++d) {
      uint32_t y[4];  // two dims of each of four chunks of 8
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int i = ((d * 4 + c) * 2 + h) * 2;
        y[c] = live[h] ? Mma<Traits::kDType>::pack(x[i] * factor, x[i + 1] * factor) : 0;
      }
      transpose_quad(y);  // eight dims of chunk lane % 4
      int dim = d * 32 + lane % 4 * 8;
      // Compared here: kept since before the loop, what it comes to costs registers.
      if constexpr (Traits::kPair) asm volatile("" : "+r"(dim));
      if (gRow && dim < dims) {
        *reinterpret_cast<uint4*>(gRow + dim) = make_uint4(y[0], y[1], y[2], y[3]);
      }
    }
  }
}

// dq from its sums, and 0 for what is no query of any row.
template <class Traits>
__global__ void __launch_bounds__(128)
    bwd_read_sums_sm90(const __grid_constant__ BackwardParams p) {
  using Element = typename Traits::Element;
  const AttentionParams& fwd = p.fwd;
  const QueryTile tile = locate_tile<kBwdSumQueries>(fwd);
  if (tile.rows <= 0) return;
  const bool some = tile.row0 < tile.len_q;
  const float* gSums =
      p.dq_sum + tile_of_sums(fwd, tile, kBwdSumQueries) * DqSums<Traits>::kTileFloats;
  float x[Traits::kHeadDim / 2] = {};
  if (some) {
#pragma unroll
    for (int d = 0; d < Traits::kHeadDim / 8; ++d) {
      const float4 y =
          *reinterpret_cast<const float4*>(gSums + DqSums<Traits>::place(d) + threadIdx.x * 4);
      x[4 * d] = y.x, x[4 * d + 1] = y.y, x[4 * d + 2] = y.z, x[4 * d + 3] = y.w;
    }
  }
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
  auto* gDq =
      static_cast<Element*>(p.dq) + tile.token0 * p.dq_token_stride + tile.head * fwd.q_head_stride;
  const int queries = tile.len_q - tile.row0;
  const bool live[2] = {row < queries, row + 8 < queries};
  store_rows<Traits>(x, fwd.scale * gradient_scale<Traits>(fwd), fwd.head_dim, live, [&](int h) {
    const int r = row + h * 8;
    return r < tile.rows ? gDq + r * p.dq_token_stride : nullptr;
  });
}

}  // namespace jax_fa
