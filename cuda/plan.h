// Which kernel runs an operation, and with what: the one place that decides, for launches and for
// `jax_fa.explain` alike.
#pragma once

#include <string>

#include "params.h"

namespace jax_fa {

enum class Operation { kPrefill, kDecode, kHybrid };

struct Plan {
  const char* kernel;
  int tile_q, tile_kv, tile_dim;  // queries (decode: columns), keys and dims of a tile
  int warps;
  int splits;      // parts into which a row's keys are split
  int64_t blocks;  // of the grid
};

int splits_of_decode(int batch, int len_q, int heads_q, int heads_kv, int head_dim,
                     int64_t max_len_kv, int key_bytes);

// The plan of an operation ("prefill", "decode", "hybrid") on static shapes; total_q counts packed
// queries and is 0 for dense ones; kv_bytes are those of an element, for decode 0 where only its
// general kernels read the cache; `general` says whether scores have more than a scale.
Plan plan_of(const std::string& operation, int batch, int len_q, int total_q, int max_len_kv,
             int heads_q, int heads_kv, int head_dim, int element_bytes, int kv_bytes,
             bool general);

cudaError_t run_attention(Operation operation, const AttentionParams& params,
                          const SplitScratch& scratch, cudaStream_t stream);

}  // namespace jax_fa
