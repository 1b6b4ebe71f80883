// Decode over 16-bit caches, and in the slow way over those that bytes.cu does not read: with a
// tensor of each kind, pages of any size or unaligned rows.
#include "decode/kernel.cuh"
#include "dtypes.h"

namespace jax_fa::decode {
namespace {

template <typename T>
cudaError_t launch_one(const AttentionParams& p, const SplitScratch& scratch, cudaStream_t stream) {
  return p.q_start ? launch_packed<T>(p, scratch, stream) : launch_dense<T>(p, scratch, stream);
}

// Whether all rows of x are aligned for copies of `bytes`.
bool rows_aligned(const KvTensor& x, int head_dim, int64_t bytes) {
  const int64_t element = x.dtype <= DType::kBF16 ? 2 : 1;
  const int64_t all = x.row_stride | x.token_stride | x.head_stride | head_dim;
  return all * element % bytes == 0 && reinterpret_cast<uintptr_t>(x.data) % bytes == 0;
}

// What any of the kernels can read: a lane's vector lies in one group.
bool readable(const KvTensor& x, int head_dim, DType dtype) {
  if (x.dtype == dtype) return rows_aligned(x, head_dim, 16);
  const bool byte = x.dtype >= DType::kInt8;
  return byte && rows_aligned(x, head_dim, 8) && (x.groups <= 1 || head_dim % (x.groups * 8) == 0);
}

template <int kHeadDim, DType kDType>
cudaError_t launch_dtype(const AttentionParams& p, const SplitScratch& scratch,
                         cudaStream_t stream) {
  if (!readable(p.k, p.head_dim, kDType) || !readable(p.v, p.head_dim_v, kDType)) {
    return cudaErrorInvalidValue;
  }
  using Float = Float16<kDType>;
  using Any = AnyByte<kDType>;
  const bool k_float = p.k.dtype == kDType, v_float = p.v.dtype == kDType;
  const bool whole_tiles = !p.kv.page_table || p.kv.page_size % 16 == 0;
  if (whole_tiles && k_float && v_float) {
    return launch_columns<kHeadDim, Float, Float>(p, scratch, stream);
  }
  // whole copies, and whole lanes' vectors of whichever width in each group
  const auto whole = [](const KvTensor& x, int head_dim) {
    return rows_aligned(x, head_dim, 16) && (x.groups <= 1 || head_dim % (x.groups * 16) == 0);
  };
  if (whole_tiles && p.k.dtype == p.v.dtype && whole(p.k, p.head_dim) && whole(p.v, p.head_dim_v)) {
    return launch_decode_bytes<kHeadDim>(p, scratch, stream);
  }
  const auto general = [&]<typename KeyFormat, typename ValueFormat>() {
    return launch_one<Traits<kHeadDim, KeyFormat, ValueFormat, 1, false>>(p, scratch, stream);
  };
  if (k_float && v_float) return general.template operator()<Float, Float>();
  if (k_float) return general.template operator()<Float, Any>();
  if (v_float) return general.template operator()<Any, Float>();
  return general.template operator()<Any, Any>();
}

}  // namespace
}  // namespace jax_fa::decode

namespace jax_fa {

template <int kHeadDim>
cudaError_t launch_decode(const AttentionParams& p, const SplitScratch& scratch,
                          cudaStream_t stream) {
  return with_16_bits(p.dtype, [&]<DType kDType>() {
    return decode::launch_dtype<kHeadDim, kDType>(p, scratch, stream);
  });
}

template cudaError_t launch_decode<JAX_FA_HEAD_DIM>(const AttentionParams&, const SplitScratch&,
                                                    cudaStream_t);

}  // namespace jax_fa
