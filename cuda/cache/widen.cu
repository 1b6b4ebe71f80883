// Keys and values of 8 bits to arrays of the queries' type, once for all tiles of queries that a
// prefill reads them with, where its launch does not do that meanwhile (sm90/copier.cuh).
//
// A warp takes kTokens tokens of keys or of values, with all their heads, as far as prefill reads
// them; the others are left as they are. H200, 8 x 8704 tokens, 8 heads of 128, int8 with
// a scale for each: keys and values to bfloat16 in 117 us.
#include <algorithm>

#include "../dtypes.h"
#include "../mask.cuh"
#include "../rows.cuh"
#include "widen.cuh"

namespace jax_fa::widen {
namespace {

constexpr int kWarps = 4, kTokens = 8;
constexpr int kMargin = 512;  // at least the queries and the keys of a tile of any prefill kernel

__host__ __device__ int chunks_of(const KvTensor& x) {
  return (x.tokens + kWarps * kTokens - 1) / (kWarps * kTokens);
}

// The tokens of an array's row that may lie in a tile of keys with one that a query of its batch
// rows sees: [first, end). All of a warp's lanes call it.
__device__ int2 read_tokens(const AttentionParams& p, int row, int rows) {
  int first = INT_MAX, end = 0;
  for (int b = row + threadIdx.x % 32 * rows; b < p.batch; b += 32 * rows) {
    const int len_q = row_len_q(p, b), len_kv = row_len_kv(p, b);
    if (len_q == 0) continue;
    const IntervalMask mask(len_q, len_kv, p.window_left, p.window_right, p.top_left);
    first = min(first, mask.lo(0) - kMargin);
    end = max(end, min(mask.hi(len_q - 1) + kMargin, len_kv));
  }
  first = __reduce_min_sync(0xffffffff, first);
  return {max(first, 0), __reduce_max_sync(0xffffffff, end)};
}

// Those of a warp's tokens, from token0 on, in [begin, end).
template <DType kFormat, DType kDType>
__device__ void widen_tokens(const KvTensor& x, const KvTensor& wide, int heads, int dim, int row,
                             int token0, int begin, int end) {
  const int vectors = dim / kCopiedDims, group = dim / max(x.groups, 1);
  const auto* gRow = static_cast<const char*>(x.data) + row * x.row_stride;
  uint4* const gWide = static_cast<uint4*>(const_cast<void*>(wide.data)) +
                       (row * wide.row_stride + token0 * wide.token_stride) / kCopiedDims;

  for (int i = threadIdx.x % 32; i < heads * vectors; i += 32) {
    const int head = i / vectors, d = i % vectors * kCopiedDims;
    const char* const gBytes = gRow + token0 * x.token_stride + head * x.head_stride + d;
    const int64_t scale0 = row * x.scale_row_stride + head * x.scale_head_stride +
                           token0 * x.scale_token_stride + d / group;
    uint2 bytes[kTokens];
    float scale[kTokens];
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      if (t < begin || t >= end) continue;
      bytes[t] = __ldcs(reinterpret_cast<const uint2*>(gBytes + t * x.token_stride));
      scale[t] = x.scale ? x.scale[scale0 + t * x.scale_token_stride] : 1.f;
    }
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      if (t < begin || t >= end) continue;
      gWide[t * heads * vectors + i] =
          scaled<kDType>(to_halves(kFormat, bytes[t].x), to_halves(kFormat, bytes[t].y), scale[t]);
    }
  }
}

// Grid (chunks of tokens of all rows, keys and values).
template <DType kDType>
__global__ void __launch_bounds__(kWarps * 32)
    widen_cache(const __grid_constant__ AttentionParams p,
                const __grid_constant__ CopiedCache copied) {
  const bool values = blockIdx.y == 1;
  const KvTensor &x = values ? copied.v : copied.k, &wide = values ? p.v : p.k;
  const int dim = values ? p.head_dim_v : p.head_dim;
  const int chunks = chunks_of(x), row = blockIdx.x / chunks;
  if (row >= x.rows) return;
  const int2 read = read_tokens(p, row, x.rows);
  const int token0 = (blockIdx.x % chunks * kWarps + threadIdx.x / 32) * kTokens;
  const int begin = max(token0, read.x) - token0, end = min(token0 + kTokens, read.y) - token0;
  if (begin >= end) return;
  const auto run = [&]<DType kFormat>() {
    widen_tokens<kFormat, kDType>(x, wide, p.heads_kv, dim, row, token0, begin, end);
  };
  if (x.dtype == DType::kInt8) return run.template operator()<DType::kInt8>();
  if (x.dtype == DType::kE4M3) return run.template operator()<DType::kE4M3>();
  run.template operator()<DType::kE5M2>();
}

}  // namespace
}  // namespace jax_fa::widen

namespace jax_fa {

cudaError_t launch_widen(const AttentionParams& p, const CopiedCache& copied, cudaStream_t stream) {
  using namespace widen;
  const int rows = std::max(p.k.rows, p.v.rows);
  const dim3 grid(rows * chunks_of(p.k), 2);
  return with_16_bits(p.dtype, [&]<DType kDType>() {
    widen_cache<kDType><<<grid, kWarps * 32, 0, stream>>>(p, copied);
    return cudaGetLastError();
  });
}

}  // namespace jax_fa
