// Copies tiles of 16 keys, and of their values, to where a warp reads them: movement only.
//
// A warp has a queue of its own in shared memory. cp.async fills it, whole lines of a row at a time
// (anything less and L2 is short of tags before memory is short of bandwidth), so that bytes in
// flight cost no registers; lanes read the vectors that they feed to the mma.
#pragma once

#include <type_traits>

#include "decode/fragments.cuh"
#include "decode/keys.cuh"
#include "decode/scales.cuh"
#include "kv.cuh"
#include "mask.cuh"

namespace jax_fa::decode {

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
                                 : Format::kGroupShare ? kVectors * kLanes
                                                       : kRowSlots * 16 / Format::kBytes;

  // A tile in shared memory. Dims past head_dim are zero up to kHeadDim.
  struct Tile {
    Bytes<16> slots[16][kRowSlots];  // permuted: see at()
    // of groups, as they lie in memory, for kGroupShare; else of vectors, padded: lanes read rows g
    // at once
    float group_scale[Format::kGroupScale ? 16 : 0][kGroups + !Format::kGroupShare];
    __half factors[Format::kGroupShare ? kGroups : 0][16];  // permuted: see factor()
    float token_scale[Format::kTokenScale ? 16 : 0];
  };

  const KvTensor& tensor;
  Format format;
  const char* data;    // of the lane's first copy of a tile
  const float* scale;  // or null
  int slot;            // where that goes in shared memory, in bytes
  int token_bytes, head_dim;
  uint32_t vector_groups;  // 2^16 vectors / vectors of a group, rounded up
  bool dense_scales;       // those of a tile follow each other in memory

  __device__ RowReader(const KvTensor& tensor, const KvRow& row, int head, int head_dim)
      : tensor(tensor),
        format(tensor),
        token_bytes(int(tensor.token_stride) * kElementBytes),
        head_dim(head_dim),
        vector_groups(((Format::kElements << 16) * tensor.groups + head_dim - 1) / head_dim) {
    const KvSlot origin = {row.row, row.start};
    data = static_cast<const char*>(tensor.data) + kv_offset(tensor, origin, head) * kElementBytes +
           int64_t(first_row()) * token_bytes + first_byte();
    slot = first_row() * kRowSlots * 16 + (first_byte() / 16 ^ flip(first_row())) * 16 +
           first_byte() % 16;
    if constexpr (Format::kTokenScale) {  // or they are computed again for each tile
      ptx::settle(data);
      ptx::settle(slot);
    }
    scale = tensor.scale ? tensor.scale + scale_offset(tensor, origin, head) : nullptr;
    dense_scales = tensor.scale_token_stride == tensor.groups && tensor.scale_row_stride % 4 == 0 &&
                   reinterpret_cast<uintptr_t>(scale) % 16 == 0;
  }

  // By all lanes of a warp; reads, by any of them, must wait for all. kShort: one way for all
  // tiles, as a cold kernel waits for its instructions too.
  template <bool kShort>
  __device__ void copy(Tile& sTile, const RowKeys<kWholeTiles>& keys, const KeyTile& tile) const {
    if constexpr (!kWholeTiles) {
      copy_rows<true>(sTile, [&](int row) {
        const KvSlot slot = keys.slot(tile, first_row() + row);
        return data + kv_offset(tensor, {slot.row, slot.token - first_row()}, 0) * kElementBytes;
      });
    } else {
      const char* const tile_data =
          data + uint64_t(uint32_t(tile.page)) * (tensor.row_stride * kElementBytes) +
          uint64_t(uint32_t(tile.token)) * uint32_t(token_bytes);
      const auto inside = [&](int row) {  // an offset of rows, from the lane's first
        return keys.inside(tile.key0 + first_row() + row) - tile.first - first_row();
      };
      if constexpr (kShort) {
        copy_rows<true>(sTile,
                        [&](int row) { return tile_data + int64_t(inside(row)) * token_bytes; });
      } else if (tile.full) {
        copy_rows<true>(sTile, [&](int row) { return tile_data + row * token_bytes; });
      } else {
        copy_rows<false>(sTile,
                         [&](int row) { return tile_data + int64_t(inside(row)) * token_bytes; });
      }
    }
    if constexpr (Format::kGroupShare) {
      if (scale) copy_shared_scales(sTile, keys, tile);
    } else if constexpr (Format::kTokenScale) {
      const KvSlot slot = keys.slot(tile, lane() % 16);
      if (scale && tensor.groups <= 1 && lane() < 16) {
        ptx::cp_async_4(ptx::shared_address(&sTile.token_scale[lane()]), scale_of(slot), 4);
      }
    }
    if constexpr (Format::kGroupScale && !Format::kGroupShare) {
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
    if constexpr (Format::kGroupShare) {
#pragma unroll 1
      for (int i = lane(); i < 16 * tensor.groups; i += 32) {
        if (!seen(i / tensor.groups)) sTile.group_scale[0][i] = 0.f;
      }
    } else if constexpr (Format::kTokenScale) {
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
      const __half* const sFactors =
          sTile.factors[min(vector * vector_groups >> 16, uint32_t(max(tensor.groups, 1) - 1))];
      if constexpr (kLanes == 4) {
        const __half2 both = *reinterpret_cast<const __half2*>(sFactors + factor(key % 8));
        x.factors = row == 0 ? __low2half2(both) : __high2half2(both);
      } else {
        x.factors = *reinterpret_cast<const __half2*>(sFactors + factor(key & ~1));
      }
    } else if constexpr (Format::kGroupScale) {
      x.scale = tensor.groups > 1 ? sTile.group_scale[key][vector] : 1.f;
    }
    return x;
  }

  __device__ RowScales<Format> row_scales(Tile& sTile, int row) const {
    const int groups = max(tensor.groups, 1);
    return {scale != nullptr, sTile.group_scale[0] + row * groups, &sTile.factors[0][factor(row)],
            &sTile.token_scale[row], groups};
  }

  // Of keys g (half 0) and g + 8.
  __device__ float read_token_scale(const Tile& sTile, int half) const {
    if constexpr (Format::kTokenScale) {
      const bool given = scale && tensor.groups <= 1;
      if (Format::kGroupShare || given) return sTile.token_scale[lane() / 4 + half * 8];
    }
    return 1.f;
  }

 private:
  static __device__ int lane() { return threadIdx.x % 32; }

  static constexpr int kCopies = kHeadDim * kElementBytes / kCopyBytes;  // of a row
  // for a lane, in all rows that it copies of a tile
  static constexpr bool kSameByte = 32 % kCopies == 0;

  // Of a lane's first copy of a tile.
  static __device__ int first_row() { return kSameByte ? lane() / kCopies : 0; }
  static __device__ int first_byte() { return kSameByte ? lane() % kCopies * kCopyBytes : 0; }

  // Where the factor of a row lies among those of its group: lanes read those of two rows of K, or
  // of four of V, at once.
  static __device__ int factor(int row) {
    return kLanes == 4 ? row % 8 * 2 + row / 8 : row % 8 / 2 * 4 + row / 8 * 2 + row % 2;
  }

  __device__ const float* scale_of(KvSlot slot) const {
    return scale + uint64_t(uint32_t(slot.row)) * tensor.scale_row_stride +
           uint64_t(uint32_t(slot.token)) * uint32_t(tensor.scale_token_stride);
  }

  // Slots of a row are permuted so that lanes of one read hit different banks: the rows that these
  // read together differ in their lowest bits for K, and in the bits above the lowest for V.
  static constexpr __device__ int flip(int row) {
    return kLanes == 8 ? row / 2 % 4 * 2 : Format::kBytes == 16 ? row % 2 * 4 : row % 4 * 2;
  }

  template <typename T>
  static __device__ auto at(T& sTile, int row, int byte) {
    auto* const slot = &sTile.slots[row][(byte / 16) ^ flip(row)];
    return reinterpret_cast<std::conditional_t<std::is_const_v<T>, const char, char>*>(slot) +
           byte % 16;
  }

  // source(row): where the lane's byte of a row lies, counted from the lane's first.
  // kUnroll: little of what seldom runs
  template <bool kUnroll, typename Source>
  __device__ void copy_rows(Tile& sTile, Source source) const {
    const uint32_t sSlots = ptx::shared_address(sTile.slots);
#pragma unroll kUnroll ? kCopies * 16 / 32 : 4
    for (int i = 0; i < kCopies * 16; i += 32) {
      const int row = kSameByte ? i / kCopies : (i + lane()) / kCopies;
      const int byte = kSameByte ? 0 : (i + lane()) % kCopies * kCopyBytes;
      const char* const src = source(row) + byte;
      const uint32_t dst = kSameByte ? sSlots + row * (kRowSlots * 16) + (slot ^ flip(row) * 16)
                                     : ptx::shared_address(at(sTile, row, byte));
      const int bytes = first_byte() + byte < head_dim * kElementBytes ? kCopyBytes : 0;
      // H200, 128 x 2048 keys of 32 heads: 1 % faster for 16-bit keys, none for bytes
      if constexpr (kCopyBytes == 16 && kElementBytes == 2) {
        ptx::cp_async_16_once(dst, src, bytes);
      } else if constexpr (kCopyBytes == 16) {
        ptx::cp_async_16(dst, src, bytes);
      } else {
        ptx::cp_async_8(dst, src, bytes);
      }
    }
  }

  __device__ void copy_shared_scales(Tile& sTile, const RowKeys<kWholeTiles>& keys,
                                     const KeyTile& tile) const {
    if (tile.full && dense_scales) {
      const float* const gScale = scale_of({tile.page, tile.token});
#pragma unroll 1
      for (int i = lane() * 4; i < 16 * tensor.groups; i += 32 * 4) {
        ptx::cp_async_16(ptx::shared_address(&sTile.group_scale[0][i]), gScale + i, 16);
      }
    } else {
      const int row = lane() % 16;
      const float* const gScale = scale_of(keys.slot(tile, row));
#pragma unroll 1
      for (int i = lane() / 16; i < tensor.groups; i += 2) {
        const uint32_t dst = ptx::shared_address(sTile.group_scale[0] + row * tensor.groups + i);
        ptx::cp_async_4(dst, gScale + i, 4);
      }
    }
  }

  __device__ void copy_group_scales(Tile& sTile, const RowKeys<kWholeTiles>& keys,
                                    const KeyTile& tile) const {
#pragma unroll
    for (int i = 0; i < kGroups * 16; i += 32) {
      const int row = (i + lane()) / kGroups, vector = (i + lane()) % kGroups;
      const int dim = min(vector * Format::kElements, head_dim - 1);
      const float* const gScale = scale_of(keys.slot(tile, row));
      ptx::cp_async_4(ptx::shared_address(&sTile.group_scale[row][vector]),
                      gScale + dim * tensor.groups / head_dim, 4);
    }
  }
};

}  // namespace jax_fa::decode
