// Philox4x32-7, random numbers from counters (Salmon et al. 2011; the fewest rounds that pass
// BigCrush). Compiles for the host too.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace jax_fa {

// Turns each counter into what it draws. All go round by round, as a product takes its time.
template <int kRounds = 7, int kCount>
__host__ __device__ inline void philox(uint4 (&counters)[kCount], uint2 key) {
  for (uint4& x : counters) {
    const uint64_t a = uint64_t(x.x) * 0xD2511F53, b = uint64_t(x.z) * 0xCD9E8D57;
    x = {uint32_t(b >> 32) ^ x.y ^ key.x, uint32_t(b), uint32_t(a >> 32) ^ x.w ^ key.y,
         uint32_t(a)};
  }
  const uint2 next = {key.x + 0x9E3779B9, key.y + 0xBB67AE85};
  if constexpr (kRounds > 1) philox<kRounds - 1>(counters, next);
}

}  // namespace jax_fa
