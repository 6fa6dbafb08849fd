// Pictures of any sizes to an encoder's input: resize, crop, normalise. Interface: preprocess.h.
//
//   first_pass_kernel   a thread has one position of the first axis for kLines lines and all
//                       interleaved channels, so that a weight is loaded once for 24 pixels
//   second_pass_kernel  a thread has four neighbouring positions of the first axis and one of the
//                       second: words read and written, values looked up in shared memory
//
// Between them are bytes, [channels, lines, pitch] of a picture, which stay in the L2 cache.

#include "preprocess.h"

namespace {

constexpr int kBits = 22;          // of a weight
constexpr int kLines = 8;          // that a thread of the first pass has
constexpr int kQuad = 4;           // positions that one of the second pass has
constexpr int kMostThreads = 256;  // of a block
constexpr int kGridY = 65535;      // the most blocks a grid has in y
constexpr int kBlocks = 8192;      // enough for any GPU

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int pitch_of(int resolution) {
  return static_cast<int>(ceil_div(resolution, kQuad)) * kQuad;
}

__device__ __forceinline__ uint8_t to_byte(int sum) {
  const int rounded = sum >> kBits;
  return static_cast<uint8_t>(rounded < 0 ? 0 : rounded > 255 ? 255 : rounded);
}

// A table at one of its positions.
struct Window {
  int start, count;
  const int32_t* weights;  // `resolution` apart
};

__device__ __forceinline__ Window window_at(const int32_t* table, int resolution, int position) {
  return {table[position], table[resolution + position], table + 2 * resolution + position};
}

// ---------------------------------------------------------------------------------------------
// First pass

// One position of kLines lines from `line` on, for kChannels channels that are one byte apart.
// Lines past the last one are computed as the last and not written.
template <int kChannels>
__device__ __forceinline__ void first_pass(const uint8_t* pixels,
                                           const ClipPreprocessPicture& picture,
                                           const Window& window, int resolution, int64_t line,
                                           uint8_t* between) {
  const uint8_t* rows[kLines];
  int sums[kLines][kChannels];
#pragma unroll
  for (int l = 0; l < kLines; ++l) {
    const int64_t here = line + l < picture.lines ? line + l : picture.lines - 1;
    rows[l] = pixels + window.start * picture.along + here * picture.across;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) sums[l][c] = 1 << (kBits - 1);
  }
  const int32_t* weights = window.weights;
#pragma unroll 1
  for (int k = 0; k < window.count; ++k) {
    const int weight = *weights;
    weights += resolution;
#pragma unroll
    for (int l = 0; l < kLines; ++l) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) sums[l][c] += weight * rows[l][c];
      rows[l] += picture.along;
    }
  }
  const int pitch = pitch_of(resolution);
#pragma unroll
  for (int l = 0; l < kLines; ++l) {
    if (line + l >= picture.lines) break;
#pragma unroll
    for (int c = 0; c < kChannels; ++c)
      between[(c * picture.lines + line + l) * pitch] = to_byte(sums[l][c]);
  }
}

// Blocks in y are pictures, those in x share a picture's lines; threads are positions.
__global__ void __launch_bounds__(kMostThreads, 3)
    first_pass_kernel(const ClipPreprocessPicture* pictures, const int32_t* tables,
                      uint8_t* workspace, int64_t batch, int resolution) {
  for (int64_t i = blockIdx.y; i < batch; i += gridDim.y) {
    const ClipPreprocessPicture& picture = pictures[i];
    if (picture.pixels == nullptr) continue;
    const uint8_t* pixels = static_cast<const uint8_t*>(picture.pixels);
    const bool interleaved = picture.channels == 3 && picture.channel == 1;
    const int64_t plane = picture.lines * pitch_of(resolution);
    for (int64_t line = int64_t(blockIdx.x) * kLines; line < picture.lines;
         line += int64_t(gridDim.x) * kLines)
      for (int position = threadIdx.x; position < resolution; position += blockDim.x) {
        const Window window = window_at(tables + picture.first, resolution, position);
        uint8_t* between = workspace + picture.between + position;
        if (interleaved) {
          first_pass<3>(pixels, picture, window, resolution, line, between);
        } else {
          for (int c = 0; c < picture.channels; ++c)
            first_pass<1>(pixels + c * picture.channel, picture, window, resolution, line,
                          between + c * plane);
        }
      }
  }
}

// ---------------------------------------------------------------------------------------------
// Second pass

template <class Value>
struct alignas(kQuad * sizeof(Value)) Quad {
  Value values[kQuad];
};

// Bytes of kQuad positions, for each of kChannels channels.
template <int kChannels>
__device__ __forceinline__ void second_pass(const ClipPreprocessPicture& picture,
                                            const Window& window, int resolution,
                                            const uint8_t* between, uint8_t (&bytes)[3][kQuad]) {
  int sums[kChannels][kQuad];
#pragma unroll
  for (int c = 0; c < kChannels; ++c)
#pragma unroll
    for (int j = 0; j < kQuad; ++j) sums[c][j] = 1 << (kBits - 1);
  const int pitch = pitch_of(resolution);
  const int32_t* weights = window.weights;
  const uint8_t* line = between + int64_t(window.start) * pitch;
  for (int k = 0; k < window.count; ++k) {
    const int weight = *weights;
    weights += resolution;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      const uint32_t word = *reinterpret_cast<const uint32_t*>(line + c * picture.lines * pitch);
#pragma unroll
      for (int j = 0; j < kQuad; ++j) sums[c][j] += weight * int(word >> (8 * j) & 255);
    }
    line += pitch;
  }
#pragma unroll
  for (int c = 0; c < 3; ++c)
#pragma unroll
    for (int j = 0; j < kQuad; ++j) bytes[c][j] = to_byte(sums[kChannels == 3 ? c : 0][j]);
}

// Blocks in y are pictures; threads in x share a picture's quads. whole: a picture's rows of output
// consist of aligned quads.
template <class Value>
__global__ void __launch_bounds__(kMostThreads)
    second_pass_kernel(const ClipPreprocessPicture* pictures, const int32_t* tables,
                       const Value* values, const uint8_t* workspace, Value* out, int64_t batch,
                       int resolution, bool whole) {
  __shared__ Value table[3 * 256];
  for (int v = threadIdx.x; v < 3 * 256; v += blockDim.x) table[v] = values[v];
  __syncthreads();
  const int quads = pitch_of(resolution) / kQuad;
  const int64_t plane = int64_t(resolution) * resolution;
  for (int64_t i = blockIdx.y; i < batch; i += gridDim.y) {
    const ClipPreprocessPicture& picture = pictures[i];
    Value* image = out + i * 3 * plane;
    for (int item = blockIdx.x * blockDim.x + threadIdx.x; item < resolution * quads;
         item += gridDim.x * blockDim.x) {
      const int second = item / quads, first = item % quads * kQuad;
      uint8_t bytes[3][kQuad] = {};
      if (picture.pixels != nullptr) {
        const Window window = window_at(tables + picture.second, resolution, second);
        const uint8_t* between = workspace + picture.between + first;
        if (picture.channels == 3)
          second_pass<3>(picture, window, resolution, between, bytes);
        else
          second_pass<1>(picture, window, resolution, between, bytes);
      }
#pragma unroll
      for (int c = 0; c < 3; ++c) {
        Quad<Value> quad;
#pragma unroll
        for (int j = 0; j < kQuad; ++j)
          quad.values[j] = picture.pixels == nullptr ? Value(0) : table[c * 256 + bytes[c][j]];
        if (whole && !picture.vertical) {
          Value* place = image + c * plane + int64_t(second) * resolution + first;
          *reinterpret_cast<Quad<Value>*>(place) = quad;
          continue;
        }
        const int64_t step = picture.vertical ? resolution : 1;
        const int64_t row = picture.vertical ? 1 : resolution;
#pragma unroll
        for (int j = 0; j < kQuad; ++j)
          if (first + j < resolution)
            image[c * plane + second * row + (first + j) * step] = quad.values[j];
      }
    }
  }
}

template <class... Params>
cudaError_t launch(void (*kernel)(Params...), dim3 blocks, int threads, cudaStream_t stream,
                   Params... params) {
  kernel<<<blocks, threads, 0, stream>>>(params...);
  return cudaGetLastError();
}

template <class Value>
cudaError_t launch_passes(const ClipPreprocessParams& params, cudaStream_t stream) {
  const auto* pictures = static_cast<const ClipPreprocessPicture*>(params.pictures);
  const auto* tables = static_cast<const int32_t*>(params.tables);
  auto* workspace = static_cast<uint8_t*>(params.workspace);
  auto* out = static_cast<Value*>(params.out);
  const int resolution = params.resolution;
  const unsigned rows = static_cast<unsigned>(params.batch < kGridY ? params.batch : kGridY);
  // A picture with many lines gets few blocks where there are many pictures: most of the blocks of
  // the others would have nothing to do.
  const int64_t most = ceil_div(kBlocks, rows) > 64 ? ceil_div(kBlocks, rows) : 64;
  const int64_t groups = ceil_div(params.most_lines, kLines);
  if (groups > 0) {
    const int rounds = static_cast<int>(ceil_div(resolution, kMostThreads));
    const int threads = static_cast<int>(ceil_div(ceil_div(resolution, rounds), 32)) * 32;
    const cudaError_t status =
        launch(first_pass_kernel, dim3(static_cast<unsigned>(groups < most ? groups : most), rows),
               threads, stream, pictures, tables, workspace, params.batch, resolution);
    if (status != cudaSuccess) return status;
  }
  const int64_t items = int64_t(resolution) * pitch_of(resolution) / kQuad;
  const bool whole = resolution % kQuad == 0 &&
                     reinterpret_cast<uintptr_t>(params.out) % alignof(Quad<Value>) == 0;
  return launch(second_pass_kernel<Value>,
                dim3(static_cast<unsigned>(ceil_div(items, kMostThreads)), rows), kMostThreads,
                stream, pictures, tables, static_cast<const Value*>(params.values),
                static_cast<const uint8_t*>(workspace), out, params.batch, resolution, whole);
}

bool usable(const void* pointer, int alignment) {
  return pointer != nullptr && reinterpret_cast<uintptr_t>(pointer) % alignment == 0;
}

}  // namespace

extern "C" int32_t clip_preprocess_params_size(void) { return sizeof(ClipPreprocessParams); }
extern "C" int32_t clip_preprocess_picture_size(void) { return sizeof(ClipPreprocessPicture); }

extern "C" cudaError_t clip_preprocess_launch(const ClipPreprocessParams* params,
                                              cudaStream_t stream) {
  if (params == nullptr || params->batch < 0 || params->batch > kClipPreprocessMaxBatch ||
      params->most_lines < 0 || params->resolution < 1 ||
      params->resolution > kClipPreprocessMaxResolution ||
      (params->value_bytes != 2 && params->value_bytes != 4))
    return cudaErrorInvalidValue;
  if (params->batch == 0) return cudaSuccess;
  const void* const aligned[] = {params->pictures, params->tables, params->values,
                                 params->workspace};
  for (const void* pointer : aligned)
    if (!usable(pointer, 16)) return cudaErrorInvalidValue;
  if (!usable(params->out, params->value_bytes)) return cudaErrorInvalidValue;
  return params->value_bytes == 2 ? launch_passes<uint16_t>(*params, stream)
                                  : launch_passes<uint32_t>(*params, stream);
}
