// What the backward kernels need of each query, and the gradient of sinks, which needs no more:
//
//     rows = {lse in log2 units, delta},  delta = rowsum(dout o) - dlse
//     dsinks[b, head] = -sum over queries of exp(sink - lse) * delta
//
// A query that sees nothing, or that belongs to no row, has lse = -inf: it gets +inf, so that its
// probabilities are exp2(-inf), and delta 0, whatever o, dout and dlse hold there.
#include "../dtypes.h"
#include "../softmax.cuh"
#include "mma.cuh"

namespace jax_fa {
namespace {

constexpr int kThreads = 256;
constexpr int kLanes = 8;  // of one query of one head: 128 bytes of o and dout at a time

template <DType kDType>
struct Chunk {
  using Element = typename Mma<kDType>::Element;
  static constexpr int kSize = 16 / sizeof(Element);
  alignas(16) Element x[kSize];
};

// A block for kGroups adjacent tokens of kHeads adjacent heads: what it reads of o and dout lies
// together, and so do lse, dlse and rows. Lanes read of all these heads at once.
constexpr int kHeads = 4, kGroups = kThreads / kLanes;

template <DType kDType>
__global__ void __launch_bounds__(kThreads)
    bwd_rows_sm80(const __grid_constant__ BackwardParams params) {
  using Elements = Chunk<kDType>;
  const AttentionParams& fwd = params.fwd;
  const int head_blocks = (fwd.heads_q + kHeads - 1) / kHeads;
  const int head0 = int(blockIdx.x % head_blocks) * kHeads, lane = threadIdx.x % kLanes;
  const int token = int(blockIdx.x / head_blocks) * kGroups + threadIdx.x / kLanes;
  const int64_t first = int64_t(min(token, fwd.total_q - 1)) * fwd.heads_q;
  const auto read = [&](const void* x, int h, int c) {
    const int64_t start = (first + min(head0 + h, fwd.heads_q - 1)) * fwd.head_dim_v;
    return reinterpret_cast<const Elements*>(static_cast<const typename Elements::Element*>(x) +
                                             start)[c];
  };

  float sums[kHeads] = {};
  for (int c = lane; c * Elements::kSize < fwd.head_dim_v; c += kLanes) {
    Elements o[kHeads], dout[kHeads];
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      o[h] = read(fwd.o, h, c);
      dout[h] = read(params.dout, h, c);
    }
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
#pragma unroll
      for (int i = 0; i < Elements::kSize; ++i) sums[h] += float(o[h].x[i]) * float(dout[h].x[i]);
    }
  }
  float sum = 0.f;  // lane h keeps that of head h
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) {
      sums[h] += __shfl_xor_sync(0xffffffff, sums[h], step);
    }
    if (lane == h) sum = sums[h];
  }
  const int head = head0 + lane;
  if (lane >= kHeads || head >= fwd.heads_q || token >= fwd.total_q) return;

  const int b = fwd.q_start ? 0 : token / fwd.len_q;
  const int64_t place =
      b * fwd.lse_row_stride + head * fwd.lse_head_stride + (token - b * fwd.len_q);
  const float lse = fwd.lse[place];
  const bool some = lse != -INFINITY;
  params.rows[place] =
      some ? float2{lse * kLog2e, sum - params.dlse[place]} : float2{INFINITY, 0.f};
}

// A block for each (batch row, head), in an order of its own: the same sum every time.
__global__ void __launch_bounds__(kThreads)
    bwd_sinks_sm80(const __grid_constant__ BackwardParams params) {
  __shared__ float sWarps[kThreads / 32];
  const AttentionParams& fwd = params.fwd;
  const int b = blockIdx.x / fwd.heads_q, head = blockIdx.x - b * fwd.heads_q;
  const int length = fwd.q_length ? min(max(fwd.q_length[b], 0), fwd.len_q) : fwd.len_q;
  const float2* gRows = params.rows + b * fwd.lse_row_stride + head * fwd.lse_head_stride +
                        (fwd.q_start ? fwd.q_start[b] : 0);
  const float sink_log2 = fwd.sinks[blockIdx.x] * kLog2e;

  float sum = 0.f;
  for (int i = threadIdx.x; i < length; i += kThreads) {
    const float2 row = gRows[i];
    sum -= ptx::exp2(sink_log2 - row.x) * row.y;
  }
#pragma unroll
  for (int step = 1; step < 32; step *= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
  if (threadIdx.x % 32 == 0) sWarps[threadIdx.x / 32] = sum;
  __syncthreads();  // every warp's part is written
  if (threadIdx.x > 0) return;
  for (int warp = 1; warp < kThreads / 32; ++warp) sum += sWarps[warp];
  params.dsinks[blockIdx.x] = sum;
}

}  // namespace

cudaError_t launch_bwd_rows_sm80(const BackwardParams& params, cudaStream_t stream) {
  const AttentionParams& fwd = params.fwd;
  const int64_t token_blocks = (int64_t(fwd.total_q) + kGroups - 1) / kGroups;
  const int64_t blocks = token_blocks * ((fwd.heads_q + kHeads - 1) / kHeads);
  cudaError_t error = with_float(fwd.dtype, [&]<DType kDType>() {
    bwd_rows_sm80<kDType><<<unsigned(blocks), kThreads, 0, stream>>>(params);
    return cudaGetLastError();
  });
  if (error != cudaSuccess || !params.dsinks) return error;
  bwd_sinks_sm80<<<fwd.batch * fwd.heads_q, kThreads, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace jax_fa
