// Warpgroup products: d[64, N] (+)= a[64, 16] b[16, N] with float32 sums, b from shared memory.
//
// A tile in shared memory is made of panels: all its rows, kPanel adjacent elements of each, 64
// (128 bytes) or 32, in the swizzle of that width, as bulk copies leave it. One descriptor names a
// panel's place; a product of 16 elements along the rows starts 32 bytes further on for each step,
// one of 16 rows starts 16 rows further on, and reaches over all panels. Groups of eight rows may
// lie further apart.
#pragma once

#include "../params.h"
#include "ptx.cuh"

namespace jax_fa {

// Operand `a` or `b` whose rows are contiguous along the summed axis (Q, K), or, with `next_panel`
// bytes from panel to panel, operand `b` whose rows run along it (V). In a cluster addresses name
// the block too, past the bits that a descriptor has for them.
template <int kPanel, bool kInCluster = false>
__device__ __forceinline__ uint64_t panel_descriptor(const void* panel, uint32_t next_panel = 16,
                                                     uint32_t next_group = 8 * kPanel * 2) {
  constexpr uint64_t kSwizzle = kPanel == 64 ? 1 : 2;  // of 128 or 64 bytes
  static_assert(kPanel == 64 || kPanel == 32);
  const uint64_t address = (ptx::shared_address(panel) & (kInCluster ? 0x3ffff : ~0u)) >> 4;
  return address | uint64_t(next_panel >> 4) << 16 | uint64_t(next_group >> 4) << 32 |
         kSwizzle << 62;
}

// That of a place `by` further on, in 16 bytes. No place is past what its low half can name.
__device__ __forceinline__ uint64_t advanced(uint64_t descriptor, uint32_t by) {
  return (descriptor & ~uint64_t(~0u)) | (uint32_t(descriptor) + by);
}

// Registers of a product are written behind the compiler's back until they are waited for. A pin
// before each group of products and after each wait keeps their other uses on the right side;
// without it ptxas serializes the products (C7519, C7520).
__device__ __forceinline__ void pin(float& x) { asm volatile("" : "+f"(x)::"memory"); }
__device__ __forceinline__ void pin(uint32_t& x) { asm volatile("" : "+r"(x)::"memory"); }
__device__ __forceinline__ void pin(uint64_t& x) { asm volatile("" : "+l"(x)::"memory"); }

template <class T, int kCount>
__device__ __forceinline__ void pin(T (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) pin(x[i]);
}

// ss: d = a b, or d += a b, with a from shared memory (kTransposed: of a^T b^T); rs: d += a b^T
// with a from registers. d[4 * i + e] is element e (as in ptx::mma_f16) of columns 8 * i onwards; a
// as in ptx::mma_f16, of 16 rows for each warp.
template <DType kDType, int kN>
struct Wgmma;

#define JAX_FA_TEN(t)                                                                              \
  "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t \
  "9"
#define JAX_FA_D8(i)                                                                          \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define JAX_FA_D32(i) JAX_FA_D8(i), JAX_FA_D8(i + 8), JAX_FA_D8(i + 16), JAX_FA_D8(i + 24)

#define JAX_FA_WGMMA_OF(kDType, type, n, list, outputs, i0, i1, i2, i3, i4)                        \
  template <>                                                                                      \
  struct Wgmma<kDType, n> {                                                                        \
    template <int kTransposed = 0>                                                                 \
    __device__ __forceinline__ static void ss(float (&d)[n / 2], uint64_t a, uint64_t b,           \
                                              int accumulate) {                                    \
      asm volatile("{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %" #i2                      \
                   ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" list \
                   "}, %" #i0 ", %" #i1 ", accumulate, 1, 1, %" #i3 ", %" #i3 ";\n}\n"             \
                   : outputs                                                                       \
                   : "l"(a), "l"(b), "r"(accumulate), "n"(kTransposed));                           \
    }                                                                                              \
    __device__ __forceinline__ static void rs(float (&d)[n / 2], const uint32_t* a, uint64_t b) {  \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" list       \
                   "}, {%" #i0 ", %" #i1 ", %" #i2 ", %" #i3 "}, %" #i4 ", 1, 1, 1, 1;\n"          \
                   : outputs                                                                       \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                          \
    }                                                                                              \
  };
// n columns, the list of registers of d, the operands that hold them, and the five numbers that
// follow theirs.
#define JAX_FA_WGMMA(n, list, outputs, ...)                                      \
  JAX_FA_WGMMA_OF(DType::kF16, "f16", n, list, JAX_FA_LIST outputs, __VA_ARGS__) \
  JAX_FA_WGMMA_OF(DType::kBF16, "bf16", n, list, JAX_FA_LIST outputs, __VA_ARGS__)
#define JAX_FA_LIST(...) __VA_ARGS__

#define JAX_FA_R40 JAX_FA_TEN() ", " JAX_FA_TEN(1) ", " JAX_FA_TEN(2) ", " JAX_FA_TEN(3)
#define JAX_FA_R80 \
  JAX_FA_R40 ", " JAX_FA_TEN(4) ", " JAX_FA_TEN(5) ", " JAX_FA_TEN(6) ", " JAX_FA_TEN(7)
#define JAX_FA_R120 \
  JAX_FA_R80 ", " JAX_FA_TEN(8) ", " JAX_FA_TEN(9) ", " JAX_FA_TEN(10) ", " JAX_FA_TEN(11)

JAX_FA_WGMMA(64, JAX_FA_TEN() ", " JAX_FA_TEN(1) ", " JAX_FA_TEN(2) ", %30, %31", (JAX_FA_D32(0)),
             32, 33, 34, 35, 36)
JAX_FA_WGMMA(80, JAX_FA_R40, (JAX_FA_D32(0), JAX_FA_D8(32)), 40, 41, 42, 43, 44)
JAX_FA_WGMMA(96, JAX_FA_R40 ", %40, %41, %42, %43, %44, %45, %46, %47",
             (JAX_FA_D32(0), JAX_FA_D8(32), JAX_FA_D8(40)), 48, 49, 50, 51, 52)
JAX_FA_WGMMA(112, JAX_FA_R40 ", " JAX_FA_TEN(4) ", %50, %51, %52, %53, %54, %55",
             (JAX_FA_D32(0), JAX_FA_D8(32), JAX_FA_D8(40), JAX_FA_D8(48)), 56, 57, 58, 59, 60)
JAX_FA_WGMMA(128, JAX_FA_R40 ", " JAX_FA_TEN(4) ", " JAX_FA_TEN(5) ", %60, %61, %62, %63",
             (JAX_FA_D32(0), JAX_FA_D32(32)), 64, 65, 66, 67, 68)
JAX_FA_WGMMA(160, JAX_FA_R80, (JAX_FA_D32(0), JAX_FA_D32(32), JAX_FA_D8(64), JAX_FA_D8(72)), 80, 81,
             82, 83, 84)
JAX_FA_WGMMA(192, JAX_FA_R80 ", " JAX_FA_TEN(8) ", %90, %91, %92, %93, %94, %95",
             (JAX_FA_D32(0), JAX_FA_D32(32), JAX_FA_D32(64)), 96, 97, 98, 99, 100)
JAX_FA_WGMMA(256, JAX_FA_R120 ", %120, %121, %122, %123, %124, %125, %126, %127",
             (JAX_FA_D32(0), JAX_FA_D32(32), JAX_FA_D32(64), JAX_FA_D32(96)), 128, 129, 130, 131,
             132)

// d = a b^T or d += a b^T, a of e4m3 and b of that or of e5m2: d[64, 128], a[64, 32], b[128, 32],
// both in panels of 128 bytes, 32 of which are a step.
template <DType kDTypeB>
__device__ __forceinline__ void wgmma_e4m3(float (&d)[64], uint64_t a, uint64_t b, int accumulate) {
#define JAX_FA_WGMMA_E4M3(type)                                                                 \
  asm volatile(                                                                                 \
      "{\n.reg .pred accumulate;\nsetp.ne.b32 accumulate, %66, 0;\n"                            \
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3." type " {" JAX_FA_R40 ", " JAX_FA_TEN( \
          4) ", " JAX_FA_TEN(5) ", %60, %61, %62, %63}, %64, %65, accumulate, 1, 1;\n}\n"       \
      : JAX_FA_D32(0), JAX_FA_D32(32)                                                           \
      : "l"(a), "l"(b), "r"(accumulate))
  if constexpr (kDTypeB == DType::kE4M3) {
    JAX_FA_WGMMA_E4M3("e4m3");
  } else {
    JAX_FA_WGMMA_E4M3("e5m2");
  }
}

#undef JAX_FA_R120
#undef JAX_FA_R80
#undef JAX_FA_R40
#undef JAX_FA_LIST
#undef JAX_FA_WGMMA_E4M3
#undef JAX_FA_WGMMA
#undef JAX_FA_WGMMA_OF
#undef JAX_FA_D32
#undef JAX_FA_D8
#undef JAX_FA_TEN

}  // namespace jax_fa
