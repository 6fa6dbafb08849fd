// E4M3, the 8-bit floating-point numbers that matrix products of GPUs from sm_89 on take: what
// kernels and launchers share. 448 is the largest; below 2^-6 they are multiples of 2^-9.
#ifndef CLIP_TTRT_E4M3_H_
#define CLIP_TTRT_E4M3_H_

#include <cuda_runtime_api.h>
#include <stdint.h>

#include <cmath>

#ifdef __CUDACC__
#include <cuda_fp8.h>
#endif

namespace e4m3 {

// Whether it can be a scale: 0, where numbers are fp16, or a number with a reciprocal.
inline bool valid_scale(float scale) { return scale == 0 || (scale > 0 && std::isnormal(scale)); }

// What a kernel multiplies by; 0 where it writes fp16.
inline float reciprocal(float out_scale) { return out_scale > 0 ? 1 / out_scale : 0; }

// Whether the current GPU can run a launch with such an out_scale. Below sm_89 conversions are
// emulated, slowly, and no matrix product takes the result.
inline cudaError_t supported(float out_scale) {
  if (out_scale == 0) return cudaSuccess;
  int device = 0, major = 0, minor = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess)
    status = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (status == cudaSuccess)
    status = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (status != cudaSuccess) return status;
  return major * 10 + minor >= 89 ? cudaSuccess : cudaErrorNotSupported;
}

#ifdef __CUDACC__
// Two numbers, the first in the low byte: rounded to nearest, beyond 448 made 448, NaN kept.
__device__ __forceinline__ uint32_t pack(float low, float high) {
  return __nv_cvt_float2_to_fp8x2(make_float2(low, high), __NV_SATFINITE, __NV_E4M3);
}

__device__ __forceinline__ uint32_t pack(float x0, float x1, float x2, float x3) {
  return pack(x0, x1) | pack(x2, x3) << 16;
}
#endif

}  // namespace e4m3

#endif  // CLIP_TTRT_E4M3_H_
