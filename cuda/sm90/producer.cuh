// The producers of a block: which tile comes next, and the copies of what it reads.
#pragma once

#include "../launch.cuh"
#include "block.cuh"

namespace jax_fa {

// Warp 0 of the producers.
template <class Traits>
struct Scheduler {
  const HopperParams& params;
  HopperStorage<Traits>& shared;
  const AttentionParams& p = params.attention;
  int lane = threadIdx.x % 32;

  // Whose maximum is looked for in every tile of keys, after one that outgrew its first.
  static constexpr int kExactTiles = 16;

  using TileRing = Ring<HopperStorage<Traits>::kTiles>;
  TileRing ring = {}, oldest = {};  // the next to publish, and the oldest that was not judged
  int exact_tiles = 0;              // of those to come

  __device__ void run() {
    count();
    for (int i = blockIdx.x; blockIdx.x < shared.blocks && i < total(); i = next(i)) {
      HopperOrder order = params.order;
      order.tiles = shared.pair_tiles;
      const HopperOrder::Place place = order(i);
      const QueryTile q = query_tile<Traits::kBlockM, 1>(p, place.pair, place.tile);
      if (q.rows > 0) schedule(q);
    }
    while (oldest.count != ring.count) settle();
    publish({});  // the end
    end_after_previous(p);
  }

 private:
  __device__ int total() const { return shared.pair_tiles * params.order.pairs; }

  // How many tiles there are, and of a hybrid batch how many blocks take them.
  __device__ void count() {
    if (lane == 0) {
      shared.pair_tiles = params.order.tiles;
      shared.blocks = gridDim.x;
      shared.in_turn = !params.next_tile;
    }
    if (p.q_start) count_packed();
    __syncwarp();  // all lanes know it
  }

  __device__ void count_packed() {
    int tiles = 0, longest = 0;
    float pairs = 0.f, keys = 0.f;
#pragma unroll 1
    for (int b = lane - 1; b < p.batch; b += 32) {
      const Interval tokens = stretch_tokens(p.q_start, p.batch, p.total_q, b,
                                             [&](int b) { return queries_elsewhere(p, b); });
      const int stretch_tiles = (tokens.hi - tokens.lo + Traits::kBlockM - 1) / Traits::kBlockM;
      tiles += stretch_tiles;
      longest = max(longest, stretch_tiles);
      const int len_q = p.min_len_q > 0 && b >= 0 ? row_len_q(p, b) : 0;
      if (len_q == 0) continue;
      const IntervalMask mask(len_q, row_len_kv(p, b), p.window_left, p.window_right, p.top_left);
      const bool here = len_q >= p.min_len_q;
      const Interval seen = here ? mask.seen_by_any(len_q / 2, len_q / 2 + 1)  // an average query
                                 : mask.seen_by_any(0, len_q);
      (here ? pairs : keys) += float(max(seen.hi - seen.lo, 0)) * (here ? len_q : 1);
    }
    tiles = __reduce_add_sync(0xffffffff, tiles);
    longest = __reduce_max_sync(0xffffffff, longest);
    if (lane == 0) {
      shared.pair_tiles = tiles;
      shared.in_turn |= longest < kTilesWorthTaking;
    }
    if (p.min_len_q == 0) return;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      pairs += __shfl_xor_sync(0xffffffff, pairs, step);
      keys += __shfl_xor_sync(0xffffffff, keys, step);
    }
    const HybridCosts& costs = params.costs;
    tiles *= params.order.pairs;
    const int blocks =
        prefill_share(gridDim.x, tiles, pairs * costs.pair + tiles * costs.tile, keys * costs.key);
    if (lane == 0) shared.blocks = blocks;
  }

  __device__ int next(int i) {
    if (shared.in_turn) return i + shared.blocks;
    using Storage = HopperStorage<Traits>;
    const int most = params.order.longest_first ? Storage::kMaskedTilesTaken : Storage::kTilesTaken;
    while (ring.count - oldest.count >= most) settle();
    int taken = 0;
    if (lane == 0) taken = atomicAdd(params.next_tile, 1);
    return shared.blocks + __shfl_sync(0xffffffff, taken, 0);
  }

  // Hands a tile over, or writes it here if none of its queries sees a key.
  __device__ void schedule(const QueryTile& q) {
    constexpr int kBlockN = Traits::kBlockN;
    const int b = max(q.b, 0);
    const IntervalMask mask(q.len_q, row_len_kv(p, b), p.window_left, p.window_right, p.top_left);
    const int row_end = min(q.row0 + q.rows, q.len_q);
    const Interval any = mask.seen_by_any(q.row0, max(row_end, q.row0 + 1));
    const int begin = any.lo / kBlockN;
    const int end = q.row0 < row_end ? (any.hi + kBlockN - 1) / kBlockN : 0;
    if (begin < end) {
      const KvRow k(p.kv, b, p.k.rows), v(p.kv, b, p.v.rows);
      const int head_kv = q.head / (p.heads_q / p.heads_kv);
      float slope = 0.f;
      if (Traits::kGeneral && p.alibi_slopes) {
        slope = p.alibi_slopes[int64_t(b) * p.heads_q + q.head] / params.units.unit;
      }
      publish({q, mask, begin, end, false, head_kv, int(k.row), int(v.row), k.start, slope});
    } else {
      write_unseeing(q);
    }
  }

  __device__ void publish(const WorkTile& tile) {
    while (ring.count - oldest.count >= HopperStorage<Traits>::kTiles) settle();
    wait_empty();
    if (lane == 0) {
      shared.tile(ring.at()) = tile;
      shared.tile(ring.at()).exact |= exact_tiles > 0;
      ptx::barrier_arrive(shared.tile_full[ring.at()]);
    }
    ring.advance();
    --exact_tiles;
  }

  __device__ void wait_empty() const {
    ptx::barrier_wait(shared.tile_empty[ring.at()], ring.parity() ^ 1);
  }

  // Waits until the oldest tile is judged, which is before its epilogue: the last one's runs while
  // the end is published. One that has outgrown its first maximum is done again, as are at first
  // some that follow: their keys may be the same.
  __device__ void settle() {
    const int at = oldest.at();
    ptx::barrier_wait(shared.tile_judged[at], oldest.parity());
    oldest.advance();
    if (!shared.outgrown[at]) return;
    wait_empty();
    copy(shared.tile(ring.at()), shared.tile(at));
    if (lane == 0) {
      shared.outgrown[at] = false;
      shared.tile(ring.at()).exact = true;
      ptx::barrier_arrive(shared.tile_full[ring.at()]);
    }
    ring.advance();
    exact_tiles = kExactTiles;
  }

  // By all lanes, a word each.
  __device__ void copy(WorkTile& to, const WorkTile& from) const {
    static_assert(sizeof(WorkTile) % 4 == 0 && sizeof(WorkTile) <= 32 * 4);
    if (lane < sizeof(WorkTile) / 4) {
      reinterpret_cast<uint32_t*>(&to)[lane] = reinterpret_cast<const uint32_t*>(&from)[lane];
    }
    __syncwarp();  // all lanes have written
  }

  // Queries that see no key, and tokens that belong to no row.
  __device__ void write_unseeing(const QueryTile& q) {
    const int64_t stride = int64_t(p.heads_q) * p.head_dim_v;
    auto* gO =
        static_cast<typename Traits::Element*>(p.o) + q.token0 * stride + q.head * p.head_dim_v;
    float* gLse = p.lse + max(q.b, 0) * p.lse_row_stride + q.head * p.lse_head_stride +
                  (p.q_start ? q.token0 : int64_t(q.row0));
    const float sink = p.sinks && q.b >= 0 ? p.sinks[int64_t(q.b) * p.heads_q + q.head] : -INFINITY;
    const int chunks = p.head_dim_v / 8;
#pragma unroll 1
    for (int i = lane; i < q.rows * chunks; i += 32) {
      const int row = i / chunks;
      reinterpret_cast<uint4*>(gO + row * stride)[i - row * chunks] = make_uint4(0, 0, 0, 0);
    }
#pragma unroll 1
    for (int i = lane; i < q.rows; i += 32) gLse[i] = q.row0 + i < q.len_q ? sink : -INFINITY;
  }
};

// Warp 1 of the producers loads queries and keys, warp 3 values: pages make many boxes, and a warp
// takes 100 cycles to start one. Of 8 bits, which share a ring, warp 1 loads both.
template <class Traits, bool kValues>
struct Loader {
  const HopperParams& params;
  HopperStorage<Traits>& shared;
  const AttentionParams& p = params.attention;
  int lane = threadIdx.x % 32;
  Ring<Traits::kTile.q_buffers> q_ring = {};
  Ring<Traits::kStages> kv_ring = {};
  Ring<Traits::kQuantized ? Traits::kTile.byte_stages : 1> byte_ring = {};

  __device__ void run() {
    for (Ring<HopperStorage<Traits>::kTiles> ring;; ring.advance()) {
      ptx::barrier_wait(shared.tile_full[ring.at()], ring.parity());
      const WorkTile& tile = shared.tile(ring.at());
      if (tile.q.rows == 0) return;
      load(tile);
      __syncwarp();  // all lanes have read the tile
      if (lane == 0) ptx::barrier_arrive(shared.tile_empty[ring.at()]);
    }
  }

 private:
  // Rows past the tile's are those of a neighbour; what they give is not written.
  __device__ void load_q(const QueryTile& q) {
    const int at = q_ring.at();
#pragma unroll
    for (int part = 0; part < Traits::kQueryParts; ++part) {
      ptx::Barrier& full = shared.q_full[at][part];
      const int row0 = part * (Traits::kBlockM / Traits::kQueryParts);
      ptx::barrier_wait(shared.q_empty[at][part], q_ring.parity() ^ 1);
      if (lane == 0) {
        ptx::barrier_expect(full, sizeof(shared.q[0]) / Traits::kQueryParts);
#pragma unroll
        for (int i = 0; i < Traits::kPanels; ++i) {
          ptx::tensor_load(shared.q[at][i][row0], params.q, i * Traits::kPanel, q.head,
                           int(q.token0) + row0, 0, full);
        }
      }
    }
    q_ring.advance();
  }

  // A lane starts one box: all of a tile of keys, or of paged ones one page, where that has keys.
  struct Box {
    int row, token;  // of the arrays, to which that of the batch row comes; token -1: no box
  };

  __device__ int box_start() const { return lane * params.box_tokens; }  // in the tile

  // Looks a box up before there is room for it.
  __device__ Box find_box(const WorkTile& tile, int n) const {
    const int key = n * Traits::kBlockN + box_start();
    if (box_start() >= Traits::kBlockN || key >= tile.mask.len_kv) return {0, -1};
    if (!p.kv.page_table) return {0, tile.start + key};
    const int page = key / p.kv.page_size;
    return {p.kv.page_table[int64_t(tile.q.b) * p.kv.max_pages + page],
            key - page * p.kv.page_size};
  }

  // Keys come before the queries: their place is free sooner.
  __device__ void load(const WorkTile& tile) {
    Box box = find_box(tile, tile.end - 1);
    int copied_from = INT_MAX;
    for (int n = tile.end - 1; n >= tile.begin; --n) {
      const Box next = find_box(tile, max(n - 1, tile.begin));
      if constexpr (Traits::kCopies) wait_copied(tile, n, copied_from);
      const int at = kv_ring.at(), parity = kv_ring.parity() ^ 1;
      if constexpr (Traits::kQuantized) {
        if constexpr (Traits::kBytes) {
          ptx::barrier_wait(shared.k_empty[at], parity);
          load_keys(shared.k[at], params.k, shared.k_full[at], tile.head_kv, tile.k_row, box);
        } else {
          load_bytes(params.k, tile.head_kv, tile.k_row, box);
        }
        if (n == tile.end - 1) load_q(tile.q);
        load_bytes(params.v, tile.head_kv, tile.v_row, box);
      } else if constexpr (kValues) {
        ptx::barrier_wait(shared.v_empty[at], parity);
        const bool clear = n == tile.end - 1 && must_clear<Traits>(p, tile);
        load_keys(shared.v[at], params.v, clear ? shared.v_uncleared[at] : shared.v_full[at],
                  tile.head_kv, tile.v_row, box);
      } else {
        ptx::barrier_wait(shared.k_empty[at], parity);
        load_keys(shared.k[at], params.k, shared.k_full[at], tile.head_kv, tile.k_row, box);
        if (n == tile.end - 1) load_q(tile.q);
      }
      kv_ring.advance();
      box = next;
    }
  }

  // Waits until a tile of keys is copied from 8 bits. Lanes look for its last unit and for those
  // before, which come next: `copied_from` is the first token of those that are known to be there.
  __device__ void wait_copied(const WorkTile& tile, int n, int& copied_from) const {
    constexpr int kTokens = CopyUnits::kTokens;
    const CopiedCache& copied = params.copied;
    if (copied_from <= n * Traits::kBlockN) return;
    const int last = (min((n + 1) * Traits::kBlockN, p.k.tokens) - 1) / kTokens,
              chunk = last - lane;
    const int unit = copied.units.at(tile.k_row, max(chunk, 0), kValues, tile.head_kv);
    do {
      const bool there = chunk < 0 || ptx::load_acquire(copied.copied + unit);
      const int units = __ffs(~__ballot_sync(0xffffffff, there)) - 1;
      copied_from = (last + 1 - (units < 0 ? 32 : units)) * kTokens;
    } while (copied_from > n * Traits::kBlockN);
    ptx::fence_async_proxy_global();  // expect() brings the lanes together before one loads
  }

  // Keys or values that dequantizers wait for.
  __device__ void load_bytes(const CUtensorMap& map, int head_kv, int row, const Box& box) {
    const int at = byte_ring.at();
    ptx::barrier_wait(shared.bytes_empty[at], byte_ring.parity() ^ 1);
    expect(shared.bytes_full[at], box, Traits::kHeadDim);
    if (box.token >= 0) {
      ptx::tensor_load(shared.bytes[at][box_start()], map, 0, head_kv, box.token, row + box.row,
                       shared.bytes_full[at]);
    }
    byte_ring.advance();
  }

  template <class T, int kPanels, int kPanel>
  __device__ void load_keys(T (&sTile)[kPanels][Traits::kBlockN][kPanel], const CUtensorMap& map,
                            ptx::Barrier& full, int head_kv, int row, const Box& box) {
    expect(full, box, sizeof(sTile) / Traits::kBlockN);
    if (box.token < 0) return;
    if (Traits::kInGroups && params.in_groups) {
      const int group = (row + box.row) * (p.kv.page_size / 8) + box.token / 8;
      ptx::tensor_load(&sTile[0][0][0] + box_start() * kPanels * Traits::kPanel, map, 0, 0, 0,
                       group, head_kv, full);
      return;
    }
#pragma unroll
    for (int i = 0; i < kPanels; ++i) {
      ptx::tensor_load(sTile[i][box_start()], map, i * kPanel, head_kv, box.token, row + box.row,
                       full);
    }
  }

  // All lanes' boxes are announced before any of them lands.
  __device__ void expect(ptx::Barrier& full, const Box& box, int row_bytes) const {
    const int boxes = __popc(__ballot_sync(0xffffffff, box.token >= 0));
    if (lane == 0) ptx::barrier_expect(full, boxes * params.box_tokens * row_bytes);
    __syncwarp();  // it is announced, and what lanes waited for is there for all
  }
};

// Warp 2 of the producers: stands between copies and consumers where values have to be cleared.
template <class Traits>
__device__ void clear_values(const AttentionParams& p, HopperStorage<Traits>& shared,
                             const PanelStrides& strides) {
  constexpr int kChunks = Traits::kPanel / 8;  // of 16 bytes, in a panel's row
  const int lane = threadIdx.x % 32;
  Ring<HopperStorage<Traits>::kTiles> ring;
  int at = 0, parities = 0;  // stage of the tile's first values; a bit for each stage
  for (;; ring.advance()) {
    ptx::barrier_wait(shared.tile_full[ring.at()], ring.parity());
    const WorkTile& tile = shared.tile(ring.at());
    if (tile.q.rows == 0) return;
    const bool clear = must_clear<Traits>(p, tile);
    const int rows = tile.end * Traits::kBlockN - tile.mask.len_kv, tiles = tile.end - tile.begin;
    __syncwarp();  // all lanes have read the tile
    if (lane == 0) ptx::barrier_arrive(shared.tile_empty[ring.at()]);
    if (clear) {
      ptx::barrier_wait(shared.v_uncleared[at], parities >> at & 1);
      parities ^= 1 << at;
      const uint32_t sTile = ptx::shared_address(shared.v[at]);
      for (int i = 0; i < Traits::kPanelsV; ++i) {
#pragma unroll 1
        for (int c = (Traits::kBlockN - rows) * kChunks + lane; c < Traits::kBlockN * kChunks;
             c += 32) {
          const int group = c / (8 * kChunks), within = c % (8 * kChunks);
          ptx::store_shared_v4(sTile + i * strides.panel + group * strides.group + within * 16,
                               {0, 0, 0, 0});
        }
      }
      ptx::fence_async_proxy();
      __syncwarp();  // all lanes' stores come before the arrival
      if (lane == 0) ptx::barrier_arrive(shared.v_full[at]);
    }
    at = (at + tiles) % Traits::kStages;
  }
}

}  // namespace jax_fa
