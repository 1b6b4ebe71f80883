// The last step of a split decode: merges the splits' normalized partials of a row by their lse,
// and adds the sink. Also how any decode result is stored.
#pragma once

#include "decode/fragments.cuh"
#include "params.h"
#include "ptx.cuh"

namespace jax_fa::decode {

constexpr int kMaxSplits = 256;

// Four dims of one output row, and with the first of them its lse. `lse` is without the sink.
template <DType kDType>
__device__ void store_row(const AttentionParams& p, int b, int token, int head, int dim, float4 o,
                          float lse) {
  if (p.sinks) {
    // softmax without a sink keeps the share 1 / (1 + e^(sink - lse)) of what it had
    const float sink = p.sinks[int64_t(b) * p.heads_q + head];
    const float top = fmaxf(lse, sink);
    const float own = lse == -INFINITY ? 0.f : __expf(lse - top);
    const float all = own + (sink == -INFINITY ? 0.f : __expf(sink - top));
    const float share = own == 0.f ? 0.f : own / all;
    o = {o.x * share, o.y * share, o.z * share, o.w * share};
    lse = all == 0.f ? -INFINITY : top + __logf(all);
  }
  const int64_t row = (int64_t(b) * p.len_q + token) * p.heads_q + head;
  *reinterpret_cast<uint2*>(static_cast<uint16_t*>(p.o) + row * p.head_dim_v + dim) = {
      pack<kDType>(o.x, o.y), pack<kDType>(o.z, o.w)};
  if (dim == 0 && p.lse) p.lse[b * p.lse_row_stride + head * p.lse_head_stride + token] = lse;
}

// Four dims of a split's normalized part of an output row, and with the first of them its lse. A
// split without keys writes the lse alone.
__device__ inline void store_partial(const AttentionParams& p, const SplitScratch& scratch,
                                     int split, int b, int token, int head, int dim, float4 o,
                                     float lse) {
  const int64_t row = (int64_t(b) * p.len_q + token) * p.heads_q + head;
  const int64_t part = int64_t(split) * p.total_q * p.heads_q + row;
  if (lse != -INFINITY) *reinterpret_cast<float4*>(scratch.o + part * p.head_dim_v + dim) = o;
  if (dim == 0) scratch.lse[part] = lse;
}

// Lets the combine kernel's blocks take their places while the last of this grid's run.
__device__ inline void allow_combine() {
#if __CUDA_ARCH__ >= 900
  ptx::launch_dependents();
#endif
}

__device__ inline float warp_max(float x) {
#pragma unroll
  for (int d = 1; d < 32; d *= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, d));
  return x;
}

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int d = 1; d < 32; d *= 2) x += __shfl_xor_sync(~0u, x, d);
  return x;
}

// A block merges one row of the output: kLanes threads span its dims, four each, and kParts such
// groups take the splits in turn.
template <int kHeadDim, DType kDType>
struct Combine {
  static constexpr int kLanes = kHeadDim / 4, kParts = 8, kThreads = kLanes * kParts;
};

// grid (batch x len_q x heads_q)
template <int kHeadDim, DType kDType>
__global__ void __launch_bounds__(Combine<kHeadDim, kDType>::kThreads)
    combine_kernel(const AttentionParams p, const SplitScratch scratch) {
  using T = Combine<kHeadDim, kDType>;
  __shared__ float sWeight[kMaxSplits], sLse;
  __shared__ float4 sO[T::kParts][T::kLanes];
#if __CUDA_ARCH__ >= 900
  ptx::wait_for_previous_grid();
#endif
  const int64_t row = blockIdx.x, rows = int64_t(p.total_q) * p.heads_q;

  if (threadIdx.x < 32) {  // weights of the splits, and the row's lse
    float lse[kMaxSplits / 32], top = -INFINITY, sum = 0.f;
#pragma unroll
    for (int i = 0; i < kMaxSplits / 32; ++i) {
      const int split = i * 32 + threadIdx.x;
      lse[i] = split < scratch.splits ? scratch.lse[split * rows + row] : -INFINITY;
      top = fmaxf(top, lse[i]);
    }
    top = warp_max(top);
#pragma unroll
    for (int i = 0; i < kMaxSplits / 32; ++i) {
      lse[i] = lse[i] == -INFINITY ? 0.f : __expf(lse[i] - top);
      sum += lse[i];
    }
    sum = warp_sum(sum);
#pragma unroll
    for (int i = 0; i < kMaxSplits / 32; ++i) {
      const int split = i * 32 + threadIdx.x;
      if (split < scratch.splits) sWeight[split] = lse[i] == 0.f ? 0.f : lse[i] / sum;
    }
    if (threadIdx.x == 0) sLse = sum == 0.f ? -INFINITY : top + __logf(sum);
  }
  __syncthreads();  // the weights are there

  const int lane = threadIdx.x % T::kLanes, part = threadIdx.x / T::kLanes, dim = lane * 4;
  float4 o = {};
  if (dim < p.head_dim_v) {
#pragma unroll 4
    for (int split = part; split < scratch.splits; split += T::kParts) {
      const float weight = sWeight[split];
      if (weight == 0.f) continue;  // perhaps an empty split, which writes no partial
      const float4 x = __ldcs(
          reinterpret_cast<const float4*>(scratch.o + (split * rows + row) * p.head_dim_v + dim));
      o = {o.x + weight * x.x, o.y + weight * x.y, o.z + weight * x.z, o.w + weight * x.w};
    }
  }
  sO[part][lane] = o;
  __syncthreads();  // all parts are there
  if (part > 0 || dim >= p.head_dim_v) return;
#pragma unroll
  for (int i = 1; i < T::kParts; ++i) {
    const float4 x = sO[i][lane];
    o = {o.x + x.x, o.y + x.y, o.z + x.z, o.w + x.w};
  }
  const int head = row % p.heads_q, token = row / p.heads_q % p.len_q;
  store_row<kDType>(p, row / p.heads_q / p.len_q, token, head, dim, o, sLse);
}

template <int kHeadDim, DType kDType>
cudaError_t launch_combine(const AttentionParams& p, const SplitScratch& scratch,
                           cudaStream_t stream) {
  cudaFuncAttributes compiled;
  const cudaError_t error = cudaFuncGetAttributes(&compiled, combine_kernel<kHeadDim, kDType>);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute overlap = {};  // only code for sm_90 waits where it must
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = compiled.ptxVersion >= 90;

  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(p.batch * p.len_q * p.heads_q);
  config.blockDim = dim3(Combine<kHeadDim, kDType>::kThreads);
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, combine_kernel<kHeadDim, kDType>, p, scratch);
}

}  // namespace jax_fa::decode
