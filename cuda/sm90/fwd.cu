// Prefill attention on Hopper: o = softmax(score(q k^T)) v and its lse, with bulk tensor copies
// (TMA), warpgroup products (wgmma) and warps of different roles.
//
// One block per SM walks tiles of queries of one head. Its first warpgroup produces (producer.cuh):
// warp 0 says which tile comes next, warp 1 starts the copies of its queries and of the keys that
// they see, from the last to the first, warp 3 those of values, warp 2 clears values past a row's
// length. The other warpgroups consume, 64 queries each. Per tile of keys a warpgroup does
//
//     s = q K(n - 1)^T   and   o = o + p V(n)      in its turn, on the tensor cores
//     p = softmax(s)                               while the next warpgroup has its turn
//
// so that one multiplies while another takes exponentials. A warp that starts products waits until
// the tensor cores have come to nearly the last of them, and so has little to overlap with its own.
// The first product of a tile of queries waits for its turn too; the last one does not, and the
// next tile's copies run under it and under the epilogue. A warpgroup passes on keys that are past
// all that its queries see, and its turn with them.
//
// What limits it is how many instructions a warp has between its products: at head_dim 128, one
// more for each score of a thread costs 5 %. So a maximum is looked for only until every query has
// one, and where keys are hidden: mostly in the first tile of keys. The others follow it. If one
// outgrows it by 2^62, the block does the tile of queries once more with a maximum that moves, and
// starts some of the next ones like that; a query that does not outgrow its own gets the same bits
// either way. (One maximum for all, and a second pass where it fails: FlashDecoding++, Hong et al.
// 2023.) Float16 holds less: where probabilities are packed to that, a warp takes a row that has
// grown past it down by a power of two, which needs no scores. H200, bf16, B * T = 16384, N * H =
// 2048, TFLOP/s at T = 1k, 8k and 16k before and now: head_dim 64 426, 570, 579 and 458, 633, 643;
// causal 328, 536, 562 and 349, 600, 628; head_dim 128 635, 750, 763 and 674, 806, 819; causal 466,
// 712, 735 and 485, 791, 813; head_dim 256 682, 813, 823 and 687, 839, 850; causal 490, 737, 764
// and 494, 779, 813.
//
// Over keys and values of 8 bits, warpgroups between those dequantize (dequantize.cuh): copies
// bring bytes, and what consumers wait for is what dequantizers have made of them. kBytes leaves
// keys as they are and splits queries instead (queries.cuh). Where many tiles of queries read the
// same keys, kCopies has a warpgroup between them that copies those to the queries' type, row by
// row, in global memory (copier.cuh): what the loaders bring are the copies, unit by unit as a flag
// in global memory says that one is there.
//
// Barriers come in pairs: `full` (the producer, to all consumers: it has landed) and `empty` (the
// warps of all consumers, to the producer: it may be overwritten), for each buffer of tiles of
// keys, values, queries (in two halves where they have one buffer, block.cuh) and for each place in
// the ring of descriptions of tiles. Of those `judged` tells warp 0 whether a tile is done or has
// to be done again, before its epilogue.
#include "../dropout.cuh"
#include "../dtypes.h"
#include "../softmax.cuh"
#include "block.cuh"
#include "copier.cuh"
#include "dequantize.cuh"
#include "producer.cuh"
#include "queries.cuh"
#include "store.cuh"
#include "tensor_map.h"
#include "wgmma.cuh"

namespace jax_fa {

// Whose turn it is to start products: one warpgroup's at a time, in a circle.
template <int kConsumers>
struct Turn {
  // Of named barriers: 0 is __syncthreads, those from kEndId on are not for turns.
  static constexpr int kFirstId = 1, kEndId = kFirstId + kConsumers;
  int mine;

  __device__ explicit Turn(int consumer) : mine(consumer) {
    if (mine == kConsumers - 1) pass();  // the first consumer begins
  }
  __device__ void take() const { ptx::named_barrier_sync(kFirstId + mine, 256); }
  __device__ void pass() const {
    ptx::named_barrier_arrive(kFirstId + (mine + 1) % kConsumers, 256);
  }
  __device__ void end() const {
    if (mine == 0) take();  // the last pass leaves no barrier half full
  }
};

// What a step does with a tile of keys: it looks for maxima among those that each query sees, among
// all of them, or for none.
enum class Keys { kHidden, kSeen, kFollow };

// A warpgroup of 64 rows; s, p, o are laid out as mma.sync has them, 16 rows for each warp.
template <class Traits>
struct Consumer {
  static constexpr int kBlockN = Traits::kBlockN;
  static constexpr int kHeadDim = Traits::kHeadDim, kHeadDimV = Traits::kHeadDimV;
  using Storage = HopperStorage<Traits>;

  const HopperParams& hopper;
  const AttentionParams& params = hopper.attention;
  Storage& shared;
  int consumer =  // known to be uniform
      __shfl_sync(0xffffffff, threadIdx.x / 128 - Traits::kOthers, 0);
  int lane = threadIdx.x % 32;
  int row = threadIdx.x / 32 % 4 * 16 + lane / 4;  // of this lane's two, the first; then + 8
  Turn<Traits::kConsumers> turn;

  Ring<Storage::kTiles> tile_ring;
  Ring<Traits::kTile.q_buffers> q_ring;
  Ring<Traits::kStages> k_ring, v_ring;

  bool stored = false;  // whether there was a tile before this one
  int n;                // the tile of keys whose probabilities p holds
  int begin;            // the last one to come
  Interval all;         // keys that all of the warpgroup's queries see
  OnlineSoftmax<1, Traits::kSlackLog2> softmax;
  bool follows;  // all queries of the warpgroup have a maximum, and none is looked for
  float most;    // what one of the lane's rows has added to its sum at most since then
  // kBytes: the units of the lane's rows of scores, and of values and o as log2.
  float unit[2];
  int v_unit = 0;
  bool exceeds = false;  // kShrinks: whether probabilities of one of the warp's rows are too large
  float shrink[1][2];    // what o must be multiplied by where a maximum has moved
  float s[1][kBlockN / 8][4];
  uint32_t p[kBlockN / 4];
  float o[kHeadDimV / 2];

  __device__ Consumer(const HopperParams& params, Storage& shared)
      : hopper(params), shared(shared), turn(consumer) {}

  __device__ const WorkTile& tile() { return shared.tile(tile_ring.at()); }

  // Whose barriers this warpgroup's queries have.
  __device__ int query_part() const { return Traits::kQueryParts > 1 ? consumer : 0; }

  __device__ float (&scores()) [kBlockN / 2] { return reinterpret_cast<float (&)[kBlockN / 2]>(s); }

  // Lets the producer overwrite what this warp is done with.
  __device__ void release(ptx::Barrier& empty) const {
    if (lane == 0) ptx::barrier_arrive(empty);
  }

  // --- the products; they only start here ---

  __device__ static PanelStrides strides_of(const PanelStrides& given) {
    return Traits::kInGroups ? given : PanelStrides::of<Traits>(false, 1);
  }

  __device__ void start_qk() {
    if constexpr (Traits::kBytes) {
      return params.k.dtype == DType::kE5M2 ? start_byte_qk<DType::kE5M2>()
                                            : start_byte_qk<DType::kE4M3>();
    }
    uint64_t q = panel_descriptor<Traits::kPanel>(shared.q[q_ring.at()][0][consumer * 64]);
    if constexpr (Traits::kQuantized) pin(q);  // no registers for all that it leads to
    const PanelStrides strides = strides_of(hopper.k_strides);
    const uint64_t k = panel_descriptor<Traits::kPanel>(shared.k[k_ring.at()], 16, strides.group);
    pin(scores());
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
      constexpr int kSteps = Traits::kPanel / 16;  // in a panel
      const int step = i % kSteps * 2, panel = i / kSteps;
      Wgmma<Traits::kDType, kBlockN>::ss(
          scores(), advanced(q, panel * (Traits::kBlockM * Traits::kPanel * 2 / 16) + step),
          advanced(k, panel * (strides.panel / 16) + step), i > 0);
    }
    ptx::wgmma_commit();
  }

  // Of both parts of queries, the lower before the sums have grown.
  template <DType kKeys>
  __device__ void start_byte_qk() {
    constexpr int kPart = sizeof(shared.q[0][0]) / 16;
    const uint64_t q = panel_descriptor<64>(shared.q[q_ring.at()][0][consumer * 64]);
    const uint64_t k = panel_descriptor<64>(shared.k[k_ring.at()]);
    pin(scores());
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < 2 * kHeadDim / 32; ++i) {
      const int lower = i < kHeadDim / 32, step = i % (kHeadDim / 32) * 2;
      wgmma_e4m3<kKeys>(scores(), advanced(q, lower * kPart + step), advanced(k, step), i > 0);
    }
    ptx::wgmma_commit();
  }

  // o follows values to the unit of theirs.
  __device__ void follow_unit() {
    const int to = shared.v_unit[v_ring.at()];
    if (to == v_unit) return;
    const float factor = power_of_two(v_unit - to);
#pragma unroll
    for (float& x : o) x *= factor;
    v_unit = to;
  }

  __device__ void start_pv() {
    if constexpr (Traits::kBytes) follow_unit();
    constexpr int kDims = kHeadDimV / Traits::kOutputParts, kPanels = kDims / Traits::kPanel;
    const PanelStrides strides = strides_of(hopper.v_strides);
    const uint64_t v =
        panel_descriptor<Traits::kPanel>(shared.v[v_ring.at()], strides.panel, strides.group);
    auto& parts = reinterpret_cast<float (&)[Traits::kOutputParts][kDims / 2]>(o);
    pin(o);
    pin(p);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < kBlockN / 16; ++i) {
#pragma unroll
      for (int part = 0; part < Traits::kOutputParts; ++part) {
        Wgmma<Traits::kPvType, kDims>::rs(
            parts[part], &p[i * 4],
            advanced(v, part * kPanels * (strides.panel / 16) + i * (strides.group / 8)));
      }
    }
    ptx::wgmma_commit();
  }

  // --- from scores to probabilities ---

  __device__ UnbiasedScore score() { return {hopper.units, tile().slope, tile().mask.diagonal}; }

  // Of scores of the lane's row h, as the softmax takes them.
  __device__ float to_log2(int h) {
    return Traits::kBytes ? score().to_log2() * unit[h] : score().to_log2();
  }

  // kBytes: from keys as they are stored to their values.
  __device__ void scale_columns() {
    if (!params.k.scale) return;
    const uint32_t sScale = ptx::shared_address(shared.k_scale[k_ring.at()]) + lane % 4 * 16;
#pragma unroll
    for (int t = 0; t < kBlockN / 8; t += 2) {
      uint32_t scale[4];
      ptx::load_shared_v4(scale, sScale + t * 32);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        s[0][t + i / 4][i % 4] *= __uint_as_float(scale[i / 4 * 2 + i % 2]);
      }
    }
    __syncwarp();  // all lanes have read the scales
  }

  // Calls f(x, i, j) for each score of this lane.
  template <class F>
  __device__ void for_each_score(F f) {
    const int i0 = tile().q.row0 + consumer * 64 + row, j0 = n * kBlockN + lane % 4 * 2;
#pragma unroll
    for (int t = 0; t < kBlockN / 8; ++t) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        f(s[0][t][e], Place{i0, e / 2 * 8}, Place{j0, t * 8 + e % 2});
      }
    }
  }

  // Whether every query of the warpgroup sees all keys of a tile that is not its first.
  __device__ bool all_visible(int tile) const {
    return !Traits::kMasked || ((tile + 1) * kBlockN <= all.hi && tile * kBlockN >= all.lo);
  }

  // Whether nothing of such a tile has to be hidden, nor a first maximum to be found in it.
  __device__ bool is_plain(int tile) const {
    return all_visible(tile) && (!Traits::kFollowsMax || follows);
  }

  // One end at a time: a causal or padding mask has no left one.
  __device__ void apply_mask() {
    const int i0 = tile().q.row0 + consumer * 64 + row, j0 = n * kBlockN + lane % 4 * 2;
    if ((n + 1) * kBlockN > all.hi) {
      const IntervalMask mask = tile().mask;
      const int end[2] = {mask.hi(i0) - j0, mask.hi(i0 + 8) - j0};
      hide([&](int h, int j) { return j >= end[h]; });
    }
    if (Traits::kMasked && n * kBlockN < all.lo) {
      const IntervalMask mask = tile().mask;
      const int begin[2] = {mask.lo(i0) - j0, mask.lo(i0 + 8) - j0};
      hide([&](int h, int j) { return j < begin[h]; });
    }
  }

  // h: which of the lane's two rows; j: the key, counted from the lane's first.
  template <class Hidden>
  __device__ void hide(Hidden hidden) {
#pragma unroll
    for (int t = 0; t < kBlockN / 8; ++t) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (hidden(e / 2, t * 8 + e % 2)) s[0][t][e] = -INFINITY;
      }
    }
  }

  __device__ void apply_score() {
    if constexpr (Traits::kGeneral) {
      const int row1 = tile().q.row0 + consumer * 64 + row - lane / 4 + 16;  // of this warp's
      const bool own = row1 <= tile().q.len_q && (n + 1) * kBlockN <= tile().mask.len_kv;
      score().apply([&](auto f) { for_each_score(f); }, own);
    }
  }

  // Of p, what survives.
  __device__ void apply_dropout() {
    if constexpr (Traits::kDropout) {
      const QueryTile& q = tile().q;
      const int warp = (threadIdx.x & 96) / 32;  // no register to keep it in, nor the seeds
      Dropout(params, q.b, q.head).apply(p, q.row0 + consumer * 64 + warp * 16, n * kBlockN);
    }
  }

  // Whether the lane's row h is a query. Others may hold anything.
  __device__ bool is_query(int h) {
    const QueryTile& q = tile().q;
    return q.row0 + consumer * 64 + row + h * 8 < q.len_q;
  }

  // Scores of tile n to probabilities in their place; whether o must be multiplied by `shrink`.
  template <Keys kKeys>
  __device__ bool apply_softmax() {
    const auto to_log2 = [&](int h) { return this->to_log2(h); };
    if constexpr (kKeys == Keys::kFollow) {
      softmax.follow(s, to_log2, most);
      return false;
    }
    if constexpr (kKeys == Keys::kHidden) apply_mask();
    const bool moved = softmax.step(s, to_log2, shrink);
    if constexpr (Traits::kFollowsMax) {
      bool has_max = !tile().exact;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float& max = softmax.max[0][h];
        if (!is_query(h) && max == -INFINITY) max = 0.f;  // nobody reads the row
        has_max &= max > -INFINITY;
      }
      // The vote tells the compiler that all lanes agree.
      follows =
          __all_sync(0xffffffff, ptx::named_barrier_all(turn.kEndId + consumer, 128, has_max));
    }
    return moved;
  }

  // Probabilities to what multiplies values.
  __device__ void pack_probabilities() {
#pragma unroll
    for (int i = 0; i < kBlockN / 4; ++i) {
      p[i] = Mma<Traits::kPvType>::pack(scores()[2 * i], scores()[2 * i + 1]);
    }
    apply_dropout();
  }

  __device__ void rescale_o(const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < kHeadDimV / 2; ++i) o[i] *= factor[i / 2 % 2];
  }

  // --- the steps ---

  // Waits for the tile that comes next; false: there is none.
  __device__ bool wait_tile() {
    ptx::barrier_wait(shared.tile_full[tile_ring.at()], tile_ring.parity());
    return tile().q.rows != 0;
  }

  // Up to the first tile of keys, n, that one of the warpgroup's queries sees; there may be none.
  __device__ void open_tile() {
    const WorkTile& tile = this->tile();
    const int row0 = tile.q.row0 + consumer * 64, row1 = min(row0 + 64, tile.q.len_q);
    all = tile.mask.seen_by_all(row0, max(row1, row0 + 1));
    n = tile.end - 1;
    begin = tile.begin;
    softmax = {};
    most = 0.f;
#pragma unroll
    for (float& x : o) x = 0.f;

    ptx::barrier_wait(shared.q_full[q_ring.at()][query_part()], q_ring.parity());
    if constexpr (Traits::kBytes) {
      split_queries<Traits>(shared.q[q_ring.at()], consumer * 64 + row - lane / 4, unit);
    }
    if constexpr (Traits::kSkips) {
      const int seen = row0 < row1 ? tile.mask.hi(row1 - 1) : 0;
      while (n >= begin && n * kBlockN >= seen) skip_keys();
      if (n < begin) {
        if (Storage::kStagesOutput && stored) release_staging();
        last_scores();
      }
    }
  }

  // Nobody sees the keys of tile n: they and the turn pass by.
  __device__ void skip_keys() {
    ptx::barrier_wait(shared.k_full[k_ring.at()], k_ring.parity());
    turn.take();
    turn.pass();
    release_k();
    ptx::barrier_wait(shared.v_full[v_ring.at()], v_ring.parity());
    release_v();
    --n;
  }

  // The first product of a tile, and its probabilities.
  __device__ void begin_tile() {
    ptx::barrier_wait(shared.k_full[k_ring.at()], k_ring.parity());
    turn.take();
    start_qk();
    turn.pass();
    if (Storage::kStagesOutput && stored) release_staging();
    ptx::wgmma_wait<0>();
    pin(scores());
    if constexpr (Traits::kBytes) scale_columns();
    release_k();
    if (n == begin) last_scores();
    apply_score();
    apply_softmax<Keys::kHidden>();
    pack_probabilities();
  }

  // The queries are used up, unless their place serves the epilogue.
  __device__ void last_scores() {
    if constexpr (!Storage::kStagesOutput) release_q();
  }

  // The place of the queries before these, which the output has left by now.
  __device__ void release_staging() {
    if (lane == 0) {
      ptx::bulk_wait_read();
      ptx::fence_async_proxy();
      constexpr int kBuffers = Traits::kTile.q_buffers;
      ptx::barrier_arrive(shared.q_empty[(q_ring.at() + kBuffers - 1) % kBuffers][query_part()]);
    }
  }

  __device__ void release_q() {
    release(shared.q_empty[q_ring.at()][query_part()]);
    q_ring.advance();
  }

  __device__ void release_k() {
    release(shared.k_empty[k_ring.at()]);
    k_ring.advance();
  }

  __device__ void release_v() {
    if constexpr (Traits::kBytes) __syncwarp();  // all lanes have read the unit
    release(shared.v_empty[v_ring.at()]);
    v_ring.advance();
  }

  template <Keys kKeys>
  __device__ void step() {
    ptx::barrier_wait(shared.k_full[k_ring.at()], k_ring.parity());
    turn.take();
    start_qk();
    ptx::barrier_wait(shared.v_full[v_ring.at()], v_ring.parity());
    start_pv();
    turn.pass();
    ptx::wgmma_wait<1>();
    pin(scores());
    if constexpr (Traits::kBytes) scale_columns();
    release_k();
    if (--n == begin) last_scores();
    bool moved = false;
    const auto make_probabilities = [&] {
      apply_score();
      moved = apply_softmax<kKeys>();
      pin(scores());
      if constexpr (Traits::kShrinks) exceeds = softmax.template exceeds<Traits::kLimitLog2>();
    };
    if constexpr (Traits::kSoftmaxUnderPv) make_probabilities();
    ptx::wgmma_wait<0>();
    pin(o);
    pin(p);
    release_v();
    if constexpr (!Traits::kSoftmaxUnderPv) make_probabilities();
    pack_probabilities();
    if (moved) rescale_o(shrink[0]);
  }

  // Takes down rows whose probabilities in s are more than p holds.
  __device__ void shrink_rows() {
    if (!exceeds) return;
    softmax.template shrink<Traits::kLimitLog2>(s, [&](int h) { return to_log2(h); }, shrink);
    rescale_o(shrink[0]);
    pack_probabilities();
    exceeds = false;
  }

  // The last product of a tile.
  __device__ void end_tile() {
    ptx::barrier_wait(shared.v_full[v_ring.at()], v_ring.parity());
    start_pv();
    ptx::wgmma_wait<0>();
    pin(o);
    pin(p);
    release_v();
  }

  // The epilogue, of queries that see no key as well.
  __device__ void close_tile() {
    store();
    __syncwarp();  // all lanes have read the tile
    release(shared.tile_empty[tile_ring.at()]);
    tile_ring.advance();
    if constexpr (Storage::kStagesOutput) q_ring.advance();
    stored = true;
  }

  __device__ void run() {
    while (wait_tile()) {
      open_tile();
      if (!Traits::kSkips || n >= begin) {
        begin_tile();
        while (n > begin) {
          constexpr Keys kSeen = Traits::kFollowsMax ? Keys::kFollow : Keys::kSeen;
          if constexpr (Traits::kShrinks) shrink_rows();
          if (!is_plain(n - 1)) step<Keys::kHidden>();
          while (n > begin && is_plain(n - 1) && !exceeds) step<kSeen>();
        }
        if constexpr (Traits::kShrinks) shrink_rows();
        end_tile();
      }
      close_tile();
    }
    turn.end();
    if (lane == 0) ptx::bulk_wait_read();  // before the block's shared memory goes
  }

  // Closes the softmax and writes the rows; what is no query of any row gets o = 0, lse = -inf. A
  // warp with a row that has outgrown its maximum has the tile done again instead.
  __device__ void store() {
    bool outgrown = false;
    if constexpr (Traits::kFollowsMax) {
      const bool again = softmax.has_outgrown(most) && (is_query(0) || is_query(1));
      outgrown = __any_sync(0xffffffff, again);
      if (outgrown && lane == 0) shared.outgrown[tile_ring.at()] = true;
    }
    release(shared.tile_judged[tile_ring.at()]);
    if (outgrown) return;
    const QueryTile& q = tile().q;
    const AttentionParams& p = params;
    const OutputWarp<Traits> out(hopper, q, consumer * 64 + row - lane / 4);
    const float sink = p.sinks ? p.sinks[int64_t(max(q.b, 0)) * p.heads_q + q.head] : -INFINITY;
    float normalize[2];
    bool live[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = consumer * 64 + row + h * 8;
      const bool query = is_query(h);
      if constexpr (Traits::kBytes) {  // hidden scores of a query that is not finite are NaN too
        const IntervalMask mask = tile().mask;
        const int i = q.row0 + r;
        if (mask.lo(i) >= mask.hi(i)) softmax.sum[0][h] = 0.f;
      }
      const auto result = softmax.finish(0, h, to_log2(h), sink);
      if (lane % 4 == 0 && r < q.rows) out.gLse[r] = query ? result.lse : -INFINITY;
      live[h] = query && !result.empty;
      normalize[h] = result.normalize * (Traits::kDropout ? p.dropout_scale : 1.f);
      if constexpr (Traits::kBytes) normalize[h] *= power_of_two(v_unit);
    }
    const bool all_live = __all_sync(0xffffffff, live[0] && live[1]);
#pragma unroll
    for (int i = 0; i < kHeadDimV / 2; ++i) o[i] *= normalize[i / 2 % 2];
    if (!all_live) {
#pragma unroll
      for (int i = 0; i < kHeadDimV / 2; ++i) o[i] = live[i / 2 % 2] ? o[i] : 0.f;
    }
    if constexpr (Storage::kStagesOutput) {
      out.store_through(shared.q[q_ring.at()], o);
    } else {
      out.store(o);
    }
  }
};

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    fwd_sm90(const __grid_constant__ HopperParams params) {
  extern __shared__ __align__(1024) unsigned char raw_shared[];
  auto& shared = *reinterpret_cast<HopperStorage<Traits>*>(raw_shared);
  ptx::launch_dependents();  // a decode launch takes the multiprocessors of blocks without work
  if (threadIdx.x == 0) shared.init_barriers();
  __syncthreads();  // barriers are there

  if (threadIdx.x < 128) {
    ptx::lower_registers<Traits::kProducerRegisters>();
    switch (threadIdx.x / 32) {
      case 0:
        return Scheduler<Traits>{params, shared}.run();
      case 1:
        return Loader<Traits, false>{params, shared}.run();
      default:
        if constexpr (Traits::kQuantized) {
          return ScaleLoader<Traits>{params, shared}.run();
        } else if (threadIdx.x / 32 == 2) {
          return clear_values<Traits>(params.attention, shared, params.v_strides);
        } else {
          return Loader<Traits, true>{params, shared}.run();
        }
    }
  } else if (threadIdx.x < Traits::kOthers * 128) {
    if constexpr (Traits::kQuantized) {
      ptx::lower_registers<Traits::kDequantizerRegisters>();
      Dequantizer<Traits>(params, shared).run();
    } else if constexpr (Traits::kCopies) {
      ptx::lower_registers<Traits::kProducerRegisters>();
      Copier<Traits>{params, shared.copies[threadIdx.x / 32 % 4]}.run();
    }
  } else {
    ptx::raise_registers<Traits::kConsumerRegisters>();
    Consumer<Traits>(params, shared).run();
  }
}

// In seconds of all of an H200: 600 TFLOP/s beside a decode, 400 over keys of 8 bits, 3 us for one
// tile after the other of a multiprocessor, and 4.3 TB/s.
inline HybridCosts hybrid_costs(const AttentionParams& p, int sms) {
  constexpr float kTile = 3e-6f, kByte = 1 / 4.3e12f;
  const float flop = fwd_sm80_quantized(p) ? 1 / 400e12f : 1 / 600e12f;
  const int key_bytes =
      p.head_dim * element_size(p.k.dtype) + p.head_dim_v * element_size(p.v.dtype);
  return {p.heads_q * 2 * (p.head_dim + p.head_dim_v) * flop, kTile / sms,
          p.heads_kv * key_bytes * kByte};
}

template <class Traits>
cudaError_t launch(const AttentionParams& p, const CopiedCache& copied, cudaStream_t stream) {
  constexpr int kPanel = Traits::kPanel, kHeadDim = Traits::kHeadDim;
  const HopperOrder order = fwd_sm90_order(p, Traits::kTile);
  if (order.total == 0) return cudaSuccess;
  int device, sms;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;

  HopperParams params{.attention = p, .units = ScoreUnits(p)};
  params.order = order;
  params.box_tokens = fwd_sm90_box(p, Traits::kBlockN);
  error = make_tensor_map(params.q, p.dtype, p.q, p.head_dim, p.heads_q, p.q_head_stride, p.total_q,
                          p.q_token_stride, 1, 0, kPanel, Traits::kBlockM / Traits::kQueryParts);
  if (error != cudaSuccess) return error;
  params.in_groups = Traits::kInGroups && fwd_sm90_in_groups(p, kPanel);
  params.k_strides = PanelStrides::of<Traits>(params.in_groups, Traits::kPanels);
  params.v_strides = PanelStrides::of<Traits>(params.in_groups, Traits::kPanelsV);
  const auto keys = [&](CUtensorMap& map, const KvTensor& x, int dim, int dim_tile, bool swizzled) {
    if (params.in_groups) {
      return make_group_map(map, x.dtype, x.data, dim, p.heads_kv, x.head_stride, x.token_stride,
                            kPanel, dim_tile / kPanel, params.box_tokens / 8);
    }
    // Rows that are named may be any: those of other layers or lanes of a vmap follow.
    const bool named = p.kv.layer || p.kv.rows || p.kv.page_table;
    const int64_t rows = named ? INT32_MAX : x.rows;
    const int box_dims = Traits::kQuantized ? kHeadDim : kPanel;
    return make_tensor_map(map, x.dtype, x.data, dim, p.heads_kv, x.head_stride, x.tokens,
                           x.token_stride, rows, x.row_stride, box_dims, params.box_tokens,
                           swizzled);
  };
  constexpr bool kWide = !Traits::kQuantized;
  error = keys(params.k, p.k, p.head_dim, kHeadDim, kWide || Traits::kBytes);
  if (error != cudaSuccess) return error;
  error = keys(params.v, p.v, p.head_dim_v, Traits::kHeadDimV, kWide);
  if (error != cudaSuccess) return error;
  error = make_tensor_map(params.o, p.dtype, p.o, p.head_dim_v, p.heads_q, p.head_dim_v, p.total_q,
                          int64_t(p.heads_q) * p.head_dim_v, 1, 0, kPanel, 16);
  if (error != cudaSuccess) return error;

  if constexpr (Traits::kCopies) {
    params.copied = copied;
    error = make_unit_map(params.narrow_k, copied.k, p.heads_kv, p.head_dim, copied.units,
                          CopyStorage::kTokens);
    if (error != cudaSuccess) return error;
    error = make_unit_map(params.narrow_v, copied.v, p.heads_kv, p.head_dim_v, copied.units,
                          CopyStorage::kTokens);
    if (error != cudaSuccess) return error;
  }
  const int64_t blocks = Traits::kCopies ? sms : std::min<int64_t>(sms, order.total);
  const bool taken = worth_taking(p, order, Traits::kBlockM, blocks);
  if (taken && order.total > blocks) params.next_tile = p.next_tile;
  const bool shares = p.min_len_q > 0 && !p.beside_previous;  // with a decode launch after it
  if (params.next_tile || shares) {
    error = cudaMemsetAsync(p.next_tile, 0, kTakenCounts * sizeof(int), stream);
    if (error != cudaSuccess) return error;
  }
  if constexpr (Traits::kCopies) {
    error = cudaMemsetAsync(copied.taken, 0, copied.units.scratch_ints() * sizeof(int), stream);
    if (error != cudaSuccess) return error;
  }
  if (shares) params.costs = hybrid_costs(p, sms);
  constexpr int kBytes = sizeof(HopperStorage<Traits>);
  static_assert(kBytes <= 227 * 1024, "an SM's shared memory");
  return launch(fwd_sm90<Traits>, dim3(unsigned(blocks)), Traits::kThreads, kBytes, stream,
                p.beside_previous, params);
}

namespace {

template <int kHeadDim, int kHeadDimV, DType kDType>
cudaError_t launch_dtype(const AttentionParams& p, const CopiedCache& copied, cudaStream_t stream) {
  const auto run = [&]<FwdClass kClass>() {
    if constexpr (kHeadDim == kHeadDimV || !fwd_sm90_quantized(kClass)) {
      return launch<HopperTraits<kHeadDim, kHeadDimV, kDType, kClass>>(p, copied, stream);
    }
    return cudaErrorInvalidValue;
  };
  if constexpr (fwd_sm90_has_copies(kHeadDim, kHeadDimV)) {
    if (copied.taken) return run.template operator()<FwdClass::kCopies>();
  }
  switch (fwd_sm90_class(p, kHeadDim, kHeadDimV)) {
    case FwdClass::kFull:
      return run.template operator()<FwdClass::kFull>();
    case FwdClass::kMasked:
      return run.template operator()<FwdClass::kMasked>();
    case FwdClass::kQuantized:
      return run.template operator()<FwdClass::kQuantized>();
    case FwdClass::kBytes:
      if constexpr (kHeadDim == kFwdDimOfBytes && kDType == DType::kBF16) {
        return run.template operator()<FwdClass::kBytes>();
      }
      return cudaErrorInvalidValue;
    case FwdClass::kQuantizedGeneral:
      return run.template operator()<FwdClass::kQuantizedGeneral>();
    case FwdClass::kDropout:
      return run.template operator()<FwdClass::kDropout>();
    default:
      return run.template operator()<FwdClass::kGeneral>();
  }
}

}  // namespace

template <int kHeadDim, int kHeadDimV>
cudaError_t launch_fwd_sm90(const AttentionParams& p, const CopiedCache& copied,
                            cudaStream_t stream) {
  return with_16_bits(p.dtype, [&]<DType kDType>() {
    return launch_dtype<kHeadDim, kHeadDimV, kDType>(p, copied, stream);
  });
}

template cudaError_t launch_fwd_sm90<JAX_FA_HEAD_DIM, JAX_FA_HEAD_DIM_V>(const AttentionParams&,
                                                                         const CopiedCache&,
                                                                         cudaStream_t);

}  // namespace jax_fa
