// What the warps of the blocks of a pair share (bwd_pair.cuh).
#pragma once

#include "bwd_block.cuh"

namespace jax_fa {

// Of one block. The other's barriers and tiles lie at the same places.
template <class Traits>
struct PairStorage {
  using Element = typename Traits::Element;
  template <int kRows>
  using Tile = Element[Traits::kPanels][kRows][Traits::kPanel];
  static constexpr int kWorks = 4, kWorksTaken = 2;  // as in HopperBwdStorage
  static constexpr int kStages = Traits::kStages;
  static constexpr int kDoutStages = Traits::kHeadDim > 192 ? 1 : 2;
  static constexpr int kTerms = Traits::kHeadDim > 192 ? 2 : 4;
  static constexpr int kWarpBytes = 16 * Traits::kBlockN * sizeof(Element);  // ds of a warp's keys

  alignas(1024) Tile<64> k, v;
  alignas(1024) Element k_other[Traits::kPanels / 2][64][Traits::kPanel];  // the dims of this block
  alignas(1024) Tile<Traits::kBlockN> q[kStages], dout[kDoutStages];
  alignas(1024) Element ds[kStages][1][Traits::kBlockM][Traits::kBlockN];  // transposed
  alignas(128) float terms[kTerms][64 * Traits::kTermDims];  // of dq, on their way to its sums
  alignas(16) float2 rows[kStages][Traits::kBlockN];         // {lse_log2, delta} of the queries
  struct alignas(16) Work : KeyWork {
  } works[kWorks];
  ptx::Barrier work_full[kWorks], work_empty[kWorks];  // the latter of the first block
  ptx::Barrier k_full, k_empty, k_uncleared, v_full, v_empty, v_uncleared;
  ptx::Barrier q_full[kStages], q_empty[kStages], q_uncleared[kStages];
  ptx::Barrier dout_full[kDoutStages], dout_empty[kDoutStages], dout_uncleared[kDoutStages];
  ptx::Barrier p_full[kStages], ds_full[kStages], ds_empty[kStages];
  ptx::Barrier terms_full[kTerms], terms_empty[kTerms];
  typename Traits::SurvivorExchange survivors[1];

  __device__ KeyWork& work(int i) { return works[i]; }

  __device__ void release_work(int i) {
    ptx::barrier_arrive_cluster(ptx::cluster_address(&work_empty[i], 0));
  }

  // From the first block to the second.
  __device__ void send_work(int i) {
    const uint32_t full = ptx::cluster_address(&work_full[i], 1);
    ptx::fence_async_proxy();
    ptx::barrier_expect_cluster(full, sizeof(Work));
    ptx::bulk_copy_cluster(ptx::cluster_address(&works[i], 1), ptx::shared_address(&works[i]),
                           sizeof(Work), full);
  }

  // To both blocks, by a whole warp.
  __device__ static void release(ptx::Barrier& empty) {
    const int lane = threadIdx.x % 32;
    if (lane < 2) ptx::barrier_arrive_cluster(ptx::cluster_address(&empty, lane));
  }

  __device__ void init_barriers() {
    constexpr int kKeyWarps = Traits::kKeyWarps;
    for (int i = 0; i < kWorks; ++i) {
      ptx::barrier_init(work_full[i], 1);
      ptx::barrier_init(work_empty[i], 2 * (kKeyWarps + 4 + 3));  // and dq's, warps 1 to 3
    }
    ptx::barrier_init(k_full, 1);
    ptx::barrier_init(v_full, 1);
    ptx::barrier_init(k_uncleared, 1);
    ptx::barrier_init(v_uncleared, 1);
    ptx::barrier_init(k_empty, 4 + 4);  // s and dq
    ptx::barrier_init(v_empty, 4);
    for (int i = 0; i < kStages; ++i) {
      ptx::barrier_init(q_full[i], 1 + 32);  // all lanes write `rows`
      ptx::barrier_init(q_uncleared[i], 1);
      ptx::barrier_init(q_empty[i], 2 * kKeyWarps);
      ptx::barrier_init(p_full[i], 4);
      ptx::barrier_init(ds_full[i], 4);
      ptx::barrier_init(ds_empty[i], 2 * 4);
    }
    for (int i = 0; i < kDoutStages; ++i) {
      ptx::barrier_init(dout_full[i], 1);
      ptx::barrier_init(dout_uncleared[i], 1);
      ptx::barrier_init(dout_empty[i], 2 * kKeyWarps);
    }
    for (int i = 0; i < kTerms; ++i) {
      ptx::barrier_init(terms_full[i], 4);
      ptx::barrier_init(terms_empty[i], 1);
    }
    ptx::fence_barrier_init();
  }
};

}  // namespace jax_fa
