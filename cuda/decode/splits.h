// How a decode is divided: columns over blocks, keys over splits. Dense queries are divided by
// static shapes, so that scratch can be sized when a program is traced, on a machine with any or no
// GPU; packed rows (schedule.cuh) by their lengths on the device, within scratch of a static size.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace jax_fa {

constexpr int kMaxSplits = 256;

// Query columns (heads of a group x tokens) that one block carries, in mma tiles of 8: as many as
// their accumulators leave registers for.
constexpr int decode_column_tiles(int head_dim, int columns) {
  return columns <= 8 ? 1 : columns <= 16 || head_dim > 128 ? 2 : 4;
}

// Of a block where there is no more than one for each multiprocessor.
constexpr int kWideWarps = 8;

// The most keys that such a block was seen to read better than several beside each other.
constexpr int wide_keys(int element_bytes) { return element_bytes == 1 ? 2048 : 8192; }

// Small blocks start, merge and end while others read: 128 rows of 128 keys of 32 int8 heads take
// 56 us with 2 warps and 74 with 4 (H200). Many columns come with few blocks, which need the warps.
constexpr int decode_warps(int column_tiles) {
  return column_tiles == 1 ? 2 : column_tiles == 2 ? 4 : kWideWarps;
}

// KiB of shared memory that a GPU must give such a block; what no GPU before sm_90 has, code for
// those leaves out. GPUs with less take fewer columns or warps, which are right for any number of
// splits.
constexpr int decode_shared_kb(int head_dim, int column_tiles, int warps) {
  if (warps == kWideWarps) return 227;
  return column_tiles > 1 && head_dim > 128 ? 163 : 99;
}

// Keys of a step of a warp: an mma tile of 16, or two where one would be less than 4 KB of 16-bit
// elements.
constexpr int decode_step_keys(int head_dim, int column_tiles, bool byte_keys) {
  return head_dim <= 64 && column_tiles <= 2 && !byte_keys ? 32 : 16;
}

constexpr int kMultiprocessors = 132, kProcessingClusters = 8;  // of an H200

// Parts of a row whose blocks are a cluster: as many as all GPUs that know these allow. Of narrow
// blocks, many of which run on a multiprocessor, clusters of four read slowly: H200, 128 x 4096
// keys of 8 heads, bf16, 504 us whole, 484 in clusters of two, 491 of four, 496 in two parts that
// another launch merges; 16 x 32768 keys 478 in clusters of two, 509 of four.
constexpr int kMaxCluster = 8, kNarrowCluster = 2;

// Whether so many rows' clusters of that size run at once, and do it well. The multiprocessors of a
// cluster belong to one processing cluster, which has some even number of them: of an H200's, 30
// clusters of 4 fit. Sizes other than powers of 2 fit but read slowly: 8192 keys of 32 heads take
// 39 us in clusters of 3 and 34 in clusters of 2.
constexpr bool fits_clusters(int64_t rows, int size) {
  return size <= kMaxCluster && (size & (size - 1)) == 0 &&
         rows * size <= kMultiprocessors - kProcessingClusters * (size - 2);
}

// Blocks whose warps' keys have so many dims on each of them.
constexpr int slots_of_dims(int dims, int head_dim, int warps) {
  return kMultiprocessors * std::max(dims / (warps * std::max(head_dim, 128)), 1);
}

// Blocks that they hold at once, as shared memory allows for 16-bit keys, registers for bytes.
constexpr int decode_slots(int head_dim, int column_tiles, int warps, int key_bytes = 2) {
  return slots_of_dims(key_bytes == 1 && column_tiles == 1 ? 2048 : 1536, head_dim, warps);
}

// A model of the time on an H200, in microseconds: waves of blocks at the memory's rate, what a
// block spends beside reading, and the second launch with its partials.
struct DecodeModel {
  static constexpr float kReadBytes = 4.5e6f, kCombine = 4;  // bytes a us; us

  int slots;        // blocks that run at once
  float key_bytes;  // of a key and its value, of one head
  int block_keys;   // that a block could read while it starts, merges and ends
  int flight_keys;  // that a block has in flight
  // Whether blocks do little but wait for memory, each for all that it has in flight at once. Then
  // a third of the slots read as fast as all: H200, 64 x 8192 keys of 8 heads take 482 us in 512
  // blocks, 491 in 1536; 16 x 32768 keys 478 in 256, 485 in 768, 657 in 128; of head_dim 64, 64 x
  // 4096 keys of 3 heads 50 in 384, 54 in 576, 55 in 192.
  bool streams = false;

  // `blocks` read `keys` keys in all, none more than `longest`; partials are float32. Beside
  // another launch nobody knows how full the last wave is.
  __host__ __device__ float time(float blocks, float keys, float longest, float partial_bytes,
                                 bool beside = false) const {
    const float waves = blocks / slots, rest = beside ? 0 : waves - int(waves);
    // few blocks leave memory idle: the last wave takes so much more than its part of a full one
    const float share = !streams ? 0.3f : waves < 1 ? 0.f : 0.09f;
    const float idle = rest == 0 && !beside ? 0 : share * (1 - rest) * (longest + block_keys);
    const float rate = slots * key_bytes / kReadBytes;
    const float read = ((keys + blocks * block_keys) / slots + idle) * rate;
    const float latency = streams ? 1.7f : 1.f;  // us for what a block has in flight
    const float wait = ceilf(longest / flight_keys) * latency;
    const float start = streams ? 3 : 0;  // us
    const float combine = partial_bytes > 0 ? kCombine + 2 * partial_bytes / kReadBytes : 0;
    return start + fmaxf(read, wait) + combine;
  }
};

// The same for blocks of kWideWarps: what they spend beside reading, beyond what others do, and the
// rate of the memory or of a block. 1 row of 32 heads of 128, 16 bits (H200): 1 key 3.8 us; in
// clusters of 2, 512 keys 6.2, 2048 keys 11.8, 8192 keys 34.
struct WideModel {
  static constexpr float kStart = 1.6f, kKey = 7.2e-3f;  // us; us of a block for a key of 128 dims
  static constexpr float kClusterMerge = 0.8f;           // us

  // dims: of a key and its value
  static float time(int64_t rows, int splits, int64_t keys, int dims, int element_bytes,
                    int64_t scratch_bytes) {
    const float read = float(rows * keys) * dims * element_bytes / DecodeModel::kReadBytes;
    const float block = float((keys + splits - 1) / splits) * kKey * dims / 256;
    const float time = kStart + std::max(read, block);
    if (splits == 1) return time;
    if (fits_clusters(rows, splits)) return time + kClusterMerge;
    return time + DecodeModel::kCombine + 2 * scratch_bytes / DecodeModel::kReadBytes;
  }
};

constexpr int kMinSplitKeys = 64;  // two steps of each of two warps

// Bytes of float32 partials and lse that `splits` splits need.
constexpr int64_t decode_scratch_bytes(int splits, int64_t total_q, int heads_q, int head_dim_v) {
  return splits == 1 ? 0 : splits * total_q * heads_q * (head_dim_v + 1) * 4;
}

struct DecodeSplit {
  int warps, splits;
};

// What the models like best for dense queries over a cache of full rows. key_bytes: of an element;
// 0 for what only the general kernels read. grouped: elements of a key have several scales.
inline DecodeSplit decode_split(int batch, int len_q, int heads_q, int heads_kv, int head_dim,
                                int head_dim_v, int64_t max_len_kv, int key_bytes, bool grouped) {
  constexpr int64_t kScratchBytes = 64 << 20;
  constexpr float kLeast = 3;  // us: blocks of few warps never take less
  const int columns = heads_q / heads_kv * len_q, dim = std::max(head_dim, head_dim_v);
  const int tiles = decode_column_tiles(dim, columns);
  const int64_t blocks = int64_t(batch) * heads_kv * ((columns + tiles * 8 - 1) / (tiles * 8));

  DecodeSplit best{decode_warps(tiles), 1};
  float best_time = INFINITY;
  // time(splits, scratch bytes), for what there is place for
  const auto try_warps = [&](int warps, int64_t most_blocks, auto time_of) {
    for (int splits = 1; splits <= kMaxSplits; ++splits) {
      const int64_t scratch =
          decode_scratch_bytes(splits, int64_t(batch) * len_q, heads_q, head_dim_v);
      if (splits > 1 && (max_len_kv < splits * kMinSplitKeys || scratch > kScratchBytes)) break;
      if (blocks * splits > most_blocks) break;
      const float time = time_of(splits, scratch);
      if (time < 0.99f * best_time) {
        best = {warps, splits};
        best_time = time;
      }
    }
  };
  const auto try_slots = [&](int slots, int64_t most_blocks) {
    const int warps = decode_warps(tiles);
    // two steps of each warp
    const int flight_keys = warps * 2 * decode_step_keys(dim, tiles, key_bytes != 2);
    const DecodeModel model{slots, (head_dim + head_dim_v) * (key_bytes == 1 ? 1.f : 2.f), 20,
                            flight_keys, tiles == 1 && key_bytes > 0 && !grouped};
    try_warps(warps, most_blocks, [&](int splits, int64_t scratch) {
      const bool in_cluster = tiles == 1 && splits == kNarrowCluster;
      const float time = model.time(float(blocks) * splits, float(blocks) * max_len_kv,
                                    float(max_len_kv) / splits, in_cluster ? 0.f : float(scratch));
      return std::max(time, kLeast);
    });
  };
  const int warps = decode_warps(tiles), slots = decode_slots(dim, tiles, warps);
  // One wave of bytes is best in few blocks: 64 x 8192 keys of 8 heads take 267 us in 512 and 282
  // in 1024 (H200). With scales of groups, warps that work on these leave memory idle in so few: 16
  // x 32768 keys take 298 us in 768 blocks, 320 in 512 and 304 in 1024.
  if (key_bytes == 1) {
    const int few = slots_of_dims(1024, dim, warps);
    if (tiles == 1 && dim >= 128 && !grouped) try_slots(few, few);
    try_slots(slots, slots);
  }
  try_slots(decode_slots(dim, tiles, warps, key_bytes), INT64_MAX);
  if (tiles == 1 && dim <= 128 && key_bytes > 0) {
    try_warps(kWideWarps, kMultiprocessors, [&](int splits, int64_t scratch) {
      if (max_len_kv > splits * wide_keys(key_bytes)) return INFINITY;
      return WideModel::time(blocks, splits, max_len_kv, head_dim + head_dim_v, key_bytes, scratch);
    });
  }
  return best;
}

// --- packed rows ---

// Packed rows of up to so many queries are decoded. A row of more columns than a block carries
// reads its keys for each group of columns, all but once from L2: prefill tiles would for each
// head.
constexpr int decode_max_len_q(int heads_group) { return std::clamp(32 / heads_group, 1, 16); }

// The tile of columns for packed rows is that of single queries, which are the most. Four would
// spill registers.
constexpr int packed_column_tiles(int heads_group) { return heads_group <= 8 ? 1 : 2; }

// Scratch of packed rows, for shapes that are known when a program is traced.
struct PackedScratch {
  int columns;    // of tasks, whose partials it holds
  int part_keys;  // the most keys of a part, or 0: the device chooses
};

// A split_size other than 0 fixes the parts whatever the rows' lengths are, so it grows until the
// partials of full rows have place. Else a few waves of blocks have.
constexpr PackedScratch packed_scratch(int batch, int heads_q, int heads_kv, int head_dim,
                                       int head_dim_v, int64_t max_len_kv, int split_size) {
  constexpr int64_t kBytes = 96 << 20;
  const int heads_group = heads_q / heads_kv, tiles = packed_column_tiles(heads_group);
  const int64_t rows = int64_t(batch) * heads_kv, most = kBytes / ((head_dim_v + 1) * 4);
  if (split_size == 0) {
    const int dim = std::max(head_dim, head_dim_v);
    const int64_t tasks = rows + 8 * decode_slots(dim, tiles, decode_warps(tiles));
    return {int(std::min(tasks * tiles * 8, most)), 0};
  }
  const int groups = (heads_group * decode_max_len_q(heads_group) - 1) / (tiles * 8) + 1;
  int64_t keys = std::max(split_size, kMinSplitKeys), columns = 0;
  while (true) {
    const int64_t parts = (max_len_kv + keys - 1) / keys;
    columns = parts <= 1 ? 1 : rows * groups * tiles * 8 * parts;
    if (parts <= kMaxSplits && columns <= most) break;
    keys += keys / 4;
  }
  return {int(columns), int(std::min<int64_t>(keys, 1 << 30))};
}

// Whether packed rows are so short that none is worth dividing: a schedule and partial results cost
// more. H200, 100 rows of 128 keys and 32 heads: 61 us, divided on the device behind an empty
// prefill launch 90. part_keys: the most keys of a part, 0 for any.
constexpr bool decodes_whole_rows(int64_t max_len_kv, int part_keys) {
  return max_len_kv <= 512 && (part_keys == 0 || max_len_kv <= part_keys);
}

// Candidates for the most keys of a part, a quarter of an octave apart: 64, 80, 96, 112, 128, 160,
// ... 12288, and the last one for rows in one piece.
constexpr int kPartCandidates = 32;
__host__ __device__ constexpr int part_candidate(int i) {
  return i == kPartCandidates - 1 ? 1 << 30 : ((4 + i % 4) << i / 4) * (kMinSplitKeys / 4);
}

// Parts of a row of `steps` steps where a part has up to part_steps. A row without keys has one,
// which writes its result.
__host__ __device__ constexpr int parts_of(int steps, int part_steps) {
  return steps <= part_steps ? 1 : (steps + part_steps - 1) / part_steps;
}

// The first step of a part of `steps`; that of part `parts` is their end.
__host__ __device__ constexpr int part_begin(int steps, int part, int parts) {
  return steps / parts * part + steps % parts * part / parts;  // of 32 bits
}

}  // namespace jax_fa
