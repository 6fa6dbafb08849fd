// Fused attention for CLIP: the interface between callers (the TensorRT plugin, the PyTorch op, the
// benchmark) and the kernels. Pointers, sizes and a stream only: neither Torch nor TensorRT.
//
//   qkv  fp16 [batch, tokens, 3 * heads * D], contiguous, as CLIP's QKV linear writes it: blocks
//        q | k | v, each heads * D wide, head h in columns D h .. D h + D - 1 of its block
//   out  fp16 [batch, tokens, heads * D], contiguous; with out_scale E4M3, of the fp32 result over
//        out_scale, where what is beyond 448 becomes 448 and NaN stays NaN
//   query_bias  fp32 [heads * D], or NULL for none
//   out = softmax((q + query_bias) k^T / sqrt(D)) v per image and head; with `causal`, token i
//   sees tokens 0 .. i. D, the head dimension, is 64, or on sm_90a 72, 80, 88 or 104. The bias is
//   rounded to fp16 and added in fp16, as the linear layer of an fp16 model adds it.
//
// The bias of a QKV linear layer need not be in qkv: that of k adds the same to every score of a
// row and so drops out of the softmax, that of v adds itself to the output (weights sum to 1) and
// can be folded into the bias of the layer behind; that of q is `query_bias`.
//
// Products and softmax accumulate in fp32. Same input, same bits.
#ifndef CLIP_TTRT_ATTENTION_H_
#define CLIP_TTRT_ATTENTION_H_

#include <cuda_runtime_api.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
  kClipAttentionMaxHeadDim = 104,
  kClipAttentionMaxHeads = 40,
  kClipAttentionMaxTokens = 1024,
};

// Plain data, also filled through ctypes (clip_ttrt/kernels.py): keep the two alike.
typedef struct ClipAttentionParams {
  const void* qkv;         // device, 16-byte aligned
  void* out;               // device, 16-byte aligned
  const void* query_bias;  // device, 16-byte aligned, or NULL
  int64_t batch;           // >= 1
  int32_t heads;           // 1 .. kClipAttentionMaxHeads
  int32_t tokens;          // 1 .. kClipAttentionMaxTokens
  int32_t head_dim;        // D
  int32_t causal;          // 0 or 1
  int32_t variant;         // 0: the automatic choice; else an id that clip_attention_variant knows
  float out_scale;         // 0, or a normal number above 0
} ClipAttentionParams;

// Enqueues on `stream` and returns at once; safe in CUDA-graph capture; allocates nothing.
// cudaErrorInvalidValue: a size or a pointer outside the contract above, or a variant that does not
// serve these sizes. cudaErrorNoKernelImageForDevice: the GPU is older than sm_80.
// cudaErrorNotSupported: it is older than sm_89, and out_scale asks for E4M3.
cudaError_t clip_attention_launch(const ClipAttentionParams* params, cudaStream_t stream);

// 1 where clip_attention_launch serves these sizes on a GPU of compute capability
// sm_major.sm_minor.
int32_t clip_attention_supported(int64_t batch, int32_t heads, int32_t tokens, int32_t head_dim,
                                 int32_t sm_major, int32_t sm_minor);

// The variant that `variant = 0` stands for: a pure function of its arguments.
int32_t clip_attention_choose(int64_t batch, int32_t heads, int32_t tokens, int32_t head_dim,
                              int32_t causal, int32_t sm_major, int32_t sm_minor, int32_t sm_count);

// Name of the index-th variant and its id through `id`; NULL past the last one.
const char* clip_attention_variant(int32_t index, int32_t* id);

// 1 where this variant can serve these sizes on this GPU.
int32_t clip_attention_variant_serves(int32_t variant, int32_t tokens, int32_t head_dim,
                                      int32_t causal, int32_t sm_major, int32_t sm_minor);

// sizeof(ClipAttentionParams): lets a caller in another language check that its copy agrees.
int32_t clip_attention_params_size(void);

#ifdef __cplusplus
}
#endif

#endif  // CLIP_TTRT_ATTENTION_H_
