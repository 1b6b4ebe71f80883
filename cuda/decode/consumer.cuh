// The arithmetic of a warp: scores, softmax and output of the tiles that it takes.
#pragma once

#include "decode/fragments.cuh"
#include "decode/work.cuh"
#include "params.h"
#include "ptx.cuh"
#include "score.cuh"

namespace jax_fa::decode {

// A maximum below all scores, yet finite: exp2(-inf - kNoMax) is 0, not NaN.
constexpr float kNoMax = -1e30f;

// One warp's softmax over the steps it takes. Lane (g, c) holds the scores of keys g and g + 8 for
// columns 2c and 2c + 1, and their maxima; sums stay apart by g until the end.
template <typename T>
struct Consumer {
  using TileScores = float[T::kColumnTiles][4];
  using KeyReader = typename T::KeyReader;
  using ValueReader = typename T::ValueReader;
  using Scores = TileScores[T::kKeyTiles];
  using TokenScales = float[T::kKeyTiles][2];  // of keys g and g + 8

  float acc[T::kColumnTiles][T::kDimTiles][4] = {};
  float max_log2[T::kColumnTiles][2], sum[T::kColumnTiles][2] = {};
  const typename T::Shared& smem;

  __device__ explicit Consumer(const typename T::Shared& smem) : smem(smem) {
    for_columns([&](int n, int e) { max_log2[n][e] = kNoMax; });
  }

  __device__ const Column& column(int n, int e) const {
    return smem.columns[n * 8 + threadIdx.x % 4 * 2 + e];
  }

  template <typename F>
  static __device__ void for_columns(F&& f) {
#pragma unroll
    for (int n = 0; n < T::kColumnTiles; ++n) {
      f(n, 0);
      f(n, 1);
    }
  }

  // f(score, key within the step, key tile, half of it, column tile, column of the lane)
  template <typename F>
  static __device__ void for_scores(Scores& s, F&& f) {
    const int g = threadIdx.x % 32 / 4;
#pragma unroll
    for (int i = 0; i < T::kKeyTiles; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        for_columns(
            [&](int n, int e) { f(s[i][n][half * 2 + e], i * 16 + half * 8 + g, i, half, n, e); });
      }
    }
  }

  __device__ void gemm_qk(TileScores& s, const typename KeyReader::Tile& sK,
                          const KeyReader& reader) const {
    constexpr int kStepsPerVector = T::KeyFormat::kElements / 4;
    constexpr bool kTwoChains = T::kWide && T::kColumnTiles == 1;  // few warps wait for products
    TileScores odd = {};
#pragma unroll
    for (int vector = 0; vector < KeyReader::kVectors; ++vector) {
      const auto row0 = reader.read(sK, 0, vector), row1 = reader.read(sK, 1, vector);
#pragma unroll
      for (int part = 0; part < kStepsPerVector; ++part) {
        const uint2 x = reader.format.along(row0, part), y = reader.format.along(row1, part);
        const uint32_t a[4] = {x.x, y.x, x.y, y.y};
        const auto& sQ = smem.q[vector * kStepsPerVector + part];
#pragma unroll
        for (int n = 0; n < T::kColumnTiles; ++n) {
          mma<T::KeyFormat::kMma>(kTwoChains && part % 2 ? odd[n] : s[n], a,
                                  sQ[n][threadIdx.x % 32]);
        }
      }
    }
    if constexpr (kTwoChains) {
#pragma unroll
      for (int n = 0; n < T::kColumnTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[n][i] += odd[n][i];
      }
    }
  }

  // From q.k to scores in the log2 domain.
  __device__ void modify(Scores& s, const TokenScales& k_scale, int key0, const AttentionParams& p,
                         int b) const {
    const float scale = (p.softcap > 0.f ? p.scale : p.scale * kLog2e) * T::KeyFormat::kUnit;
    for_scores(s, [&](float& x, int, int i, int half, int, int) {
      x *= T::KeyFormat::kTokenScale ? scale * k_scale[i][half] : scale;
    });
    if (p.softcap > 0.f) {
      const Softcap softcap{p.softcap, ptx::rcp(p.softcap)};
      for_scores(s, [&](float& x, int, int, int, int, int) { x = softcap(x) * kLog2e; });
    }
    if (p.alibi_slopes) {
      const float* const gSlopes = p.alibi_slopes + int64_t(b) * p.heads_q;
      float slope_log2[T::kColumnTiles][2];
      int position[T::kColumnTiles][2];
      for_columns([&](int n, int e) {
        slope_log2[n][e] = gSlopes[column(n, e).head] * kLog2e;
        position[n][e] = column(n, e).position - key0;
      });
      for_scores(s, [&](float& x, int key, int, int, int n, int e) {
        x -= slope_log2[n][e] * fabsf(float(position[n][e] - key));
      });
    }
  }

  __device__ void apply_mask(Scores& s, int key0) const {
    for_scores(s, [&](float& x, int key, int, int, int n, int e) {
      const Interval keys = column(n, e).keys;
      if (key0 + key < keys.lo || key0 + key >= keys.hi) x = -INFINITY;
    });
  }

  // Scores become probabilities against the running maximum, which moves only when one outgrows it
  // by 2^8: what is rounded to 16 bits stays in range, and acc is seldom rescaled. The maximum is
  // of probability x v_scale, since it is this product that is rounded.
  __device__ void softmax(Scores& s, const TokenScales& v_scale) {
    constexpr float kSlack = 8;
    float top[T::kColumnTiles][2];
    for_columns([&](int n, int e) { top[n][e] = kNoMax; });
    float lift[T::kKeyTiles][2] = {};
    if constexpr (T::ValueFormat::kTokenScale) {
#pragma unroll
      for (int i = 0; i < T::kKeyTiles * 2; ++i) {
        lift[i / 2][i % 2] = fminf(fmaxf(ptx::log2(v_scale[i / 2][i % 2]), -64.f), 64.f);
      }
    }
    for_scores(s, [&](float& x, int, int i, int half, int n, int e) {
      top[n][e] = fmaxf(top[n][e], x + lift[i][half]);
    });
    bool outgrown = false;
    for_columns([&](int n, int e) { outgrown |= top[n][e] > max_log2[n][e] + kSlack; });
    if (__any_sync(~0u, outgrown)) {
      float shrinks[T::kColumnTiles][2];
      bool nonzero = false;
      for_columns([&](int n, int e) {
        float& m = max_log2[n][e];
        nonzero |= m != kNoMax;
        float m_new = fmaxf(m, top[n][e]);
#pragma unroll
        for (int d = 4; d < 32; d *= 2) m_new = fmaxf(m_new, __shfl_xor_sync(~0u, m_new, d));
        shrinks[n][e] = ptx::exp2(m - m_new);
        m = m_new;
        sum[n][e] *= shrinks[n][e];
      });
      if (__any_sync(~0u, nonzero)) {
        for_columns([&](int n, int e) {
#pragma unroll
          for (int i = 0; i < T::kDimTiles; ++i) {
            acc[n][i][e] *= shrinks[n][e];
            acc[n][i][e + 2] *= shrinks[n][e];
          }
        });
      }
    }
    for_scores(s, [&](float& x, int, int i, int half, int n, int e) {
      x = ptx::exp2(x - max_log2[n][e]);
      sum[n][e] += x;
      if constexpr (T::ValueFormat::kTokenScale) x *= v_scale[i][half];
    });
  }

  __device__ void gemm_pv(const TileScores& s, const typename ValueReader::Tile& sV,
                          const ValueReader& reader) {
    constexpr DType kMma = T::ValueFormat::kMma;
    constexpr int kTilesPerVector = T::ValueFormat::kElements / 2;
    uint2 rP[T::kColumnTiles];  // P^T as B fragments: keys along a lane, columns across
#pragma unroll
    for (int n = 0; n < T::kColumnTiles; ++n) {
      rP[n] = {ptx::movmatrix_trans(pack<kMma>(s[n][0], s[n][1])),
               ptx::movmatrix_trans(pack<kMma>(s[n][2], s[n][3]))};
    }
#pragma unroll
    for (int vector = 0; vector < ValueReader::kVectors; ++vector) {
      const auto row0 = reader.read(sV, 0, vector), row1 = reader.read(sV, 1, vector);
      const auto row2 = reader.read(sV, 2, vector), row3 = reader.read(sV, 3, vector);
#pragma unroll
      for (int part = 0; part < kTilesPerVector; ++part) {
        const uint2 x = reader.format.across(row0, row1, part);
        const uint2 y = reader.format.across(row2, row3, part);
        const uint32_t a[4] = {x.x, x.y, y.x, y.y};
#pragma unroll
        for (int n = 0; n < T::kColumnTiles; ++n) {
          mma<kMma>(acc[n][vector * kTilesPerVector + part], a, rP[n]);
        }
      }
    }
  }

  // This warp's part of the merge: unscaled, with its own maximum.
  __device__ void publish(typename T::Shared& smem) {
    constexpr int kTilesPerVector = T::ValueFormat::kElements / 2;
    constexpr float kUnit = T::ValueFormat::kUnit;
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
    for_columns([&](int n, int e) {
      const int column = n * 8 + c * 2 + e;
#pragma unroll
      for (int d = 4; d < 32; d *= 2) sum[n][e] += __shfl_xor_sync(~0u, sum[n][e], d);
      if (smem.columns[column].token < 0) return;
      auto& parts = smem.merge.warps;
      if (g == 0) {
        parts.max_log2[warp][column] = max_log2[n][e];
        parts.sum[warp][column] = sum[n][e];
      }
#pragma unroll
      for (int tile = 0; tile < T::kDimTiles; tile += 2) {  // a lane's dims are consecutive
        const int dim = (tile / kTilesPerVector * 8 + g) * T::ValueFormat::kElements +
                        tile % kTilesPerVector * 2;
        const auto &lo = acc[n][tile], &hi = acc[n][tile + 1];
        if (dim < T::kHeadDim) {
          *reinterpret_cast<float4*>(&parts.o[warp][column][dim]) =
              make_float4(lo[e] * kUnit, lo[e + 2] * kUnit, hi[e] * kUnit, hi[e + 2] * kUnit);
        }
      }
    });
  }
};

}  // namespace jax_fa::decode
