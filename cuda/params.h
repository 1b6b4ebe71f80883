// What one launch needs, as plain data: the only header that ffi.cc, plan.cc and the kernels share.
// All strides and offsets count elements and are 64-bit.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace jax_fa {

enum class DType : int { kF16, kBF16, kF32, kInt8, kE4M3, kE5M2 };

// The widest tile that all kernels have; beyond it the portable forward has them, of 16 bits.
constexpr int kMostHeadDim = 256;

// Keys or values: [rows, tokens, heads_kv, dim], where a row is a batch row, a row of a cache or a
// page of a pool (packed keys are one row). `dim` is contiguous, the other axes go by strides.
struct KvTensor {
  const void* data;
  const float* scale;  // [rows, heads_kv, tokens, groups], strides 0 along axes of size 1; or null
  int64_t row_stride, token_stride, head_stride;
  int64_t scale_row_stride, scale_head_stride, scale_token_stride;
  int groups;  // scales along dim: group g holds for elements [g, g + 1) * dim / groups
  int rows;    // contiguous: batch row b without a row map reads row b % rows
  int tokens;  // of a row
  DType dtype;
};

// Where key j of batch row b lies. Contiguous: position start[b] + j of row rows[b]. Paged:
// position j % page_size of page page_table[b][j / page_size]. A layer adds layer[.] * layer_stride
// rows.
struct KvIndex {
  const int* start;       // [batch] or null: 0
  const int* length;      // [batch] or null: len_kv
  const int* rows;        // [batch] or null: b % KvTensor::rows
  const int* page_table;  // [batch, max_pages] or null: contiguous
  const int* layer;       // [layers] or null: 0
  int layers;             // 1: one layer for all rows, batch: one for each
  int layer_stride;       // rows (or pages) in one layer
  int max_pages, page_size;
  int len_kv;  // static bound on a row's length
};

constexpr int kTakenCounts =
    2;  // of tiles, and of tasks of a decode launch, that blocks have taken

// One attention call. 16-bit and float32 arrays are aligned to 16 bytes with strides that are
// multiples of it, 8-bit ones to 8. Queries are dense, row b = tokens [b, b + 1) * len_q, or
// packed: row b has q_length[b] tokens from q_start[b] on; starts never decrease with b and rows do
// not overlap. Tokens of the array that belong to no row give o = 0 and lse = -inf, as do tokens of
// a dense row at or past q_length[b].
struct AttentionParams {
  const void* q;  // [total_q, heads_q, head_dim], by strides
  void* o;        // [total_q, heads_q, head_dim_v], contiguous
  float* lse;  // natural log, at b * lse_row_stride + head * lse_head_stride + token, where token
               // counts from the row's start when dense and from the array's when packed
  int64_t q_token_stride, q_head_stride;
  int64_t lse_row_stride, lse_head_stride;  // lse_row_stride is 0 for packed queries
  const int* q_start;                       // [batch], packed only; null: dense
  const int* q_length;                      // [batch] or null: len_q
  int batch, len_q, total_q;
  int max_len_q;  // static bound on a row's length; decode leaves longer packed rows to prefill
  int min_len_q;  // packed rows with fewer queries belong to another launch: they are neither
                  // computed nor written; padding still is (sm90: that launch follows, unless
                  // this one runs beside it)
  int heads_q, heads_kv, head_dim, head_dim_v;
  KvTensor k, v;
  KvIndex kv;
  const float* alibi_slopes;  // [batch, heads_q] or null
  const float* sinks;         // [batch, heads_q] or null
  const void* bias;           // [batch, heads_q, len_q, len_kv] by strides, 0 along axes of size 1
  int64_t bias_row_stride, bias_head_stride, bias_query_stride, bias_key_stride;
  int bias_rows;  // row b reads b % bias_rows
  DType bias_dtype;
  const uint32_t* seeds;          // [batch, 2] of dropout, or null: none
  int dropout_limit;              // of 2^15 probabilities, so many are lost
  bool dropout_heads;             // else all heads drop what head 0 does
  float dropout_scale;            // 1 / (1 - rate)
  float dropout_kept;             // 1 - rate
  int* next_tile;                 // scratch of kTakenCounts ints, for prefill; needs no initial
                                  // value. Of run_copied (plan.h) more follow
  float scale, softcap;           // softcap == 0: none
  int window_left, window_right;  // -1: unbounded; causal is (.., 0)
  bool top_left;                  // query i's diagonal is key i; else i + len_kv - len_q of its row
  bool exact;                     // float32: products are not rounded to TF32
  DType dtype;                    // of q and o
  // Whether the launch may run beside the one before it, of whose results it needs none; it ends no
  // sooner. A launch that does not know how waits for its turn.
  bool beside_previous;
};

// Scratch of a split decode: every split writes a normalized partial and its lse (natural log).
struct SplitScratch {
  float* o;          // [splits, total_q, heads_q, head_dim_v]; packed: [columns, head_dim_v]
  float* lse;        // the same without head_dim_v
  int splits;        // of dense queries
  int heads_group;   // the launcher's heads_q / heads_kv: short-lived blocks do not divide
  bool in_cluster;   // the splits are blocks of a cluster and merge there, without scratch
  int columns;       // that there is place for; below: packed queries, divided on the device
  int part_keys;     // the most keys of a part of a row, or 0: the device chooses
  int2* rows;        // [batch + 1]: a row's first task and its parts, where some row has several;
                     // at the end the most parts of a row, and the columns of a task
  int* next_task;    // tasks of packed rows that have been taken, 0 at first; or null: each block
                     // takes them in a turn of its own
  bool whole_rows;   // packed: a block for each row and key head, which reads all of its keys
  bool leaves_room;  // on every multiprocessor, if there are rows for another launch:
  int workers;       // then only so many blocks work, as the launcher finds
};

// The gradients of one attention call whose o and lse are known; o and dout are [total_q, heads_q,
// head_dim_v], contiguous, dlse lies as lse. dq has the strides below and as many tokens as q; dk
// and dv have those of keys and of values, and one row for each batch row of the queries (packed
// keys: one in all).
struct BackwardParams {
  AttentionParams fwd;
  const void* dout;
  const float* dlse;
  void *dq, *dk, *dv;
  int64_t dq_token_stride, dk_row_stride, dk_token_stride, dv_row_stride, dv_token_stride;
  int total_k;    // packed keys: tokens of the array
  float* dsinks;  // [batch, heads_q] or null
  void* dbias;    // [batch, then as bias], contiguous, of bias's dtype, or null
  int dbias_heads, dbias_queries, dbias_keys;  // sizes of bias, each maybe 1
  bool deterministic;
  // Scratch: per query {lse in log2 units, +inf where the query sees nothing; rowsum(dout o) -
  // dlse}, lying as lse, and where dq is summed (see sm80/bwd_tiles.h), null if it is not.
  float2* rows;
  float* dq_sum;
};

// Appends new keys and values to a cache in place (the outputs alias the cache operands).
struct AppendParams {
  const void *k_new, *v_new;  // [total_new, heads_kv, dim], contiguous, of `dtype`
  void *k, *v;                // caches, [rows, tokens, heads_kv, dim], contiguous
  float *k_scale, *v_scale;   // [rows, heads_kv, tokens, groups] written when quantizing per
                              // token and head or group; with `tensor` scales only read
  const int* new_start;       // [batch] packed new tokens; null: row b from b * len_new
  const int* counts;          // [batch] new tokens of a row, or null: len_new
  const int* lengths;         // [batch] where each row's new tokens go
  const float *cos, *sin;     // [max_position, rotary_dim / 2] or null; position = lengths[b] + i
  KvIndex index;              // rows, page_table, layer
  int row_limit;              // rows or pages at or past it (or negative) are not written
  int batch, len_new, total_new;
  int heads_kv, k_dim, v_dim, rotary_dim, max_position, capacity;  // capacity: tokens of a row
  int k_groups, v_groups;                                          // 0: no scales
  int64_t k_scale_row_stride, k_scale_head_stride, k_scale_token_stride;
  int64_t v_scale_row_stride, v_scale_head_stride, v_scale_token_stride;
  bool scale_given;  // scales are inputs (tensor granularity), not made here
  bool interleaved;
  DType dtype, k_dtype, v_dtype;
};

// cuda/sm80/fwd.cu: prefill on mma.sync, every feature; 8-bit keys and values for 16-bit queries
// alone. kHeadDim is the tile: the smallest compiled head dim that holds head_dim and head_dim_v;
// dims between are zero-filled on the way into shared memory.
template <int kHeadDim>
cudaError_t launch_fwd_sm80(const AttentionParams& params, cudaStream_t stream);

// cuda/sm90/fwd.cu: the same on Hopper, for what fwd_sm90_covers (tiles.h), on the tiles of keys
// and of values that fwd_sm90_dim_v names. `copied` (cache/copied.h): what keys and values are made
// from meanwhile, unless they are there.
struct CopiedCache;
template <int kHeadDim, int kHeadDimV>
cudaError_t launch_fwd_sm90(const AttentionParams& params, const CopiedCache& copied,
                            cudaStream_t stream);

// cuda/float32/attention.cu: attention and gradients in float32 on no tensor core, for
// params.exact, every feature but the gradient of bias; the backward needs `rows` (below) to have
// run.
cudaError_t launch_fwd_float32(const AttentionParams& params, cudaStream_t stream);
cudaError_t launch_bwd_float32(const BackwardParams& params, cudaStream_t stream);

// cuda/sm80/bwd_*.cu: gradients on mma.sync, every feature; tiles as in the forward. `shared` gives
// dq, dk and dv, with `stages` buffers of queries; `keys` gives dk and dv, and dq too if
// params.dq_sum; `queries` gives dq, `bias` dbias. All need `rows` to have run, which gives dsinks.
cudaError_t launch_bwd_rows_sm80(const BackwardParams& params, cudaStream_t stream);
template <int kHeadDim>
cudaError_t launch_bwd_shared_sm80(const BackwardParams& params, int stages, cudaStream_t stream);
template <int kHeadDim>
cudaError_t launch_bwd_keys_sm80(const BackwardParams& params, cudaStream_t stream);
template <int kHeadDim>
cudaError_t launch_bwd_queries_sm80(const BackwardParams& params, cudaStream_t stream);
template <int kHeadDim>
cudaError_t launch_bwd_bias_sm80(const BackwardParams& params, cudaStream_t stream);

// cuda/sm90/bwd.cu: dq, dk and dv on Hopper, for what bwd_sm90_covers (bwd_tiles.h), after `rows`.
template <int kHeadDim>
cudaError_t launch_bwd_sm90(const BackwardParams& params, cudaStream_t stream);

// cuda/decode: few queries a row over a long cache, keys split over blocks. launch_combine merges
// the parts of packed rows, which launch_decode leaves to it.
template <int kHeadDim>
cudaError_t launch_decode(const AttentionParams& params, const SplitScratch& scratch,
                          cudaStream_t stream);
template <int kHeadDim>
cudaError_t launch_decode_bytes(const AttentionParams& params, const SplitScratch& scratch,
                                cudaStream_t stream);
template <int kHeadDim>
cudaError_t launch_combine(const AttentionParams& params, const SplitScratch& scratch,
                           cudaStream_t stream);

// cuda/cache/append.cu
cudaError_t launch_append(const AppendParams& params, cudaStream_t stream);

// cuda/cache/widen.cu: dense keys and values of 8 bits to copies of the queries' type, those of
// `params`; tokens that no tile of prefill has may stay as they are.
cudaError_t launch_widen(const AttentionParams& params, const CopiedCache& copied,
                         cudaStream_t stream);

}  // namespace jax_fa
