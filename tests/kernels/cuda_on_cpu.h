// What of CUDA a simple kernel needs to run on the CPU, thread after thread: enough to see that it
// computes the right numbers where there is no GPU. Every block runs twice, so that in the second
// run shared memory holds what all of its threads wrote before the barrier of the first.
#pragma once
#include <cstdint>

#define __device__
#define __forceinline__ inline
#define __global__
#define __host__
#define __launch_bounds__(...)
#define __shared__ static

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
using cudaStream_t = void*;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

static dim3 threadIdx, blockIdx, blockDim, gridDim;
inline void __syncthreads() {}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

template <class... Params>
void run_on_cpu(void (*kernel)(Params...), dim3 blocks, int threads, Params... params) {
  gridDim = blocks;
  blockDim = dim3(threads);
  for (blockIdx.y = 0; blockIdx.y < blocks.y; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < blocks.x; ++blockIdx.x)
      for (int run = 0; run < 2; ++run)
        for (threadIdx.x = 0; threadIdx.x < blockDim.x; ++threadIdx.x) kernel(params...);
}
