// The producers of a pair of blocks (bwd_pair.cuh), but for those that they share with one block:
// the copies of its keys and values, of half of the queries' dims to both blocks, and what clears
// rows.
#pragma once

#include "bwd_pair_block.cuh"

namespace jax_fa {

// Warp 1 of the producers.
template <class Traits>
struct PairLoader {
  using Storage = PairStorage<Traits>;
  static constexpr int kHalf = Traits::kPanels / 2;

  const HopperBwdParams& params;
  Storage& shared;
  int part = ptx::cluster_rank();
  int lane = threadIdx.x % 32;
  Ring<Storage::kStages> ring = {};

  __device__ void run() {
    for (Ring<Storage::kWorks> works;; works.advance()) {
      ptx::barrier_wait(shared.work_full[works.at()], works.parity());
      const KeyWork& work = shared.work(works.at());
      if (uniform(work.keys.rows) == 0) return;
      bool first = true;
      for_each_step<Traits>(work, [&](int head, int row0) {
        load_q(work, head, row0);
        if (first) load_keys(work, works.count & 1);  // its place is free later
        first = false;
        load_dout(work, head, row0);
        ring.advance();
      });
      if (first) load_keys(work, works.count & 1);
      __syncwarp();  // all lanes have read the work
      if (lane == 0) shared.release_work(works.at());
    }
  }

 private:
  // Of keys that nobody sees nothing is read.
  __device__ void load_keys(const KeyWork& work, int parity) {
    if (lane > 0) return;
    const bool clears = must_clear_keys<Traits>(work);
    const int own = work.start + work.keys.row0 + part * 64;
    const int other = work.start + work.keys.row0 + (part ^ 1) * 64;
    ptx::barrier_wait(shared.k_empty, parity ^ 1);
    if (work.walks()) {
      ptx::Barrier& landed = clears ? shared.k_uncleared : shared.k_full;
      ptx::barrier_expect(landed, sizeof(shared.k) + sizeof(shared.k_other));
#pragma unroll
      for (int i = 0; i < Traits::kPanels; ++i) {
        ptx::tensor_load(shared.k[i], params.k, i * Traits::kPanel, work.keys.head, own, work.k_row,
                         landed);
      }
#pragma unroll
      for (int i = 0; i < kHalf; ++i) {
        ptx::tensor_load(shared.k_other[i], params.k, (part * kHalf + i) * Traits::kPanel,
                         work.keys.head, other, work.k_row, landed);
      }
    } else {
      ptx::barrier_arrive(shared.k_full);
    }
    ptx::barrier_wait(shared.v_empty, parity ^ 1);
    if (work.walks()) {
      ptx::Barrier& landed = clears ? shared.v_uncleared : shared.v_full;
      ptx::barrier_expect(landed, sizeof(shared.v));
#pragma unroll
      for (int i = 0; i < Traits::kPanels; ++i) {
        ptx::tensor_load(shared.v[i], params.v, i * Traits::kPanel, work.keys.head, own, work.v_row,
                         landed);
      }
    } else {
      ptx::barrier_arrive(shared.v_full);
    }
  }

  // Half of the dims, to both blocks. Queries past the row's last are those of a neighbour, until
  // they are cleared.
  template <class Tile>
  __device__ void load_half(Tile& sTile, const CUtensorMap& map, int head, int token,
                            ptx::Barrier& landed) {
    ptx::barrier_expect(landed, sizeof(sTile));
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const int panel = part * kHalf + i;
      ptx::tensor_load_pair(sTile[panel], map, panel * Traits::kPanel, head, token, 0, landed);
    }
  }

  __device__ void load_q(const KeyWork& work, int head, int row0) {
    const int at = ring.at();
    const RowStats<Traits> rows(params.backward, work, head, row0);
    ptx::barrier_wait(shared.q_empty[at], ring.parity() ^ 1);
    if (lane == 0) {
      const bool clears = must_clear_queries<Traits>(work, row0);
      load_half(shared.q[at], params.q, head, work.token0 + row0,
                clears ? shared.q_uncleared[at] : shared.q_full[at]);
    }
    rows.store(shared.rows[at]);
    ptx::barrier_arrive(shared.q_full[at]);
  }

  __device__ void load_dout(const KeyWork& work, int head, int row0) {
    if (lane > 0) return;
    const Ring<Storage::kDoutStages> douts{ring.count};
    const int at = douts.at();
    ptx::barrier_wait(shared.dout_empty[at], douts.parity() ^ 1);
    const bool clears = must_clear_queries<Traits>(work, row0);
    load_half(shared.dout[at], params.dout, head, work.token0 + row0,
              clears ? shared.dout_uncleared[at] : shared.dout_full[at]);
  }
};

// Warp 2 of the producers: stands between copies and consumers where rows have to be cleared.
template <class Traits>
struct PairClearer {
  using Storage = PairStorage<Traits>;

  Storage& shared;
  int part = ptx::cluster_rank();
  unsigned steps = 0, parities = 0;  // a bit for each stage of q, then of dout, for k and for v

  __device__ void run() {
    constexpr int kDout = Storage::kStages, kKeys = kDout + Storage::kDoutStages;
    for (Ring<Storage::kWorks> works;; works.advance()) {
      ptx::barrier_wait(shared.work_full[works.at()], works.parity());
      const KeyWork& work = shared.work(works.at());
      if (uniform(work.keys.rows) == 0) return;
      const bool clears = work.walks() && must_clear_keys<Traits>(work);
      const int own = work.keys.len_kv - work.keys.row0 - part * 64;
      const int other = work.keys.len_kv - work.keys.row0 - (part ^ 1) * 64;
      bool first = true;
      for_each_step<Traits>(work, [&](int, int row0) {
        const int queries = work.len_q - row0, at = steps % Storage::kStages;
        const int dout = steps++ % Storage::kDoutStages;
        if (queries < Traits::kBlockN) {
          wait(shared.q_uncleared[at], at);
          clear(shared.q[at], queries);
          hand_over(shared.q_full[at]);
        }
        if (first && clears) {
          wait(shared.k_uncleared, kKeys);
          clear(shared.k, own);
          clear(shared.k_other, other);
          hand_over(shared.k_full);
          wait(shared.v_uncleared, kKeys + 1);
          clear(shared.v, own);
          hand_over(shared.v_full);
        }
        first = false;
        if (queries < Traits::kBlockN) {
          wait(shared.dout_uncleared[dout], kDout + dout);
          clear(shared.dout[dout], queries);
          hand_over(shared.dout_full[dout]);
        }
      });
      __syncwarp();  // all lanes have read the work
      if (threadIdx.x % 32 == 0) shared.release_work(works.at());
    }
  }

 private:
  __device__ void wait(ptx::Barrier& landed, int bit) {
    ptx::barrier_wait(landed, parities >> bit & 1);
    parities ^= 1u << bit;
  }

  // The rows of a tile from `begin` on.
  template <int kPanels>
  __device__ static void clear(typename Traits::Element (&tile)[kPanels][64][Traits::kPanel],
                               int begin) {
    constexpr int kChunks = Traits::kPanel / 8;  // of 16 bytes, in a panel's row
#pragma unroll 1
    for (int i = 0; i < kPanels; ++i) {
      const uint32_t sPanel = ptx::shared_address(tile[i]);
#pragma unroll 1
      for (int c = max(begin, 0) * kChunks + threadIdx.x % 32; c < 64 * kChunks; c += 32) {
        ptx::store_shared_v4(sPanel + c * 16, {0, 0, 0, 0});
      }
    }
  }

  __device__ static void hand_over(ptx::Barrier& full) {
    ptx::fence_async_proxy();
    __syncwarp();  // all lanes' stores come before the arrival
    if (threadIdx.x % 32 == 0) ptx::barrier_arrive(full);
  }
};

}  // namespace jax_fa
