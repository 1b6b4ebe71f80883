// What the warps of a block of the Hopper backward kernel share.
#pragma once

#include "../dropout.cuh"
#include "../kv.cuh"
#include "../sm80/bwd_walk.cuh"
#include "block.cuh"
#include "bwd_tiles.h"

namespace jax_fa {

template <int kHeadDim_, DType kDType_, bool kGeneral_, bool kDropout_>
struct HopperBwdTraits {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr DType kDType = kDType_;
  static constexpr bool kGeneral = kGeneral_, kDropout = kDropout_;
  using Element = typename Mma<kDType>::Element;
  using Score = std::conditional_t<kGeneral, GeneralScoreWithoutBias, ScaledScore>;

  static constexpr BwdHopperTile kTile = bwd_sm90_tile(kHeadDim, kGeneral);
  static constexpr int kBlockM = kTile.m;  // keys owned
  static constexpr int kBlockN = kTile.n;  // queries walked at a time
  static constexpr int kStages = kTile.stages;
  static constexpr int kThreads = kTile.warps * 32;
  static constexpr int kKeyWarps = 8;
  static_assert(kThreads == 128 * 2 + kKeyWarps * 32);

  // Whether the keys are those of a cluster of two blocks (bwd_pair.cuh), 64 of each.
  static constexpr bool kPair = bwd_sm90_pairs(kHeadDim);
  static constexpr int kOwnRows = kPair ? 64 : kBlockM;

  // Dims for which a block makes terms of dq, and those that it hands over at a time.
  static constexpr int kSumDims = kPair ? kHeadDim / 2 : kHeadDim;
  static constexpr int kTermDims = kPair ? 32 : kHeadDim % 64 == 0 ? 64 : 96;
  static_assert(kSumDims % kTermDims == 0);

  static constexpr int kPanel = kSumDims % 64 == 0 ? 64 : 32;  // elements: see wgmma.cuh
  static constexpr int kPanels = kHeadDim / kPanel;

  // Those of a product for dq: 64 keep its sums in the registers that its warpgroup has. A pair has
  // registers for all where it needs none for other scores or dropout: H200, bf16, head_dim 256, T
  // = 8k, no mask, forward and backward take 5.95 ms, with 64 they take 6.05.
  static constexpr int kWideTerms = kPair && (kHeadDim <= 192 || !(kGeneral || kDropout));
  static constexpr int kProductDims = kWideTerms ? kSumDims : kHeadDim % 64 == 0 ? 64 : 96;

  // All that an SM has, 64 K.
  static constexpr int kProducerRegisters = 32;
  static constexpr int kTermRegisters = kWideTerms ? 96 : kProductDims == 64 ? 64 : 80;
  static constexpr int kKeyRegisters = kWideTerms ? 192 : kProductDims == 64 ? 208 : 200;
  // As shared memory allows.
  using Survivors = WarpgroupSurvivors<kBlockN / 8, /*kBuffers=*/kHeadDim == 128 ? 1 : 2>;
  using SurvivorExchange = std::conditional_t<kDropout, typename Survivors::Exchange, char>;
  static constexpr int kMoreRegisters = kDropout ? 8 : 0;  // in a pair: for p, fewer for ds
};

// Keys of one key head, and the queries that see some of them: of each head of the group those from
// `begin` to `end`, in tiles of kBlockN, from `first` on and around.
struct KeyWork {
  KeyTile keys = {};  // keys.rows 0: there are no more
  IntervalMask mask = {0, 0, 0, 0};
  int b = 0, len_q = 0;
  int head0 = 0, head1 = 0;  // none if no query sees a key
  int begin = 0, end = 0, first = 0;
  int stride = 0;                       // from a tile to the next, kBlockN or -kBlockN
  int shared_end = 0;                   // those before it see some of the keys before these too
  int token0 = 0;                       // of the row's first query in q
  int slot0 = 0;                        // the row's first tile of sums of dq
  int64_t stats0 = 0;                   // as token0, in params.rows for head 0
  int k_row = 0, v_row = 0, start = 0;  // where the row's keys lie

  __device__ bool walks() const { return head0 < head1; }
};

template <class Traits>
struct HopperBwdStorage {
  using Element = typename Traits::Element;
  template <int kRows>
  using Tile = Element[Traits::kPanels][kRows][Traits::kPanel];
  static constexpr int kWorks = 4;  // more than loads, products and epilogue can be apart
  static constexpr int kGradients = Traits::kStages;
  static constexpr int kTerms = 2;
  static constexpr int kKeyBuffers = 2;  // the next ones load while these are in use
  // Of work that is taken in no fixed turn: others could run what a block takes early.
  static constexpr int kWorksTaken = 2;

  alignas(1024) Tile<Traits::kBlockM> k[kKeyBuffers], v;
  alignas(1024) Tile<Traits::kBlockN> q[Traits::kStages], dout[Traits::kStages];
  alignas(1024) Element ds[kGradients][Traits::kBlockN / 64][Traits::kBlockM][64];  // transposed
  alignas(128) float terms[kTerms][64 * Traits::kTermDims];   // of dq, on their way to its sums
  alignas(16) float2 rows[Traits::kStages][Traits::kBlockN];  // {lse_log2, delta} of the queries
  alignas(16) char works[kWorks][sizeof(KeyWork)];
  ptx::Barrier work_full[kWorks], work_empty[kWorks];
  ptx::Barrier k_full[kKeyBuffers], k_empty[kKeyBuffers], k_uncleared[kKeyBuffers];
  ptx::Barrier v_full, v_empty, v_uncleared;
  ptx::Barrier queries_full[Traits::kStages], queries_empty[Traits::kStages];
  ptx::Barrier queries_uncleared[Traits::kStages];
  ptx::Barrier ds_full[kGradients], ds_empty[kGradients];
  ptx::Barrier terms_full[kTerms], terms_empty[kTerms];
  // Of warpgroups that own keys.
  typename Traits::SurvivorExchange survivors[2];

  __device__ KeyWork& work(int i) { return reinterpret_cast<KeyWork&>(works[i]); }
  __device__ void release_work(int i) { ptx::barrier_arrive(work_empty[i]); }

  __device__ void init_barriers() {
    for (int i = 0; i < kWorks; ++i) {
      ptx::barrier_init(work_full[i], 1);
      ptx::barrier_init(work_empty[i], Traits::kKeyWarps + 4 + 3);  // and dq's, warps 1 to 3
    }
    for (int i = 0; i < kKeyBuffers; ++i) {
      ptx::barrier_init(k_full[i], 1);
      ptx::barrier_init(k_uncleared[i], 1);
      ptx::barrier_init(k_empty[i], Traits::kKeyWarps + 4);
    }
    ptx::barrier_init(v_full, 1);
    ptx::barrier_init(v_uncleared, 1);
    ptx::barrier_init(v_empty, Traits::kKeyWarps);
    for (int i = 0; i < Traits::kStages; ++i) {
      ptx::barrier_init(queries_full[i], 1 + 32);  // all lanes write `rows`
      ptx::barrier_init(queries_uncleared[i], 1);
      ptx::barrier_init(queries_empty[i], Traits::kKeyWarps);
    }
    for (int i = 0; i < kGradients; ++i) {
      ptx::barrier_init(ds_full[i], Traits::kKeyWarps);
      ptx::barrier_init(ds_empty[i], 4);
    }
    for (int i = 0; i < kTerms; ++i) {
      ptx::barrier_init(terms_full[i], 4);
      ptx::barrier_init(terms_empty[i], 1);
    }
    ptx::fence_barrier_init();
  }
};

template <class Traits>
struct PairStorage;  // bwd_pair_block.cuh

template <class Traits>
using BwdStorage = std::conditional_t<Traits::kPair, PairStorage<Traits>, HopperBwdStorage<Traits>>;

struct HopperBwdParams {
  BackwardParams backward;
  CUtensorMap q, dout, k, v;
  HopperOrder order;
  int slots;       // tiles of sums of dq of one head
  int* next_tile;  // tiles beyond the first of each block that have been taken; null: in fixed turn
  // Which tile of a row's keys adds next to the sums of turn_queries; null: they do in any order.
  int turn_queries;
  int* turns;
};

// The sums of dq of 64 queries lie as the accumulators of a warpgroup do, kTermDims dims after the
// other: four floats of each thread of a warpgroup for each 8 dims.
template <class Traits>
struct DqSums {
  static constexpr int kTileFloats = kBwdSumQueries * Traits::kHeadDim;

  // Of 8 dims, of the first thread.
  __device__ static int place(int dim8) { return dim8 * 512; }
};

// Rows past a length may hold anything, and 0 times it must be 0 in products that sum over them.
template <class Traits>
__device__ bool must_clear_keys(const KeyWork& work) {
  return work.keys.row0 + Traits::kBlockM > work.keys.len_kv;
}

template <class Traits>
__device__ bool must_clear_queries(const KeyWork& work, int row0) {
  return row0 + Traits::kBlockN > work.len_q;
}

// What all lanes of a warp have, so that the compiler knows: such values live in registers of their
// own, and others are scarce.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(0xffffffff, x, 0); }

// Calls step(head, row0) for each tile of queries that a block walks for some keys. The ends are
// read where they are needed: registers are scarce.
template <class Traits, class Step>
__device__ __forceinline__ void for_each_step(const KeyWork& work, Step step) {
#pragma unroll 1
  for (int head = work.head0; head < work.head1; ++head) {
    int row0 = work.first;
#pragma unroll 1
    do {
      step(head, row0);
      row0 += work.stride;
      if (row0 >= work.end) row0 = work.begin;
      if (row0 < work.begin) row0 = work.first;  // backwards, from the last tile on
    } while (row0 != work.first);
  }
}

// Calls f(m, dim) for each product that makes terms of dq of a tile of queries: of 64 of them, the
// m-th, and kTermDims dims from `dim` on.
template <class Traits, class F>
__device__ __forceinline__ void for_each_term(const KeyWork& work, int row0, F f) {
#pragma unroll 1
  for (int m = 0; m < Traits::kBlockN / kBwdSumQueries; ++m) {
    if (row0 + m * kBwdSumQueries >= work.end) return;  // another row's sums may follow
#pragma unroll 1
    for (int dim = 0; dim < Traits::kSumDims; dim += Traits::kTermDims) f(m, dim);
  }
}

// What all sums are short of: c = 1 / (1 - rate) of dropout. So ds / c = p * (m * dp - delta / c),
// with m what survives.
template <class Traits>
__device__ float gradient_scale(const AttentionParams& p) {
  return Traits::kDropout ? p.dropout_scale : 1.f;
}

// {lse_log2, delta / c} of a tile of queries on their way to shared memory, a few in each lane.
template <class Traits>
struct RowStats {
  static constexpr int kRows = Traits::kBlockN / 32;
  float2 rows[kRows];

  __device__ RowStats(const BackwardParams& p, const KeyWork& work, int head, int row0) {
    const float2* gRows = p.rows + work.stats0 + head * p.fwd.lse_head_stride + row0;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = i * 32 + threadIdx.x % 32;
      rows[i] = row0 + row < work.len_q ? gRows[row] : float2{INFINITY, 0.f};  // no probability
      if constexpr (Traits::kDropout) rows[i].y *= p.fwd.dropout_kept;
    }
  }

  __device__ void store(float2* sRows) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) sRows[i * 32 + threadIdx.x % 32] = rows[i];
  }
};

}  // namespace jax_fa
