// Appends new keys and values to a cache in place: finds each token's row or page, turns the keys
// by their position, and casts or quantizes both.
//
// Two kernels, grid (tokens, k and v). `append_vectors` holds eight neighbours of a head's row in a
// lane and passes what rotary and scales need through shuffles. `append_any` stages a row in shared
// memory, for what does not fall on eights: odd groups and rotary dims, a scale for all heads, dims
// past 256.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <algorithm>
#include <bit>
#include <cfloat>

#include "params.h"
#include "ptx.cuh"

namespace jax_fa::append {
namespace {

constexpr int kWarps = 4;
constexpr int kVector = 4;      // of append_any: elements that a lane moves at once
constexpr int kLaneDims = 8;    // of append_vectors: elements that a lane holds
constexpr int kMaxTokens = 32;  // of append_vectors: tokens of a block

// What differs between k and v.
struct Target {
  const void* fresh;  // [total_new, heads_kv, dim]
  void* cache;        // [rows, tokens, heads_kv, dim]
  float* scale;       // [rows, heads_kv, tokens, groups], by strides
  int64_t scale_row_stride, scale_head_stride, scale_token_stride;
  int dim, groups;
  DType dtype;

  static Target keys(const AppendParams& p) {
    return {p.k_new,
            p.k,
            p.k_scale,
            p.k_scale_row_stride,
            p.k_scale_head_stride,
            p.k_scale_token_stride,
            p.k_dim,
            p.k_groups,
            p.k_dtype};
  }
  static Target values(const AppendParams& p) {
    return {p.v_new,
            p.v,
            p.v_scale,
            p.v_scale_row_stride,
            p.v_scale_head_stride,
            p.v_scale_token_stride,
            p.v_dim,
            p.v_groups,
            p.v_dtype};
  }

  // one scale for all heads of a token, to be found here
  __host__ __device__ bool token_scale(const AppendParams& p) const {
    return groups > 0 && !p.scale_given && p.heads_kv > 1 && scale_head_stride == 0;
  }

  // whether append_vectors takes it; `rotary` is the number of dims that turn
  __host__ bool in_vectors(const AppendParams& p, int rotary) const {
    const int group = dim / std::max(groups, 1);
    return dim % kLaneDims == 0 && dim <= 32 * kLaneDims && !token_scale(p) &&
           rotary % (p.interleaved ? kLaneDims : 2 * kLaneDims) == 0 &&
           (group == dim || (group % kLaneDims == 0 && std::has_single_bit(unsigned(group))));
  }
};

struct Targets {
  Target x[2];  // k, v
};

// Where a new token comes from and goes to.
struct Slot {
  int position;        // in its row
  int64_t row, token;  // of the cache
  bool valid;
};

// The last row that starts at or before `token`. Rows without tokens may start anywhere.
__device__ int row_of(const AppendParams& p, int token) {
  int lo = 0, hi = p.batch;
  while (hi - lo > 1) {
    const int middle = (lo + hi) / 2;
    (p.new_start[middle] <= token ? lo : hi) = middle;
  }
  while (lo > 0 && p.counts && p.counts[lo] == 0) --lo;
  return lo;
}

__device__ Slot find_slot(const AppendParams& p, int token) {
  const int b = p.new_start ? row_of(p, token) : token / p.len_new;
  const int i = token - (p.new_start ? p.new_start[b] : b * p.len_new);
  const int count = p.counts ? p.counts[b] : p.len_new;
  const int length = p.lengths ? p.lengths[b] : 0;
  Slot slot = {length + i, 0, 0, false};
  if (i < 0 || i >= count || slot.position < 0 || slot.position >= p.capacity) return slot;

  const KvIndex& index = p.index;
  int row = index.rows ? index.rows[b] : b;
  slot.token = slot.position + (index.start ? index.start[b] : 0);
  if (index.page_table) {
    const int page = slot.position / index.page_size;
    if (page >= index.max_pages) return slot;
    row = index.page_table[int64_t(b) * index.max_pages + page];
    slot.token = slot.position % index.page_size;
  }
  slot.valid = row >= 0 && row < p.row_limit;  // within the layer: no other layer is touched
  const int layer = index.layer ? index.layer[index.layers == 1 ? 0 : b] : 0;
  slot.row = row + int64_t(layer) * index.layer_stride;
  return slot;
}

template <typename T, int kSize>
struct alignas(std::min<size_t>(sizeof(T) * kSize, 16)) Vector {
  T x[kSize];
};

template <typename To>
__device__ To cast(float x) {
  return To(x);  // rounds to nearest, ties to even
}
template <>
__device__ int8_t cast<int8_t>(float x) {
  return int8_t(min(max(__float2int_rn(x), -127), 127));  // NaN becomes 0
}
template <>
__device__ __nv_fp8_e4m3 cast<__nv_fp8_e4m3>(float x) {
  __nv_fp8_e4m3 y;
  y.__x = __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
  return y;
}
template <>
__device__ __nv_fp8_e5m2 cast<__nv_fp8_e5m2>(float x) {
  __nv_fp8_e5m2 y;
  y.__x = __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E5M2);
  return y;
}

// Scale of a number that becomes the format's largest. `jax_fa.quantize` multiplies by the same
// float32 constants, because XLA turns a division by a constant into a product.
__device__ float inverse_largest(DType dtype) {
  return dtype == DType::kInt8   ? float(1.0 / 127)
         : dtype == DType::kE4M3 ? float(1.0 / 448)
                                 : float(1.0 / 57344);
}

// One head's row of a new token, in float32 and rounded to T, in the warp's shared memory.
template <typename T>
__device__ void stage(float* sRow, const AppendParams& p, const Target& x, int token, int position,
                      int head, bool rotate) {
  const int lane = threadIdx.x % 32;
  const T* const row =
      static_cast<const T*>(x.fresh) + (int64_t(token) * p.heads_kv + head) * x.dim;
  __syncwarp();  // the previous head's row has been read
#pragma unroll 1
  for (int d = lane * kVector; d < x.dim; d += 32 * kVector) {
    const auto v = *reinterpret_cast<const Vector<T, kVector>*>(row + d);
#pragma unroll
    for (int i = 0; i < kVector; ++i) sRow[d + i] = float(v.x[i]);
  }
  __syncwarp();  // the row is there
  if (!rotate) return;

  const int pairs = p.rotary_dim / 2;
  const int64_t angles = int64_t(min(position, p.max_position - 1)) * pairs;
#pragma unroll 1
  for (int i = lane; i < pairs; i += 32) {
    float& a = sRow[p.interleaved ? 2 * i : i];
    float& b = sRow[p.interleaved ? 2 * i + 1 : i + pairs];
    const float cos = p.cos[angles + i], sin = p.sin[angles + i], a0 = a, b0 = b;
    // not contracted, so that the result is that of separate operations everywhere
    a = float(T(__fsub_rn(__fmul_rn(a0, cos), __fmul_rn(b0, sin))));
    b = float(T(__fadd_rn(__fmul_rn(b0, cos), __fmul_rn(a0, sin))));
  }
  __syncwarp();  // the turned row is there
}

// max |x|, as bits: these order like the values, and NaN above all.
__device__ uint32_t amax_bits(const float* sRow, int size) {
  uint32_t most = 0;
#pragma unroll 1
  for (int d = threadIdx.x % 32; d < size; d += 32) {
    most = max(most, __float_as_uint(fabsf(sRow[d])));
  }
  return __reduce_max_sync(~0u, most);
}

template <typename To, int kSize>
__device__ void write(const float* sGroup, To* dst, int size, float scale) {
#pragma unroll 1  // rarely twice
  for (int d = threadIdx.x % 32 * kSize; d < size; d += 32 * kSize) {
    Vector<To, kSize> v;
#pragma unroll
    for (int i = 0; i < kSize; ++i) v.x[i] = cast<To>(ptx::div_full(sGroup[d + i], scale));
    *reinterpret_cast<Vector<To, kSize>*>(dst + d) = v;
  }
}

template <typename To>
__device__ void write(const float* sGroup, void* cache, int64_t offset, int size, float scale) {
  To* const dst = static_cast<To*>(cache) + offset;
  size % kVector == 0 ? write<To, kVector>(sGroup, dst, size, scale)
                      : write<To, 1>(sGroup, dst, size, scale);
}

__device__ void write(DType dtype, const float* sGroup, void* cache, int64_t offset, int size,
                      float scale) {
  switch (dtype) {
    case DType::kF16:
      return write<__half>(sGroup, cache, offset, size, scale);
    case DType::kBF16:
      return write<__nv_bfloat16>(sGroup, cache, offset, size, scale);
    case DType::kF32:
      return write<float>(sGroup, cache, offset, size, scale);
    case DType::kInt8:
      return write<int8_t>(sGroup, cache, offset, size, scale);
    case DType::kE4M3:
      return write<__nv_fp8_e4m3>(sGroup, cache, offset, size, scale);
    case DType::kE5M2:
      return write<__nv_fp8_e5m2>(sGroup, cache, offset, size, scale);
  }
}

// Eight neighbours of a row, in float32 and rounded to T, turned by their position. Rows are of
// `lanes` lanes, all of which call.
template <typename T>
__device__ void turn(Vector<float, kLaneDims>& x, const AppendParams& p, int position, int lane) {
  const int pairs = p.rotary_dim / 2;
  const int64_t angles = int64_t(min(position, p.max_position - 1)) * pairs;
  // not contracted, so that the result is that of separate operations everywhere
  if (p.interleaved) {
    if (lane >= p.rotary_dim / kLaneDims) return;
    using Angles = Vector<float, kLaneDims / 2>;
    const int64_t at = angles + lane * (kLaneDims / 2);
    const auto cos = *reinterpret_cast<const Angles*>(p.cos + at);
    const auto sin = *reinterpret_cast<const Angles*>(p.sin + at);
#pragma unroll
    for (int i = 0; i < kLaneDims / 2; ++i) {
      const float a = x.x[2 * i], b = x.x[2 * i + 1];
      x.x[2 * i] = float(T(__fsub_rn(__fmul_rn(a, cos.x[i]), __fmul_rn(b, sin.x[i]))));
      x.x[2 * i + 1] = float(T(__fadd_rn(__fmul_rn(b, cos.x[i]), __fmul_rn(a, sin.x[i]))));
    }
    return;
  }

  const int half = pairs / kLaneDims;  // lanes of it
  const bool second = lane >= half;
  Vector<float, kLaneDims> other;
#pragma unroll
  for (int i = 0; i < kLaneDims; ++i) {
    other.x[i] = __shfl_sync(~0u, x.x[i], threadIdx.x % 32 + (second ? -half : half));
  }
  if (lane >= 2 * half) return;
  const int64_t at = angles + (second ? lane - half : lane) * kLaneDims;
  const auto cos = *reinterpret_cast<const Vector<float, kLaneDims>*>(p.cos + at);
  const auto sin = *reinterpret_cast<const Vector<float, kLaneDims>*>(p.sin + at);
#pragma unroll
  for (int i = 0; i < kLaneDims; ++i) {
    const float own = __fmul_rn(x.x[i], cos.x[i]), others = __fmul_rn(other.x[i], sin.x[i]);
    x.x[i] = float(T(second ? __fadd_rn(own, others) : __fsub_rn(own, others)));
  }
}

template <typename To>
__device__ void write_vector(const Vector<float, kLaneDims>& x, void* cache, int64_t offset) {
  Vector<To, kLaneDims> v;
#pragma unroll
  for (int i = 0; i < kLaneDims; ++i) v.x[i] = cast<To>(x.x[i]);
  *reinterpret_cast<Vector<To, kLaneDims>*>(static_cast<To*>(cache) + offset) = v;
}

__device__ void write_vector(DType dtype, const Vector<float, kLaneDims>& x, void* cache,
                             int64_t offset) {
  switch (dtype) {
    case DType::kF16:
      return write_vector<__half>(x, cache, offset);
    case DType::kBF16:
      return write_vector<__nv_bfloat16>(x, cache, offset);
    case DType::kF32:
      return write_vector<float>(x, cache, offset);
    case DType::kInt8:
      return write_vector<int8_t>(x, cache, offset);
    case DType::kE4M3:
      return write_vector<__nv_fp8_e4m3>(x, cache, offset);
    case DType::kE5M2:
      return write_vector<__nv_fp8_e5m2>(x, cache, offset);
  }
}

// A block owns `tokens` tokens of one tensor. A row is a head of a token.
template <typename T>
__global__ void __launch_bounds__(kWarps * 32)
    append_vectors(const __grid_constant__ AppendParams p, const __grid_constant__ Targets targets,
                   int tokens) {
  __shared__ Slot sSlots[kMaxTokens];
  const bool rotate = blockIdx.y == 0 && p.cos;
  const Target& x = targets.x[blockIdx.y];
  const int first = blockIdx.x * tokens;
  const int rows = min(tokens, p.total_new - first) * p.heads_kv;

  // lanes of a row and of a group, powers of two; the last ones may have no elements
  const int lanes = 1 << (32 - __clz(x.dim / kLaneDims - 1));
  const int size = x.dim / max(x.groups, 1);
  const int group_lanes = x.groups > 1 ? size / kLaneDims : lanes;
  const int lane = threadIdx.x % lanes, step = kWarps * 32 / lanes;
  const int d = lane * kLaneDims, g = d / size;
  const T* const fresh = static_cast<const T*>(x.fresh) + int64_t(first) * p.heads_kv * x.dim + d;

  int row = threadIdx.x / lanes;
  const auto load = [&](int row) {
    Vector<T, kLaneDims> v = {};
    if (row < rows && d < x.dim) {
      v = *reinterpret_cast<const Vector<T, kLaneDims>*>(fresh + int64_t(row) * x.dim);
    }
    return v;
  };
  auto next = load(row);  // while the slots are found
  if (threadIdx.x * p.heads_kv < rows) sSlots[threadIdx.x] = find_slot(p, first + threadIdx.x);
  __syncthreads();  // the slots are there

  const int64_t row_tokens = p.index.page_table ? p.index.page_size : p.capacity;
  // the same number of turns for all lanes of a warp: they shuffle
  for (int turns = (rows + step - 1) / step; turns > 0; --turns, row += step) {
    Vector<float, kLaneDims> v;
#pragma unroll
    for (int i = 0; i < kLaneDims; ++i) v.x[i] = float(next.x[i]);
    next = load(row + step);

    const int token = min(row, rows - 1) / p.heads_kv, head = row - token * p.heads_kv;
    const Slot slot = sSlots[token];
    const bool mine = row < rows && d < x.dim && slot.valid;
    if (rotate) turn<T>(v, p, max(slot.position, 0), lane);
    if (x.groups > 0) {
      float* const gScale = x.scale + slot.row * x.scale_row_stride + head * x.scale_head_stride +
                            slot.token * x.scale_token_stride + g;
      float scale = 1.f;
      if (p.scale_given) {
        if (mine) scale = *gScale;
      } else {
        uint32_t amax = 0;
#pragma unroll
        for (int i = 0; i < kLaneDims; ++i) amax = max(amax, __float_as_uint(fabsf(v.x[i])));
        for (int i = group_lanes / 2; i > 0; i /= 2)
          amax = max(amax, __shfl_xor_sync(~0u, amax, i));
        scale = __uint_as_float(amax) * inverse_largest(x.dtype);
        if (scale < FLT_MIN) scale = 1.f;  // the values round to 0
        if (mine && d % size == 0) *gScale = scale;
      }
#pragma unroll
      for (int i = 0; i < kLaneDims; ++i) v.x[i] = ptx::div_full(v.x[i], scale);
    }
    // caches are contiguous; a row of theirs has a page's or the capacity's tokens
    const int64_t at = ((slot.row * row_tokens + slot.token) * p.heads_kv + head) * x.dim + d;
    if (mine) write_vector(x.dtype, v, x.cache, at);
  }
}

// A block owns one token of one tensor; its warps take the heads in turn.
template <typename T>
__global__ void __launch_bounds__(kWarps * 32)
    append_any(const __grid_constant__ AppendParams p, const __grid_constant__ Targets targets,
               int dim) {
  extern __shared__ float sRows[];  // [kWarps][dim]
  __shared__ uint32_t sAmax[kWarps];
  const int token = blockIdx.x, warp = threadIdx.x / 32;
  const bool is_key = blockIdx.y == 0, rotate = is_key && p.cos;
  const Target& x = targets.x[blockIdx.y];
  float* const sRow = sRows + warp * dim;

  const Slot slot = find_slot(p, token);
  if (!slot.valid) return;

  uint32_t amax_token = 0;  // over all heads
  if (x.token_scale(p)) {
    for (int head = warp; head < p.heads_kv; head += kWarps) {
      stage<T>(sRow, p, x, token, slot.position, head, rotate);
      amax_token = max(amax_token, amax_bits(sRow, x.dim));
    }
    sAmax[warp] = amax_token;
    __syncthreads();  // all warps' maxima are there
    for (int w = 0; w < kWarps; ++w) amax_token = max(amax_token, sAmax[w]);
  }

  for (int head = warp; head < p.heads_kv; head += kWarps) {
    stage<T>(sRow, p, x, token, slot.position, head, rotate);
    // caches are contiguous; `tokens` of a row is the page or the capacity
    const int64_t tokens = p.index.page_table ? p.index.page_size : p.capacity;
    const int64_t out = ((slot.row * tokens + slot.token) * p.heads_kv + head) * x.dim;
    const int groups = max(x.groups, 1), size = x.dim / groups;
#pragma unroll 1
    for (int g = 0; g < groups; ++g) {
      const float* const sGroup = sRow + g * size;
      float scale = 1.f;
      if (x.groups > 0) {
        float* const gScale = x.scale + slot.row * x.scale_row_stride + head * x.scale_head_stride +
                              slot.token * x.scale_token_stride + g;
        if (p.scale_given) {
          scale = *gScale;
        } else {
          const uint32_t amax = x.token_scale(p) ? amax_token : amax_bits(sGroup, size);
          scale = __uint_as_float(amax) * inverse_largest(x.dtype);
          if (scale < FLT_MIN) scale = 1.f;  // the values round to 0
          if (threadIdx.x % 32 == 0) *gScale = scale;
        }
      }
      write(x.dtype, sGroup, x.cache, out + g * size, size, scale);
    }
  }
}

}  // namespace
}  // namespace jax_fa::append

namespace jax_fa {

cudaError_t launch_append(const AppendParams& p, cudaStream_t stream) {
  using namespace append;
  const Targets targets = {Target::keys(p), Target::values(p)};
  for (const Target& x : targets.x) {
    const int groups = x.groups > 0 ? x.groups : 1;
    if (x.dim % kVector != 0 || x.dim % groups != 0) return cudaErrorInvalidValue;
    if (x.token_scale(p) && groups > 1) return cudaErrorInvalidValue;
  }
  if (p.cos && (p.rotary_dim > p.k_dim || p.rotary_dim % 2 != 0)) return cudaErrorInvalidValue;
  if (p.total_new == 0 || p.heads_kv == 0) return cudaSuccess;

  const bool vectors =
      targets.x[0].in_vectors(p, p.cos ? p.rotary_dim : 0) && targets.x[1].in_vectors(p, 0);
  // a token a block until they are thousands, which hides the search for slots in fewer blocks
  const int tokens = std::clamp(p.total_new / 2048, 1, kMaxTokens);
  const int dim = std::max(p.k_dim, p.v_dim);
  const auto run = [&]<typename T>() {
    if (vectors) {
      const dim3 grid((p.total_new + tokens - 1) / tokens, 2);
      append_vectors<T><<<grid, kWarps * 32, 0, stream>>>(p, targets, tokens);
    } else {
      const size_t smem = size_t(kWarps) * dim * sizeof(float);
      append_any<T><<<dim3(p.total_new, 2), kWarps * 32, smem, stream>>>(p, targets, dim);
    }
    return cudaGetLastError();
  };
  switch (p.dtype) {
    case DType::kF16:
      return run.template operator()<__half>();
    case DType::kBF16:
      return run.template operator()<__nv_bfloat16>();
    case DType::kF32:
      return run.template operator()<float>();
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace jax_fa
