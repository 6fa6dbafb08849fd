// The front of CLIP's image encoder: images cut into patches, and the patches' embeddings made into the first rows of
// the residual stream. Interface: elementwise.h. Both move bytes and compute little, as in elementwise.cu.
//   extract_patches_kernel  reads along image rows, writes each patch's share of a row: at 32 and 16 pixels whole
//                           32-byte sectors.
//   embed_image_kernel      class token, positions and two layer norms in one pass; a row stays in registers.

#include "rows.cuh"

namespace {

using namespace rows;

// ---------------------------------------------------------------------------------------------
// Patches

constexpr int kPatchThreads = 128;

// kPixels neighbours of a row as packed halves.
template <int kPixels>
__device__ __forceinline__ void load_pixels(const float* from, uint32_t (&packed)[kPixels / 2]) {
  if constexpr (kPixels == 2) {
    const float2 two = __ldg(reinterpret_cast<const float2*>(from));
    packed[0] = pack_half2(two.x, two.y);
  } else {
#pragma unroll
    for (int i = 0; i < kPixels / 4; ++i) {
      const float4 four = __ldg(reinterpret_cast<const float4*>(from) + i);
      packed[2 * i] = pack_half2(four.x, four.y);
      packed[2 * i + 1] = pack_half2(four.z, four.w);
    }
  }
}

template <int kPixels>
__device__ __forceinline__ void load_pixels(const __half* from, uint32_t (&packed)[kPixels / 2]) {
  if constexpr (kPixels == 8) {
    const uint4 eight = __ldg(reinterpret_cast<const uint4*>(from));
    packed[0] = eight.x, packed[1] = eight.y, packed[2] = eight.z, packed[3] = eight.w;
  } else if constexpr (kPixels == 4) {
    const uint2 four = __ldg(reinterpret_cast<const uint2*>(from));
    packed[0] = four.x, packed[1] = four.y;
  } else {
    packed[0] = __ldg(reinterpret_cast<const uint32_t*>(from));
  }
}

// A thread takes kUnits times kPixels neighbours of a row, which lie in pieces of kPiece in one patch each. A plane is
// one channel of one image. kPatch: the patch size where it is known, else 0.
template <class Pixel, int kPatch, int kPixels, int kPiece, int kUnits>
__global__ void __launch_bounds__(kPatchThreads)
    extract_patches_kernel(const Pixel* __restrict__ images, __half* __restrict__ out, int64_t planes, int resolution,
                           int patch_size) {
  const int patch = kPatch != 0 ? kPatch : patch_size;
  const int64_t plane = outer_block();
  if (plane >= planes) return;
  const int64_t image = plane / kClipImageChannels;
  const int channel = static_cast<int>(plane - image * kClipImageChannels);
  const int side = resolution / patch, row_units = resolution / kPixels;
  const int first = blockIdx.x * (kPatchThreads * kUnits) + threadIdx.x;

  uint32_t packed[kUnits][kPixels / 2];
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    const int unit = first + u * kPatchThreads;
    if (unit < row_units * resolution)
      load_pixels<kPixels>(images + plane * resolution * resolution + unit * kPixels, packed[u]);
  }
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    const int unit = first + u * kPatchThreads;
    if (unit >= row_units * resolution) break;
    const int y = unit / row_units, x = (unit - y * row_units) * kPixels;
    const int patch_y = y / patch;
    const int64_t row = (image * side + patch_y) * side;
    const int inside = (channel * patch + y - patch_y * patch) * patch;
#pragma unroll
    for (int p = 0; p < kPixels; p += kPiece) {
      const int patch_x = (x + p) / patch;
      __half* to = out + (row + patch_x) * (kClipImageChannels * patch * patch) + inside + (x + p - patch_x * patch);
      if constexpr (kPiece == 8)
        *reinterpret_cast<uint4*>(to) = make_uint4(packed[u][0], packed[u][1], packed[u][2], packed[u][3]);
      else
        *reinterpret_cast<uint32_t*>(to) = packed[u][p / 2];
    }
  }
}

template <class Pixel, int kPatch, int kPixels, int kPiece, int kUnits>
cudaError_t launch_extract_patches(const ClipExtractPatchesParams& params, cudaStream_t stream) {
  const int64_t planes = params.batch * kClipImageChannels;
  const int64_t units = int64_t(params.resolution) * params.resolution / kPixels;
  return launch(extract_patches_kernel<Pixel, kPatch, kPixels, kPiece, kUnits>,
                grid(ceil_div(units, kPatchThreads * kUnits), planes), kPatchThreads, stream,
                static_cast<const Pixel*>(params.images), static_cast<__half*>(params.out), planes, params.resolution,
                params.patch_size);
}

template <class Pixel>
cudaError_t extract_patches(const ClipExtractPatchesParams& params, cudaStream_t stream) {
  if (params.patch_size == 32) return launch_extract_patches<Pixel, 32, 8, 8, 2>(params, stream);
  if (params.patch_size == 16) return launch_extract_patches<Pixel, 16, 8, 8, 2>(params, stream);
  if (params.resolution % 4 != 0) return launch_extract_patches<Pixel, 0, 2, 2, 2>(params, stream);
  if (params.patch_size == 14) return launch_extract_patches<Pixel, 14, 4, 2, 2>(params, stream);
  return launch_extract_patches<Pixel, 0, 4, 2, 2>(params, stream);
}

// ---------------------------------------------------------------------------------------------
// The first rows

template <class Team>
__global__ void __launch_bounds__(Team::kThreads)
    embed_image_kernel(const uint4* __restrict__ patches, const float4* __restrict__ class_token,
                       const float4* __restrict__ positions, const float4* __restrict__ scale_pre,
                       const float4* __restrict__ shift_pre, const float4* __restrict__ scale_1,
                       const float4* __restrict__ shift_1, uint4* __restrict__ x, uint4* __restrict__ y, int64_t rows,
                       int tokens, int vectors, Norm norm_pre, Norm norm_1) {
  __shared__ float partial[2][Team::kWarps][1];
  const int64_t row = Team::row(1);
  if (row >= rows) return;
  const Columns<Team> columns(vectors);
  const int image = static_cast<unsigned>(row) / static_cast<unsigned>(tokens);
  const int token = static_cast<int>(row - int64_t(image) * tokens);

  float values[1][Team::kVectors][kVector];
#pragma unroll
  for (int v = 0; v < Team::kVectors; ++v) {
    if (token == 0)
      load_floats(class_token, columns[v], values[0][v]);
    else
      unpack(patches[(row - image - 1) * vectors + columns[v]], values[0][v]);
  }
#pragma unroll
  for (int v = 0; v < Team::kVectors; ++v) {
    float position[kVector];
    load_floats(positions, int64_t(token) * vectors + columns[v], position);
#pragma unroll
    for (int i = 0; i < kVector; ++i) values[0][v][i] += position[i];
  }
  normalise<Team, 1>(values, columns, norm_pre, partial);
#pragma unroll
  for (int v = 0; v < Team::kVectors; ++v) {
    float scaling[kVector], shifting[kVector];
    load_floats(scale_pre, columns[v], scaling);
    load_floats(shift_pre, columns[v], shifting);
#pragma unroll
    for (int i = 0; i < kVector; ++i) values[0][v][i] = fmaf(values[0][v][i], scaling[i], shifting[i]);
    const uint4 packed = pack(values[0][v]);
    unpack(packed, values[0][v]);
    if (columns.here(v)) x[row * vectors + columns[v]] = packed;
  }
  normalise<Team, 1>(values, columns, norm_1, partial);
#pragma unroll
  for (int v = 0; v < Team::kVectors; ++v) {
    float scaling[kVector], shifting[kVector];
    load_floats(scale_1, columns[v], scaling);
    load_floats(shift_1, columns[v], shifting);
#pragma unroll
    for (int i = 0; i < kVector; ++i) values[0][v][i] = fmaf(values[0][v][i], scaling[i], shifting[i]);
    if (columns.here(v)) y[row * vectors + columns[v]] = pack(values[0][v]);
  }
}

}  // namespace

extern "C" int32_t clip_extract_patches_params_size(void) { return sizeof(ClipExtractPatchesParams); }

extern "C" int32_t clip_embed_image_params_size(void) { return sizeof(ClipEmbedImageParams); }

extern "C" cudaError_t clip_extract_patches_launch(const ClipExtractPatchesParams* params, cudaStream_t stream) {
  if (params == nullptr || params->batch < 0 || params->patch_size < 2 || params->patch_size % 2 != 0 ||
      params->resolution < params->patch_size || params->resolution > kClipMaxResolution ||
      params->resolution % params->patch_size != 0 || (params->half != 0 && params->half != 1))
    return cudaErrorInvalidValue;
  const int64_t side = params->resolution / params->patch_size;
  if (params->batch > kClipElementwiseMaxRows / (side * side)) return cudaErrorInvalidValue;
  if (params->batch == 0) return cudaSuccess;
  if (!usable(params->images) || !usable(params->out)) return cudaErrorInvalidValue;
  int sm_count = 0;
  const cudaError_t status = current_sm_count(sm_count);
  if (status != cudaSuccess) return status;
  return params->half ? extract_patches<__half>(*params, stream) : extract_patches<float>(*params, stream);
}

extern "C" cudaError_t clip_embed_image_launch(const ClipEmbedImageParams* params, cudaStream_t stream) {
  if (params == nullptr || params->batch < 0 || params->tokens < 2 ||
      params->batch > kClipElementwiseMaxRows / params->tokens || !width_ok(params->width, kClipLayerNormMaxWidth) ||
      !(params->epsilon_pre > 0) || !(params->epsilon_1 > 0))
    return cudaErrorInvalidValue;
  if (params->batch == 0) return cudaSuccess;
  const void* const needed[] = {params->patches, params->class_token, params->positions, params->scale_pre,
                                params->shift_pre, params->scale_1, params->shift_1, params->x, params->y};
  for (const void* pointer : needed)
    if (!usable(pointer)) return cudaErrorInvalidValue;
  int sm_count = 0;
  const cudaError_t status = current_sm_count(sm_count);
  if (status != cudaSuccess) return status;
  const int64_t rows = params->batch * params->tokens;
  return with_team(params->width, [&](auto team) {
    using Team = decltype(team);
    return launch(embed_image_kernel<Team>, grid(ceil_div(rows, Team::kTeams), 1), Team::kThreads, stream,
                  static_cast<const uint4*>(params->patches), static_cast<const float4*>(params->class_token),
                  static_cast<const float4*>(params->positions), static_cast<const float4*>(params->scale_pre),
                  static_cast<const float4*>(params->shift_pre), static_cast<const float4*>(params->scale_1),
                  static_cast<const float4*>(params->shift_1), static_cast<uint4*>(params->x),
                  static_cast<uint4*>(params->y), rows, params->tokens, params->width / kVector,
                  norm_of(params->width, params->epsilon_pre), norm_of(params->width, params->epsilon_1));
  });
}
