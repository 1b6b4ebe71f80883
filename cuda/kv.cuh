// Where a key lies: batch row and position to an address, for contiguous, packed and paged keys.
#pragma once

#include "params.h"

namespace jax_fa {

struct KvSlot {
  int64_t row;
  int64_t token;
};

// One batch row's view of KvIndex: what is the same for all its keys is read once.
struct KvRow {
  const int* pages;  // this row of the page table, or null
  int64_t row;       // contiguous: the row; paged: the first page of the layer
  int start, page_size;

  __device__ KvRow(const KvIndex& index, int b, int rows) {
    const int layer = index.layer ? index.layer[index.layers == 1 ? 0 : b] : 0;
    row = int64_t(layer) * index.layer_stride;
    pages = index.page_table ? index.page_table + int64_t(b) * index.max_pages : nullptr;
    if (!pages) row += index.rows ? index.rows[b] : __builtin_expect(b < rows, 1) ? b : b % rows;
    start = index.start ? index.start[b] : 0;
    page_size = index.page_size;
  }

  __device__ KvSlot operator()(int j) const {
    if (pages) return {row + pages[j / page_size], j % page_size};
    return {row, int64_t(start) + j};
  }
};

__device__ inline int64_t kv_offset(const KvTensor& x, KvSlot slot, int head) {
  return slot.row * x.row_stride + slot.token * x.token_stride + head * x.head_stride;
}

__device__ inline int64_t scale_offset(const KvTensor& x, KvSlot slot, int head) {
  return slot.row * x.scale_row_stride + head * x.scale_head_stride +
         slot.token * x.scale_token_stride;
}

}  // namespace jax_fa
