// Movement: tiles of queries, keys and values from global to swizzled shared memory.
//
// A tile's row of kHeadDim elements is kChunks chunks of 16 bytes. Chunk c of row r lies at place
// c ^ swizzle(r) of its row, which makes both the copies (consecutive chunks of a row) and ldmatrix
// (one chunk of 8 consecutive rows) free of bank conflicts.
#pragma once

#include "../kv.cuh"
#include "../ptx.cuh"

namespace jax_fa {

template <class Traits>
struct TileLayout {
  static constexpr int kChunkElements = 16 / sizeof(typename Traits::Element);
  static constexpr int kChunks = Traits::kHeadDim / kChunkElements;
  static constexpr int kRowBytes = kChunks * 16;
  // The chunks that a swizzle permutes among: 8 fill all banks, 4 where 8 do not divide the row.
  static constexpr int kGroup = kChunks % 8 == 0 ? 8 : 4;
  static_assert(kChunks % kGroup == 0);

  __device__ static uint32_t offset(int row, int chunk) {
    const int swizzle = row / (8 / kGroup) % kGroup;
    return row * kRowBytes + (chunk ^ swizzle) * 16;
  }

  // From the offset of chunk c < 2 of some row to that of chunk c + `chunks` (even) of the row.
  __device__ static uint32_t advance(uint32_t offset, int chunks) {
    return (offset ^ (chunks % kGroup * 16)) + chunks / kGroup * kGroup * 16;
  }
};

// A thread's share of a tile: one column of chunks in each group, every kRowStep-th row. kRowStep
// is a multiple of the swizzle's period, so that the share's place is the same in all its rows.
template <class Traits, int kRows>
struct TileShare {
  using Layout = TileLayout<Traits>;
  static constexpr int kRowStep = Traits::kThreads / Layout::kGroup;
  static_assert(kRows % kRowStep == 0 && kRowStep % 8 == 0);

  int row = threadIdx.x / Layout::kGroup;
  int chunk = threadIdx.x % Layout::kGroup;

  // Calls f(row, chunk, shared address).
  template <class F>
  __device__ void for_each(uint32_t sTile, F f) const {
    const uint32_t sShare = sTile + Layout::offset(row, chunk);
#pragma unroll
    for (int r = 0; r < kRows; r += kRowStep) {
#pragma unroll
      for (int c = 0; c < Layout::kChunks; c += Layout::kGroup) {
        f(row + r, chunk + c, sShare + r * Layout::kRowBytes + c * 16);
      }
    }
  }

  // Calls f(row, the shared address of its first chunk).
  template <class F>
  __device__ void for_each_row(uint32_t sTile, F f) const {
    const uint32_t sShare = sTile + Layout::offset(row, chunk);
#pragma unroll
    for (int r = 0; r < kRows; r += kRowStep) f(row + r, sShare + r * Layout::kRowBytes);
  }
};

// Starts the copy of a tile whose row r begins at row_address(r). Rows from `rows` on and elements
// from head_dim on become zero without being read.
template <class Traits, int kRows, class RowAddress>
__device__ void copy_tile(uint32_t sTile, int rows, int head_dim, RowAddress row_address) {
  constexpr int kChunkElements = TileLayout<Traits>::kChunkElements;
  TileShare<Traits, kRows>().for_each(sTile, [&](int row, int chunk, uint32_t dst) {
    const bool inside = row < rows && chunk * kChunkElements < head_dim;
    ptx::cp_async_16(dst, row_address(row) + chunk * kChunkElements, inside ? 16 : 0);
  });
}

// The same with each row's address asked for once, which takes registers of its own.
template <class Traits, int kRows, class RowAddress>
__device__ void copy_rows(uint32_t sTile, int rows, int head_dim, RowAddress row_address) {
  using Layout = TileLayout<Traits>;
  const TileShare<Traits, kRows> share;
  share.for_each_row(sTile, [&](int row, uint32_t dst) {
    const auto* const gRow = row_address(row);
#pragma unroll
    for (int c = 0; c < Layout::kChunks; c += Layout::kGroup) {
      const int element = (share.chunk + c) * Layout::kChunkElements;
      const bool inside = row < rows && element < head_dim;
      ptx::cp_async_16(dst + c * 16, gRow + element, inside ? 16 : 0);
    }
  });
}

// Where the keys (or values) of one head of one batch row lie. Kept in shared memory: every thread
// needs all of it once a tile and none of it in between.
struct KvHead {
  KvRow where;
  int head, len;
  int64_t origin;  // element offset; contiguous: of key 0, paged: of token 0 of page 0

  __device__ KvHead(const KvTensor& x, const KvIndex& index, int b, int head, int len)
      : where(index, b, x.rows), head(head), len(len) {
    origin = kv_offset(x, where.pages ? KvSlot{0, 0} : where(0), head);
  }
};

// Where the keys of a tile of a paged row lie, looked up by one thread a key for all that copy
// them.
template <int kRows>
struct PageSlots {
  int page[kRows], token[kRows];

  // Neither keys nor page-table entries at or past their number are asked for. The pages arrive as
  // copies do.
  __device__ void find(const KvHead& kv, int first) {
    if (!kv.where.pages || threadIdx.x >= kRows) return;
    const int key = min(first + int(threadIdx.x), kv.len - 1), index = key / kv.where.page_size;
    token[threadIdx.x] = key - index * kv.where.page_size;
    ptx::cp_async_4(ptx::shared_address(&page[threadIdx.x]), kv.where.pages + index, 4);
  }
};

// Starts the copy of keys [first, first + kRows); neither keys nor page-table entries at or past
// their number are read.
template <class Traits, int kRows>
__device__ void load_kv(uint32_t sTile, const KvTensor& x, const KvHead& kv, int first, int dim) {
  const auto* gHead = static_cast<const typename Traits::Element*>(x.data) + kv.origin;
  const int rows = kv.len - first;
  if (kv.where.pages) {
    copy_tile<Traits, kRows>(sTile, rows, dim, [&](int row) {
      return gHead + kv_offset(x, kv.where(first + min(row, rows - 1)), 0);
    });
  } else {
    const auto* gTile = gHead + first * x.token_stride;
    copy_tile<Traits, kRows>(sTile, rows, dim,
                             [&](int row) { return gTile + row * x.token_stride; });
  }
}

// The same where `slots` has found the keys that are paged.
template <class Traits, int kRows>
__device__ void load_kv(uint32_t sTile, const PageSlots<kRows>& slots, const KvTensor& x,
                        const KvHead& kv, int first, int dim) {
  const auto* gHead = static_cast<const typename Traits::Element*>(x.data) + kv.origin;
  const int rows = kv.len - first;
  if (kv.where.pages) {
    copy_rows<Traits, kRows>(sTile, rows, dim, [&](int row) {
      return gHead + kv_offset(x, {kv.where.row + slots.page[row], slots.token[row]}, 0);
    });
  } else {
    const auto* gTile = gHead + first * x.token_stride;
    copy_rows<Traits, kRows>(sTile, rows, dim,
                             [&](int row) { return gTile + row * x.token_stride; });
  }
}

}  // namespace jax_fa
