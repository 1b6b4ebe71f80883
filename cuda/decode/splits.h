// How a decode is divided: columns over blocks, keys over splits. Static shapes decide, so that
// scratch can be sized when a program is traced, on a machine with any or no GPU.
#pragma once

#include <algorithm>
#include <cstdint>

namespace jax_fa {

// Query columns (heads of a group x tokens) that one block carries, in mma tiles of 8: as many as
// their accumulators leave registers for.
constexpr int decode_column_tiles(int head_dim, int columns) {
  return columns <= 8 ? 1 : columns <= 16 || head_dim > 128 ? 2 : 4;
}

// Small blocks start, merge and end while others read: 128 rows of 128 keys of 32 int8 heads take
// 56 us with 2 warps and 74 with 4 (H200). Many columns come with few blocks, which need the warps.
constexpr int decode_warps(int column_tiles) { return column_tiles == 1 ? 2 : 4; }

// Bytes of float32 partials and lse that `splits` splits need.
constexpr int64_t decode_scratch_bytes(int splits, int64_t total_q, int heads_q, int head_dim_v) {
  return splits == 1 ? 0 : splits * total_q * heads_q * (head_dim_v + 1) * 4;
}

// The count that minimizes a model of the time on an H200, in microseconds, of a 16-bit cache whose
// rows are full: waves of blocks at the memory's rate, what a block spends beside reading, and the
// second launch with its partials.
constexpr int decode_splits(int batch, int len_q, int heads_q, int heads_kv, int head_dim,
                            int64_t max_len_kv) {
  constexpr int kMaxSplits = 256, kMinKeys = 64;  // kMinKeys: two steps of each of two warps
  constexpr int64_t kScratchBytes = 64 << 20;
  constexpr double kReadBytes = 4.5e6, kBlockKeys = 20, kCombine = 4;  // bytes a us; keys; us

  const int columns = heads_q / heads_kv * len_q;
  const int tiles = decode_column_tiles(head_dim, columns), warps = decode_warps(tiles);
  const int64_t blocks = int64_t(batch) * heads_kv * ((columns + tiles * 8 - 1) / (tiles * 8));
  // resident blocks, as shared memory allows
  const int64_t slots = 132 * (tiles == 4 ? 2 : 1536 / (warps * std::max(head_dim, 128)));
  const double wave_key = slots * head_dim * 4 / kReadBytes;  // a key in each of them

  int best = 1;
  double best_time = 0;
  for (int splits = 1; splits <= kMaxSplits; ++splits) {
    const int64_t scratch = decode_scratch_bytes(splits, int64_t(batch) * len_q, heads_q, head_dim);
    if (splits > 1 && (max_len_kv < splits * kMinKeys || scratch > kScratchBytes)) break;
    const int64_t waves = blocks * splits / slots;
    const double rest = double(blocks * splits % slots) / slots;
    const double last = rest == 0 ? 0 : 0.3 + 0.7 * rest;  // few blocks leave memory idle
    const double read = (waves + last) * (double(max_len_kv) / splits + kBlockKeys) * wave_key;
    const double time = read + (splits == 1 ? 0 : kCombine + 2 * scratch / kReadBytes);
    if (splits == 1 || time < best_time) {
      best = splits;
      best_time = time;
    }
  }
  return best;
}

}  // namespace jax_fa
