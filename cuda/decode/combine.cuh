// The last step of a split decode: merges the splits' normalized partials of a row by their lse,
// and adds the sink. Also how any decode result is stored.
#pragma once

#include "decode/fragments.cuh"
#include "decode/work.cuh"
#include "launch.cuh"
#include "params.h"
#include "ptx.cuh"

namespace jax_fa::decode {

// Four dims of one output row, and with the first of them its lse. `lse` is without the sink.
template <bool kPacked>
__device__ void store_row(const AttentionParams& p, const Row<kPacked>& row, int token, int head,
                          int dim, float4 o, float lse) {
  if (p.sinks) {
    // softmax without a sink keeps the share 1 / (1 + e^(sink - lse)) of what it had
    const float sink = p.sinks[int64_t(row.b) * p.heads_q + head];
    const float top = fmaxf(lse, sink);
    const float own = lse == -INFINITY ? 0.f : __expf(lse - top);
    const float all = own + (sink == -INFINITY ? 0.f : __expf(sink - top));
    const float share = own == 0.f ? 0.f : own / all;
    o = {o.x * share, o.y * share, o.z * share, o.w * share};
    lse = all == 0.f ? -INFINITY : top + __logf(all);
  }
  const int64_t index = (row.token0 + token) * p.heads_q + head;
  *reinterpret_cast<uint2*>(static_cast<uint16_t*>(p.o) + index * p.head_dim_v + dim) = {
      pack(p.dtype, o.x, o.y), pack(p.dtype, o.z, o.w)};
  if (dim == 0 && p.lse) p.lse[row.lse_offset(p, token, head)] = lse;
}

// Where in scratch a row of the output has its partials: `parts` of them, from `first` on.
struct Partials {
  int64_t first, stride;
  int parts;
};

// Of a query of a packed row, whose tasks have `columns` columns each.
__device__ inline Partials packed_partials_of(const AttentionParams& p, int2 tasks, int columns,
                                              int len_q, int token, int head) {
  const int heads_group = p.heads_q / p.heads_kv;
  const int column = token * heads_group + head % heads_group;
  const int groups = (len_q * heads_group + columns - 1) / columns;
  const int64_t task = int64_t(tasks.x + column / columns) * p.heads_kv + head / heads_group;
  return {task * columns + column % columns, int64_t(groups) * p.heads_kv * columns, tasks.y};
}

// Four dims of a split's normalized part of an output row, and with the first of them its lse. A
// split without keys writes the lse alone.
__device__ inline void store_partial(const AttentionParams& p, const SplitScratch& scratch,
                                     int64_t index, int dim, float4 o, float lse) {
  if (lse != -INFINITY) *reinterpret_cast<float4*>(scratch.o + index * p.head_dim_v + dim) = o;
  if (dim == 0) scratch.lse[index] = lse;
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

// A block merges rows of the output, one at a time: kLanes threads span its dims, four each, and
// kParts such groups take the splits in turn. Or each of its warps merges one with few splits.
template <int kHeadDim>
struct Combine {
  static constexpr int kLanes = kHeadDim / 4, kParts = 8, kThreads = kLanes * kParts;
  static constexpr int kFew = 32;  // splits: a lane for the weight of each

  struct Shared {
    float weight[kMaxSplits], lse;
    float4 o[kParts][kLanes];
  };

  const AttentionParams& p;
  const SplitScratch& scratch;
  Shared& shared;

  // The splits' weights, and the row's lse.
  __device__ void weigh(const Partials& partials) const {
    float lse[kMaxSplits / 32], top = -INFINITY, sum = 0.f;
#pragma unroll
    for (int i = 0; i < kMaxSplits / 32; ++i) {
      const int part = i * 32 + threadIdx.x;
      lse[i] =
          part < partials.parts ? scratch.lse[partials.first + part * partials.stride] : -INFINITY;
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
      const int part = i * 32 + threadIdx.x;
      if (part < partials.parts) shared.weight[part] = lse[i] == 0.f ? 0.f : lse[i] / sum;
    }
    if (threadIdx.x == 0) shared.lse = sum == 0.f ? -INFINITY : top + __logf(sum);
  }

  template <bool kPacked>
  __device__ void merge_few(const Partials& partials, const Row<kPacked>& row, int token,
                            int head) const {
    const int lane = threadIdx.x % 32;
    const float lse =
        lane < partials.parts ? scratch.lse[partials.first + lane * partials.stride] : -INFINITY;
    const float top = warp_max(lse), share = lse == -INFINITY ? 0.f : __expf(lse - top);
    const float sum = warp_sum(share), weight = share == 0.f ? 0.f : share / sum;
#pragma unroll
    for (int dim0 = 0; dim0 < kHeadDim; dim0 += 128) {
      const int dim = dim0 + lane * 4;
      float4 o = {};
#pragma unroll 4
      for (int part = 0; part < partials.parts; ++part) {
        const float w = __shfl_sync(~0u, weight, part);
        if (w != 0.f && dim < p.head_dim_v) add(o, w, partials, part, dim);
      }
      if (dim < p.head_dim_v) {
        store_row(p, row, token, head, dim, o, sum == 0.f ? -INFINITY : top + __logf(sum));
      }
    }
  }

  // A split's share. An empty one has weight 0 and perhaps no partial.
  __device__ void add(float4& o, float weight, const Partials& partials, int part, int dim) const {
    const int64_t index = partials.first + part * partials.stride;
    const float4 x =
        __ldcs(reinterpret_cast<const float4*>(scratch.o + index * p.head_dim_v + dim));
    o = {o.x + weight * x.x, o.y + weight * x.y, o.z + weight * x.z, o.w + weight * x.w};
  }

  template <bool kPacked>
  __device__ void merge(const Partials& partials, const Row<kPacked>& row, int token,
                        int head) const {
    if (threadIdx.x < 32) weigh(partials);
    __syncthreads();  // the weights are there
    const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes, dim = lane * 4;
    float4 o = {};
    if (dim < p.head_dim_v) {
#pragma unroll 4
      for (int part = group; part < partials.parts; part += kParts) {
        const float weight = shared.weight[part];
        if (weight != 0.f) add(o, weight, partials, part, dim);
      }
    }
    shared.o[group][lane] = o;
    __syncthreads();  // all groups' sums are there
    if (group == 0 && dim < p.head_dim_v) {
#pragma unroll
      for (int i = 1; i < kParts; ++i) {
        const float4 x = shared.o[i][lane];
        o = {o.x + x.x, o.y + x.y, o.z + x.z, o.w + x.w};
      }
      store_row(p, row, token, head, dim, o, shared.lse);
    }
  }
};

// Dense queries: a block for each row of the output, or where there are many in few splits, a warp.
template <int kHeadDim, bool kWarps>
__global__ void __launch_bounds__(Combine<kHeadDim>::kThreads)
    combine_kernel(const AttentionParams p, const SplitScratch scratch) {
  using T = Combine<kHeadDim>;
  __shared__ typename T::Shared shared;
  ptx::wait_for_previous_grid();
  const int i = kWarps ? (blockIdx.x * T::kThreads + threadIdx.x) / 32 : blockIdx.x;
  if (i >= p.total_q * p.heads_q) return;
  const int head = i % p.heads_q, token = i / p.heads_q % p.len_q;
  const Row<false> row(p, i / p.heads_q / p.len_q);
  const Partials partials{i, int64_t(p.total_q) * p.heads_q, scratch.splits};
  const T combine{p, scratch, shared};
  if constexpr (kWarps) {
    combine.merge_few(partials, row, token, head);
  } else {
    combine.merge(partials, row, token, head);
  }
}

// Packed rows: as many blocks as run at once take the heads of rows in several parts, a warp for
// those in few of them.
template <int kHeadDim>
__global__ void __launch_bounds__(Combine<kHeadDim>::kThreads, 1)
    packed_combine_kernel(const AttentionParams p, const SplitScratch scratch) {
  __shared__ typename Combine<kHeadDim>::Shared shared;
  ptx::wait_for_previous_grid();
  using T = Combine<kHeadDim>;
  const T combine{p, scratch, shared};
  const auto [most_parts, columns] = scratch.rows[p.batch];
  // calls merge(partials, row, token, head) for rows in more than `above`, up to `most` parts
  const auto for_each = [&](int first, int stride, int above, int most, auto merge) {
    if (most_parts <= above) return;
    for (int i = first; i < p.batch * p.heads_q; i += stride) {
      const Row<true> row(p, i / p.heads_q);
      if (row.len_q == 0 || row.len_q > p.max_len_q) continue;
      const int2 tasks = scratch.rows[row.b];
      if (tasks.y <= above || tasks.y > most) continue;
      const int head = i % p.heads_q;
      for (int token = 0; token < row.len_q; ++token) {
        merge(packed_partials_of(p, tasks, columns, row.len_q, token, head), row, token, head);
      }
    }
  };
  constexpr int kWarps = T::kThreads / 32;
  for_each(blockIdx.x * kWarps + threadIdx.x / 32, gridDim.x * kWarps, 1, T::kFew,
           [&](auto... of) { combine.merge_few(of...); });
  for_each(blockIdx.x, gridDim.x, T::kFew, kMaxSplits, [&](auto... of) {
    combine.merge(of...);
    __syncthreads();  // shared memory is free again
  });
}

}  // namespace jax_fa::decode

namespace jax_fa {

template <int kHeadDim>
cudaError_t launch_combine(const AttentionParams& p, const SplitScratch& scratch,
                           cudaStream_t stream) {
  using T = decode::Combine<kHeadDim>;
  constexpr int kBlocks = 1024;  // what an H200 holds at once
  const int rows = (p.q_start ? p.batch : p.total_q) * p.heads_q;
  const auto run = [&](auto kernel, int blocks) {
    return launch(kernel, dim3(blocks), T::kThreads, 0, stream, /*beside_previous=*/true, p,
                  scratch);
  };
  if (p.q_start) {
    return run(decode::packed_combine_kernel<kHeadDim>, std::min(rows, kBlocks));
  }
  if (rows <= kBlocks || scratch.splits > T::kFew) {
    return run(decode::combine_kernel<kHeadDim, false>, rows);
  }
  constexpr int kWarps = T::kThreads / 32;
  return run(decode::combine_kernel<kHeadDim, true>, (rows + kWarps - 1) / kWarps);
}

}  // namespace jax_fa
