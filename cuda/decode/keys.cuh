// Which keys of a batch row a tile has, and where they lie.
#pragma once

#include "kv.cuh"
#include "mask.cuh"

namespace jax_fa::decode {

// 16 keys from a multiple of 16 on, and where they lie: relative to page 0 of the layer, or to the
// first key of a contiguous row.
struct KeyTile {
  int key0;
  int first;        // key0, or that of the nearest tile with keys that may be read
  int page, token;  // of `first`; where pages are of any size, of key lane % 16 of the tile
  bool full;        // all its keys may be read, and follow each other
};

// The keys of one batch row. Only [lo, last] may be read: past a row's length, and before its
// window, there may be nothing. Others count as the nearest one inside.
// kWholeTiles: tiles lie in one page or a contiguous row; else pages are of any size.
template <bool kWholeTiles>
struct RowKeys {
  const int* pages;  // of this row, or null: contiguous
  int lo, last;
  int page_size, page_tiles;
  uint32_t inverse;  // 2^31 / page_tiles, rounded up; 0: contiguous

  __device__ RowKeys(const KvIndex& index, int b, Interval keys)
      : pages(index.page_table ? index.page_table + int64_t(b) * index.max_pages : nullptr),
        lo(keys.lo),
        last(keys.hi - 1),
        page_size(index.page_size),
        page_tiles(page_size / 16),
        inverse(pages && kWholeTiles ? ((1u << 31) + page_tiles - 1) / page_tiles : 0) {}

  __device__ int inside(int key) const { return min(max(key, lo), last); }

  // The page that holds the tile at key0, or that holds the lane's key of it; 0 if contiguous.
  __device__ int find_page(int key0) const {
    if (!pages) return 0;
    return __ldg(pages + (kWholeTiles ? page_index(first(key0)) : lane_key(key0) / page_size));
  }

  __device__ KeyTile tile(int key0, int page) const {
    if constexpr (!kWholeTiles) {
      const int key = lane_key(key0);
      return {key0, key0, page, pages ? key % page_size : key, false};
    }
    const int start = first(key0);
    return {key0, start, page, start - page_index(start) * page_tiles * 16,
            key0 >= lo && key0 + 15 <= last};
  }

  // By all lanes of a warp.
  __device__ KvSlot slot(const KeyTile& tile, int i) const {
    if constexpr (!kWholeTiles) {
      return {__shfl_sync(~0u, tile.page, i), __shfl_sync(~0u, tile.token, i)};
    }
    return {tile.page, tile.token + (inside(tile.key0 + i) - tile.first)};
  }

 private:
  __device__ int first(int key0) const { return inside(key0) & ~15; }

  __device__ int lane_key(int key0) const { return inside(key0 + threadIdx.x % 16); }

  // exact: a tile's number is below 2^27 and page_tiles at most 16
  __device__ int page_index(int key) const { return __umulhi(key / 16 * 2, inverse); }
};

}  // namespace jax_fa::decode
