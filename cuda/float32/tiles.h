// Blocks of the exact float32 kernels. Plain C++: the kernels are built from it and the planner
// explains it.
#pragma once

#include <algorithm>

#include "../params.h"

namespace jax_fa {

constexpr int kFloat32MaxDim = 256, kFloat32Warps = 8;

// The narrowest blocks that hold both head dims.
inline int float32_dim(const AttentionParams& p) {
  const int dim = std::max(p.head_dim, p.head_dim_v);
  return dim <= 64 ? 64 : dim <= 128 ? 128 : kFloat32MaxDim;
}

// Rows of a block: forward kernels hold two of them and one of scores, backward ones four and one
// of scores, in the 99 KB that every GPU has for a thread block.
constexpr int float32_forward_rows(int dim) { return dim <= 128 ? 64 : 32; }
constexpr int float32_backward_rows(int dim) { return dim <= 64 ? 64 : dim <= 128 ? 32 : 16; }

}  // namespace jax_fa
