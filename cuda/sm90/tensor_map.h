// Tensor maps: what a bulk copy must know of an array in global memory.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "../sm80/tiles.h"

namespace jax_fa {

// An array [rows, tokens, heads, dim], copied in boxes of `box_tokens` tokens of `panel` elements
// of one head: elements of 16 bits swizzled over the panel's width, those of 8 bits as they are.
// The driver is asked for the one function that it alone has, so that nothing links against it.
inline cudaError_t make_tensor_map(CUtensorMap& map, DType dtype, const void* data, int dim,
                                   int heads, int64_t head_stride, int64_t tokens,
                                   int64_t token_stride, int64_t rows, int64_t row_stride,
                                   int panel, int box_tokens) {
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
  const auto bytes = [&](int64_t size, int64_t stride) {
    return cuuint64_t(size == 1 ? 16 : stride * element);
  };
  const cuuint64_t sizes[4] = {cuuint64_t(dim), cuuint64_t(heads), cuuint64_t(tokens),
                               cuuint64_t(rows)};
  const cuuint64_t strides[3] = {bytes(heads, head_stride), bytes(tokens, token_stride),
                                 bytes(rows, row_stride)};
  const cuuint32_t box[4] = {cuuint32_t(panel), 1, cuuint32_t(box_tokens), 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  const CUtensorMapDataType type = element == 1            ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                                   : dtype == DType::kBF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                                           : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const CUtensorMapSwizzle swizzle = element == 1  ? CU_TENSOR_MAP_SWIZZLE_NONE
                                     : panel == 64 ? CU_TENSOR_MAP_SWIZZLE_128B
                                                   : CU_TENSOR_MAP_SWIZZLE_64B;
  const CUresult result =
      encode(&map, type, 4, const_cast<void*>(data), sizes, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace jax_fa
