// Which kernel runs an operation, and with what: the one place that decides, for launches and for
// `jax_fa.explain` alike.
#pragma once

#include <cmath>
#include <string>

#include "decode/splits.h"
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

int splits_of_decode(int batch, int len_q, int heads_q, int heads_kv, int head_dim, int head_dim_v,
                     int64_t max_len_kv, int key_bytes, bool grouped);

// Scratch of the rows of a hybrid batch that are decoded; none where all run in prefill kernels.
PackedScratch scratch_of_hybrid(int batch, int heads_q, int heads_kv, int head_dim, int head_dim_v,
                                int64_t max_len_kv, int split_size);

// The largest head dim, of keys or of values, for which kernels are compiled that run queries of so
// many bytes an element, or their gradients.
int max_head_dim(int element_bytes, bool backward);

// Of 2^15 probabilities so many are lost: what Python rounds it to, in the same arithmetic.
inline int dropout_limit(double rate) { return int(std::nearbyint(rate * 32768)); }

struct PlanOptions {
  bool general, bias, masked;  // scores beyond a scale, a dense bias, a window or causal
  double dropout_rate;         // 0: none
  bool grouped;                // decode: elements of a key have several scales
  bool fp8_keys;   // prefill of bfloat16: keys of fp8 and values suit products with bytes
  bool copied;     // prefill: keys and values of 8 bits are copied to the queries' type
  int page_size;   // 0: contiguous keys
  int capability;  // of the device, 10 * major + minor
  int64_t sms;
  bool exact;     // float32 without TF32
  int shared_kb;  // of shared memory that a block can have
};

// The plan of an operation ("prefill", "decode", "hybrid") on static shapes; total_q counts packed
// queries and is 0 for dense ones; kv_bytes are those of an element, 0 where only general kernels
// read the cache: those of decode, or the portable ones.
Plan plan_of(const std::string& operation, int batch, int len_q, int total_q, int max_len_kv,
             int heads_q, int heads_kv, int head_dim, int head_dim_v, int element_bytes,
             int kv_bytes, const PlanOptions& options);

// Whether kernels of cuda/sm90/ run on devices of that capability (10 * major + minor).
bool runs_hopper(int capability);

// Floats of scratch in which the backward kernels sum dq; 0 where they do not. total_q counts
// packed queries and is 0 for dense ones.
int64_t dq_sum_size(int batch, int len_q, int total_q, int heads_q, int head_dim, int head_dim_v,
                    int element_bytes, bool deterministic);

// The plan of a backward call: the kernel that owns keys. Packed queries have len_kv keys in all.
Plan plan_of_backward(int batch, int len_q, int total_q, int len_kv, int heads_q, int heads_kv,
                      int head_dim, int head_dim_v, int element_bytes, bool deterministic,
                      const PlanOptions& options);

cudaError_t run_backward(const BackwardParams& params, cudaStream_t stream);

// Dense prefill over keys and values of 8 bits by way of `k` and `v`, scratch for copies of them in
// the queries' type, [rows, CopyScratch::tokens, heads_kv, dim]. The scratch of params.next_tile
// has CopyScratch::ints more at its end: a count of units and a flag for each.
struct CopyScratch {
  int ints, tokens;
};
cudaError_t run_copied(const AttentionParams& params, void* k, void* v, cudaStream_t stream);
CopyScratch copy_scratch(int rows, int tokens, int heads_kv, int head_dim, int head_dim_v);

// Whether Hopper's prefill kernel of these head dims may multiply fp8 keys as they are stored.
bool multiplies_bytes(int head_dim, int head_dim_v);

cudaError_t run_attention(Operation operation, const AttentionParams& params,
                          const SplitScratch& scratch, cudaStream_t stream);

}  // namespace jax_fa
