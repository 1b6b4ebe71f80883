#include "plan.h"

#include <climits>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "cache/copied.h"
#include "float32/tiles.h"
#include "sm80/bwd_tiles.h"
#include "sm80/tiles.h"
#include "sm90/bwd_tiles.h"
#include "sm90/tiles.h"

namespace jax_fa {
namespace {

constexpr int kHeadDims[] = {JAX_FA_HEAD_DIMS};

// The tile for head dims of keys and of values: the smallest compiled one that holds both; 0 if
// none does.
int tile_dim_of(int head_dim, int head_dim_v) {
  int best = 0;
  for (const int dim : kHeadDims) {
    if (dim >= std::max(head_dim, head_dim_v) && (best == 0 || dim < best)) best = dim;
  }
  return best;
}

int tile_dim_of(const AttentionParams& p) { return tile_dim_of(p.head_dim, p.head_dim_v); }

// The decode kernel has no float32 instance, and many queries a row are work for prefill tiles.
constexpr int kMaxDecodeQueries = 16;

bool decodes(DType dtype, int tile_dim) { return dtype != DType::kF32 && tile_dim <= kMostHeadDim; }

bool runs_decode_kernel(Operation operation, DType dtype, int len_q, int tile_dim) {
  return operation == Operation::kDecode && decodes(dtype, tile_dim) && len_q <= kMaxDecodeQueries;
}

bool runs_hybrid_kernels(Operation operation, DType dtype, int tile_dim) {
  return operation == Operation::kHybrid && decodes(dtype, tile_dim);
}

// Calls launch.operator()<kHeadDim>() for the compiled tile, of those up to kMost.
template <int kMost, typename Launch, int... kDims>
cudaError_t with_tile(int tile_dim, Launch launch, std::integer_sequence<int, kDims...>) {
  cudaError_t status = cudaErrorInvalidValue;
  const auto run = [&]<int kDim>() {
    if constexpr (kDim <= kMost) status = launch.template operator()<kDim>();
  };
  ((tile_dim == kDims && (run.template operator()<kDims>(), true)) || ...);
  return status;
}

constexpr std::integer_sequence<int, JAX_FA_HEAD_DIMS> kTiles;

template <typename Launch>
cudaError_t with_tile(int tile_dim, Launch launch) {
  return with_tile<kMostHeadDim>(tile_dim, launch, kTiles);
}

// Whether the Hopper kernels are compiled in.
constexpr bool kHasHopper = JAX_FA_SM90;

// Whether they are, and not forbidden by JAX_FA_ARCH=sm80.
bool hopper_allowed() {
  static const char* arch = std::getenv("JAX_FA_ARCH");
  return kHasHopper && (!arch || std::strcmp(arch, "sm80") != 0);
}

// 10 * major + minor of the current device; 0 if there is none.
int current_capability() {
  int device, major, minor;
  const bool known =
      cudaGetDevice(&device) == cudaSuccess &&
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess;
  return known ? 10 * major + minor : 0;
}

bool runs_hopper_kernel(const AttentionParams& p, int capability) {
  return runs_hopper(capability) && fwd_sm90_covers(p, tile_dim_of(p));
}

cudaError_t run_hopper_kernel(const AttentionParams& p, const CopiedCache& copied,
                              cudaStream_t stream) {
  return with_tile(tile_dim_of(p), [&]<int kDim>() {
    if constexpr (kHasHopper) {
      if constexpr (kDim == kFwdDimOfNarrowValues) {
        if (fwd_sm90_dim_v(p, kDim) < kDim) {
          return launch_fwd_sm90<kDim, kFwdNarrowValues>(p, copied, stream);
        }
      }
      return launch_fwd_sm90<kDim, kDim>(p, copied, stream);
    }
    return cudaErrorInvalidValue;
  });
}

bool runs_hopper_backward(const BackwardParams& p, int tile_dim, int capability) {
  return runs_hopper(capability) && bwd_sm90_covers(p, tile_dim);
}

// Whether dq is summed where dk and dv are made, in a block's `shared_bytes`.
bool sums_dq(int tile_dim, DType dtype, bool general, int shared_bytes) {
  if (!bwd_can_sum_dq(dtype)) return false;
  return !bwd_shares_scores(tile_dim) || bwd_shared_stages(tile_dim, general, shared_bytes) > 0;
}

cudaError_t run_backward_kernels(const BackwardParams& p, int stages, cudaStream_t stream) {
  cudaError_t status = launch_bwd_rows_sm80(p, stream);
  if (p.fwd.exact && status == cudaSuccess) return launch_bwd_float32(p, stream);
  const auto then = [&](auto launch) {
    if (status == cudaSuccess) status = with_tile(tile_dim_of(p.fwd), launch);
  };
  if (p.dq_sum && runs_hopper_backward(p, tile_dim_of(p.fwd), current_capability())) {
    then([&]<int kDim>() {
      if constexpr (kHasHopper) return launch_bwd_sm90<kDim>(p, stream);
      return cudaErrorInvalidValue;
    });
    return status;
  }
  then([&]<int kDim>() {
    if constexpr (bwd_shares_scores(kDim)) {
      if (p.dq_sum) return launch_bwd_shared_sm80<kDim>(p, stages, stream);
    }
    return launch_bwd_keys_sm80<kDim>(p, stream);
  });
  if (!p.dq_sum) then([&]<int kDim>() { return launch_bwd_queries_sm80<kDim>(p, stream); });
  if (p.dbias) then([&]<int kDim>() { return launch_bwd_bias_sm80<kDim>(p, stream); });
  return status;
}

// Packed rows of few queries in the decode kernel, beside it the others in a prefill kernel. The
// portable one shares multiprocessors with the decode kernel before it. A Hopper block takes all of
// one: it comes first, and leaves the decode kernel the multiprocessors that its work allows. Of
// short rows both kernels wait for memory alone, and the decode kernel, which starts sooner, comes
// first: prefill blocks start where its last ones end.
cudaError_t run_hybrid(const AttentionParams& p, SplitScratch scratch, cudaStream_t stream) {
  AttentionParams decode = p, prefill = p;
  decode.max_len_q = decode_max_len_q(p.heads_q / p.heads_kv);
  prefill.min_len_q = decode.max_len_q + 1;
  const bool hopper = runs_hopper_kernel(prefill, current_capability());
  scratch.whole_rows = hopper && decodes_whole_rows(p.kv.len_kv, scratch.part_keys);
  const bool prefill_first = hopper && !scratch.whole_rows;
  (prefill_first ? decode : prefill).beside_previous = true;
  scratch.leaves_room = !hopper;
  scratch.next_task = hopper ? p.next_tile + 1 : nullptr;
  const auto run_prefill = [&] {
    return run_attention(Operation::kPrefill, prefill, scratch, stream);
  };
  return with_tile(tile_dim_of(p), [&]<int kDim>() {
    cudaError_t status = prefill_first ? run_prefill() : cudaSuccess;
    if (status == cudaSuccess) status = launch_decode<kDim>(decode, scratch, stream);
    if (status == cudaSuccess && !prefill_first) status = run_prefill();
    if (status != cudaSuccess || scratch.whole_rows) return status;
    return launch_combine<kDim>(decode, scratch, stream);
  });
}

CopyUnits copy_units(int rows, int tokens, int heads_kv, int head_dim, int head_dim_v) {
  return {rows, tokens, heads_kv, std::max(head_dim, head_dim_v)};
}

// Whether the launch that reads copies makes them.
bool copies_meanwhile(const AttentionParams& p, const CopiedCache& copied) {
  const int tile_dim = tile_dim_of(p);
  return p.k.rows == p.v.rows && runs_hopper_kernel(p, current_capability()) &&
         fwd_sm90_widens(copied.k, p.head_dim) && fwd_sm90_widens(copied.v, p.head_dim_v) &&
         fwd_sm90_copies(p, tile_dim, fwd_sm90_dim_v(p, tile_dim));
}

// Of the same rows and tokens as x, without scales. Rows lie copied_tokens apart.
KvTensor copy_of(const KvTensor& x, const void* data, int heads, int dim, DType dtype) {
  KvTensor out{};
  out.data = data;
  out.head_stride = dim;
  out.token_stride = int64_t(heads) * dim;
  out.row_stride = copied_tokens(x.tokens) * out.token_stride;
  out.rows = x.rows;
  out.tokens = x.tokens;
  out.dtype = dtype;
  return out;
}

}  // namespace

// Hopper's machine code runs on 9.0 alone.
bool runs_hopper(int capability) { return capability == 90 && hopper_allowed(); }

int max_head_dim(int element_bytes, bool backward) {
  int most = 0;
  for (const int dim : kHeadDims) {
    if (dim <= kMostHeadDim || (element_bytes == 2 && !backward)) most = std::max(most, dim);
  }
  return most;
}

int splits_of_decode(int batch, int len_q, int heads_q, int heads_kv, int head_dim, int head_dim_v,
                     int64_t max_len_kv, int key_bytes, bool grouped) {
  const int tile_dim = tile_dim_of(head_dim, head_dim_v);
  if (!runs_decode_kernel(Operation::kDecode, DType::kBF16, len_q, tile_dim)) return 1;
  return decode_split(batch, len_q, heads_q, heads_kv, head_dim, head_dim_v, max_len_kv, key_bytes,
                      grouped)
      .splits;
}

PackedScratch scratch_of_hybrid(int batch, int heads_q, int heads_kv, int head_dim, int head_dim_v,
                                int64_t max_len_kv, int split_size) {
  if (!decodes(DType::kBF16, tile_dim_of(head_dim, head_dim_v))) return {0, 0};
  return packed_scratch(batch, heads_q, heads_kv, head_dim, head_dim_v, max_len_kv, split_size);
}

cudaError_t run_attention(Operation operation, const AttentionParams& p,
                          const SplitScratch& scratch, cudaStream_t stream) {
  if (p.total_q == 0 || p.batch == 0) return cudaSuccess;
  if (p.exact) return launch_fwd_float32(p, stream);
  const int tile_dim = tile_dim_of(p);
  if (runs_hybrid_kernels(operation, p.dtype, tile_dim)) return run_hybrid(p, scratch, stream);
  if (runs_decode_kernel(operation, p.dtype, p.len_q, tile_dim)) {
    return with_tile(tile_dim, [&]<int kDim>() { return launch_decode<kDim>(p, scratch, stream); });
  }
  if (runs_hopper_kernel(p, current_capability())) return run_hopper_kernel(p, {}, stream);
  constexpr int kAll = INT_MAX;
  return with_tile<kAll>(
      tile_dim, [&]<int kDim>() { return launch_fwd_sm80<kDim>(p, stream); }, kTiles);
}

cudaError_t run_copied(const AttentionParams& params, void* k, void* v, cudaStream_t stream) {
  AttentionParams p = params;
  p.k = copy_of(params.k, k, p.heads_kv, p.head_dim, p.dtype);
  p.v = copy_of(params.v, v, p.heads_kv, p.head_dim_v, p.dtype);
  CopiedCache copied;
  copied.k = params.k;
  copied.v = params.v;
  if (!copied.suits(p.head_dim, p.head_dim_v)) return cudaErrorInvalidValue;
  if (copies_meanwhile(p, copied)) {
    copied.units = copy_units(p.k.rows, p.k.tokens, p.heads_kv, p.head_dim, p.head_dim_v);
    copied.taken = p.next_tile + kTakenCounts;
    copied.copied = copied.taken + 1;
    return run_hopper_kernel(p, copied, stream);
  }
  const cudaError_t status = launch_widen(p, copied, stream);
  return status == cudaSuccess ? run_attention(Operation::kPrefill, p, {}, stream) : status;
}

bool multiplies_bytes(int head_dim, int head_dim_v) {
  return tile_dim_of(head_dim, head_dim_v) == kFwdDimOfBytes;
}

CopyScratch copy_scratch(int rows, int tokens, int heads_kv, int head_dim, int head_dim_v) {
  const CopyUnits units = copy_units(rows, tokens, heads_kv, head_dim, head_dim_v);
  return {units.scratch_ints(), copied_tokens(tokens)};
}

int64_t dq_sum_size(int batch, int len_q, int total_q, int heads_q, int head_dim, int head_dim_v,
                    int element_bytes, bool deterministic) {
  const DType dtype = element_bytes == 4 ? DType::kF32 : DType::kBF16;
  const int tile_dim = tile_dim_of(head_dim, head_dim_v);
  const bool packed = total_q > 0;
  int64_t turns = 0;
  if (deterministic) {
    if (!hopper_allowed() || !bwd_sm90_has_tile(tile_dim, dtype)) return 0;
    turns = bwd_sm90_turns(packed, batch, len_q, total_q, heads_q, tile_dim);
  }
  return bwd_dq_sum_size(packed, batch, len_q, total_q, heads_q, tile_dim, dtype) + turns;
}

cudaError_t run_backward(const BackwardParams& params, cudaStream_t stream) {
  BackwardParams p = params;
  int device = 0, shared_bytes = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  status = cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (status != cudaSuccess) return status;
  const int tile_dim = tile_dim_of(p.fwd);
  const bool general = bwd_general(p.fwd) || p.fwd.seeds;
  const int stages = bwd_shared_stages(tile_dim, general, shared_bytes);
  const bool hopper = p.dq_sum && runs_hopper_backward(p, tile_dim, current_capability());
  const bool sums = !p.deterministic && sums_dq(tile_dim, p.fwd.dtype, general, shared_bytes);
  if (!hopper && !sums) p.dq_sum = nullptr;
  return run_backward_kernels(p, stages, stream);
}

Plan plan_of_backward(int batch, int len_q, int total_q, int len_kv, int heads_q, int heads_kv,
                      int head_dim, int head_dim_v, int element_bytes, bool deterministic,
                      const PlanOptions& options) {
  using enum KeyGradients;
  const DType dtype = element_bytes == 4 ? DType::kF32 : DType::kBF16;
  const int tile_dim = tile_dim_of(head_dim, head_dim_v);
  BackwardParams p{};
  static const int kPacked = 0;  // packed queries are told from dense ones by a pointer
  p.fwd.q_start = total_q > 0 ? &kPacked : nullptr;
  p.fwd.batch = batch;
  p.fwd.len_q = len_q;
  p.fwd.heads_q = heads_q;
  p.fwd.heads_kv = heads_kv;
  p.fwd.head_dim = head_dim;
  p.fwd.head_dim_v = head_dim_v;
  p.fwd.dropout_limit = dropout_limit(options.dropout_rate);
  p.fwd.kv.len_kv = p.total_k = len_kv;
  p.fwd.dtype = dtype;
  p.fwd.bias = options.bias ? &kPacked : nullptr;
  p.deterministic = deterministic;
  if (options.exact) {
    const int dim = float32_dim(p.fwd), rows = float32_backward_rows(dim);
    const int64_t blocks = bwd_keys_blocks(p, rows);
    return {"float32/attention", rows, rows, dim, kFloat32Warps, 1, blocks};
  }
  if (runs_hopper_backward(p, tile_dim, options.capability)) {
    const BwdHopperTile tile = bwd_sm90_tile(tile_dim, options.general);
    const int64_t tiles = bwd_sm90_order(p, tile.m, options.masked || deterministic).total;
    const int blocks = bwd_sm90_pairs(tile_dim) ? 2 : 1;
    return {"sm90/bwd",
            tile.n,
            tile.m,
            tile_dim,
            tile.warps,
            1,
            std::min(options.sms / blocks, tiles) * blocks};
  }
  const bool general = options.general || options.bias || options.dropout_rate > 0;
  const bool with_dq = !deterministic && sums_dq(tile_dim, dtype, general, options.shared_kb << 10);
  const bool shares = with_dq && bwd_shares_scores(tile_dim);
  const KeyGradients grads = with_dq ? kBothAndDq : bwd_splits_keys(tile_dim) ? kDk : kBoth;
  const int stages = bwd_shared_stages(tile_dim, general, options.shared_kb << 10);
  const BwdTile tile = shares ? bwd_shared_tile(tile_dim, general, stages)
                              : bwd_keys_tile(tile_dim, dtype, general, grads);
  return {shares    ? "sm80/bwd_shared"
          : with_dq ? "sm80/bwd_keys"
                    : "sm80/bwd_keys + sm80/bwd_queries",
          tile.n,
          tile.m,
          tile_dim,
          tile.warps,
          1,
          bwd_keys_blocks(p, tile.m)};
}

Plan plan_of(const std::string& operation, int batch, int len_q, int total_q, int max_len_kv,
             int heads_q, int heads_kv, int head_dim, int head_dim_v, int element_bytes,
             int kv_bytes, const PlanOptions& options) {
  const Operation op = operation == "decode"   ? Operation::kDecode
                       : operation == "hybrid" ? Operation::kHybrid
                                               : Operation::kPrefill;
  const DType dtype = element_bytes == 4 ? DType::kF32 : DType::kBF16;
  const int tile_dim = tile_dim_of(head_dim, head_dim_v);
  if (runs_decode_kernel(op, dtype, len_q, tile_dim)) {
    const int columns = heads_q / heads_kv * len_q;
    int column_tiles = decode_column_tiles(tile_dim, columns);
    DecodeSplit split = decode_split(batch, len_q, heads_q, heads_kv, head_dim, head_dim_v,
                                     max_len_kv, kv_bytes, options.grouped);
    constexpr int kOldGpus = 163;  // KiB: code for them has no wider blocks
    const int shared_kb = kHasHopper ? options.shared_kb : std::min(options.shared_kb, kOldGpus);
    while (decode_shared_kb(tile_dim, column_tiles, split.warps) > shared_kb) {
      if (split.warps != kWideWarps || column_tiles > 1) column_tiles /= 2;
      split.warps = decode_warps(column_tiles);
    }
    const int tile = column_tiles * 8;
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
  p.head_dim = head_dim;
  p.head_dim_v = head_dim_v;
  p.kv.len_kv = max_len_kv;
  p.dtype = dtype;
  p.k.dtype = kv_bytes <= 1 && !options.copied ? DType::kInt8 : dtype;
  p.v.dtype = kv_bytes == 1 && !options.copied ? DType::kInt8 : dtype;
  if (options.fp8_keys && !options.copied) {
    p.dtype = DType::kBF16;
    p.k.dtype = DType::kE4M3;
  }
  p.scale = options.general ? 0 : 1;
  p.bias = options.bias ? &kPacked : nullptr;
  static const uint32_t kSeeds[2] = {};
  p.seeds = options.dropout_rate > 0 ? kSeeds : nullptr;
  p.dropout_limit = dropout_limit(options.dropout_rate);
  p.window_left = -1;
  p.window_right = options.masked ? 0 : -1;
  p.kv.page_table = options.page_size > 0 ? &kPacked : nullptr;
  p.kv.page_size = options.page_size;
  const bool hybrid = runs_hybrid_kernels(op, dtype, tile_dim);
  if (options.exact) {
    const int dim = float32_dim(p), rows = float32_forward_rows(dim);
    const int64_t blocks = fwd_sm80_grid(p, FwdTile{rows, rows, kFloat32Warps, 1}).blocks;
    return {"float32/attention", rows, rows, dim, kFloat32Warps, 1, blocks};
  }
  if (runs_hopper_kernel(p, options.capability)) {
    const int tile_dim_v = fwd_sm90_dim_v(p, tile_dim);
    const bool copies = options.copied && kv_bytes == 1 && fwd_sm90_copies(p, tile_dim, tile_dim_v);
    const FwdClass kind = copies ? FwdClass::kCopies : fwd_sm90_class(p, tile_dim, tile_dim_v);
    const HopperTile tile = fwd_sm90_tile(tile_dim, tile_dim_v, kind);
    const int warps = (tile.m / 64 + tile.dequantizers + copies + 1) * 4;
    const int64_t tiles = copies ? options.sms : fwd_sm90_order(p, tile).total;
    return {hybrid           ? "decode, sm90/fwd"
            : copies         ? "sm90/fwd, copying"
            : options.copied ? "widen, sm90/fwd"
                             : "sm90/fwd",
            tile.m,
            tile.n,
            tile_dim,
            warps,
            1,
            std::min(options.sms, tiles)};
  }
  const bool general =
      options.general || options.bias || options.dropout_rate > 0 || fwd_sm80_quantized(p);
  const FwdTile tile = fwd_sm80_tile(tile_dim, dtype, general);
  return {hybrid           ? "decode, sm80/fwd"
          : options.copied ? "widen, sm80/fwd"
                           : "sm80/fwd",
          tile.m,
          tile.n,
          tile_dim,
          tile.warps,
          1,
          fwd_sm80_grid(p, tile).blocks};
}

}  // namespace jax_fa
