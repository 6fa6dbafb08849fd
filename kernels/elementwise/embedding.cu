// The front of CLIP's image encoder: images cut into patches, and the patches' embeddings made into the first rows of
// the residual stream. Interface: elementwise.h. Both move bytes and compute little, as in elementwise.cu.
//   extract_patches_kernel  threads in the order of the output: whole lines written, rows of patches read.
//   embed_image_kernel      class token, positions and two layer norms in one pass; a row stays in registers, and one
//                           token of several images goes together, so that the constants are read once for all.

#include "rows.cuh"

#ifdef CLIP_ELEMENTWISE_WORKSHOP
extern "C" {
int32_t clip_workshop_patches = 0, clip_workshop_embed = 0;  // which variant to launch, 0: what is chosen without
}
#endif

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

__device__ __forceinline__ uint32_t pack_pair(const float* pair) { return pack_half2(pair[0], pair[1]); }
__device__ __forceinline__ uint32_t pack_pair(const __half* pair) { return *reinterpret_cast<const uint32_t*>(pair); }

// The blocks of one y and z write the patches that lie side by side in an image, which follow each other in the output. A
// thread writes kUnits times kWidth halves and reads them in pieces that stay in one row of a patch. kPatch: the patch
// size where it is known, else 0. The pointers are not __restrict__: as far as the compiler knows a store changes what a
// load reads, so that all of a thread's loads stay ahead of its stores and are on their way together.
template <class Pixel, int kPatch, int kWidth, int kUnits, int kThreads>
__global__ void __launch_bounds__(kThreads)
    extract_patches_kernel(const Pixel* images, __half* out, int64_t batch, int resolution, int patch_size) {
  constexpr int kStep = kPatch == 0 || kPatch % kWidth != 0 ? 2 : kWidth;
  constexpr int kPixels = kStep * sizeof(Pixel) <= 16 ? kStep : 16 / sizeof(Pixel);
  const unsigned patch = kPatch != 0 ? kPatch : patch_size;
  const unsigned patch_halves = kClipImageChannels * patch * patch, halves = gridDim.y * patch_halves;
  const unsigned first = (blockIdx.x * kUnits * kThreads + threadIdx.x) * kWidth;
  // Where in the image the output's half `at` comes from, counted from the first of these patches.
  const auto source = [&](unsigned at) {
    const unsigned patch_x = at / patch_halves, inside = at - patch_x * patch_halves;
    const unsigned line = inside / patch, x = inside - line * patch, channel = line / patch, y = line - channel * patch;
    return (channel * resolution + y) * resolution + patch_x * patch + x;
  };
  for (int64_t image = blockIdx.z; image < batch; image += gridDim.z) {
    const Pixel* const from = images + (image * kClipImageChannels * resolution + blockIdx.y * patch) * resolution;
    __half* const to = out + (image * gridDim.y + blockIdx.y) * halves;
    Piece<Pixel, kPixels> pieces[kUnits][kWidth / kPixels];
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const unsigned at = min(first + u * kThreads * kWidth, halves - kWidth);  // past the end once more the last
#pragma unroll
      for (int i = 0; i < kWidth; i += kPixels)
        pieces[u][i / kPixels] = *reinterpret_cast<const Piece<Pixel, kPixels>*>(from + source(at + i));
    }
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const unsigned at = first + u * kThreads * kWidth;
      Piece<uint32_t, kWidth / 2> packed;
#pragma unroll
      for (int i = 0; i < kWidth; i += 2) packed.pixels[i / 2] = pack_pair(pieces[u][i / kPixels].pixels + i % kPixels);
      if (at < halves) *reinterpret_cast<Piece<uint32_t, kWidth / 2>*>(to + at) = packed;
    }
  }
}

template <class Pixel, int kPatch, int kWidth, int kUnits, int kThreads>
cudaError_t launch_extract_patches(const ClipExtractPatchesParams& params, cudaStream_t stream) {
  const int64_t side = params.resolution / params.patch_size;
  const int64_t halves = int64_t(params.resolution) * kClipImageChannels * params.patch_size;
  const dim3 blocks(static_cast<unsigned>(ceil_div(halves, kWidth * kUnits * kThreads)), static_cast<unsigned>(side),
                    static_cast<unsigned>(params.batch < kGridZ ? params.batch : kGridZ));
  return launch(extract_patches_kernel<Pixel, kPatch, kWidth, kUnits, kThreads>, blocks, kThreads, stream,
                static_cast<const Pixel*>(params.images), static_cast<__half*>(params.out), params.batch,
                params.resolution, params.patch_size);
}

#ifdef CLIP_ELEMENTWISE_WORKSHOP
// Through shared memory: a block takes up to kPatches patches side by side, reads along image rows and writes whole
// lines of the output.
template <class Pixel, int kPatch, int kPatches, int kThreads>
__global__ void __launch_bounds__(kThreads)
    staged_patches_kernel(const Pixel* images, __half* out, int resolution, int side) {
  constexpr int kLines = kClipImageChannels * kPatch, kHalves = kLines * kPatch;  // of a patch
  constexpr int kQuads = kPatches * kPatch / 4;                                   // of a line
  constexpr int kUnits = (kLines * kQuads + kThreads - 1) / kThreads;
  __shared__ __align__(16) uint32_t staged[kPatches * kHalves / 2];
  const int first = blockIdx.x * kPatches, here = min(kPatches, side - first);
  const int64_t image = blockIdx.z;
  const Pixel* const from = images + (image * kClipImageChannels * resolution + blockIdx.y * kPatch) * resolution + first * kPatch;
  Piece<Pixel, 4> pieces[kUnits];
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    const unsigned at = u * kThreads + threadIdx.x, line = at / kQuads, x = (at - line * kQuads) * 4;
    const unsigned channel = line / kPatch, y = line - channel * kPatch;
    if (line < kLines && x < here * kPatch) 
      pieces[u] = *reinterpret_cast<const Piece<Pixel, 4>*>(from + (channel * resolution + y) * resolution + x);
  }
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    const unsigned at = u * kThreads + threadIdx.x, line = at / kQuads, x = (at - line * kQuads) * 4;
    if (line >= kLines || x >= here * kPatch) continue;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const unsigned patch_x = (x + 2 * i) / kPatch;
      staged[(patch_x * kHalves + line * kPatch + x + 2 * i - patch_x * kPatch) / 2] = pack_pair(pieces[u].pixels + 2 * i);
    }
  }
  __syncthreads();
  __half* const to = out + ((image * side + blockIdx.y) * side + first) * kHalves;
  for (int at = threadIdx.x; at < here * kHalves / 8; at += kThreads)
    reinterpret_cast<uint4*>(to)[at] = reinterpret_cast<const uint4*>(staged)[at];
}

template <class Pixel, int kPatch, int kPatches, int kThreads>
cudaError_t launch_staged_patches(const ClipExtractPatchesParams& params, cudaStream_t stream) {
  const int side = params.resolution / params.patch_size;
  if (side % 2 != 0 || params.resolution % 4 != 0 || params.batch > kGridZ) return cudaErrorInvalidValue;
  return launch(staged_patches_kernel<Pixel, kPatch, kPatches, kThreads>,
                dim3(static_cast<unsigned>(ceil_div(side, kPatches)), side, static_cast<unsigned>(params.batch)), kThreads,
                stream, static_cast<const Pixel*>(params.images), static_cast<__half*>(params.out),
                params.resolution, side);
}

// A variant's number reads width, units, threads: 42128 is 4 halves, 2 units, 128 threads.
template <class Pixel, int kPatch>
cudaError_t workshop_patches(const ClipExtractPatchesParams& params, cudaStream_t stream) {
  const int variant = clip_workshop_patches;
#define TRY(width, units, threads) \
  if (variant == width * 10000 + units * 1000 + threads) \
    return launch_extract_patches<Pixel, kPatch, width, units, threads>(params, stream);
#define TRY_UNITS(width, units) TRY(width, units, 128) TRY(width, units, 256)
#define TRY_WIDTH(width) TRY_UNITS(width, 1) TRY_UNITS(width, 2) TRY_UNITS(width, 3) TRY_UNITS(width, 4) TRY_UNITS(width, 6)
  TRY_WIDTH(2)
  TRY_WIDTH(4)
  if (kPatch % 8 == 0 || params.resolution / kPatch % 2 == 0) TRY_WIDTH(8)
  if constexpr (kPatch == 14) {
    if (variant == 208256) return launch_staged_patches<Pixel, kPatch, 8, 256>(params, stream);
    if (variant == 216256) return launch_staged_patches<Pixel, kPatch, 16, 256>(params, stream);
    if (variant == 216352) return launch_staged_patches<Pixel, kPatch, 16, 352>(params, stream);
  }
  return cudaErrorInvalidValue;
}
#endif

constexpr int kPatchThreads = 128;

template <class Pixel, int kPatch, int kWidth>
cudaError_t extract_patches_of(const ClipExtractPatchesParams& params, int sm_count, cudaStream_t stream) {
#ifdef CLIP_ELEMENTWISE_WORKSHOP
  if constexpr (kPatch != 0)
    if (clip_workshop_patches != 0) return workshop_patches<Pixel, kPatch>(params, stream);
#endif
  // Two vectors to a thread once there are several blocks for every multiprocessor.
  const int64_t vectors = params.batch * params.resolution * params.resolution * kClipImageChannels / kWidth;
  return vectors >= int64_t(sm_count) * 16 * kPatchThreads
             ? launch_extract_patches<Pixel, kPatch, kWidth, 2, kPatchThreads>(params, stream)
             : launch_extract_patches<Pixel, kPatch, kWidth, 1, kPatchThreads>(params, stream);
}

template <class Pixel>
cudaError_t extract_patches(const ClipExtractPatchesParams& params, int sm_count, cudaStream_t stream) {
  if (params.patch_size == 32) return extract_patches_of<Pixel, 32, 4>(params, sm_count, stream);
  if (params.patch_size == 16) return extract_patches_of<Pixel, 16, 4>(params, sm_count, stream);
  if (params.patch_size == 14) return extract_patches_of<Pixel, 14, 2>(params, sm_count, stream);
  return extract_patches_of<Pixel, 0, 2>(params, sm_count, stream);
}

// ---------------------------------------------------------------------------------------------
// The first rows

#ifdef CLIP_ELEMENTWISE_WORKSHOP
// As load_floats, but here and not where the compiler would rather have it.
__device__ __forceinline__ void load_now(const float4* from, int64_t vector, float (&x)[kVector]) {
#pragma unroll
  for (int i = 0; i < 2; ++i)
    asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x[4 * i]), "=f"(x[4 * i + 1]), "=f"(x[4 * i + 2]), "=f"(x[4 * i + 3])
                 : "l"(from + 2 * vector + i)
                 : "memory");
}

// As normalise, but mean and squared deviations come from one round of shuffles and one barrier: of two halves
// of equal size, the deviations from the common mean are those from each's own and the distance of the means. Only for
// rows that fill every lane.
template <class Team, int kRows>
__device__ __forceinline__ void normalise_merged(float (&x)[kRows][Team::kVectors][kVector], const Norm& norm,
                                                 float2 (&partial)[Team::kWarps][kRows]) {
  constexpr float kCount = Team::kVectors * kVector;
  float mean[kRows], deviation[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    float sum = 0;
#pragma unroll
    for (int v = 0; v < Team::kVectors; ++v)
#pragma unroll
      for (int i = 0; i < kVector; ++i) sum += x[r][v][i] - x[r][0][0];
    mean[r] = fmaf(sum, 1 / kCount, x[r][0][0]);
    deviation[r] = 0;
#pragma unroll
    for (int v = 0; v < Team::kVectors; ++v)
#pragma unroll
      for (int i = 0; i < kVector; ++i) deviation[r] = fmaf(x[r][v][i] - mean[r], x[r][v][i] - mean[r], deviation[r]);
  }
#pragma unroll
  for (int offset = 1; offset < kLanes; offset *= 2)
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float other = __shfl_xor_sync(0xffffffffu, mean[r], offset);
      const float distance = other - mean[r];
      deviation[r] += __shfl_xor_sync(0xffffffffu, deviation[r], offset);
      deviation[r] = fmaf(distance * distance, kCount / 2 * offset, deviation[r]);
      mean[r] = 0.5f * (mean[r] + other);
    }
  if (Team::kWarps > 1) {
    if (threadIdx.x % kLanes == 0)
#pragma unroll
      for (int r = 0; r < kRows; ++r) partial[threadIdx.x / kLanes][r] = {mean[r], deviation[r]};
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float one = partial[0][r].x;
      float distance = 0, between = 0;
      deviation[r] = 0;
#pragma unroll
      for (int warp = 0; warp < Team::kWarps; ++warp) {
        const float2 other = partial[warp][r];
        distance += other.x - one;
        deviation[r] += other.y;
      }
      mean[r] = fmaf(distance, 1.0f / Team::kWarps, one);
#pragma unroll
      for (int warp = 0; warp < Team::kWarps; ++warp) {
        const float apart = partial[warp][r].x - mean[r];
        between = fmaf(apart, apart, between);
      }
      deviation[r] = fmaf(between, kCount * kLanes, deviation[r]);
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const float inverse = rsqrtf(fmaf(deviation[r], norm.inverse_width, norm.epsilon));
#pragma unroll
    for (int v = 0; v < Team::kVectors; ++v)
#pragma unroll
      for (int i = 0; i < kVector; ++i) x[r][v][i] = (x[r][v][i] - mean[r]) * inverse;
  }
}
#endif

// The blocks of one x take one token, each of kImages images to a team.
template <class Team, int kImages, bool kMerged = false, bool kEarly = false>
__global__ void __launch_bounds__(Team::kThreads)
    embed_image_kernel(const uint4* __restrict__ patches, const float4* __restrict__ class_token,
                       const float4* __restrict__ positions, const float4* __restrict__ scale_pre,
                       const float4* __restrict__ shift_pre, const float4* __restrict__ scale_1,
                       const float4* __restrict__ shift_1, uint4* __restrict__ x, uint4* __restrict__ y, int64_t batch,
                       int vectors, Norm norm_pre, Norm norm_1) {
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
        packed[i][v] = patches[((first + (image_here(i) ? i : 0)) * (tokens - 1) + token - 1) * vectors + columns[v]];
  float values[kImages][Team::kVectors][kVector];
#ifdef CLIP_ELEMENTWISE_WORKSHOP
  float early[4][Team::kVectors][kVector];
  if (kEarly)
#pragma unroll
    for (int v = 0; v < Team::kVectors; ++v) {
      load_now(scale_pre, columns[v], early[0][v]), load_now(shift_pre, columns[v], early[1][v]);
      load_now(scale_1, columns[v], early[2][v]), load_now(shift_1, columns[v], early[3][v]);
    }
#endif
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

  const auto normalised = [&](const float4* scale, const float4* shift, const Norm& norm, uint4* out, bool again) {
#ifdef CLIP_ELEMENTWISE_WORKSHOP
    if (kMerged) {
      __shared__ float2 merged[2][Team::kWarps][kImages];
      normalise_merged<Team, kImages>(values, norm, merged[again]);
    } else
#endif
    {
      __shared__ float partial[2][Team::kWarps][kImages];
      normalise<Team, kImages>(values, columns, norm, partial);
    }
#pragma unroll
    for (int v = 0; v < Team::kVectors; ++v) {
      float scaling[kVector], shifting[kVector];
#ifdef CLIP_ELEMENTWISE_WORKSHOP
      if (kEarly) {
#pragma unroll
        for (int j = 0; j < kVector; ++j) scaling[j] = early[2 * again][v][j], shifting[j] = early[2 * again + 1][v][j];
      } else
#endif
      {
        load_floats(scale, columns[v], scaling);
        load_floats(shift, columns[v], shifting);
      }
#pragma unroll
      for (int i = 0; i < kImages; ++i) {
#pragma unroll
        for (int j = 0; j < kVector; ++j) values[i][v][j] = fmaf(values[i][v][j], scaling[j], shifting[j]);
        const uint4 rounded = pack(values[i][v]);
        unpack(rounded, values[i][v]);
        if (columns.here(v) && image_here(i)) out[((first + i) * tokens + token) * vectors + columns[v]] = rounded;
      }
    }
  };
  normalised(scale_pre, shift_pre, norm_pre, x, false);
  normalised(scale_1, shift_1, norm_1, y, true);
}

template <class Team, int kImages, bool kMerged = false, bool kEarly = false>
cudaError_t launch_embed_image(const ClipEmbedImageParams& params, cudaStream_t stream) {
  return launch(embed_image_kernel<Team, kImages, kMerged, kEarly>,
                grid(params.tokens, ceil_div(params.batch, Team::kTeams * kImages)), Team::kThreads, stream,
                static_cast<const uint4*>(params.patches), static_cast<const float4*>(params.class_token),
                static_cast<const float4*>(params.positions), static_cast<const float4*>(params.scale_pre),
                static_cast<const float4*>(params.shift_pre), static_cast<const float4*>(params.scale_1),
                static_cast<const float4*>(params.shift_1), static_cast<uint4*>(params.x),
                static_cast<uint4*>(params.y), params.batch, params.width / kVector,
                norm_of(params.width, params.epsilon_pre), norm_of(params.width, params.epsilon_1));
}

#ifdef CLIP_ELEMENTWISE_WORKSHOP
// A variant's number reads images, merged, early, warps to a row (0: as many as give a lane one vector).
template <class Usual>
cudaError_t workshop_embed(const ClipEmbedImageParams& params, cudaStream_t stream) {
  const int variant = clip_workshop_embed;
  const bool full = params.width == Usual::kStep * Usual::kVectors * kVector;
#define TRY_EMBED(number, team, ...) \
  if (variant == number) return launch_embed_image<team, __VA_ARGS__>(params, stream);
  TRY_EMBED(1000, Usual, 1)
  TRY_EMBED(2000, Usual, 2)
  TRY_EMBED(4000, Usual, 4)
  TRY_EMBED(1010, Usual, 1, false, true)
  TRY_EMBED(2010, Usual, 2, false, true)
  if (full) {
    TRY_EMBED(1100, Usual, 1, true)
    TRY_EMBED(2100, Usual, 2, true)
    TRY_EMBED(4100, Usual, 4, true)
    TRY_EMBED(1110, Usual, 1, true, true)
    TRY_EMBED(2110, Usual, 2, true, true)
  }
  if (params.width == 768) {
    using Warp = Team<1, 4, 3>;
    TRY_EMBED(1001, Warp, 1)
    TRY_EMBED(2001, Warp, 2)
    TRY_EMBED(1101, Warp, 1, true)
    TRY_EMBED(2101, Warp, 2, true)
  }
  if (params.width == 1024) {
    using Warp = Team<1, 4, 4>;
    using Pair = Team<2, 1, 2>;
    TRY_EMBED(1001, Warp, 1)
    TRY_EMBED(1101, Warp, 1, true)
    TRY_EMBED(1002, Pair, 1)
    TRY_EMBED(2002, Pair, 2)
    TRY_EMBED(1102, Pair, 1, true)
    TRY_EMBED(2102, Pair, 2, true)
  }
  return cudaErrorInvalidValue;
}
#endif

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
  return params->half ? extract_patches<__half>(*params, sm_count, stream)
                      : extract_patches<float>(*params, sm_count, stream);
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
  return with_team(params->width, [&](auto team) {
    using Team = decltype(team);
#ifdef CLIP_ELEMENTWISE_WORKSHOP
    if (clip_workshop_embed != 0) return workshop_embed<Team>(*params, stream);
#endif
    // Two images to a block, once there are enough rows for every multiprocessor.
    if constexpr (Team::kVectors == 1)
      if (params->batch * params->tokens >= int64_t(sm_count) * 8) return launch_embed_image<Team, 2>(*params, stream);
    return launch_embed_image<Team, 1>(*params, stream);
  });
}
