// Epilogue of the Hopper forward kernel: a warp's 16 rows of o to global memory.
#pragma once

#include "block.cuh"

namespace jax_fa {

// Lane t of a quad has x[c] = X[c][t], and gets x[c] = X[t][c].
__device__ inline void transpose_quad(uint32_t (&x)[4]) {
  const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t other = __shfl_xor_sync(0xffffffff, odd ? x[i] : x[i + 1], 1);
    (odd ? x[i] : x[i + 1]) = other;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t other = __shfl_xor_sync(0xffffffff, upper ? x[i] : x[i + 2], 2);
    (upper ? x[i] : x[i + 2]) = other;
  }
}

// The rows of one warp: `row0` is the first within the tile.
template <class Traits>
struct OutputWarp {
  static constexpr int kHeadDim = Traits::kHeadDimV;
  using Element = typename Traits::Element;
  using Output = float[kHeadDim / 2];
  using Staging = typename HopperStorage<Traits>::Queries;

  const HopperParams& params;
  const QueryTile& q;
  int row0;
  int64_t stride;  // of rows of gO
  Element* gO;     // [q.rows, heads_q, head_dim_v] from the tile's first row and its head on
  float* gLse;     // [q.rows]
  int lane = threadIdx.x % 32;

  __device__ OutputWarp(const HopperParams& params, const QueryTile& q, int row0)
      : params(params), q(q), row0(row0) {
    const AttentionParams& p = params.attention;
    stride = int64_t(p.heads_q) * p.head_dim_v;
    gO = static_cast<Element*>(p.o) + q.token0 * stride + q.head * p.head_dim_v;
    gLse = p.lse + max(q.b, 0) * p.lse_row_stride + q.head * p.lse_head_stride +
           (p.q_start ? q.token0 : int64_t(q.row0));
  }

  // By way of this warp's rows of the queries' place. The copy may still be reading them
  // afterwards.
  __device__ void store_through(Staging& sQ, const Output& o) const {
    constexpr int kChunks = kHeadDim / 8, kPanelChunks = Traits::kPanel / 8;  // of 16 bytes
    constexpr int kPanelBytes = sizeof(sQ[0]);
    const uint32_t sRows = ptx::shared_address(sQ) + row0 * (kPanelChunks * 16);
    const auto place = [&](int row, int chunk) {
      const int swizzle = row / (8 / kPanelChunks) % kPanelChunks;
      return sRows + chunk / kPanelChunks * kPanelBytes + row * (kPanelChunks * 16) +
             (chunk % kPanelChunks ^ swizzle) * 16;
    };
#pragma unroll
    for (int c = 0; c < kChunks; c += 2) {
      const uint32_t x[4] = {pack(o, 2 * c), pack(o, 2 * c + 1), pack(o, 2 * c + 2),
                             pack(o, 2 * c + 3)};
      ptx::stmatrix_x4(place(lane % 16, c + lane / 16), x);
    }
    ptx::fence_async_proxy();
    __syncwarp();  // the rows are written by all lanes before they are read
    if (row0 + 16 <= q.rows) {
      if (lane == 0) {
#pragma unroll
        for (int i = 0; i < Traits::kPanelsV; ++i) {
          ptx::tensor_store(params.o, sRows + i * kPanelBytes, i * Traits::kPanel, q.head,
                            int(q.token0) + row0, 0);
        }
        ptx::bulk_commit();
      }
      return;
    }
    // A copy would write the rows of a neighbour too.
    for (int i = lane; i < 16 * kChunks; i += 32) {
      const int row = i / kChunks, chunk = i % kChunks;
      uint32_t x[4];
      ptx::load_shared_v4(x, place(row, chunk));
      write(row0 + row, chunk * 8, x);
    }
  }

  __device__ void store(const Output& o) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int d = 0; d < kHeadDim / 32; ++d) {
        uint32_t x[4];  // two dims of each of four chunks of 8
#pragma unroll
        for (int c = 0; c < 4; ++c) x[c] = pack(o, (d * 4 + c) * 2 + h);
        transpose_quad(x);  // eight dims of chunk lane % 4
        write(row0 + h * 8 + lane / 4, d * 32 + lane % 4 * 8, x);
      }
    }
  }

 private:
  __device__ static uint32_t pack(const Output& o, int i) {
    return Mma<Traits::kDType>::pack(o[2 * i], o[2 * i + 1]);
  }

  __device__ void write(int row, int dim, const uint32_t (&x)[4]) const {
    if (row >= q.rows || dim >= params.attention.head_dim_v) return;
    *reinterpret_cast<uint4*>(gO + row * stride + dim) = make_uint4(x[0], x[1], x[2], x[3]);
  }
};

}  // namespace jax_fa
