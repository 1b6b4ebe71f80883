// Decode: the last few queries of every row against a long cache, read once.
//
// S^T = K Q^T and O^T = V^T P^T: keys and dims fill the 16 rows of an mma, and the queries that
// share a key head (its G heads x T tokens, "columns") fill its 8 columns. A lane copies just those
// bytes of the cache that it feeds to the mma (fragments.cuh), through a queue of its own in shared
// memory (reader.cuh): nothing is transposed and no warp waits for another.
//
// grid (heads_kv x groups of columns, splits, batch). A block takes an equal share of its row's own
// tiles, its warps take these in turn, each with a softmax of its own. They merge through shared
// memory; splits merge in a second launch (combine.cuh).
#include "decode/combine.cuh"
#include "decode/fragments.cuh"
#include "decode/reader.cuh"
#include "decode/splits.h"
#include "kv.cuh"
#include "mask.cuh"
#include "params.h"
#include "ptx.cuh"
#include "score.cuh"

namespace jax_fa::decode {
namespace {

// A maximum below all scores, yet finite: exp2(-inf - kNoMax) is 0, not NaN.
#ifndef JF_WARPS
#define JF_WARPS 4
#endif
#ifndef JF_ST
#define JF_ST 2
#endif
#ifndef JF_KT8
#define JF_KT8 2
#endif
#ifndef JF_MB
#define JF_MB 3
#endif
constexpr float kNoMax = -1e30f;

template <int kHeadDim_, DType kDType_, typename KeyFormat_, typename ValueFormat_,
          int kColumnTiles_, bool kWholeTiles_ = true>
struct Traits {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr DType kDType = kDType_;
  using KeyFormat = KeyFormat_;
  using ValueFormat = ValueFormat_;

  static constexpr int kWarps = JF_WARPS, kThreads = kWarps * 32;
  static constexpr bool kWholeTiles = kWholeTiles_;
  static constexpr int kColumnTiles = kColumnTiles_, kColumns = kColumnTiles * 8;
  // Keys of a step, in mma tiles of 16: where registers allow, 4 KB of keys and as much of values
  static constexpr int kKeyTiles =
      kHeadDim / KeyFormat::kElements * KeyFormat::kBytes <= 128 &&
              kHeadDim / ValueFormat::kElements * ValueFormat::kBytes <= 128 && kColumnTiles <= 2
          ? (KeyFormat::kTokenScale ? JF_KT8 : 2)
          : 1;
  static constexpr int kStepKeys = kKeyTiles * 16;
  // Steps of a warp in flight or in use. 12 warps with two of 8 KB hold more than the 40 KB that an
  // H200's SM needs in flight, and leave time to compute.
  static constexpr int kStages = JF_ST;
  static constexpr int kMinBlocks = kHeadDim <= 128 && kColumnTiles == 1 ? JF_MB : kHeadDim <= 192 && kColumnTiles <= 2 ? 2 : 1;

  using KeyReader = RowReader<KeyFormat, kHeadDim, 4, kWholeTiles>;
  using ValueReader = RowReader<ValueFormat, kHeadDim, 8, kWholeTiles>;
  static constexpr int kQSteps = KeyReader::kVectors * KeyFormat::kElements / 4;
  static constexpr int kDimTiles = ValueReader::kVectors * ValueFormat::kElements / 2;
};

// One of the queries that a block carries: a token of one of the heads that share a key head.
struct Column {
  int token, head;  // token -1: there is none
  int position;     // the key that it is aligned with, from where ALiBi and the window count
  Interval keys;    // that it sees
};

// A step of one warp.
template <typename T>
struct Stage {
  typename T::KeyReader::Tile keys[T::kKeyTiles];
  typename T::ValueReader::Tile values[T::kKeyTiles];
};

template <typename T>
struct SharedStorage {
  union {
    Stage<T> stages[T::kWarps][T::kStages];
    // after the loop; padded: the lanes of a quad write rows that lie 8 banks apart
    float o[T::kWarps][T::kColumns][T::kHeadDim + 4];
  };
  uint2 q[T::kQSteps][T::kColumnTiles][32];  // B fragments, by lane
  float max_log2[T::kWarps][T::kColumns], sum[T::kWarps][T::kColumns];
  Column columns[T::kColumns];
};

// The keys that a block reads.
struct Share {
  Interval any, all;  // keys that any, and that all, of the row's tokens see
  int first_step, end_step;

  __device__ Share(const IntervalMask& mask, int len_q, int step_keys, int split, int splits)
      : any(mask.seen_by_any(0, len_q)), all(mask.seen_by_all(0, len_q)) {
    const int begin = any.lo / step_keys;
    const int end = any.hi <= any.lo ? begin : (any.hi + step_keys - 1) / step_keys;
    first_step = begin + int64_t(end - begin) * split / splits;
    end_step = begin + int64_t(end - begin) * (split + 1) / splits;
  }

  __device__ bool all_see(int key, int keys) const { return key >= all.lo && key + keys <= all.hi; }
};

__device__ IntervalMask row_mask(const AttentionParams& p, int b) {
  const int len = p.kv.length ? min(max(p.kv.length[b], 0), p.kv.len_kv) : p.kv.len_kv;
  return {p.len_q, len, p.window_left, p.window_right};
}

// Column i of the block's kColumns: heads of the group vary fastest.
__device__ Column make_column(const AttentionParams& p, const IntervalMask& mask, int head_kv,
                              int i) {
  const int heads_group = p.heads_q / p.heads_kv, token = i / heads_group;
  if (token >= p.len_q) return {-1, 0, 0, {0, 0}};
  return {token, head_kv * heads_group + i % heads_group, mask.diagonal + token,
          {mask.lo(token), mask.hi(token)}};
}

// Q^T as B fragments. Lane (g, c) of step i holds, for column g, the four dims that lane (., c)
// takes from a row of K in step i. Columns and dims that do not exist are zero.
template <typename T>
__device__ void load_q(SharedStorage<T>& smem, const AttentionParams& p, int b) {
  using Format = typename T::KeyFormat;
  constexpr int kStepsPerVector = Format::kElements / 4;
  uint2* const sQ = &smem.q[0][0][0];
  for (int i = threadIdx.x; i < T::kQSteps * T::kColumnTiles * 32; i += T::kThreads) {
    const int lane = i % 32, tile = i / 32 % T::kColumnTiles, step = i / 32 / T::kColumnTiles;
    const Column& column = smem.columns[tile * 8 + lane / 4];
    const int dim = (step / kStepsPerVector * 4 + lane % 4) * Format::kElements +
                    step % kStepsPerVector * 4;
    uint2 x = {};
    if (column.token >= 0 && dim < p.head_dim) {
      const int64_t offset = (int64_t(b) * p.len_q + column.token) * p.q_token_stride +
                             column.head * p.q_head_stride + dim;
      x = __ldg(reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(p.q) + offset));
      if constexpr (Format::kMma != T::kDType) {
        const float2 lo = unpack<T::kDType>(x.x), hi = unpack<T::kDType>(x.y);
        x = {pack<Format::kMma>(lo.x, lo.y), pack<Format::kMma>(hi.x, hi.y)};
      }
    }
    sQ[i] = x;
  }
}

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
  const SharedStorage<T>& smem;

  __device__ explicit Consumer(const SharedStorage<T>& smem) : smem(smem) {
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
        for_columns([&](int n, int e) {
          f(s[i][n][half * 2 + e], i * 16 + half * 8 + g, i, half, n, e);
        });
      }
    }
  }

  __device__ void gemm_qk(TileScores& s, const typename KeyReader::Tile& sK,
                          const KeyReader& reader) const {
    constexpr int kStepsPerVector = T::KeyFormat::kElements / 4;
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
          mma<T::KeyFormat::kMma>(s[n], a, sQ[n][threadIdx.x % 32]);
        }
      }
    }
  }

  // From q.k to scores in the log2 domain.
  __device__ void modify(Scores& s, const TokenScales& k_scale, int key0, const AttentionParams& p,
                         int b) const {
    const float scale = p.softcap > 0.f ? p.scale : p.scale * kLog2e;
    for_scores(s, [&](float& x, int, int i, int half, int, int) {
      x *= T::KeyFormat::kTokenScale ? scale * k_scale[i][half] : scale;
    });
    if (p.softcap > 0.f) {
      const Softcap softcap{p.softcap};
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
      for_columns([&](int n, int e) {
        float& m = max_log2[n][e];
        float m_new = fmaxf(m, top[n][e]);
#pragma unroll
        for (int d = 4; d < 32; d *= 2) m_new = fmaxf(m_new, __shfl_xor_sync(~0u, m_new, d));
        const float shrink = ptx::exp2(m - m_new);
        m = m_new;
        sum[n][e] *= shrink;
#pragma unroll
        for (int i = 0; i < T::kDimTiles; ++i) {
          acc[n][i][e] *= shrink;
          acc[n][i][e + 2] *= shrink;
        }
      });
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
  __device__ void publish(SharedStorage<T>& smem) {
    constexpr int kTilesPerVector = T::ValueFormat::kElements / 2;
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
    for_columns([&](int n, int e) {
      const int column = n * 8 + c * 2 + e;
#pragma unroll
      for (int d = 4; d < 32; d *= 2) sum[n][e] += __shfl_xor_sync(~0u, sum[n][e], d);
      if (g == 0) {
        smem.max_log2[warp][column] = max_log2[n][e];
        smem.sum[warp][column] = sum[n][e];
      }
#pragma unroll
      for (int tile = 0; tile < T::kDimTiles; tile += 2) {  // a lane's dims are consecutive
        const int dim = (tile / kTilesPerVector * 8 + g) * T::ValueFormat::kElements +
                        tile % kTilesPerVector * 2;
        const auto &lo = acc[n][tile], &hi = acc[n][tile + 1];
        if (dim < T::kHeadDim) {
          *reinterpret_cast<float4*>(&smem.o[warp][column][dim]) =
              make_float4(lo[e], lo[e + 2], hi[e], hi[e + 2]);
        }
      }
    });
  }
};

// Sums the warps' parts: four dims of a column a thread. Without splits this is the result.
template <typename T>
__device__ void merge_and_store(const SharedStorage<T>& smem, const AttentionParams& p,
                                const SplitScratch& scratch, int b, int split) {
  constexpr int kVectors = T::kHeadDim / 4;
  for (int i = threadIdx.x; i < T::kColumns * kVectors; i += T::kThreads) {
    const int c = i / kVectors, dim = i % kVectors * 4;
    const Column& column = smem.columns[c];
    if (column.token < 0 || dim >= p.head_dim_v) continue;
    float max_log2 = kNoMax, sum = 0.f;
    float4 o = {};
#pragma unroll
    for (int w = 0; w < T::kWarps; ++w) max_log2 = fmaxf(max_log2, smem.max_log2[w][c]);
#pragma unroll
    for (int w = 0; w < T::kWarps; ++w) {
      const float weight = ptx::exp2(smem.max_log2[w][c] - max_log2);
      const float4 x = *reinterpret_cast<const float4*>(&smem.o[w][c][dim]);
      sum += weight * smem.sum[w][c];
      o = {o.x + weight * x.x, o.y + weight * x.y, o.z + weight * x.z, o.w + weight * x.w};
    }
    const float lse = sum == 0.f ? -INFINITY : (max_log2 + ptx::log2(sum)) * kLn2;
    const float inverse = sum == 0.f ? 0.f : 1.f / sum;
    o = {o.x * inverse, o.y * inverse, o.z * inverse, o.w * inverse};
    if (scratch.splits > 1) {
      store_partial(p, scratch, split, b, column.token, column.head, dim, o, lse);
    } else {
      store_row<T::kDType>(p, b, column.token, column.head, dim, o, lse);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(T::kThreads, T::kMinBlocks)
    decode_kernel(const AttentionParams p, const SplitScratch scratch) {
  extern __shared__ __align__(16) char smem_bytes[];
  auto& smem = *reinterpret_cast<SharedStorage<T>*>(smem_bytes);
  allow_combine();

  const int b = blockIdx.z, split = blockIdx.y;
  const int head_kv = blockIdx.x % p.heads_kv, column_group = blockIdx.x / p.heads_kv;
  const IntervalMask mask = row_mask(p, b);
  const Share share(mask, p.len_q, T::kStepKeys, split, scratch.splits);
  const RowKeys<T::kWholeTiles> keys(p.kv, b, share.any);
  const typename T::KeyReader key_reader(p.k, p.kv, b, head_kv, p.head_dim);
  const typename T::ValueReader value_reader(p.v, p.kv, b, head_kv, p.head_dim_v);
  Stage<T>* const stages = smem.stages[threadIdx.x / 32];
  const auto copy = [&](int step, int stage) {  // one group of copies, empty past the end
    if (step < share.end_step) {
#pragma unroll
      for (int i = 0; i < T::kKeyTiles; ++i) {
        const int key0 = step * T::kStepKeys + i * 16;
        const KeyTile tile = keys.tile(key0, keys.find_page(key0));
        key_reader.copy(stages[stage].keys[i], keys, tile);
        value_reader.copy(stages[stage].values[i], keys, tile);
      }
    }
    ptx::cp_async_commit();
  };

  int step = share.first_step + threadIdx.x / 32, stage = 0;
#pragma unroll
  for (int i = 0; i < T::kStages; ++i) copy(step + i * T::kWarps, i);
  if (threadIdx.x < T::kColumns) {
    const int i = column_group * T::kColumns + threadIdx.x;
    smem.columns[threadIdx.x] = make_column(p, mask, head_kv, i);
  }
  __syncthreads();  // columns are known
  load_q(smem, p, b);
  __syncthreads();  // Q is in shared memory

  Consumer<T> consumer(smem);
  for (; step < share.end_step; step += T::kWarps) {
    const int key0 = step * T::kStepKeys;
    ptx::cp_async_wait<T::kStages - 1>();  // this step's copies, which no other lane reads
    const Stage<T>& now = stages[stage];
    typename Consumer<T>::Scores s = {};
    typename Consumer<T>::TokenScales k_scale, v_scale;
#pragma unroll
    for (int i = 0; i < T::kKeyTiles; ++i) {
      consumer.gemm_qk(s[i], now.keys[i], key_reader);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        k_scale[i][half] = key_reader.read_token_scale(now.keys[i], half);
        v_scale[i][half] = value_reader.read_token_scale(now.values[i], half);
      }
    }
    consumer.modify(s, k_scale, key0, p, b);
    if (!share.all_see(key0, T::kStepKeys)) consumer.apply_mask(s, key0);
    consumer.softmax(s, v_scale);
#pragma unroll
    for (int i = 0; i < T::kKeyTiles; ++i) consumer.gemm_pv(s[i], now.values[i], value_reader);
    copy(step + T::kStages * T::kWarps, stage);
    stage = stage + 1 == T::kStages ? 0 : stage + 1;
  }

  ptx::cp_async_wait<0>();
  __syncthreads();  // no warp reads its queue any more: the merge takes its place
  consumer.publish(smem);
  __syncthreads();  // all warps' parts are in shared memory
  merge_and_store(smem, p, scratch, b, split);
}

template <typename T>
cudaError_t launch(const AttentionParams& p, const SplitScratch& scratch, cudaStream_t stream) {
  const int columns = p.heads_q / p.heads_kv * p.len_q;
  const dim3 grid(p.heads_kv * ((columns + T::kColumns - 1) / T::kColumns), scratch.splits,
                  p.batch);
  constexpr int kSharedBytes = sizeof(SharedStorage<T>);
  cudaError_t error = cudaFuncSetAttribute(
      decode_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  decode_kernel<T><<<grid, T::kThreads, kSharedBytes, stream>>>(p, scratch);
  error = cudaGetLastError();
  if (error != cudaSuccess || scratch.splits == 1) return error;
  return launch_combine<T::kHeadDim, T::kDType>(p, scratch, stream);
}

template <int kHeadDim, DType kDType, typename KeyFormat, typename ValueFormat>
cudaError_t launch_columns(const AttentionParams& p, const SplitScratch& scratch,
                           cudaStream_t stream) {
  constexpr int kMost = decode_column_tiles(kHeadDim, 1 << 20);
  const int tiles = decode_column_tiles(kHeadDim, p.heads_q / p.heads_kv * p.len_q);
  if constexpr (kMost >= 4) {
    if (tiles == 4) {
      return launch<Traits<kHeadDim, kDType, KeyFormat, ValueFormat, 4>>(p, scratch, stream);
    }
  }
  if constexpr (kMost >= 2) {
    if (tiles == 2) {
      return launch<Traits<kHeadDim, kDType, KeyFormat, ValueFormat, 2>>(p, scratch, stream);
    }
  }
  return launch<Traits<kHeadDim, kDType, KeyFormat, ValueFormat, 1>>(p, scratch, stream);
}

// Whether all rows of x are aligned for loads of `bytes`.
bool rows_aligned(const KvTensor& x, int head_dim, int64_t bytes) {
  const int64_t element = x.dtype <= DType::kBF16 ? 2 : 1;
  const int64_t all = x.row_stride | x.token_stride | x.head_stride | head_dim;
  return all * element % bytes == 0 && reinterpret_cast<uintptr_t>(x.data) % bytes == 0;
}

}  // namespace
}  // namespace jax_fa::decode

namespace jax_fa {

template <int kHeadDim, DType kDType>
cudaError_t launch_decode(const AttentionParams& p, const SplitScratch& scratch,
                          cudaStream_t stream) {
  using namespace decode;
  // wider loads where they leave no lane of a row without work
  constexpr int kBytes = kHeadDim % 128 == 0 ? 16 : 8;
  using Float = Float16<kDType>;
  using Any = AnyByte<kDType>;
  const bool k_float = p.k.dtype == kDType, v_float = p.v.dtype == kDType;
  const bool whole_tiles = !p.kv.page_table || p.kv.page_size % 16 == 0;
  if (k_float && v_float && whole_tiles) {
    return launch_columns<kHeadDim, kDType, Float, Float>(p, scratch, stream);
  }
  if (whole_tiles && p.k.dtype == p.v.dtype && p.k.groups <= 1 && p.v.groups <= 1 &&
      rows_aligned(p.k, p.head_dim, kBytes) && rows_aligned(p.v, p.head_dim_v, kBytes)) {
    const auto same = [&]<DType kCache>() {
      using Format = Byte<kCache, kBytes>;
      return launch_columns<kHeadDim, kDType, Format, Format>(p, scratch, stream);
    };
    switch (p.k.dtype) {
      case DType::kInt8: return same.template operator()<DType::kInt8>();
      case DType::kE4M3: return same.template operator()<DType::kE4M3>();
      case DType::kE5M2: return same.template operator()<DType::kE5M2>();
      default: return cudaErrorInvalidValue;
    }
  }
  const auto general = [&]<typename KeyFormat, typename ValueFormat>() {
    return launch<Traits<kHeadDim, kDType, KeyFormat, ValueFormat, 1, false>>(p, scratch, stream);
  };
  if (k_float && v_float) return general.template operator()<Float, Float>();
  if (k_float) return general.template operator()<Float, Any>();
  if (v_float) return general.template operator()<Any, Float>();
  return general.template operator()<Any, Any>();
}

template cudaError_t launch_decode<JAX_FA_HEAD_DIM, JAX_FA_DTYPE>(const AttentionParams&,
                                                                  const SplitScratch&,
                                                                  cudaStream_t);

}  // namespace jax_fa
