// Which columns a row may attend to. Compiles for the host too.
#pragma once

#include <cuda_runtime_api.h>

#include <climits>

namespace jax_fa {

enum class TileMask { kSkip, kPartial, kFull };

struct Interval {
  int lo, hi;  // [lo, hi), empty where hi <= lo
};

// Row r attends to columns [lo(r), hi(r)). Causal, sliding-window and padding masks are all such
// intervals, so one type serves them all and none of them is a template parameter.
struct IntervalMask {
  int len_kv, diagonal;           // row r is aligned with column r + diagonal
  int window_left, window_right;  // negative: unbounded

  __host__ __device__ IntervalMask(int len_q, int len_kv, int window_left, int window_right,
                                   bool top_left = false)
      : len_kv(len_kv),
        diagonal(top_left ? 0 : len_kv - len_q),
        window_left(least(window_left, len_q + len_kv)),  // so that lo and hi cannot overflow
        window_right(least(window_right, len_q + len_kv)) {}

  __host__ __device__ int lo(int row) const {
    return window_left < 0 ? 0 : most(0, row + diagonal - window_left);
  }
  __host__ __device__ int hi(int row) const {
    return window_right < 0 ? len_kv : least(len_kv, row + diagonal + window_right + 1);
  }

  // Of a row and a column within their lengths, what col - row must be for the row to see it.
  __host__ __device__ Interval seen_offsets() const {
    return {window_left < 0 ? INT_MIN : diagonal - window_left,
            window_right < 0 ? INT_MAX : diagonal + window_right + 1};
  }

  // Rows below len_q that see some column of [col0, col1); they are an interval too.
  __host__ __device__ Interval rows_seeing(int col0, int col1, int len_q) const {
    const int last = least(col1, len_kv) - 1;
    if (last < col0) return {0, 0};
    return {window_right < 0 ? 0 : most(0, col0 - diagonal - window_right),
            window_left < 0 ? len_q : least(len_q, last - diagonal + window_left + 1)};
  }

  // lo and hi never decrease with row, so the first and last row of [row0, row1) decide for all.
  __host__ __device__ Interval seen_by_any(int row0, int row1) const {
    return {lo(row0), hi(row1 - 1)};
  }
  __host__ __device__ Interval seen_by_all(int row0, int row1) const {
    return {lo(row1 - 1), hi(row0)};
  }

  __host__ __device__ TileMask classify(int row0, int row1, int col0, int col1) const {
    const Interval any = seen_by_any(row0, row1), all = seen_by_all(row0, row1);
    if (col0 >= any.hi || col1 <= any.lo) return TileMask::kSkip;
    return col0 >= all.lo && col1 <= all.hi ? TileMask::kFull : TileMask::kPartial;
  }

 private:
  __host__ __device__ static int least(int a, int b) { return a < b ? a : b; }
  __host__ __device__ static int most(int a, int b) { return a < b ? b : a; }
};

}  // namespace jax_fa
