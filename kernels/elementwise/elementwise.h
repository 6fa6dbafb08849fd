// The elementwise work between CLIP's matrix products: the interface between callers (the TensorRT plugins,
// PyTorch, the benchmark) and the kernels. Pointers, sizes and a stream only: neither Torch nor TensorRT.
//
// Tensors are [rows, width], fp16, contiguous; constants are fp32 [width]. All are in device memory and 16-byte
// aligned; outputs overlap nothing. Arithmetic is fp32. Same input, same bits. Both functions enqueue on
// `stream` and return at once, are safe in CUDA-graph capture, and allocate nothing. No rows: nothing to do.
// cudaErrorInvalidValue: a size or a pointer outside the contract. cudaErrorNoKernelImageForDevice: the GPU is
// older than sm_80.
#ifndef CLIP_TTRT_ELEMENTWISE_H_
#define CLIP_TTRT_ELEMENTWISE_H_

#include <cuda_runtime_api.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
  kClipElementwiseWidthStep = 8,  // widths are multiples of it
  kClipQuickGeluMaxWidth = 65536,
  kClipLayerNormMaxWidth = 8192,
  kClipElementwiseMaxRows = 2147483647,
};

// Plain data, also filled through ctypes (clip_ttrt/elementwise.py): keep the two alike.

// out = y sigmoid(1.702 y) with y = in + bias
typedef struct ClipBiasQuickGeluParams {
  const void* in;
  const void* bias;  // or NULL
  void* out;
  int64_t rows;     // 0 .. kClipElementwiseMaxRows
  int32_t width;    // 8 .. kClipQuickGeluMaxWidth
  int32_t variant;  // 0: the automatic choice; else an id that clip_bias_quick_gelu_variant knows
} ClipBiasQuickGeluParams;

cudaError_t clip_bias_quick_gelu_launch(const ClipBiasQuickGeluParams* params, cudaStream_t stream);

// sum_out = s, rounded to fp16, with s = x + delta + bias
// out = (s - mean(s)) / sqrt(variance(s) + epsilon) * scale + shift, of the rounded s: what sum_out holds
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
  int32_t variant;  // 0: the automatic choice; else an id that clip_residual_layer_norm_variant knows
} ClipResidualLayerNormParams;

cudaError_t clip_residual_layer_norm_launch(const ClipResidualLayerNormParams* params, cudaStream_t stream);

// Name of the index-th variant and its id through `id`; NULL past the last one.
const char* clip_bias_quick_gelu_variant(int32_t index, int32_t* id);
const char* clip_residual_layer_norm_variant(int32_t index, int32_t* id);

// Only in a library that was built with TensorRT's headers: registers the plugins (elementwise_plugin.cpp) if
// libnvinfer is loaded in this process. 1: TensorRT knows both now, also if it did before. Loading the
// library calls it too, so only a program that loads TensorRT later needs to.
int32_t clip_elementwise_register_plugins(void);

// sizeof the two structs: lets a caller in another language check that its copies agree.
int32_t clip_bias_quick_gelu_params_size(void);
int32_t clip_residual_layer_norm_params_size(void);

#ifdef __cplusplus
}
#endif

#endif  // CLIP_TTRT_ELEMENTWISE_H_
