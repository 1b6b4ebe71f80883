// What warpgroups that own keys do in the Hopper backward kernels: products, scores to
// probabilities and on to their gradients, the epilogue.
#pragma once

#include "../dropout.cuh"
#include "../softmax.cuh"
#include "bwd_block.cuh"
#include "bwd_store.cuh"
#include "wgmma.cuh"

namespace jax_fa {

// A warpgroup of 64 keys, or one of the two that share them.
template <class Traits>
struct KeyRows {
  static constexpr int kHeadDim = Traits::kHeadDim, kBlockN = Traits::kBlockN;
  static constexpr int kPanel = Traits::kPanel;
  static constexpr DType kDType = Traits::kDType;
  using Storage = BwdStorage<Traits>;
  using Score = typename Traits::Score;

  const HopperBwdParams& hopper;
  const BackwardParams& params = hopper.backward;
  Storage& shared;
  int part = own_part();
  int lane = threadIdx.x % 32;
  int row = part * 64 + threadIdx.x / 32 % 4 * 16 + lane / 4;  // of the lane's two keys, the first

  Ring<Storage::kWorks> works;
  Ring<Traits::kStages> ring;  // of queries and of ds

  float s[kBlockN / 2], dp[kBlockN / 2];
  uint32_t p[kBlockN / 4], ds[kBlockN / 4];
  uint32_t slope[Score::kHasSlope ? kBlockN / 4 : 1];  // p times the score's derivative
  typename Traits::Survivors survivors;                // unused without dropout, as are the seeds
  uint2 seeds;

  __device__ KeyRows(const HopperBwdParams& params, Storage& shared)
      : hopper(params), shared(shared) {}

  // Which 64 of the keys.
  __device__ static int own_part() {
    if constexpr (Traits::kPair) return ptx::cluster_rank();
    return __shfl_sync(0xffffffff, threadIdx.x / 128 - 2, 0);  // known to be uniform
  }

  __device__ const KeyWork& work() { return shared.work(works.at()); }

  __device__ void release(ptx::Barrier& empty) const {
    if (lane == 0) ptx::barrier_arrive(empty);
  }

  // --- the products; they only start here ---

  // x = owned walked^T, of this warpgroup's rows.
  template <class Owned, class Walked>
  __device__ void start_scores(float (&x)[kBlockN / 2], Owned& owned, Walked& walked) {
    uint64_t a = panel_descriptor<kPanel, Traits::kPair>(owned[0][Traits::kPair ? 0 : part * 64]);
    if constexpr (Traits::kDropout) pin(a);  // no registers for all that it leads to
    const uint64_t b = panel_descriptor<kPanel, Traits::kPair>(walked);
    pin(x);
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
      constexpr int kSteps = kPanel / 16;  // in a panel
      const int step = i % kSteps * 2, panel = i / kSteps * kPanel * 2 / 16;
      Wgmma<kDType, kBlockN>::ss(x, a + panel * Traits::kOwnRows + step, b + panel * kBlockN + step,
                                 i > 0);
    }
    ptx::wgmma_commit();
  }

  // x += weights walked. A launch of 512 threads has no register target for all 256 dims at once.
  template <class Walked>
  __device__ void start_sum(float (&x)[kHeadDim / 2], uint32_t (&weights)[kBlockN / 4],
                            Walked& walked) {
    const uint64_t b = panel_descriptor<kPanel, Traits::kPair>(walked, kBlockN * kPanel * 2);
    pin(x);
    pin(weights);
    ptx::wgmma_fence();
    constexpr int kParts = Traits::kPair ? 2 : 1, kDims = kHeadDim / kParts;
    constexpr int kNext = Traits::kPanels / kParts * kBlockN * kPanel * 2 / 16;
#pragma unroll
    for (int i = 0; i < kBlockN / 16; ++i) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        Wgmma<kDType, kDims>::rs(reinterpret_cast<float (&)[kDims / 2]>(x[part * kDims / 2]),
                                 &weights[i * 4], b + part * kNext + i * kPanel * 2);
      }
    }
    ptx::wgmma_commit();
  }

  // --- from scores to probabilities and their gradients ---

  __device__ TileMask classify(int row0) {
    const KeyWork& work = this->work();
    const int key0 = work.keys.row0 + part * 64;
    return work.mask.classify(row0, min(row0 + kBlockN, work.len_q), key0, key0 + 64);
  }

  // {lse_log2, delta / c} of the lane's two queries among eight.
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
      // A pair has no registers to keep the seeds.
      const auto seeds = Traits::kPair ? dropout_seeds(params.fwd, work().b) : this->seeds;
      const int of_block = Traits::kPair ? 0 : part;
      survivors.draw(Dropout(params.fwd, seeds, head), work().keys.row0 + part * 64, row0,
                     shared.survivors[of_block], 1 + of_block);
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

  // dp to ds, over c. With dropout p loses what ds needed of it.
  __device__ void apply_gradient() {
#pragma unroll
    for (int t = 0; t < kBlockN / 8; ++t) {
      const float4 rows = query_rows(t);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int i = t * 2 + h;
        uint32_t whole = p[i];
        if constexpr (Score::kHasSlope) whole = slope[i];
        const float2 x = Mma<kDType>::unpack(whole);
        if constexpr (Traits::kDropout && Score::kHasSlope) {  // fewer registers
          const float y[2] = {survivors(0, t, 2 * h) ? dp[2 * i] : 0.f,
                              survivors(0, t, 2 * h + 1) ? dp[2 * i + 1] : 0.f};
          ds[i] = Mma<kDType>::pack(x.x * (y[0] - rows.y), x.y * (y[1] - rows.w));
          p[i] &= survivors.halves(0, t, h);
        } else if constexpr (Traits::kDropout) {
          p[i] &= survivors.halves(0, t, h);
          const float2 y = Mma<kDType>::unpack(p[i]);
          ds[i] =
              Mma<kDType>::pack(y.x * dp[2 * i] - x.x * rows.y, y.y * dp[2 * i + 1] - x.y * rows.w);
        } else {
          ds[i] = Mma<kDType>::pack(x.x * (dp[2 * i] - rows.y), x.y * (dp[2 * i + 1] - rows.w));
        }
      }
    }
  }

  // --- 16 keys of a warp by all queries, on their way through shared memory ---

  // Of 8 keys by 8 queries, a lane has the place of one key.
  __device__ uint32_t place() const {
    const uint32_t sRow = ptx::shared_address(shared.ds[ring.at()][0][row - lane / 4 + lane % 16]);
    return sRow + ((lane / 16) ^ (lane % 8)) * 16;  // swizzled
  }

  // f(i): two queries of a lane's key, as registers of operands have them.
  template <class F>
  __device__ void put(F f) const {
    const uint32_t sFirst = place();
#pragma unroll
    for (int i = 0; i < kBlockN / 16; ++i) {
      const uint32_t x[4] = {f(i * 4), f(i * 4 + 1), f(i * 4 + 2), f(i * 4 + 3)};
      ptx::stmatrix_x4((sFirst ^ i % 4 * 32) + i / 4 * sizeof(shared.ds[0][0]), x);
    }
  }

  // What put() left of 16 queries.
  __device__ void take(int i, uint32_t (&x)[4]) const {
    ptx::ldmatrix_x4(x, (place() ^ i % 4 * 32) + i / 4 * sizeof(shared.ds[0][0]));
  }

  // --- the epilogue ---

  // Null: the other warpgroup of these keys has it.
  template <class Dk, class Dv>
  __device__ void store(const Dk& dk, const Dv& dv) {
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
    if constexpr (!std::is_null_pointer_v<Dk>) {
      write(dk, params.dk, params.dk_row_stride, params.dk_token_stride,
            fwd.scale * gradient_scale<Traits>(fwd), fwd.head_dim);
    }
    if constexpr (!std::is_null_pointer_v<Dv>) {
      write(dv, params.dv, params.dv_row_stride, params.dv_token_stride,
            gradient_scale<Traits>(fwd), fwd.head_dim_v);
    }
  }
};

}  // namespace jax_fa
