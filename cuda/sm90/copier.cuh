// The warps that copy keys and values of 8 bits to the queries' type, for bulk copies to bring them
// like any others.
//
// One for each of an SM's schedulers, because instructions are what this costs: H200, 512 bfloat16
// queries on 8192 keys, causal, B = 8, 32 heads over 8 of 128, int8 with a scale for each head of a
// token, time over that of bfloat16 keys: one warp 1.28, four 1.13, and 1.10 with what is the same
// for all steps of a unit found once; a launch that copies first 1.16, tiles that are widened for
// each tile of queries (dequantize.cuh) 1.58. Units of 32 and 128 tokens 1.11, four stages of half
// as many tokens 1.17.
#pragma once

#include "../cache/widen.cuh"
#include "block.cuh"

namespace jax_fa {

// One of them. It takes units (cache/copied.h) and waits for none of others, so that all are copied
// however few blocks run at once. The bytes of a unit come to shared memory in steps, kStages
// ahead.
template <class Traits>
struct Copier {
  static constexpr int kTokens = CopyStorage::kTokens, kStages = CopyStorage::kStages;
  static constexpr int kSteps = CopyUnits::kTokens / kTokens;            // of a unit
  static_assert(CopyUnits::kTokens % kTokens == 0 && kSteps > kStages);  // two units are known
  static_assert(kTokens % 4 == 0 && 32 % kTokens == 0);

  const HopperParams& params;
  CopyStorage& shared;
  const AttentionParams& p = params.attention;
  const CopiedCache& copied = params.copied;
  const CopyUnits& units = copied.units;
  int lane = threadIdx.x % 32;
  int taken = 0;  // lane 0's: how many units others and this warp had taken before its next one
  int begun = 0;
  bool more = true;

  __device__ void run() {
    prepare();
    take();
    for (int i = -kStages; i < begun; ++i) {
      if (i >= 0) finish(i);
      begin();
      if (i >= 0 && i % kSteps == kSteps - 1) publish(shared.unit[i / kSteps % 2].index);
    }
  }

 private:
  __device__ void prepare() {
    constexpr int kOnes = CopyUnits::kScales;
    for (int i = 0; i < 2; ++i) {
      const KvTensor& x = i ? copied.v : copied.k;
      const int dim = i ? p.head_dim_v : p.head_dim;
      shared.scale_row[i][lane] = x.scale ? lane * kCopiedDims * max(x.groups, 1) / dim : kOnes;
    }
    if (lane < kTokens) {
      for (auto& stage : shared.scale) stage[kOnes][lane] = 1.f;
    }
    if (lane == 0) shared.row0 = -32, shared.end = 0;
    __syncwarp();  // all lanes' parts are there
  }

  __device__ void take() {
    if (lane == 0) taken = atomicAdd(copied.taken, 1);
  }

  // Finds the unit that was taken, if there is one.
  __device__ bool find(CopyUnit& unit) {
    const int number = __shfl_sync(0xffffffff, taken, 0);
    while (number >= shared.end) {
      if (shared.row0 + 32 >= units.rows) return false;
      count();
    }
    const int at = __popc(__ballot_sync(0xffffffff, shared.row_end[lane] <= number));
    const int row = shared.row0 + at, rest = shared.row_end[at] - 1 - number;
    const int chunk = shared.row_chunk[at] + rest / units.of_chunk();
    const int part = rest % units.of_chunk();
    const bool values = part >= units.parts;
    const int head0 = (values ? part - units.parts : part) * units.heads;
    const int token0 = chunk * CopyUnits::kTokens;
    const KvTensor& x = values ? copied.v : copied.k;
    const int dim = values ? p.head_dim_v : p.head_dim, vectors = dim / kCopiedDims;
    unit.gScale[lane] = scale_of(x, row, head0, token0, lane / kTokens);
    if (lane == 0) {
      const KvTensor& wide = values ? p.v : p.k;
      unit.gWide = static_cast<uint4*>(const_cast<void*>(wide.data)) +
                   (row * wide.row_stride + token0 * wide.token_stride) / kCopiedDims +
                   head0 * vectors;
      unit.byte_step = units.heads * dim;
      unit.wide_step = p.heads_kv * vectors;
      unit.lanes = min(units.heads, p.heads_kv - head0) * vectors;
      unit.tokens = x.tokens - token0;
      unit.format = x.dtype;
      unit.index = units.first(row, chunk) + part;
      unit.row = row;
      unit.head0 = head0;
      unit.token0 = token0;
      unit.values = values;
    }
    take();
    __syncwarp();  // all lanes see the unit
    return true;
  }

  // Where the scale of the unit's how-manyeth group is, of the lane's token of the first step.
  __device__ const float* scale_of(const KvTensor& x, int row, int head0, int token0, int i) const {
    const int groups = max(x.groups, 1);
    if (!x.scale || i >= units.heads * groups) return nullptr;
    const int head = head0 + i / groups;
    if (head >= p.heads_kv) return nullptr;
    return x.scale + row * x.scale_row_stride + head * x.scale_head_stride +
           (token0 + lane % kTokens) * x.scale_token_stride + i % groups;
  }

  // Counts units of the next 32 rows: of chunks with a token of a tile of keys that is read.
  __device__ void count() {
    constexpr int kTile = Traits::kBlockN, kChunk = CopyUnits::kTokens;
    const int row0 = shared.row0 + 32, row = row0 + lane;
    int first = INT_MAX, last = 0;
    if (row < units.rows) {
      for (int b = row; b < p.batch; b += units.rows) {
        const int len_q = row_len_q(p, b);
        const IntervalMask mask(len_q, row_len_kv(p, b), p.window_left, p.window_right, p.top_left);
        const Interval seen = mask.seen_by_any(0, len_q);
        if (len_q == 0 || seen.lo >= seen.hi) continue;
        first = min(first, seen.lo / kTile * kTile / kChunk);
        last = max(last, ((seen.hi + kTile - 1) / kTile * kTile + kChunk - 1) / kChunk);
      }
    }
    last = min(last, units.chunks);
    int row_end = max(last - first, 0) * units.of_chunk();
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(0xffffffff, row_end, step);
      if (lane >= step) row_end += other;
    }
    row_end += shared.end;
    __syncwarp();  // all lanes have read
    shared.row_chunk[lane] = first;
    shared.row_end[lane] = row_end;
    if (lane == 31) shared.row0 = row0, shared.end = row_end;
    __syncwarp();  // all lanes' rows are there
  }

  // Starts the copies to shared memory of the step that comes next, if there is one.
  __device__ void begin() {
    CopyUnit& unit = shared.unit[begun / kSteps % 2];
    if (more && begun % kSteps == 0) more = find(unit);
    if (more) {
      const int at = begun % kStages, token = begun % kSteps * kTokens;
      if (lane == 0) {
        ptx::barrier_expect(shared.full[at], unit.byte_step * kTokens);
        const auto load = [&](const CUtensorMap& map) {
          ptx::tensor_load(shared.bytes[at], map, 0, unit.head0, unit.token0 + token, unit.row,
                           shared.full[at]);
        };
        unit.values ? load(params.narrow_v) : load(params.narrow_k);
      }
      load_scales(unit, at, token);
      ++begun;
    }
    ptx::cp_async_commit();
  }

  // A lane brings a token's, of every fourth group of the unit's heads.
  __device__ void load_scales(const CopyUnit& unit, int at, int token) const {
    constexpr int kGroups = 32 / kTokens;  // of all lanes
    if (token + lane % kTokens >= unit.tokens) return;
    const KvTensor& x = unit.values ? copied.v : copied.k;
    const float* gScale = unit.gScale[lane];
    for (int i = lane / kTokens; gScale; i += kGroups) {
      ptx::cp_async_4(ptx::shared_address(&shared.scale[at][i][lane % kTokens]),
                      gScale + token * x.scale_token_stride, 4);
      gScale = scale_of(x, unit.row, unit.head0, unit.token0, i + kGroups);
    }
  }

  // A step whose bytes and scales are on their way: of each token, a lane has kCopiedDims elements.
  __device__ void finish(int i) {
    const CopyUnit& unit = shared.unit[i / kSteps % 2];
    const int at = i % kStages, token = i % kSteps * kTokens;
    const uint32_t sScale =
        ptx::shared_address(shared.scale[at][shared.scale_row[unit.values][lane]]);
    const uint32_t sBytes = ptx::shared_address(shared.bytes[at]) + lane * kCopiedDims;
    const int byte_step = unit.byte_step, wide_step = unit.wide_step;
    uint4* const gWide = unit.gWide + int64_t(token) * wide_step + lane;
    const DType format = unit.format;
    const bool has_part = lane < unit.lanes && token < unit.tokens;
    ptx::barrier_wait(shared.full[at], i / kStages % 2);
    ptx::cp_async_wait<kStages - 1>();
    __syncwarp();  // all lanes' scales are there
    if (has_part) {
      if (format == DType::kInt8) {
        copy<DType::kInt8>(sBytes, byte_step, sScale, gWide, wide_step);
      } else if (format == DType::kE4M3) {
        copy<DType::kE4M3>(sBytes, byte_step, sScale, gWide, wide_step);
      } else {
        copy<DType::kE5M2>(sBytes, byte_step, sScale, gWide, wide_step);
      }
    }
    __syncwarp();  // all lanes have read
  }

  template <DType kFormat>
  __device__ void copy(uint32_t sBytes, int byte_step, uint32_t sScale, uint4* gWide,
                       int64_t wide_step) const {
    constexpr int kAtOnce = 4;
#pragma unroll 1
    for (int t0 = 0; t0 < kTokens; t0 += kAtOnce) {
      uint2 bytes[kAtOnce];
      uint32_t scale[kAtOnce];
      ptx::load_shared_v4(scale, sScale + t0 * 4);
#pragma unroll
      for (int t = 0; t < kAtOnce; ++t) bytes[t] = ptx::load_shared_v2(sBytes + t * byte_step);
#pragma unroll
      for (int t = 0; t < kAtOnce; ++t) {
        gWide[t * wide_step] = widen::scaled<Traits::kDType>(widen::to_halves(kFormat, bytes[t].x),
                                                             widen::to_halves(kFormat, bytes[t].y),
                                                             __uint_as_float(scale[t]));
      }
      sBytes += kAtOnce * byte_step;
      gWide += kAtOnce * wide_step;
    }
  }

  __device__ void publish(int unit) const {
    ptx::fence_async_proxy_global();
    __syncwarp();  // all lanes' stores come before what follows
    if (lane == 0) ptx::store_release(copied.copied + unit, 1);
  }
};

}  // namespace jax_fa
