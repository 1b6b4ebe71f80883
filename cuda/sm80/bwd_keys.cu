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
#include "bwd_scores.cuh"
#include "bwd_sum_dq.cuh"
#include "schedule.cuh"
#include "store.cuh"

namespace jax_fa {

template <int kDim, DType kType, bool kGeneral, KeyGradients kGradients_>
struct KeyTraits : BwdTraits<kDim, kType, true, bwd_keys_tile(kDim, kType, kGeneral, kGradients_)> {
  static constexpr KeyGradients kGradients = kGradients_;
  static constexpr bool kDv = kGradients != KeyGradients::kDk;
  static constexpr bool kDk = kGradients != KeyGradients::kDv;
  static constexpr bool kDq = kGradients == KeyGradients::kBothAndDq;
};

// Keys [row0, row0 + rows) of batch row b, at tokens token0, ... of dk and dv, which have a row of
// their own for b. Those at or past len_kv only have to be written.
struct KeyTile {
  int b, head;
  int row0, rows;  // rows <= 0: nothing to do
  int len_kv;
  int64_t token0;  // packed: of the array, dense: of the row
};

template <int kBlockM>
__device__ KeyTile locate_keys(const BackwardParams& p) {
  const AttentionParams& fwd = p.fwd;
  const int tiles = bwd_keys_tiles(p, kBlockM), pair = blockIdx.x / tiles;
  const int tile = blockIdx.x - pair * tiles;
  KeyTile out;
  int begin = 0, end = fwd.kv.len_kv;
  if (fwd.q_start) {
    const Stretch stretch = find_stretch<kBlockM>(fwd.kv.start, fwd.batch, p.total_k, tile);
    out.b = stretch.b;
    out.head = pair;
    begin = stretch.begin;
    end = stretch.end;
    out.row0 = stretch.tile * kBlockM;
  } else {
    out.b = pair / fwd.heads_kv;
    out.head = pair - out.b * fwd.heads_kv;
    out.row0 = tile * kBlockM;
  }
  out.token0 = int64_t(begin) + out.row0;
  out.rows = min(kBlockM, end - begin - out.row0);
  const int longest = min(end - begin, fwd.kv.len_kv);
  const int length = fwd.kv.length ? fwd.kv.length[max(out.b, 0)] : longest;
  out.len_kv = out.b < 0 ? 0 : min(max(length, 0), longest);
  return out;
}

// What the threads of a block share, read where it is used: registers are for the accumulators. The
// tiles of queries that see some of its keys come head by head of the group.
template <class Traits>
struct BlockPlan {
  static constexpr int kBlockN = Traits::kBlockN;

  KeyTile keys;
  IntervalMask mask;
  int b, head0, len_q;
  int begin, tiles;      // of one head
  int count;             // of all heads
  int64_t token0;        // of the row's first query in q
  int64_t stats0;        // the same in params.rows, for head 0
  int64_t slots, slot0;  // tiles of sums of dq of one head, and the row's first

  __device__ BlockPlan(const AttentionParams& fwd, const KeyTile& keys, int b, int len_q)
      : keys(keys),
        mask(len_q, keys.len_kv, fwd.window_left, fwd.window_right, fwd.top_left),
        b(b),
        len_q(len_q) {
    const int group = fwd.heads_q / fwd.heads_kv;
    const bool packed = fwd.q_start != nullptr;
    head0 = keys.head * group;
    token0 = packed ? int64_t(fwd.q_start[b]) : int64_t(b) * fwd.len_q;
    stats0 = b * fwd.lse_row_stride + (packed ? token0 : 0);
    slots = bwd_sum_slots(packed, fwd.batch, fwd.len_q, fwd.total_q, kBlockN);
    slot0 = packed ? token0 / kBlockN + b : b * (slots / fwd.batch);
    const Interval seeing = mask.rows_seeing(keys.row0, keys.row0 + Traits::kBlockM, len_q);
    begin = seeing.lo / kBlockN;
    tiles = max((seeing.hi + kBlockN - 1) / kBlockN - begin, 0);
    count = seeing.lo < seeing.hi ? tiles * group : 0;
  }

  __device__ int head(int it) const { return head0 + it / tiles; }
  __device__ int row0(int it) const { return (begin + it % tiles) * kBlockN; }
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

// Moves the tiles of one block.
template <class Traits>
struct Producer {
  using Element = typename Traits::Element;

  const BackwardParams& params;
  SharedStorage<Traits>& shared;

  __device__ void load_keys() const {
    const AttentionParams& fwd = params.fwd;
    load(fwd.k, fwd.head_dim, shared.k);
    if constexpr (Traits::kDk) load(fwd.v, fwd.head_dim_v, shared.v);
  }

  __device__ void load_queries(int it) const {
    constexpr int kBlockN = Traits::kBlockN;
    const AttentionParams& fwd = params.fwd;
    const BlockPlan<Traits>& plan = shared.plan;
    const int stage = it % Traits::kStages, head = plan.head(it), row0 = plan.row0(it);
    const int rows = plan.len_q - row0;
    const int64_t token = plan.token0 + row0, dout_stride = int64_t(fwd.heads_q) * fwd.head_dim_v;
    const auto* gQ =
        static_cast<const Element*>(fwd.q) + token * fwd.q_token_stride + head * fwd.q_head_stride;
    const auto* gDout =
        static_cast<const Element*>(params.dout) + token * dout_stride + head * fwd.head_dim_v;
    copy_tile<Traits, kBlockN>(ptx::shared_address(shared.q[stage]), rows, fwd.head_dim,
                               [&](int row) { return gQ + row * fwd.q_token_stride; });
    copy_tile<Traits, kBlockN>(ptx::shared_address(shared.dout[stage]), rows, fwd.head_dim_v,
                               [&](int row) { return gDout + row * dout_stride; });
    load_query_rows<kBlockN>(shared.rows[stage],
                             params.rows + plan.stats0 + head * fwd.lse_head_stride + row0, rows);
  }

 private:
  template <class Tile>
  __device__ void load(const KvTensor& x, int dim, Tile& tile) const {
    const KeyTile& keys = shared.plan.keys;
    const KvHead kv(x, params.fwd.kv, shared.plan.b, keys.head, keys.len_kv);
    load_kv<Traits, Traits::kBlockM>(ptx::shared_address(tile), x, kv, keys.row0, dim);
  }
};

// The keys of one warp.
template <class Traits, class Score>
struct Consumer {
  const BackwardParams& params;
  SharedStorage<Traits>& shared;
  int warp_row = threadIdx.x / 32 * Traits::kWarpM;  // the warp's first key within the tile
  OutputTile<Traits> dk = {}, dv = {};

  // One tile of queries.
  __device__ void step(int it) {
    const BlockPlan<Traits>& plan = shared.plan;
    const int stage = it % Traits::kStages;
    const uint32_t sQ = ptx::shared_address(shared.q[stage]);
    const uint32_t sDout = ptx::shared_address(shared.dout[stage]);
    const WalkedQueries<Traits> queries{shared.rows[stage]};
    const ScorePlace place{plan.keys.row0 + warp_row, plan.row0(it)};
    const TileMask kind = classify_scores<Traits>(plan.mask, place, plan.len_q);
    ScoreGradients<Traits, Score> s;

    if (kind != TileMask::kSkip) {
      const Score score(params.fwd, plan.b, plan.head(it), plan.len_q, plan.mask);
      gemm_qk<Traits>(s.p, ptx::shared_address(shared.k[warp_row]), sQ);
      s.apply_softmax(score, plan.mask, plan.len_q, place, kind, queries);
      if constexpr (Traits::kDv) gemm_pv<Traits>(dv, s.p, sDout);
      if constexpr (Traits::kDk) {
        gemm_qk<Traits>(s.ds, ptx::shared_address(shared.v[warp_row]), sDout);
        s.apply_gradient(queries);
        s.apply_slope();
      }
    }
    if constexpr (Traits::kDq) {
      if (kind == TileMask::kSkip) s.clear();
      SumDq<Traits>::store_ds(ptx::shared_address(shared.ds), s.ds, warp_row);
    }
    if constexpr (Traits::kDk) {
      if (kind != TileMask::kSkip) gemm_pv<Traits>(dk, s.ds, sQ);
    }
    if constexpr (Traits::kDq) {
      __syncthreads();  // all of ds is written; the next tile's wait protects its readers
      const int64_t tile =
          plan.head(it) * plan.slots + plan.slot0 + plan.row0(it) / Traits::kBlockN;
      SumDq<Traits>::add(params.dq_sum + tile * SumDq<Traits>::kTileFloats,
                         ptx::shared_address(shared.ds), ptx::shared_address(shared.k));
    }
  }

  __device__ void finish() {
    const AttentionParams& fwd = params.fwd;
    const KeyTile& keys = shared.plan.keys;
    const int64_t row = fwd.q_start ? 0 : keys.b * params.dkv_row_stride;
    const auto out = [&](void* x, int dim) {
      auto* gX = static_cast<typename Traits::Element*>(x) + row +
                 keys.token0 * params.dkv_token_stride + int64_t(keys.head) * dim;
      return TileRows<Traits>{gX, params.dkv_token_stride, keys.rows, dim};
    };
    const uint32_t sRows = ptx::shared_address(shared.k[warp_row]);
    if constexpr (Traits::kDk) {
      scale_output<Traits>(dk, fwd.scale);
      store_o<Traits>(out(params.dk, fwd.head_dim), dk, warp_row, sRows);
    }
    if constexpr (Traits::kDk && Traits::kDv) __syncwarp();  // the rows of dk are read
    if constexpr (Traits::kDv) {
      store_o<Traits>(out(params.dv, fwd.head_dim_v), dv, warp_row, sRows);
    }
  }
};

template <class Traits>
__device__ void make_plan(BlockPlan<Traits>& plan, const AttentionParams& fwd,
                          const KeyTile& keys) {
  const int b = max(keys.b, 0);
  const int len_q = fwd.q_length ? min(max(fwd.q_length[b], 0), fwd.len_q) : fwd.len_q;
  plan = BlockPlan<Traits>(fwd, keys, b, len_q);
}

template <class Traits, class Score>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kTile.blocks_per_sm)
    bwd_keys_sm80(const __grid_constant__ BackwardParams params) {
  extern __shared__ __align__(128) unsigned char raw_shared[];
  auto& shared = *reinterpret_cast<SharedStorage<Traits>*>(raw_shared);

  const KeyTile keys = locate_keys<Traits::kBlockM>(params);
  if (keys.rows <= 0) return;
  if (threadIdx.x == 0) make_plan(shared.plan, params.fwd, keys);
  __syncthreads();  // the plan is written
  const int count = shared.plan.count;
  const Producer<Traits> producer{params, shared};
  Consumer<Traits, Score> consumer{params, shared};
  if (count > 0) {
    producer.load_keys();
    producer.load_queries(0);
  }
  for (int it = 0; it < count; ++it) {
    ptx::cp_async_wait_all();
    __syncthreads();  // tile `it` has landed, and every warp is done with tile it - 1
    if (Traits::kStages > 1 && it + 1 < count) producer.load_queries(it + 1);
    consumer.step(it);
    if (Traits::kStages == 1 && it + 1 < count) {
      __syncthreads();  // every warp is done with the only buffer
      producer.load_queries(it + 1);
    }
  }
  __syncthreads();  // every warp is done with K: the epilogue reuses its place
  consumer.finish();
}

// dq from its sums, and 0 for what is no query of any row.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads)
    bwd_read_sums_sm80(const __grid_constant__ BackwardParams params) {
  using Sums = SumDq<Traits>;
  using Element = typename Traits::Element;
  constexpr int kBlockN = Traits::kBlockN;
  const AttentionParams& fwd = params.fwd;
  const QueryTile tile = locate_tile<kBlockN>(fwd);
  if (tile.rows <= 0) return;
  const bool packed = fwd.q_start != nullptr, some = tile.row0 < tile.len_q;
  const int64_t slots = bwd_sum_slots(packed, fwd.batch, fwd.len_q, fwd.total_q, kBlockN);
  const int64_t first =
      packed ? (tile.token0 - tile.row0) / kBlockN + tile.b : tile.b * (slots / fwd.batch);
  const float* gSums =
      params.dq_sum + (tile.head * slots + first + tile.row0 / kBlockN) * Sums::kTileFloats;
  auto* gDq = static_cast<Element*>(params.dq) + tile.token0 * params.dq_token_stride +
              tile.head * fwd.q_head_stride;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int q = 0; q < Sums::kQTiles; ++q) {
#pragma unroll
    for (int d = 0; d < Sums::kDTiles; ++d) {
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        const auto a = Sums::sum_place(warp, q, d, lane, e);
        const auto b = Sums::sum_place(warp, q, d, lane, e + 1);
        if (a.query >= tile.rows || a.dim >= fwd.head_dim) continue;
        const float x = some ? gSums[a.index] * fwd.scale : 0.f;
        const float y = some ? gSums[b.index] * fwd.scale : 0.f;
        *reinterpret_cast<uint32_t*>(gDq + a.query * params.dq_token_stride + a.dim) =
            Mma<Traits::kDType>::pack(x, y);
      }
    }
  }
}

template <class Traits, class Score>
cudaError_t launch(const BackwardParams& params, cudaStream_t stream) {
  const int64_t blocks = bwd_keys_blocks(params, Traits::kBlockM);
  if (blocks == 0) return cudaSuccess;
  constexpr int kBytes = sizeof(SharedStorage<Traits>);
  static_assert(!Traits::kDq || kBytes <= bwd_keys_shared_bytes(Traits::kHeadDim, Traits::kTile));
  const auto kernel = bwd_keys_sm80<Traits, Score>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  kernel<<<unsigned(blocks), Traits::kThreads, kBytes, stream>>>(params);
  return cudaGetLastError();
}

// Sums of dq start from 0 and end as dq.
template <class Traits, class Score>
cudaError_t launch_with_dq(const BackwardParams& params, cudaStream_t stream) {
  const AttentionParams& fwd = params.fwd;
  const int64_t slots =
      bwd_sum_slots(fwd.q_start != nullptr, fwd.batch, fwd.len_q, fwd.total_q, Traits::kBlockN);
  const int64_t bytes = slots * fwd.heads_q * SumDq<Traits>::kTileFloats * sizeof(float);
  cudaError_t error = cudaMemsetAsync(params.dq_sum, 0, bytes, stream);
  if (error != cudaSuccess) return error;
  error = launch<Traits, Score>(params, stream);
  if (error != cudaSuccess) return error;
  const FwdGrid grid = fwd_sm80_grid(fwd, FwdTile{Traits::kBlockN, 0, Traits::kWarps, 1});
  const dim3 blocks(grid.section, grid.tiles, grid.sections);
  bwd_read_sums_sm80<Traits><<<blocks, Traits::kThreads, 0, stream>>>(params);
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
    if constexpr (bwd_can_sum_dq(kHeadDim, kDType)) {
      using Summing = KeyTraits<kHeadDim, kDType, kGeneral, kBothAndDq>;
      if (params.dq_sum) return launch_with_dq<Summing, Score>(params, stream);
    }
    return launch<KeyTraits<kHeadDim, kDType, kGeneral, kBoth>, Score>(params, stream);
  }
}

template <int kHeadDim, DType kDType>
cudaError_t launch_bwd_keys_sm80(const BackwardParams& params, cudaStream_t stream) {
  return bwd_general(params.fwd)
             ? launch_gradients<kHeadDim, kDType, true, GeneralScore>(params, stream)
             : launch_gradients<kHeadDim, kDType, false, ScaledScore>(params, stream);
}

template cudaError_t launch_bwd_keys_sm80<JAX_FA_HEAD_DIM, DType::JAX_FA_DTYPE>(
    const BackwardParams&, cudaStream_t);

}  // namespace jax_fa
