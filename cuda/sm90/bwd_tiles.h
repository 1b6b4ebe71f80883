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

// With turns, the blocks of a pair start one after the other, at every section anew. Sections of
// few pairs keep that short. What they read at a time still fits L2, as these blocks follow one
// another closely. A turn is that of several tiles of queries: to pass one on and to see that takes
// longer than a tile does.
struct BwdTurns {
  int pairs;    // of a section
  int queries;  // of a turn, a power of two
};

// H200, bf16, forward and backward at T = 8k, times as long as with sums in any order, head_dim 64,
// 128, 256. Without a mask, sections of 16 pairs, turns of 64 queries 1.01, 1.24, 1.30; of
// 128 1.07, 1.06, 1.20; of 256 1.02, 1.16, 1.23; of 512 1.05, 1.42, 1.49; sections of 32 pairs,
// turns of 128 1.12, 1.19, 1.21. Causal, sections of 32 pairs, turns of 128 1.14, 1.06, 1.11; of
// 256 1.07, 1.05, 1.08; sections of 16 pairs, turns of 256 1.31, 1.13, 1.08; of
// 64 1.23, 1.26, 1.21; sections that fit L2 as a whole, at head_dim 128, 1.49.
inline BwdTurns bwd_sm90_turn_sizes(const AttentionParams& p) {
  return fwd_sm90_windowed(p) ? BwdTurns{32, 256} : BwdTurns{16, 128};
}

// Pairs of a batch row and a key head, heads where rows are packed. A section is what fits L2 with
// its queries, the gradients of their outputs and the sums of dq.
inline HopperOrder bwd_sm90_order(const BackwardParams& p, int keys, bool masked) {
  const AttentionParams& fwd = p.fwd;
  const int64_t tiles = bwd_keys_tiles(p, keys);
  const int64_t pairs = int64_t(fwd.q_start ? 1 : fwd.batch) * fwd.heads_kv;
  const int64_t group = fwd.heads_q / fwd.heads_kv;
  const int64_t query_bytes = fwd.head_dim * (2 + 4) + fwd.head_dim_v * 2;
  const int64_t bytes = int64_t(fwd.len_q) * group * query_bytes;
  const int64_t fitting = kFwdSectionBytes / std::max<int64_t>(1, bytes);
  const int64_t fewest = p.deterministic ? bwd_sm90_turn_sizes(fwd).pairs : 1;
  const int64_t section =
      std::clamp<int64_t>(std::max(fitting, fewest), 1, std::max<int64_t>(pairs, 1));
  return {int(tiles), int(pairs), int(section), int(tiles * pairs), masked};
}

}  // namespace jax_fa
