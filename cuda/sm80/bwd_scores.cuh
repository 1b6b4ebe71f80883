// From a warp's products to probabilities and the gradient of scores, for the backward kernels.
//
// With ds = p * (dp - delta) * d(score) / d(scale * q.k), dp = dout v^T and delta = rowsum(dout o)
// - dlse, which is what the gradient of a softmax and of its lse come to:
//
//     dv = p^T dout    dk = scale * ds^T q    dq = scale * ds k    dbias = p * (dp - delta)
//
// A kernel that owns keys holds the transposes, rows of keys by columns of queries. So p^T and ds^T
// lie in registers as the left operand of the next product needs them.
//
// Dropout takes some of p and of dp, here m, and the rest counts c = 1 / (1 - rate) times:
//
//     dv = (c m p)^T dout    ds = p * (c m dp - delta) * d(score) / d(scale * q.k)
#pragma once

#include "../dropout.cuh"
#include "../mask.cuh"
#include "../score.cuh"
#include "bwd_tiles.h"
#include "mma.cuh"
#include "schedule.cuh"

namespace jax_fa {

template <int kHeadDim_, DType kDType_, bool kOwnsKeys_, BwdTile kTile_>
struct BwdTraits {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr DType kDType = kDType_;
  static constexpr bool kOwnsKeys = kOwnsKeys_;
  static constexpr BwdTile kTile = kTile_;
  using Element = typename Mma<kDType>::Element;

  static constexpr int kBlockM = kTile.m;  // rows owned
  static constexpr int kBlockN = kTile.n;  // rows walked at a time
  static constexpr int kWarps = kTile.warps;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kWarpM = kBlockM / kWarps;
  static constexpr int kMTiles = kWarpM / 16;
  static constexpr int kStages = kTile.stages;
  static_assert(kBlockN % 16 == 0 && kHeadDim % 32 == 0);
};

// Where a warp's scores are: rows owned by columns walked, from these on within their batch row.
struct ScorePlace {
  int row0, col0;
};

// Calls f(x, i, j) for each element x of this lane, of query i and key j.
template <class Traits, class F>
__device__ void for_each_score(ScoreTile<Traits>& tile, ScorePlace place, F f) {
  const int row0 = place.row0 + threadIdx.x % 32 / 4, col0 = place.col0 + threadIdx.x % 4 * 2;
#pragma unroll
  for (int n = 0; n < Traits::kBlockN / 8; ++n) {
#pragma unroll
    for (int m = 0; m < Traits::kMTiles; ++m) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const Place row{row0, m * 16 + e / 2 * 8}, col{col0, n * 8 + e % 2};
        Traits::kOwnsKeys ? f(tile[m][n][e], col, row) : f(tile[m][n][e], row, col);
      }
    }
  }
}

// Queries of a tile of walked rows: {lse_log2, delta} of each, in shared memory.
template <class Traits>
struct WalkedQueries {
  const float2* sRows;  // [kBlockN]

  // Calls f(m, n, e, lse_log2, delta).
  template <class F>
  __device__ void for_each(F f) const {
#pragma unroll
    for (int n = 0; n < Traits::kBlockN / 8; ++n) {
      const float4 two = reinterpret_cast<const float4*>(sRows)[n * 4 + threadIdx.x % 4];
#pragma unroll
      for (int m = 0; m < Traits::kMTiles; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          f(m, n, e, e % 2 ? two.z : two.x, e % 2 ? two.w : two.y);
        }
      }
    }
  }
};

// Queries that this warp owns, in registers.
template <class Traits>
struct OwnedQueries {
  float2 rows[Traits::kMTiles][2];

  // The warp's rows of a tile, from warp_row on.
  __device__ void load(const BackwardParams& p, const QueryTile& tile, int warp_row) {
    const int64_t head = max(tile.b, 0) * p.fwd.lse_row_stride + tile.head * p.fwd.lse_head_stride;
    const float2* gRows = p.rows + head + (p.fwd.q_start ? tile.token0 : int64_t(tile.row0));
#pragma unroll
    for (int m = 0; m < Traits::kMTiles; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = warp_row + m * 16 + h * 8 + threadIdx.x % 32 / 4;
        rows[m][h] = row < tile.rows ? gRows[row] : float2{INFINITY, 0.f};
      }
    }
  }

  template <class F>
  __device__ void for_each(F f) const {
#pragma unroll
    for (int n = 0; n < Traits::kBlockN / 8; ++n) {
#pragma unroll
      for (int m = 0; m < Traits::kMTiles; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) f(m, n, e, rows[m][e / 2].x, rows[m][e / 2].y);
      }
    }
  }
};

// What a tile of scores is to a warp: queries past the row's last are not seen either.
template <class Traits>
__device__ TileMask classify_scores(const IntervalMask& mask, ScorePlace place, int len_q) {
  const int row1 = place.row0 + Traits::kWarpM, col1 = place.col0 + Traits::kBlockN;
  const int query0 = Traits::kOwnsKeys ? place.col0 : place.row0;
  const int query1 = Traits::kOwnsKeys ? col1 : row1;
  const int key0 = Traits::kOwnsKeys ? place.row0 : place.col0;
  const int key1 = Traits::kOwnsKeys ? row1 : col1;
  if (query0 >= len_q) return TileMask::kSkip;
  const TileMask kind = mask.classify(query0, min(query1, len_q), key0, key1);
  return kind == TileMask::kFull && query1 > len_q ? TileMask::kPartial : kind;
}

template <int kMTiles, int kNTiles>
__device__ void scale_tile(float (&x)[kMTiles][kNTiles][4], float scale) {
#pragma unroll
  for (auto& row : x) {
#pragma unroll
    for (auto& tile : row) {
#pragma unroll
      for (float& y : tile) y *= scale;
    }
  }
}

// Scores of one warp, then their probabilities and gradients in the same place.
template <class Traits, class Score>
struct ScoreGradients {
  static_assert(Traits::kWarpM % 16 == 0);
  ScoreTile<Traits> p, ds;
  ScoreTile<Traits> slope;  // unused by a score without one
  // unused without dropout
  WarpSurvivors<Traits::kMTiles, Traits::kBlockN / 8, Traits::kOwnsKeys> survivors;

  // p holds q.k; becomes the probability.
  template <class Queries>
  __device__ void apply_softmax(const Score& score, const IntervalMask& mask, int len_q,
                                ScorePlace place, TileMask kind, const Queries& queries) {
    const auto for_each = [&](auto f) { for_each_score<Traits>(p, place, f); };
    if constexpr (Score::kDropout) {
      const Dropout dropout(score.params, score.b, score.head);
      survivors.draw(dropout, place.row0, place.col0);
    }
    score.cap(for_each);
    if constexpr (Score::kHasSlope) {
      queries.for_each(
          [&](int m, int n, int e, float, float) { slope[m][n][e] = score.slope(p[m][n][e]); });
    }
    score.shift(for_each);
    if (kind == TileMask::kPartial) {
      const Interval seen = mask.seen_offsets();
      const int len_kv = mask.len_kv;
      for_each([=](float& x, int i, int j) {
        const int offset = j - i;
        const bool visible = (i < len_q) & (j < len_kv) & (offset >= seen.lo) & (offset < seen.hi);
        x = visible ? x : -INFINITY;
      });
    }
    const float to_log2 = score.to_log2();
    queries.for_each([&](int m, int n, int e, float lse_log2, float) {
      p[m][n][e] = ptx::exp2(fmaf(p[m][n][e], to_log2, -lse_log2));
    });
  }

  // ds holds dp; becomes the gradient of the score, which is that of bias.
  template <class Queries>
  __device__ void apply_gradient(const Score& score, const Queries& queries) {
    if constexpr (Score::kDropout) {
      survivors.apply(ds);
      scale_tile(ds, score.params.dropout_scale);
    }
    queries.for_each([&](int m, int n, int e, float, float delta) {
      ds[m][n][e] = p[m][n][e] * (ds[m][n][e] - delta);
    });
  }

  // What dv sums over, but for its factor.
  __device__ void apply_dropout() {
    if constexpr (Score::kDropout) survivors.apply(p);
  }

  __device__ void clear() {
#pragma unroll
    for (int m = 0; m < Traits::kMTiles; ++m) {
#pragma unroll
      for (int n = 0; n < Traits::kBlockN / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) p[m][n][e] = ds[m][n][e] = 0.f;
      }
    }
  }

  // From the gradient of the score to that of scale * q.k.
  __device__ void apply_slope() {
    if constexpr (Score::kHasSlope) {
#pragma unroll
      for (int m = 0; m < Traits::kMTiles; ++m) {
#pragma unroll
        for (int n = 0; n < Traits::kBlockN / 8; ++n) {
#pragma unroll
          for (int e = 0; e < 4; ++e) ds[m][n][e] *= slope[m][n][e];
        }
      }
    }
  }
};

// Starts the copy of `rows` of walked queries' {lse_log2, delta}; past them both become 0.
template <int kRows>
__device__ void load_query_rows(float2* sRows, const float2* gRows, int rows) {
  for (int row = threadIdx.x; row < kRows; row += blockDim.x) {
    ptx::cp_async_8(ptx::shared_address(sRows + row), gRows + row, row < rows ? 8 : 0);
  }
}

}  // namespace jax_fa
