// Which probabilities survive dropout.
//
// A call of Philox draws for some pairs of 16 queries and 64 keys, those that a lane holds of them
// as accumulators of m16n8 products whose rows are queries. Query i and key j have counter (j / 64
// * 4 + j % 8 / 2, i / 16 * 8 + i % 8, head, 0) and the row's seeds, word j % 16 / 8 * 2 + i % 16 /
// 8 of block j / 16 % 4 (dropout_word) and half j % 2 of it. They survive unless its low 15 bits
// are below a limit. Forward and backward draw the same, so nothing is stored.
#pragma once

#include "params.h"
#include "philox.h"
#include "ptx.cuh"

namespace jax_fa {

// Word i of four for each block of 16 keys: what was drawn, or the sum modulo 2 of three words of
// it, some with their halves swapped. No half comes twice and each is a sum of an odd number, so
// any three of a call's 32 are independent, at a quarter of the calls.
__device__ inline uint32_t dropout_word(const uint4& drawn, int block, int i) {
  const uint32_t words[4] = {drawn.x, drawn.y, drawn.z, drawn.w};
  const uint32_t a = words[(i + 1) % 4], b = words[(i + 2) % 4];
  if (block == 0) return words[i];
  return words[i] ^ (block == 3 ? ptx::permute(a, 0x1032) : a) ^
         (block == 2 ? ptx::permute(b, 0x1032) : b);
}

__device__ inline uint2 dropout_seeds(const AttentionParams& p, int b) {
  const uint2 seeds = reinterpret_cast<const uint2*>(p.seeds)[b];
  // known to be uniform
  return {__shfl_sync(0xffffffff, seeds.x, 0), __shfl_sync(0xffffffff, seeds.y, 0)};
}

// What the calls of one head of one batch row have in common.
struct Dropout {
  uint2 seeds;
  uint32_t head, limit;

  __device__ Dropout(const AttentionParams& p, uint2 seeds, int head)
      : seeds(seeds), head(p.dropout_heads ? head : 0), limit(p.dropout_limit) {}
  __device__ Dropout(const AttentionParams& p, int b, int head)
      : Dropout(p, dropout_seeds(p, b), head) {}

  // The counter of a lane's call for 16 queries and 64 keys, some of them from key0 on.
  __device__ uint4 counter(uint32_t lane, int query0, int key0) const {
    return make_uint4(key0 / 64 * 4 + lane % 4, query0 / 2 + lane / 4, head, 0);
  }

  // In bits 15 and 31, whether that half of x survives.
  __device__ uint32_t survive(uint32_t x) const { return (x | 0x80008000) - limit * 0x10001; }
  // In all bits of a half, for limits that are no NaN as a float16: see sm90_covers_rate.
  __device__ uint32_t survive_as_f16(uint32_t x) const {
    return ptx::not_below_f16x2(x, limit * 0x10001);
  }

  // What survives of a warp's 16 queries by keys of p, the left operand of products, on Hopper. Of
  // more than two calls at a time the states cost more registers than they gain overlap.
  template <int kCount>
  __device__ void apply(uint32_t (&p)[kCount], int query0, int key0) const {
    constexpr int kCalls = kCount / 16, kAtOnce = kCalls % 2 == 0 ? 2 : 1;
    static_assert(kCount % 16 == 0, "whole calls");
#pragma unroll
    for (int first = 0; first < kCalls; first += kAtOnce) {
      uint4 calls[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        calls[i] = counter(threadIdx.x % 32, query0, key0 + (first + i) * 64);
      }
      philox(calls, seeds);
#pragma unroll
      for (int i = 0; i < kAtOnce * 16; ++i) {
        p[first * 16 + i] &= survive_as_f16(dropout_word(calls[i / 16], i % 16 / 4, i % 4));
      }
    }
  }
};

// A bit for each score of a warp's [16 * kMTiles, 8 * kNTiles] that a lane holds: it survives. Four
// 16 x 16 blocks of them, products (m, n) and (m, n + 1), n even, fill a word. Rows + 8 * h of
// product (m, n) have bits 31 - at and 15 - at of it, the latter for the first of their two
// columns, with at = block % 4 * 4 + n % 2 * 2 + h.
template <int kMTiles, int kNTiles>
class Survivors {
 public:
  // Whether element e of product (m, n) survives.
  __device__ bool operator()(int m, int n, int e) const {
    return words[block(m, n) / 4] >> ((e % 2 ? 31 : 15) - place(m, n, e / 2)) & 1;
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
    const uint32_t signs = words[block(m, n) / 4] << at % 8;  // of bytes 1 and 3, or 0 and 2
    return ptx::permute(signs, at < 8 ? 0xbb99 : 0xaa88);
  }

 protected:
  static constexpr int kBlocks = kMTiles * kNTiles / 2, kWords = (kBlocks + 3) / 4;
  static_assert(kNTiles % 2 == 0);
  uint32_t words[kWords];

  // Where the four words of a 16 x 16 block go, whose rows are queries or keys.
  template <bool kOwnsKeys>
  __device__ static constexpr int place_of_word(int i) {
    return kOwnsKeys ? i % 2 * 2 + i / 2 : i;
  }

 private:
  __device__ static constexpr int block(int m, int n) { return m * (kNTiles / 2) + n / 2; }
  __device__ static constexpr int place(int m, int n, int h) {
    return block(m, n) % 4 * 4 + n % 2 * 2 + h;
  }
};

// Drawn by a warp alone, whose tile may have any of the 64 keys of a call: one for each block.
template <int kMTiles, int kNTiles, bool kOwnsKeys>
class WarpSurvivors : public Survivors<kMTiles, kNTiles> {
  using Base = Survivors<kMTiles, kNTiles>;
  static constexpr int kBlocks = Base::kBlocks;

 public:
  // Rows are queries and columns are keys, or kOwnsKeys the other way round, from row0 and col0 on,
  // multiples of 16.
  __device__ void draw(const Dropout& dropout, int row0, int col0) {
    draw_blocks<0>(dropout, row0, col0);
  }

 private:
  template <int kFirst>
  __device__ void draw_blocks(const Dropout& dropout, int row0, int col0) {
    constexpr int kCount = kBlocks - kFirst < 2 ? 1 : 2;  // more at a time would spill registers
    uint4 calls[kCount];
    int keys[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int row = row0 + (kFirst + i) / (kNTiles / 2) * 16;
      const int col = col0 + (kFirst + i) % (kNTiles / 2) * 16;
      keys[i] = kOwnsKeys ? row : col;
      calls[i] = dropout.counter(threadIdx.x % 32, kOwnsKeys ? col : row, keys[i]);
    }
    philox(calls, dropout.seeds);
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        const int at = (kFirst % 4 + i) * 4 + Base::template place_of_word<kOwnsKeys>(word);
        const uint32_t drawn = dropout_word(calls[i], keys[i] / 16 % 4, word);
        bits |= dropout.survive(drawn) >> at & 0x80008000 >> at;
      }
    }
    constexpr int kNext = kFirst + kCount;
    uint32_t& word = this->words[kFirst / 4];
    word = kFirst % 4 == 0 ? bits : word | bits;
    if constexpr (kOwnsKeys && (kNext % 4 == 0 || kNext == kBlocks)) word = ptx::transpose(word);
    if constexpr (kNext < kBlocks) draw_blocks<kNext>(dropout, row0, col0);
  }
};

// Of 64 keys of a warpgroup, the rows, by up to 128 queries, on Hopper. Each warp draws for all
// keys and a quarter of the queries, and they exchange bits through shared memory. Two buffers for
// them, used in turn, save a barrier: H200, bf16, head_dim 64, 16k, 0.5 % of forward and backward.
template <int kNTiles, int kBuffers>
class WarpgroupSurvivors : public Survivors<1, kNTiles> {
  using Base = Survivors<1, kNTiles>;
  static constexpr int kWords = Base::kWords;  // and calls
  static_assert(kNTiles == kWords * 8);

 public:
  using Exchange = uint32_t[kBuffers][kWords][4][32];

  // `barrier` is a named one. The branch keeps it all before a wait for a product.
  __device__ void draw(const Dropout& dropout, int key0, int query0, Exchange& sBits, int barrier) {
    if (dropout.limit > 0) {
      draw_quarter(dropout, key0, query0, sBits, barrier);
    } else {
#pragma unroll
      for (uint32_t& word : this->words) word = ~0u;
    }
  }

 private:
  int buffer = 0;

  __device__ void draw_quarter(const Dropout& dropout, int key0, int query0, Exchange& sBits,
                               int barrier) {
    int thread = threadIdx.x;
    asm volatile("" : "+r"(thread));  // nothing of what follows is worth registers until the next
    const int lane = thread % 32, warp = __shfl_sync(0xffffffff, thread / 32 % 4, 0);
    uint4 calls[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      calls[i] = dropout.counter(lane, query0 + (warp * kWords + i) * 16, key0);
    }
    philox(calls, dropout.seeds);
    constexpr int kOfWarp = kWords * 4;  // places in a word
    uint32_t bits[kWords] = {};
#pragma unroll
    for (int i = 0; i < kWords * 16; ++i) {
      const int block = i / kOfWarp, call = i % kOfWarp / 4, word = i % 4;
      const int at = block * kOfWarp + call * 4 + Base::template place_of_word<true>(word);
      const uint32_t drawn = dropout_word(calls[call], block, word);
      bits[at / 16] |= dropout.survive_as_f16(drawn) & 0x80008000 >> at % 16;
    }
    if constexpr (kBuffers == 1) {
      ptx::named_barrier_sync(barrier, 128);  // the last bits have been read
    } else {
      buffer ^= 1;  // all have read what they drew before the last time
    }
#pragma unroll
    for (int i = 0; i < kWords; ++i) sBits[buffer][i][warp][lane] = ptx::transpose(bits[i]);
    ptx::named_barrier_sync(barrier, 128);  // these have been written
    constexpr uint32_t kPlaces = (0xffff0000 >> kOfWarp & 0xffff) * 0x10001;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = i * kOfWarp % 16;
      const uint32_t own = sBits[buffer][warp * kOfWarp / 16][i][lane] << warp * kOfWarp % 16;
      const uint32_t placed = own >> at & kPlaces >> at;
      uint32_t& word = this->words[i * kOfWarp / 16];
      word = at == 0 ? placed : word | placed;
    }
  }
};

}  // namespace jax_fa
