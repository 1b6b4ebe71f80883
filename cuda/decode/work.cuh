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
  __device__ Row(const AttentionParams& p, int b) : Row(p, b, row_len_kv(p, b)) {}
  __device__ Row(const AttentionParams& p, int b, int len_kv)
      : b(b),
        len_q(kPacked ? row_len_q(p, b) : p.len_q),
        len_kv(len_kv),
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

// The keys that a block reads: each of its warps every `stride`-th step from one of the first on.
// Parts that are not of consecutive steps start where they do whatever the row's length is.
template <bool kConsecutive, int kWarps>
struct Share {
  Interval any, all;  // keys that any, and that all, of the row's tokens see
  int first_step, end_step, stride;

  __device__ Share(const IntervalMask& mask, int len_q, int step_keys, int part, int parts)
      : Share(mask.seen_by_any(0, len_q), mask.seen_by_all(0, len_q), step_keys, part, parts) {}
  __device__ Share(Interval any, Interval all, int step_keys, int part, int parts)
      : any(any), all(all) {
    const Steps steps(any, step_keys);
    if constexpr (kConsecutive) {
      first_step = steps.begin + part_begin(steps.end - steps.begin, part, parts);
      end_step = steps.begin + part_begin(steps.end - steps.begin, part + 1, parts);
      stride = kWarps;
    } else {
      first_step = steps.begin + part * kWarps;
      end_step = steps.end;
      stride = parts * kWarps;
    }
  }

  __device__ bool all_see(int key, int keys) const { return key >= all.lo && key + keys <= all.hi; }
};

// Query i of those of a row and key head: heads of the group vary fastest.
struct Query {
  int token, head;  // token -1: there is none
};

template <bool kPacked>
__device__ Query query_of(const Row<kPacked>& row, int head_kv, int heads_group, int i) {
  const int token = __builtin_expect(i < heads_group, 1) ? 0 : uint32_t(i) / uint32_t(heads_group);
  if (token >= row.len_q) return {-1, 0};
  return {token, head_kv * heads_group + i - token * heads_group};
}

template <bool kPacked>
__device__ Column make_column(const Row<kPacked>& row, const IntervalMask& mask, int head_kv,
                              int heads_group, int i) {
  const Query query = query_of(row, head_kv, heads_group, i);
  if (query.token < 0) return {-1, 0, 0, {0, 0}};
  return {query.token,
          query.head,
          mask.diagonal + query.token,
          {mask.lo(query.token), mask.hi(query.token)}};
}

}  // namespace jax_fa::decode
