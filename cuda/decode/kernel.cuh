// Decode: the last few queries of every row against a long cache, read once.
//
// S^T = K Q^T and O^T = V^T P^T: keys and dims fill the 16 rows of an mma, and the queries that
// share a key head (its G heads x T tokens, "columns") fill its 8 columns. Every warp has a queue
// of tiles in shared memory (reader.cuh), from which lanes read just what they feed to the mma
// (fragments.cuh): no warp waits for another.
//
// A block takes an equal share of its row's own tiles, its warps take these in turn, each with a
// softmax of its own. They merge through shared memory (merge.cuh); splits merge in a second launch
// (combine.cuh), or are blocks of a cluster. Dense queries: grid (heads_kv x groups of columns,
// splits, batch). Packed ones: as many blocks as run at once, each with one task after the other
// (schedule.cuh).
//
// Few blocks ("wide": 8 warps, one block a multiprocessor) live for microseconds, most of which
// they wait: for queries, keys, the row's length, and for instructions that are not in a cache yet.
// So loads of all three leave before any is waited for, tiles count as full until the length is
// known, and every step of the algorithm is once in the code. 32 heads of 128 (H200, L2 cold): 1
// key 3.8 us (6.6 with two warps a block and loads in turn), 128 keys 4.3 (6.3), 512 keys 6.2
// (9.3).
#pragma once

#include <type_traits>

#include "decode/combine.cuh"
#include "decode/consumer.cuh"
#include "decode/merge.cuh"
#include "decode/queries.cuh"
#include "decode/reader.cuh"
#include "decode/schedule.cuh"
#include "decode/splits.h"
#include "decode/work.cuh"
#include "launch.cuh"
#include "params.h"
#include "ptx.cuh"
#include "score.cuh"
#include "sm90/ptx.cuh"

namespace jax_fa::decode {
namespace {

template <typename T>
struct SharedStorage;

template <int kHeadDim_, typename KeyFormat_, typename ValueFormat_, int kColumnTiles_,
          bool kWholeTiles_ = true, int kWarps_ = decode_warps(kColumnTiles_)>
struct Traits {
  static constexpr int kHeadDim = kHeadDim_;
  using KeyFormat = KeyFormat_;
  using ValueFormat = ValueFormat_;

  static constexpr bool kWholeTiles = kWholeTiles_;
  static constexpr int kColumnTiles = kColumnTiles_, kColumns = kColumnTiles * 8;
  static constexpr int kWarps = kWarps_, kThreads = kWarps * 32;
  static constexpr bool kWide = kWarps == kWideWarps;
  static constexpr bool kClusters = kColumnTiles == 1;  // parts may be blocks of one
  static constexpr int kMostBlocks = kWide ? kMaxCluster : kNarrowCluster;  // of a cluster
  // Steps of a warp in flight or in use: shared memory then holds 12 warps with twice 8 KB, or 8
  // with three times, more than the 40 KB that an H200's SM needs in flight. 8-bit caches gain more
  // from 16 warps.
  static constexpr int kStages = kWide ? 3 : 2;
  static constexpr int kStepKeys = decode_step_keys(kHeadDim, kColumnTiles, KeyFormat::kTokenScale);
  static constexpr int kKeyTiles = kStepKeys / 16;
  // 12 warps: 168 registers each, of which general instances of 96 would spill some. Over bytes
  // warps compute for longer than they wait for memory, which more of them hide: 128 rows of 128
  // int8 keys of 32 heads take 47 us with 20 and 49 with 16 (H200).
  static constexpr bool kFew = kHeadDim == 96 && !kWholeTiles;
  static constexpr bool kMany = KeyFormat::kTokenScale && kWholeTiles && kColumnTiles == 1 &&
                                !kWide && kHeadDim != 96;  // 96 would spill
  static constexpr int kBlockWarps = !kMany ? 12 : KeyFormat::kGroupShare ? 16 : 20;
  static constexpr int kMinBlocks = kHeadDim > 128 ? 2 : kFew ? 4 : kBlockWarps / kWarps;

  using Shared = SharedStorage<Traits>;
  using KeyReader = RowReader<KeyFormat, kHeadDim, 4, kWholeTiles>;
  using ValueReader = RowReader<ValueFormat, kHeadDim, 8, kWholeTiles>;
  static constexpr int kQSteps = KeyReader::kVectors * KeyFormat::kElements / 4;
  static constexpr int kDimTiles = ValueReader::kVectors * ValueFormat::kElements / 2;
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
    struct {  // after the loop
      Parts<T, T::kWarps> warps;
      Parts<T, T::kMostBlocks> blocks[T::kClusters];  // of a cluster, in the first of these
    } merge;
  };
  uint2 q[T::kQSteps][T::kColumnTiles][32];  // B fragments, by lane
  Column columns[T::kColumns];
  ScheduleState<T> schedule;   // packed rows
  Task<true> tasks[2];         // this one, and one that is taken early
  ptx::Barrier parts_arrived;  // of a cluster's blocks, in the first of these
};

// `meanwhile` is called when the first copies are on their way.
template <typename T, bool kPacked, class Meanwhile>
__device__ __forceinline__ void attend(SharedStorage<T>& smem, const AttentionParams& p,
                                       const SplitScratch& scratch, const Task<kPacked>& task,
                                       Meanwhile meanwhile) {
  using Share = decode::Share<!T::kWide, T::kWarps>;
  constexpr bool kClusters = T::kClusters && !kPacked && kHasClusters;
  std::conditional_t<T::kWide, Row<kPacked>, const Row<kPacked>&> row = task.row;
  const int b = row.b, head_kv = task.head_kv;
  const int heads_group = kPacked ? p.heads_q / p.heads_kv : scratch.heads_group;
  // Where it is known which keys come first before the row's length is, they do not wait for it:
  // until then the row counts as full. A row without keys may name any of a cache's.
  const bool early = T::kWide && !p.kv.page_table && !p.kv.rows && p.window_left < 0;
  int length = p.kv.len_kv;
  if constexpr (T::kWide) {
    if (early && p.kv.length) length = ptx::load_early(p.kv.length + b);
    if (!early) row.len_kv = row_len_kv(p, b);
  }
  QueryLoader<T> queries;
  // they wait in registers, where there are some
  constexpr bool kQueriesFirst = !kPacked && (T::kHeadDim != 96 || T::kColumnTiles < 4);
  if constexpr (kQueriesFirst) queries.load(p, row, head_kv, heads_group, task.column_group);
  const KvRow key_row(p.kv, b, p.k.rows);
  KvRow value_row = key_row;
  if (__builtin_expect(p.v.rows != p.k.rows, 0)) value_row = KvRow(p.kv, b, p.v.rows);
  const typename T::KeyReader key_reader(p.k, key_row, head_kv, p.head_dim);
  const typename T::ValueReader value_reader(p.v, value_row, head_kv, p.head_dim_v);
  Share share({0, p.kv.len_kv}, {}, T::kStepKeys, task.part, task.parts);
  if (!early) share = Share(row.mask(p), row.len_q, T::kStepKeys, task.part, task.parts);
  const RowKeys<T::kWholeTiles> keys(p.kv, b, share.any);
  Stage<T>* const stages = smem.stages[threadIdx.x / 32];
  int pages[T::kKeyTiles];  // of the next step to copy, looked up early
  const auto find_pages = [&](int step) {
#pragma unroll
    for (int i = 0; i < T::kKeyTiles; ++i) {
      pages[i] = keys.find_page(step * T::kStepKeys + i * 16);
    }
  };
  const auto copy = [&](int step, int stage) {  // one group of copies, empty past the end
    if (step < share.end_step) {
#pragma unroll
      for (int i = 0; i < T::kKeyTiles; ++i) {
        const KeyTile tile = keys.tile(step * T::kStepKeys + i * 16, pages[i]);
        key_reader.template copy<T::kWide>(stages[stage].keys[i], keys, tile);
        value_reader.template copy<T::kWide>(stages[stage].values[i], keys, tile);
      }
      find_pages(step + share.stride);
    }
    ptx::cp_async_commit();
  };

  const auto after_first_copy = [&] {
    if constexpr (kClusters) {
      if (scratch.in_cluster && threadIdx.x == 0) {
        ptx::barrier_init(smem.parts_arrived, 1);
        ptx::fence_barrier_init();
      }
    }
    if constexpr (T::kWide) {
      if (!early) return;
      ptx::settle(length);
      row.len_kv = clamp_length(p, length);
      share = Share(row.mask(p), row.len_q, T::kStepKeys, task.part, task.parts);
    }
  };
  const auto prepare = [&] {
    meanwhile();
    if (threadIdx.x < T::kColumns) {
      int i = task.column_group * T::kColumns + threadIdx.x;
      ptx::settle(i);  // or it is computed before the first copies
      smem.columns[threadIdx.x] = make_column(row, row.mask(p), head_kv, heads_group, i);
    }
    if constexpr (!kQueriesFirst) queries.load(p, row, head_kv, heads_group, task.column_group);
    queries.store(smem, p.dtype);
    __syncthreads();  // columns are known, Q is in shared memory
  };

  Consumer<T> consumer(smem);
  const auto consume = [&](int step, int stage) {
    const int key0 = step * T::kStepKeys;
    ptx::cp_async_wait<T::kStages - 1>();
    __syncwarp();  // this step's copies, by all lanes, are there
    Stage<T>& now = stages[stage];
    if constexpr (T::kWide) {
      if (key0 + T::kStepKeys > share.any.hi && share.any.hi <= keys.last) {  // read early
#pragma unroll
        for (int i = 0; i < T::kKeyTiles; ++i) {
          value_reader.clear(now.values[i], key0 + i * 16, share.any);
        }
        __syncwarp();  // what lanes cleared is there
      }
    }
    if constexpr (T::KeyFormat::kGroupShare) {
      const int row = threadIdx.x % 16;
#pragma unroll
      for (int i = 0; i < T::kKeyTiles; ++i) {
        choose(threadIdx.x % 32 < 16, key_reader.row_scales(now.keys[i], row),
               value_reader.row_scales(now.values[i], row))
            .share();
      }
      __syncwarp();  // the factors, by all lanes, are there
    }
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
    __syncwarp();  // no lane reads this stage any more
  };
  const auto next = [](int stage) { return stage + 1 == T::kStages ? 0 : stage + 1; };
  int step = share.first_step + threadIdx.x / 32, stage = 0;
  if (step < share.end_step) find_pages(step);
  if constexpr (T::kWide) {
    // Turns copy one step and consume another, the first ones only copy: so all copies are at one
    // place in the code.
    for (int turn = 1 - T::kStages;; ++turn, step += share.stride) {
      copy(step, stage);
      stage = next(stage);
      if (turn == 1 - T::kStages) after_first_copy();
      if (turn < 0) continue;
      if (turn == 0) prepare();
      const int oldest = step - (T::kStages - 1) * share.stride;
      if (oldest >= share.end_step) break;
      consume(oldest, stage);
    }
  } else {
#pragma unroll
    for (int i = 0; i < T::kStages; ++i) copy(step + i * share.stride, i);
    after_first_copy();
    prepare();
    for (; step < share.end_step; step += share.stride) {
      consume(step, stage);
      copy(step + T::kStages * share.stride, stage);
      stage = next(stage);
    }
  }

  ptx::cp_async_wait<0>();
  __syncthreads();  // no warp reads its queue any more: the merge takes its place
  if constexpr (kClusters) {
    if (scratch.in_cluster) ptx::cluster_arrive();
  }
  consumer.publish(smem);
  __syncthreads();  // all warps' parts are in shared memory
  if constexpr (kPacked) {
    Merger<T, true>{smem, p, scratch, row, task}.in_block();
  } else {
    const Row<false> row(p, blockIdx.z);  // not kept over the loop
    const Merger<T, false> merger{smem, p, scratch, row, task};
    if constexpr (kClusters) {
      if (scratch.in_cluster) return merger.in_cluster();
    }
    merger.in_block();
  }
}

template <typename T>
__global__ void __launch_bounds__(T::kThreads, T::kMinBlocks)
    decode_kernel(const AttentionParams p, const SplitScratch scratch) {
  if constexpr (T::kWarps == kWideWarps && !kHasClusters) return;  // see has_room
  extern __shared__ __align__(16) char smem_bytes[];
  auto& smem = *reinterpret_cast<SharedStorage<T>*>(smem_bytes);
  ptx::launch_dependents();  // the next grid's blocks take the places that the last of these leave
  const int column_group = blockIdx.x < p.heads_kv ? 0 : blockIdx.x / p.heads_kv;
  const int head_kv = blockIdx.x - column_group * p.heads_kv;
  const Row<false> row = T::kWide ? Row<false>(p, blockIdx.z, p.kv.len_kv)  // not known yet
                                  : Row<false>(p, blockIdx.z);
  const Task<false> task{row, head_kv, column_group, int(blockIdx.y), scratch.splits, 0};
  attend<T>(smem, p, scratch, task, [] {});
}

// Blocks an SM for which registers are budgeted: 128 each where they suffice, so that half of the
// blocks leave a prefill block its 255; more than for dense queries where those would spill.
template <typename T>
constexpr int packed_blocks() {
  const bool plain = T::kWholeTiles && !T::KeyFormat::kGroupScale;
  if (T::kColumnTiles == 2) return 2;
  if (plain && (T::kHeadDim == 64 || T::kHeadDim == 128)) return 8;
  return T::kWholeTiles ? T::kMinBlocks : std::min(T::kMinBlocks, 4);
}

template <typename T>
__global__ void __launch_bounds__(T::kThreads, packed_blocks<T>())
    packed_decode_kernel(const AttentionParams p, const SplitScratch scratch) {
  extern __shared__ __align__(16) char smem_bytes[];
  auto& smem = *reinterpret_cast<SharedStorage<T>*>(smem_bytes);
  ptx::launch_dependents();
  start_schedule(smem.schedule, p, scratch);
  __syncthreads();  // the schedule is known
  // the last warp: the first one has columns to make
  const auto take = [&](Task<true>& task, const Task<true>* last) {
    if (threadIdx.x < T::kThreads - 32) return;
    if (!scratch.whole_rows) return next_task(smem.schedule, task, p, scratch);
    if (threadIdx.x % 32 == 0) next_group<T>(task, last, p);
  };
  take(smem.tasks[0], nullptr);
  __syncthreads();  // the first task is known
  for (int i = 0; smem.tasks[i].row.b < p.batch; i ^= 1) {
    Task<true>& next = smem.tasks[i ^ 1];
    attend<T>(smem, p, scratch, smem.tasks[i], [&] {
      if (smem.schedule.early) take(next, &smem.tasks[i]);
    });
    if (!smem.schedule.early) take(next, &smem.tasks[i]);
    __syncthreads();  // shared memory is free again, the next task is known
  }
  end_after_previous(p);
}

template <typename T>
cudaError_t launch_dense(const AttentionParams& p, SplitScratch scratch, cudaStream_t stream) {
  scratch.heads_group = p.heads_q / p.heads_kv;
  const int columns = scratch.heads_group * p.len_q;
  const dim3 grid(p.heads_kv * ((columns + T::kColumns - 1) / T::kColumns), scratch.splits,
                  p.batch);
  if constexpr (T::kClusters) {
    // wide blocks are as many as run at once, and have to
    const bool suits = T::kWide ? fits_clusters(int64_t(grid.x) * grid.z, scratch.splits)
                                : scratch.splits == kNarrowCluster;
    if (scratch.splits > 1 && suits) {
      bool launched = false;
      scratch.in_cluster = true;
      const cudaError_t error = launch_clusters(decode_kernel<T>, grid, dim3(1, scratch.splits),
                                                T::kThreads, sizeof(SharedStorage<T>), stream,
                                                /*at_once=*/T::kWide, launched, p, scratch);
      if (launched || error != cudaSuccess) return error;
      scratch.in_cluster = false;
    }
  }
  const cudaError_t error = launch(decode_kernel<T>, grid, T::kThreads, sizeof(SharedStorage<T>),
                                   stream, /*beside_previous=*/false, p, scratch);
  if (error != cudaSuccess || scratch.splits == 1) return error;
  return launch_combine<T::kHeadDim>(p, scratch, stream);
}

template <typename T>
cudaError_t launch_packed(const AttentionParams& p, const SplitScratch& scratch,
                          cudaStream_t stream) {
  const auto kernel = packed_decode_kernel<T>;
  constexpr int kSharedBytes = sizeof(SharedStorage<T>);
  int device = 0, multiprocessors = 0, blocks = 0;
  cudaFuncAttributes compiled = {};
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error == cudaSuccess) error = make_room(kernel);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&compiled, kernel);
  if (error == cudaSuccess) error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error == cudaSuccess) {
    error =
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, T::kThreads, kSharedBytes);
  }
  if (error != cudaSuccess) return error;
  // room is half of the registers; before sm_90 launches do not overlap
  const bool leaves_room = scratch.leaves_room && compiled.ptxVersion >= 90;
  const int few = std::clamp((32 << 10) / (compiled.numRegs * T::kThreads), 1, blocks);
  SplitScratch shared = scratch;
  shared.workers = multiprocessors * (leaves_room ? few : blocks);
  const int grid = scratch.whole_rows ? p.batch * p.heads_kv : multiprocessors * blocks;
  return launch(kernel, dim3(grid), T::kThreads, kSharedBytes, stream, p.beside_previous, p,
                shared);
}

// Whether a block of the current GPU has the shared memory. No GPU before sm_90 has that of
// kWideWarps: code for those leaves such blocks out.
template <typename T>
bool has_room(int most_bytes) {
  constexpr int kBytes = decode_shared_kb(T::kHeadDim, T::kColumnTiles, T::kWarps) << 10;
  static_assert(sizeof(SharedStorage<T>) <= kBytes);
  if (kBytes > most_bytes) return false;
  if (T::kWarps < kWideWarps) return true;
  cudaFuncAttributes compiled = {};
  return cudaFuncGetAttributes(&compiled, decode_kernel<T>) == cudaSuccess &&
         compiled.ptxVersion >= 90;
}

template <int kHeadDim, typename KeyFormat, typename ValueFormat>
cudaError_t launch_columns(const AttentionParams& p, const SplitScratch& scratch,
                           cudaStream_t stream) {
  using One = Traits<kHeadDim, KeyFormat, ValueFormat, 1>;
  using Two = Traits<kHeadDim, KeyFormat, ValueFormat, 2>;
  int device = 0, most = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error != cudaSuccess) return error;
  const int heads_group = p.heads_q / p.heads_kv;
  if (p.q_start) {
    return packed_column_tiles(heads_group) == 1 || !has_room<Two>(most)
               ? launch_packed<One>(p, scratch, stream)
               : launch_packed<Two>(p, scratch, stream);
  }
  const int tiles = decode_column_tiles(kHeadDim, heads_group * p.len_q);
  if constexpr (kHeadDim <= 128) {
    using Wide = Traits<kHeadDim, KeyFormat, ValueFormat, 1, true, kWideWarps>;
    using Four = Traits<kHeadDim, KeyFormat, ValueFormat, 4>;
    const DecodeSplit split =
        decode_split(p.batch, p.len_q, p.heads_q, p.heads_kv, p.head_dim, p.head_dim_v, p.kv.len_kv,
                     KeyFormat::kBytes / KeyFormat::kElements, KeyFormat::kGroupShare);
    if (tiles == 4 && has_room<Four>(most)) return launch_dense<Four>(p, scratch, stream);
    if (tiles == 1 && split.warps == kWideWarps && has_room<Wide>(most)) {
      return launch_dense<Wide>(p, scratch, stream);
    }
  }
  return tiles == 1 || !has_room<Two>(most) ? launch_dense<One>(p, scratch, stream)
                                            : launch_dense<Two>(p, scratch, stream);
}

}  // namespace
}  // namespace jax_fa::decode
