// 8-bit keys and values on Hopper. Bulk copies bring tiles of bytes to places of their own, two
// warps of the producers the scales of their rows, and dequantizers turn each tile once into what
// products read, so that consumers do not know of it. Elements get their scales here: a product
// with its scale is rounded once, as the elements of a cache of the queries' type are.
//
// kBytes: keys go to products as they are stored, and consumers multiply scores by their scales.
// Values become halves in a unit of their tile, a power of two that consumers know: products with
// scales in that unit stay in float16's range, and few tiles of a row change it.
//
// Bytes lie row by row. At a time a quad of lanes takes the four chunks of 16 elements of a row
// that go to one panel (two lanes where panels are 32 wide), and its neighbours the next rows, for
// which `kFlips` picks the other panel where else eight lanes would read the same banks.
#pragma once

#include "../decode/fragments.cuh"
#include "block.cuh"

namespace jax_fa {

__device__ inline bool has_row_scales(const KvTensor& x) { return x.scale && x.groups <= 1; }

// Widen<to, from, scaled>: four elements of 8 bits in a word to pairs of the type of the products,
// times a factor in the form that prepare() gives it.
template <DType kDType, DType kFormat, bool kScaled>
struct Widen {
  __device__ static uint32_t prepare(float scale) { return __float_as_uint(scale); }
  __device__ static uint2 widen(uint32_t x, uint32_t factor) {
    const uint2 halves = decode::Byte<kFormat, 16>::widen(x);
    if constexpr (!kScaled && kDType == DType::kF16) return halves;
    float2 lo = decode::unpack<DType::kF16>(halves.x), hi = decode::unpack<DType::kF16>(halves.y);
    if constexpr (kScaled) {
      const float scale = __uint_as_float(factor);
      lo = {lo.x * scale, lo.y * scale};
      hi = {hi.x * scale, hi.y * scale};
    }
    return {decode::pack<kDType>(lo.x, lo.y), decode::pack<kDType>(hi.x, hi.y)};
  }
};

// int8 stays in pairs, and its factor is a sum of two of their type, the larger in the low half, so
// that only the product is rounded.
template <class Pair>
__device__ inline uint32_t multiply_split(Pair x, Pair hi, Pair lo) {
  const Pair y = __hfma2(x, hi, __hmul2(x, lo));
  return reinterpret_cast<const uint32_t&>(y);
}

// A constant in a register of its own, so that byte_perm's other operand can be an immediate: from
// a uniform register it would be moved at every use, and what no lane differs in gets one.
__device__ inline uint32_t in_register(uint32_t x) {
  uint32_t y;
  asm("{\n.reg .u32 lane;\nmov.u32 lane, %laneid;\nshr.u32 lane, lane, 5;\nadd.u32 %0, lane, "
      "%1;\n}\n"
      : "=r"(y)
      : "r"(x));
  return y;
}

// The bytes become mantissas of halves at 16: 18 + value / 64, as a scale may exceed no half nor
// lose digits where the largest element of its row does not.
template <>
struct Widen<DType::kF16, DType::kInt8, true> {
  __device__ static uint32_t prepare(float scale) {
    const float x = scale * 64.f;
    return ptx::pack_f16(x, x - __half2float(__float2half_rn(x)));
  }
  __device__ static uint2 widen(uint32_t x, uint32_t factor) {
    const uint32_t biased = x ^ 0x80808080u, upper = in_register(0x4c4c4c4cu);
    return {scale(__byte_perm(biased, upper, 0x4140), factor),
            scale(__byte_perm(biased, upper, 0x4342), factor)};
  }

 private:
  __device__ static uint32_t scale(uint32_t x, uint32_t factor) {
    const __half2 split = reinterpret_cast<const __half2&>(factor);
    return multiply_split(
        __hsub2(reinterpret_cast<const __half2&>(x), __half2half2(__ushort_as_half(0x4c80))),
        __low2half2(split), __high2half2(split));
  }
};

// The lower 7 bits become the mantissa of a number at 128, of which 128 or, where the sign is set,
// 256 is taken: the bit is the last of the exponent.
template <>
struct Widen<DType::kBF16, DType::kInt8, true> {
  __device__ static uint32_t prepare(float scale) {
    return ptx::pack_bf16(scale, scale - __bfloat162float(__float2bfloat16_rn(scale)));
  }
  __device__ static uint2 widen(uint32_t x, uint32_t factor) {
    const uint32_t upper = in_register(0x43434343u);
    return {scale(__byte_perm(x, upper, 0x4140), factor),
            scale(__byte_perm(x, upper, 0x4342), factor)};
  }

 private:
  __device__ static uint32_t scale(uint32_t x, uint32_t factor) {
    const uint32_t biased = x & 0xff7fff7fu, bias = x & 0xff80ff80u;
    const __nv_bfloat162 split = reinterpret_cast<const __nv_bfloat162&>(factor);
    return multiply_split(__hsub2(reinterpret_cast<const __nv_bfloat162&>(biased),
                                  reinterpret_cast<const __nv_bfloat162&>(bias)),
                          __low2bfloat162(split), __high2bfloat162(split));
  }
};

template <DType kDType>
__device__ uint32_t prepare_scale(DType format, float scale) {
  return format == DType::kInt8 ? Widen<kDType, DType::kInt8, true>::prepare(scale)
                                : __float_as_uint(scale);
}

// kBytes: four values of 8 bits to halves, times a factor that is there twice.
template <DType kFormat, bool kScaled>
struct WidenToHalves {
  __device__ static uint2 widen(uint32_t x, uint32_t factor) {
    const uint2 y = decode::Byte<kFormat, 16>::widen(x);
    if constexpr (!kScaled) return y;
    return {multiply(y.x, factor), multiply(y.y, factor)};
  }

 private:
  __device__ static uint32_t multiply(uint32_t x, uint32_t y) {
    const __half2 z =
        __hmul2(reinterpret_cast<const __half2&>(x), reinterpret_cast<const __half2&>(y));
    return reinterpret_cast<const uint32_t&>(z);
  }
};

// Warps 2 and 3 of the producers: scales of rows of keys, and of values.
template <class Traits>
struct ScaleLoader {
  static constexpr int kShare = Traits::kBlockN / 32;  // of a lane
  static_assert(Traits::kBlockN % 32 == 0);

  const HopperParams& params;
  HopperStorage<Traits>& shared;
  const AttentionParams& p = params.attention;
  bool values = threadIdx.x / 32 == 3;
  int lane = threadIdx.x % 32;
  Ring<Traits::kTile.byte_stages> stage = {unsigned(values && !Traits::kBytes)};
  Ring<Traits::kStages> k_ring = {};
  int unit = 0, least_unit = 0;  // kBytes: of values, as log2

  __device__ void run() {
    for (Ring<HopperStorage<Traits>::kTiles> ring;; ring.advance()) {
      ptx::barrier_wait(shared.tile_full[ring.at()], ring.parity());
      const WorkTile& tile = shared.tile(ring.at());
      if (tile.q.rows == 0) return;
      unit = 0;
      least_unit = -120;
      for (int n = tile.end - 1; n >= tile.begin; --n) load(tile, n);
      __syncwarp();  // all lanes have read the tile
      if (lane == 0) ptx::barrier_arrive(shared.tile_empty[ring.at()]);
    }
  }

 private:
  // kBytes, keys: to consumers.
  __device__ void hand_over(const float (&scales)[kShare]) {
    const int at = k_ring.at();
    ptx::barrier_wait(shared.k_empty[at], k_ring.parity() ^ 1);
    if (p.k.scale) {
#pragma unroll
      for (int i = 0; i < kShare; ++i) shared.k_scale[at][scale_place(i * 32 + lane)] = scales[i];
    }
    __syncwarp();  // all lanes' stores come before the arrival
    if (lane == 0) ptx::barrier_arrive(shared.k_full[at]);
    k_ring.advance();
  }

  // kBytes, values: to factors of halves in a unit that stays as long as it suits: with them
  // elements are below 2^16, and the largest are not all below 1. o, which changes with it, stays
  // finite.
  __device__ void change_unit(float (&scales)[kShare]) {
    int most = 0;
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      const int exponent = __float_as_int(scales[i]) >> 23 & 255;
      if (exponent < 255) most = max(most, exponent);
    }
    most = __reduce_max_sync(0xffffffff, most);
    if (most > 0) {
      const bool e5m2 = p.v.dtype == DType::kE5M2;
      const int limit = e5m2 ? -1 : p.v.dtype == DType::kInt8 ? 7 : 6, e = most - 127;
      const int least = limit - (e5m2 ? 12 : 14);  // the largest factor is a normal half
      if (e - unit > limit || e - unit < least) unit = max(e - limit + 3, least_unit);
      least_unit = max(least_unit, unit - 60);
    }
    const float inverse = power_of_two(-unit);
#pragma unroll
    for (float& x : scales) {
      x *= inverse;
      x = __uint_as_float(ptx::pack_f16(x, x));
    }
  }

  // Past the last key the scale of the last.
  __device__ void load(const WorkTile& tile, int n) {
    const int at = stage.at();
    const KvTensor& x = values ? p.v : p.k;
    float scales[kShare];
    if (has_row_scales(x)) {
      const int row = values ? tile.v_row : tile.k_row;
#pragma unroll
      for (int i = 0; i < kShare; ++i) {  // all are on the way together
        const int key = min(n * Traits::kBlockN + i * 32 + lane, tile.mask.len_kv - 1);
        const KvSlot slot = kv_slot(p.kv, tile, row, key);
        scales[i] = x.scale[scale_offset(x, slot, tile.head_kv)];
      }
    }
    if constexpr (Traits::kBytes) {
      if (!values) return hand_over(scales);
      if (x.scale) change_unit(scales);
    }
    ptx::barrier_wait(shared.bytes_empty[at], stage.parity() ^ 1);
    if (has_row_scales(x)) {
#pragma unroll
      for (int i = 0; i < kShare; ++i) {
        shared.scale[at][i * 32 + lane] = Traits::kBytes
                                              ? __float_as_uint(scales[i])
                                              : prepare_scale<Traits::kDType>(x.dtype, scales[i]);
      }
    }
    if (Traits::kBytes && lane == 0) shared.byte_unit[at] = unit;
    __syncwarp();  // all lanes' stores come before the arrival
    if (lane == 0) ptx::barrier_arrive(shared.bytes_full[at]);
    stage.advance();
    if (!Traits::kBytes) stage.advance();  // past the other warp's
  }
};

// The warpgroups after the producers: one of keys and one of values, or one of both.
template <class Traits>
struct Dequantizer {
  static constexpr DType kDType = Traits::kDType;
  static constexpr int kHeadDim = Traits::kHeadDim, kPanels = Traits::kPanels;
  static constexpr int kWarpgroups = Traits::kDequantizers;
  static constexpr int kLanes = Traits::kPanel / 16;  // that share a row: a chunk each
  static constexpr int kRowStep = 128 / kLanes;
  static constexpr int kSteps = Traits::kBlockN / kRowStep;
  static constexpr int kShare = kSteps * kPanels;  // chunks of a thread
  static constexpr int kBatch = 4;                 // that are on the way together
  static constexpr bool kFlips = kLanes == 4 && kPanels % 2 == 0;
  static_assert(Traits::kBlockN % kRowStep == 0);
  using Storage = HopperStorage<Traits>;

  const HopperParams& params;
  Storage& shared;
  const AttentionParams& p = params.attention;
  int row = threadIdx.x % 128 / kLanes, lane = threadIdx.x % kLanes;  // of the first chunk
  int flip = kFlips ? row % 2 : 0;
  int first = 0;  // of keys (0) and values (1), what this warpgroup begins with
  Ring<Traits::kTile.byte_stages> byte_ring;
  Ring<Traits::kStages> kv_ring = {};

  __device__ Dequantizer(const HopperParams& params, Storage& shared)
      : params(params), shared(shared) {
    if (kWarpgroups == 2) first = __shfl_sync(0xffffffff, threadIdx.x / 128 - 1, 0);
    byte_ring.count = first;
  }

  __device__ void run() {
    for (Ring<Storage::kTiles> ring;; ring.advance()) {
      ptx::barrier_wait(shared.tile_full[ring.at()], ring.parity());
      const WorkTile& tile = shared.tile(ring.at());
      if (tile.q.rows == 0) return;
      for (int n = tile.end - 1; n >= tile.begin; --n) {
        if constexpr (Traits::kBytes) {
          dequantize(tile, n, true);
        } else {
#pragma unroll 1
          for (int values = first; values < 2; values += kWarpgroups) dequantize(tile, n, values);
        }
        kv_ring.advance();
      }
      arrive(shared.tile_empty[ring.at()]);
    }
  }

 private:
  // A chunk of 16 elements: of the tile's row `row + step * kRowStep`, and of `panel`.
  struct Chunk {
    int i;

    __device__ int step() const { return i / kPanels; }
    __device__ int panel() const { return i % kPanels; }
  };

  __device__ int row_of(Chunk chunk) const { return row + chunk.step() * kRowStep; }
  __device__ int panel_of(Chunk chunk) const { return chunk.panel() ^ flip; }

  // Offsets within a tile of bytes, and of the `half`th 8 elements within the wide one. What is not
  // constant is the same for all even panels and for all odd ones.
  __device__ int narrow(Chunk chunk) const {
    const int odd = chunk.panel() % 2, mine = row * kHeadDim + (odd ^ flip) * Traits::kPanel;
    return mine + lane * 16 + chunk.step() * kRowStep * kHeadDim +
           (chunk.panel() - odd) * Traits::kPanel;
  }
  __device__ int wide(Chunk chunk, int half) const {
    constexpr int kRowBytes = Traits::kPanel * 2, kPanelBytes = Traits::kBlockN * kRowBytes;
    constexpr int kChunks = Traits::kPanel / 8;  // of 16 bytes, in a panel's row
    const int swizzle = row / (8 / kChunks) % kChunks, odd = chunk.panel() % 2;
    const int mine = row * kRowBytes + (odd ^ flip) * kPanelBytes;
    return mine + ((2 * lane + half) ^ swizzle) * 16 + chunk.step() * kRowStep * kRowBytes +
           (chunk.panel() - odd) * kPanelBytes;
  }

  __device__ void arrive(ptx::Barrier& barrier) const {
    __syncwarp();  // of all lanes' reads and stores
    if (threadIdx.x % 32 == 0) ptx::barrier_arrive(barrier);
  }

  // One tile of keys or of values.
  __device__ void dequantize(const WorkTile& tile, int n, bool values) {
    const int at = kv_ring.at(), bytes_at = byte_ring.at();
    const KvTensor& x = values ? p.v : p.k;
    const uint32_t sBytes = ptx::shared_address(shared.bytes[bytes_at]);
    const uint32_t sWide =
        values ? ptx::shared_address(shared.v[at]) : ptx::shared_address(shared.k[at]);
    float group_scales[kShare];
    if (!Traits::kBytes && x.groups > 1) load_group_scales(group_scales, x, tile, n, values);
    ptx::barrier_wait(shared.bytes_full[bytes_at], byte_ring.parity());
    if (values && n == tile.end - 1 && must_clear<Traits>(p, tile)) {
      clear(sBytes, tile.mask.len_kv - n * Traits::kBlockN);
    }
    ptx::barrier_wait(values ? shared.v_empty[at] : shared.k_empty[at], kv_ring.parity() ^ 1);
    const uint32_t* const sScale = shared.scale[bytes_at] + row;
    if constexpr (Traits::kBytes) {
      if (threadIdx.x % 128 == 0) shared.v_unit[at] = shared.byte_unit[bytes_at];
      widen_to_halves(x, sBytes, sWide, [&](int i) { return sScale[i / kPanels * kRowStep]; });
    } else if (x.groups > 1) {
      widen_any<true>(x.dtype, sBytes, sWide,
                      [&](int i) { return prepare_scale<kDType>(x.dtype, group_scales[i]); });
    } else if (x.scale) {
      widen_any<true>(x.dtype, sBytes, sWide,
                      [&](int i) { return sScale[i / kPanels * kRowStep]; });
    } else {
      widen_any<false>(x.dtype, sBytes, sWide, [](int) { return 0u; });
    }
    ptx::fence_async_proxy();
    arrive(values ? shared.v_full[at] : shared.k_full[at]);
    arrive(shared.bytes_empty[bytes_at]);
    byte_ring.count += kWarpgroups;
  }

  // Rows from `rows` on; who reads a chunk clears it, and 0 times the scale of a key is 0.
  __device__ void clear(uint32_t sBytes, int rows) const {
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      if (row_of({i}) >= rows) ptx::store_shared_v4(sBytes + narrow({i}), {0, 0, 0, 0});
    }
  }

  template <bool kScaled, class Scale>
  __device__ void widen_any(DType format, uint32_t sBytes, uint32_t sWide, Scale scale) const {
    if (kScaled && format == DType::kInt8) {
      widen<Widen<kDType, DType::kInt8, true>>(sBytes, sWide, scale);
    } else if (format == DType::kE4M3) {
      widen<Widen<kDType, DType::kE4M3, kScaled>>(sBytes, sWide, scale);
    } else {
      widen<Widen<kDType, DType::kE5M2, kScaled>>(sBytes, sWide, scale);
    }
  }

  template <class Scale>
  __device__ void widen_to_halves(const KvTensor& x, uint32_t sBytes, uint32_t sWide,
                                  Scale scale) const {
    if (x.dtype == DType::kInt8) {
      widen<WidenToHalves<DType::kInt8, true>>(sBytes, sWide, scale);
    } else if (x.dtype == DType::kE5M2) {
      x.scale ? widen<WidenToHalves<DType::kE5M2, true>>(sBytes, sWide, scale)
              : widen<WidenToHalves<DType::kE5M2, false>>(sBytes, sWide, [](int) { return 0u; });
    } else {
      x.scale ? widen<WidenToHalves<DType::kE4M3, true>>(sBytes, sWide, scale)
              : widen<WidenToHalves<DType::kE4M3, false>>(sBytes, sWide, [](int) { return 0u; });
    }
  }

  template <class Widen, class Scale>
  __device__ void widen(uint32_t sBytes, uint32_t sWide, Scale scale) const {
#pragma unroll
    for (int batch = 0; batch < kShare; batch += kBatch) {
      constexpr int kMost = kShare < kBatch ? kShare : kBatch;
      uint32_t bytes[kMost][4];
#pragma unroll
      for (int i = 0; i < kMost && batch + i < kShare; ++i) {
        ptx::load_shared_v4(bytes[i], sBytes + narrow({batch + i}));
      }
#pragma unroll
      for (int i = 0; i < kMost && batch + i < kShare; ++i) {
        const uint32_t factor = scale(batch + i);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint2 lo = Widen::widen(bytes[i][2 * half], factor);
          const uint2 hi = Widen::widen(bytes[i][2 * half + 1], factor);
          ptx::store_shared_v4(sWide + wide({batch + i}, half), {lo.x, lo.y, hi.x, hi.y});
        }
      }
    }
  }

  // Of the groups that hold this thread's chunks; past the last key or dim those of the last.
  __device__ void load_group_scales(float (&scales)[kShare], const KvTensor& x,
                                    const WorkTile& tile, int n, bool values) const {
    const int dim = values ? p.head_dim_v : p.head_dim, group = dim / x.groups;
    const int kv_row = values ? tile.v_row : tile.k_row;
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
      const int key = min(n * Traits::kBlockN + row_of({i}), tile.mask.len_kv - 1);
      const int first = min(panel_of({i}) * Traits::kPanel + lane * 16, dim - 1);
      const KvSlot slot = kv_slot(p.kv, tile, kv_row, key);
      scales[i] = x.scale[scale_offset(x, slot, tile.head_kv) + first / group];
    }
  }
};

}  // namespace jax_fa
