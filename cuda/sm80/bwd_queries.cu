// dq of attention on mma.sync, for GPUs from sm_80 on: where sums of dq over blocks of keys may not
// depend on their order, or do not pay.
//
// A block takes one tile of kBlockM queries of one head and walks the tiles of keys that some of
// them see. It is the kernel of bwd_keys.cu with the two sides exchanged: each warp owns whole rows
// of queries. Per tile of keys, with two buffers of them:
//
//     wait for K, V (n)             | they have landed, and every warp is done with n - 1
//     start K, V (n + 1)    p = exp2(score(Q K^T) - lse)
//                           ds = p * (dO V^T - delta)
//                           dq += ds K
#include "../dtypes.h"
#include "bwd_scores.cuh"
#include "schedule.cuh"
#include "store.cuh"

namespace jax_fa {
namespace {

template <int kDim, DType kType, bool kGeneral>
using QueryTraits = BwdTraits<kDim, kType, false, bwd_queries_tile(kDim, kType, kGeneral)>;

// What the threads of a block share, read where it is used: registers are for the accumulators.
struct BlockPlan {
  QueryTile tile;
  IntervalMask mask;
  KvHead k, v;
  int begin, end;  // tiles of keys that some query sees
};

template <class Traits>
struct SharedStorage {
  using Element = typename Traits::Element;

  alignas(128) Element q[Traits::kBlockM][Traits::kHeadDim];
  alignas(128) Element dout[Traits::kBlockM][Traits::kHeadDim];
  alignas(128) Element k[Traits::kStages][Traits::kBlockN][Traits::kHeadDim];
  alignas(128) Element v[Traits::kStages][Traits::kBlockN][Traits::kHeadDim];
  BlockPlan plan;
};

// Moves the tiles of one block.
template <class Traits>
struct Producer {
  using Element = typename Traits::Element;

  const BackwardParams& params;
  SharedStorage<Traits>& shared;

  __device__ void load_queries() const {
    const AttentionParams& fwd = params.fwd;
    load(fwd.q, fwd.q_token_stride, fwd.q_head_stride, fwd.head_dim, shared.q);
    load(params.dout, int64_t(fwd.heads_q) * fwd.head_dim_v, fwd.head_dim_v, fwd.head_dim_v,
         shared.dout);
  }

  __device__ void load_keys(int n) const {
    constexpr int kRows = Traits::kBlockN;
    const AttentionParams& fwd = params.fwd;
    const int stage = n % Traits::kStages;
    load_kv<Traits, kRows>(ptx::shared_address(shared.k[stage]), fwd.k, shared.plan.k, n * kRows,
                           fwd.head_dim);
    load_kv<Traits, kRows>(ptx::shared_address(shared.v[stage]), fwd.v, shared.plan.v, n * kRows,
                           fwd.head_dim_v);
  }

 private:
  template <class Tile>
  __device__ void load(const void* x, int64_t stride, int64_t head_stride, int dim,
                       Tile& sTile) const {
    const QueryTile& tile = shared.plan.tile;
    const auto* gX =
        static_cast<const Element*>(x) + tile.token0 * stride + tile.head * head_stride;
    copy_tile<Traits, Traits::kBlockM>(ptx::shared_address(sTile),
                                       min(tile.rows, tile.len_q - tile.row0), dim,
                                       [&](int row) { return gX + row * stride; });
  }
};

// The queries of one warp.
template <class Traits, class Score>
struct Consumer {
  const BackwardParams& params;
  SharedStorage<Traits>& shared;
  int warp_row = threadIdx.x / 32 * Traits::kWarpM;  // the warp's first query within the tile
  OwnedQueries<Traits> queries;
  OutputTile<Traits> dq = {};

  __device__ Consumer(const BackwardParams& params, SharedStorage<Traits>& shared)
      : params(params), shared(shared) {
    const QueryTile& tile = shared.plan.tile;
    queries.load(params, tile, warp_row);
  }

  // Keys n * kBlockN onwards.
  __device__ void step(int n) {
    const BlockPlan& plan = shared.plan;
    const QueryTile& tile = plan.tile;
    const int stage = n % Traits::kStages;
    const uint32_t sK = ptx::shared_address(shared.k[stage]);
    const ScorePlace place{tile.row0 + warp_row, n * Traits::kBlockN};
    const TileMask kind = classify_scores<Traits>(plan.mask, place, tile.len_q);
    if (kind == TileMask::kSkip) return;
    ScoreGradients<Traits, Score> s;
    const Score score(params.fwd, tile.b, tile.head, tile.len_q, plan.mask);
    gemm_qk<Traits>(s.p, ptx::shared_address(shared.q[warp_row]), sK);
    s.apply_softmax(score, plan.mask, tile.len_q, place, kind, queries);
    gemm_qk<Traits>(s.ds, ptx::shared_address(shared.dout[warp_row]),
                    ptx::shared_address(shared.v[stage]));
    s.apply_gradient(score, queries);
    s.apply_slope();
    gemm_pv<Traits>(dq, s.ds, sK);
  }

  __device__ void finish() {
    const QueryTile& tile = shared.plan.tile;
    const AttentionParams& fwd = params.fwd;
    auto* gDq = static_cast<typename Traits::Element*>(params.dq) +
                tile.token0 * params.dq_token_stride + tile.head * fwd.q_head_stride;
    scale_tile(dq, fwd.scale);
    __syncwarp();  // every lane has read the queries, whose place store_o takes
    store_o<Traits>(TileRows<Traits>{gDq, params.dq_token_stride, tile.rows, fwd.head_dim}, dq,
                    warp_row, ptx::shared_address(shared.q[warp_row]));
  }
};

template <class Traits>
__device__ void make_plan(BlockPlan& plan, const AttentionParams& p, const QueryTile& tile) {
  const int b = max(tile.b, 0), head = tile.head / (p.heads_q / p.heads_kv);
  const int len_kv = p.kv.length ? min(max(p.kv.length[b], 0), p.kv.len_kv) : p.kv.len_kv;
  const int row_end = min(tile.row0 + tile.rows, tile.len_q);
  plan.tile = tile;
  plan.mask = IntervalMask(tile.len_q, len_kv, p.window_left, p.window_right, p.top_left);
  plan.k = KvHead(p.k, p.kv, b, head, len_kv);
  plan.v = KvHead(p.v, p.kv, b, head, len_kv);
  const Interval any = plan.mask.seen_by_any(tile.row0, row_end);
  plan.begin = any.lo / Traits::kBlockN;
  plan.end = tile.row0 < row_end ? (any.hi + Traits::kBlockN - 1) / Traits::kBlockN : 0;
}

template <class Traits, class Score>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kTile.blocks_per_sm)
    bwd_queries_sm80(const __grid_constant__ BackwardParams params) {
  extern __shared__ __align__(128) unsigned char raw_shared[];
  auto& shared = *reinterpret_cast<SharedStorage<Traits>*>(raw_shared);

  const QueryTile tile = locate_tile<Traits::kBlockM>(params.fwd);
  if (tile.rows <= 0) return;
  if (threadIdx.x == 0) make_plan<Traits>(shared.plan, params.fwd, tile);
  __syncthreads();  // the plan is written
  const int end = shared.plan.end;
  int n = shared.plan.begin;
  const Producer<Traits> producer{params, shared};
  Consumer<Traits, Score> consumer(params, shared);
  if (n < end) {
    producer.load_queries();
    producer.load_keys(n);
  }
  for (; n < end; ++n) {
    ptx::cp_async_wait_all();
    __syncthreads();  // tile n has landed, and every warp is done with tile n - 1
    if (Traits::kStages > 1 && n + 1 < end) producer.load_keys(n + 1);
    consumer.step(n);
    if (Traits::kStages == 1 && n + 1 < end) {
      __syncthreads();  // every warp is done with the only buffer
      producer.load_keys(n + 1);
    }
  }
  consumer.finish();
}

template <class Traits, class Score>
cudaError_t launch(const BackwardParams& params, cudaStream_t stream) {
  constexpr BwdTile kTile = Traits::kTile;
  const FwdGrid grid = fwd_sm80_grid(params.fwd, FwdTile{kTile.m, kTile.n, kTile.warps, 1});
  if (grid.blocks == 0) return cudaSuccess;
  constexpr int kBytes = sizeof(SharedStorage<Traits>);
  const auto kernel = bwd_queries_sm80<Traits, Score>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  const dim3 blocks(grid.section, grid.tiles, grid.sections);
  kernel<<<blocks, Traits::kThreads, kBytes, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace

template <int kHeadDim>
cudaError_t launch_bwd_queries_sm80(const BackwardParams& params, cudaStream_t stream) {
  return with_float(params.fwd.dtype, [&]<DType kDType>() {
    if (params.fwd.seeds)
      return launch<QueryTraits<kHeadDim, kDType, true>, Dropped<GeneralScore>>(params, stream);
    return bwd_general(params.fwd)
               ? launch<QueryTraits<kHeadDim, kDType, true>, GeneralScore>(params, stream)
               : launch<QueryTraits<kHeadDim, kDType, false>, ScaledScore>(params, stream);
  });
}

template cudaError_t launch_bwd_queries_sm80<JAX_FA_HEAD_DIM>(const BackwardParams&, cudaStream_t);

}  // namespace jax_fa
