// Tiles and grid of the portable forward kernel. Plain C++: the kernel is built from it and the
// planner explains it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../params.h"

namespace jax_fa {

struct FwdTile {
  int m, n;           // queries and keys of a tile
  int warps;          // each owns m / warps queries, or as many more as there are dim_parts
  int blocks_per_sm;  // what registers and shared memory are budgeted for
  int dim_parts = 1;  // of a row: as many warps have its queries, and a part of its dims each
};

// Two 16-row products per warp (m = 32 * warps) halve the shared-memory reads of keys and values,
// which bound the loop otherwise; past head_dim 128 their accumulators would not fit the registers.
// General scores need registers of their own, so their tiles of two products are narrower. Q + K +
// V stay within 99 KB, a block's limit on sm_86, 89 and 120.
//
// H200, bf16: at head_dim 64, n = 64 with three blocks an SM (it spills 20 bytes of its 168
// registers) is 3 to 12 % behind for T = 1k to 16k; at 128, m = 64 with three blocks is 10 to 16 %
// behind for T = 4k and 16k, and a second buffer of keys and values gains nothing.
//
// Past head_dim 256 the output of 16 queries is more than the registers of a warp: two share them.
// H200, bf16, head_dim 512, 16 heads over 2, B * T = 8192, T = 1k, 4k, 8k, TFLOP/s: 148, 159, 161,
// causal 132, 159, 164, where XLA has 235, 336, 346 and causal 112, 156, 165.
constexpr FwdTile fwd_sm80_tile(int head_dim_tile, DType dtype, bool general) {
  if (head_dim_tile > kMostHeadDim) return {32, 16, 4, 2, 2};
  if (dtype == DType::kF32) {
    if (head_dim_tile <= 128) return {64, 32, 4, 2};
    return {64, head_dim_tile <= 192 ? 32 : 16, 4, 1};
  }
  if (head_dim_tile <= 64) return {128, general ? 32 : 128, 4, 2};
  if (head_dim_tile <= 128) return {128, general ? 32 : 64, 4, 2};
  return {64, 64, 4, 2};
}

inline bool fwd_sm80_quantized(const AttentionParams& p) {
  return p.k.dtype != p.dtype || p.v.dtype != p.dtype;
}

// Whether the call takes the instance for any score, or the one for a positive scale and no more.
inline bool fwd_sm80_general(const AttentionParams& p) {
  return fwd_sm80_quantized(p) || p.scale <= 0 || p.softcap != 0 || p.alibi_slopes || p.bias ||
         p.seeds;
}

// A section is a set of (batch row, head) pairs whose keys and values fit L2 together. The grid
// walks section by section, within one from the last query tile of all its heads to the first: the
// longest causal tiles first, so that the last wave is made of short ones.
struct FwdGrid {
  unsigned section;   // pairs of a section: x
  unsigned tiles;     // query tiles of a pair: y
  unsigned sections;  // z
  int64_t blocks;     // that have a pair
};

constexpr int64_t kFwdSectionBytes = 32 << 20, kMaxSections = 65535;

inline int element_size(DType dtype) {
  if (dtype == DType::kF32) return 4;
  return dtype == DType::kF16 || dtype == DType::kBF16 ? 2 : 1;
}

// Pairs of a batch row and a head, or heads where queries are packed.
inline int64_t fwd_pairs(const AttentionParams& p) {
  return p.q_start ? p.heads_q : int64_t(p.batch) * p.heads_q;
}

// Tiles of `rows` queries of a pair, at most. Packed rows start where they like: each of the
// batch + 1 stretches (before the first row and from each row's start to the next) rounds up to
// tiles of its own.
inline int fwd_tiles(const AttentionParams& p, int rows) {
  const int tokens = p.q_start ? p.total_q : p.len_q;
  return (tokens + rows - 1) / rows + (p.q_start ? p.batch : 0);
}

// Query heads whose keys and values fit a section.
inline int64_t fwd_section_heads(const AttentionParams& p) {
  const int64_t head_bytes = int64_t(p.kv.len_kv) * (p.head_dim * element_size(p.k.dtype) +
                                                     p.head_dim_v * element_size(p.v.dtype));
  const int64_t heads = std::max<int64_t>(1, kFwdSectionBytes / std::max<int64_t>(1, head_bytes));
  return heads * (p.heads_q / p.heads_kv);
}

inline FwdGrid fwd_sm80_grid(const AttentionParams& p, const FwdTile& tile) {
  const int tiles = fwd_tiles(p, tile.m);
  const int64_t pairs = fwd_pairs(p);
  const int64_t fewest = std::max<int64_t>((pairs + kMaxSections - 1) / kMaxSections, 1);
  const int64_t most = std::max<int64_t>(pairs, 1);
  const int64_t section = std::clamp(fwd_section_heads(p), fewest, most);
  const int64_t sections = (pairs + section - 1) / section;
  return {unsigned(section), unsigned(tiles), unsigned(sections), int64_t(tiles) * pairs};
}

}  // namespace jax_fa
