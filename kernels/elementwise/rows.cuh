// What the kernels on rows share: 16-byte pieces of fp16 (vectors of 8 halves), which E4M3 makes 8
// bytes, sums over a row, the launch.
#ifndef CLIP_TTRT_ROWS_CUH_
#define CLIP_TTRT_ROWS_CUH_

#include <cuda_fp16.h>

#include <type_traits>

#include "../e4m3.h"
#include "elementwise.h"

namespace rows {

constexpr int kVector = kClipElementwiseWidthStep;
constexpr int kLanes = 32;
constexpr int kGridY = 65535;  // the most blocks a grid has in y

// ---------------------------------------------------------------------------------------------
// On the GPU

__device__ __forceinline__ uint32_t pack_half2(float low, float high) {
  const __half2 packed = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&packed);
}

__device__ __forceinline__ uint4 pack(const float (&x)[kVector]) {
  return make_uint4(pack_half2(x[0], x[1]), pack_half2(x[2], x[3]), pack_half2(x[4], x[5]),
                    pack_half2(x[6], x[7]));
}

__device__ __forceinline__ void unpack(uint4 packed, float (&x)[kVector]) {
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&words[i]));
    x[2 * i] = pair.x;
    x[2 * i + 1] = pair.y;
  }
}

// A vector as a kernel stores it: uint4 holds fp16, uint2 E4M3 of x times `inverse_scale`.
template <class Stored>
__device__ __forceinline__ Stored pack_as(const float (&x)[kVector], float inverse_scale) {
  if constexpr (std::is_same_v<Stored, uint4>) {
    return pack(x);
  } else {
    float scaled[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) scaled[i] = x[i] * inverse_scale;
    return make_uint2(e4m3::pack(scaled[0], scaled[1], scaled[2], scaled[3]),
                      e4m3::pack(scaled[4], scaled[5], scaled[6], scaled[7]));
  }
}

__device__ __forceinline__ void load_floats(const float4* from, int64_t vector,
                                            float (&x)[kVector]) {
  const float4 low = __ldg(from + 2 * vector), high = __ldg(from + 2 * vector + 1);
  x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
  x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
}

// A bias that need not be there.
__device__ __forceinline__ void load_bias(const float4* bias, int vector, float (&x)[kVector]) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) x[i] = 0;
  if (bias != nullptr) load_floats(bias, vector, x);
}

// The outer index of a grid that `grid` made.
__device__ __forceinline__ int64_t outer_block() {
  return int64_t(blockIdx.z) * gridDim.y + blockIdx.y;
}

// How a block shares out rows: kWarps warps hold a row, kVectors vectors a lane; kTeams times that
// in a block.
template <int kWarps_, int kTeams_, int kVectors_>
struct Team {
  static constexpr int kWarps = kWarps_, kTeams = kTeams_, kVectors = kVectors_;
  static constexpr int kStep = kWarps * kLanes;
  static constexpr int kThreads = kTeams * kStep;
  static_assert(kWarps == 1 || kTeams == 1, "teams of several warps meet at the block's barrier");

  // The row, or first of `per_team` rows, of this thread's team.
  static __device__ __forceinline__ int64_t row(int per_team) {
    return (int64_t(blockIdx.x) * kTeams + threadIdx.x / kStep) * per_team;
  }
};

// Which of a row's vectors a lane holds. Only its last one can lie past the width. It then reads
// the row's last vector, so that there is no branch to wait at, does not count and is not stored.
template <class Team>
struct Columns {
  int lane, vectors;
  bool last_here;

  __device__ __forceinline__ explicit Columns(int vectors)
      : lane(threadIdx.x % Team::kStep),
        vectors(vectors),
        last_here(lane + (Team::kVectors - 1) * Team::kStep < vectors) {}
  __device__ __forceinline__ bool here(int v) const { return v < Team::kVectors - 1 || last_here; }
  __device__ __forceinline__ int operator[](int v) const {
    return here(v) ? lane + v * Team::kStep : vectors - 1;
  }
};

// Sum of each x over a row's warps; every thread gets it. The order is fixed: same input, same
// bits.
template <class Team, int kRows>
__device__ __forceinline__ void row_sums(float (&x)[kRows], float (&partial)[Team::kWarps][kRows]) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2)
#pragma unroll
    for (int r = 0; r < kRows; ++r) x[r] += __shfl_xor_sync(0xffffffffu, x[r], offset);
  if (Team::kWarps == 1) return;
  if (threadIdx.x % kLanes == 0)
#pragma unroll
    for (int r = 0; r < kRows; ++r) partial[threadIdx.x / kLanes][r] = x[r];
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    x[r] = 0;
#pragma unroll
    for (int warp = 0; warp < Team::kWarps; ++warp) x[r] += partial[warp][r];
  }
}

struct Norm {
  float width, inverse_width, epsilon;
};

// (x - mean) / sqrt(variance + epsilon) of each row, in place. The two sums take turns with two
// places for partial sums: whoever writes one again has passed the other's barrier.
template <class Team, int kRows>
__device__ __forceinline__ void normalise(float (&x)[kRows][Team::kVectors][kVector],
                                          const Columns<Team>& columns, const Norm& norm,
                                          float (&partial)[2][Team::kWarps][kRows]) {
  float mean[kRows], deviation[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    mean[r] = 0;
#pragma unroll
    for (int v = 0; v < Team::kVectors; ++v) {
      float with = mean[r];
#pragma unroll
      for (int i = 0; i < kVector; ++i) with += x[r][v][i];
      if (columns.here(v)) mean[r] = with;
    }
  }
  row_sums<Team, kRows>(mean, partial[0]);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    // A division by Newton's step: exact where all values are equal, as the product alone would not
    // be.
    const float quotient = mean[r] * norm.inverse_width;
    mean[r] = fmaf(fmaf(-quotient, norm.width, mean[r]), norm.inverse_width, quotient);
    deviation[r] = 0;
#pragma unroll
    for (int v = 0; v < Team::kVectors; ++v) {
      float with = deviation[r];
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        x[r][v][i] -= mean[r];
        with = fmaf(x[r][v][i], x[r][v][i], with);
      }
      if (columns.here(v)) deviation[r] = with;
    }
  }
  row_sums<Team, kRows>(deviation, partial[1]);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const float inverse = rsqrtf(fmaf(deviation[r], norm.inverse_width, norm.epsilon));
#pragma unroll
    for (int v = 0; v < Team::kVectors; ++v)
#pragma unroll
      for (int i = 0; i < kVector; ++i) x[r][v][i] *= inverse;
  }
}

// ---------------------------------------------------------------------------------------------
// On the host

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// There, and where a kernel can read or write it.
inline bool usable(const void* pointer) { return pointer != nullptr && aligned(pointer); }

inline bool width_ok(int32_t width, int32_t most) {
  return width >= kVector && width <= most && width % kVector == 0;
}

inline Norm norm_of(int32_t width, float epsilon) {
  return {static_cast<float>(width), 1.0f / static_cast<float>(width), epsilon};
}

// The current GPU's number of multiprocessors, if it can run a launch with such an out_scale.
inline cudaError_t current_sm_count(int& sm_count, float out_scale = 0) {
  int device = 0, sm_major = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess)
    status = cudaDeviceGetAttribute(&sm_major, cudaDevAttrComputeCapabilityMajor, device);
  if (status == cudaSuccess)
    status = cudaDeviceGetAttribute(&sm_count, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return status;
  return sm_major < 8 ? cudaErrorNoKernelImageForDevice : e4m3::supported(out_scale);
}

// Blocks (inner, outer), the inner ones one after the other. Many outer ones are spread evenly over
// z, so that few blocks lie past the end, where `outer_block` still counts them.
inline dim3 grid(int64_t inner, int64_t outer) {
  const int64_t z = ceil_div(outer, kGridY);
  return dim3(static_cast<unsigned>(inner), static_cast<unsigned>(ceil_div(outer, z)),
              static_cast<unsigned>(z));
}

template <class... Params>
cudaError_t launch(void (*kernel)(Params...), dim3 blocks, int threads, cudaStream_t stream,
                   Params... params) {
  kernel<<<blocks, threads, 0, stream>>>(params...);
  return cudaGetLastError();
}

// Calls `with` with an output as what a launch with such an out_scale writes: uint4* or uint2*.
template <class With>
cudaError_t with_output(void* out, float out_scale, With with) {
  return out_scale > 0 ? with(static_cast<uint2*>(out)) : with(static_cast<uint4*>(out));
}

// Calls `with` with the Team for a width: as many warps as give each lane one vector, which
// measures best, up to 4; past 1024 columns 8 warps with more vectors a lane.
template <class With>
cudaError_t with_team(int32_t width, With with) {
  const int vectors = width / kVector;
  if (vectors <= 1 * kLanes) return with(Team<1, 4, 1>());
  if (vectors <= 2 * kLanes) return with(Team<2, 1, 1>());
  if (vectors <= 3 * kLanes) return with(Team<3, 1, 1>());
  if (vectors <= 4 * kLanes) return with(Team<4, 1, 1>());
  if (vectors <= 8 * kLanes) return with(Team<8, 1, 1>());
  if (vectors <= 16 * kLanes) return with(Team<8, 1, 2>());
  if (vectors <= 24 * kLanes) return with(Team<8, 1, 3>());
  return with(Team<8, 1, 4>());
}

}  // namespace rows

#endif  // CLIP_TTRT_ROWS_CUH_
