// The front of CLIP's image encoder: images cut into patches, and the patches' embeddings made into
// the first rows of the residual stream. Interface: elementwise.h. Both move bytes and compute
// little, as in elementwise.cu.
//
//   extract_patches_kernel  threads in the order of the output: whole lines written, rows of
//                           patches read
//   embed_image_kernel      class token, positions and two layer norms in one pass; a row stays in
//                           registers, and one token of several images goes together, so that the
//                           constants are read once for all

#include "rows.cuh"

namespace {

using namespace rows;

// ---------------------------------------------------------------------------------------------
// Patches

constexpr int kGridZ = 65535;  // the most blocks a grid has in z

// Neighbours in an image that one access reads.
template <class Pixel, int kPixels>
struct alignas(kPixels * sizeof(Pixel)) Piece {
  Pixel pixels[kPixels];
};

__device__ __forceinline__ uint32_t pack_pair(const float* pair) {
  return pack_half2(pair[0], pair[1]);
}
__device__ __forceinline__ uint32_t pack_pair(const __half* pair) {
  return *reinterpret_cast<const uint32_t*>(pair);
}

// The blocks of one y and z write the patches that lie side by side in an image, which follow each
// other in the output. A thread writes kUnits times kWidth halves and reads them in pieces that
// stay in one row of a patch. kPatch: the patch size where it is known, else 0. The pointers are
// not __restrict__: as far as the compiler knows a store changes what a load reads, so that all of
// a thread's loads stay ahead of its stores and are on their way together.
template <class Pixel, int kPatch, int kWidth, int kUnits, int kThreads>
__global__ void __launch_bounds__(kThreads)
    extract_patches_kernel(const Pixel* images, __half* out, int64_t batch, int resolution,
                           int patch_size) {
  constexpr int kStep = kPatch == 0 || kPatch % kWidth != 0 ? 2 : kWidth;
  constexpr int kPixels = kStep * sizeof(Pixel) <= 16 ? kStep : 16 / sizeof(Pixel);
  const unsigned patch = kPatch != 0 ? kPatch : patch_size;
  const unsigned patch_halves = kClipImageChannels * patch * patch,
                 halves = gridDim.y * patch_halves;
  const unsigned first = (blockIdx.x * kUnits * kThreads + threadIdx.x) * kWidth;
  // Where in the image the output's half `at` comes from, counted from the first of these patches.
  const auto source = [&](unsigned at) {
    const unsigned patch_x = at / patch_halves, inside = at - patch_x * patch_halves;
    const unsigned line = inside / patch, x = inside - line * patch, channel = line / patch,
                   y = line - channel * patch;
    return (channel * resolution + y) * resolution + patch_x * patch + x;
  };
  for (int64_t image = blockIdx.z; image < batch; image += gridDim.z) {
    const Pixel* const from =
        images + (image * kClipImageChannels * resolution + blockIdx.y * patch) * resolution;
    __half* const to = out + (image * gridDim.y + blockIdx.y) * halves;
    Piece<Pixel, kPixels> pieces[kUnits][kWidth / kPixels];
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const unsigned at =
          min(first + u * kThreads * kWidth, halves - kWidth);  // past the end once more the last
#pragma unroll
      for (int i = 0; i < kWidth; i += kPixels)
        pieces[u][i / kPixels] =
            *reinterpret_cast<const Piece<Pixel, kPixels>*>(from + source(at + i));
    }
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const unsigned at = first + u * kThreads * kWidth;
      Piece<uint32_t, kWidth / 2> packed;
#pragma unroll
      for (int i = 0; i < kWidth; i += 2)
        packed.pixels[i / 2] = pack_pair(pieces[u][i / kPixels].pixels + i % kPixels);
      if (at < halves) *reinterpret_cast<Piece<uint32_t, kWidth / 2>*>(to + at) = packed;
    }
  }
}

template <class Pixel, int kPatch, int kWidth, int kUnits, int kThreads>
cudaError_t launch_extract_patches(const ClipExtractPatchesParams& params, cudaStream_t stream) {
  const int64_t side = params.resolution / params.patch_size;
  const int64_t halves = int64_t(params.resolution) * kClipImageChannels * params.patch_size;
  const dim3 blocks(static_cast<unsigned>(ceil_div(halves, kWidth * kUnits * kThreads)),
                    static_cast<unsigned>(side),
                    static_cast<unsigned>(params.batch < kGridZ ? params.batch : kGridZ));
  return launch(extract_patches_kernel<Pixel, kPatch, kWidth, kUnits, kThreads>, blocks, kThreads,
                stream, static_cast<const Pixel*>(params.images), static_cast<__half*>(params.out),
                params.batch, params.resolution, params.patch_size);
}

template <class Pixel, int kPatch, int kWidth>
cudaError_t extract_patches_of(const ClipExtractPatchesParams& params, int sm_count,
                               cudaStream_t stream) {
  // Eight halves to a thread, once a store each would be twice the 2048 threads that every
  // multiprocessor holds.
  const int64_t stores =
      params.batch * params.resolution * params.resolution * kClipImageChannels / kWidth;
  return stores >= int64_t(sm_count) * 2 * 2048
             ? launch_extract_patches<Pixel, kPatch, kWidth, 8 / kWidth, 256>(params, stream)
             : launch_extract_patches<Pixel, kPatch, kWidth, 1, 128>(params, stream);
}

template <class Pixel>
cudaError_t extract_patches(const ClipExtractPatchesParams& params, int sm_count,
                            cudaStream_t stream) {
  if (params.patch_size == 32) return extract_patches_of<Pixel, 32, 4>(params, sm_count, stream);
  if (params.patch_size == 16) return extract_patches_of<Pixel, 16, 4>(params, sm_count, stream);
  if (params.patch_size == 14) return extract_patches_of<Pixel, 14, 2>(params, sm_count, stream);
  return extract_patches_of<Pixel, 0, 2>(params, sm_count, stream);
}

// ---------------------------------------------------------------------------------------------
// The first rows

// As load_floats, but here and not where the compiler would rather have it.
__device__ __forceinline__ void load_now(const float4* from, int64_t vector, float (&x)[kVector]) {
#pragma unroll
  for (int i = 0; i < 2; ++i)
    asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x[4 * i]), "=f"(x[4 * i + 1]), "=f"(x[4 * i + 2]), "=f"(x[4 * i + 3])
                 : "l"(from + 2 * vector + i)
                 : "memory");
}

// The blocks of one x take one token, each of kImages images to a team. kEarly: scales and shifts
// are read first, which shortens the chain of a few rows; many rows hide it, and lose by the
// registers.
template <class Team, int kImages, bool kEarly, class Stored>
__global__ void __launch_bounds__(Team::kThreads)
    embed_image_kernel(const uint4* __restrict__ patches, const float4* __restrict__ class_token,
                       const float4* __restrict__ positions, const float4* __restrict__ scale_pre,
                       const float4* __restrict__ shift_pre, const float4* __restrict__ scale_1,
                       const float4* __restrict__ shift_1, uint4* __restrict__ x,
                       Stored* __restrict__ y, int64_t batch, int vectors, Norm norm_pre,
                       Norm norm_1, float inverse_scale) {
  const int token = blockIdx.x, tokens = gridDim.x;
  const int64_t first = (outer_block() * Team::kTeams + threadIdx.x / Team::kStep) * kImages;
  if (first >= batch) return;
  const Columns<Team> columns(vectors);
  const auto image_here = [&](int i) { return kImages == 1 || first + i < batch; };

  uint4 packed[kImages][Team::kVectors];
  if (token != 0)
#pragma unroll
    for (int i = 0; i < kImages; ++i)
#pragma unroll
      for (int v = 0; v < Team::kVectors; ++v)
        packed[i][v] =
            patches[((first + (image_here(i) ? i : 0)) * (tokens - 1) + token - 1) * vectors +
                    columns[v]];
  float values[kImages][Team::kVectors][kVector];
  float scales[2][Team::kVectors][kVector], shifts[2][Team::kVectors][kVector];
  if (kEarly)
#pragma unroll
    for (int v = 0; v < Team::kVectors; ++v) {
      load_now(scale_pre, columns[v], scales[0][v]), load_now(shift_pre, columns[v], shifts[0][v]);
      load_now(scale_1, columns[v], scales[1][v]), load_now(shift_1, columns[v], shifts[1][v]);
    }
#pragma unroll
  for (int v = 0; v < Team::kVectors; ++v) {
    float position[kVector];
    load_floats(positions, int64_t(token) * vectors + columns[v], position);
#pragma unroll
    for (int i = 0; i < kImages; ++i) {
      if (token == 0)
        load_floats(class_token, columns[v], values[i][v]);
      else
        unpack(packed[i][v], values[i][v]);
#pragma unroll
      for (int j = 0; j < kVector; ++j) values[i][v][j] += position[j];
    }
  }

  __shared__ float partial[2][Team::kWarps][kImages];
  const auto normalised = [&](const float4* scale, const float4* shift, const Norm& norm, auto* out,
                              float (&scaling)[Team::kVectors][kVector],
                              float (&shifting)[Team::kVectors][kVector]) {
    using Out = std::remove_pointer_t<decltype(out)>;
    normalise<Team, kImages>(values, columns, norm, partial);
#pragma unroll
    for (int v = 0; v < Team::kVectors; ++v) {
      if (!kEarly) {
        load_floats(scale, columns[v], scaling[v]);
        load_floats(shift, columns[v], shifting[v]);
      }
#pragma unroll
      for (int i = 0; i < kImages; ++i) {
#pragma unroll
        for (int j = 0; j < kVector; ++j)
          values[i][v][j] = fmaf(values[i][v][j], scaling[v][j], shifting[v][j]);
        const Out rounded = pack_as<Out>(values[i][v], inverse_scale);
        if constexpr (std::is_same_v<Out, uint4>) unpack(rounded, values[i][v]);
        if (columns.here(v) && image_here(i))
          out[((first + i) * tokens + token) * vectors + columns[v]] = rounded;
      }
    }
  };
  normalised(scale_pre, shift_pre, norm_pre, x, scales[0], shifts[0]);
  normalised(scale_1, shift_1, norm_1, y, scales[1], shifts[1]);
}

template <class Team, int kImages, bool kEarly = false>
cudaError_t launch_embed_image(const ClipEmbedImageParams& params, cudaStream_t stream) {
  return with_output(params.y, params.out_scale, [&](auto* y) {
    using Stored = std::remove_pointer_t<decltype(y)>;
    return launch(
        embed_image_kernel<Team, kImages, kEarly, Stored>,
        grid(params.tokens, ceil_div(params.batch, Team::kTeams * kImages)), Team::kThreads, stream,
        static_cast<const uint4*>(params.patches), static_cast<const float4*>(params.class_token),
        static_cast<const float4*>(params.positions), static_cast<const float4*>(params.scale_pre),
        static_cast<const float4*>(params.shift_pre), static_cast<const float4*>(params.scale_1),
        static_cast<const float4*>(params.shift_1), static_cast<uint4*>(params.x), y, params.batch,
        params.width / kVector, norm_of(params.width, params.epsilon_pre),
        norm_of(params.width, params.epsilon_1), e4m3::reciprocal(params.out_scale));
  });
}

}  // namespace

extern "C" int32_t clip_extract_patches_params_size(void) {
  return sizeof(ClipExtractPatchesParams);
}

extern "C" int32_t clip_embed_image_params_size(void) { return sizeof(ClipEmbedImageParams); }

extern "C" cudaError_t clip_extract_patches_launch(const ClipExtractPatchesParams* params,
                                                   cudaStream_t stream) {
  if (params == nullptr || params->batch < 0 || params->patch_size < 2 ||
      params->patch_size % 2 != 0 || params->resolution < params->patch_size ||
      params->resolution > kClipMaxResolution || params->resolution % params->patch_size != 0 ||
      (params->half != 0 && params->half != 1))
    return cudaErrorInvalidValue;
  const int64_t side = params->resolution / params->patch_size;
  if (params->batch > kClipElementwiseMaxRows / (side * side)) return cudaErrorInvalidValue;
  if (params->batch == 0) return cudaSuccess;
  if (!usable(params->images) || !usable(params->out)) return cudaErrorInvalidValue;
  int sm_count = 0;
  const cudaError_t status = current_sm_count(sm_count);
  if (status != cudaSuccess) return status;
  return params->half ? extract_patches<__half>(*params, sm_count, stream)
                      : extract_patches<float>(*params, sm_count, stream);
}

extern "C" cudaError_t clip_embed_image_launch(const ClipEmbedImageParams* params,
                                               cudaStream_t stream) {
  if (params == nullptr || params->batch < 0 || params->tokens < 2 ||
      params->batch > kClipElementwiseMaxRows / params->tokens ||
      !width_ok(params->width, kClipLayerNormMaxWidth) || !(params->epsilon_pre > 0) ||
      !(params->epsilon_1 > 0) || !e4m3::valid_scale(params->out_scale))
    return cudaErrorInvalidValue;
  if (params->batch == 0) return cudaSuccess;
  const void* const needed[] = {params->patches,   params->class_token, params->positions,
                                params->scale_pre, params->shift_pre,   params->scale_1,
                                params->shift_1,   params->x,           params->y};
  for (const void* pointer : needed)
    if (!usable(pointer)) return cudaErrorInvalidValue;
  int sm_count = 0;
  const cudaError_t status = current_sm_count(sm_count, params->out_scale);
  if (status != cudaSuccess) return status;
  return with_team(params->width, [&](auto team) {
    using Team = decltype(team);
    // The more rows there are for every multiprocessor, the more images to a block; four pay only
    // with four warps.
    if constexpr (Team::kVectors == 1) {
      const int64_t rows = params->batch * params->tokens;
      if constexpr (Team::kWarps == 4)
        if (rows >= int64_t(sm_count) * 32) return launch_embed_image<Team, 4>(*params, stream);
      if (rows >= int64_t(sm_count) * 8) return launch_embed_image<Team, 2>(*params, stream);
      return launch_embed_image<Team, 1, true>(*params, stream);
    } else {
      return launch_embed_image<Team, 1>(*params, stream);
    }
  });
}
