// What a block of the decode kernel works on: its queries and its share of the keys.
#pragma once

#include "mask.cuh"
#include "params.h"

namespace jax_fa::decode {

// One of the queries that a block carries: a token of one of the heads that share a key head.
struct Column {
  int token, head;  // token -1: there is none
  int position;     // the key that it is aligned with, from where ALiBi and the window count
  Interval keys;    // that it sees
};

// The keys that a block reads.
struct Share {
  Interval any, all;  // keys that any, and that all, of the row's tokens see
  int first_step, end_step;

  __device__ Share(const IntervalMask& mask, int len_q, int step_keys, int split, int splits)
      : any(mask.seen_by_any(0, len_q)), all(mask.seen_by_all(0, len_q)) {
    const int begin = any.lo / step_keys;
    const int end = any.hi <= any.lo ? begin : (any.hi + step_keys - 1) / step_keys;
    first_step = begin + int64_t(end - begin) * split / splits;
    end_step = begin + int64_t(end - begin) * (split + 1) / splits;
  }

  __device__ bool all_see(int key, int keys) const { return key >= all.lo && key + keys <= all.hi; }
};

__device__ inline IntervalMask row_mask(const AttentionParams& p, int b) {
  const int len = p.kv.length ? min(max(p.kv.length[b], 0), p.kv.len_kv) : p.kv.len_kv;
  return {p.len_q, len, p.window_left, p.window_right};
}

// Column i of those of a row and key head: heads of the group vary fastest.
__device__ inline Column make_column(const AttentionParams& p, const IntervalMask& mask,
                                     int head_kv, int i) {
  const int heads_group = p.heads_q / p.heads_kv, token = i / heads_group;
  if (token >= p.len_q) return {-1, 0, 0, {0, 0}};
  const int head = head_kv * heads_group + i % heads_group;
  return {token, head, mask.diagonal + token, {mask.lo(token), mask.hi(token)}};
}

}  // namespace jax_fa::decode
