// Tensor maps: what a bulk copy must know of an array in global memory.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "../cache/copied.h"
#include "../sm80/tiles.h"

namespace jax_fa {

// An axis of an array, and what a box has of it; strides in elements. The innermost has stride 1.
struct MapAxis {
  int64_t size, stride;
  int box;
};

// Boxes are swizzled over their width of 128 or 64 bytes, or lie as they are. The driver is asked
// for the one function that it alone has, so that nothing links against it.
template <int kAxes>
cudaError_t encode_map(CUtensorMap& map, DType dtype, const void* data,
                       const MapAxis (&axes)[kAxes], bool swizzled = true) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                               12000, cudaEnableDefault, &found);
    if (error != cudaSuccess || found != cudaDriverEntryPointSuccess) function = nullptr;
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  if (!encode) return cudaErrorNotSupported;

  // An axis of size 1 may have any stride; 16 bytes is one that is always legal.
  const int element = element_size(dtype);
  cuuint64_t sizes[kAxes], strides[kAxes];
  cuuint32_t box[kAxes], steps[kAxes];
  for (int i = 0; i < kAxes; ++i) {
    sizes[i] = cuuint64_t(axes[i].size);
    strides[i] = cuuint64_t(axes[i].size == 1 ? 16 : axes[i].stride * element);
    box[i] = cuuint32_t(axes[i].box);
    steps[i] = 1;
  }
  const CUtensorMapDataType type = element == 1            ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                                   : dtype == DType::kBF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                           : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUtensorMapSwizzle swizzle = !swizzled                 ? CU_TENSOR_MAP_SWIZZLE_NONE
                                     : box[0] * element == 128 ? CU_TENSOR_MAP_SWIZZLE_128B
                                                               : CU_TENSOR_MAP_SWIZZLE_64B;
  const CUresult result =
      encode(&map, type, kAxes, const_cast<void*>(data), sizes, strides + 1, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// An array [rows, tokens, heads, dim], copied in boxes of `box_tokens` tokens of `panel` elements
// of one head.
inline cudaError_t make_tensor_map(CUtensorMap& map, DType dtype, const void* data, int dim,
                                   int heads, int64_t head_stride, int64_t tokens,
                                   int64_t token_stride, int64_t rows, int64_t row_stride,
                                   int panel, int box_tokens, bool swizzled = true) {
  const MapAxis axes[] = {{dim, 1, panel},
                          {heads, head_stride, 1},
                          {tokens, token_stride, box_tokens},
                          {rows, row_stride, 1}};
  return encode_map(map, dtype, data, axes, swizzled);
}

// Keys or values of 8 bits, copied in boxes of so many tokens of a unit's heads.
inline cudaError_t make_unit_map(CUtensorMap& map, const KvTensor& x, int heads, int dim,
                                 const CopyUnits& units, int tokens) {
  const MapAxis axes[] = {{dim, 1, dim},
                          {heads, x.head_stride, units.heads},
                          {x.tokens, x.token_stride, tokens},
                          {x.rows, x.row_stride, 1}};
  return encode_map(map, x.dtype, x.data, axes, /*swizzled=*/false);
}

// Tokens of all rows, [tokens / 8, 8, heads, dim / panel, panel], copied in boxes of `box_groups`
// groups of eight with `box_panels` panels of a head: [box_groups, box_panels, 8, panel].
inline cudaError_t make_group_map(CUtensorMap& map, DType dtype, const void* data, int dim,
                                  int heads, int64_t head_stride, int64_t token_stride, int panel,
                                  int box_panels, int box_groups) {
  const MapAxis axes[] = {{panel, 1, panel},
                          {8, token_stride, 8},
                          {dim / panel, panel, box_panels},
                          {INT32_MAX, 8 * token_stride, box_groups},
                          {heads, head_stride, 1}};
  return encode_map(map, dtype, data, axes);
}

}  // namespace jax_fa
