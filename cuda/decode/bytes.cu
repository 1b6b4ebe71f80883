// What decoding needs once for queries of both types: the kernels over 8-bit caches, whose products
// are of halves, and the merge of splits.
#include "decode/kernel.cuh"
#include "dtypes.h"

namespace jax_fa {

template <int kHeadDim>
cudaError_t launch_decode_bytes(const AttentionParams& p, const SplitScratch& scratch,
                                cudaStream_t stream) {
  using namespace decode;
  // of a lane's vector: wide where that leaves no lane of a row without work
  constexpr int kBytes = kHeadDim % 128 == 0 ? 16 : 8;
  return with_dtype<DType::kInt8, DType::kE4M3, DType::kE5M2>(p.k.dtype, [&]<DType kCache>() {
    using Format = Byte<kCache, kBytes>;
    using Grouped = GroupedByte<kCache, kBytes>;
    return p.k.groups <= 1 && p.v.groups <= 1
               ? launch_columns<kHeadDim, Format, Format>(p, scratch, stream)
               : launch_columns<kHeadDim, Grouped, Grouped>(p, scratch, stream);
  });
}

template cudaError_t launch_decode_bytes<JAX_FA_HEAD_DIM>(const AttentionParams&,
                                                          const SplitScratch&, cudaStream_t);
template cudaError_t launch_combine<JAX_FA_HEAD_DIM>(const AttentionParams&, const SplitScratch&,
                                                     cudaStream_t);

}  // namespace jax_fa
