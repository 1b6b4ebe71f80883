// Which probabilities survive dropout.
//
// A call of Philox draws for 8 keys of a query: counter (key / 8, query, head, 0), the row's seeds,
// and 16 bits for each of the eight. Those below a limit survive. Forward and backward draw the
// same, so nothing is stored.
//
// Scores lie in a warp as the accumulators of m16n8 products, where what a call draws concerns
// several lanes: the 4 of a quad if rows are queries, 8 if rows are keys. Each of them makes a call
// of its own, and they exchange bits, those of four calls at a time.
#pragma once

#include "params.h"
#include "philox.h"
#include "ptx.cuh"

namespace jax_fa {

__device__ inline uint2 dropout_seeds(const AttentionParams& p, int b) {
  const uint2 seeds = reinterpret_cast<const uint2*>(p.seeds)[b];
  // known to be uniform
  return {__shfl_sync(0xffffffff, seeds.x, 0), __shfl_sync(0xffffffff, seeds.y, 0)};
}

// What the calls of one head of one batch row have in common.
struct Dropout {
  uint2 seeds;
  uint32_t head, keep;  // the limit

  __device__ Dropout(const AttentionParams& p, uint2 seeds, int head)
      : seeds(seeds), head(p.dropout_heads ? head : 0), keep(p.dropout_keep) {}
  __device__ Dropout(const AttentionParams& p, int b, int head)
      : Dropout(p, dropout_seeds(p, b), head) {}
};

// A bit for each score of a warp's [16 * kMTiles, 8 * kNTiles] that a lane holds: it survives. Of
// products (m, n) and (m, n + 1), n even, a lane makes one call, and four calls fill a word. Rows +
// 8 * h of product (m, n) have bits 31 - at and 15 - at of it, the latter for the first of their
// two columns, with at = call % 4 * 4 + n % 2 * 2 + h.
template <int kMTiles, int kNTiles>
class Survivors {
  static constexpr int kCalls = kMTiles * kNTiles / 2, kWords = (kCalls + 3) / 4;
  static_assert(kNTiles % 2 == 0);

 public:
  // Rows are queries and columns are keys, or kOwnsKeys the other way round, from row0 and col0 on.
  // The first key is a multiple of 8. The branch keeps it where it is, before a wait for a product.
  template <bool kOwnsKeys>
  __device__ void draw(const Dropout& dropout, int row0, int col0) {
    if (dropout.keep < 0x10000) {
      draw_words<kOwnsKeys, 0>(dropout, row0, col0);
    } else {
#pragma unroll
      for (uint32_t& word : words) word = ~0u;
    }
  }

  // Whether element e of product (m, n) survives.
  __device__ bool operator()(int m, int n, int e) const {
    return words[call(m, n) / 4] >> ((e % 2 ? 31 : 15) - place(m, n, e / 2)) & 1;
  }

  // x or 0.
  __device__ void apply(float (&x)[kMTiles][kNTiles][4]) const {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kNTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) x[m][n][e] = (*this)(m, n, e) ? x[m][n][e] : 0.f;
      }
    }
  }

  // Of two adjacent elements, from 2 * h on: a half of ones for each that survives.
  __device__ uint32_t halves(int m, int n, int h) const {
    const int at = place(m, n, h);
    const uint32_t signs = words[call(m, n) / 4] << at % 8;  // of bytes 1 and 3, or 0 and 2
    return ptx::permute(signs, at < 8 ? 0xbb99 : 0xaa88);
  }

 private:
  uint32_t words[kWords];

  template <bool kOwnsKeys, int kWord>
  __device__ void draw_words(const Dropout& dropout, int row0, int col0) {
    constexpr int kFirst = kWord * 4, kCount = kCalls - kFirst < 4 ? kCalls - kFirst : 4;
    const uint32_t lane = threadIdx.x % 32, column = lane % 4, row = lane / 4;
    const uint32_t n = kOwnsKeys ? row / 4 : column / 2;      // what this lane draws for: a product
    const uint32_t h = kOwnsKeys ? row / 2 % 2 : column % 2;  // and a half of its rows
    uint4 calls[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int m = (kFirst + i) / (kNTiles / 2), pair = (kFirst + i) % (kNTiles / 2);
      const uint32_t first_row = row0 + m * 16 + h * 8, first_col = col0 + pair * 16 + n * 8;
      const uint32_t query = kOwnsKeys ? first_col + column * 2 + row % 2 : first_row + row;
      calls[i] = make_uint4((kOwnsKeys ? first_row : first_col) / 8, query, dropout.head, 0);
    }
    philox(calls, dropout.seeds);
    const uint32_t limit = dropout.keep * 0x10001;
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint32_t drawn[4] = {calls[i].x, calls[i].y, calls[i].z, calls[i].w};
#pragma unroll
      for (int key = 0; key < 4; ++key) {  // two keys
        bits |= below(drawn[key], limit) >> (i * 4 + key) & 0x80008000 >> (i * 4 + key);
      }
    }
    // What was of another lane's keys, or of other queries, becomes what this lane holds.
    if constexpr (kOwnsKeys) bits = exchange(bits, 4, 16, 0x0000ffff);
    bits = exchange(bits, kOwnsKeys ? 8 : 1, 1, 0xaaaaaaaa);
    words[kWord] = exchange(bits, kOwnsKeys ? 16 : 2, 2, 0xcccccccc);
    if constexpr (kWord + 1 < kWords) draw_words<kOwnsKeys, kWord + 1>(dropout, row0, col0);
  }

  __device__ static constexpr int call(int m, int n) { return m * (kNTiles / 2) + n / 2; }
  __device__ static constexpr int place(int m, int n, int h) {
    return call(m, n) % 4 * 4 + n % 2 * 2 + h;
  }

  // In bits 15 and 31: whether that half of x is below the limit's.
  __device__ static uint32_t below(uint32_t x, uint32_t limit) {
    constexpr uint32_t kTop = 0x80008000;
    const uint32_t rest = (x | kTop) - (limit & ~kTop);  // whether the lower 15 bits are not
    return (~x & limit) | (~(x ^ limit) & ~rest);
  }

  // Lanes that differ in `lane_bit` swap bits that are `distance` apart: of the lane without it
  // those that are not in `first`, of the other those that are.
  __device__ static uint32_t exchange(uint32_t bits, int lane_bit, int distance, uint32_t first) {
    const bool second = threadIdx.x & lane_bit;
    const uint32_t other = __shfl_xor_sync(0xffffffff, bits, lane_bit);
    const uint32_t moved = __funnelshift_l(other, other, second ? distance : 32 - distance);
    const uint32_t own = second ? ~first : first;
    return (bits & own) | (moved & ~own);
  }
};

}  // namespace jax_fa
