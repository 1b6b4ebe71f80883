// The gradient of a bias on mma.sync, for GPUs from sm_80 on:
//
//     dbias[b, n, i, j] = p * (dout v^T - delta), summed over those of n, i, j that bias broadcasts
//
// A block owns one output tile of kBlockM queries by kBlockN keys after the other, along the keys,
// and walks all scores that add to it: of all heads, queries or keys where bias has one of them.
// So sums have one order, and nothing of the size of the scores exists besides the result.
#include "../dtypes.h"
#include "../softmax.cuh"
#include "bwd_scores.cuh"

namespace jax_fa {
namespace {

template <int kDim, DType kType>
using BiasTraits = BwdTraits<kDim, kType, false, bwd_bias_tile(kDim, kType)>;

constexpr int kTilesPerBlock = 8;  // of keys, so that a block keeps its queries for some time

struct Range {
  int begin, end;
};

// Output tiles of a block, in units of tiles: of queries `query`, of keys `keys`.
struct BiasWork {
  int b, head, query;
  Range keys;
};

__host__ __device__ inline int tiles_of(int size, int tile) { return (size + tile - 1) / tile; }

template <class Traits>
struct BiasGrid {
  int query_tiles, key_tiles, key_groups;  // of the output

  __host__ __device__ explicit BiasGrid(const BackwardParams& p)
      : query_tiles(tiles_of(p.dbias_queries, Traits::kBlockM)),
        key_tiles(tiles_of(p.dbias_keys, Traits::kBlockN)),
        key_groups(tiles_of(key_tiles, kTilesPerBlock)) {}

  int64_t blocks(const BackwardParams& p) const {
    return int64_t(p.fwd.batch) * p.dbias_heads * query_tiles * key_groups;
  }

  __device__ BiasWork work(const BackwardParams& p) const {
    int index = blockIdx.x;
    const auto next = [&](int size) {
      const int i = index % size;
      index /= size;
      return i;
    };
    const int group = next(key_groups), query = next(query_tiles), head = next(p.dbias_heads);
    const int begin = group * kTilesPerBlock;
    return {index, head, query, {begin, min(begin + kTilesPerBlock, key_tiles)}};
  }
};

// What the threads of a block share, read where it is used: registers are for the scores.
struct BlockPlan {
  BiasWork work;
  int len_q, len_kv;
  IntervalMask mask;
};

template <class Traits>
struct SharedStorage {
  using Element = typename Traits::Element;

  alignas(128) Element q[Traits::kBlockM][Traits::kHeadDim];
  alignas(128) Element dout[Traits::kBlockM][Traits::kHeadDim];
  alignas(128) Element k[Traits::kBlockN][Traits::kHeadDim];
  alignas(128) Element v[Traits::kBlockN][Traits::kHeadDim];
  float columns[Traits::kWarps][Traits::kBlockN];
  BlockPlan plan;
};

__device__ inline void make_plan(BlockPlan& plan, const AttentionParams& fwd,
                                 const BiasWork& work) {
  const auto length = [&](const int* lengths, int most) {
    return lengths ? min(max(lengths[work.b], 0), most) : most;
  };
  plan.work = work;
  plan.len_q = length(fwd.q_length, fwd.len_q);
  plan.len_kv = length(fwd.kv.length, fwd.kv.len_kv);
  plan.mask =
      IntervalMask(plan.len_q, plan.len_kv, fwd.window_left, fwd.window_right, fwd.top_left);
}

// The scores of one batch row.
template <class Traits, class Score>
struct Scores {
  using Element = typename Traits::Element;

  const BackwardParams& params;
  SharedStorage<Traits>& shared;
  int warp_row = threadIdx.x / 32 * Traits::kWarpM;

  __device__ QueryTile tile(int head, int query) const {
    const BlockPlan& plan = shared.plan;
    const int b = plan.work.b, row0 = query * Traits::kBlockM;
    const int rows = min(Traits::kBlockM, params.fwd.len_q - row0);
    return {b, head, row0, rows, plan.len_q, int64_t(b) * params.fwd.len_q + row0};
  }

  __device__ bool is_seen(int query, int key) const {
    const int row0 = query * Traits::kBlockM, col0 = key * Traits::kBlockN;
    const int row1 = min(row0 + Traits::kBlockM, shared.plan.len_q);
    return row0 < row1 &&
           shared.plan.mask.classify(row0, row1, col0, col0 + Traits::kBlockN) != TileMask::kSkip;
  }

  __device__ void load(const QueryTile& tile, int key) const {
    constexpr int kRows = Traits::kBlockN;
    const AttentionParams& fwd = params.fwd;
    const int64_t dout_stride = int64_t(fwd.heads_q) * fwd.head_dim_v;
    const auto copy = [&](auto& sTile, const void* x, int64_t stride, int64_t head_stride,
                          int dim) {
      const auto* gX =
          static_cast<const Element*>(x) + tile.token0 * stride + tile.head * head_stride;
      copy_tile<Traits, Traits::kBlockM>(ptx::shared_address(sTile), tile.len_q - tile.row0, dim,
                                         [&](int row) { return gX + row * stride; });
    };
    copy(shared.q, fwd.q, fwd.q_token_stride, fwd.q_head_stride, fwd.head_dim);
    copy(shared.dout, params.dout, dout_stride, fwd.head_dim_v, fwd.head_dim_v);
    const auto copy_kv = [&](auto& sTile, const KvTensor& x, int dim) {
      const int head = tile.head / (fwd.heads_q / fwd.heads_kv);
      const KvHead kv(x, fwd.kv, tile.b, head, shared.plan.len_kv);
      load_kv<Traits, kRows>(ptx::shared_address(sTile), x, kv, key * kRows, dim);
    };
    copy_kv(shared.k, fwd.k, fwd.head_dim);
    copy_kv(shared.v, fwd.v, fwd.head_dim_v);
  }

  // sum += the gradients of one tile of scores.
  __device__ void add(ScoreTile<Traits>& sum, const QueryTile& tile, int key) const {
    const ScorePlace place{tile.row0 + warp_row, key * Traits::kBlockN};
    const IntervalMask& mask = shared.plan.mask;
    const TileMask kind = classify_scores<Traits>(mask, place, tile.len_q);
    if (kind == TileMask::kSkip) return;
    OwnedQueries<Traits> queries;
    queries.load(params, tile, warp_row);
    ScoreGradients<Traits, Score> s;
    const Score score(params.fwd, tile.b, tile.head, tile.len_q, mask);
    gemm_qk<Traits>(s.p, ptx::shared_address(shared.q[warp_row]), ptx::shared_address(shared.k));
    s.apply_softmax(score, mask, tile.len_q, place, kind, queries);
    gemm_qk<Traits>(s.ds, ptx::shared_address(shared.dout[warp_row]),
                    ptx::shared_address(shared.v));
    s.apply_gradient(score, queries);
#pragma unroll
    for (int m = 0; m < Traits::kMTiles; ++m) {
#pragma unroll
      for (int n = 0; n < Traits::kBlockN / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[m][n][e] += s.ds[m][n][e];
      }
    }
  }
};

// Writes a tile of sums to dbias, summed once more along axes of size 1.
template <class Traits>
struct Output {
  const BackwardParams& params;
  SharedStorage<Traits>& shared;
  int64_t head0;  // of [batch, dbias_heads]
  ScorePlace place;

  __device__ void write(int i, int j, float x) const {
    const int64_t at = (head0 * params.dbias_queries + i) * params.dbias_keys + j;
    const DType dtype = params.fwd.bias_dtype;
    if (dtype == DType::kF16) static_cast<__half*>(params.dbias)[at] = __float2half_rn(x);
    if (dtype == DType::kBF16) {
      static_cast<__nv_bfloat16*>(params.dbias)[at] = __float2bfloat16_rn(x);
    }
    if (dtype == DType::kF32) static_cast<float*>(params.dbias)[at] = x;
  }

  __device__ void store(ScoreTile<Traits>& sum) const {
    if (params.dbias_queries == 1) {
      store_columns(sum);
    } else if (params.dbias_keys == 1) {
      store_rows(sum);
    } else {
      for_each_score<Traits>(sum, place, [&](float x, int i, int j) {
        if (i < params.dbias_queries && j < params.dbias_keys) write(i, j, x);
      });
    }
  }

 private:
  __device__ void store_rows(const ScoreTile<Traits>& sum) const {
#pragma unroll
    for (int m = 0; m < Traits::kMTiles; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float row = 0.f;
#pragma unroll
        for (int n = 0; n < Traits::kBlockN / 8; ++n)
          row += sum[m][n][2 * h] + sum[m][n][2 * h + 1];
        row = quad_sum(row);
        const int i = place.row0 + m * 16 + h * 8 + threadIdx.x % 32 / 4;
        if (threadIdx.x % 4 == 0 && i < params.dbias_queries) write(i, 0, row);
      }
    }
  }

  __device__ void store_columns(const ScoreTile<Traits>& sum) const {
    constexpr int kBlockN = Traits::kBlockN;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < kBlockN / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float column = 0.f;
#pragma unroll
        for (int m = 0; m < Traits::kMTiles; ++m) column += sum[m][n][e] + sum[m][n][e + 2];
#pragma unroll
        for (int step = 4; step < 32; step *= 2) {
          column += __shfl_xor_sync(0xffffffff, column, step);
        }
        if (lane < 4) shared.columns[warp][n * 8 + lane * 2 + e] = column;
      }
    }
    __syncthreads();  // every warp's columns are written; the next load's wait protects readers
    if (params.dbias_keys == 1) {
      if (threadIdx.x > 0) return;
      float all = 0.f;
      for (int j = 0; j < kBlockN; ++j) all += column_sum(j);
      write(0, 0, all);
    } else if (threadIdx.x < kBlockN && place.col0 + int(threadIdx.x) < params.dbias_keys) {
      write(0, place.col0 + threadIdx.x, column_sum(threadIdx.x));
    }
  }

  __device__ float column_sum(int j) const {
    float sum = 0.f;
    for (int warp = 0; warp < Traits::kWarps; ++warp) sum += shared.columns[warp][j];
    return sum;
  }
};

template <class Traits, class Score>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kTile.blocks_per_sm)
    bwd_bias_sm80(const __grid_constant__ BackwardParams params) {
  extern __shared__ __align__(128) unsigned char raw_shared[];
  auto& shared = *reinterpret_cast<SharedStorage<Traits>*>(raw_shared);
  const AttentionParams& fwd = params.fwd;
  if (threadIdx.x == 0) make_plan(shared.plan, fwd, BiasGrid<Traits>(params).work(params));
  __syncthreads();  // the plan is written
  const BiasWork& work = shared.plan.work;
  const Scores<Traits, Score> scores{params, shared};

  // Along axes of size 1 everything adds to the one output tile.
  const auto range = [](int size, int all, int i, int tile) {
    return size == 1 ? Range{0, tiles_of(all, tile)} : Range{i, i + 1};
  };
  const Range heads = range(params.dbias_heads, fwd.heads_q, work.head, 1);
  const Range queries = range(params.dbias_queries, fwd.len_q, work.query, Traits::kBlockM);
  for (int n = work.keys.begin; n < work.keys.end; ++n) {
    const Range keys = range(params.dbias_keys, fwd.kv.len_kv, n, Traits::kBlockN);
    ScoreTile<Traits> sum = {};
    for (int head = heads.begin; head < heads.end; ++head) {
      for (int query = queries.begin; query < queries.end; ++query) {
        for (int key = keys.begin; key < keys.end; ++key) {
          if (!scores.is_seen(query, key)) continue;
          const QueryTile tile = scores.tile(head, query);
          __syncthreads();  // every warp is done with the last tiles
          scores.load(tile, key);
          ptx::cp_async_wait_all();
          __syncthreads();  // the tiles have landed
          scores.add(sum, tile, key);
        }
      }
    }
    const ScorePlace place{work.query * Traits::kBlockM + scores.warp_row, n * Traits::kBlockN};
    const Output<Traits> out{params, shared, int64_t(work.b) * params.dbias_heads + work.head,
                             place};
    __syncthreads();  // the last tile's columns are read
    out.store(sum);
  }
}

template <class Tile, class Score>
cudaError_t launch(const BackwardParams& params, cudaStream_t stream) {
  const int64_t blocks = BiasGrid<Tile>(params).blocks(params);
  if (blocks == 0) return cudaSuccess;
  constexpr int kBytes = sizeof(SharedStorage<Tile>);
  const auto kernel = bwd_bias_sm80<Tile, Score>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  kernel<<<unsigned(blocks), Tile::kThreads, kBytes, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace

template <int kHeadDim>
cudaError_t launch_bwd_bias_sm80(const BackwardParams& params, cudaStream_t stream) {
  return with_float(params.fwd.dtype, [&]<DType kDType>() {
    using Tile = BiasTraits<kHeadDim, kDType>;
    if (params.fwd.seeds) return launch<Tile, Dropped<GeneralScore>>(params, stream);
    return launch<Tile, GeneralScore>(params, stream);
  });
}

template cudaError_t launch_bwd_bias_sm80<JAX_FA_HEAD_DIM>(const BackwardParams&, cudaStream_t);

}  // namespace jax_fa
