// The work around CLIP's matrix products that is not one: the interface between callers (the
// TensorRT plugins, PyTorch, the benchmark) and the kernels. Pointers, sizes and a stream only:
// neither Torch nor TensorRT.
//
// Tensors are fp16 rows, contiguous; constants are fp32. All are in device memory and 16-byte
// aligned; outputs overlap nothing. Widths are multiples of 8. Arithmetic is fp32. Same input, same
// bits. out_scale: 0, or a normal number above 0: the output is E4M3 then, of the fp32 result over
// out_scale, where what is beyond 448 becomes 448 and NaN stays NaN; it needs a GPU from sm_89 on,
// and cudaErrorNotSupported answers on others. The launches enqueue on `stream` and return at once,
// are safe in CUDA-graph capture, and allocate nothing. No rows: nothing to do.
// cudaErrorInvalidValue: a size or a pointer outside the contract. cudaErrorNoKernelImageForDevice:
// the GPU is older than sm_80.
#ifndef CLIP_TTRT_ELEMENTWISE_H_
#define CLIP_TTRT_ELEMENTWISE_H_

#include <cuda_runtime_api.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
  kClipElementwiseWidthStep = 8,  // widths are multiples of it
  kClipGeluMaxWidth = 65536,
  kClipLayerNormMaxWidth = 8192,
  kClipElementwiseMaxRows = 2147483647,
  kClipMaxResolution = 4096,
  kClipImageChannels = 3,
};

// Plain data, also filled through ctypes (clip_ttrt/kernels.py): keep the two alike.

// What GELU(y) is, as fields named `approximate` have it.
enum {
  kClipGeluQuick = 0,  // y sigmoid(1.702 y)
  kClipGeluTanh = 1,   // y / 2 (1 + tanh(sqrt(2 / pi) (y + 0.044715 y^3)))
  kClipGeluNone = 2,   // y / 2 (1 + erf(y / sqrt(2)))
};

// [rows, width] and [width]: out = GELU(in + bias)
typedef struct ClipBiasGeluParams {
  const void* in;
  const void* bias;  // or NULL
  void* out;
  int64_t rows;   // 0 .. kClipElementwiseMaxRows
  int32_t width;  // 8 .. kClipGeluMaxWidth
  int32_t approximate;
  float out_scale;
} ClipBiasGeluParams;

cudaError_t clip_bias_gelu_launch(const ClipBiasGeluParams* params, cudaStream_t stream);

// [rows, width] and [width]: sum_out = s, rounded to fp16, with s = x + delta + bias
// out = (s - mean(s)) / sqrt(variance(s) + epsilon) * scale + shift, of the rounded s: what sum_out
// holds. out_scale is of out alone.
typedef struct ClipResidualLayerNormParams {
  const void* x;
  const void* delta;  // or NULL
  const void* bias;   // or NULL
  const void* scale;
  const void* shift;
  void* sum_out;  // or NULL
  void* out;
  int64_t rows;   // 0 .. kClipElementwiseMaxRows
  int32_t width;  // 8 .. kClipLayerNormMaxWidth
  float epsilon;  // > 0
  float out_scale;
} ClipResidualLayerNormParams;

cudaError_t clip_residual_layer_norm_launch(const ClipResidualLayerNormParams* params,
                                            cudaStream_t stream);

// Images [batch, 3, resolution, resolution], fp32 or fp16, to one row for each patch, fp16 [batch *
// side * side, 3 * patch_size * patch_size] with side = resolution / patch_size. A row holds a
// patch by channel, row and column, as a convolution's weight does; an image's patches are in rows
// of the image.
typedef struct ClipExtractPatchesParams {
  const void* images;
  void* out;
  int64_t batch;       // >= 0; batch * side * side at most kClipElementwiseMaxRows
  int32_t resolution;  // up to kClipMaxResolution
  int32_t patch_size;  // even, divides resolution
  int32_t half;        // 1: the images are fp16, 0: fp32
} ClipExtractPatchesParams;

cudaError_t clip_extract_patches_launch(const ClipExtractPatchesParams* params,
                                        cudaStream_t stream);

// An image's first rows: the class token [width], then its tokens - 1 patches [batch * (tokens -
// 1), width], plus positions [tokens, width]; of that x, the layer norm with epsilon_pre, scale_pre
// and shift_pre, rounded; and of the rounded x, y, the layer norm with epsilon_1, scale_1 and
// shift_1. x and y: [batch * tokens, width].
typedef struct ClipEmbedImageParams {
  const void* patches;  // the only fp16 input
  const void* class_token;
  const void* positions;
  const void* scale_pre;
  const void* shift_pre;
  const void* scale_1;
  const void* shift_1;
  void* x;
  void* y;
  int64_t batch;      // >= 0; batch * tokens at most kClipElementwiseMaxRows
  int32_t tokens;     // >= 2: the class token and a patch
  int32_t width;      // 8 .. kClipLayerNormMaxWidth
  float epsilon_pre;  // > 0
  float epsilon_1;    // > 0
  float out_scale;    // of y
} ClipEmbedImageParams;

cudaError_t clip_embed_image_launch(const ClipEmbedImageParams* params, cudaStream_t stream);

// sizeof the structs: lets a caller in another language check that its copies agree.
int32_t clip_bias_gelu_params_size(void);
int32_t clip_residual_layer_norm_params_size(void);
int32_t clip_extract_patches_params_size(void);
int32_t clip_embed_image_params_size(void);

#ifdef __cplusplus
}
#endif

#endif  // CLIP_TTRT_ELEMENTWISE_H_
