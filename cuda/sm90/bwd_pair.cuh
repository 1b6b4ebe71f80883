// The backward kernel past head_dim 128, where dk and dv of 128 keys are all of an SM's registers:
// clusters of two blocks, each with 64 of the keys.
//
// Both blocks walk the same queries, and each copies half of the dims of a tile to both. Of a
// block, one warpgroup makes probabilities and dv, the next takes these, by way of shared memory,
// and makes ds and dk:
//
//     s = K Q^T                            dp = V dO^T
//     p = exp2(score(s) - lse)
//     hand over p                          ds = p * (dp - delta)
//     dv += p dO                           hand over ds;  dk += ds Q
//
// The third makes terms of dq, half of the dims for the keys of both blocks: each sends its ds to
// the other, which holds these dims of its keys too. So terms of dq cost no more traffic than those
// of 128 keys, what is read of queries is what one block of 128 keys would read, and only ds, in 16
// bits, goes from block to block.
//
// p takes the place that ds then has. With dropout, its sign says what is lost. dO has one buffer
// at head_dim 256: dv and dp need it at the same time, and s, dk and dq run while the next one
// comes.
#pragma once

#include "bwd_consumer.cuh"
#include "bwd_pair_block.cuh"
#include "bwd_pair_producer.cuh"
#include "bwd_producer.cuh"

namespace jax_fa {

// What the two warpgroups of a block's keys have in common.
template <class Traits>
struct PairConsumer : KeyRows<Traits> {
  using Rows = KeyRows<Traits>;
  using Rows::lane, Rows::p, Rows::params, Rows::ring, Rows::shared, Rows::works;
  static constexpr int kHeadDim = Traits::kHeadDim, kBlockN = Traits::kBlockN;
  static constexpr DType kDType = Traits::kDType;

  float sum[kHeadDim / 2];  // dv or dk

  using Rows::Rows;

  __device__ Ring<PairStorage<Traits>::kDoutStages> douts() const { return {ring.count}; }

  // Calls step(head, row0) for each tile of queries of each work, between `full` and `empty` of the
  // keys or values that it needs, and then store().
  template <class Step, class Store>
  __device__ void walk(ptx::Barrier& full, ptx::Barrier& empty, Step step, Store store) {
    for (;; works.advance()) {
      ptx::barrier_wait(shared.work_full[works.at()], works.parity());
      const KeyWork& work = this->work();
      if (uniform(work.keys.rows) == 0) return;
#pragma unroll
      for (float& x : sum) x = 0.f;
      ptx::barrier_wait(full, works.count & 1);
      for_each_step<Traits>(work, step);
      __syncwarp();  // of all lanes' waits
      this->release(empty);
      store();
      __syncwarp();  // all lanes have read the work
      if (lane == 0) shared.release_work(works.at());
    }
  }
};

// The warpgroup of probabilities and dv.
template <class Traits>
struct ProbabilityConsumer : PairConsumer<Traits> {
  using Base = PairConsumer<Traits>;
  using Base::p, Base::ring, Base::s, Base::shared, Base::sum;

  using Base::Base;

  // What ds is made of: p, times the score's derivative. With dropout its sign is not its own.
  __device__ uint32_t factor(int i) const {
    uint32_t x = p[i];
    if constexpr (Base::Score::kHasSlope) x = this->slope[i];
    if constexpr (Traits::kDropout) {
      const uint32_t lost = ~this->survivors.halves(0, i / 2, i % 2);
      return (x & 0x7fff7fff) | (lost & 0x80008000);
    }
    return x;
  }

  __device__ void apply_dropout() {
    if constexpr (Traits::kDropout) {
#pragma unroll
      for (int i = 0; i < Base::kBlockN / 4; ++i) p[i] &= this->survivors.halves(0, i / 2, i % 2);
    }
  }

  // Its place among the 16 keys is free when both blocks have made terms of dq of what was there.
  __device__ void wait_for_place() {
    ptx::barrier_wait(shared.ds_empty[ring.at()], ring.parity() ^ 1);
  }

  __device__ void hand_over() {
    __syncwarp();  // all lanes' stores come before the arrival
    this->release(shared.p_full[ring.at()]);
    shared.release(shared.q_empty[ring.at()]);
  }

  __device__ void wait_for_dout() {
    const auto douts = this->douts();
    ptx::barrier_wait(shared.dout_full[douts.at()], douts.parity());
  }

  __device__ void add_seen(int head, int row0, bool partial) {
    this->start_scores(s, shared.k, shared.q[ring.at()]);
    this->draw(head, row0);
    ptx::wgmma_wait<0>();
    pin(s);
    partial ? this->template apply_softmax<true>(head, row0)
            : this->template apply_softmax<false>(head, row0);
    wait_for_place();
    this->put([&](int i) { return factor(i); });
    hand_over();
    apply_dropout();
    wait_for_dout();
    this->start_sum(sum, p, shared.dout[this->douts().at()]);
    ptx::wgmma_wait<0>();
    pin(sum);
    pin(p);
  }

  __device__ void step(int head, int row0) {
    ptx::barrier_wait(shared.q_full[ring.at()], ring.parity());
    const TileMask kind = this->classify(row0);
    if (kind != TileMask::kSkip) {
      add_seen(head, row0, kind == TileMask::kPartial);
    } else {
      wait_for_place();
      hand_over();
      wait_for_dout();
    }
    __syncwarp();  // all lanes have waited for dO
    shared.release(shared.dout_empty[this->douts().at()]);
    ring.advance();
  }

  __device__ void run() {
    this->walk(
        shared.k_full, shared.k_empty, [&](int head, int row0) { step(head, row0); },
        [&] { this->store(nullptr, sum); });
  }
};

// The warpgroup of ds and dk.
template <class Traits>
struct GradientConsumer : PairConsumer<Traits> {
  using Base = PairConsumer<Traits>;
  using Base::dp, Base::ds, Base::kBlockN, Base::kDType, Base::lane, Base::params, Base::ring,
      Base::shared, Base::sum;

  using Base::Base;

  // dp to ds.
  __device__ void apply_gradient() {
#pragma unroll
    for (int i = 0; i < kBlockN / 16; ++i) {
      uint32_t factors[4];
      this->take(i, factors);
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const float4 rows = this->query_rows(2 * i + t);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int at = 4 * i + 2 * t + h;
          const uint32_t factor = factors[2 * t + h];
          float2 x = Mma<kDType>::unpack(factor), y = {dp[2 * at], dp[2 * at + 1]};
          if constexpr (Traits::kDropout) {
            y.x = int(factor << 16) < 0 ? 0.f : y.x;
            y.y = int(factor) < 0 ? 0.f : y.y;
            x = {fabsf(x.x), fabsf(x.y)};
          }
          ds[at] = Mma<kDType>::pack(x.x * (y.x - rows.y), x.y * (y.y - rows.w));
        }
      }
    }
  }

  // Hands this warp's 16 keys of ds over, to both blocks. Their places are free: p was there.
  __device__ void share_gradient() {
    const int at = ring.at();
    this->put([&](int i) { return ds[i]; });
    ptx::fence_async_proxy();
    __syncwarp();  // all lanes' stores come before the arrival
    if (lane > 0) return;
    constexpr int kBytes = PairStorage<Traits>::kWarpBytes;
    void* const sKeys = shared.ds[at][0][this->row];
    const int other = this->part ^ 1;
    ptx::barrier_expect(shared.ds_full[at], kBytes);  // of the other block's
    ptx::bulk_copy_cluster(ptx::cluster_address(sKeys, other), ptx::shared_address(sKeys), kBytes,
                           ptx::cluster_address(&shared.ds_full[at], other));
  }

  __device__ void release_dout() { shared.release(shared.dout_empty[this->douts().at()]); }

  __device__ void wait_for_p() { ptx::barrier_wait(shared.p_full[ring.at()], ring.parity()); }

  __device__ void add_seen() {
    this->start_scores(dp, shared.v, shared.dout[this->douts().at()]);
    ptx::wgmma_wait<0>();
    pin(dp);
    release_dout();
    wait_for_p();
    apply_gradient();
    __syncwarp();  // all lanes have read p
    share_gradient();
    this->start_sum(sum, ds, shared.q[ring.at()]);
    ptx::wgmma_wait<0>();
    pin(sum);
    pin(ds);
  }

  __device__ void step(int, int row0) {
    const auto douts = this->douts();
    ptx::barrier_wait(shared.dout_full[douts.at()], douts.parity());
    ptx::barrier_wait(shared.q_full[ring.at()], ring.parity());
    if (this->classify(row0) != TileMask::kSkip) {
      add_seen();
    } else {
      __syncwarp();  // all lanes have waited for dO
      release_dout();
      wait_for_p();
#pragma unroll
      for (uint32_t& x : ds) x = 0;
      share_gradient();
    }
    shared.release(shared.q_empty[ring.at()]);
    ring.advance();
  }

  __device__ void run() {
    this->walk(
        shared.v_full, shared.v_empty, [&](int head, int row0) { step(head, row0); },
        [&] { this->store(sum, nullptr); });
  }
};

// The warpgroup that makes the terms of dq, ds^T K of 128 keys and of half of the dims.
template <class Traits>
struct PairTermConsumer {
  static constexpr int kDims = Traits::kProductDims, kTermDims = Traits::kTermDims;
  using Storage = PairStorage<Traits>;

  Storage& shared;
  int part = ptx::cluster_rank();
  int lane = threadIdx.x % 32;
  Ring<Storage::kStages> ring = {};
  Ring<Storage::kTerms> terms = {};
  float dq[kDims / 2];

  __device__ explicit PairTermConsumer(Storage& shared) : shared(shared) {}

  // 64 queries by kDims dims from `dim` of the block's on.
  __device__ void multiply(int dim) {
    constexpr int kPanel = Traits::kPanel, kNextPanel = 64 * kPanel * 2;
    const uint64_t a = panel_descriptor<64, true>(shared.ds[ring.at()][0]);
    const uint64_t own = panel_descriptor<kPanel, true>(
        shared.k[part * (Traits::kPanels / 2) + dim / kPanel], kNextPanel);
    const uint64_t other = panel_descriptor<kPanel, true>(shared.k_other[dim / kPanel], kNextPanel);
    const uint64_t b[2] = {part ? other : own, part ? own : other};
    pin(dq);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < Traits::kBlockM / 16; ++i) {
      Wgmma<Traits::kDType, kDims>::template ss<1>(dq, a + i * 128, b[i / 4] + i % 4 * kPanel * 2,
                                                   i > 0);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    pin(dq);
  }

  // kTermDims dims, the first of them in dq[first].
  __device__ void hand_over(int first) {
    const int at = terms.at();
    ptx::barrier_wait(shared.terms_empty[at], terms.parity() ^ 1);
    const uint32_t sPlace = ptx::shared_address(shared.terms[at]) + threadIdx.x % 128 * 16;
#pragma unroll
    for (int d = 0; d < kTermDims / 8; ++d) {
      const float* x = dq + first + 4 * d;
      ptx::store_shared_v4(sPlace + d * 2048, {__float_as_uint(x[0]), __float_as_uint(x[1]),
                                               __float_as_uint(x[2]), __float_as_uint(x[3])});
    }
    ptx::fence_async_proxy();
    __syncwarp();  // all lanes' stores come before the arrival
    if (lane == 0) ptx::barrier_arrive(shared.terms_full[at]);
    terms.advance();
  }

  __device__ void step() {
    ptx::barrier_wait(shared.ds_full[ring.at()], ring.parity());
#pragma unroll 1
    for (int dim = 0; dim < Traits::kSumDims; dim += kDims) {
      multiply(dim);
      if (dim + kDims == Traits::kSumDims) shared.release(shared.ds_empty[ring.at()]);
#pragma unroll
      for (int first = 0; first < kDims / 2; first += kTermDims / 2) hand_over(first);
    }
    ring.advance();
  }

  __device__ void run() {
    for (Ring<Storage::kWorks> works;; works.advance()) {
      ptx::barrier_wait(shared.work_full[works.at()], works.parity());
      const KeyWork& work = shared.work(works.at());
      if (uniform(work.keys.rows) == 0) return;
      ptx::barrier_wait(shared.k_full, works.count & 1);
      for_each_step<Traits>(work, [&](int, int) { step(); });
      __syncwarp();  // all lanes have waited for the keys and read the work
      if (lane == 0) ptx::barrier_arrive(shared.k_empty);
      if (lane == 0) shared.release_work(works.at());
    }
  }
};

template <class Traits>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(Traits::kThreads, 1)
    bwd_pair_sm90(const __grid_constant__ HopperBwdParams params) {
  extern __shared__ __align__(1024) unsigned char raw_shared[];
  auto& shared = *reinterpret_cast<PairStorage<Traits>*>(raw_shared);
  if (threadIdx.x == 0) shared.init_barriers();
  __syncthreads();
  ptx::cluster_arrive();
  ptx::cluster_wait();  // barriers are there, the other block's too

  if (threadIdx.x < 128) {
    ptx::lower_registers<Traits::kProducerRegisters>();
    switch (threadIdx.x / 32) {
      case 0:
        if (ptx::cluster_rank() == 0) KeyScheduler<Traits>{params, shared}.run();
        break;
      case 1:
        PairLoader<Traits>{params, shared}.run();
        break;
      case 2:
        PairClearer<Traits>{shared}.run();
        break;
      case 3:
        TermAdder<Traits>{params, shared}.run();
    }
  } else if (threadIdx.x < 256) {
    ptx::lower_registers<Traits::kTermRegisters>();
    PairTermConsumer<Traits>(shared).run();
  } else if (threadIdx.x < 384) {
    ptx::raise_registers<Traits::kKeyRegisters + Traits::kMoreRegisters>();
    ProbabilityConsumer<Traits>(params, shared).run();
  } else {
    ptx::raise_registers<Traits::kKeyRegisters - Traits::kMoreRegisters>();
    GradientConsumer<Traits>(params, shared).run();
  }
  __syncwarp();
  ptx::cluster_arrive_release();  // the arrivals at the other block's barriers come before
  ptx::cluster_wait();            // neither block's shared memory goes while the other uses it
}

}  // namespace jax_fa
