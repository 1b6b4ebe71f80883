// Which keys a block that owns keys takes, the queries that it walks, and their movement.
#pragma once

#include "bwd_scores.cuh"
#include "schedule.cuh"

namespace jax_fa {

// Keys [row0, row0 + rows) of batch row b, at tokens token0, ... of dk and dv, which have a row of
// their own for b. Those at or past len_kv only have to be written.
struct KeyTile {
  int b, head;
  int row0, rows;  // rows <= 0: nothing to do
  int len_kv;
  int64_t token0;  // packed: of the array, dense: of the row
};

// Tile `tile` of a pair of batch row and key head, or of a key head where rows are packed. A whole
// warp calls it.
template <int kBlockM>
__device__ KeyTile locate_keys(const BackwardParams& p, int pair, int tile) {
  const AttentionParams& fwd = p.fwd;
  KeyTile out;
  int begin = 0, end = fwd.kv.len_kv;
  if (fwd.q_start) {
    const Stretch stretch =
        find_stretch<kBlockM, 1>(fwd.kv.start, fwd.batch, p.total_k, tile, [](int) { return 0; });
    out.b = stretch.b;
    out.head = pair;
    begin = stretch.begin;
    end = stretch.end;
    out.row0 = stretch.tile * kBlockM;
  } else {
    out.b = pair / fwd.heads_kv;
    out.head = pair - out.b * fwd.heads_kv;
    out.row0 = tile * kBlockM;
  }
  out.token0 = int64_t(begin) + out.row0;
  out.rows = min(kBlockM, end - begin - out.row0);
  const int longest = min(end - begin, fwd.kv.len_kv);
  const int length = fwd.kv.length ? fwd.kv.length[max(out.b, 0)] : longest;
  out.len_kv = out.b < 0 ? 0 : min(max(length, 0), longest);
  return out;
}

// That of this block.
template <int kBlockM>
__device__ KeyTile locate_keys(const BackwardParams& p) {
  const int tiles = bwd_keys_tiles(p, kBlockM), pair = blockIdx.x / tiles;
  return locate_keys<kBlockM>(p, pair, blockIdx.x - pair * tiles);
}

// Which of all tiles of n queries in which dq is summed a tile of as many is.
__device__ inline int64_t tile_of_sums(const AttentionParams& fwd, const QueryTile& tile, int n) {
  const bool packed = fwd.q_start != nullptr;
  const int64_t slots = bwd_sum_slots(packed, fwd.batch, fwd.len_q, fwd.total_q, n);
  const int64_t first = bwd_sum_slot(packed, tile.b, tile.token0 - tile.row0, fwd.batch, slots, n);
  return tile.head * slots + first + tile.row0 / n;
}

// A tile of queries from row0 on, of one head, and the buffer in which it lies.
struct QueryStep {
  int head, row0, stage;
};

// What the threads of a block share, read where it is used: registers are for the accumulators. The
// tiles of queries that see some of its keys come head by head of the group.
template <class Traits>
struct BlockPlan {
  static constexpr int kBlockN = Traits::kBlockN;

  KeyTile keys;
  IntervalMask mask;
  int b, len_q;
  int head0, head1;      // the group's query heads, none if no query sees a key
  int begin, end;        // rows of the tiles of one head
  int64_t token0;        // of the row's first query in q
  int64_t stats0;        // the same in params.rows, for head 0
  int64_t slots, slot0;  // tiles of sums of dq of one head, and the row's first

  __device__ BlockPlan(const AttentionParams& fwd, const KeyTile& keys, int b, int len_q)
      : keys(keys),
        mask(len_q, keys.len_kv, fwd.window_left, fwd.window_right, fwd.top_left),
        b(b),
        len_q(len_q) {
    const int group = fwd.heads_q / fwd.heads_kv;
    const bool packed = fwd.q_start != nullptr;
    token0 = packed ? int64_t(fwd.q_start[b]) : int64_t(b) * fwd.len_q;
    stats0 = b * fwd.lse_row_stride + (packed ? token0 : 0);
    slots = bwd_sum_slots(packed, fwd.batch, fwd.len_q, fwd.total_q, kBlockN);
    slot0 = bwd_sum_slot(packed, b, token0, fwd.batch, slots, kBlockN);
    const Interval seeing = mask.rows_seeing(keys.row0, keys.row0 + Traits::kBlockM, len_q);
    head0 = keys.head * group;
    head1 = seeing.lo < seeing.hi ? head0 + group : head0;
    begin = seeing.lo / kBlockN * kBlockN;
    end = seeing.hi;
  }

  __device__ QueryStep first() const { return {head0, begin, 0}; }
  __device__ QueryStep next(const QueryStep& step) const {
    const bool same = step.row0 + kBlockN < end;
    return {same ? step.head : step.head + 1, same ? step.row0 + kBlockN : begin,
            (step.stage + 1) % Traits::kStages};
  }
  __device__ bool is_last(const QueryStep& step) const {
    return step.head + 1 >= head1 && step.row0 + kBlockN >= end;
  }

  // Whether keys from `key` on within the block's are seen by some query of the tile.
  __device__ bool is_seen(const QueryStep& step, int key, int keys_count) const {
    const int query1 = min(step.row0 + kBlockN, len_q), key0 = keys.row0 + key;
    return mask.classify(step.row0, query1, key0, key0 + keys_count) != TileMask::kSkip;
  }

  // The tile of sums of dq to which a tile of queries belongs.
  __device__ int64_t sum_tile(const QueryStep& step) const {
    return step.head * slots + slot0 + step.row0 / kBlockN;
  }
};

// Moves the tiles of one block.
template <class Traits, class SharedStorage>
struct Producer {
  using Element = typename Traits::Element;

  const BackwardParams& params;
  SharedStorage& shared;

  __device__ void load_keys() const {
    const AttentionParams& fwd = params.fwd;
    load(fwd.k, fwd.head_dim, shared.k);
    if constexpr (Traits::kDk) load(fwd.v, fwd.head_dim_v, shared.v);
  }

  __device__ void load_queries(const QueryStep& step) const {
    constexpr int kBlockN = Traits::kBlockN;
    const AttentionParams& fwd = params.fwd;
    const BlockPlan<Traits>& plan = shared.plan;
    const auto [head, row0, stage] = step;
    const int rows = plan.len_q - row0;
    const int64_t token = plan.token0 + row0, dout_stride = int64_t(fwd.heads_q) * fwd.head_dim_v;
    const auto* gQ =
        static_cast<const Element*>(fwd.q) + token * fwd.q_token_stride + head * fwd.q_head_stride;
    const auto* gDout =
        static_cast<const Element*>(params.dout) + token * dout_stride + head * fwd.head_dim_v;
    copy_tile<Traits, kBlockN>(ptx::shared_address(shared.q[stage]), rows, fwd.head_dim,
                               [&](int row) { return gQ + row * fwd.q_token_stride; });
    copy_tile<Traits, kBlockN>(ptx::shared_address(shared.dout[stage]), rows, fwd.head_dim_v,
                               [&](int row) { return gDout + row * dout_stride; });
    load_query_rows<kBlockN>(shared.rows[stage],
                             params.rows + plan.stats0 + head * fwd.lse_head_stride + row0, rows);
  }

 private:
  template <class Tile>
  __device__ void load(const KvTensor& x, int dim, Tile& tile) const {
    const KeyTile& keys = shared.plan.keys;
    const KvHead kv(x, params.fwd.kv, shared.plan.b, keys.head, keys.len_kv);
    load_kv<Traits, Traits::kBlockM>(ptx::shared_address(tile), x, kv, keys.row0, dim);
  }
};

template <class Traits>
__device__ void make_plan(BlockPlan<Traits>& plan, const AttentionParams& fwd,
                          const KeyTile& keys) {
  const int b = max(keys.b, 0);
  const int len_q = fwd.q_length ? min(max(fwd.q_length[b], 0), fwd.len_q) : fwd.len_q;
  plan = BlockPlan<Traits>(fwd, keys, b, len_q);
}

}  // namespace jax_fa
