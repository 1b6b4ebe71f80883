// Tiles, grids and scratch of the portable backward kernels. Plain C++: the kernels are built from
// it, the planner explains it and the lowering allocates by it.
#pragma once

#include <initializer_list>

#include "tiles.h"

namespace jax_fa {

// A block owns m rows (of keys or of queries), 16 * products of them in each warp, and walks the
// other side n rows at a time.
struct BwdTile {
  int m, n;
  int warps;
  int blocks_per_sm;
  int stages;         // buffers of walked rows
  int dim_parts = 1;  // as in FwdTile
};

// What a kernel that owns keys computes. Past head_dim 128 a warp's dk and dv do not fit the
// registers together: two launches then, which both form the scores.
enum class KeyGradients { kBoth, kDk, kDv, kBothAndDq };

constexpr bool bwd_splits_keys(int head_dim_tile) { return head_dim_tile > 128; }

// Whether dq is summed in float32 by the kernel that owns keys, 5 products in all, rather than by a
// kernel of its own, 7 products. The order of such sums changes from run to run.
constexpr bool bwd_can_sum_dq(DType dtype) { return dtype != DType::kF32; }

// Whether probabilities and gradients of scores cross shared memory on the way to all three
// gradients (bwd_shared.cu), or stay with the warp that owns their keys (bwd_keys.cu).
constexpr bool bwd_shares_scores(int head_dim_tile) { return head_dim_tile > 64; }

// Owned and walked tiles stay within 99 KB, a block's limit on sm_86, 89 and 120.
constexpr BwdTile bwd_keys_tile(int head_dim_tile, DType dtype, bool general, KeyGradients grads) {
  if (dtype == DType::kF32) {
    if (head_dim_tile <= 64) return {64, 32, 4, 2, 2};
    if (head_dim_tile <= 128) return {64, 32, 4, 2, 1};
    return {32, 16, 2, 2, 1};
  }
  if (head_dim_tile <= 64) {
    if (general) return {128, 32, 8, 1, 2};
    return {128, 32, 4, 2, 2};
  }
  if (head_dim_tile <= 128) return {64, general ? 32 : 64, 4, 2, 2};
  return {64, 32, 4, 2, head_dim_tile <= 192 || grads == KeyGradients::kDv ? 2 : 1};
}

// The tile of bwd_shared.cu. Many keys a block mean few sums of dq, at the price of 113 to 209 KB:
// a block's limit is 163 KB on sm_80, 227 on sm_90, and elsewhere dq takes a kernel of its own.
//
// H200, bf16, B * T = 16384, N * H = 2048, T = 8192, no mask, the kernel alone: at head_dim 128, 64
// x 64 with one buffer and two blocks an SM (it spills 80 bytes of its 128 registers) takes 11.8 ms
// and 128 x 32 takes 13.0 where 128 x 64 takes 9.5; at 256, one buffer takes 13.2 ms where two take
// 12.0. At 64, 128 x 128 takes 10.9 ms and narrower tiles more, where bwd_keys.cu takes 9.9.
constexpr BwdTile bwd_shared_tile(int head_dim_tile, bool general, int stages) {
  if (head_dim_tile <= 128) return {128, general && head_dim_tile == 128 ? 32 : 64, 8, 1, stages};
  return {64, 64, 8, 1, stages};
}

// Owned, walked and shared rows of 16 bits, {lse, delta} of the queries, the block's plan.
constexpr int bwd_shared_bytes(int head_dim_tile, const BwdTile& tile) {
  constexpr int kPlanBytes = 256;
  const int rows = 2 * tile.m + 2 * tile.stages * tile.n;
  return rows * head_dim_tile * 2 + 2 * tile.m * tile.n * 2 + tile.stages * tile.n * 8 + kPlanBytes;
}

// Buffers of queries for which a block has room; 0: it has none for the kernel.
constexpr int bwd_shared_stages(int head_dim_tile, bool general, int limit) {
  for (const int stages : {2, 1}) {
    const BwdTile tile = bwd_shared_tile(head_dim_tile, general, stages);
    if (bwd_shared_bytes(head_dim_tile, tile) <= limit) return stages;
  }
  return 0;
}

constexpr BwdTile bwd_queries_tile(int head_dim_tile, DType dtype, bool general) {
  if (dtype == DType::kF32) {
    if (head_dim_tile <= 64) return {64, 32, 4, 2, 2};
    if (head_dim_tile <= 128) return {64, 32, 4, 2, 1};
    return {32, 16, 2, 2, 1};
  }
  if (head_dim_tile <= 64) return {128, general ? 32 : 64, 4, 2, 2};
  if (head_dim_tile <= 128) return {128, general && head_dim_tile == 128 ? 16 : 32, 4, 2, 2};
  return {64, 32, 4, 2, head_dim_tile <= 192 ? 2 : 1};
}

// The kernel for the gradient of bias holds no sums over dims: its tile is that of queries.
constexpr BwdTile bwd_bias_tile(int head_dim_tile, DType dtype) {
  BwdTile tile = bwd_queries_tile(head_dim_tile, dtype, true);
  tile.stages = 1;
  return tile;
}

// Whether scores are more than a scaled product.
inline bool bwd_general(const AttentionParams& p) {
  return p.scale <= 0 || p.softcap != 0 || p.alibi_slopes || p.bias;
}

// Tiles of n queries in which dq is summed, for one head: those of batch row b, whose first query
// is token0 of the array, begin at bwd_sum_slot(). Packed rows start where they like and round up
// to tiles of their own.
__host__ __device__ inline int64_t bwd_sum_slots(bool packed, int batch, int len_q, int total_q,
                                                 int n) {
  return packed ? total_q / n + batch + 1 : int64_t(batch) * ((len_q + n - 1) / n);
}
__host__ __device__ inline int64_t bwd_sum_slot(bool packed, int b, int64_t token0, int batch,
                                                int64_t slots, int n) {
  return packed ? token0 / n + b : b * (slots / batch);
}

// Floats of scratch for dq; the widest tile of queries needs the most. One more counts the tiles of
// keys that blocks have taken (cuda/sm90/bwd.cu).
inline int64_t bwd_dq_sum_size(bool packed, int batch, int len_q, int total_q, int heads_q,
                               int head_dim_tile, DType dtype) {
  if (!bwd_can_sum_dq(dtype)) return 0;
  constexpr int kMostQueries = 64;
  return bwd_sum_slots(packed, batch, len_q, total_q, kMostQueries) * kMostQueries * heads_q *
             head_dim_tile +
         1;
}

// One block for each tile of keys of each (batch row, key head), tiles fastest: the causal ones
// with the most queries come first.
__host__ __device__ inline int64_t bwd_keys_tiles(const BackwardParams& p, int m) {
  const bool packed = p.fwd.q_start != nullptr;
  const int tokens = packed ? p.total_k : p.fwd.kv.len_kv;
  return (tokens + m - 1) / m + (packed ? p.fwd.batch : 0);
}

inline int64_t bwd_keys_blocks(const BackwardParams& p, int m) {
  const bool packed = p.fwd.q_start != nullptr;
  const int64_t pairs = int64_t(packed ? 1 : p.fwd.batch) * p.fwd.heads_kv;
  return bwd_keys_tiles(p, m) * pairs;
}

}  // namespace jax_fa
