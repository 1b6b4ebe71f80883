// Keys and values of 8 bits that are copied to the queries' type for a prefill, and how that work
// is divided where its launch does it meanwhile. Plain C++: the planner sizes scratch by it.
#pragma once

#include <algorithm>

#include "../params.h"

namespace jax_fa {

constexpr int kCopiedDims = 8;  // that a lane copies at once, with one scale

// Tokens that a copy has place for in a row: warps write so many at a time.
constexpr int kCopiedTokens = 8;
constexpr int copied_tokens(int tokens) {
  return (tokens + kCopiedTokens - 1) / kCopiedTokens * kCopiedTokens;
}

// A unit is a chunk of tokens of some heads of a row's keys or values: what a warp copies at once.
// They are numbered by row and chunk, and taken row by row and, as prefill reads, from a row's last
// chunk to its first.
struct CopyUnits {
  static constexpr int kTokens = 64;              // of a chunk
  static constexpr int kDims = 32 * kCopiedDims;  // of all heads of a unit, at most
  static constexpr int kScales = kDims / 16;      // of a token: 16 dims share one

  int rows = 0, chunks = 0;  // of a row
  int heads = 1, parts = 0;  // of a unit; units of all heads

  CopyUnits() = default;
  CopyUnits(int rows, int tokens, int heads_kv, int dim)
      : rows(rows),
        chunks((tokens + kTokens - 1) / kTokens),
        heads(std::clamp(kDims / std::max(dim, 1), 1, std::max(heads_kv, 1))),
        parts((heads_kv + heads - 1) / heads) {}

  __host__ __device__ int of_chunk() const { return 2 * parts; }
  __host__ __device__ int first(int row, int chunk) const {
    return (row * chunks + chunk) * of_chunk();
  }
  // Which unit has a head of keys or of values.
  __host__ __device__ int at(int row, int chunk, bool values, int head) const {
    return first(row, chunk) + values * parts + head / heads;
  }
  // How many are taken, and for each whether it is there.
  int scratch_ints() const { return 1 + first(rows, 0); }
};

// A prefill's keys and values are copies of these, [rows, copied_tokens, heads_kv, dim].
struct CopiedCache {
  KvTensor k, v;
  CopyUnits units;
  // Scratch of units.scratch_ints(), 0 at first: units that warps have taken, or null (no copies);
  // after that, 1 for each unit that is there.
  int* taken = nullptr;
  int* copied = nullptr;

  bool suits(int head_dim, int head_dim_v) const {
    const auto suits = [](const KvTensor& x, int dim) {
      const bool bytes =
          x.dtype == DType::kInt8 || x.dtype == DType::kE4M3 || x.dtype == DType::kE5M2;
      const int groups = std::max(x.groups, 1);
      return bytes && dim % groups == 0 && dim / groups % kCopiedDims == 0;
    };
    return suits(k, head_dim) && suits(v, head_dim_v);
  }
};

}  // namespace jax_fa
