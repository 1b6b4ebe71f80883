// Copies tiles of 16 keys, and of their values, to where a warp reads them: movement only.
//
// Shared memory is a queue here, private to each lane: cp.async writes where the same lane reads
// later, so that bytes in flight cost no registers and no barrier, and loads complete in order.
#pragma once

#include "decode/fragments.cuh"
#include "kv.cuh"
#include "mask.cuh"

namespace jax_fa::decode {

// 16 keys from a multiple of 16 on, and where they lie: relative to page 0 of the layer, or to the
// first key of a contiguous row.
struct KeyTile {
  int key0;
  int first;        // key0, or that of the nearest tile with keys that may be read
  int page, token;  // of `first`
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

  // The page that holds the tile at key0; 0 if contiguous, or if its keys may lie in several.
  __device__ int find_page(int key0) const {
    return kWholeTiles && pages ? __ldg(pages + page_index(first(key0))) : 0;
  }

  __device__ KeyTile tile(int key0, int page) const {
    const int start = first(key0);
    return {key0, start, page, start - page_index(start) * page_tiles * 16};
  }

  __device__ KvSlot slot(const KeyTile& tile, int i) const {
    const int key = inside(tile.key0 + i);
    if constexpr (kWholeTiles) return {tile.page, tile.token + (key - tile.first)};
    if (!pages) return {0, key};
    return {pages[key / page_size], key % page_size};
  }

 private:
  __device__ int first(int key0) const { return inside(key0) & ~15; }

  // exact: a tile's number is below 2^27 and page_tiles at most 16
  __device__ int page_index(int key) const { return __umulhi(key / 16 * 2, inverse); }
};

// One head of one batch row of the keys (kLanes = 4: lanes c share a row) or the values (8: lanes g).
// Strides of a token in bytes fit 32 bits.
template <typename Format_, int kHeadDim, int kLanes, bool kWholeTiles>
struct RowReader {
  using Format = Format_;
  using Lane = typename Format::Lane;
  static constexpr int kChunk = kLanes * Format::kElements;  // dims of one load of all lanes
  static constexpr int kVectors = (kHeadDim + kChunk - 1) / kChunk;
  static constexpr int kElementBytes = Format::kBytes / Format::kElements;
  static constexpr int kRows = kLanes == 4 ? 2 : 4;

  // A tile in shared memory. Zero where dims end before kHeadDim: copies fill what is not there.
  struct Tile {
    Bytes<Format::kBytes> elements[kRows][kVectors][32];
    float group_scale[Format::kGroupScale ? kRows : 0][kVectors][32];
    float token_scale[Format::kTokenScale ? 2 : 0][32];  // keys g and g + 8, as scores lie
  };

  const KvTensor& tensor;
  Format format;
  const char* data;    // with this lane's first dim
  const float* scale;  // or null
  int token_bytes, head_dim;

  __device__ RowReader(const KvTensor& tensor, const KvIndex& index, int b, int head, int head_dim)
      : tensor(tensor),
        format(tensor),
        token_bytes(int(tensor.token_stride) * kElementBytes),
        head_dim(head_dim) {
    const KvRow row(index, b, tensor.rows);
    const KvSlot origin = {row.row, row.start};
    data = static_cast<const char*>(tensor.data) +
           (kv_offset(tensor, origin, head) + dim_of(0)) * kElementBytes;
    scale = tensor.scale ? tensor.scale + scale_offset(tensor, origin, head) : nullptr;
  }

  __device__ void copy(Tile& sTile, const RowKeys<kWholeTiles>& keys, const KeyTile& tile) const {
    const char* const tile_data =
        data + tile.page * (tensor.row_stride * kElementBytes) + int64_t(tile.token) * token_bytes;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const char* src;
      if constexpr (kWholeTiles) {
        src = tile_data + int64_t(keys.inside(tile.key0 + row_of(r)) - tile.first) * token_bytes;
      } else {
        src = data + kv_offset(tensor, keys.slot(tile, row_of(r)), 0) * kElementBytes;
      }
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const uint32_t dst = ptx::shared_address(&sTile.elements[r][i][threadIdx.x % 32]);
        const int bytes = dim_of(i) < head_dim ? Format::kBytes : 0;
        if constexpr (Format::kBytes == 16) {
          ptx::cp_async_16(dst, src + i * kChunk * kElementBytes, bytes);
        } else {
          ptx::cp_async_8(dst, src + i * kChunk * kElementBytes, bytes);
        }
      }
    }
    if constexpr (Format::kTokenScale) {
      if (has_token_scale()) copy_token_scales(sTile, keys, tile);
    }
    if constexpr (Format::kGroupScale) {
      if (tensor.groups > 1) copy_group_scales(sTile, keys, tile);
    }
  }

  __device__ Lane read(const Tile& sTile, int row, int i) const {
    Lane x;
    x.x = sTile.elements[row][i][threadIdx.x % 32];
    if constexpr (Format::kGroupScale) {
      x.scale = tensor.groups > 1 ? sTile.group_scale[row][i][threadIdx.x % 32] : 1.f;
    }
    return x;
  }

  // Of keys g (half 0) and g + 8.
  __device__ float read_token_scale(const Tile& sTile, int half) const {
    if constexpr (Format::kTokenScale) {
      if (has_token_scale()) return sTile.token_scale[half][threadIdx.x % 32];
    }
    return 1.f;
  }

 private:
  __device__ bool has_token_scale() const { return scale && tensor.groups <= 1; }

  __device__ void copy_token_scales(Tile& sTile, const RowKeys<kWholeTiles>& keys,
                                    const KeyTile& tile) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const KvSlot slot = keys.slot(tile, threadIdx.x % 32 / 4 + half * 8);
      ptx::cp_async_4(ptx::shared_address(&sTile.token_scale[half][threadIdx.x % 32]),
                      scale + scale_offset(tensor, slot, 0), 4);
    }
  }

  __device__ void copy_group_scales(Tile& sTile, const RowKeys<kWholeTiles>& keys,
                                    const KeyTile& tile) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float* const gScale = scale + scale_offset(tensor, keys.slot(tile, row_of(r)), 0);
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const int group = min(dim_of(i), head_dim - 1) * tensor.groups / head_dim;
        ptx::cp_async_4(ptx::shared_address(&sTile.group_scale[r][i][threadIdx.x % 32]),
                        gScale + group, 4);
      }
    }
  }

  // Lane (g, c) holds keys g and g + 8 of an A fragment of K, and 2c, 2c + 1 and these + 8 of V^T.
  static __device__ int row_of(int r) {
    return kLanes == 4 ? threadIdx.x % 32 / 4 + r * 8 : threadIdx.x % 4 * 2 + r % 2 + r / 2 * 8;
  }
  static __device__ int dim_of(int vector) {
    const int lane = kLanes == 4 ? threadIdx.x % 4 : threadIdx.x % 32 / 4;
    return vector * kChunk + lane * Format::kElements;
  }
};

}  // namespace jax_fa::decode
