// From a dtype that is known when a call runs to one that is known when it is compiled.
#pragma once

#include "params.h"

namespace jax_fa {

// Returns launch.operator()<kDType>() for the one of kDTypes that `dtype` is.
template <DType... kDTypes, typename Launch>
cudaError_t with_dtype(DType dtype, Launch launch) {
  cudaError_t status = cudaErrorInvalidValue;
  const auto run = [&]<DType kDType>() { status = launch.template operator()<kDType>(); };
  ((dtype == kDTypes && (run.template operator()<kDTypes>(), true)) || ...);
  return status;
}

template <typename Launch>
cudaError_t with_16_bits(DType dtype, Launch launch) {
  return with_dtype<DType::kF16, DType::kBF16>(dtype, launch);
}

template <typename Launch>
cudaError_t with_float(DType dtype, Launch launch) {
  return with_dtype<DType::kF16, DType::kBF16, DType::kF32>(dtype, launch);
}

}  // namespace jax_fa
