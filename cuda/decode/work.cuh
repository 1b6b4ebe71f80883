// What a block of the decode kernel works on: its queries and its share of the keys.
#pragma once

#include "decode/splits.h"
#include "mask.cuh"
#include "params.h"
#include "rows.cuh"

namespace jax_fa::decode {

// A batch row. Its queries are tokens [token0, token0 + len_q) of the array.
template <bool kPacked>
struct Row {
  int b, len_q, len_kv;
  int64_t token0;

  Row() = default;
  __device__ Row(const AttentionParams& p, int b)
      : b(b),
        len_q(kPacked ? row_len_q(p, b) : p.len_q),
        len_kv(row_len_kv(p, b)),
        token0(kPacked ? p.q_start[b] : int64_t(b) * p.len_q) {}

  __device__ IntervalMask mask(const AttentionParams& p) const {
    return {len_q, len_kv, p.window_left, p.window_right};
  }

  __device__ int64_t lse_offset(const AttentionParams& p, int token, int head) const {
    return b * p.lse_row_stride + head * p.lse_head_stride + (kPacked ? token0 : 0) + token;
  }
};

// A group of columns of a row and key head, over a part of its keys.
template <bool kPacked>
struct Task {
  Row<kPacked> row;
  int head_kv, column_group;
  int part, parts;
  int index;  // packed rows: among all tasks
};

// One of the queries that a block carries: a token of one of the heads that share a key head.
struct Column {
  int token, head;  // token -1: there is none
  int position;     // the key that it is aligned with, from where ALiBi and the window count
  Interval keys;    // that it sees
};

// Steps of keys that any of a row's queries see.
struct Steps {
  int begin, end;

  __device__ Steps(Interval any, int step_keys)
      : begin(any.lo / step_keys),
        end(any.hi <= any.lo ? begin : (any.hi + step_keys - 1) / step_keys) {}
};

// The keys that a block reads.
struct Share {
  Interval any, all;  // keys that any, and that all, of the row's tokens see
  int first_step, end_step;

  __device__ Share(const IntervalMask& mask, int len_q, int step_keys, int part, int parts)
      : any(mask.seen_by_any(0, len_q)), all(mask.seen_by_all(0, len_q)) {
    const Steps steps(any, step_keys);
    first_step = steps.begin + part_begin(steps.end - steps.begin, part, parts);
    end_step = steps.begin + part_begin(steps.end - steps.begin, part + 1, parts);
  }

  __device__ bool all_see(int key, int keys) const { return key >= all.lo && key + keys <= all.hi; }
};

// Column i of those of a row and key head: heads of the group vary fastest.
template <bool kPacked>
__device__ Column make_column(const AttentionParams& p, const Row<kPacked>& row,
                              const IntervalMask& mask, int head_kv, int i) {
  const int heads_group = p.heads_q / p.heads_kv, token = i / heads_group;
  if (token >= row.len_q) return {-1, 0, 0, {0, 0}};
  const int head = head_kv * heads_group + i % heads_group;
  return {token, head, mask.diagonal + token, {mask.lo(token), mask.hi(token)}};
}

}  // namespace jax_fa::decode
