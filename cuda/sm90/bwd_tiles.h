// Tiles, order of work and scratch of the Hopper backward kernel. Plain C++: the kernel is built
// from it, the planner explains it and the lowering allocates by it.
#pragma once

#include "../sm80/bwd_tiles.h"
#include "tiles.h"

namespace jax_fa {

struct BwdHopperTile {
  int m, n;    // keys that a block owns, or two together, and queries that it walks at a time
  int stages;  // buffers of queries and of the gradients of their outputs
  int warps;   // 4 that produce, 4 for dq, 8 for dk and dv
};

constexpr bool bwd_sm90_has_tile(int head_dim_tile, DType dtype) {
  return head_dim_tile <= kMostHeadDim && dtype != DType::kF32;
}

// Whether the keys of a tile are those of two blocks. Else dk and dv of 64 keys fit the registers
// of a warpgroup beside their scores: dk, dv, one of s and dp at a time, and p in 16 bits.
constexpr bool bwd_sm90_pairs(int head_dim_tile) { return head_dim_tile > 128; }

constexpr BwdHopperTile bwd_sm90_tile(int head_dim_tile, bool general) {
  return {128, head_dim_tile <= 64 && !general ? 128 : 64, 2, 16};
}

// dq is summed in tiles of so many queries of a head.
constexpr int kBwdSumQueries = 64;

// Whether the kernel can run a call.
inline bool bwd_sm90_covers(const BackwardParams& p, int head_dim_tile) {
  return bwd_sm90_has_tile(head_dim_tile, p.fwd.dtype) && !p.fwd.bias && sm90_covers_rate(p.fwd);
}

// Counters of dq's sums in a fixed order, one for each tile of them and each block that adds its
// dims, behind those sums.
inline int64_t bwd_sm90_turns(bool packed, int batch, int len_q, int total_q, int heads_q,
                              int head_dim_tile) {
  const int blocks = bwd_sm90_pairs(head_dim_tile) ? 2 : 1;
  return heads_q * bwd_sum_slots(packed, batch, len_q, total_q, kBwdSumQueries) * blocks;
}

// With turns, the blocks of a pair start one after the other, at every section anew. Sections of so
// many pairs keep that short. What they read at a time still fits L2, as these blocks follow one
// another closely. A turn is that of several tiles of queries: to pass one on and to see that takes
// longer than a tile does.
//
// H200, bf16, forward and backward at T = 8k against sums in any order, head_dim 64, 128, 256,
// without a mask and causal: with turns of 64 queries 1.01, 1.23, 1.24, 1.26, 1.30, 1.21; of 128
// 1.07, 1.34, 1.06, 1.15, 1.20, 1.10; of 256 1.02, 1.31, 1.16, 1.13, 1.23, 1.08; of 512 1.05, 1.28,
// 1.42, 1.32, 1.49, 1.38, all of these with sections of 16 pairs. Turns of 256 with 32 pairs 1.05,
// 1.07, 1.21, 1.05, 1.24, 1.08, with 8 1.00, 1.64, 1.07, 1.33, 1.19, 1.19, with
// 64 1.46, 1.10, 1.27, 1.06, 1.27, 1.08. At head_dim 128, causal, sections that fit L2 as a
// whole 1.49.
constexpr int64_t kPairsInTurns = 32;
constexpr int kTurnQueries = 256;

// Pairs of a batch row and a key head, heads where rows are packed. A section is what fits L2 with
// its queries, the gradients of their outputs and the sums of dq.
inline HopperOrder bwd_sm90_order(const BackwardParams& p, int keys, bool masked) {
  const AttentionParams& fwd = p.fwd;
  const int64_t tiles = bwd_keys_tiles(p, keys);
  const int64_t pairs = int64_t(fwd.q_start ? 1 : fwd.batch) * fwd.heads_kv;
  const int64_t group = fwd.heads_q / fwd.heads_kv;
  const int64_t query_bytes = fwd.head_dim * (2 + 4) + fwd.head_dim_v * 2;
  const int64_t bytes = int64_t(fwd.len_q) * group * query_bytes;
  const int64_t fitting =
      std::max(kFwdSectionBytes / std::max<int64_t>(1, bytes), p.deterministic ? kPairsInTurns : 1);
  const int64_t section = std::clamp<int64_t>(fitting, 1, std::max<int64_t>(pairs, 1));
  return {int(tiles), int(pairs), int(section), int(tiles * pairs), masked};
}

}  // namespace jax_fa
