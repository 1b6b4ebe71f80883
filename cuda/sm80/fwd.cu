// Prefill attention on mma.sync: o = softmax(score(q k^T)) v and its lse, for GPUs from sm_80 on.
//
// A block takes one tile of kBlockM queries of one head and walks the tiles of keys that some of
// them see, from the last to the first. Each warp owns whole rows: scores, probabilities and output
// stay in its registers, and warps meet only to hand over tiles of keys and values. There is one
// buffer of each. Rows too wide for the registers of one warp are shared by several: each
// multiplies a part of the dims, they exchange what that adds to the scores and form the same
// probabilities, and each has the output of its dims. Per tile of keys:
//
//     wait for K(n)                      | K(n) has landed, V(n + 1) is used up
//     start V(n)    s = q K(n)^T         |
//     wait for V(n)                      | V(n) has landed, K(n) is used up
//     start K(n-1)  p = softmax(s)       |
//                   o = o * rescale + p V(n)
//
// Other blocks of the SM fill the waits.
#include "../dropout.cuh"
#include "../dtypes.h"
#include "../launch.cuh"
#include "../mask.cuh"
#include "../score.cuh"
#include "../softmax.cuh"
#include "dequantize.cuh"
#include "load.cuh"
#include "mma.cuh"
#include "schedule.cuh"
#include "store.cuh"
#include "tiles.h"

namespace jax_fa {

template <int kHeadDim_, DType kDType_, bool kGeneral>
struct Traits {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr DType kDType = kDType_;
  using Element = typename Mma<kDType>::Element;

  static constexpr FwdTile kTile = fwd_sm80_tile(kHeadDim, kDType, kGeneral);
  static constexpr int kBlockM = kTile.m;
  static constexpr int kBlockN = kTile.n;
  static constexpr int kWarps = kTile.warps;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kDimParts = kTile.dim_parts;
  static constexpr int kRowWarps = kWarps / kDimParts;
  static constexpr int kWarpM = kBlockM / kRowWarps;
  static constexpr int kMTiles = kWarpM / 16;
  static_assert(kWarpM % 16 == 0 && kBlockN % 16 == 0 && kHeadDim % 32 == 0);
  static_assert(kDimParts == 1 || (kDimParts == 2 && kHeadDim / 2 % 64 == 0));
};

// What the threads of a block share, read where it is used: registers are for the accumulators.
template <class Traits>
struct BlockPlan {
  QueryTile tile;
  IntervalMask mask;
  KvHead k, v;
  int begin, end;                                           // tiles of keys that some query sees,
  int full_begin, full_end;                                 // and that every query sees all of
  Interval any[Traits::kRowWarps], all[Traits::kRowWarps];  // keys that a warp's queries see
};

template <class Traits, bool kQuantized>
struct SharedStorage {
  using Element = typename Traits::Element;
  static constexpr int kScales = kQuantized ? Traits::kBlockN : 1;
  static constexpr int kSharers = Traits::kDimParts > 1 ? Traits::kWarps : 0;

  alignas(128) Element q[Traits::kBlockM][Traits::kHeadDim];
  alignas(128) Element k[Traits::kBlockN][Traits::kHeadDim];
  alignas(128) Element v[Traits::kBlockN][Traits::kHeadDim];
  // What a part of the dims adds to scores, as lanes hold it.
  float4 scores[kSharers][Traits::kMTiles][Traits::kBlockN / 8][32];
  float k_scale[kScales], v_scale[kScales];
  PageSlots<Traits::kBlockN> slots[2];  // of tile n in slots[n % 2]: K(n - 1) follows V(n)
  BlockPlan<Traits> plan;
};

// Moves the tiles of one block.
template <class Traits, bool kQuantized>
struct Producer {
  const AttentionParams& params;
  SharedStorage<Traits, kQuantized>& shared;

  __device__ void load_q(const QueryTile& tile) const {
    const auto* gQ = static_cast<const typename Traits::Element*>(params.q) +
                     tile.token0 * params.q_token_stride + tile.head * params.q_head_stride;
    copy_rows<Traits, Traits::kBlockM>(ptx::shared_address(shared.q),
                                       min(tile.rows, tile.len_q - tile.row0), params.head_dim,
                                       [&](int row) { return gQ + row * params.q_token_stride; });
  }

  // Before load_k(n) and load_v(n), a wait for copies and a barrier away.
  __device__ void find_keys(int n) const {
    shared.slots[n % 2].find(shared.plan.k, n * Traits::kBlockN);
  }
  __device__ void load_k(int n) const {
    load(params.k, shared.plan.k, params.head_dim, shared.k, shared.k_scale, n);
  }
  __device__ void load_v(int n) const {
    load(params.v, shared.plan.v, params.head_dim_v, shared.v, shared.v_scale, n);
  }

 private:
  template <class Tile>
  __device__ void load(const KvTensor& x, const KvHead& kv, int dim, Tile& tile, float* sScale,
                       int n) const {
    constexpr int kRows = Traits::kBlockN;
    const uint32_t sTile = ptx::shared_address(tile);
    if constexpr (kQuantized) {
      load_kv_quantized<Traits, kRows>(sTile, sScale, shared.slots[n % 2], x, kv, n * kRows, dim);
    } else {
      load_kv<Traits, kRows>(sTile, shared.slots[n % 2], x, kv, n * kRows, dim);
    }
  }
};

// The rows of one warp, or the part of their dims that it multiplies.
template <class Traits, class Score, bool kQuantized>
struct Consumer {
  static constexpr int kMTiles = Traits::kMTiles;
  static constexpr int kBlockN = Traits::kBlockN;
  // Probabilities times quantized values' scales leave no headroom in float16.
  static constexpr int kSlackLog2 = kQuantized ? 0 : 8;

  const AttentionParams& params;
  SharedStorage<Traits, kQuantized>& shared;
  // Of the warps with other queries, and of the parts of the dims.
  int warp = Traits::kDimParts > 1 ? threadIdx.x / 32 % Traits::kRowWarps : threadIdx.x / 32;
  int part = Traits::kDimParts > 1 ? threadIdx.x / 32 / Traits::kRowWarps : 0;
  int warp_row = warp * Traits::kWarpM;  // the warp's first query within the tile
  OnlineSoftmax<kMTiles, kSlackLog2> softmax;
  ScoreTile<Traits> s;
  OutputTile<Traits> o = {};

  __device__ Consumer(const AttentionParams& params, SharedStorage<Traits, kQuantized>& shared)
      : params(params), shared(shared) {}

  __device__ Score score() const {
    const QueryTile& tile = shared.plan.tile;
    return Score(params, tile.b, tile.head, tile.len_q, shared.plan.mask);
  }

  // Calls f(x, i, j) for each score of this lane in the tile whose first key is key0.
  template <class F>
  __device__ void for_each_score(int key0, F f) {
    const int i0 = shared.plan.tile.row0 + warp_row + threadIdx.x % 32 / 4;
    const int j0 = key0 + threadIdx.x % 4 * 2;
#pragma unroll
    for (int n = 0; n < kBlockN / 8; ++n) {
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          f(s[m][n][e], Place{i0, m * 16 + e / 2 * 8}, Place{j0, n * 8 + e % 2});
        }
      }
    }
  }

  // What the tile of keys from key0 on is to the warp's queries.
  __device__ TileMask classify(int key0) const {
    const Interval any = shared.plan.any[warp], all = shared.plan.all[warp];
    if (key0 >= any.hi || key0 + kBlockN <= any.lo) return TileMask::kSkip;
    return key0 >= all.lo && key0 + kBlockN <= all.hi ? TileMask::kFull : TileMask::kPartial;
  }

  // One end at a time: a causal or padding mask has no left one. Keys past the row's length are
  // zeros in shared memory, so their value adds 0 * 0; a value that only some queries of a warp see
  // must be finite, as the others add 0 times it.
  __device__ void apply_mask(int key0) {
    const IntervalMask mask = shared.plan.mask;
    const Interval all = shared.plan.all[warp];
    if (key0 + kBlockN > all.hi) {
      for_each_score(key0, [&](float& x, int i, int j) { x = j < mask.hi(i) ? x : -INFINITY; });
    }
    if (key0 < all.lo) {
      for_each_score(key0, [&](float& x, int i, int j) { x = j >= mask.lo(i) ? x : -INFINITY; });
    }
  }

  __device__ void apply_score(int key0) {
    score().apply([&](auto f) { for_each_score(key0, f); });
  }

  // One factor a key: of the scores, a scale of the keys; of the probabilities, one of the values.
  __device__ void scale_columns(const float* sScale) {
    for_each_score(0, [&](float& x, int, int j) { x *= sScale[j]; });
  }

  // Of rows in shared memory, from the first dim of this warp on.
  template <class Rows>
  __device__ uint32_t part_of(const Rows& rows) const {
    return ptx::shared_address(rows) +
           part * kWarpDims<Traits> * int(sizeof(typename Traits::Element));
  }

  __device__ void multiply_keys() {
    gemm_qk<Traits>(s, part_of(shared.q[warp_row]), part_of(shared.k));
    if constexpr (Traits::kDimParts > 1) add_other_part();
    if constexpr (kQuantized) scale_columns(shared.k_scale);
  }

  // The sums of both warps have the same bits: the order of two operands is none.
  __device__ void add_other_part() {
    const int lane = threadIdx.x % 32;
    const auto for_each = [&](int part, auto f) {
      auto& scores = shared.scores[part * Traits::kRowWarps + warp];
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
        for (int n = 0; n < kBlockN / 8; ++n) f(s[m][n], scores[m][n][lane]);
      }
    };
    for_each(part, [](const float (&x)[4], float4& mine) { mine = {x[0], x[1], x[2], x[3]}; });
    ptx::named_barrier_sync(1 + warp, 64);  // both are written; the next tile's waits protect them
    for_each(part ^ 1, [](float (&x)[4], const float4& other) {
      x[0] += other.x, x[1] += other.y, x[2] += other.z, x[3] += other.w;
    });
  }

  __device__ void multiply_values() {
    if constexpr (kQuantized) scale_columns(shared.v_scale);
    gemm_pv<Traits>(o, s, part_of(shared.v));
  }

  __device__ void apply_softmax() {
    float rescale[kMTiles][2];
    const float to_log2 = score().to_log2();
    if (!softmax.step(s, [&](int) { return to_log2; }, rescale)) return;
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (auto& tile : o[m]) {
#pragma unroll
        for (int e = 0; e < 4; ++e) tile[e] *= rescale[m][e / 2];
      }
    }
  }

  // What is dropped weighs no value, and stays in the sums.
  __device__ void apply_dropout(int key0) {
    if constexpr (Score::kDropout) {
      const QueryTile& tile = shared.plan.tile;
      WarpSurvivors<kMTiles, kBlockN / 8, false> survivors;
      survivors.draw(Dropout(params, tile.b, tile.head), tile.row0 + warp_row, key0);
      survivors.apply(s);
    }
  }

  // Closes the softmax and writes the rows; what is no query of any row gets o = 0, lse = -inf.
  __device__ void finish() {
    const QueryTile& tile = shared.plan.tile;
    OutputRows<Traits> out(params, tile);
    out.gO += part * kWarpDims<Traits>;
    out.dims -= part * kWarpDims<Traits>;
    const int64_t head = int64_t(max(tile.b, 0)) * params.heads_q + tile.head;
    const float sink = params.sinks ? params.sinks[head] : -INFINITY;
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = warp_row + m * 16 + h * 8 + threadIdx.x % 32 / 4;
        const bool query = tile.row0 + row < tile.len_q;
        auto result = softmax.finish(m, h, score().to_log2(), sink);
        if constexpr (Score::kDropout) result.normalize *= params.dropout_scale;
        if (part == 0 && threadIdx.x % 4 == 0 && row < out.rows) {
          out.gLse[row] = query ? result.lse : -INFINITY;
        }
#pragma unroll
        for (auto& dims : o[m]) {
#pragma unroll
          for (int e = 2 * h; e < 2 * h + 2; ++e) {
            dims[e] = query && !result.empty ? dims[e] * result.normalize : 0.f;
          }
        }
      }
    }
    store_o<Traits>(out, o, warp_row, part_of(shared.q[warp_row]));
  }
};

// Each part by a thread of a warp of its own: they are chains of dependent loads and divisions.
template <class Traits>
__device__ void make_plan(BlockPlan<Traits>& plan, const AttentionParams& p,
                          const QueryTile& tile) {
  constexpr int kBlockN = Traits::kBlockN;
  const int warp = threadIdx.x / 32;
  const int b = max(tile.b, 0), head = tile.head / (p.heads_q / p.heads_kv);
  const int len_kv = p.kv.length ? min(max(p.kv.length[b], 0), p.kv.len_kv) : p.kv.len_kv;
  const IntervalMask mask(tile.len_q, len_kv, p.window_left, p.window_right, p.top_left);
  if (threadIdx.x % 32 != 0) return;
  if (warp == 0) {
    const int row_end = min(tile.row0 + tile.rows, tile.len_q);
    const Interval any = mask.seen_by_any(tile.row0, row_end);
    const Interval all = mask.seen_by_all(tile.row0, row_end);
    plan.tile = tile;
    plan.mask = mask;
    plan.begin = any.lo / kBlockN;
    plan.end = tile.row0 < row_end ? (any.hi + kBlockN - 1) / kBlockN : 0;
    plan.full_begin = (all.lo + kBlockN - 1) / kBlockN;
    plan.full_end = all.hi / kBlockN;
  }
  if (warp == 1) plan.k = KvHead(p.k, p.kv, b, head, len_kv);
  if (warp == 2) plan.v = KvHead(p.v, p.kv, b, head, len_kv);

  if (warp >= Traits::kRowWarps) return;
  const int row0 = tile.row0 + warp * Traits::kWarpM;
  const int row1 = min(row0 + Traits::kWarpM, tile.len_q);
  plan.any[warp] = row0 < row1 ? mask.seen_by_any(row0, row1) : Interval{0, 0};
  plan.all[warp] = mask.seen_by_all(row0, max(row1, row0 + 1));
}

// One tile of keys; kMasked where some query of the block does not see all of it.
template <bool kMasked, class Producer, class Consumer>
__device__ __forceinline__ void step(const Producer& producer, Consumer& consumer, int n) {
  constexpr int kBlockN = Consumer::kBlockN;
  const TileMask kind = kMasked ? consumer.classify(n * kBlockN) : TileMask::kFull;
  ptx::cp_async_wait_all();
  __syncthreads();  // K(n) has landed, and every warp is done with V(n + 1)
  producer.load_v(n);
  if (n > producer.shared.plan.begin) producer.find_keys(n - 1);
  if (kind != TileMask::kSkip) consumer.multiply_keys();
  ptx::cp_async_wait_all();
  __syncthreads();  // V(n) and where K(n - 1) lies have landed, and every warp is done with K(n)
  if (n > producer.shared.plan.begin) producer.load_k(n - 1);
  if (kind == TileMask::kSkip) return;
  consumer.apply_score(n * kBlockN);
  if (kind == TileMask::kPartial) consumer.apply_mask(n * kBlockN);
  consumer.apply_softmax();
  consumer.apply_dropout(n * kBlockN);
  consumer.multiply_values();
}

template <class Traits, class Score, bool kQuantized>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kTile.blocks_per_sm)
    fwd_sm80(const __grid_constant__ AttentionParams params) {
  extern __shared__ __align__(128) unsigned char raw_shared[];
  auto& shared = *reinterpret_cast<SharedStorage<Traits, kQuantized>*>(raw_shared);
  const BlockPlan<Traits>& plan = shared.plan;
  const Producer<Traits, kQuantized> producer{params, shared};

  ptx::launch_dependents();  // the next grid's blocks take the places that the last of these leave
  const QueryTile tile = locate_tile<Traits::kBlockM>(params);
  if (tile.rows <= 0) {
    end_after_previous(params);
    return;
  }
  producer.load_q(tile);
  make_plan(shared.plan, params, tile);
  __syncthreads();  // the plan is written

  Consumer<Traits, Score, kQuantized> consumer(params, shared);
  if (plan.begin < plan.end) {
    if (plan.k.where.pages) {
      producer.find_keys(plan.end - 1);
      ptx::cp_async_wait_all();
      __syncthreads();  // where the first tile lies is known
    }
    producer.load_k(plan.end - 1);
  } else {
    ptx::cp_async_wait_all();
    __syncthreads();  // Q has landed: the epilogue reuses its place
  }
  // Masked tiles, full ones, masked ones: the outer loop spares a second copy of the masked body.
  for (int n = plan.end - 1; n >= plan.begin;) {
    for (; n >= plan.begin && (n < plan.full_begin || n >= plan.full_end); --n) {
      step<true>(producer, consumer, n);
    }
    for (; n >= plan.full_begin && n < plan.full_end; --n) step<false>(producer, consumer, n);
  }
  consumer.finish();
  end_after_previous(params);
}

template <class Traits, class Score, bool kQuantized>
cudaError_t launch_tiles(const AttentionParams& params, cudaStream_t stream) {
  const FwdGrid grid = fwd_sm80_grid(params, Traits::kTile);
  if (grid.blocks == 0) return cudaSuccess;
  const dim3 blocks(grid.section, grid.tiles, grid.sections);
  return launch(fwd_sm80<Traits, Score, kQuantized>, blocks, Traits::kThreads,
                sizeof(SharedStorage<Traits, kQuantized>), stream, params.beside_previous, params);
}

namespace {

template <int kHeadDim, DType kDType>
cudaError_t launch_dtype(const AttentionParams& params, cudaStream_t stream) {
  using General = Traits<kHeadDim, kDType, true>;
  using Plain = Traits<kHeadDim, kDType, false>;
  if (fwd_sm80_quantized(params)) {
    if constexpr (kDType != DType::kF32) {  // whose keys are of 32 bits
      return launch_tiles<General, GeneralScore, true>(params, stream);
    }
    return cudaErrorInvalidValue;
  }
  if (params.seeds) return launch_tiles<General, Dropped<GeneralScore>, false>(params, stream);
  return fwd_sm80_general(params) ? launch_tiles<General, GeneralScore, false>(params, stream)
                                  : launch_tiles<Plain, ScaledScore, false>(params, stream);
}

}  // namespace

template <int kHeadDim>
cudaError_t launch_fwd_sm80(const AttentionParams& params, cudaStream_t stream) {
  const auto run = [&]<DType kDType>() { return launch_dtype<kHeadDim, kDType>(params, stream); };
  if constexpr (kHeadDim <= kMostHeadDim) {
    if (params.dtype == DType::kF32) return run.template operator()<DType::kF32>();
  }
  return with_16_bits(params.dtype, run);
}

template cudaError_t launch_fwd_sm80<JAX_FA_HEAD_DIM>(const AttentionParams&, cudaStream_t);

}  // namespace jax_fa
