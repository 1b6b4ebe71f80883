// Decode: the last few queries of every row against a long cache, read once.
//
// S^T = K Q^T and O^T = V^T P^T: keys and dims fill the 16 rows of an mma, and the queries that
// share a key head (its G heads x T tokens, "columns") fill its 8 columns. Every warp has a queue
// of tiles in shared memory (reader.cuh), from which lanes read just what they feed to the mma
// (fragments.cuh): no warp waits for another.
//
// A block takes an equal share of its row's own tiles, its warps take these in turn, each with a
// softmax of its own. They merge through shared memory; splits merge in a second launch
// (combine.cuh). Dense queries: grid (heads_kv x groups of columns, splits, batch). Packed ones: as
// many blocks as run at once, each with one task after the other (schedule.cuh).
#include "decode/combine.cuh"
#include "decode/consumer.cuh"
#include "decode/fragments.cuh"
#include "decode/reader.cuh"
#include "decode/schedule.cuh"
#include "decode/splits.h"
#include "decode/work.cuh"
#include "launch.cuh"
#include "params.h"
#include "ptx.cuh"
#include "score.cuh"

namespace jax_fa::decode {
namespace {

template <typename T>
struct SharedStorage;

template <int kHeadDim_, DType kDType_, typename KeyFormat_, typename ValueFormat_,
          int kColumnTiles_, bool kWholeTiles_ = true, int kWarps_ = decode_warps(kColumnTiles_)>
struct Traits {
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr DType kDType = kDType_;
  using KeyFormat = KeyFormat_;
  using ValueFormat = ValueFormat_;

  static constexpr bool kWholeTiles = kWholeTiles_;
  static constexpr int kColumnTiles = kColumnTiles_, kColumns = kColumnTiles * 8;
  static constexpr int kWarps = kWarps_, kThreads = kWarps * 32;
  // Steps of a warp in flight or in use: shared memory then holds 12 warps with twice 8 KB, more
  // than the 40 KB that an H200's SM needs in flight. 8-bit caches gain more from 16 warps.
  static constexpr int kStages = 2;
  static constexpr int kStepKeys = decode_step_keys(kHeadDim, kColumnTiles, KeyFormat::kTokenScale);
  static constexpr int kKeyTiles = kStepKeys / 16;
  static constexpr int kMinBlocks =
      kColumnTiles == 4 || kHeadDim > 128 ? 2 : 12 / kWarps;  // 12 warps: 168 registers each

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
    // after the loop; padded: the lanes of a quad write rows that lie 8 banks apart
    float o[T::kWarps][T::kColumns][T::kHeadDim + 4];
  };
  uint2 q[T::kQSteps][T::kColumnTiles][32];  // B fragments, by lane
  float max_log2[T::kWarps][T::kColumns], sum[T::kWarps][T::kColumns];
  Column columns[T::kColumns];
  ScheduleState<T> schedule;  // packed rows
  Task<true> tasks[2];        // this one, and one that is taken early
};

// Q^T as B fragments. Lane (g, c) of step i holds, for column g, the four dims that lane (., c)
// takes from a row of K in step i. Columns and dims that do not exist are zero.
template <typename T, bool kPacked>
__device__ void load_q(SharedStorage<T>& smem, const AttentionParams& p, const Row<kPacked>& row) {
  using Format = typename T::KeyFormat;
  constexpr int kStepsPerVector = Format::kElements / 4;
  uint2* const sQ = &smem.q[0][0][0];
  for (int i = threadIdx.x; i < T::kQSteps * T::kColumnTiles * 32; i += T::kThreads) {
    const int lane = i % 32, tile = i / 32 % T::kColumnTiles, step = i / 32 / T::kColumnTiles;
    const Column& column = smem.columns[tile * 8 + lane / 4];
    const int dim =
        (step / kStepsPerVector * 4 + lane % 4) * Format::kElements + step % kStepsPerVector * 4;
    uint2 x = {};
    if (column.token >= 0 && dim < p.head_dim) {
      const int64_t offset =
          (row.token0 + column.token) * p.q_token_stride + column.head * p.q_head_stride + dim;
      x = __ldg(reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(p.q) + offset));
      if constexpr (Format::kMma != T::kDType) {
        const float2 lo = unpack<T::kDType>(x.x), hi = unpack<T::kDType>(x.y);
        x = {pack<Format::kMma>(lo.x, lo.y), pack<Format::kMma>(hi.x, hi.y)};
      }
    }
    sQ[i] = x;
  }
}

// Sums the warps' parts: four dims of a column a thread. Of a row in one part this is the result.
template <typename T, bool kPacked>
__device__ void merge_and_store(const SharedStorage<T>& smem, const AttentionParams& p,
                                const SplitScratch& scratch, const Row<kPacked>& row,
                                const Task<kPacked>& task) {
  constexpr int kVectors = T::kHeadDim / 4;
#pragma unroll T::kWarps == kWideWarps ? 1 : 4
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
    if (task.parts == 1) {
      store_row<T::kDType>(p, row, column.token, column.head, dim, o, lse);
    } else {
      const int64_t token = int64_t(task.part) * p.total_q + row.token0 + column.token;
      store_partial(
          p, scratch,
          kPacked ? int64_t(task.index) * T::kColumns + c : token * p.heads_q + column.head, dim, o,
          lse);
    }
  }
}

// A row in one piece: its first keys are on their way while its length is.
template <typename T>
__device__ __forceinline__ void prefetch(const AttentionParams& p, int b, int head_kv, int parts) {
  if (p.kv.page_table || p.kv.rows || parts > 1 || p.window_left >= 0) return;
  const typename T::KeyReader key_reader(p.k, p.kv, b, head_kv, p.head_dim);
  const typename T::ValueReader value_reader(p.v, p.kv, b, head_kv, p.head_dim_v);
#pragma unroll
  for (int i = 0; i < T::kStages; ++i) {
    const int key0 = (threadIdx.x / 32 + i * T::kWarps) * T::kStepKeys;
    key_reader.prefetch(key0, T::kStepKeys, p.kv.len_kv);
    value_reader.prefetch(key0, T::kStepKeys, p.kv.len_kv);
  }
}

// `meanwhile` is called when the first copies are on their way.
template <typename T, bool kPacked, class Meanwhile>
__device__ __forceinline__ void attend(SharedStorage<T>& smem, const AttentionParams& p,
                                       const SplitScratch& scratch, const Task<kPacked>& task,
                                       Meanwhile meanwhile) {
  const Row<kPacked>& row = task.row;
  const int b = row.b, head_kv = task.head_kv;
  const typename T::KeyReader key_reader(p.k, p.kv, b, head_kv, p.head_dim);
  const typename T::ValueReader value_reader(p.v, p.kv, b, head_kv, p.head_dim_v);
  const IntervalMask mask = row.mask(p);
  const Share share(mask, row.len_q, T::kStepKeys, task.part, task.parts);
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
        key_reader.copy(stages[stage].keys[i], keys, tile);
        value_reader.copy(stages[stage].values[i], keys, tile);
      }
      find_pages(step + T::kWarps);
    }
    ptx::cp_async_commit();
  };

  int step = share.first_step + threadIdx.x / 32, stage = 0;
  if (step < share.end_step) find_pages(step);
#pragma unroll T::kWarps == kWideWarps ? 1 : T::kStages  // few blocks wait for cold instructions
  for (int i = 0; i < T::kStages; ++i) copy(step + i * T::kWarps, i);
  meanwhile();
  if (threadIdx.x < T::kColumns) {
    const int i = task.column_group * T::kColumns + threadIdx.x;
    smem.columns[threadIdx.x] = make_column(p, row, mask, head_kv, i);
  }
  __syncthreads();  // columns are known
  load_q(smem, p, row);
  __syncthreads();  // Q is in shared memory

  Consumer<T> consumer(smem);
  for (; step < share.end_step; step += T::kWarps) {
    const int key0 = step * T::kStepKeys;
    ptx::cp_async_wait<T::kStages - 1>();
    __syncwarp();  // this step's copies, by all lanes, are there
    Stage<T>& now = stages[stage];
    if constexpr (T::KeyFormat::kGroupShare) {
      const int row = threadIdx.x % 16;
      if (threadIdx.x % 32 < 16) key_reader.share_scales(now.keys[0], row);
      if (threadIdx.x % 32 >= 16) value_reader.share_scales(now.values[0], row);
      __syncwarp();  // the shares, by all lanes, are there
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
    copy(step + T::kStages * T::kWarps, stage);
    stage = stage + 1 == T::kStages ? 0 : stage + 1;
  }

  ptx::cp_async_wait<0>();
  __syncthreads();  // no warp reads its queue any more: the merge takes its place
  consumer.publish(smem);
  __syncthreads();  // all warps' parts are in shared memory
  if constexpr (kPacked) {
    merge_and_store(smem, p, scratch, row, task);
  } else {
    merge_and_store(smem, p, scratch, Row<false>(p, blockIdx.z), task);  // not kept over the loop
  }
}

template <typename T>
__global__ void __launch_bounds__(T::kThreads, T::kMinBlocks)
    decode_kernel(const AttentionParams p, const SplitScratch scratch) {
  extern __shared__ __align__(16) char smem_bytes[];
  auto& smem = *reinterpret_cast<SharedStorage<T>*>(smem_bytes);
  ptx::launch_dependents();  // the next grid's blocks take the places that the last of these leave
  const int head_kv = blockIdx.x % p.heads_kv, column_group = blockIdx.x / p.heads_kv;
  if constexpr (T::kWarps == kWideWarps) prefetch<T>(p, blockIdx.z, head_kv, scratch.splits);
  const Task<false> task{Row<false>(p, blockIdx.z), head_kv,        column_group,
                         int(blockIdx.y),           scratch.splits, 0};
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
  __syncthreads();                           // the schedule is known
  const auto take = [&](Task<true>& task) {  // the last warp: the first one has columns to make
    if (threadIdx.x >= T::kThreads - 32) next_task(smem.schedule, task, p, scratch);
  };
  take(smem.tasks[0]);
  __syncthreads();  // the first task is known
  for (int i = 0; smem.tasks[i].row.b < p.batch; i ^= 1) {
    Task<true>& next = smem.tasks[i ^ 1];
    attend<T>(smem, p, scratch, smem.tasks[i], [&] {
      if (smem.schedule.early) take(next);
    });
    if (!smem.schedule.early) take(next);
    __syncthreads();  // shared memory is free again, the next task is known
  }
  end_after_previous(p);
}

template <typename T>
cudaError_t launch_dense(const AttentionParams& p, const SplitScratch& scratch,
                         cudaStream_t stream) {
  const int columns = p.heads_q / p.heads_kv * p.len_q;
  const dim3 grid(p.heads_kv * ((columns + T::kColumns - 1) / T::kColumns), scratch.splits,
                  p.batch);
  const cudaError_t error = launch(decode_kernel<T>, grid, T::kThreads, sizeof(SharedStorage<T>),
                                   stream, /*beside_previous=*/false, p, scratch);
  if (error != cudaSuccess || scratch.splits == 1) return error;
  return launch_combine<T::kHeadDim, T::kDType>(p, scratch, stream);
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
  return launch(kernel, dim3(multiprocessors * blocks), T::kThreads, kSharedBytes, stream,
                p.beside_previous, p, shared);
}

template <typename T>
cudaError_t launch_one(const AttentionParams& p, const SplitScratch& scratch, cudaStream_t stream) {
  return p.q_start ? launch_packed<T>(p, scratch, stream) : launch_dense<T>(p, scratch, stream);
}

template <int kHeadDim, DType kDType, typename KeyFormat, typename ValueFormat>
cudaError_t launch_columns(const AttentionParams& p, const SplitScratch& scratch,
                           cudaStream_t stream) {
  using One = Traits<kHeadDim, kDType, KeyFormat, ValueFormat, 1>;
  using Two = Traits<kHeadDim, kDType, KeyFormat, ValueFormat, 2>;
  const int heads_group = p.heads_q / p.heads_kv;
  if (p.q_start) {
    return packed_column_tiles(heads_group) == 1 ? launch_packed<One>(p, scratch, stream)
                                                 : launch_packed<Two>(p, scratch, stream);
  }
  const int tiles = decode_column_tiles(kHeadDim, heads_group * p.len_q);
  if constexpr (kHeadDim <= 128) {
    using Wide = Traits<kHeadDim, kDType, KeyFormat, ValueFormat, 1, true, kWideWarps>;
    using Four = Traits<kHeadDim, kDType, KeyFormat, ValueFormat, 4>;
    const DecodeSplit split =
        decode_split(p.batch, p.len_q, p.heads_q, p.heads_kv, p.head_dim, p.head_dim_v, p.kv.len_kv,
                     KeyFormat::kBytes / KeyFormat::kElements);
    if (split.warps == kWideWarps) return launch_dense<Wide>(p, scratch, stream);
    if (tiles == 4) return launch_dense<Four>(p, scratch, stream);
  }
  return tiles == 1 ? launch_dense<One>(p, scratch, stream) : launch_dense<Two>(p, scratch, stream);
}

// Whether all rows of x are aligned for copies of `bytes`.
bool rows_aligned(const KvTensor& x, int head_dim, int64_t bytes) {
  const int64_t element = x.dtype <= DType::kBF16 ? 2 : 1;
  const int64_t all = x.row_stride | x.token_stride | x.head_stride | head_dim;
  return all * element % bytes == 0 && reinterpret_cast<uintptr_t>(x.data) % bytes == 0;
}

// What any of the kernels can read: a lane's vector lies in one group.
bool readable(const KvTensor& x, int head_dim, DType dtype) {
  if (x.dtype == dtype) return rows_aligned(x, head_dim, 16);
  const bool byte = x.dtype >= DType::kInt8;
  return byte && rows_aligned(x, head_dim, 8) && (x.groups <= 1 || head_dim % (x.groups * 8) == 0);
}

}  // namespace
}  // namespace jax_fa::decode

namespace jax_fa {

template <int kHeadDim, DType kDType>
cudaError_t launch_decode(const AttentionParams& p, const SplitScratch& scratch,
                          cudaStream_t stream) {
  using namespace decode;
  if (!readable(p.k, p.head_dim, kDType) || !readable(p.v, p.head_dim_v, kDType)) {
    return cudaErrorInvalidValue;
  }
  // of a lane's vector: wide where that leaves no lane of a row without work
  constexpr int kBytes = kHeadDim % 128 == 0 ? 16 : 8;
  using Float = Float16<kDType>;
  using Any = AnyByte<kDType>;
  const bool k_float = p.k.dtype == kDType, v_float = p.v.dtype == kDType;
  const bool whole_tiles = !p.kv.page_table || p.kv.page_size % 16 == 0;
  if (k_float && v_float && whole_tiles) {
    return launch_columns<kHeadDim, kDType, Float, Float>(p, scratch, stream);
  }
  if (whole_tiles && p.k.dtype == p.v.dtype && rows_aligned(p.k, p.head_dim, 16) &&
      rows_aligned(p.v, p.head_dim_v, 16)) {
    const auto same = [&]<DType kCache>() {
      using Format = Byte<kCache, kBytes>;
      using Grouped = GroupedByte<kCache>;
      if (p.k.groups <= 1 && p.v.groups <= 1) {
        return launch_columns<kHeadDim, kDType, Format, Format>(p, scratch, stream);
      }
      return launch_one<Traits<kHeadDim, kDType, Grouped, Grouped, 1>>(p, scratch, stream);
    };
    switch (p.k.dtype) {
      case DType::kInt8:
        return same.template operator()<DType::kInt8>();
      case DType::kE4M3:
        return same.template operator()<DType::kE4M3>();
      case DType::kE5M2:
        return same.template operator()<DType::kE5M2>();
      default:
        return cudaErrorInvalidValue;
    }
  }
  const auto general = [&]<typename KeyFormat, typename ValueFormat>() {
    return launch_one<Traits<kHeadDim, kDType, KeyFormat, ValueFormat, 1, false>>(p, scratch,
                                                                                  stream);
  };
  if (k_float && v_float) return general.template operator()<Float, Float>();
  if (k_float) return general.template operator()<Float, Any>();
  if (v_float) return general.template operator()<Any, Float>();
  return general.template operator()<Any, Any>();
}

template cudaError_t launch_decode<JAX_FA_HEAD_DIM, DType::JAX_FA_DTYPE>(const AttentionParams&,
                                                                         const SplitScratch&,
                                                                         cudaStream_t);
template cudaError_t launch_combine<JAX_FA_HEAD_DIM, DType::JAX_FA_DTYPE>(const AttentionParams&,
                                                                          const SplitScratch&,
                                                                          cudaStream_t);

}  // namespace jax_fa
