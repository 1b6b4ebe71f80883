// How many blocks share the keys of one row in a split decode. Static shapes decide, so that
// scratch can be sized when a program is traced, on a machine with any or no GPU.
#pragma once

#include <algorithm>
#include <cstdint>

namespace jax_fa {

// Query columns (heads of a group x tokens) that one block of the decode kernel carries, in mma
// tiles of 8. Wide heads keep one tile: their accumulators fill the register file.
constexpr int decode_column_tiles(int head_dim, int columns) {
  const int most = head_dim <= 64 ? 4 : head_dim <= 128 ? 2 : 1;
  return columns <= 8 ? 1 : std::min(columns <= 16 ? 2 : 4, most);
}

// Bytes of float32 partials and lse that `splits` splits need.
constexpr int64_t decode_scratch_bytes(int splits, int64_t total_q, int heads_q, int head_dim_v) {
  return splits == 1 ? 0 : splits * total_q * heads_q * (head_dim_v + 1) * 4;
}

// The count that minimizes a model of the time on an H200, in microseconds, of a 16-bit cache whose
// rows are full. The constants fit a sweep of splits over bf16 caches from 64 MB to 4 GB.
constexpr int decode_splits(int batch, int len_q, int heads_q, int heads_kv, int head_dim,
                            int64_t max_len_kv) {
  constexpr int kMaxSplits = 256, kMinKeys = 64;  // of a split: one step of a block's four warps
  constexpr int64_t kScratchBytes = 64 << 20;
  constexpr double kReadBytes = 4.5e6, kBlockKeys = 35, kCombine = 4;  // bytes a us; keys; us

  const int columns = heads_q / heads_kv * len_q;
  const int tiles = decode_column_tiles(head_dim, columns);
  const int64_t blocks = int64_t(batch) * heads_kv * ((columns + tiles * 8 - 1) / (tiles * 8));
  const int64_t slots = 132 * (tiles == 1 && head_dim <= 128 ? 3 : 2);  // resident blocks
  const double wave_key = slots * head_dim * 4 / kReadBytes;  // a key in each resident block

  int best = 1;
  double best_time = 0;
  for (int splits = 1; splits <= kMaxSplits; ++splits) {
    const int64_t scratch =
        decode_scratch_bytes(splits, int64_t(batch) * len_q, heads_q, head_dim);
    if (splits > 1 && (max_len_kv < splits * kMinKeys || scratch > kScratchBytes)) break;
    const int64_t waves = blocks * splits / slots;
    const double rest = double(blocks * splits % slots) / slots;
    // few blocks cannot keep the memory busy: a third of a wave takes more than half its time
    const double last = rest == 0 ? 0 : std::min(1., 0.35 + 0.7 * rest);
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
