// Which queries a block of the forward kernel takes: see FwdGrid for the order.
#pragma once

#include "../mask.cuh"
#include "../rows.cuh"
#include "tiles.h"

namespace jax_fa {

// Queries [row0, row0 + rows) of batch row b, at tokens token0, ... of the array. Those at or past
// len_q belong to no row (b may then be -1): they are padding that only has to be written.
struct QueryTile {
  int b, head;
  int row0, rows;  // rows <= 0: nothing to do
  int len_q;
  int64_t token0;
};

// Packed tokens: stretch b = the tokens from the start of row b, or past the `elsewhere(b)` first
// ones that belong to another launch, to the start of row b + 1; stretch -1 = those before the
// first row.
template <class Elsewhere>
__device__ inline Interval stretch_tokens(const int* start, int batch, int total, int b,
                                          Elsewhere elsewhere) {
  int begin = b < 0 ? 0 : b < batch ? start[b] : total;
  if (b >= 0 && b < batch) begin += elsewhere(b);
  return {begin, b + 1 < batch ? start[b + 1] : total};
}

// A stretch, and the how-manyeth tile of it.
struct Stretch {
  int b, begin, end, tile;
};

// A warp scans the number of tiles of kStretches stretches a lane at a time.
template <int kBlockM, int kStretches, class Elsewhere>
__device__ inline Stretch find_stretch(const int* start, int batch, int total, int tile,
                                       Elsewhere elsewhere) {
  const int lane = threadIdx.x % 32;
  int tiles_before = 0;
  for (int base = -1; base < batch; base += 32 * kStretches) {
    int begin[kStretches], end[kStretches], tiles = 0;
#pragma unroll
    for (int i = 0; i < kStretches; ++i) {
      const int b = base + lane * kStretches + i;
      const Interval tokens = stretch_tokens(start, batch, total, b, elsewhere);
      begin[i] = tokens.lo;
      end[i] = tokens.hi;
      tiles += (end[i] - begin[i] + kBlockM - 1) / kBlockM;
    }
    int scan = tiles;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(0xffffffff, scan, step);
      if (lane >= step) scan += other;
    }
    const unsigned after = __ballot_sync(0xffffffff, tile < tiles_before + scan);
    if (after != 0) {
      int within = tile - tiles_before - (scan - tiles);  // the tile's number among the lane's
      Stretch found = {};
#pragma unroll
      for (int i = 0; i < kStretches; ++i) {
        const int tiles_here = (end[i] - begin[i] + kBlockM - 1) / kBlockM;
        if (within >= 0 && within < tiles_here) {
          found = {base + lane * kStretches + i, begin[i], end[i], within};
        }
        within -= tiles_here;
      }
      const int owner = __ffs(after) - 1;
      return {__shfl_sync(0xffffffff, found.b, owner), __shfl_sync(0xffffffff, found.begin, owner),
              __shfl_sync(0xffffffff, found.end, owner),
              __shfl_sync(0xffffffff, found.tile, owner)};
    }
    tiles_before += __shfl_sync(0xffffffff, scan, 31);
  }
  return {0, 0, 0, 0};  // the grid is an upper bound: no stretch is left for this block
}

// Tile `tile` of a pair of batch row and head, or of a head where queries are packed. A whole warp
// calls it.
template <int kBlockM, int kStretches>
__device__ inline QueryTile query_tile(const AttentionParams& p, int pair, int tile) {
  QueryTile out;
  int begin, end;
  if (p.q_start) {
    const Stretch stretch = find_stretch<kBlockM, kStretches>(
        p.q_start, p.batch, p.total_q, tile, [&](int b) { return queries_elsewhere(p, b); });
    out.b = stretch.b;
    out.head = pair;
    begin = stretch.begin;
    end = stretch.end;
    out.row0 = stretch.tile * kBlockM;
  } else {
    out.b = pair / p.heads_q;
    out.head = pair - out.b * p.heads_q;
    begin = out.b * p.len_q;
    end = begin + p.len_q;
    out.row0 = tile * kBlockM;
  }
  out.token0 = int64_t(begin) + out.row0;
  const bool exists = p.q_start ? pair < p.heads_q : out.b < p.batch;  // else past the last section
  out.rows = exists ? min(kBlockM, end - begin - out.row0) : 0;
  if (out.rows <= 0) return out;
  const int len_q = out.b < 0 ? 0 : row_len_q(p, out.b);
  out.len_q = len_q < p.min_len_q ? 0 : len_q;
  return out;
}

// Most blocks of a batch of short rows do nothing else: they scan several stretches a lane.
template <int kBlockM>
__device__ inline QueryTile locate_tile(const AttentionParams& p) {
  return query_tile<kBlockM, 4>(p, blockIdx.z * gridDim.x + blockIdx.x, gridDim.y - 1 - blockIdx.y);
}

}  // namespace jax_fa
