// Packed rows: which tasks there are, decided on the device from the rows' lengths.
//
// A row of up to max_len_q queries is cut into equal parts of its keys, none longer than a length
// that is common to all rows: a given one, or the candidate that a model of the time likes best, by
// sums over all rows. So the order of rows does not change a row's bits, and with a given length
// neither do other rows. Tasks are (row, part, group of columns, key head), the last varying
// fastest. As many blocks as run at once take them in turn, or as they come to them where some may
// start late. Of short rows each task has a block of its own.
#pragma once

#include "decode/work.cuh"
#include "params.h"

namespace jax_fa::decode {

// What the schedule needs to know of a row. One that belongs to another launch has no groups.
template <typename T>
struct RowWork {
  Row<true> row = {};
  int groups = 0, steps = 0;  // of columns, of keys
  bool elsewhere = false;

  __device__ RowWork(const AttentionParams& p, int b) {
    if (b >= p.batch) return;
    row = Row<true>(p, b);
    elsewhere = row.len_q > p.max_len_q;
    if (row.len_q == 0 || elsewhere) return;
    const Steps seen(row.mask(p).seen_by_any(0, row.len_q), T::kStepKeys);
    groups = (row.len_q * (p.heads_q / p.heads_kv) + T::kColumns - 1) / T::kColumns;
    steps = seen.end - seen.begin;
  }
};

// A length of parts, and what it would mean. Each lane of a warp tries another.
struct Trial {
  int part_steps, units = 0;  // groups of columns x parts, of all rows
  uint32_t inverse;           // 2^32 / part_steps, rounded up

  __device__ Trial(int part_keys, int step_keys)
      : part_steps((part_keys + step_keys - 1) / step_keys),
        inverse(uint32_t(((1ull << 32) + part_steps - 1) / part_steps)) {}

  // exact: rows have less than 2^17 steps, and parts that are not all of a row less than 2^10
  __device__ void add(int groups, int steps) {
    units += groups * max(int(__umulhi(steps + part_steps - 1, inverse)), 1);
  }
};

// A block that asks for a task early holds it back from others: only short ones are taken so.
constexpr int kEarlyKeys = 512;

// In shared memory: registers are for the accumulators.
template <typename T>
struct ScheduleState {
  // sums of each warp, of the rows that it looked at
  int units[T::kWarps][kPartCandidates];
  int64_t steps[T::kWarps];
  int longest[T::kWarps];
  bool elsewhere[T::kWarps];

  int part_steps;    // of the longest part
  bool early;        // whether to take a task while the one before it is at work
  int task, stride;  // the block's next task, and how many on its next but one is; 0: it asks
  int base;          // rows before it have `units_before`
  int units_before;
};

// The lane whose trial promises the shortest time.
template <typename T>
__device__ int choose(const AttentionParams& p, const SplitScratch& scratch, const Trial& trial,
                      int64_t steps, int longest, bool elsewhere) {
  const auto bytes = [](const KvTensor& x) { return x.dtype >= DType::kInt8 ? 1 : 2; };
  const DecodeModel model{int(gridDim.x),
                          float(p.head_dim * bytes(p.k) + p.head_dim_v * bytes(p.v)), 20,
                          T::kWarps * T::kStages * T::kStepKeys};
  const bool split = longest > trial.part_steps;
  const float blocks = float(trial.units) * p.heads_kv;
  const float partial_bytes = split ? blocks * T::kColumns * (p.head_dim_v + 1) * 4 : 0.f;
  const bool fits =
      blocks * T::kColumns <= scratch.columns && parts_of(longest, trial.part_steps) <= kMaxSplits;
  float time = model.time(blocks, float(steps) * p.heads_kv * T::kStepKeys,
                          min(longest, trial.part_steps) * T::kStepKeys, partial_bytes,
                          elsewhere && scratch.next_task);
  if (split && !fits) time = INFINITY;
  int best = threadIdx.x % 32;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const float other_time = __shfl_xor_sync(~0u, time, d);
    const int other = __shfl_xor_sync(~0u, best, d);
    if (other_time < time || (other_time == time && other > best)) {
      time = other_time;
      best = other;
    }
  }
  return best;
}

// By all threads of a block.
template <typename T>
__device__ void start_schedule(ScheduleState<T>& state, const AttentionParams& p,
                               const SplitScratch& scratch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (scratch.whole_rows) {
    if (threadIdx.x == 0) state.early = true;
    return;
  }
  Trial trial(scratch.part_keys ? scratch.part_keys : part_candidate(lane), T::kStepKeys);
  int64_t steps = 0;
  int longest = 0;
  bool elsewhere = false;
  RowWork<T> next(p, warp * 32 + lane);  // its lengths are on the way while those before it count
  for (int b0 = warp * 32; b0 < p.batch; b0 += T::kThreads) {
    const RowWork<T> work = next;
    next = RowWork<T>(p, b0 + T::kThreads + lane);
    steps += int64_t(work.groups) * work.steps;
    longest = max(longest, work.steps);
    elsewhere |= work.elsewhere;
    for (int i = 0; i < min(32, p.batch - b0); ++i) {
      trial.add(__shfl_sync(~0u, work.groups, i), __shfl_sync(~0u, work.steps, i));
    }
  }
#pragma unroll
  for (int d = 1; d < 32; d *= 2) steps += __shfl_xor_sync(~0u, steps, d);
  longest = __reduce_max_sync(~0u, longest);
  elsewhere = __any_sync(~0u, elsewhere);
  state.units[warp][lane] = trial.units;
  state.steps[warp] = steps;
  state.longest[warp] = longest;
  state.elsewhere[warp] = elsewhere;
  __syncthreads();  // all warps' sums are there
  if (warp > 0) return;
#pragma unroll
  for (int w = 1; w < T::kWarps; ++w) {
    trial.units += state.units[w][lane];
    steps += state.steps[w];
    longest = max(longest, state.longest[w]);
    elsewhere |= state.elsewhere[w];
  }
  const int best = choose<T>(p, scratch, trial, steps, longest, elsewhere);
  if (lane != best) return;
  const int workers = elsewhere ? scratch.workers : gridDim.x;  // others leave room
  state.part_steps = trial.part_steps;
  state.task = blockIdx.x;
  state.stride = elsewhere && scratch.next_task ? 0 : workers;
  state.base = blockIdx.x < workers ? 0 : p.batch;
  state.early = state.stride > 0 || min(longest, trial.part_steps) * T::kStepKeys <= kEarlyKeys;
  state.units_before = 0;
  if (blockIdx.x == 0) {
    scratch.rows[p.batch] = {parts_of(longest, trial.part_steps), T::kColumns};
  }
}

// Of whole rows, the block's task after `last`, or its first one: the next group of columns.
template <typename T>
__device__ void next_group(Task<true>& task, const Task<true>* last, const AttentionParams& p) {
  const int b = blockIdx.x / p.heads_kv;
  const RowWork<T> work(p, b);
  task = {work.row, int(blockIdx.x) - b * p.heads_kv, last ? last->column_group + 1 : 0, 0, 1, 0};
  if (task.column_group >= work.groups) task.row.b = p.batch;
}

// The block's next task, by one warp; row `batch` where none is left.
template <typename T>
__device__ void next_task(ScheduleState<T>& state, Task<true>& task, const AttentionParams& p,
                          const SplitScratch& scratch) {
  const int lane = threadIdx.x % 32;
  if (lane == 0 && state.stride == 0) state.task = atomicAdd(scratch.next_task, 1);
  __syncwarp();  // what lanes wrote before is there
  const int index = state.task, unit = index / p.heads_kv;
  int base = state.base, units_before = state.units_before;
  for (; base < p.batch; base += 32) {
    const RowWork<T> work(p, base + lane);
    const int parts = parts_of(work.steps, state.part_steps), units = work.groups * parts;
    int scan = units;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int other = __shfl_up_sync(~0u, scan, d);
      if (lane >= d) scan += other;
    }
    const int first = units_before + scan - units;
    if (unit >= first && unit < first + units) {  // true for one lane at most
      const int head_kv = index % p.heads_kv, within = unit - first;
      task = {work.row, head_kv, within % work.groups, within / work.groups, parts, index};
      if (within == 0 && head_kv == 0) scratch.rows[base + lane] = {first, parts};
    }
    const int units_after = units_before + __shfl_sync(~0u, scan, 31);
    if (unit < units_after) break;
    units_before = units_after;
  }
  __syncwarp();  // no lane reads the state any more
  if (lane == 0) {
    if (base >= p.batch) task.row.b = p.batch;
    state.task = index + state.stride;
    state.base = base;
    state.units_before = units_before;
  }
}

}  // namespace jax_fa::decode
