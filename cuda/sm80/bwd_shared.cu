// dq, dk and dv of attention on mma.sync in one pass, for GPUs from sm_80 on: 5 products.
//
// A block owns one tile of kBlockM keys of one key head and walks the tiles of queries that see
// some of them, for each query head of its group. Each product is split between the warps in the
// way that reads shared memory least, its bottleneck; p^T and ds^T cross it in between. dk and dv
// stay in registers and are whole in the end, dq is summed in float32 over the blocks. Per tile of
// queries, with two buffers of them where there is room:
//
//     wait for Q, dO (n)         | they have landed, and every warp is done with n - 1
//     start Q, dO (n + 1)   p^T = exp2(score(K Q^T) - lse)       parts of keys by queries
//                           ds^T = p^T * (V dO^T - delta)
//     wait for p^T and ds^T      | every warp's part is written
//                           dv += p^T dO    dk += ds^T Q         parts of keys by dims
//                           dq(n) += ds K                        parts of queries by dims
#include "../dtypes.h"
#include "bwd_sum_dq.cuh"
#include "bwd_walk.cuh"

namespace jax_fa {

template <int kDim, DType kType, bool kGeneral, int kStageCount>
struct SharedTraits : BwdTraits<kDim, kType, true, bwd_shared_tile(kDim, kGeneral, kStageCount)> {
  using Base = BwdTraits<kDim, kType, true, bwd_shared_tile(kDim, kGeneral, kStageCount)>;
  static constexpr bool kDk = true;  // V is needed

  // Of dk and dv: 32 keys a warp.
  static constexpr int kKeyWarps = Base::kBlockM / 32;
  static constexpr int kDims = kDim * kKeyWarps / Base::kWarps;  // of a warp
  static_assert(kDims % 16 == 0);

  // Of the scores: 4 warps along the keys, 2 along the queries.
  static constexpr BwdTile kScoreTile{Base::kBlockM, Base::kBlockN / 2, 4, 1, 1};
  using Scores = BwdTraits<kDim, kType, true, kScoreTile>;
  static_assert(Base::kWarps == 8 && Base::kBlockN % 32 == 0);
};

template <class Traits>
struct SharedStorage {
  using Element = typename Traits::Element;

  alignas(128) Element k[Traits::kBlockM][Traits::kHeadDim];  // in the end dk
  alignas(128) Element v[Traits::kBlockM][Traits::kHeadDim];  // in the end dv
  alignas(128) Element q[Traits::kStages][Traits::kBlockN][Traits::kHeadDim];
  alignas(128) Element dout[Traits::kStages][Traits::kBlockN][Traits::kHeadDim];
  alignas(128) Element p[Traits::kBlockM][Traits::kBlockN];
  alignas(128) Element ds[Traits::kBlockM][Traits::kBlockN];
  alignas(16) float2 rows[Traits::kStages][Traits::kBlockN];
  BlockPlan<Traits> plan;
};

template <class Traits, class Score>
struct Consumer {
  using ScoreTraits = typename Traits::Scores;
  using Layout = TileLayout<Traits>;
  static constexpr int kBlockM = Traits::kBlockM, kBlockN = Traits::kBlockN;
  static constexpr DType kDType = Traits::kDType;

  const BackwardParams& params;
  SharedStorage<Traits>& shared;
  int warp = threadIdx.x / 32;
  float dk[2][Traits::kDims / 8][4] = {}, dv[2][Traits::kDims / 8][4] = {};

  // This warp's part of the block's keys by queries, in scores and in dk and dv.
  __device__ int score_row() const { return warp / 2 * ScoreTraits::kWarpM; }
  __device__ int score_col() const { return warp % 2 * ScoreTraits::kBlockN; }
  __device__ int key() const { return warp % Traits::kKeyWarps * 32; }
  __device__ int dim() const { return warp / Traits::kKeyWarps * Traits::kDims; }

  // load_next() starts a copy, where the products of the scores hide what that takes.
  template <class LoadNext>
  __device__ void make_scores(const QueryStep& step, LoadNext load_next) {
    const BlockPlan<Traits>& plan = shared.plan;
    const int stage = step.stage, row = score_row(), col = score_col();
    const uint32_t sQ = ptx::shared_address(shared.q[stage][col]);
    const uint32_t sDout = ptx::shared_address(shared.dout[stage][col]);
    const WalkedQueries<ScoreTraits> queries{shared.rows[stage] + col};
    const ScorePlace place{plan.keys.row0 + row, step.row0 + col};
    const TileMask kind = classify_scores<ScoreTraits>(plan.mask, place, plan.len_q);
    ScoreGradients<ScoreTraits, Score> s;
    if (kind == TileMask::kSkip) {
      load_next();
      s.clear();
    } else {
      const Score score(params.fwd, plan.b, step.head, plan.len_q, plan.mask);
      gemm_qk<ScoreTraits>(s.p, ptx::shared_address(shared.k[row]), sQ);
      load_next();
      s.apply_softmax(score, plan.mask, plan.len_q, place, kind, queries);
      gemm_qk<ScoreTraits>(s.ds, ptx::shared_address(shared.v[row]), sDout);
      s.apply_gradient(score, queries);
      s.apply_slope();
      s.apply_dropout();
    }
    store_scores<Traits>(ptx::shared_address(shared.p), s.p, row, col);
    store_scores<Traits>(ptx::shared_address(shared.ds), s.ds, row, col);
  }

  __device__ void add_products(const QueryStep& step) {
    using Scores = ScoreLayout<Traits>;
    const BlockPlan<Traits>& plan = shared.plan;
    const int stage = step.stage;
    const uint32_t sDs = ptx::shared_address(shared.ds);
    if (plan.is_seen(step, key(), 32)) {
      gemm_shared<kDType, kBlockN, false, Scores, Layout>(
          dv, ptx::shared_address(shared.p), key(), ptx::shared_address(shared.dout[stage]), dim());
      gemm_shared<kDType, kBlockN, false, Scores, Layout>(
          dk, sDs, key(), ptx::shared_address(shared.q[stage]), dim());
    }
    SumDq<Traits>::add(params.dq_sum + plan.sum_tile(step) * SumDq<Traits>::kTileFloats, sDs,
                       ptx::shared_address(shared.k));
  }

  // Through shared memory, so that whole lines are stored.
  __device__ void finish() {
    write(ptx::shared_address(shared.k), dk, params.fwd.scale);
    write(ptx::shared_address(shared.v), dv, Score::kDropout ? params.fwd.dropout_scale : 1.f);
    __syncthreads();  // every warp's part is written
    store(params.dk, params.dk_row_stride, params.dk_token_stride, ptx::shared_address(shared.k),
          params.fwd.head_dim);
    store(params.dv, params.dv_row_stride, params.dv_token_stride, ptx::shared_address(shared.v),
          params.fwd.head_dim_v);
  }

 private:
  template <class Tile>
  __device__ void write(uint32_t sTile, const Tile& x, float scale) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = key() + m * 16 + h * 8 + lane / 4;
#pragma unroll
        for (int d = 0; d < Traits::kDims / 8; ++d) {
          const uint32_t two =
              Mma<kDType>::pack(x[m][d][2 * h] * scale, x[m][d][2 * h + 1] * scale);
          ptx::store_shared(sTile + Layout::offset(row, dim() / 8 + d) + lane % 4 * 4, two);
        }
      }
    }
  }

  __device__ void store(void* x, int64_t row_stride, int64_t token_stride, uint32_t sTile,
                        int dims) const {
    const KeyTile& keys = shared.plan.keys;
    const int64_t row0 = params.fwd.q_start ? 0 : keys.b * row_stride;
    auto* gX = static_cast<typename Traits::Element*>(x) + row0 + keys.token0 * token_stride +
               int64_t(keys.head) * dims;
    TileShare<Traits, kBlockM>().for_each(sTile, [&](int row, int chunk, uint32_t place) {
      const int dim = chunk * Layout::kChunkElements;
      if (row >= keys.rows || dim >= dims) return;
      uint32_t y[4];
      ptx::load_shared_v4(y, place);
      *reinterpret_cast<uint4*>(gX + row * token_stride + dim) = make_uint4(y[0], y[1], y[2], y[3]);
    });
  }
};

template <class Traits, class Score>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kTile.blocks_per_sm)
    bwd_shared_sm80(const __grid_constant__ BackwardParams params) {
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
    consumer.make_scores(step, [&] {
      if (Traits::kStages > 1 && more) producer.load_queries(plan.next(step));
    });
    __syncthreads();  // p and ds are written
    consumer.add_products(step);
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
  static_assert(kBytes <= bwd_shared_bytes(Traits::kHeadDim, Traits::kTile));
  const auto kernel = bwd_shared_sm80<Traits, Score>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  kernel<<<unsigned(blocks), Traits::kThreads, kBytes, stream>>>(params);
  return cudaGetLastError();
}

template <class Traits, class Score>
cudaError_t launch_summing(const BackwardParams& params, cudaStream_t stream) {
  return launch_with_sums<Traits>(params, stream,
                                  [&] { return launch<Traits, Score>(params, stream); });
}

template <int kHeadDim, DType kDType, bool kGeneral, class Score>
cudaError_t launch_staged(const BackwardParams& params, int stages, cudaStream_t stream) {
  if constexpr (kHeadDim > 192) {  // two buffers fit all GPUs that one fits, up to there
    using Single = SharedTraits<kHeadDim, kDType, kGeneral, 1>;
    if (stages == 1) return launch_summing<Single, Score>(params, stream);
  }
  return launch_summing<SharedTraits<kHeadDim, kDType, kGeneral, 2>, Score>(params, stream);
}

template <int kHeadDim>
cudaError_t launch_bwd_shared_sm80(const BackwardParams& params, int stages, cudaStream_t stream) {
  return with_16_bits(params.fwd.dtype, [&]<DType kDType>() {
    if (params.fwd.seeds)
      return launch_staged<kHeadDim, kDType, true, Dropped<GeneralScore>>(params, stages, stream);
    return bwd_general(params.fwd)
               ? launch_staged<kHeadDim, kDType, true, GeneralScore>(params, stages, stream)
               : launch_staged<kHeadDim, kDType, false, ScaledScore>(params, stages, stream);
  });
}

template cudaError_t launch_bwd_shared_sm80<JAX_FA_HEAD_DIM>(const BackwardParams&, int,
                                                             cudaStream_t);

}  // namespace jax_fa
