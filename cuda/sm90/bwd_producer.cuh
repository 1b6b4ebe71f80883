// The producers of a block of the backward kernel: which keys come next, and the copies of what
// their gradients need.
#pragma once

#include "bwd_block.cuh"

namespace jax_fa {

// Warp 0 of the producers, of a pair of blocks in the first of them.
template <class Traits>
struct KeyScheduler {
  using Storage = BwdStorage<Traits>;
  static constexpr int kBlocks = Traits::kPair ? 2 : 1;
  using WorkRing = Ring<Storage::kWorks>;

  const HopperBwdParams& params;
  Storage& shared;
  const AttentionParams& p = params.backward.fwd;
  int lane = threadIdx.x % 32;
  WorkRing ring = {}, oldest = {};  // the next to publish, and the oldest that was not waited for

  __device__ void run() {
    // With turns the first one is taken too: a block then waits only for what runs or is done,
    // however many blocks there is room for.
    for (int i = params.turns ? take() : blockIdx.x / kBlocks; i < params.order.total;
         i = next(i)) {
      const HopperOrder::Place place = params.order(i);
      // The order begins with the last tile, but causal masks leave most queries to the first keys.
      const int tile =
          params.order.longest_first ? params.order.tiles - 1 - place.tile : place.tile;
      const KeyTile keys = locate_keys<Traits::kBlockM>(params.backward, place.pair, tile);
      if (keys.rows > 0) publish(keys);
    }
    publish({});  // the end
  }

 private:
  __device__ int next(int i) {
    if (!params.next_tile) return i + gridDim.x / kBlocks;
    for (; ring.count - oldest.count >= Storage::kWorksTaken; oldest.advance()) {
      ptx::barrier_wait(shared.work_empty[oldest.at()], oldest.parity());
    }
    return take() + (params.turns ? 0 : gridDim.x / kBlocks);
  }

  __device__ int take() {
    int taken = 0;
    if (lane == 0) taken = atomicAdd(params.next_tile, 1);
    return __shfl_sync(0xffffffff, taken, 0);
  }

  __device__ void publish(const KeyTile& keys) {
    ptx::barrier_wait(shared.work_empty[ring.at()], ring.parity() ^ 1);
    if (lane == 0) {
      describe(shared.work(ring.at()), keys);
      if constexpr (Traits::kPair) shared.send_work(ring.at());
      ptx::barrier_arrive(shared.work_full[ring.at()]);
    }
    ring.advance();
  }

  // Blocks that run together for the same queries start apart, as they add to the same sums. If
  // they have to take turns at that, all walk from the last queries to the first.
  __device__ static int first_step(int key, int queries) {
    return key % queries / Traits::kBlockN * Traits::kBlockN;
  }

  // Field by field, as there are few registers.
  __device__ void describe(KeyWork& work, const KeyTile& keys) const {
    work.keys = keys;
    if (keys.rows == 0) return;
    const int b = max(keys.b, 0), group = p.heads_q / p.heads_kv;
    const int len_q = row_len_q(p, b);
    const IntervalMask mask(len_q, keys.len_kv, p.window_left, p.window_right, p.top_left);
    const Interval seeing = mask.rows_seeing(keys.row0, keys.row0 + Traits::kBlockM, len_q);
    work.b = b;
    work.len_q = len_q;
    work.mask = mask;
    work.head0 = keys.head * group;
    work.head1 = (keys.head + (seeing.lo < seeing.hi)) * group;
    work.begin = seeing.lo / Traits::kBlockN * Traits::kBlockN;
    work.end = seeing.hi;
    work.first = work.begin;
    work.stride = Traits::kBlockN;
    work.shared_end = 0;
    if (params.turns) {
      const int last = max(seeing.hi - 1 - work.begin, 0) / Traits::kBlockN;
      work.first += last * Traits::kBlockN;
      work.stride = -Traits::kBlockN;
      if (keys.row0 > 0) {
        const int key0 = keys.row0 - Traits::kBlockM;
        work.shared_end = mask.rows_seeing(key0, keys.row0, len_q).hi;
      }
    } else if (seeing.lo < seeing.hi) {
      work.first += first_step(keys.row0, seeing.hi - work.begin);
    }
    const int token0 = p.q_start ? p.q_start[b] : b * p.len_q;
    work.token0 = token0;
    work.stats0 = b * p.lse_row_stride + (p.q_start ? token0 : 0);
    work.slot0 = p.q_start ? token0 / kBwdSumQueries + b
                           : b * ((p.len_q + kBwdSumQueries - 1) / kBwdSumQueries);
    const KvRow row(p.kv, b, p.k.rows);
    work.k_row = int(row.row);
    work.start = row.start;
    work.v_row = int(KvRow(p.kv, b, p.v.rows).row);
  }
};

// Warp 1 of the producers.
template <class Traits>
struct KeyLoader {
  using Storage = HopperBwdStorage<Traits>;

  const HopperBwdParams& params;
  Storage& shared;
  int lane = threadIdx.x % 32;
  Ring<Traits::kStages> ring = {};

  __device__ void run() {
    for (Ring<Storage::kWorks> works;; works.advance()) {
      ptx::barrier_wait(shared.work_full[works.at()], works.parity());
      const KeyWork& work = shared.work(works.at());
      if (uniform(work.keys.rows) == 0) return;
      load_k(work, works.count);
      bool first = true;
      for_each_step<Traits>(work, [&](int head, int row0) {
        load_queries(work, head, row0);
        if (first) load_v(work, works.count);  // its place is free later than that of the queries
        first = false;
      });
      if (first) load_v(work, works.count);
      __syncwarp();  // all lanes have read the work
      if (lane == 0) ptx::barrier_arrive(shared.work_empty[works.at()]);
    }
  }

 private:
  // Of keys that nobody sees nothing is read.
  __device__ void load_k(const KeyWork& work, unsigned count) {
    Ring<Storage::kKeyBuffers> ring{count};
    ptx::barrier_wait(shared.k_empty[ring.at()], ring.parity() ^ 1);
    load(shared.k[ring.at()], params.k, shared.k_full[ring.at()], shared.k_uncleared[ring.at()],
         work, work.k_row);
  }

  __device__ void load_v(const KeyWork& work, unsigned count) {
    ptx::barrier_wait(shared.v_empty, (count & 1) ^ 1);
    load(shared.v, params.v, shared.v_full, shared.v_uncleared, work, work.v_row);
  }

  template <class Tile>
  __device__ void load(Tile& sTile, const CUtensorMap& map, ptx::Barrier& full,
                       ptx::Barrier& uncleared, const KeyWork& work, int row) {
    if (lane > 0) return;
    if (!work.walks()) return ptx::barrier_arrive(full);
    ptx::Barrier& landed = must_clear_keys<Traits>(work) ? uncleared : full;
    ptx::barrier_expect(landed, sizeof(sTile));
#pragma unroll
    for (int i = 0; i < Traits::kPanels; ++i) {
      ptx::tensor_load(sTile[i], map, i * Traits::kPanel, work.keys.head,
                       work.start + work.keys.row0, row, landed);
    }
  }

  // Queries past the row's last are those of a neighbour, until they are cleared.
  __device__ void load_queries(const KeyWork& work, int head, int row0) {
    const int at = ring.at();
    const RowStats<Traits> rows(params.backward, work, head, row0);
    ptx::Barrier& full = shared.queries_full[at];
    ptx::barrier_wait(shared.queries_empty[at], ring.parity() ^ 1);
    if (lane == 0) {
      ptx::Barrier& landed =
          must_clear_queries<Traits>(work, row0) ? shared.queries_uncleared[at] : full;
      ptx::barrier_expect(landed, sizeof(shared.q[0]) + sizeof(shared.dout[0]));
      const int token = work.token0 + row0;
#pragma unroll
      for (int i = 0; i < Traits::kPanels; ++i) {
        const int dim = i * Traits::kPanel;
        ptx::tensor_load(shared.q[at][i], params.q, dim, head, token, 0, landed);
        ptx::tensor_load(shared.dout[at][i], params.dout, dim, head, token, 0, landed);
      }
    }
    rows.store(shared.rows[at]);
    ptx::barrier_arrive(full);
    ring.advance();
  }
};

// Warp 2 of the producers: stands between copies and consumers where rows have to be cleared.
template <class Traits>
struct RowClearer {
  using Storage = HopperBwdStorage<Traits>;

  Storage& shared;
  int lane = threadIdx.x % 32;
  unsigned steps = 0, parities = 0;  // a bit for each stage, then for each buffer of k, then for v

  __device__ void run() {
    for (Ring<Storage::kWorks> works;; works.advance()) {
      ptx::barrier_wait(shared.work_full[works.at()], works.parity());
      const KeyWork& work = shared.work(works.at());
      if (uniform(work.keys.rows) == 0) return;
      const bool clear_keys = work.walks() && must_clear_keys<Traits>(work);
      const int key = work.keys.len_kv - work.keys.row0;
      if (clear_keys) {
        const int at = works.count % Storage::kKeyBuffers;
        wait(shared.k_uncleared[at], Traits::kStages + at);
        clear<Traits::kBlockM>(shared.k[at], key);
        hand_over(shared.k_full[at]);
      }
      bool first = true;
      for_each_step<Traits>(work, [&](int, int row0) {
        const int at = steps++ % Traits::kStages;
        if (must_clear_queries<Traits>(work, row0)) {
          wait(shared.queries_uncleared[at], at);
          clear<Traits::kBlockN>(shared.q[at], work.len_q - row0);
          clear<Traits::kBlockN>(shared.dout[at], work.len_q - row0);
          hand_over(shared.queries_full[at]);
        }
        if (first && clear_keys) {
          wait(shared.v_uncleared, Traits::kStages + Storage::kKeyBuffers);
          clear<Traits::kBlockM>(shared.v, key);
          hand_over(shared.v_full);
        }
        first = false;
      });
      __syncwarp();  // all lanes have read the work
      if (lane == 0) ptx::barrier_arrive(shared.work_empty[works.at()]);
    }
  }

 private:
  __device__ void wait(ptx::Barrier& landed, int bit) {
    ptx::barrier_wait(landed, parities >> bit & 1);
    parities ^= 1u << bit;
  }

  // The rows of a tile from `begin` on.
  template <int kRows>
  __device__ void clear(typename Storage::template Tile<kRows>& tile, int begin) const {
    constexpr int kChunks = Traits::kPanel / 8;  // of 16 bytes, in a panel's row
#pragma unroll 1
    for (int i = 0; i < Traits::kPanels; ++i) {
      const uint32_t sPanel = ptx::shared_address(tile[i]);
#pragma unroll 1
      for (int c = begin * kChunks + lane; c < kRows * kChunks; c += 32) {
        ptx::store_shared_v4(sPanel + c * 16, {0, 0, 0, 0});
      }
    }
  }

  __device__ void hand_over(ptx::Barrier& full) const {
    ptx::fence_async_proxy();
    __syncwarp();  // all lanes' stores come before the arrival
    if (lane == 0) ptx::barrier_arrive(full);
  }
};

// Warp 3 of the producers: adds the terms of dq to their sums in global memory, in bulk. With turns
// the tiles of a row's keys add to a tile of sums from the first to the last, which is the order in
// which blocks take them: each waits for such as run already or are done, until it is behind them
// by the queries of a turn.
template <class Traits>
struct TermAdder {
  using Storage = BwdStorage<Traits>;

  const HopperBwdParams& params;
  Storage& shared;
  Ring<Storage::kTerms> terms = {};

  __device__ void run() {
    if (threadIdx.x % 32 > 0) return;
    for (Ring<Storage::kWorks> works;; works.advance()) {
      ptx::barrier_wait(shared.work_full[works.at()], works.parity());
      const KeyWork& work = shared.work(works.at());
      if (work.keys.rows == 0) break;
      for_each_step<Traits>(work, [&](int head, int row0) { step(work, head, row0); });
      shared.release_work(works.at());
    }
    ptx::bulk_wait();  // before the block's shared memory goes
  }

 private:
  __device__ void step(const KeyWork& work, int head, int row0) {
    const int64_t slot = int64_t(head) * params.slots + work.slot0 + row0 / kBwdSumQueries;
    float* const gSums = params.backward.dq_sum + slot * DqSums<Traits>::kTileFloats + first_sum();
    const int within = row0 & (params.turn_queries - 1);  // those of one turn
    const int last = max(row0 - within, work.begin);
    const bool enters = row0 == work.first || within + Traits::kBlockN == params.turn_queries;
    int* const turn = this->turn(slot - within / kBwdSumQueries);
    if (params.turns && enters && last < work.shared_end) {  // somebody comes before
      wait_turn(turn, work.keys.row0 / Traits::kBlockM);
    }
    for_each_term<Traits>(work, row0, [&](int m, int dim) {
      const int at = terms.at();
      ptx::barrier_wait(shared.terms_full[at], terms.parity());
      ptx::bulk_add(gSums + m * DqSums<Traits>::kTileFloats + DqSums<Traits>::place(dim / 8),
                    ptx::shared_address(shared.terms[at]), sizeof(shared.terms[at]));
      ptx::bulk_commit();
      ptx::bulk_wait_read();
      ptx::barrier_arrive(shared.terms_empty[at]);
      terms.advance();
    });
    if (!params.turns || row0 > last) return;
    ptx::bulk_wait();
    ptx::store_release(turn, work.keys.row0 / Traits::kBlockM + 1);
  }

  // Of a pair, each block has dims and turns of its own.
  __device__ static int first_sum() {
    if constexpr (!Traits::kPair) return 0;
    return DqSums<Traits>::place(ptx::cluster_rank() * (Traits::kSumDims / 8));
  }

  __device__ int* turn(int64_t slot) const {
    if constexpr (!Traits::kPair) return params.turns + slot;
    return params.turns + slot * 2 + ptx::cluster_rank();
  }

  __device__ static void wait_turn(const int* turn, int tile) {
    while (ptx::load_acquire(turn) != tile) {
    }
    ptx::fence_async_proxy_global();
  }
};

}  // namespace jax_fa
