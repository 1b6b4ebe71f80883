// Gradients of attention on Hopper: dq, dk and dv of o = softmax(score(q k^T)) v in one pass of 5
// products, with bulk tensor copies (TMA), warpgroup products (wgmma) and warps of different roles.
//
// One block per SM walks tiles of 128 keys of one key head, and for each the tiles of queries that
// see some of them, for each query head of its group. Its first warpgroup produces
// (bwd_producer.cuh): warp 0 says which keys come next, warp 1 starts the copies of keys, values,
// queries and the gradients of their outputs, warp 2 clears rows past a length. Two warpgroups own
// 64 keys each, with dk and dv in registers: they are whole in the end. Per tile of queries
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
// this order and walk queries from the last to the first, so that a block starts a step behind the
// one before it and then meets sums that are ready (bwd_producer.cuh).
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
#include "../dropout.cuh"
#include "../softmax.cuh"
#include "bwd_block.cuh"
#include "bwd_producer.cuh"
#include "bwd_store.cuh"
#include "tensor_map.h"
#include "wgmma.cuh"

namespace jax_fa {

// A warpgroup of 64 keys.
template <class Traits>
struct KeyConsumer {
  static constexpr int kHeadDim = Traits::kHeadDim, kBlockN = Traits::kBlockN;
  static constexpr int kPanel = Traits::kPanel;
  static constexpr DType kDType = Traits::kDType;
  using Storage = HopperBwdStorage<Traits>;
  using Score = typename Traits::Score;

  const HopperBwdParams& hopper;
  const BackwardParams& params = hopper.backward;
  Storage& shared;
  int part = __shfl_sync(0xffffffff, threadIdx.x / 128 - 2, 0);  // known to be uniform
  int lane = threadIdx.x % 32;
  int row = part * 64 + threadIdx.x / 32 % 4 * 16 + lane / 4;  // of the lane's two keys, the first

  Ring<Storage::kWorks> works;
  Ring<Traits::kStages> ring;  // of queries and of ds

  float dk[kHeadDim / 2], dv[kHeadDim / 2];
  float s[kBlockN / 2], dp[kBlockN / 2];
  uint32_t p[kBlockN / 4], ds[kBlockN / 4];
  uint32_t slope[Score::kHasSlope ? kBlockN / 4 : 1];  // p times the score's derivative
  Survivors<1, kBlockN / 8> survivors;                 // unused without dropout, as are the seeds
  uint2 seeds;

  __device__ KeyConsumer(const HopperBwdParams& params, Storage& shared)
      : hopper(params), shared(shared) {}

  __device__ const KeyWork& work() { return shared.work(works.at()); }

  __device__ void release(ptx::Barrier& empty) const {
    if (lane == 0) ptx::barrier_arrive(empty);
  }

  // --- the products; they only start here ---

  // x = owned walked^T, of this warpgroup's rows.
  template <class Owned, class Walked>
  __device__ void start_scores(float (&x)[kBlockN / 2], Owned& owned, Walked& walked) {
    const uint64_t a = panel_descriptor<kPanel>(owned[0][part * 64]);
    const uint64_t b = panel_descriptor<kPanel>(walked);
    pin(x);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
      constexpr int kSteps = kPanel / 16;  // in a panel
      const int step = i % kSteps * 2, panel = i / kSteps * kPanel * 2 / 16;
      Wgmma<kDType, kBlockN>::ss(x, a + panel * Traits::kBlockM + step, b + panel * kBlockN + step,
                                 i > 0);
    }
    ptx::wgmma_commit();
  }

  // x += weights walked.
  template <class Walked>
  __device__ void start_sum(float (&x)[kHeadDim / 2], uint32_t (&weights)[kBlockN / 4],
                            Walked& walked) {
    const uint64_t b = panel_descriptor<kPanel>(walked, kBlockN * kPanel * 2);
    pin(x);
    pin(weights);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < kBlockN / 16; ++i) {
      Wgmma<kDType, kHeadDim>::rs(x, &weights[i * 4], b + i * kPanel * 2);
    }
    ptx::wgmma_commit();
  }

  // --- from scores to probabilities and their gradients ---

  __device__ TileMask classify(int row0) {
    const KeyWork& work = this->work();
    const int key0 = work.keys.row0 + part * 64;
    return work.mask.classify(row0, min(row0 + kBlockN, work.len_q), key0, key0 + 64);
  }

  // {lse_log2, delta} of the lane's two queries among eight.
  __device__ float4 query_rows(int t) const {
    return reinterpret_cast<const float4*>(shared.rows[ring.at()])[t * 4 + lane % 4];
  }

  // Of a key of this lane, counted from its first key and query, what its distance behind
  // a query that sees it is at least, and less than.
  struct Bounds {
    int least, most[2];
  };

  __device__ Bounds bounds(int row0) {
    const KeyWork& work = this->work();
    const int i0 = row0 + lane % 4 * 2, j0 = work.keys.row0 + row, offset = j0 - i0;
    const Interval seen = work.mask.seen_offsets();
    const int hi = min(seen.hi, INT_MAX / 2) - offset, len = work.mask.len_kv - j0;
    return {max(seen.lo, INT_MIN / 2) - offset, {len > 0 ? hi : INT_MIN, len > 8 ? hi : INT_MIN}};
  }

  // What survives of a tile of scores: while their product runs. H200: while those of dk and dv of
  // the tile before do, it takes longer (head_dim 64, T = 8k: 12 %).
  __device__ void draw(int head, int row0) {
    if constexpr (Traits::kDropout) {
      survivors.template draw<true>(Dropout(params.fwd, seeds, head),
                                    work().keys.row0 + row - lane / 4, row0);
    }
  }

  // s to p; kHidden: some queries may not see some keys.
  template <bool kHidden>
  __device__ void apply_softmax(int head, int row0) {
    const KeyWork& work = this->work();
    const Score score(params.fwd, work.b, head, work.len_q, work.mask);
    const auto for_each = [&](auto f) {
      const int i0 = row0 + lane % 4 * 2, j0 = work.keys.row0 + row;
#pragma unroll
      for (int i = 0; i < kBlockN / 2; ++i) {
        f(s[i], Place{i0, i / 4 * 8 + i % 2}, Place{j0, i / 2 % 2 * 8});
      }
    };
    score.cap(for_each);
    if constexpr (Score::kHasSlope) {
#pragma unroll
      for (int i = 0; i < kBlockN / 4; ++i) {
        slope[i] = Mma<kDType>::pack(score.slope(s[2 * i]), score.slope(s[2 * i + 1]));
      }
    }
    score.shift(for_each);
    const float to_log2 = score.to_log2();
#pragma unroll
    for (int t = 0; t < kBlockN / 8; ++t) {
      const float4 rows = query_rows(t);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float& x = s[t * 4 + e];
        x = ptx::exp2(fmaf(x, to_log2, e % 2 ? -rows.z : -rows.x));
      }
    }
    if constexpr (kHidden) hide(bounds(row0));
#pragma unroll
    for (int i = 0; i < kBlockN / 4; ++i) {
      p[i] = Mma<kDType>::pack(s[2 * i], s[2 * i + 1]);
      if constexpr (Score::kHasSlope) {
        const float2 factor = Mma<kDType>::unpack(slope[i]);
        slope[i] = Mma<kDType>::pack(s[2 * i] * factor.x, s[2 * i + 1] * factor.y);
      }
    }
  }

  __device__ void hide(const Bounds& bounds) {
#pragma unroll
    for (int i = 0; i < kBlockN / 2; ++i) {
      const int offset = i / 2 % 2 * 8 - (i / 4 * 8 + i % 2);
      const bool seen = (offset >= bounds.least) & (offset < bounds.most[i / 2 % 2]);
      s[i] = seen ? s[i] : 0.f;
    }
  }

  // dp to ds.
  __device__ void apply_gradient() {
    if constexpr (Traits::kDropout) {
      survivors.apply(reinterpret_cast<float (&)[1][kBlockN / 8][4]>(dp));
#pragma unroll
      for (float& x : dp) x *= params.fwd.dropout_scale;
    }
#pragma unroll
    for (int t = 0; t < kBlockN / 8; ++t) {
      const float4 rows = query_rows(t);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int i = t * 2 + h;
        float2 x;
        if constexpr (Score::kHasSlope) {
          x = Mma<kDType>::unpack(slope[i]);
        } else {
          x = Mma<kDType>::unpack(p[i]);
        }
        ds[i] = Mma<kDType>::pack(x.x * (dp[2 * i] - rows.y), x.y * (dp[2 * i + 1] - rows.w));
      }
    }
  }

  __device__ void apply_dropout() {
    if constexpr (Traits::kDropout) {
#pragma unroll
      for (int i = 0; i < kBlockN / 4; ++i) p[i] &= survivors.halves(0, i / 2, i % 2);
    }
  }

  // Hands this warp's 16 keys of ds over.
  __device__ void share_gradient() {
    const int at = ring.at();
    ptx::barrier_wait(shared.ds_empty[at], ring.parity() ^ 1);
    // Of its 8 rows by 8 queries, a lane writes one row.
    const uint32_t sRow = ptx::shared_address(shared.ds[at][0][row - lane / 4 + lane % 16]);
    const uint32_t sFirst = sRow + ((lane / 16) ^ (lane % 8)) * 16;  // swizzled
#pragma unroll
    for (int i = 0; i < kBlockN / 16; ++i) {
      const uint32_t x[4] = {ds[i * 4], ds[i * 4 + 1], ds[i * 4 + 2], ds[i * 4 + 3]};
      ptx::stmatrix_x4((sFirst ^ i % 4 * 32) + i / 4 * sizeof(shared.ds[0][0]), x);
    }
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
    partial ? apply_softmax<true>(head, row0) : apply_softmax<false>(head, row0);
    ptx::barrier_wait(shared.v_full, works.count & 1);  // at the first step
    start_scores(dp, shared.v, shared.dout[at]);
    ptx::wgmma_wait<0>();
    pin(dp);
    if constexpr (!Traits::kDropout) start_sum(dv, p, shared.dout[at]);
    apply_gradient();
    share_gradient();
    if constexpr (Traits::kDropout) {  // ds needs p whole
      apply_dropout();
      start_sum(dv, p, shared.dout[at]);
    }
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

  __device__ void store() {
    const KeyWork& work = this->work();
    const KeyTile& keys = work.keys;
    const AttentionParams& fwd = params.fwd;
    const bool live[2] = {keys.row0 + row < keys.len_kv, keys.row0 + row + 8 < keys.len_kv};
    const auto write = [&](const float (&x)[kHeadDim / 2], void* out, int64_t row_stride,
                           int64_t token_stride, float scale, int dims) {
      auto* gX = static_cast<typename Traits::Element*>(out) +
                 (fwd.q_start ? 0 : keys.b * row_stride) + (keys.token0 + row) * token_stride +
                 int64_t(keys.head) * dims;
      store_rows<Traits>(x, scale, dims, live, [&](int h) {
        return row + h * 8 < keys.rows ? gX + h * 8 * token_stride : nullptr;
      });
    };
    write(dk, params.dk, params.dk_row_stride, params.dk_token_stride, fwd.scale, fwd.head_dim);
    write(dv, params.dv, params.dv_row_stride, params.dv_token_stride,
          Traits::kDropout ? fwd.dropout_scale : 1.f, fwd.head_dim_v);
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
      store();
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
                           x.token_stride, x.rows, x.row_stride, kPanel, Traits::kBlockM);
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
  const int blocks = std::min(sms, params.order.total);
  const bool taken = params.order.longest_first && params.order.total > blocks;
  if (taken || params.turns) params.next_tile = next_tile;
  constexpr int kBytes = sizeof(HopperBwdStorage<Traits>);
  static_assert(kBytes <= 227 * 1024, "an SM's shared memory");
  const auto kernel = bwd_sm90<Traits>;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  kernel<<<blocks, Traits::kThreads, kBytes, stream>>>(params);
  return cudaGetLastError();
}

// Sums of dq start from 0, as do the counters behind them; what they come to is dq.
template <class Traits>
cudaError_t launch(const BackwardParams& p, cudaStream_t stream) {
  const AttentionParams& fwd = p.fwd;
  const bool packed = fwd.q_start != nullptr;
  const bool masked = fwd.window_left >= 0 || fwd.window_right >= 0 || packed;
  HopperBwdParams params{};
  params.backward = p;
  params.order = bwd_sm90_order(p, Traits::kBlockM, masked || p.deterministic);
  params.slots = int(bwd_sum_slots(packed, fwd.batch, fwd.len_q, fwd.total_q, kBwdSumQueries));
  const int64_t sums = int64_t(params.slots) * fwd.heads_q * DqSums<Traits>::kTileFloats;
  int* const next_tile = reinterpret_cast<int*>(p.dq_sum + sums);
  const int64_t turns =
      p.deterministic ? bwd_sm90_turns(packed, fwd.batch, fwd.len_q, fwd.total_q, fwd.heads_q) : 0;
  if (p.deterministic) params.turns = next_tile + 1;
  cudaError_t error = cudaMemsetAsync(p.dq_sum, 0, (sums + 1 + turns) * sizeof(float), stream);
  if (error != cudaSuccess) return error;
  error = launch_keys<Traits>(params, next_tile, stream);
  if (error != cudaSuccess) return error;
  const FwdGrid grid = fwd_sm80_grid(fwd, FwdTile{kBwdSumQueries, 0, 4, 1});
  const dim3 tiles(grid.section, grid.tiles, grid.sections);
  bwd_read_sums_sm90<Traits><<<tiles, 128, 0, stream>>>(p);
  return cudaGetLastError();
}

template <int kHeadDim, DType kDType>
cudaError_t launch_bwd_sm90(const BackwardParams& p, cudaStream_t stream) {
  const bool general = bwd_general(p.fwd);
  if (p.fwd.seeds) {
    return general ? launch<HopperBwdTraits<kHeadDim, kDType, true, true>>(p, stream)
                   : launch<HopperBwdTraits<kHeadDim, kDType, false, true>>(p, stream);
  }
  return general ? launch<HopperBwdTraits<kHeadDim, kDType, true, false>>(p, stream)
                 : launch<HopperBwdTraits<kHeadDim, kDType, false, false>>(p, stream);
}

template cudaError_t launch_bwd_sm90<JAX_FA_HEAD_DIM, DType::JAX_FA_DTYPE>(const BackwardParams&,
                                                                           cudaStream_t);

}  // namespace jax_fa
