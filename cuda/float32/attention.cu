// Attention and its gradients in float32 without a rounded product: for calls under
// jax.default_matmul_precision("highest"), and for readers who want to learn flash attention.
//
// Names are those of the papers (Dao et al. 2022; Dao 2023, FlashAttention-2, algorithms 1 and 2).
// Q, O and dO are cut into blocks of kB rows, Q_i, and K and V into K_j and V_j:
//
//     S_ij = score(Q_i K_j^T)          the logits, masked with -inf
//     m_i, l_i                         running maxima and sums of exp(S - m) of the rows
//     L_i = m_i + log l_i              lse
//     P_ij = exp(S_ij - L_i)           the probabilities: not stored, formed again in the backward
//
// Forward: a thread block owns Q_i and walks j. When a row's maximum moves, what it has so far is
// rescaled to the new one:
//
//     m' = max(m, rowmax(S))    P~ = exp(S - m')    l = e^(m - m') l + rowsum(P~)
//     O_i = e^(m - m') O_i + P~ V_j                 and in the end O_i / l_i
//
// Backward, with D_i = rowsum(dO_i o O_i) from sm80/bwd_rows.cu, less the cotangent of L_i:
//
//     dP_ij = dO_i V_j^T                 dS_ij = P_ij o (dP_ij - D_i) o score'
//     dV_j += P_ij^T dO_i                dK_j += dS_ij^T Q_i                dQ_i += dS_ij K_j
//
// One kernel owns K_j and V_j and walks i, the other owns Q_i and walks j: S and dP are formed
// twice, but no sum crosses thread blocks, and each has one order.
//
// Dropout multiplies P by 0 or 1 / (1 - rate) in O and dV, and dP by the same.
//
// A product is shared by 16 x 16 threads. Of a block of scores, thread (x, y) has the elements
// (y + 16 r, x + 16 c), of a block of rows the rows y + 16 r and four dims from 4 x + 64 t on.
#include "../dropout.cuh"
#include "../launch.cuh"
#include "../mask.cuh"
#include "../rows.cuh"
#include "../score.cuh"
#include "../sm80/bwd_walk.cuh"
#include "../sm80/schedule.cuh"
#include "tiles.h"

namespace jax_fa {
namespace {

constexpr int kSide = 16, kThreads = kSide * kSide;
static_assert(kThreads == kFloat32Warps * 32);

// Blocks of kB rows of up to kDim dims.
template <int kDim_, int kB_>
struct Blocks {
  static constexpr int kDim = kDim_, kB = kB_;
  static constexpr int kM = kB / kSide;  // rows of a thread, and columns of scores
  static constexpr int kN = kDim / 64;   // of four dims each
  using Rows = float[kB][kDim + 4];      // padded: threads read rows that lie 4 banks apart
  using Scores = float[kB][kB + 4];
  using Block = float[kM][kM];  // a thread's part of a block of scores
  using Sums = float4[kM][kN];  // and of a block of rows
};

template <int kDim>
using ForwardBlocks = Blocks<kDim, float32_forward_rows(kDim)>;
template <int kDim>
using BackwardBlocks = Blocks<kDim, float32_backward_rows(kDim)>;

__device__ int thread_x() { return threadIdx.x % kSide; }
__device__ int thread_y() { return threadIdx.x / kSide; }

// --- moving blocks ---

// Rows [0, rows) of a block, `at(row)` being where each starts; zeros past them and past `dims`.
template <class B, class At>
__device__ void load(typename B::Rows& block, int rows, int dims, At at) {
  constexpr int kVectors = B::kDim / 4;
  for (int i = threadIdx.x; i < B::kB * kVectors; i += kThreads) {
    const int row = i / kVectors, dim = i % kVectors * 4;
    const bool exists = row < rows && dim < dims;
    *reinterpret_cast<float4*>(&block[row][dim]) =
        exists ? *reinterpret_cast<const float4*>(at(row) + dim) : float4{};
  }
}

// Keys or values from j0 on of a row and head, of which the row has `len`.
template <class B>
__device__ void load_keys(typename B::Rows& block, const KvTensor& x, const KvRow& row, int head,
                          int j0, int len, int dims) {
  const auto* gX = static_cast<const float*>(x.data);
  load<B>(block, len - j0, dims, [&](int j) { return gX + kv_offset(x, row(j0 + j), head); });
}

// Each row of a thread's sums times factor[r], to `at(row)`; null: nowhere.
template <class B, class At>
__device__ void store(const typename B::Sums& sums, const float (&factor)[B::kM], int dims, At at) {
#pragma unroll
  for (int r = 0; r < B::kM; ++r) {
    float* gRow = at(thread_y() + r * kSide);
#pragma unroll
    for (int t = 0; t < B::kN; ++t) {
      const int dim = thread_x() * 4 + t * 64;
      if (!gRow || dim >= dims) continue;
      const float4 x = sums[r][t];
      const float f = factor[r];
      // a row of factor 0 is 0, whatever its sums are
      *reinterpret_cast<float4*>(gRow + dim) =
          f == 0.f ? float4{} : float4{f * x.x, f * x.y, f * x.z, f * x.w};
    }
  }
}

// A thread's part of a block of scores to where all threads read it, or its transpose.
template <class B, bool kTransposed>
__device__ void share(typename B::Scores& scores, const typename B::Block& part) {
#pragma unroll
  for (int r = 0; r < B::kM; ++r) {
#pragma unroll
    for (int c = 0; c < B::kM; ++c) {
      const int i = thread_y() + r * kSide, j = thread_x() + c * kSide;
      (kTransposed ? scores[j][i] : scores[i][j]) = part[r][c];
    }
  }
}

// --- products ---

// x = a b^T
template <class B>
__device__ void multiply(typename B::Block& x, const typename B::Rows& a, const typename B::Rows& b,
                         int dims) {
#pragma unroll
  for (auto& row : x) {
#pragma unroll
    for (float& e : row) e = 0.f;
  }
#pragma unroll 2
  for (int d = 0; d < dims; d += 4) {
    float4 rows[B::kM], columns[B::kM];
#pragma unroll
    for (int m = 0; m < B::kM; ++m) {
      rows[m] = *reinterpret_cast<const float4*>(&a[thread_y() + m * kSide][d]);
      columns[m] = *reinterpret_cast<const float4*>(&b[thread_x() + m * kSide][d]);
    }
#pragma unroll
    for (int r = 0; r < B::kM; ++r) {
#pragma unroll
      for (int c = 0; c < B::kM; ++c) {
        float& e = x[r][c];
        e = fmaf(rows[r].x, columns[c].x, e);
        e = fmaf(rows[r].y, columns[c].y, e);
        e = fmaf(rows[r].z, columns[c].z, e);
        e = fmaf(rows[r].w, columns[c].w, e);
      }
    }
  }
}

// sums += weights b
template <class B>
__device__ void add_product(typename B::Sums& sums, const typename B::Scores& weights,
                            const typename B::Rows& b) {
#pragma unroll 2
  for (int j = 0; j < B::kB; j += 4) {
    float4 w[B::kM];
#pragma unroll
    for (int r = 0; r < B::kM; ++r) {
      w[r] = *reinterpret_cast<const float4*>(&weights[thread_y() + r * kSide][j]);
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int t = 0; t < B::kN; ++t) {
        const float4 x = *reinterpret_cast<const float4*>(&b[j + k][thread_x() * 4 + t * 64]);
#pragma unroll
        for (int r = 0; r < B::kM; ++r) {
          const float f = k == 0 ? w[r].x : k == 1 ? w[r].y : k == 2 ? w[r].z : w[r].w;
          float4& o = sums[r][t];
          o = {fmaf(f, x.x, o.x), fmaf(f, x.y, o.y), fmaf(f, x.z, o.z), fmaf(f, x.w, o.w)};
        }
      }
    }
  }
}

// --- scores ---

// Over the 16 threads that share a row.
__device__ float row_max(float x) {
#pragma unroll
  for (int d = 1; d < kSide; d *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, d));
  return x;
}
__device__ float row_sum(float x) {
#pragma unroll
  for (int d = 1; d < kSide; d *= 2) x += __shfl_xor_sync(~0u, x, d);
  return x;
}

// Calls f(x, i, j) for each element of a thread's part of the scores of queries from i0 on and keys
// from j0 on.
template <class B, class F>
__device__ void for_each_score(typename B::Block& s, int i0, int j0, F f) {
#pragma unroll
  for (int r = 0; r < B::kM; ++r) {
#pragma unroll
    for (int c = 0; c < B::kM; ++c) {
      f(s[r][c], Place{i0 + thread_y(), r * kSide}, Place{j0 + thread_x(), c * kSide});
    }
  }
}

// q.k to logits, -inf where query i does not see key j.
template <class B>
__device__ void apply_score(typename B::Block& s, const GeneralScore& score, int i0, int j0) {
  const auto for_each = [&](auto f) { for_each_score<B>(s, i0, j0, f); };
  score.apply(for_each);
  for_each([&](float& x, int i, int j) {
    const bool seen = i < score.len_q && j >= score.mask.lo(i) && j < score.mask.hi(i);
    x = seen ? x : -INFINITY;
  });
}

// What dropout makes of the probability of query i and key j: 0, or 1 / (1 - rate) times itself. A
// call of Philox draws for 32 of them (dropout.cuh), and is made here for each.
__device__ float dropout_factor(const GeneralScore& score, int i, int j) {
  const AttentionParams& p = score.params;
  const uint32_t column = j / 64 * 4 + j % 8 / 2, row = i / 16 * 8 + i % 8;
  uint4 drawn[1] = {make_uint4(column, row, p.dropout_heads ? score.head : 0, 0)};
  philox(drawn, reinterpret_cast<const uint2*>(p.seeds)[score.b]);
  uint32_t word = 0;
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    if (n == j % 16 / 8 * 2 + i % 16 / 8) word = dropout_word(drawn[0], j / 16 % 4, n);
  }
  return int(word >> j % 2 * 16 & 0x7fff) < p.dropout_limit ? 0.f : p.dropout_scale;
}

// What the kernels that own Q_i walk: the keys that some of its queries see.
template <class B>
struct Walk {
  int b, head_kv, len_kv;
  IntervalMask mask;
  KvRow k_row, v_row;
  int begin, end;  // of keys, from a multiple of kB on

  __device__ Walk(const AttentionParams& p, const QueryTile& tile)
      : b(max(tile.b, 0)),
        head_kv(tile.head / (p.heads_q / p.heads_kv)),
        len_kv(row_len_kv(p, b)),
        mask(tile.len_q, len_kv, p.window_left, p.window_right, p.top_left),
        k_row(p.kv, b, p.k.rows),
        v_row(p.kv, b, p.v.rows) {
    const int row_end = min(tile.row0 + tile.rows, tile.len_q);
    const Interval seen = tile.row0 < row_end ? mask.seen_by_any(tile.row0, row_end) : Interval{};
    begin = seen.lo / B::kB * B::kB;
    end = seen.hi;
  }
};

// --- forward ---

template <class B>
struct ForwardStorage {
  typename B::Rows q, kv;
  typename B::Scores p;
};

template <class B>
__global__ void __launch_bounds__(kThreads, 1)
    fwd_float32(const __grid_constant__ AttentionParams p) {
  extern __shared__ __align__(16) unsigned char raw_shared[];
  auto& shared = *reinterpret_cast<ForwardStorage<B>*>(raw_shared);
  constexpr int kB = B::kB, kM = B::kM;

  const QueryTile tile = locate_tile<kB>(p);
  if (tile.rows <= 0) return;
  const Walk<B> walk(p, tile);
  const GeneralScore score(p, walk.b, tile.head, tile.len_q, walk.mask);

  const auto* gQ =
      static_cast<const float*>(p.q) + tile.token0 * p.q_token_stride + tile.head * p.q_head_stride;
  load<B>(shared.q, tile.len_q - tile.row0, p.head_dim,
          [&](int row) { return gQ + row * p.q_token_stride; });

  typename B::Sums o = {};
  float m[kM], l[kM] = {};
#pragma unroll
  for (float& x : m) x = -INFINITY;

  for (int j0 = walk.begin; j0 < walk.end; j0 += kB) {
    load_keys<B>(shared.kv, p.k, walk.k_row, walk.head_kv, j0, walk.len_kv, p.head_dim);
    __syncthreads();  // Q_i and K_j are there
    typename B::Block s;
    multiply<B>(s, shared.q, shared.kv, p.head_dim);
    apply_score<B>(s, score, tile.row0, j0);

#pragma unroll
    for (int r = 0; r < kM; ++r) {
      float top = m[r];
#pragma unroll
      for (const float x : s[r]) top = fmaxf(top, x);
      top = row_max(top);
      const float origin = top == -INFINITY ? 0.f : top;  // nothing seen yet: all terms are 0
      const float rescale = expf(m[r] - origin);
      m[r] = top;
      float sum = 0.f;
#pragma unroll
      for (float& x : s[r]) {
        x = expf(x - origin);
        sum += x;
      }
      l[r] = fmaf(rescale, l[r], row_sum(sum));
#pragma unroll
      for (float4& x : o[r]) x = {rescale * x.x, rescale * x.y, rescale * x.z, rescale * x.w};
    }
    if (p.seeds) {  // l is without dropout
      for_each_score<B>(s, tile.row0, j0,
                        [&](float& x, int i, int j) { x *= dropout_factor(score, i, j); });
    }

    __syncthreads();  // all threads are done with K_j
    share<B, false>(shared.p, s);
    load_keys<B>(shared.kv, p.v, walk.v_row, walk.head_kv, j0, walk.len_kv, p.head_dim_v);
    __syncthreads();  // P~ and V_j are there
    add_product<B>(o, shared.p, shared.kv);
    __syncthreads();  // all threads are done with them
  }

  // A sink is one more term of the denominator.
  const float sink = p.sinks ? p.sinks[int64_t(walk.b) * p.heads_q + tile.head] : -INFINITY;
  float* gLse = p.lse + walk.b * p.lse_row_stride + tile.head * p.lse_head_stride +
                (p.q_start ? tile.token0 : int64_t(tile.row0));
  float factor[kM];
#pragma unroll
  for (int r = 0; r < kM; ++r) {
    const int row = thread_y() + r * kSide;
    const float top = fmaxf(m[r], sink), origin = top == -INFINITY ? 0.f : top;
    const float sum = expf(m[r] - origin) * l[r] + expf(sink - origin);
    const bool query = tile.row0 + row < tile.len_q;
    factor[r] = query && l[r] != 0.f ? expf(m[r] - origin) / sum : 0.f;
    if (thread_x() == 0 && row < tile.rows) {
      gLse[row] = query && sum != 0.f ? origin + logf(sum) : -INFINITY;
    }
  }
  auto* gO = static_cast<float*>(p.o) + (tile.token0 * p.heads_q + tile.head) * p.head_dim_v;
  store<B>(o, factor, p.head_dim_v, [&](int row) {
    return row < tile.rows ? gO + int64_t(row) * p.heads_q * p.head_dim_v : nullptr;
  });
}

// --- backward ---

template <class B>
struct BackwardStorage {
  typename B::Rows q, dout, k, v;
  typename B::Scores scores;  // P or dS
};

// Queries from i0 on of a head, of which the row has `len`: token0 is its first one in the array.
template <class B>
__device__ void load_queries(BackwardStorage<B>& shared, const BackwardParams& p, int64_t token0,
                             int head, int i0, int len) {
  const AttentionParams& fwd = p.fwd;
  const auto* gQ = static_cast<const float*>(fwd.q) + head * fwd.q_head_stride;
  const auto* gDo = static_cast<const float*>(p.dout) + int64_t(head) * fwd.head_dim_v;
  const int64_t stride = int64_t(fwd.heads_q) * fwd.head_dim_v;
  load<B>(shared.q, len - i0, fwd.head_dim,
          [&](int row) { return gQ + (token0 + i0 + row) * fwd.q_token_stride; });
  load<B>(shared.dout, len - i0, fwd.head_dim_v,
          [&](int row) { return gDo + (token0 + i0 + row) * stride; });
}

// P_ij (what dropout leaves of it) and dS_ij of blocks that are in shared memory. gRows: {L_i in
// log2 units, D_i} of the row's queries.
template <class B>
__device__ void score_gradients(typename B::Block& p, typename B::Block& ds,
                                const BackwardStorage<B>& shared, const AttentionParams& fwd,
                                const GeneralScore& score, const float2* gRows, int i0, int j0) {
  typename B::Block slope;
  multiply<B>(p, shared.q, shared.k, fwd.head_dim);
  multiply<B>(ds, shared.dout, shared.v, fwd.head_dim_v);
  const auto for_each = [&](auto f) { for_each_score<B>(p, i0, j0, f); };
  score.cap(for_each);
#pragma unroll
  for (int r = 0; r < B::kM; ++r) {
#pragma unroll
    for (int c = 0; c < B::kM; ++c) slope[r][c] = score.slope(p[r][c]);
  }
  score.shift(for_each);
#pragma unroll
  for (int r = 0; r < B::kM; ++r) {
    const int i = i0 + thread_y() + r * kSide;
    const float2 row = i < score.len_q ? gRows[i] : float2{INFINITY, 0.f};  // {L_i, D_i}
#pragma unroll
    for (int c = 0; c < B::kM; ++c) {
      const int j = j0 + thread_x() + c * kSide;
      const bool seen = i < score.len_q && j >= score.mask.lo(i) && j < score.mask.hi(i);
      const float factor = fwd.seeds ? dropout_factor(score, i, j) : 1.f;
      p[r][c] = seen ? exp2f(fmaf(p[r][c], kLog2e, -row.x)) : 0.f;
      ds[r][c] = seen ? p[r][c] * (factor * ds[r][c] - row.y) * slope[r][c] : 0.f;
      p[r][c] *= factor;
    }
  }
}

// Of a row's first query: where {L, D} of a head are.
__device__ const float2* rows_of(const BackwardParams& p, int b, int head) {
  const AttentionParams& fwd = p.fwd;
  return p.rows + b * fwd.lse_row_stride + head * fwd.lse_head_stride +
         (fwd.q_start ? fwd.q_start[b] : 0);
}

// dK_j and dV_j, for the heads of a group one after the other.
template <class B>
__global__ void __launch_bounds__(kThreads, 1)
    bwd_keys_float32(const __grid_constant__ BackwardParams params) {
  extern __shared__ __align__(16) unsigned char raw_shared[];
  auto& shared = *reinterpret_cast<BackwardStorage<B>*>(raw_shared);
  constexpr int kB = B::kB, kM = B::kM;
  const AttentionParams& fwd = params.fwd;

  const KeyTile keys = locate_keys<kB>(params);
  if (keys.rows <= 0) return;
  const int b = max(keys.b, 0), group = fwd.heads_q / fwd.heads_kv, len_q = row_len_q(fwd, b);
  const int64_t token0 = fwd.q_start ? int64_t(fwd.q_start[b]) : int64_t(b) * fwd.len_q;
  const IntervalMask mask(len_q, keys.len_kv, fwd.window_left, fwd.window_right, fwd.top_left);
  const Interval seeing = mask.rows_seeing(keys.row0, keys.row0 + kB, len_q);
  load_keys<B>(shared.k, fwd.k, KvRow(fwd.kv, b, fwd.k.rows), keys.head, keys.row0, keys.len_kv,
               fwd.head_dim);
  load_keys<B>(shared.v, fwd.v, KvRow(fwd.kv, b, fwd.v.rows), keys.head, keys.row0, keys.len_kv,
               fwd.head_dim_v);

  typename B::Sums dk = {}, dv = {};
  for (int head = keys.head * group; head < (keys.head + 1) * group; ++head) {
    const GeneralScore score(fwd, b, head, len_q, mask);
    const float2* gRows = rows_of(params, b, head);
    for (int i0 = seeing.lo / kB * kB; i0 < seeing.hi; i0 += kB) {
      load_queries<B>(shared, params, token0, head, i0, len_q);
      __syncthreads();  // Q_i and dO_i are there, at first K_j and V_j too
      typename B::Block p, ds;
      score_gradients<B>(p, ds, shared, fwd, score, gRows, i0, keys.row0);
      share<B, true>(shared.scores, p);
      __syncthreads();  // P^T is there
      add_product<B>(dv, shared.scores, shared.dout);
      __syncthreads();  // all threads are done with it
      share<B, true>(shared.scores, ds);
      __syncthreads();  // dS^T is there
      add_product<B>(dk, shared.scores, shared.q);
      __syncthreads();  // all threads are done with it, and with Q_i and dO_i
    }
  }

  float dk_factor[kM], dv_factor[kM];
#pragma unroll
  for (int r = 0; r < kM; ++r) {
    const bool live = keys.row0 + thread_y() + r * kSide < keys.len_kv;
    dk_factor[r] = live ? fwd.scale : 0.f;
    dv_factor[r] = live ? 1.f : 0.f;
  }
  const auto write = [&](const typename B::Sums& sums, const float (&factor)[kM], void* out,
                         int64_t row_stride, int64_t token_stride, int dims) {
    float* gX = static_cast<float*>(out) + (fwd.q_start ? 0 : keys.b * row_stride) +
                keys.token0 * token_stride + int64_t(keys.head) * dims;
    store<B>(sums, factor, dims,
             [&](int row) { return row < keys.rows ? gX + row * token_stride : nullptr; });
  };
  write(dk, dk_factor, params.dk, params.dk_row_stride, params.dk_token_stride, fwd.head_dim);
  write(dv, dv_factor, params.dv, params.dv_row_stride, params.dv_token_stride, fwd.head_dim_v);
}

// dQ_i
template <class B>
__global__ void __launch_bounds__(kThreads, 1)
    bwd_queries_float32(const __grid_constant__ BackwardParams params) {
  extern __shared__ __align__(16) unsigned char raw_shared[];
  auto& shared = *reinterpret_cast<BackwardStorage<B>*>(raw_shared);
  constexpr int kB = B::kB, kM = B::kM;
  const AttentionParams& fwd = params.fwd;

  const QueryTile tile = locate_tile<kB>(fwd);
  if (tile.rows <= 0) return;
  const Walk<B> walk(fwd, tile);
  const GeneralScore score(fwd, walk.b, tile.head, tile.len_q, walk.mask);
  const float2* gRows = rows_of(params, walk.b, tile.head);
  load_queries<B>(shared, params, tile.token0 - tile.row0, tile.head, tile.row0, tile.len_q);

  typename B::Sums dq = {};
  for (int j0 = walk.begin; j0 < walk.end; j0 += kB) {
    load_keys<B>(shared.k, fwd.k, walk.k_row, walk.head_kv, j0, walk.len_kv, fwd.head_dim);
    load_keys<B>(shared.v, fwd.v, walk.v_row, walk.head_kv, j0, walk.len_kv, fwd.head_dim_v);
    __syncthreads();  // K_j and V_j are there, at first Q_i and dO_i too
    typename B::Block p, ds;
    score_gradients<B>(p, ds, shared, fwd, score, gRows, tile.row0, j0);
    share<B, false>(shared.scores, ds);
    __syncthreads();  // dS is there
    add_product<B>(dq, shared.scores, shared.k);
    __syncthreads();  // all threads are done with it, and with K_j and V_j
  }

  float factor[kM];
#pragma unroll
  for (int r = 0; r < kM; ++r) {
    factor[r] = tile.row0 + thread_y() + r * kSide < tile.len_q ? fwd.scale : 0.f;
  }
  float* gDq = static_cast<float*>(params.dq) + tile.token0 * params.dq_token_stride +
               tile.head * fwd.q_head_stride;
  store<B>(dq, factor, fwd.head_dim,
           [&](int row) { return row < tile.rows ? gDq + row * params.dq_token_stride : nullptr; });
}

// --- launches ---

template <class Launch>
cudaError_t with_blocks(const AttentionParams& p, Launch launch) {
  switch (float32_dim(p)) {
    case 64:
      return launch.template operator()<64>();
    case 128:
      return launch.template operator()<128>();
    default:
      return launch.template operator()<kFloat32MaxDim>();
  }
}

template <class B>
dim3 grid_of_queries(const AttentionParams& p) {
  const FwdGrid grid = fwd_sm80_grid(p, FwdTile{B::kB, B::kB, kThreads / 32, 1});
  return {grid.section, grid.tiles, grid.sections};
}

}  // namespace

cudaError_t launch_fwd_float32(const AttentionParams& p, cudaStream_t stream) {
  return with_blocks(p, [&]<int kDim>() {
    using B = ForwardBlocks<kDim>;
    return launch(fwd_float32<B>, grid_of_queries<B>(p), kThreads, sizeof(ForwardStorage<B>),
                  stream, /*beside_previous=*/false, p);
  });
}

cudaError_t launch_bwd_float32(const BackwardParams& p, cudaStream_t stream) {
  return with_blocks(p.fwd, [&]<int kDim>() {
    using B = BackwardBlocks<kDim>;
    constexpr int kBytes = sizeof(BackwardStorage<B>);
    static_assert(kBytes <= 99 << 10);
    const int64_t blocks = bwd_keys_blocks(p, B::kB);
    cudaError_t error = cudaSuccess;
    if (blocks > 0) {
      error = launch(bwd_keys_float32<B>, dim3(unsigned(blocks)), kThreads, kBytes, stream,
                     /*beside_previous=*/false, p);
    }
    if (error != cudaSuccess) return error;
    return launch(bwd_queries_float32<B>, grid_of_queries<B>(p.fwd), kThreads, kBytes, stream,
                  /*beside_previous=*/false, p);
  });
}

}  // namespace jax_fa
