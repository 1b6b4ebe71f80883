// The lengths of a batch row, within what the arrays hold for it.
#pragma once

#include "params.h"

namespace jax_fa {

__device__ inline int row_len_q(const AttentionParams& p, int b) {
  int most = p.len_q;
  if (p.q_start) most = (b + 1 < p.batch ? p.q_start[b + 1] : p.total_q) - p.q_start[b];
  return p.q_length ? min(max(p.q_length[b], 0), most) : most;
}

// Queries of row b that belong to another launch: all or none.
__device__ inline int queries_elsewhere(const AttentionParams& p, int b) {
  const int len_q = p.min_len_q > 0 ? row_len_q(p, b) : 0;
  return len_q < p.min_len_q ? len_q : 0;
}

__device__ inline int clamp_length(const AttentionParams& p, int length) {
  return min(max(length, 0), p.kv.len_kv);
}

__device__ inline int row_len_kv(const AttentionParams& p, int b) {
  return p.kv.length ? clamp_length(p, p.kv.length[b]) : p.kv.len_kv;
}

}  // namespace jax_fa
