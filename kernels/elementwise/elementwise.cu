// Bias and GELU, and residual addition and layer norm, between CLIP's matrix products.
// Interface: elementwise.h.
//
// Both move bytes and compute little, so all that counts is how many loads are in flight and how
// few instructions stand around them. Every access is 16 bytes (8 halves: a vector), or 8 where
// E4M3 is written.
//   gelu_kernel        a thread keeps to one vector of columns and takes one or two rows of it.
//   layer_norm_kernel  a row stays in the registers of a block's warps: one read, mean, then
//                      centred variance, one write.
// How each choice was reached: NOTES.md.

#include "rows.cuh"

namespace {

using namespace rows;

// ---------------------------------------------------------------------------------------------
// Bias and GELU

constexpr int kGeluThreads = 128;
// sigmoid(1.702 y) = 1 / (1 + 2^(kQuickSlope y))
constexpr float kQuickSlope = -1.702f * 1.4426950408889634f;
// (1 + tanh(u)) / 2 = sigmoid(2 u) = 1 / (1 + 2^(kTanhSlope y (1 + kTanhCubic y^2)))
constexpr float kTanhSlope = -2 * 0.7978845608028654f * 1.4426950408889634f;
constexpr float kTanhCubic = 0.044715f;
constexpr float kInverseRoot = 0.7071067811865476f;

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

// GELU(y) / y. Far below zero the power is infinite and its reciprocal zero, as the limit is.
template <int kApproximate>
__device__ __forceinline__ float gate(float y) {
  if constexpr (kApproximate == kClipGeluNone) return 0.5f * (1 + erff(kInverseRoot * y));
  const float slope =
      kApproximate == kClipGeluQuick ? kQuickSlope : kTanhSlope * (1 + kTanhCubic * y * y);
  return reciprocal_fast(1.0f + exp2_fast(slope * y));
}

// A block takes kRows * (kGeluThreads >> column_bits) rows by (1 << column_bits) vectors of
// columns.
template <int kApproximate, int kRows, class Stored>
__global__ void __launch_bounds__(kGeluThreads)
    gelu_kernel(const uint4* __restrict__ in, const float4* __restrict__ bias,
                Stored* __restrict__ out, int64_t rows, int vectors, int column_bits,
                float inverse_scale) {
  const int column = (blockIdx.x << column_bits) + (threadIdx.x & ((1 << column_bits) - 1));
  if (column >= vectors) return;
  const int step = kGeluThreads >> column_bits;
  const int64_t first = outer_block() * (kRows * step) + (threadIdx.x >> column_bits);
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
      y[i] *= gate<kApproximate>(y[i]);
    }
    out[offset + int64_t(r * step) * vectors] = pack_as<Stored>(y, inverse_scale);
  }
}

template <int kApproximate, int kRows>
cudaError_t launch_gelu(const ClipBiasGeluParams& params, cudaStream_t stream) {
  const int vectors = params.width / kVector;
  // The widest chunk of columns that divides the width, so that no thread idles at CLIP's widths.
  int column_bits = 7;
  while (column_bits > 5 && vectors % (1 << column_bits) != 0) --column_bits;
  while (column_bits > 0 && (1 << (column_bits - 1)) >= vectors) --column_bits;
  const int64_t block_rows = kRows * (kGeluThreads >> column_bits);
  return with_output(params.out, params.out_scale, [&](auto* out) {
    using Stored = std::remove_pointer_t<decltype(out)>;
    return launch(gelu_kernel<kApproximate, kRows, Stored>,
                  grid(ceil_div(vectors, 1 << column_bits), ceil_div(params.rows, block_rows)),
                  kGeluThreads, stream, static_cast<const uint4*>(params.in),
                  static_cast<const float4*>(params.bias), out, params.rows, vectors, column_bits,
                  e4m3::reciprocal(params.out_scale));
  });
}

// ---------------------------------------------------------------------------------------------
// Residual addition and layer norm

template <class Team, int kRows, bool kResidual, class Stored>
__global__ void __launch_bounds__(Team::kThreads)
    layer_norm_kernel(const uint4* __restrict__ x, const uint4* __restrict__ delta,
                      const float4* __restrict__ bias, const float4* __restrict__ scale,
                      const float4* __restrict__ shift, uint4* __restrict__ sum_out,
                      Stored* __restrict__ out, int64_t rows, int vectors, Norm norm,
                      float inverse_scale) {
  __shared__ float partial[2][Team::kWarps][kRows];
  const int64_t first = Team::row(kRows);
  if (first >= rows) return;
  const Columns<Team> columns(vectors);
  const auto row_here = [&](int r) { return kRows == 1 || first + r < rows; };

  uint4 packed[kRows][Team::kVectors], added[kRows][Team::kVectors];
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int v = 0; v < Team::kVectors; ++v) {
      const int64_t at = (row_here(r) ? first + r : first) * vectors + columns[v];
      packed[r][v] = x[at];
      if (kResidual) added[r][v] = delta != nullptr ? delta[at] : make_uint4(0, 0, 0, 0);
    }

  float values[kRows][Team::kVectors][kVector];
#pragma unroll
  for (int v = 0; v < Team::kVectors; ++v) {
    float constants[kVector];
    if (kResidual) load_bias(bias, columns[v], constants);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      unpack(packed[r][v], values[r][v]);
      if (!kResidual) continue;
      float additions[kVector];
      unpack(added[r][v], additions);
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        values[r][v][i] = values[r][v][i] + additions[i] + constants[i];
      const uint4 sum = pack(values[r][v]);
      unpack(sum, values[r][v]);
      if (sum_out != nullptr && columns.here(v) && row_here(r))
        sum_out[(first + r) * vectors + columns[v]] = sum;
    }
  }
  normalise<Team, kRows>(values, columns, norm, partial);
#pragma unroll
  for (int v = 0; v < Team::kVectors; ++v) {
    float scaling[kVector], shifting[kVector];
    load_floats(scale, columns[v], scaling);
    load_floats(shift, columns[v], shifting);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        values[r][v][i] = fmaf(values[r][v][i], scaling[i], shifting[i]);
      if (columns.here(v) && row_here(r))
        out[(first + r) * vectors + columns[v]] = pack_as<Stored>(values[r][v], inverse_scale);
    }
  }
}

template <class Team, int kRows, bool kResidual>
cudaError_t launch_layer_norm(const ClipResidualLayerNormParams& params, cudaStream_t stream) {
  return with_output(params.out, params.out_scale, [&](auto* out) {
    using Stored = std::remove_pointer_t<decltype(out)>;
    return launch(layer_norm_kernel<Team, kRows, kResidual, Stored>,
                  grid(ceil_div(params.rows, Team::kTeams * kRows), 1), Team::kThreads, stream,
                  static_cast<const uint4*>(params.x), static_cast<const uint4*>(params.delta),
                  static_cast<const float4*>(params.bias), static_cast<const float4*>(params.scale),
                  static_cast<const float4*>(params.shift), static_cast<uint4*>(params.sum_out),
                  out, params.rows, params.width / kVector, norm_of(params.width, params.epsilon),
                  e4m3::reciprocal(params.out_scale));
  });
}

}  // namespace

extern "C" int32_t clip_bias_gelu_params_size(void) { return sizeof(ClipBiasGeluParams); }

extern "C" int32_t clip_residual_layer_norm_params_size(void) {
  return sizeof(ClipResidualLayerNormParams);
}

extern "C" cudaError_t clip_bias_gelu_launch(const ClipBiasGeluParams* params,
                                             cudaStream_t stream) {
  if (params == nullptr || params->rows < 0 || params->rows > kClipElementwiseMaxRows ||
      !width_ok(params->width, kClipGeluMaxWidth) || !e4m3::valid_scale(params->out_scale) ||
      params->approximate < kClipGeluQuick || params->approximate > kClipGeluNone)
    return cudaErrorInvalidValue;
  if (params->rows == 0) return cudaSuccess;
  if (!usable(params->in) || !aligned(params->bias) || !usable(params->out))
    return cudaErrorInvalidValue;
  int sm_count = 0;
  const cudaError_t status = current_sm_count(sm_count, params->out_scale);
  if (status != cudaSuccess) return status;
  // Two rows to a thread once there are several blocks for every multiprocessor.
  const bool many =
      params->rows * (params->width / kVector) >= int64_t(sm_count) * 64 * kGeluThreads;
  const auto launch_kind = [&](auto kind) {
    return many ? launch_gelu<kind(), 2>(*params, stream) : launch_gelu<kind(), 1>(*params, stream);
  };
  switch (params->approximate) {
    case kClipGeluQuick:
      return launch_kind(std::integral_constant<int, kClipGeluQuick>());
    case kClipGeluTanh:
      return launch_kind(std::integral_constant<int, kClipGeluTanh>());
    default:
      return launch_kind(std::integral_constant<int, kClipGeluNone>());
  }
}

extern "C" cudaError_t clip_residual_layer_norm_launch(const ClipResidualLayerNormParams* params,
                                                       cudaStream_t stream) {
  if (params == nullptr || params->rows < 0 || params->rows > kClipElementwiseMaxRows ||
      !width_ok(params->width, kClipLayerNormMaxWidth) || !(params->epsilon > 0) ||
      !e4m3::valid_scale(params->out_scale))
    return cudaErrorInvalidValue;
  if (params->rows == 0) return cudaSuccess;
  if (!usable(params->x) || !usable(params->scale) || !usable(params->shift) ||
      !usable(params->out) || !aligned(params->delta) || !aligned(params->bias) ||
      !aligned(params->sum_out))
    return cudaErrorInvalidValue;
  int sm_count = 0;
  const cudaError_t status = current_sm_count(sm_count, params->out_scale);
  if (status != cudaSuccess) return status;
  const bool residual =
      params->delta != nullptr || params->bias != nullptr || params->sum_out != nullptr;
  return with_team(params->width, [&](auto team) {
    using Team = decltype(team);
    if (residual) return launch_layer_norm<Team, 1, true>(*params, stream);
    // Without a residual a row is half the loads; two rows make up for it, once there are enough.
    if constexpr (Team::kVectors == 1)
      if (params->rows >= int64_t(sm_count) * 8)
        return launch_layer_norm<Team, 2, false>(*params, stream);
    return launch_layer_norm<Team, 1, false>(*params, stream);
  });
}
