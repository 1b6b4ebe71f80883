// Copies tiles of 16 keys, and of their values, to where a warp reads them: movement only.
//
// A warp has a queue of its own in shared memory. cp.async fills it, whole lines of a row at a time
// (anything less and L2 is short of tags before memory is short of bandwidth), so that bytes in
// flight cost no registers; lanes read the vectors that they feed to the mma.
#pragma once

#include <type_traits>

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

  // The page that holds the tile at key0; 0 if contiguous, or if its keys may lie in several.
  __device__ int find_page(int key0) const {
    return kWholeTiles && pages ? __ldg(pages + page_index(first(key0))) : 0;
  }

  __device__ KeyTile tile(int key0, int page) const {
    const int start = first(key0);
    return {key0, start, page, start - page_index(start) * page_tiles * 16,
            kWholeTiles && key0 >= lo && key0 + 15 <= last};
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

// One head of one batch row of the keys (kLanes = 4: lanes c share a row) or the values (8: lanes
// g). Strides of a token fit 32 bits, rows are aligned for copies of kCopyBytes.
template <typename Format_, int kHeadDim, int kLanes, bool kWholeTiles>
struct RowReader {
  using Format = Format_;
  using Lane = typename Format::Lane;
  static constexpr int kElementBytes = Format::kBytes / Format::kElements;
  static constexpr int kChunk = kLanes * Format::kElements;  // dims of one read of all lanes
  static constexpr int kVectors = (kHeadDim + kChunk - 1) / kChunk;
  static constexpr int kRows = kLanes == 4 ? 2 : 4;  // that a lane reads of a tile

  static constexpr int kCopyBytes = Format::kCopyBytes;
  static constexpr int kRowSlots = (kVectors * kChunk * kElementBytes / 16 + 7) / 8 * 8;
  // beyond kHeadDim nothing is written: that may reach rows of O^T that are not stored, not scores
  static_assert(kLanes == 8 || kVectors * kChunk == kHeadDim);
  static constexpr int kGroups = Format::kGroupScale ? kRowSlots * 16 / Format::kBytes : 0;

  // A tile in shared memory. Dims past head_dim are zero up to kHeadDim.
  struct Tile {
    Bytes<16> slots[16][kRowSlots];                            // permuted: see at()
    float group_scale[Format::kGroupScale ? 16 : 0][kGroups];  // of each vector
    float token_scale[Format::kTokenScale ? 16 : 0];
  };

  const KvTensor& tensor;
  Format format;
  const char* data;
  const float* scale;  // or null
  int token_bytes, head_dim;

  __device__ RowReader(const KvTensor& tensor, const KvIndex& index, int b, int head, int head_dim)
      : tensor(tensor),
        format(tensor),
        token_bytes(int(tensor.token_stride) * kElementBytes),
        head_dim(head_dim) {
    const KvRow row(index, b, tensor.rows);
    const KvSlot origin = {row.row, row.start};
    data = static_cast<const char*>(tensor.data) + kv_offset(tensor, origin, head) * kElementBytes;
    scale = tensor.scale ? tensor.scale + scale_offset(tensor, origin, head) : nullptr;
  }

  // By all lanes of a warp; reads, by any of them, must wait for all.
  __device__ void copy(Tile& sTile, const RowKeys<kWholeTiles>& keys, const KeyTile& tile) const {
    if (tile.full) {
      const char* const tile_data = data + tile.page * (tensor.row_stride * kElementBytes) +
                                    int64_t(tile.token) * token_bytes;
      copy_rows(sTile, [&](int row) { return tile_data + row * token_bytes; });
    } else {
      copy_rows(sTile, [&](int row) {
        return data + kv_offset(tensor, keys.slot(tile, row), 0) * kElementBytes;
      });
    }
    if constexpr (Format::kTokenScale) {
      if (has_token_scale() && lane() < 16) {
        ptx::cp_async_4(ptx::shared_address(&sTile.token_scale[lane()]),
                        scale + scale_offset(tensor, keys.slot(tile, lane()), 0), 4);
      }
    }
    if constexpr (Format::kGroupScale) {
      if (tensor.groups > 1) copy_group_scales(sTile, keys, tile);
    }
  }

  // Vector i of the row-th of the keys that this lane holds: g and g + 8 for an A fragment of K,
  // and 2c, 2c + 1 and these + 8 for one of V^T.
  __device__ Lane read(const Tile& sTile, int row, int i) const {
    const int key = kLanes == 4 ? lane() / 4 + row * 8 : lane() % 4 * 2 + row % 2 + row / 2 * 8;
    const int vector = i * kLanes + (kLanes == 4 ? lane() % 4 : lane() / 4);
    Lane x;
    x.x = *reinterpret_cast<const Bytes<Format::kBytes>*>(at(sTile, key, vector * Format::kBytes));
    if constexpr (Format::kGroupScale) {
      x.scale = tensor.groups > 1 ? sTile.group_scale[key][vector] : 1.f;
    }
    return x;
  }

  // Of keys g (half 0) and g + 8.
  __device__ float read_token_scale(const Tile& sTile, int half) const {
    if constexpr (Format::kTokenScale) {
      if (has_token_scale()) return sTile.token_scale[lane() / 4 + half * 8];
    }
    return 1.f;
  }

 private:
  static __device__ int lane() { return threadIdx.x % 32; }

  __device__ bool has_token_scale() const { return scale && tensor.groups <= 1; }

  // Slots of a row are permuted so that lanes of one read hit different banks: the rows that these
  // read together differ in their lowest bits for K, and in the bits above the lowest for V.
  template <typename T>
  static __device__ auto at(T& sTile, int row, int byte) {
    const int flip = kLanes == 8            ? row / 2 % 4 * 2
                     : Format::kBytes == 16 ? row % 2 * 4
                                            : row % 4 * 2;
    auto* const slot = &sTile.slots[row][(byte / 16) ^ flip];
    return reinterpret_cast<std::conditional_t<std::is_const_v<T>, const char, char>*>(slot) +
           byte % 16;
  }

  template <typename Source>
  __device__ void copy_rows(Tile& sTile, Source source) const {
    constexpr int kCopies = kHeadDim * kElementBytes / kCopyBytes;  // of a row
#pragma unroll
    for (int i = 0; i < kCopies * 16; i += 32) {
      const int row = (i + lane()) / kCopies, byte = (i + lane()) % kCopies * kCopyBytes;
      const char* const src = source(row) + byte;
      const uint32_t dst = ptx::shared_address(at(sTile, row, byte));
      const int bytes = byte < head_dim * kElementBytes ? kCopyBytes : 0;
      if constexpr (kCopyBytes == 16) {
        ptx::cp_async_16(dst, src, bytes);
      } else {
        ptx::cp_async_8(dst, src, bytes);
      }
    }
  }

  __device__ void copy_group_scales(Tile& sTile, const RowKeys<kWholeTiles>& keys,
                                    const KeyTile& tile) const {
#pragma unroll
    for (int i = 0; i < kGroups * 16; i += 32) {
      const int row = (i + lane()) / kGroups, vector = (i + lane()) % kGroups;
      const int dim = min(vector * Format::kElements, head_dim - 1);
      ptx::cp_async_4(
          ptx::shared_address(&sTile.group_scale[row][vector]),
          scale + scale_offset(tensor, keys.slot(tile, row), 0) + dim * tensor.groups / head_dim,
          4);
    }
  }
};

}  // namespace jax_fa::decode
