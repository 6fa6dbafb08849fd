// Bias and QuickGELU, and residual addition and layer norm, between CLIP's matrix products. Interface: elementwise.h.
//
// Both move bytes and compute little, so all that counts is how many loads are in flight and how few
// instructions stand around them. Every access is 16 bytes (8 halves: a vector).
//   quick_gelu_kernel  a thread keeps to one vector of columns, holds its bias in registers, and takes several rows.
//   layer_norm_kernel  a row stays in the registers of one warp (or of a block's warps, where rows are few or
//                      wide): one read, mean, then centred variance, one write.
// How each choice was reached: NOTES.md.

#include "elementwise.h"

#include <cuda_fp16.h>

namespace {

constexpr int kVector = kClipElementwiseWidthStep;
constexpr int kLanes = 32;
constexpr uint32_t kFullWarp = 0xffffffffu;
constexpr float kGeluSlope = -1.702f * 1.4426950408889634f;  // sigmoid(1.702 y) = 1 / (1 + 2^(kGeluSlope y))

// ---------------------------------------------------------------------------------------------
// Pieces that both kernels use

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ uint32_t pack_half2(float low, float high) {
  const __half2 packed = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&packed);
}

__device__ __forceinline__ float2 unpack_half2(uint32_t packed) {
  return __half22float2(*reinterpret_cast<const __half2*>(&packed));
}

__device__ __forceinline__ uint4 pack(const float (&x)[kVector]) {
  return make_uint4(pack_half2(x[0], x[1]), pack_half2(x[2], x[3]), pack_half2(x[4], x[5]), pack_half2(x[6], x[7]));
}

__device__ __forceinline__ void unpack(uint4 packed, float (&x)[kVector]) {
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack_half2(words[i]);
    x[2 * i] = pair.x;
    x[2 * i + 1] = pair.y;
  }
}

__device__ __forceinline__ void load_constants(const float4* constants, int vector, float (&x)[kVector]) {
  const float4 low = __ldg(constants + 2 * vector), high = __ldg(constants + 2 * vector + 1);
  x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
  x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
}

// A bias that need not be there.
__device__ __forceinline__ void load_bias(const float4* bias, int vector, float (&x)[kVector]) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) x[i] = 0;
  if (bias != nullptr) load_constants(bias, vector, x);
}

// ---------------------------------------------------------------------------------------------
// Bias and QuickGELU

// A block takes kRows * (kThreads >> column_bits) rows by (1 << column_bits) vectors of columns.
template <int kThreads, int kRows, bool kReverse>
__global__ void __launch_bounds__(kThreads)
    quick_gelu_kernel(const uint4* __restrict__ in, const float4* __restrict__ bias, uint4* __restrict__ out,
                      int64_t rows, int vectors, int chunks, int column_bits) {
  const unsigned block = kReverse ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  const unsigned group = block / chunks;
  const int column = ((block - group * chunks) << column_bits) + (threadIdx.x & ((1 << column_bits) - 1));
  if (column >= vectors) return;
  const int step = kThreads >> column_bits;
  const int64_t first = int64_t(group) * (kRows * step) + (threadIdx.x >> column_bits);
  const int64_t offset = first * vectors + column;

  uint4 packed[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    if (first + r * step < rows) packed[r] = in[offset + int64_t(r * step) * vectors];
  float shift[kVector];
  load_bias(bias, column, shift);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (first + r * step >= rows) break;
    float y[kVector];
    unpack(packed[r], y);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      y[i] += shift[i];
      // Far below zero the power is infinite and its reciprocal zero, as the sigmoid's limit is.
      y[i] *= reciprocal_fast(1.0f + exp2_fast(kGeluSlope * y[i]));
    }
    out[offset + int64_t(r * step) * vectors] = pack(y);
  }
}

template <int kThreads, int kRows, bool kReverse>
cudaError_t launch_quick_gelu(const ClipBiasQuickGeluParams& params, cudaStream_t stream) {
  const int vectors = params.width / kVector;
  // The widest chunk of columns that divides the width, so that no thread idles at CLIP's widths.
  int column_bits = 7;
  while (column_bits > 5 && vectors % (1 << column_bits) != 0) --column_bits;
  while (column_bits > 0 && (1 << (column_bits - 1)) >= vectors) --column_bits;
  const int chunks = (vectors + (1 << column_bits) - 1) >> column_bits;
  const int64_t block_rows = kRows * (kThreads >> column_bits);
  const int64_t blocks = (params.rows + block_rows - 1) / block_rows * chunks;
  if (blocks > INT32_MAX) return cudaErrorInvalidValue;
  quick_gelu_kernel<kThreads, kRows, kReverse><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(
      static_cast<const uint4*>(params.in), static_cast<const float4*>(params.bias), static_cast<uint4*>(params.out),
      params.rows, vectors, chunks, column_bits);
  return cudaGetLastError();
}

// ---------------------------------------------------------------------------------------------
// Residual addition and layer norm

// Sum of each x over the row's warps; every thread gets it. The order is fixed: same input, same bits.
template <int kWarps, int kRows>
__device__ __forceinline__ void row_sums(float (&x)[kRows], float (&partial)[kWarps][kRows]) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2)
#pragma unroll
    for (int r = 0; r < kRows; ++r) x[r] += __shfl_xor_sync(kFullWarp, x[r], offset);
  if (kWarps == 1) return;
  if (threadIdx.x % kLanes == 0)
#pragma unroll
    for (int r = 0; r < kRows; ++r) partial[threadIdx.x / kLanes][r] = x[r];
  __syncthreads();
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    x[r] = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) x[r] += partial[warp][r];
  }
}

// kWarps warps share kRows rows, of which each lane holds kVectors vectors. A block is kTeams such teams; only
// where kWarps is 1 may there be several.
template <int kWarps, int kTeams, int kVectors, int kRows, bool kResidual, bool kPreload, bool kReverse>
__global__ void __launch_bounds__(kWarps* kTeams* kLanes)
    layer_norm_kernel(const uint4* __restrict__ x, const uint4* __restrict__ delta, const float4* __restrict__ bias,
                      const float4* __restrict__ scale, const float4* __restrict__ shift, uint4* __restrict__ sum_out,
                      uint4* __restrict__ out, int64_t rows, int vectors, float width, float inverse_width,
                      float epsilon) {
  static_assert(kWarps == 1 || kTeams == 1, "teams of several warps meet at the block's barrier");
  constexpr int kStep = kWarps * kLanes;
  constexpr int kPreloaded = kPreload ? kVectors : 1;
  __shared__ float partial[2][kWarps][kRows];
  const int64_t block = kReverse ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
  const int64_t first = (block * kTeams + threadIdx.x / kStep) * kRows;
  if (first >= rows) return;
  const int lane = threadIdx.x % kStep;
  // Only the last vector of a lane can lie past the width. It then loads the row's last vector, so that there is
  // no branch to wait at, counts as zeros, and is not stored.
  const bool last_here = lane + (kVectors - 1) * kStep < vectors;
  const auto here = [&](int v) { return v < kVectors - 1 || last_here; };
  const auto column = [&](int v) { return here(v) ? lane + v * kStep : vectors - 1; };
  const auto row_here = [&](int r) { return kRows == 1 || first + r < rows; };

  uint4 packed[kRows][kVectors], added[kRows][kVectors];
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = (row_here(r) ? first + r : first) * vectors + column(v);
      packed[r][v] = x[at];
      if (kResidual) added[r][v] = delta != nullptr ? delta[at] : make_uint4(0, 0, 0, 0);
    }
  // Where nothing else hides their latency, the constants are fetched with the row.
  float scales[kPreloaded][kVector], shifts[kPreloaded][kVector];
  if (kPreload)
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      load_constants(scale, column(v), scales[v]);
      load_constants(shift, column(v), shifts[v]);
    }

  if (kResidual) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      float constants[kVector];
      load_bias(bias, column(v), constants);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float values[kVector], additions[kVector];
        unpack(packed[r][v], values);
        unpack(added[r][v], additions);
#pragma unroll
        for (int i = 0; i < kVector; ++i) values[i] = values[i] + additions[i] + constants[i];
        packed[r][v] = pack(values);
      }
    }
    if (sum_out != nullptr)
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int v = 0; v < kVectors; ++v)
          if (here(v) && row_here(r)) sum_out[(first + r) * vectors + column(v)] = packed[r][v];
  }

  float mean[kRows], deviation[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    mean[r] = 0;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      float values[kVector];
      unpack(packed[r][v], values);
#pragma unroll
      for (int i = 0; i < kVector; ++i) mean[r] += here(v) ? values[i] : 0.0f;
    }
  }
  row_sums(mean, partial[0]);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    // A division by Newton's step: exact where all values are equal, as the product alone would not be.
    const float quotient = mean[r] * inverse_width;
    mean[r] = fmaf(fmaf(-quotient, width, mean[r]), inverse_width, quotient);
    deviation[r] = 0;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      float values[kVector];
      unpack(packed[r][v], values);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float centred = here(v) ? values[i] - mean[r] : 0.0f;
        deviation[r] = fmaf(centred, centred, deviation[r]);
      }
    }
  }
  row_sums(deviation, partial[1]);
#pragma unroll
  for (int r = 0; r < kRows; ++r) deviation[r] = rsqrtf(fmaf(deviation[r], inverse_width, epsilon));

#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    float(&scaling)[kVector] = scales[v < kPreloaded ? v : 0];
    float(&shifting)[kVector] = shifts[v < kPreloaded ? v : 0];
    if (!kPreload) {
      load_constants(scale, column(v), scaling);
      load_constants(shift, column(v), shifting);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float values[kVector];
      unpack(packed[r][v], values);
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        values[i] = fmaf((values[i] - mean[r]) * deviation[r], scaling[i], shifting[i]);
      if (here(v) && row_here(r)) out[(first + r) * vectors + column(v)] = pack(values);
    }
  }
}

template <int kWarps, int kTeams, int kVectors, int kRows, bool kPreload, bool kReverse>
cudaError_t launch_layer_norm_vectors(const ClipResidualLayerNormParams& params, cudaStream_t stream) {
  const int64_t block_rows = kTeams * kRows;
  const unsigned blocks = static_cast<unsigned>((params.rows + block_rows - 1) / block_rows);
  const bool residual = params.delta != nullptr || params.bias != nullptr || params.sum_out != nullptr;
  const auto kernel = residual ? layer_norm_kernel<kWarps, kTeams, kVectors, kRows, true, kPreload, kReverse>
                               : layer_norm_kernel<kWarps, kTeams, kVectors, kRows, false, kPreload, kReverse>;
  kernel<<<blocks, kWarps * kTeams * kLanes, 0, stream>>>(
      static_cast<const uint4*>(params.x), static_cast<const uint4*>(params.delta),
      static_cast<const float4*>(params.bias), static_cast<const float4*>(params.scale),
      static_cast<const float4*>(params.shift), static_cast<uint4*>(params.sum_out), static_cast<uint4*>(params.out),
      params.rows, params.width / kVector, static_cast<float>(params.width), 1.0f / static_cast<float>(params.width),
      params.epsilon);
  return cudaGetLastError();
}

// kMost: the most vectors a lane may hold.
template <int kWarps, int kTeams, int kMost, int kRows, bool kPreload, bool kReverse>
cudaError_t launch_layer_norm(const ClipResidualLayerNormParams& params, cudaStream_t stream) {
  constexpr int kSpan = kWarps * kLanes * kVector;
  const int needed = (params.width + kSpan - 1) / kSpan;
  if (needed == 1) return launch_layer_norm_vectors<kWarps, kTeams, 1, kRows, kPreload, kReverse>(params, stream);
  if constexpr (kMost >= 2)
    if (needed == 2) return launch_layer_norm_vectors<kWarps, kTeams, 2, kRows, kPreload, kReverse>(params, stream);
  if constexpr (kMost >= 3)
    if (needed == 3) return launch_layer_norm_vectors<kWarps, kTeams, 3, kRows, kPreload, kReverse>(params, stream);
  if constexpr (kMost >= 4)
    if (needed == 4) return launch_layer_norm_vectors<kWarps, kTeams, 4, kRows, kPreload, kReverse>(params, stream);
  return cudaErrorInvalidValue;
}

// ---------------------------------------------------------------------------------------------
// The variants, and which one to take

template <class Params>
struct Variant {
  int32_t id;
  const char* name;
  cudaError_t (*launch)(const Params&, cudaStream_t);
};

enum GeluId { kGeluRow = 1, kGeluRows4 = 2 };

const Variant<ClipBiasQuickGeluParams> kGeluVariants[] = {
    {kGeluRow, "128 threads x 1 row", launch_quick_gelu<128, 1, false>},
    {kGeluRows4, "128 threads x 4 rows", launch_quick_gelu<128, 4, false>},
#ifdef CLIP_ELEMENTWISE_WORKSHOP
    {10, "128 x 2", launch_quick_gelu<128, 2, false>},
    {11, "128 x 8", launch_quick_gelu<128, 8, false>},
    {12, "256 x 1", launch_quick_gelu<256, 1, false>},
    {13, "256 x 2", launch_quick_gelu<256, 2, false>},
    {14, "256 x 4", launch_quick_gelu<256, 4, false>},
    {15, "512 x 4", launch_quick_gelu<512, 4, false>},
    {16, "128 x 2 reverse", launch_quick_gelu<128, 2, true>},
    {17, "128 x 4 reverse", launch_quick_gelu<128, 4, true>},
    {18, "256 x 4 reverse", launch_quick_gelu<256, 4, true>},
#endif
};

enum LayerNormId { kWarpPerRow = 1, kBlockPerRow = 2, kWideRow = 3 };

const Variant<ClipResidualLayerNormParams> kLayerNormVariants[] = {
    {kWarpPerRow, "warp per row", launch_layer_norm<1, 4, 4, 1, false, false>},
    {kBlockPerRow, "4 warps per row", launch_layer_norm<4, 1, 4, 1, true, false>},
    {kWideRow, "8 warps per row", launch_layer_norm<8, 1, 4, 1, false, false>},
#ifdef CLIP_ELEMENTWISE_WORKSHOP
    {10, "warp, 2 a block", launch_layer_norm<1, 2, 4, 1, false, false>},
    {11, "warp, 8 a block", launch_layer_norm<1, 8, 4, 1, false, false>},
    {12, "warp, 1 a block, preload", launch_layer_norm<1, 1, 4, 1, true, false>},
    {13, "warp, 4 a block, preload", launch_layer_norm<1, 4, 4, 1, true, false>},
    {14, "warp x 2 rows, 4 a block", launch_layer_norm<1, 4, 4, 2, false, false>},
    {15, "warp x 2 rows, 2 a block", launch_layer_norm<1, 2, 4, 2, false, false>},
    {16, "2 warps, preload", launch_layer_norm<2, 1, 2, 1, true, false>},
    {17, "2 warps x 2 rows, preload", launch_layer_norm<2, 1, 2, 2, true, false>},
    {18, "4 warps", launch_layer_norm<4, 1, 4, 1, false, false>},
    {19, "4 warps x 2 rows, preload", launch_layer_norm<4, 1, 1, 2, true, false>},
    {20, "4 warps x 4 rows, preload", launch_layer_norm<4, 1, 1, 4, true, false>},
    {21, "warp, 4 a block, reverse", launch_layer_norm<1, 4, 4, 1, false, true>},
    {22, "4 warps x 2 rows, preload, reverse", launch_layer_norm<4, 1, 1, 2, true, true>},
#endif
};

// A block per multiprocessor and more with four rows to a thread: then there is enough in flight.
int32_t choose_gelu(int64_t rows, int32_t width, int sm_count) {
  return rows * (width / kVector) >= int64_t(sm_count) * 8 * 128 * 4 ? kGeluRows4 : kGeluRow;
}

int32_t choose_layer_norm(int64_t rows, int32_t width, int sm_count) {
  if (width > 4 * 4 * kLanes * kVector) return kWideRow;
  if (width > 4 * kLanes * kVector) return kBlockPerRow;
  // Few rows: spread each over more warps, which shortens the way from the first load to the last store.
  return width > kLanes * kVector && rows <= int64_t(sm_count) * 16 ? kBlockPerRow : kWarpPerRow;
}

template <class Params, int kCount>
const Variant<Params>* find_variant(const Variant<Params> (&variants)[kCount], int32_t id) {
  for (const Variant<Params>& variant : variants)
    if (variant.id == id) return &variant;
  return nullptr;
}

template <class Params, int kCount>
const char* variant_at(const Variant<Params> (&variants)[kCount], int32_t index, int32_t* id) {
  if (index < 0 || index >= kCount) return nullptr;
  if (id != nullptr) *id = variants[index].id;
  return variants[index].name;
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

bool sizes_ok(int64_t rows, int32_t width, int32_t most_width) {
  return rows >= 0 && rows <= kClipElementwiseMaxRows && width >= kVector && width <= most_width && width % kVector == 0;
}

cudaError_t current_sm_count(int& sm_count) {
  int device = 0, sm_major = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&sm_major, cudaDevAttrComputeCapabilityMajor, device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&sm_count, cudaDevAttrMultiProcessorCount, device);
  if (status != cudaSuccess) return status;
  return sm_major < 8 ? cudaErrorNoKernelImageForDevice : cudaSuccess;
}

}  // namespace

extern "C" int32_t clip_bias_quick_gelu_params_size(void) { return sizeof(ClipBiasQuickGeluParams); }

extern "C" int32_t clip_residual_layer_norm_params_size(void) { return sizeof(ClipResidualLayerNormParams); }

extern "C" const char* clip_bias_quick_gelu_variant(int32_t index, int32_t* id) {
  return variant_at(kGeluVariants, index, id);
}

extern "C" const char* clip_residual_layer_norm_variant(int32_t index, int32_t* id) {
  return variant_at(kLayerNormVariants, index, id);
}

extern "C" cudaError_t clip_bias_quick_gelu_launch(const ClipBiasQuickGeluParams* params, cudaStream_t stream) {
  if (params == nullptr || !sizes_ok(params->rows, params->width, kClipQuickGeluMaxWidth)) return cudaErrorInvalidValue;
  if (params->rows == 0) return cudaSuccess;
  if (params->in == nullptr || params->out == nullptr) return cudaErrorInvalidValue;
  if (!aligned(params->in) || !aligned(params->bias) || !aligned(params->out)) return cudaErrorInvalidValue;
  int sm_count = 0;
  const cudaError_t status = current_sm_count(sm_count);
  if (status != cudaSuccess) return status;
  const int32_t id = params->variant != 0 ? params->variant : choose_gelu(params->rows, params->width, sm_count);
  const auto* variant = find_variant(kGeluVariants, id);
  return variant == nullptr ? cudaErrorInvalidValue : variant->launch(*params, stream);
}

extern "C" cudaError_t clip_residual_layer_norm_launch(const ClipResidualLayerNormParams* params, cudaStream_t stream) {
  if (params == nullptr || !sizes_ok(params->rows, params->width, kClipLayerNormMaxWidth)) return cudaErrorInvalidValue;
  if (!(params->epsilon > 0)) return cudaErrorInvalidValue;
  if (params->rows == 0) return cudaSuccess;
  const void* const needed[] = {params->x, params->scale, params->shift, params->out};
  for (const void* pointer : needed)
    if (pointer == nullptr || !aligned(pointer)) return cudaErrorInvalidValue;
  if (!aligned(params->delta) || !aligned(params->bias) || !aligned(params->sum_out)) return cudaErrorInvalidValue;
  int sm_count = 0;
  const cudaError_t status = current_sm_count(sm_count);
  if (status != cudaSuccess) return status;
  const int32_t id = params->variant != 0 ? params->variant : choose_layer_norm(params->rows, params->width, sm_count);
  const auto* variant = find_variant(kLayerNormVariants, id);
  return variant == nullptr ? cudaErrorInvalidValue : variant->launch(*params, stream);
}
