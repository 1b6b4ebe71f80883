// Launches, on GPUs that can beside the grid before them in the stream.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"
#include "ptx.cuh"

namespace jax_fa {

// At the end of every block of a launch that knows how to run beside the previous one: its first
// block makes it end no sooner.
__device__ inline void end_after_previous(const AttentionParams& p) {
  const bool first = blockIdx.x == 0 && blockIdx.y == 0 && blockIdx.z == 0;
  if (p.beside_previous && first) ptx::wait_for_previous_grid();
}

// What kernels need to share multiprocessors: the same division of their memory, as much of it
// shared as can be.
template <typename... Params>
cudaError_t make_room(void (*kernel)(Params...)) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                              cudaSharedmemCarveoutMaxShared);
}

inline cudaLaunchConfig_t launch_config(dim3 grid, int threads, int shared_bytes,
                                        cudaStream_t stream, cudaLaunchAttribute* attribute) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attribute;
  config.numAttrs = attribute ? 1 : 0;
  return config;
}

// Launches with more shared memory than is granted without asking. With beside_previous blocks may
// start as soon as all of the previous grid have started; code for sm_90 then has to wait for that
// grid's end, before it reads its results or at least before it ends itself.
template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), dim3 grid, int threads, int shared_bytes,
                   cudaStream_t stream, bool beside_previous, const Args&... args) {
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 << 10) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  }
  cudaLaunchAttribute overlap = {};
  if (beside_previous && error == cudaSuccess) {
    cudaFuncAttributes compiled = {};
    error = make_room(kernel);
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&compiled, kernel);
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = compiled.ptxVersion >= 90;
  }
  if (error != cudaSuccess) return error;
  const cudaLaunchConfig_t config =
      launch_config(grid, threads, shared_bytes, stream, beside_previous ? &overlap : nullptr);
  return cudaLaunchKernelEx(&config, kernel, args...);
}

// Launches clusters of blocks, if there are any and, where asked for, if all of them run at once:
// `launched` says whether. Only code for sm_90 knows of clusters, and GPUs of one kind differ in
// how many of them they hold.
template <typename... Params, typename... Args>
cudaError_t launch_clusters(void (*kernel)(Params...), dim3 grid, dim3 cluster, int threads,
                            int shared_bytes, cudaStream_t stream, bool at_once, bool& launched,
                            const Args&... args) {
  launched = false;
  cudaFuncAttributes compiled = {};
  cudaError_t error = cudaFuncGetAttributes(&compiled, kernel);
  if (error != cudaSuccess || compiled.ptxVersion < 90) return error;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute shape = {};
  shape.id = cudaLaunchAttributeClusterDimension;
  shape.val.clusterDim = {cluster.x, cluster.y, cluster.z};
  const cudaLaunchConfig_t config = launch_config(grid, threads, shared_bytes, stream, &shape);
  int clusters = 0;
  error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
  const int64_t wanted = int64_t(grid.x) * grid.y * grid.z / (cluster.x * cluster.y * cluster.z);
  if (error != cudaSuccess || clusters < (at_once ? wanted : 1)) return error;
  launched = true;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

}  // namespace jax_fa
