// Gradients of attention on Hopper: dq, dk and dv of o = softmax(score(q k^T)) v in one pass of 5
// products, with bulk tensor copies (TMA), warpgroup products (wgmma) and warps of different roles.
//
// Up to head_dim 128 (past it: bwd_pair.cuh) one block per SM walks tiles of 128 keys of one key
// head, and for each the tiles of queries that see some of them, for each query head of its group.
// Its first warpgroup produces (bwd_producer.cuh): warp 0 says which keys come next, warp 1 starts
// the copies of keys, values, queries and the gradients of their outputs, warp 2 clears rows past a
// length. Two warpgroups own 64 keys each, with dk and dv in registers: they are whole in the end.
// Per tile of queries (bwd_consumer.cuh has what one does, here is the order)
//
//     s = K Q^T
//     p = exp2(score(s) - lse)
//     dp = V dO^T
//     dv += p dO                        under which
//     ds = p * (dp - delta)
//     hand over ds;  dk += ds Q
//
// and the fourth takes ds of all 128 keys from shared memory and makes ds^T K of it, terms of dq,
// which warp 3 adds in bulk to their sums, float32 in global memory; a kernel of its own turns
// these into dq. So nobody waits for these sums, and the two warpgroups of keys never wait for one
// another while they are less than two tiles of ds apart: one multiplies while the other takes
// exponentials.
//
// Deterministic sums have one order, that of keys. Blocks take the tiles of keys of a section in
// this order and walk queries from the last to the first, so that a block starts a few steps behind
// the one before it and then meets sums that are ready (bwd_producer.cuh).
//
// Rows are keys and columns are queries throughout: p and ds leave the softmax as the left operands
// that dv and dk need. p stays in 16 bits, also on the way to ds. What limits the tile is
// registers: dk, dv, one of s and dp, p and ds are 192 of 208 at head_dim 64 and 128.
//
// With dropout, what survives is drawn while s is made. p loses the rest after ds, which needs it
// whole, and then dv += p dO comes beside dk.
//
// Barriers come in pairs, `full` and `empty`, for keys, values, each buffer of queries, of ds, of
// terms of dq and of descriptions of work.
#include "../dtypes.h"
#include "bwd_consumer.cuh"
#include "bwd_pair.cuh"
#include "bwd_producer.cuh"
#include "tensor_map.h"
#include "wgmma.cuh"

namespace jax_fa {

// A warpgroup of 64 keys.
template <class Traits>
struct KeyConsumer : KeyRows<Traits> {
  using Rows = KeyRows<Traits>;
  using Rows::apply_gradient, Rows::classify, Rows::draw, Rows::release, Rows::start_scores,
      Rows::start_sum, Rows::work;
  using Rows::ds, Rows::dp, Rows::lane, Rows::p, Rows::params, Rows::ring, Rows::s, Rows::seeds,
      Rows::shared, Rows::works;
  using typename Rows::Storage;
  static constexpr int kHeadDim = Traits::kHeadDim;

  float dk[kHeadDim / 2], dv[kHeadDim / 2];

  using Rows::Rows;

  // Hands this warp's 16 keys of ds over.
  __device__ void share_gradient() {
    const int at = ring.at();
    ptx::barrier_wait(shared.ds_empty[at], ring.parity() ^ 1);
    this->put([&](int i) { return ds[i]; });
    ptx::fence_async_proxy();
    __syncwarp();  // all lanes' stores come before the arrival
    release(shared.ds_full[at]);
  }

  // --- the steps ---

  __device__ void add_seen(int head, int row0, bool partial) {
    const int at = ring.at();
    start_scores(s, shared.k[works.count % Storage::kKeyBuffers], shared.q[at]);
    draw(head, row0);
    ptx::wgmma_wait<0>();
    pin(s);
    partial ? this->template apply_softmax<true>(head, row0)
            : this->template apply_softmax<false>(head, row0);
    ptx::barrier_wait(shared.v_full, works.count & 1);  // at the first step
    start_scores(dp, shared.v, shared.dout[at]);
    ptx::wgmma_wait<0>();
    pin(dp);
    if constexpr (!Traits::kDropout) start_sum(dv, p, shared.dout[at]);
    apply_gradient();
    share_gradient();
    if constexpr (Traits::kDropout) start_sum(dv, p, shared.dout[at]);  // ds needs p whole
    start_sum(dk, ds, shared.q[at]);
    ptx::wgmma_wait<0>();
    pin(dv);
    pin(dk);
    pin(p);
    pin(ds);
  }

  __device__ void step(int head, int row0) {
    ptx::barrier_wait(shared.queries_full[ring.at()], ring.parity());
    const TileMask kind = classify(row0);
    if (kind != TileMask::kSkip) {
      add_seen(head, row0, kind == TileMask::kPartial);
    } else {
#pragma unroll
      for (uint32_t& x : ds) x = 0;
      share_gradient();
    }
    release(shared.queries_empty[ring.at()]);
    ring.advance();
  }

  __device__ void run() {
    for (;; works.advance()) {
      ptx::barrier_wait(shared.work_full[works.at()], works.parity());
      if (uniform(work().keys.rows) == 0) return;
#pragma unroll
      for (int i = 0; i < kHeadDim / 2; ++i) dk[i] = dv[i] = 0.f;
      const Ring<Storage::kKeyBuffers> k_ring{works.count};
      if constexpr (Traits::kDropout) seeds = dropout_seeds(params.fwd, work().b);
      ptx::barrier_wait(shared.k_full[k_ring.at()], k_ring.parity());
      for_each_step<Traits>(work(), [&](int head, int row0) { step(head, row0); });
      // Values are waited for also where all steps were skipped: else they could be given back for
      // this work and the next before the other warpgroup has done so for this one.
      ptx::barrier_wait(shared.v_full, works.count & 1);
      __syncwarp();  // of all lanes' waits
      release(shared.k_empty[k_ring.at()]);
      release(shared.v_empty);
      this->store(dk, dv);
      __syncwarp();  // all lanes have read the work
      release(shared.work_empty[works.at()]);
    }
  }
};

// The warpgroup that makes the terms of dq, ds^T K of 128 keys.
template <class Traits>
struct TermConsumer {
  static constexpr int kTermDims = Traits::kTermDims;
  using Storage = HopperBwdStorage<Traits>;

  const HopperBwdParams& params;
  Storage& shared;
  int lane = threadIdx.x % 32;
  Ring<Storage::kGradients> ring = {};
  Ring<Storage::kTerms> terms = {};
  float dq[kTermDims / 2];

  __device__ TermConsumer(const HopperBwdParams& params, Storage& shared)
      : params(params), shared(shared) {}

  // 64 queries by kTermDims dims from `dim` on.
  template <class Ds, class Keys>
  __device__ void multiply(Ds& ds, Keys& k, int dim) {
    constexpr int kPanel = Traits::kPanel;
    const uint64_t a = panel_descriptor<64>(ds);
    const uint64_t b = panel_descriptor<kPanel>(k[dim / kPanel], Traits::kBlockM * kPanel * 2);
    pin(dq);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < Traits::kBlockM / 16; ++i) {
      Wgmma<Traits::kDType, kTermDims>::template ss<1>(dq, a + i * 128, b + i * kPanel * 2, i > 0);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    pin(dq);
  }

  // By way of shared memory. Additions from registers hold everything up: with them the kernel runs
  // at 588 and 603 TFLOP/s at T = 2k and 4k, without any at 783 and 806 (H200, bf16, head_dim 128,
  // B * T = 16384, N * H = 2048, no mask).
  __device__ void hand_over() {
    const int at = terms.at();
    ptx::barrier_wait(shared.terms_empty[at], terms.parity() ^ 1);
    const uint32_t sPlace = ptx::shared_address(shared.terms[at]) + threadIdx.x % 128 * 16;
#pragma unroll
    for (int d = 0; d < kTermDims / 8; ++d) {
      ptx::store_shared_v4(sPlace + d * 2048,
                           {__float_as_uint(dq[4 * d]), __float_as_uint(dq[4 * d + 1]),
                            __float_as_uint(dq[4 * d + 2]), __float_as_uint(dq[4 * d + 3])});
    }
    ptx::fence_async_proxy();
    __syncwarp();  // all lanes' stores come before the arrival
    if (lane == 0) ptx::barrier_arrive(shared.terms_full[at]);
    terms.advance();
  }

  __device__ void step(const KeyWork& work, int row0, int keys) {
    ptx::barrier_wait(shared.ds_full[ring.at()], ring.parity());
    for_each_term<Traits>(work, row0, [&](int m, int dim) {
      multiply(shared.ds[ring.at()][m], shared.k[keys], dim);
      hand_over();
    });
    if (lane == 0) ptx::barrier_arrive(shared.ds_empty[ring.at()]);
    ring.advance();
  }

  __device__ void run() {
    for (Ring<Storage::kWorks> works;; works.advance()) {
      ptx::barrier_wait(shared.work_full[works.at()], works.parity());
      const KeyWork& work = shared.work(works.at());
      if (uniform(work.keys.rows) == 0) return;
      const Ring<Storage::kKeyBuffers> k_ring{works.count};
      ptx::barrier_wait(shared.k_full[k_ring.at()], k_ring.parity());
      for_each_step<Traits>(work, [&](int, int row0) { step(work, row0, k_ring.at()); });
      __syncwarp();  // all lanes have waited for the keys and read the work
      if (lane == 0) ptx::barrier_arrive(shared.k_empty[k_ring.at()]);
      if (lane == 0) ptx::barrier_arrive(shared.work_empty[works.at()]);
    }
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    bwd_sm90(const __grid_constant__ HopperBwdParams params) {
  extern __shared__ __align__(1024) unsigned char raw_shared[];
  auto& shared = *reinterpret_cast<HopperBwdStorage<Traits>*>(raw_shared);
  if (threadIdx.x == 0) shared.init_barriers();
  __syncthreads();  // barriers are there

  if (threadIdx.x < 128) {
    ptx::lower_registers<Traits::kProducerRegisters>();
    switch (threadIdx.x / 32) {
      case 0:
        return KeyScheduler<Traits>{params, shared}.run();
      case 1:
        return KeyLoader<Traits>{params, shared}.run();
      case 2:
        return RowClearer<Traits>{shared}.run();
      case 3:
        return TermAdder<Traits>{params, shared}.run();
    }
  } else if (threadIdx.x < 256) {
    ptx::lower_registers<Traits::kTermRegisters>();
    TermConsumer<Traits>(params, shared).run();
  } else {
    ptx::raise_registers<Traits::kKeyRegisters>();
    KeyConsumer<Traits>(params, shared).run();
  }
}

template <class Traits>
cudaError_t make_maps(HopperBwdParams& params) {
  constexpr int kPanel = Traits::kPanel;
  const BackwardParams& p = params.backward;
  const AttentionParams& fwd = p.fwd;
  const auto queries = [&](CUtensorMap& map, const void* x, int dim, int64_t head_stride,
                           int64_t token_stride) {
    return make_tensor_map(map, fwd.dtype, x, dim, fwd.heads_q, head_stride, fwd.total_q,
                           token_stride, 1, 0, kPanel, Traits::kBlockN);
  };
  const auto keys = [&](CUtensorMap& map, const KvTensor& x, int dim) {
    return make_tensor_map(map, fwd.dtype, x.data, dim, fwd.heads_kv, x.head_stride, x.tokens,
                           x.token_stride, x.rows, x.row_stride, kPanel, Traits::kOwnRows);
  };
  cudaError_t error = queries(params.q, fwd.q, fwd.head_dim, fwd.q_head_stride, fwd.q_token_stride);
  if (error != cudaSuccess) return error;
  error = queries(params.dout, p.dout, fwd.head_dim_v, fwd.head_dim_v,
                  int64_t(fwd.heads_q) * fwd.head_dim_v);
  if (error != cudaSuccess) return error;
  error = keys(params.k, fwd.k, fwd.head_dim);
  if (error != cudaSuccess) return error;
  return keys(params.v, fwd.v, fwd.head_dim_v);
}

// The kernel that owns keys, on every multiprocessor.
template <class Traits>
cudaError_t launch_keys(HopperBwdParams& params, int* next_tile, cudaStream_t stream) {
  if (params.order.total == 0) return cudaSuccess;
  cudaError_t error = make_maps<Traits>(params);
  if (error != cudaSuccess) return error;
  int device, sms;
  error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  constexpr int kBlocks = Traits::kPair ? 2 : 1;  // that take a tile of keys
  const int takers = std::min(sms / kBlocks, params.order.total);
  const bool taken = params.order.longest_first && params.order.total > takers;
  if (taken || params.turns) params.next_tile = next_tile;
  constexpr int kBytes = sizeof(BwdStorage<Traits>);
  static_assert(kBytes <= 227 * 1024, "an SM's shared memory");
  constexpr auto kernel = [] {
    if constexpr (Traits::kPair) return bwd_pair_sm90<Traits>;
    if constexpr (!Traits::kPair) return bwd_sm90<Traits>;
  }();
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  kernel<<<takers * kBlocks, Traits::kThreads, kBytes, stream>>>(params);
  return cudaGetLastError();
}

// Sums of dq start from 0, as do the counters behind them; what they come to is dq.
template <class Traits>
cudaError_t launch(const BackwardParams& p, cudaStream_t stream) {
  const AttentionParams& fwd = p.fwd;
  const bool packed = fwd.q_start != nullptr;
  const bool masked = fwd_sm90_windowed(fwd) || packed;
  HopperBwdParams params{};
  params.backward = p;
  params.order = bwd_sm90_order(p, Traits::kBlockM, masked || p.deterministic);
  params.slots = int(bwd_sum_slots(packed, fwd.batch, fwd.len_q, fwd.total_q, kBwdSumQueries));
  const int64_t sums = int64_t(params.slots) * fwd.heads_q * DqSums<Traits>::kTileFloats;
  int* const next_tile = reinterpret_cast<int*>(p.dq_sum + sums);
  const int64_t turns = p.deterministic ? bwd_sm90_turns(packed, fwd.batch, fwd.len_q, fwd.total_q,
                                                         fwd.heads_q, Traits::kHeadDim)
                                        : 0;
  if (p.deterministic) params.turns = next_tile + 1;
  params.turn_queries = bwd_sm90_turn_sizes(fwd).queries;
  cudaError_t error = cudaMemsetAsync(p.dq_sum, 0, (sums + 1 + turns) * sizeof(float), stream);
  if (error != cudaSuccess) return error;
  error = launch_keys<Traits>(params, next_tile, stream);
  if (error != cudaSuccess) return error;
  const FwdGrid grid = fwd_sm80_grid(fwd, FwdTile{kBwdSumQueries, 0, 4, 1});
  const dim3 tiles(grid.section, grid.tiles, grid.sections);
  bwd_read_sums_sm90<Traits><<<tiles, 128, 0, stream>>>(p);
  return cudaGetLastError();
}

template <int kHeadDim>
cudaError_t launch_bwd_sm90(const BackwardParams& p, cudaStream_t stream) {
  return with_16_bits(p.fwd.dtype, [&]<DType kDType>() {
    const bool general = bwd_general(p.fwd);
    if (p.fwd.seeds) {
      return general ? launch<HopperBwdTraits<kHeadDim, kDType, true, true>>(p, stream)
                     : launch<HopperBwdTraits<kHeadDim, kDType, false, true>>(p, stream);
    }
    return general ? launch<HopperBwdTraits<kHeadDim, kDType, true, false>>(p, stream)
                   : launch<HopperBwdTraits<kHeadDim, kDType, false, false>>(p, stream);
  });
}

template cudaError_t launch_bwd_sm90<JAX_FA_HEAD_DIM>(const BackwardParams&, cudaStream_t);

}  // namespace jax_fa
