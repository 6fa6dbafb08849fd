// CLIP's preprocess of a batch of pictures, bit for bit as Pillow and torchvision do it: the
// interface between callers (PyTorch, C++) and the kernels. Pointers, sizes and a stream only:
// neither Torch nor TensorRT.
//
// A resize is two passes, each along one axis, with a byte between them. A pass follows a table of
// int32, made on the CPU as in clip_ttrt/pipeline/resize.py (`table`), with an entry for each of
// the `resolution` positions that are left after the crop:
//   start[resolution]               the first pixel that the position takes, from the pointer on
//   count[resolution]               how many it takes; 0 gives the byte 0, a border
//   weight[most counts][resolution] in units of 2^-22
// A byte is clamp((2^21 + sum of weight * pixel) >> 22, 0, 255) and becomes values[channel][byte].
//
// The launch enqueues two kernels on `stream` and returns at once, is safe in CUDA-graph capture,
// and allocates nothing. Same input, same bits. cudaErrorInvalidValue: a size or a pointer outside
// the contract. What descriptors and tables say is not checked.
#ifndef CLIP_TTRT_PREPROCESS_H_
#define CLIP_TTRT_PREPROCESS_H_

#include <cuda_runtime_api.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
  kClipPreprocessMaxResolution = 4096,
  kClipPreprocessMaxBatch = 2147483647,
};

// Plain data, also filled through ctypes and numpy (clip_ttrt/kernels.py): keep the two alike.

// A picture of uint8 in device memory with any strides, as the passes see it: the first goes along
// the axis `along`, for each of the `lines` positions across it that the second one needs.
typedef struct ClipPreprocessPicture {
  const void* pixels;  // the first pixel that is needed; NULL: the picture's output is 0
  int64_t along;       // bytes from a pixel to the next along the axis of the first pass
  int64_t across;      // ... along the axis of the second
  int64_t channel;     // ... to the next channel
  int64_t first;       // where the table of the first pass begins, an index in `tables`
  int64_t second;      // that of the second
  int64_t between;     // where in the workspace its channels * lines * pitch bytes lie, with
                       // pitch = resolution rounded up to 4; a multiple of 4
  int64_t lines;       // >= 1
  int64_t channels;    // 1: grey, written to all three channels; or 3
  int64_t vertical;    // 1: the first pass goes along columns, 0: along rows
} ClipPreprocessPicture;

typedef struct ClipPreprocessParams {
  const void* pictures;  // [batch] of ClipPreprocessPicture
  const void* tables;    // int32
  const void* values;    // [3, 256] of value_bytes each: a channel's value of a byte
  void* workspace;       // all of these are 16-byte aligned
  void* out;             // [batch, 3, resolution, resolution] of value_bytes each
  int64_t batch;         // 0 .. kClipPreprocessMaxBatch
  int64_t most_lines;    // of any of the pictures; 0 where all are NULL
  int32_t resolution;    // 1 .. kClipPreprocessMaxResolution
  int32_t value_bytes;   // 4: fp32; 2: fp16 or bf16
} ClipPreprocessParams;

cudaError_t clip_preprocess_launch(const ClipPreprocessParams* params, cudaStream_t stream);

// sizeof the structs: lets a caller in another language check that its copies agree.
int32_t clip_preprocess_params_size(void);
int32_t clip_preprocess_picture_size(void);

#ifdef __cplusplus
}
#endif

#endif  // CLIP_TTRT_PREPROCESS_H_
