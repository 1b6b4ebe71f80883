#include "plan.h"

#include <utility>

#include "decode/splits.h"
#include "sm80/tiles.h"

namespace jax_fa {
namespace {

constexpr int kHeadDims[] = {JAX_FA_HEAD_DIMS};

// The tile for a head dim: the smallest compiled one that holds it; 0 if none does.
int tile_dim_of(int head_dim) {
  int best = 0;
  for (const int dim : kHeadDims) {
    if (dim >= head_dim && (best == 0 || dim < best)) best = dim;
  }
  return best;
}

// The decode kernel has no float32 instance, and many queries a row are work for prefill tiles.
constexpr int kMaxDecodeQueries = 16;

bool runs_decode_kernel(Operation operation, DType dtype, int len_q) {
  return operation == Operation::kDecode && dtype != DType::kF32 && len_q <= kMaxDecodeQueries;
}

// Calls launch.operator()<kHeadDim>() for the compiled tile.
template <typename Launch, int... kDims>
cudaError_t with_tile(int tile_dim, Launch launch, std::integer_sequence<int, kDims...>) {
  cudaError_t status = cudaErrorInvalidValue;
  ((tile_dim == kDims && (status = launch.template operator()<kDims>(), true)) || ...);
  return status;
}

constexpr std::integer_sequence<int, JAX_FA_HEAD_DIMS> kTiles;

// Packed rows of few queries in the decode kernel, beside it the others in a prefill kernel.
template <DType kDType>
cudaError_t run_hybrid(const AttentionParams& p, SplitScratch scratch, cudaStream_t stream) {
  AttentionParams decode = p, prefill = p;
  decode.max_len_q = decode_max_len_q(p.heads_q / p.heads_kv);
  prefill.min_len_q = decode.max_len_q + 1;
  prefill.beside_previous = true;
  scratch.leaves_room = true;
  return with_tile(
      tile_dim_of(p.head_dim),
      [&]<int kDim>() {
        cudaError_t status = launch_decode<kDim, kDType>(decode, scratch, stream);
        if (status == cudaSuccess) {
          status = run_attention(Operation::kPrefill, prefill, scratch, stream);
        }
        if (status != cudaSuccess) return status;
        return launch_combine<kDim, kDType>(decode, scratch, stream);
      },
      kTiles);
}

}  // namespace

int splits_of_decode(int batch, int len_q, int heads_q, int heads_kv, int head_dim,
                     int64_t max_len_kv, int key_bytes) {
  if (len_q > kMaxDecodeQueries) return 1;
  return decode_split(batch, len_q, heads_q, heads_kv, head_dim, max_len_kv, key_bytes).splits;
}

cudaError_t run_attention(Operation operation, const AttentionParams& p,
                          const SplitScratch& scratch, cudaStream_t stream) {
  if (p.total_q == 0 || p.batch == 0) return cudaSuccess;
  if (operation == Operation::kHybrid && p.dtype != DType::kF32) {
    return p.dtype == DType::kBF16 ? run_hybrid<DType::kBF16>(p, scratch, stream)
                                   : run_hybrid<DType::kF16>(p, scratch, stream);
  }
  const int tile_dim = tile_dim_of(p.head_dim);
  if (runs_decode_kernel(operation, p.dtype, p.len_q)) {
    return with_tile(
        tile_dim,
        [&]<int kDim>() {
          return p.dtype == DType::kBF16 ? launch_decode<kDim, DType::kBF16>(p, scratch, stream)
                                         : launch_decode<kDim, DType::kF16>(p, scratch, stream);
        },
        kTiles);
  }
  return with_tile(
      tile_dim,
      [&]<int kDim>() {
        switch (p.dtype) {
          case DType::kBF16:
            return launch_fwd_sm80<kDim, DType::kBF16>(p, stream);
          case DType::kF16:
            return launch_fwd_sm80<kDim, DType::kF16>(p, stream);
          default:
            return launch_fwd_sm80<kDim, DType::kF32>(p, stream);
        }
      },
      kTiles);
}

Plan plan_of(const std::string& operation, int batch, int len_q, int total_q, int max_len_kv,
             int heads_q, int heads_kv, int head_dim, int element_bytes, int kv_bytes,
             bool general) {
  const Operation op = operation == "decode"   ? Operation::kDecode
                       : operation == "hybrid" ? Operation::kHybrid
                                               : Operation::kPrefill;
  const DType dtype = element_bytes == 4 ? DType::kF32 : DType::kBF16;
  const int tile_dim = tile_dim_of(head_dim);
  if (runs_decode_kernel(op, dtype, len_q)) {
    const int columns = heads_q / heads_kv * len_q;
    const int column_tiles = decode_column_tiles(tile_dim, columns), tile = column_tiles * 8;
    const DecodeSplit split =
        decode_split(batch, len_q, heads_q, heads_kv, head_dim, max_len_kv, kv_bytes);
    return {"decode",
            tile,
            decode_step_keys(tile_dim, column_tiles, kv_bytes == 1),
            tile_dim,
            split.warps,
            split.splits,
            int64_t(batch) * heads_kv * ((columns + tile - 1) / tile) * split.splits};
  }
  AttentionParams p{};
  static const int kPacked = 0;  // packed queries are told from dense ones by a pointer
  p.q_start = total_q > 0 ? &kPacked : nullptr;
  p.batch = batch;
  p.len_q = len_q;
  p.total_q = total_q > 0 ? total_q : batch * len_q;
  p.heads_q = heads_q;
  p.heads_kv = heads_kv;
  p.head_dim = p.head_dim_v = head_dim;
  p.kv.len_kv = max_len_kv;
  p.dtype = dtype;
  p.k.dtype = p.v.dtype = kv_bytes == 1 ? DType::kInt8 : dtype;
  const FwdTile tile = fwd_sm80_tile(tile_dim, dtype, general);
  const bool hybrid = op == Operation::kHybrid && dtype != DType::kF32;
  return {hybrid ? "decode, sm80/fwd" : "sm80/fwd",
          tile.m,
          tile.n,
          tile_dim,
          tile.warps,
          1,
          fwd_sm80_grid(p, tile).blocks};
}

}  // namespace jax_fa
