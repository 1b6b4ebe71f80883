// One inline function per PTX instruction, and no logic: everything here runs on sm_80 and later.
#pragma once

#include <cstdint>

namespace jax_fa::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies 16 bytes from global to shared memory, past L1. Only the first `bytes` (0 to 16) are read,
// the rest become zero: with 0 the source is not touched.
__device__ __forceinline__ void cp_async_16(uint32_t dst, const void* src, int bytes) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(dst), "l"(src),
               "r"(bytes)
               : "memory");
}

// The same of what is read once: it leaves L2 first.
__device__ __forceinline__ void cp_async_16_once(uint32_t dst, const void* src, int bytes) {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile(
      "cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(dst),
      "l"(src), "r"(bytes), "l"(policy)
      : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;"); }

// Waits until at most kPending of this thread's committed groups are still in flight.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Waits for all copies that this thread has started.
__device__ __forceinline__ void cp_async_wait_all() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

// Asks for the line at an address to be brought to L2.
__device__ __forceinline__ void prefetch_l2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// Four 8x8 matrices of 16-bit elements. Lane l gives the 16-byte row l % 8 of matrix l / 8 and
// receives of matrix i, in x[i], row l / 4, columns 2 * (l % 4) and one more.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&x)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}

// As ldmatrix_x4, each matrix transposed: lane l receives column l / 4, rows 2 * (l % 4) and one
// more.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&x)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}

// Transposes an 8x8 matrix of 16-bit elements that lies in a warp as ldmatrix leaves it.
__device__ __forceinline__ uint32_t movmatrix_trans(uint32_t x) {
  uint32_t y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// Byte i is byte s = selector >> 4 * i & 7 of x, or eight copies of its sign bit if s + 8 is said.
__device__ __forceinline__ uint32_t permute(uint32_t x, uint32_t selector) {
  uint32_t y;
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(y) : "r"(x), "r"(selector));
  return y;
}

// Ones in each half of x whose magnitude as float16 is not less than that of `least`, or NaN: as
// integers of 15 bits, the sign aside, it is not less, unless `least` is NaN.
__device__ __forceinline__ uint32_t not_below_f16x2(uint32_t x, uint32_t least) {
  uint32_t y;
  asm("{\n.reg .b32 magnitude;\nabs.f16x2 magnitude, %1;\nset.geu.u32.f16x2 %0, magnitude, %2;\n}"
      : "=r"(y)
      : "r"(x), "r"(least));
  return y;
}

// Of a warp's 8 x 8 elements of 16 bits, two adjacent ones of row lane / 4 in each lane.
__device__ __forceinline__ uint32_t transpose(uint32_t x) {
  uint32_t y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// d[16, 8] += a[16, 16] b[16, 8]. With g = lane / 4 and t = lane % 4: d = rows g, g, g + 8, g + 8,
// columns 2t, 2t + 1, 2t, 2t + 1; a = rows g, g + 8, g, g + 8, columns 2t and 2t + 1 (+ 8 in the
// last two); b = column g, rows 2t and 2t + 1 (+ 8 in b1).
__device__ __forceinline__ void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                        uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d[16, 8] += a[16, 8] b[8, 8]: d as above; a = rows g, g + 8, g, g + 8, column t (+ 4 in the last
// two); b = column g, row t (+ 4 in b1). The operands must hold tf32: see tf32().
__device__ __forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Rounds to tf32, nearest with ties away from zero; the product alone would truncate.
__device__ __forceinline__ uint32_t tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

// Two floats to a pair of 16-bit floats, `lo` in the low half.
__device__ __forceinline__ uint32_t pack_f16(float lo, float hi) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
  return y;
}

__device__ __forceinline__ uint32_t pack_bf16(float lo, float hi) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
  return y;
}

// The larger one, NaN if one is.
__device__ __forceinline__ float max_nan(float x, float y) {
  float z;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}

// 2^x, relative error 2^-22; exp2(-inf) = 0, subnormal results flush to zero.
__device__ __forceinline__ float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// log2 x, absolute error 2^-22; log2(0) = -inf.
__device__ __forceinline__ float log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x, relative error 2^-23; rcp(inf) = 0.
__device__ __forceinline__ float rcp(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// As cp_async_16, for 8 or 4 bytes, through L1.
__device__ __forceinline__ void cp_async_8(uint32_t dst, const void* src, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(dst), "l"(src), "r"(bytes)
               : "memory");
}

// Scales of adjacent tiles are adjacent too: decoding 128 rows of 2048 int8 keys of 32 heads takes
// 529 us without the hint, 523 with it (H200).
__device__ __forceinline__ void cp_async_4(uint32_t dst, const void* src, int bytes) {
  asm volatile("cp.async.ca.shared.global.L2::128B [%0], [%1], 4, %2;" ::"r"(dst), "l"(src),
               "r"(bytes)
               : "memory");
}

// Two e4m3 to two halves, exact; the low byte goes to the low half. sm_89 and later.
__device__ __forceinline__ uint32_t widen_e4m3(uint16_t x) {
  uint32_t y;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(y) : "h"(x));
  return y;
}

// The next grid of the stream, if launched with programmatic serialization, may start once all
// blocks of this one have said so or ended; it waits below until this one's writes are visible.
// Before sm_90 grids wait for their turn as a whole.
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_for_previous_grid() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// A load that is issued where it stands, however late its result is needed, if that goes through
// settle(): what is computed from x comes after what stands before.
__device__ __forceinline__ int load_early(const int* address) {
  int x;
  asm volatile("ld.global.nc.s32 %0, [%1];" : "=r"(x) : "l"(address));
  return x;
}

__device__ __forceinline__ void settle(int& x) { asm volatile("" : "+r"(x)); }
__device__ __forceinline__ void settle(const char*& x) { asm volatile("" : "+l"(x)); }

// x / y within 2 ulp: what XLA compiles a float32 division to on NVIDIA GPUs.
__device__ __forceinline__ float div_full(float x, float y) {
  float quotient;
  asm("div.full.f32 %0, %1, %2;" : "=f"(quotient) : "f"(x), "f"(y));
  return quotient;
}

// A hardware barrier of the block: ends when `threads` have come, whether to wait or not.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Adds to global memory without waiting for it; the order of several such additions is open.
__device__ __forceinline__ void red_add(float* address, float x) {
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(address), "f"(x) : "memory");
}

// The same for 16 aligned bytes. sm_90 and later.
__device__ __forceinline__ void red_add_v4(float* address, const float (&x)[4]) {
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(address), "f"(x[0]), "f"(x[1]),
               "f"(x[2]), "f"(x[3])
               : "memory");
}

__device__ __forceinline__ void load_shared_v4(uint32_t (&x)[4], uint32_t address) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ uint2 load_shared_v2(uint32_t address) {
  uint2 x;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "r"(address) : "memory");
  return x;
}

__device__ __forceinline__ void store_shared(uint32_t address, uint32_t x) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}

__device__ __forceinline__ void store_shared_v4(uint32_t address, const uint32_t (&x)[4]) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x[0]), "r"(x[1]),
               "r"(x[2]), "r"(x[3])
               : "memory");
}

}  // namespace jax_fa::ptx
