// How the warps of a block, and the blocks of a cluster, bring their parts of a row together.
#pragma once

#include "decode/combine.cuh"
#include "decode/consumer.cuh"
#include "decode/work.cuh"
#include "params.h"
#include "ptx.cuh"
#include "score.cuh"
#include "sm90/ptx.cuh"

namespace jax_fa::decode {

#if __CUDA_ARCH__ >= 900
constexpr bool kHasClusters = true;
#else
constexpr bool kHasClusters = false;
#endif

// What is merged: each with its own maximum, and not divided by its sum.
template <typename T, int kCount>
struct Parts {
  // padded: the lanes of a quad write rows that lie 8 banks apart
  float o[kCount][T::kColumns][T::kHeadDim + 4];
  float max_log2[kCount][T::kColumns], sum[kCount][T::kColumns];
};

// Four dims of a column.
struct Sum {
  float4 o;
  float max_log2, sum;
};

// Merges the parts of a block's warps, then, where these are a cluster, of a row's blocks.
template <typename T, bool kPacked>
struct Merger {
  static constexpr int kVectors = T::kHeadDim / 4;
  typename T::Shared& smem;
  const AttentionParams& p;
  const SplitScratch& scratch;
  const Row<kPacked>& row;
  const Task<kPacked>& task;

  // f(column, four of its dims), each by a thread. Not unrolled: all that f does is three times in
  // a kernel's code, which takes a fifth longer to compile otherwise.
  template <class F>
  __device__ void for_columns(F f) const {
#pragma unroll 1
    for (int i = threadIdx.x; i < T::kColumns * kVectors; i += T::kThreads) {
      const int column = i / kVectors, dim = i % kVectors * 4;
      if (smem.columns[column].token >= 0 && dim < p.head_dim_v) f(column, dim);
    }
  }

  // The parts of several warps, or blocks of a cluster, always in the same order.
  template <int kUnroll, int kCount>
  static __device__ Sum sum_of(const Parts<T, kCount>& parts, int count, int column, int dim) {
    Sum all = {{}, kNoMax, 0.f};
#pragma unroll kUnroll
    for (int i = 0; i < count; ++i) all.max_log2 = fmaxf(all.max_log2, parts.max_log2[i][column]);
#pragma unroll kUnroll
    for (int i = 0; i < count; ++i) {
      const float weight = ptx::exp2(parts.max_log2[i][column] - all.max_log2);
      const float4 x = *reinterpret_cast<const float4*>(&parts.o[i][column][dim]);
      all.sum += weight * parts.sum[i][column];
      all.o = {all.o.x + weight * x.x, all.o.y + weight * x.y, all.o.z + weight * x.z,
               all.o.w + weight * x.w};
    }
    return all;
  }

  __device__ Sum sum_of_warps(int column, int dim) const {
    return sum_of<T::kWarps>(smem.merge.warps, T::kWarps, column, dim);
  }

  // The result, or a part of it for another launch to merge.
  __device__ void store(const Sum& x, int c, int dim, bool whole) const {
    const Column& column = smem.columns[c];
    const float lse = x.sum == 0.f ? -INFINITY : (x.max_log2 + ptx::log2(x.sum)) * kLn2;
    const float inverse = x.sum == 0.f ? 0.f : ptx::rcp(x.sum);
    const float4 o = {x.o.x * inverse, x.o.y * inverse, x.o.z * inverse, x.o.w * inverse};
    if (whole) {
      store_row(p, row, column.token, column.head, dim, o, lse);
    } else {
      const int64_t token = int64_t(task.part) * p.total_q + row.token0 + column.token;
      store_partial(
          p, scratch,
          kPacked ? int64_t(task.index) * T::kColumns + c : token * p.heads_q + column.head, dim, o,
          lse);
    }
  }

  __device__ void in_block() const {
    for_columns([&](int column, int dim) {
      store(sum_of_warps(column, dim), column, dim, task.parts == 1);
    });
  }

  // The blocks of a cluster have a part of the row each, and the first of them gets those of all:
  // no second launch, and no partials in memory. 2048 keys of 32 heads take 12.4 us in clusters of
  // 2 and 14.4 in four parts that another launch merges (H200).
  __device__ void in_cluster() const {
    auto& parts = smem.merge.blocks[0];
    ptx::cluster_wait();  // the first block's queues are read, its barrier is initialized
    if (task.part == 0 && threadIdx.x == 0) {
      int columns = 0;
      for (int i = 0; i < T::kColumns; ++i) columns += smem.columns[i].token >= 0;
      ptx::barrier_expect(smem.parts_arrived, columns * task.parts * (p.head_dim_v * 4 + 8));
    }
    const uint32_t barrier = ptx::cluster_address(&smem.parts_arrived, 0);
    for_columns([&](int column, int dim) {
      const auto at = [&](const void* x) { return ptx::cluster_address(x, 0); };
      const Sum x = sum_of_warps(column, dim);
      ptx::store_cluster_v4(at(&parts.o[task.part][column][dim]), x.o, barrier);
      if (dim > 0) return;
      ptx::store_cluster(at(&parts.max_log2[task.part][column]), x.max_log2, barrier);
      ptx::store_cluster(at(&parts.sum[task.part][column]), x.sum, barrier);
    });
    if (task.part > 0) return;
    ptx::barrier_wait(smem.parts_arrived, 0);
    for_columns([&](int column, int dim) {
      store(sum_of<1>(parts, task.parts, column, dim), column, dim, true);
    });
  }
};

}  // namespace jax_fa::decode
