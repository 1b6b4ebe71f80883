// dk and dv of attention on mma.sync, for GPUs from sm_80 on; on request the sums of dq too.
//
// A block owns one tile of kBlockM keys of one key head and walks the tiles of queries that see
// some of them, for each query head of its group: dk and dv are whole when it ends, so that no
// order of blocks shows in them. Each warp owns whole rows of keys, and S^T = K Q^T, dP^T = V dO^T,
// dK and dV stay in its registers. Per tile of queries, with two buffers of them:
//
//     wait for Q, dO (n)            | they have landed, and every warp is done with n - 1
//     start Q, dO (n + 1)   p^T = exp2(score(K Q^T) - lse)
//                           dv += p^T dO
//                           ds^T = p^T * (V dO^T - delta)
//                           dk += ds^T Q
//     with sums of dq:      share ds^T; wait for all of it; dq(n) += ds K
#include "../dtypes.h"
#include "bwd_sum_dq.cuh"
#include "bwd_walk.cuh"
#include "store.cuh"

namespace jax_fa {

template <int kDim, DType kType, bool kGeneral, KeyGradients kGradients_>
struct KeyTraits : BwdTraits<kDim, kType, true, bwd_keys_tile(kDim, kType, kGeneral, kGradients_)> {
  static constexpr KeyGradients kGradients = kGradients_;
  static constexpr bool kDv = kGradients != KeyGradients::kDk;
  static constexpr bool kDk = kGradients != KeyGradients::kDv;
  static constexpr bool kDq = kGradients == KeyGradients::kBothAndDq;
};

template <class Traits>
struct SharedStorage {
  using Element = typename Traits::Element;
  static constexpr int kValues = Traits::kDk ? Traits::kBlockM : 1;
  static constexpr int kShared = Traits::kDq ? Traits::kBlockM : 1;

  alignas(128) Element k[Traits::kBlockM][Traits::kHeadDim];
  alignas(128) Element v[kValues][Traits::kHeadDim];
  alignas(128) Element q[Traits::kStages][Traits::kBlockN][Traits::kHeadDim];
  alignas(128) Element dout[Traits::kStages][Traits::kBlockN][Traits::kHeadDim];
  alignas(128) Element ds[kShared][Traits::kBlockN];
  alignas(16) float2 rows[Traits::kStages][Traits::kBlockN];
  BlockPlan<Traits> plan;
};

// The keys of one warp.
template <class Traits, class Score>
struct Consumer {
  const BackwardParams& params;
  SharedStorage<Traits>& shared;
  int warp_row = threadIdx.x / 32 * Traits::kWarpM;  // the warp's first key within the tile
  OutputTile<Traits> dk = {}, dv = {};

  // One tile of queries. load_next() starts a copy, where a product hides what that takes.
  template <class LoadNext>
  __device__ void add(const QueryStep& step, LoadNext load_next) {
    const BlockPlan<Traits>& plan = shared.plan;
    const int stage = step.stage;
    const uint32_t sQ = ptx::shared_address(shared.q[stage]);
    const uint32_t sDout = ptx::shared_address(shared.dout[stage]);
    const WalkedQueries<Traits> queries{shared.rows[stage]};
    const ScorePlace place{plan.keys.row0 + warp_row, step.row0};
    const TileMask kind = classify_scores<Traits>(plan.mask, place, plan.len_q);
    ScoreGradients<Traits, Score> s;

    if (kind != TileMask::kSkip) {
      const Score score(params.fwd, plan.b, step.head, plan.len_q, plan.mask);
      gemm_qk<Traits>(s.p, ptx::shared_address(shared.k[warp_row]), sQ);
      load_next();
      s.apply_softmax(score, plan.mask, plan.len_q, place, kind, queries);
      if constexpr (Traits::kDv && !Score::kDropout) gemm_pv<Traits>(dv, s.p, sDout);
      if constexpr (Traits::kDk) {
        gemm_qk<Traits>(s.ds, ptx::shared_address(shared.v[warp_row]), sDout);
        s.apply_gradient(score, queries);
        s.apply_slope();
      }
      if constexpr (Traits::kDv && Score::kDropout) {
        s.apply_dropout();
        gemm_pv<Traits>(dv, s.p, sDout);
      }
    }
    if (kind == TileMask::kSkip) load_next();
    if constexpr (Traits::kDq) {
      if (kind == TileMask::kSkip) s.clear();
      store_scores<Traits>(ptx::shared_address(shared.ds), s.ds, warp_row, 0);
    }
    if constexpr (Traits::kDk) {
      if (kind != TileMask::kSkip) gemm_pv<Traits>(dk, s.ds, sQ);
    }
    if constexpr (Traits::kDq) {
      __syncthreads();  // all of ds is written; the next tile's wait protects its readers
      SumDq<Traits>::add(params.dq_sum + plan.sum_tile(step) * SumDq<Traits>::kTileFloats,
                         ptx::shared_address(shared.ds), ptx::shared_address(shared.k));
    }
  }

  __device__ void finish() {
    const AttentionParams& fwd = params.fwd;
    const KeyTile& keys = shared.plan.keys;
    const auto out = [&](void* x, int64_t row_stride, int64_t token_stride, int dim) {
      auto* gX = static_cast<typename Traits::Element*>(x) +
                 (fwd.q_start ? 0 : keys.b * row_stride) + keys.token0 * token_stride +
                 int64_t(keys.head) * dim;
      return TileRows<Traits>{gX, token_stride, keys.rows, dim};
    };
    const uint32_t sRows = ptx::shared_address(shared.k[warp_row]);
    if constexpr (Traits::kDk) {
      scale_tile(dk, fwd.scale);
      store_o<Traits>(out(params.dk, params.dk_row_stride, params.dk_token_stride, fwd.head_dim),
                      dk, warp_row, sRows);
    }
    if constexpr (Traits::kDk && Traits::kDv) __syncwarp();  // the rows of dk are read
    if constexpr (Traits::kDv) {
      if constexpr (Score::kDropout) scale_tile(dv, fwd.dropout_scale);
      store_o<Traits>(out(params.dv, params.dv_row_stride, params.dv_token_stride, fwd.head_dim_v),
                      dv, warp_row, sRows);
    }
  }
};

template <class Traits, class Score>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kTile.blocks_per_sm)
    bwd_keys_sm80(const __grid_constant__ BackwardParams params) {
  extern __shared__ __align__(128) unsigned char raw_shared[];
  auto& shared = *reinterpret_cast<SharedStorage<Traits>*>(raw_shared);

  const KeyTile keys = locate_keys<Traits::kBlockM>(params);
  if (keys.rows <= 0) return;
  if (threadIdx.x == 0) make_plan(shared.plan, params.fwd, keys);
  __syncthreads();  // the plan is written
  const BlockPlan<Traits>& plan = shared.plan;
  const Producer<Traits, SharedStorage<Traits>> producer{params, shared};
  Consumer<Traits, Score> consumer{params, shared};
  QueryStep step = plan.first();
  if (step.head < plan.head1) {
    producer.load_keys();
    producer.load_queries(step);
  }
  for (; step.head < plan.head1; step = plan.next(step)) {
    const bool more = !plan.is_last(step);
    ptx::cp_async_wait_all();
    __syncthreads();  // this tile has landed, and every warp is done with the last one
    consumer.add(step, [&] {
      if (Traits::kStages > 1 && more) producer.load_queries(plan.next(step));
    });
    if (Traits::kStages == 1 && more) {
      __syncthreads();  // every warp is done with the only buffer
      producer.load_queries(plan.next(step));
    }
  }
  __syncthreads();  // every warp is done with K: the epilogue reuses its place
  consumer.finish();
}

template <class Traits, class Score>
cudaError_t launch(const BackwardParams& params, cudaStream_t stream) {
  const int64_t blocks = bwd_keys_blocks(params, Traits::kBlockM);
  if (blocks == 0) return cudaSuccess;
  constexpr int kBytes = sizeof(SharedStorage<Traits>);
  const auto kernel = bwd_keys_sm80<Traits, Score>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  kernel<<<unsigned(blocks), Traits::kThreads, kBytes, stream>>>(params);
  return cudaGetLastError();
}

template <int kHeadDim, DType kDType, bool kGeneral, class Score>
cudaError_t launch_gradients(const BackwardParams& params, cudaStream_t stream) {
  using enum KeyGradients;
  if constexpr (bwd_splits_keys(kHeadDim)) {
    const cudaError_t error =
        launch<KeyTraits<kHeadDim, kDType, kGeneral, kDk>, Score>(params, stream);
    if (error != cudaSuccess) return error;
    return launch<KeyTraits<kHeadDim, kDType, kGeneral, kDv>, Score>(params, stream);
  } else {
    if constexpr (bwd_can_sum_dq(kDType) && !bwd_shares_scores(kHeadDim)) {
      using Summing = KeyTraits<kHeadDim, kDType, kGeneral, kBothAndDq>;
      const auto launch_keys = [&] { return launch<Summing, Score>(params, stream); };
      if (params.dq_sum) return launch_with_sums<Summing>(params, stream, launch_keys);
    }
    return launch<KeyTraits<kHeadDim, kDType, kGeneral, kBoth>, Score>(params, stream);
  }
}

template <int kHeadDim>
cudaError_t launch_bwd_keys_sm80(const BackwardParams& params, cudaStream_t stream) {
  return with_float(params.fwd.dtype, [&]<DType kDType>() {
    if (params.fwd.seeds)
      return launch_gradients<kHeadDim, kDType, true, Dropped<GeneralScore>>(params, stream);
    return bwd_general(params.fwd)
               ? launch_gradients<kHeadDim, kDType, true, GeneralScore>(params, stream)
               : launch_gradients<kHeadDim, kDType, false, ScaledScore>(params, stream);
  });
}

template cudaError_t launch_bwd_keys_sm80<JAX_FA_HEAD_DIM>(const BackwardParams&, cudaStream_t);

}  // namespace jax_fa
