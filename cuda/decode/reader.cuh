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
  static constexpr int kGroups = !Format::kGroupScale  ? 0
                                 : Format::kGroupShare ? kHeadDim / 8
                                                       : kRowSlots * 16 / Format::kBytes;

  // A tile in shared memory. Dims past head_dim are zero up to kHeadDim.
  struct Tile {
    Bytes<16> slots[16][kRowSlots];  // permuted: see at()
    // of groups for kGroupShare, else of vectors; padded: lanes read rows g at once
    float group_scale[Format::kGroupScale ? 16 : 0][kGroups + 1];
    float token_scale[Format::kTokenScale ? 16 : 0];
  };

  const KvTensor& tensor;
  Format format;
  const char* data;
  const float* scale;  // or null
  int token_bytes, head_dim;
  uint32_t vector_groups;  // 2^16 vectors / vectors of a group, rounded up

  __device__ RowReader(const KvTensor& tensor, const KvRow& row, int head, int head_dim)
      : tensor(tensor),
        format(tensor),
        token_bytes(int(tensor.token_stride) * kElementBytes),
        head_dim(head_dim),
        vector_groups(((Format::kElements << 16) * tensor.groups + head_dim - 1) / head_dim) {
    const KvSlot origin = {row.row, row.start};
    data = static_cast<const char*>(tensor.data) + kv_offset(tensor, origin, head) * kElementBytes;
    scale = tensor.scale ? tensor.scale + scale_offset(tensor, origin, head) : nullptr;
  }

  // By all lanes of a warp; reads, by any of them, must wait for all. kShort: one way for all
  // tiles, as a cold kernel waits for its instructions too.
  template <bool kShort>
  __device__ void copy(Tile& sTile, const RowKeys<kWholeTiles>& keys, const KeyTile& tile) const {
    const char* const tile_data =
        data + tile.page * (tensor.row_stride * kElementBytes) + int64_t(tile.token) * token_bytes;
    if constexpr (kShort) {
      const int key0 = tile.key0 - tile.first, lo = keys.lo - tile.first;
      const int last = keys.last - tile.first;
      copy_rows<true>(sTile, [&](int row) {
        return tile_data + int64_t(min(max(key0 + row, lo), last)) * token_bytes;
      });
    } else if (tile.full) {
      copy_rows<true>(sTile, [&](int row) { return tile_data + row * token_bytes; });
    } else {
      copy_rows<!kWholeTiles>(sTile, [&](int row) {
        return data + kv_offset(tensor, keys.slot(tile, row), 0) * kElementBytes;
      });
    }
    if constexpr (Format::kTokenScale) {
      const KvSlot slot = keys.slot(tile, lane() % 16);
      if (scale && tensor.groups <= 1 && lane() < 16) {
        ptx::cp_async_4(ptx::shared_address(&sTile.token_scale[lane()]),
                        scale + scale_offset(tensor, slot, 0), 4);
      }
    }
    if constexpr (Format::kGroupScale) {
      if (tensor.groups > 1) copy_group_scales(sTile, keys, tile);
    }
  }

  // Zeroes what was read of keys that nobody sees: it may be anything. By all lanes of a warp.
  __device__ void clear(Tile& sTile, int key0, Interval keys) const {
    const auto seen = [&](int row) { return key0 + row >= keys.lo && key0 + row < keys.hi; };
#pragma unroll 1
    for (int i = lane(); i < 16 * kRowSlots; i += 32) {
      if (!seen(i / kRowSlots)) sTile.slots[i / kRowSlots][i % kRowSlots] = {};
    }
    if constexpr (Format::kTokenScale) {
      if (lane() < 16 && !seen(lane())) sTile.token_scale[lane()] = 0.f;
    }
  }

  // Vector i of the row-th of the keys that this lane holds: g and g + 8 for an A fragment of K,
  // and 2c, 2c + 1 and these + 8 for one of V^T.
  __device__ Lane read(const Tile& sTile, int row, int i) const {
    const int key = kLanes == 4 ? lane() / 4 + row * 8 : lane() % 4 * 2 + row % 2 + row / 2 * 8;
    const int vector = i * kLanes + (kLanes == 4 ? lane() % 4 : lane() / 4);
    Lane x;
    x.x = *reinterpret_cast<const Bytes<Format::kBytes>*>(at(sTile, key, vector * Format::kBytes));
    if constexpr (Format::kGroupShare) {
      const int group = vector * vector_groups >> 16;
      x.scale = tensor.groups > 1 ? sTile.group_scale[key][group] : __uint_as_float(0x3c003c00);
    } else if constexpr (Format::kGroupScale) {
      x.scale = tensor.groups > 1 ? sTile.group_scale[key][vector] : 1.f;
    }
    return x;
  }

  // From groups' scales to shares of the largest, which becomes the row's scale.
  __device__ void share_scales(Tile& sTile, int row) const {
    if (tensor.groups <= 1) return;
    float* const sScale = sTile.group_scale[row];
    float largest = 0.f;
#pragma unroll 4
    for (int i = 0; i < tensor.groups; ++i) largest = fmaxf(largest, fabsf(sScale[i]));
    const float inverse = largest > 0.f ? 1.f / largest : 0.f;
#pragma unroll 4
    for (int i = 0; i < tensor.groups; ++i) {
      const __half2 share = __float2half2_rn(sScale[i] * inverse);
      sScale[i] = reinterpret_cast<const float&>(share);
    }
    sTile.token_scale[row] = largest;
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

  __device__ bool has_token_scale() const {
    return scale && (tensor.groups <= 1 || Format::kGroupShare);
  }

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

  // kUnroll: little of what seldom runs
  template <bool kUnroll, typename Source>
  __device__ void copy_rows(Tile& sTile, Source source) const {
    constexpr int kCopies = kHeadDim * kElementBytes / kCopyBytes;  // of a row
#pragma unroll kUnroll ? kCopies * 16 / 32 : 4
    for (int i = 0; i < kCopies * 16; i += 32) {
      constexpr bool kSameByte = 32 % kCopies == 0;  // for a lane, in all rows
      const int row = kSameByte ? i / kCopies + lane() / kCopies : (i + lane()) / kCopies;
      const int byte = (kSameByte ? lane() : i + lane()) % kCopies * kCopyBytes;
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
    if constexpr (Format::kGroupShare) {
      const int row = lane() % 16;
      const float* const gScale = scale + scale_offset(tensor, keys.slot(tile, row), 0);
      for (int i = lane() / 16; i < tensor.groups; i += 2) {
        ptx::cp_async_4(ptx::shared_address(&sTile.group_scale[row][i]), gScale + i, 4);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kGroups * 16; i += 32) {
        const int row = (i + lane()) / kGroups, vector = (i + lane()) % kGroups;
        const int dim = min(vector * Format::kElements, head_dim - 1);
        const float* const gScale = scale + scale_offset(tensor, keys.slot(tile, row), 0);
        ptx::cp_async_4(ptx::shared_address(&sTile.group_scale[row][vector]),
                        gScale + dim * tensor.groups / head_dim, 4);
      }
    }
  }
};

}  // namespace jax_fa::decode
