// The producers of a block: which tile comes next, and the copies of what it reads.
#pragma once

#include "../kv.cuh"
#include "block.cuh"

namespace jax_fa {

// Warp 0 of the producers.
template <class Traits>
struct Scheduler {
  const HopperParams& params;
  HopperStorage<Traits>& shared;
  const AttentionParams& p = params.attention;
  int lane = threadIdx.x % 32;

  using TileRing = Ring<HopperStorage<Traits>::kTiles>;
  TileRing ring = {}, oldest = {};  // the next to publish, and the oldest that was not waited for

  __device__ void run() {
    for (int i = blockIdx.x; i < params.order.total; i = next(i)) {
      const HopperOrder::Place place = params.order(i);
      const QueryTile q = query_tile<Traits::kBlockM, 1>(p, place.pair, place.tile);
      if (q.rows > 0) schedule(q);
    }
    publish({});  // the end
  }

 private:
  __device__ int next(int i) {
    if (!params.next_tile) return i + gridDim.x;
    for (; ring.count - oldest.count >= HopperStorage<Traits>::kTilesTaken; oldest.advance()) {
      ptx::barrier_wait(shared.tile_empty[oldest.at()], oldest.parity());
    }
    int taken = 0;
    if (lane == 0) taken = atomicAdd(params.next_tile, 1);
    return gridDim.x + __shfl_sync(0xffffffff, taken, 0);
  }

  // Hands a tile over, or writes it here if none of its queries sees a key.
  __device__ void schedule(const QueryTile& q) {
    constexpr int kBlockN = Traits::kBlockN;
    const int b = max(q.b, 0);
    const int len_kv = p.kv.length ? min(max(p.kv.length[b], 0), p.kv.len_kv) : p.kv.len_kv;
    const IntervalMask mask(q.len_q, len_kv, p.window_left, p.window_right, p.top_left);
    const int row_end = min(q.row0 + q.rows, q.len_q);
    const Interval any = mask.seen_by_any(q.row0, max(row_end, q.row0 + 1));
    const int begin = any.lo / kBlockN;
    const int end = q.row0 < row_end ? (any.hi + kBlockN - 1) / kBlockN : 0;
    if (begin < end) {
      const KvRow k(p.kv, b, p.k.rows), v(p.kv, b, p.v.rows);
      const int head_kv = q.head / (p.heads_q / p.heads_kv);
      publish({q, mask, begin, end, head_kv, int(k.row), int(v.row), k.start});
    } else {
      write_unseeing(q);
    }
  }

  __device__ void publish(const WorkTile& tile) {
    ptx::barrier_wait(shared.tile_empty[ring.at()], ring.parity() ^ 1);
    if (lane == 0) {
      shared.tile(ring.at()) = tile;
      ptx::barrier_arrive(shared.tile_full[ring.at()]);
    }
    ring.advance();
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

// Warp 1 of the producers.
template <class Traits>
struct Loader {
  const HopperParams& params;
  HopperStorage<Traits>& shared;
  const AttentionParams& p = params.attention;
  int lane = threadIdx.x % 32;
  Ring<Traits::kTile.q_buffers> q_ring = {};
  Ring<Traits::kStages> kv_ring = {};

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
    ptx::Barrier& full = shared.q_full[q_ring.at()];
    ptx::barrier_wait(shared.q_empty[q_ring.at()], q_ring.parity() ^ 1);
    if (lane == 0) {
      ptx::barrier_expect(full, sizeof(shared.q[0]));
#pragma unroll
      for (int i = 0; i < Traits::kPanels; ++i) {
        ptx::tensor_load(shared.q[q_ring.at()][i], params.q, i * Traits::kPanel, q.head,
                         int(q.token0), 0, full);
      }
    }
    q_ring.advance();
  }

  // Keys come before the queries: their place is free sooner.
  __device__ void load(const WorkTile& tile) {
    for (int n = tile.end - 1; n >= tile.begin; --n) {
      const int at = kv_ring.at(), parity = kv_ring.parity() ^ 1;
      ptx::barrier_wait(shared.k_empty[at], parity);
      load_keys(shared.k[at], params.k, shared.k_full[at], tile, tile.k_row, n);
      if (n == tile.end - 1) load_q(tile.q);
      ptx::barrier_wait(shared.v_empty[at], parity);
      const bool clear = n == tile.end - 1 && must_clear<Traits>(tile);
      load_keys(shared.v[at], params.v, clear ? shared.v_uncleared[at] : shared.v_full[at], tile,
                tile.v_row, n);
      kv_ring.advance();
    }
  }

  // A lane starts one box: all of the tile, or of paged keys one page, where that has keys.
  template <class Tile>
  __device__ void load_keys(Tile& sTile, const CUtensorMap& map, ptx::Barrier& full,
                            const WorkTile& tile, int row, int n) {
    const int first = lane * params.box_tokens, key = n * Traits::kBlockN + first;
    const bool mine = first < Traits::kBlockN && key < tile.mask.len_kv;
    const int boxes = __popc(__ballot_sync(0xffffffff, mine));
    if (lane == 0) {
      ptx::barrier_expect(full, boxes * params.box_tokens * Traits::kHeadDim * 2);
    }
    __syncwarp();  // announced before any of it lands
    if (!mine) return;
    int token = tile.start + key;
    if (p.kv.page_table) {
      row += p.kv.page_table[int64_t(tile.q.b) * p.kv.max_pages + key / p.kv.page_size];
      token = key % p.kv.page_size;
    }
#pragma unroll
    for (int i = 0; i < Traits::kPanels; ++i) {
      ptx::tensor_load(sTile[i][first], map, i * Traits::kPanel, tile.head_kv, token, row, full);
    }
  }
};

// Warp 2 of the producers: stands between copies and consumers where values have to be cleared.
template <class Traits>
__device__ void clear_values(HopperStorage<Traits>& shared) {
  constexpr int kChunks = Traits::kPanel / 8;  // of 16 bytes, in a panel's row
  const int lane = threadIdx.x % 32;
  Ring<HopperStorage<Traits>::kTiles> ring;
  int at = 0, parities = 0;  // stage of the tile's first values; a bit for each stage
  for (;; ring.advance()) {
    ptx::barrier_wait(shared.tile_full[ring.at()], ring.parity());
    const WorkTile& tile = shared.tile(ring.at());
    if (tile.q.rows == 0) return;
    const bool clear = must_clear<Traits>(tile);
    const int rows = tile.end * Traits::kBlockN - tile.mask.len_kv, tiles = tile.end - tile.begin;
    __syncwarp();  // all lanes have read the tile
    if (lane == 0) ptx::barrier_arrive(shared.tile_empty[ring.at()]);
    if (clear) {
      ptx::barrier_wait(shared.v_uncleared[at], parities >> at & 1);
      parities ^= 1 << at;
      for (int i = 0; i < Traits::kPanels; ++i) {
        const uint32_t sRows = ptx::shared_address(shared.v[at][i][Traits::kBlockN - rows]);
#pragma unroll 1
        for (int c = lane; c < rows * kChunks; c += 32) {
          ptx::store_shared_v4(sRows + c * 16, {0, 0, 0, 0});
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
