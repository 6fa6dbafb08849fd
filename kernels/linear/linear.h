// Linear layers through cuBLASLt with algorithms that were measured: the interface between callers
// (the TensorRT plugin, PyTorch, the benchmark) and the launcher. Pointers, sizes and a stream
// only: neither Torch nor TensorRT.
//
// out[rows, outputs] = x[rows, inputs] weight[outputs, inputs]^T + bias[outputs], all fp16,
// contiguous, in device memory and 16-byte aligned; out and workspace overlap nothing. Sums are
// fp32. With a scale x and weight are E4M3, and their product is multiplied by it; sums are then
// what cuBLASLt calls fast accumulation, of about 14 bits on sm_90. cuBLASLt is not linked: it is
// PyTorch's, the libcublasLt.so.13 that the process has loaded, or else the one that dlopen finds.
//
// Every function that returns int32_t returns 0, a cudaError_t (above 0; cudaErrorInvalidValue:
// outside the contract, found before any call to the driver), minus a cublasStatus_t, or
// kClipLinearNoLibrary. None throws.
#ifndef CLIP_TTRT_LINEAR_H_
#define CLIP_TTRT_LINEAR_H_

#include <cuda_runtime_api.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
  kClipLinearInputsStep = 4,      // inputs are multiples of it
  kClipLinearOutputsStep = 8,     // outputs are multiples of it
  kClipLinearQuantizedStep = 16,  // both are where x and weight are E4M3
  kClipLinearMaxWidth = 65536,
  kClipLinearMaxRows = 2147483647,
  kClipLinearMaxEntries = 64,
  kClipLinearWorkspaceBytes = 33554432,  // what a launch may use
  kClipLinearNoLibrary = -1000,
};

// Plain data, also filled through ctypes (clip_ttrt/kernels.py and linear.py): keep the two alike.

// The algorithm that was fastest for some rows.
typedef struct ClipLinearEntry {
  int64_t rows;           // 1 .. kClipLinearMaxRows
  uint64_t algorithm[8];  // cublasLtMatmulAlgo_t
} ClipLinearEntry;

// A layer's table: this, then `count` entries. It may be empty.
typedef struct ClipLinearTable {
  int32_t inputs;    // 4 .. kClipLinearMaxWidth
  int32_t outputs;   // 8 .. kClipLinearMaxWidth
  int32_t bias;      // 0 or 1
  int32_t count;     // 0 .. kClipLinearMaxEntries
  uint64_t version;  // cublasLtGetVersion() of the cuBLASLt that the entries are of
  float scale;       // 0: x and weight are fp16; a normal number above 0: E4M3
} ClipLinearTable;

// A layer, which remembers the algorithm of every number of rows that it has run: that of the
// table's entry whose rows are nearest by ratio, where cuBLASLt is of the table's version and
// accepts it; else the first of cuBLASLt's own suggestions. Any thread may launch it at any time.
typedef struct ClipLinear ClipLinear;

// table: `bytes` bytes, copied. cudaErrorInvalidValue: not a table.
int32_t clip_linear_create(const void* table, int64_t bytes, ClipLinear** made);
void clip_linear_destroy(ClipLinear* layer);

// Makes cuBLASLt ready on the current device, which the first launch does otherwise; a CUDA graph
// can then be captured.
int32_t clip_linear_prepare(void);

typedef struct ClipLinearParams {
  ClipLinear* layer;
  const void* x;
  const void* weight;
  const void* bias;  // where the layer has one, else NULL
  void* out;
  void* workspace;  // kClipLinearWorkspaceBytes
  int64_t rows;     // 0 .. kClipLinearMaxRows; 0: nothing to do
} ClipLinearParams;

// Enqueues on `stream` and returns at once; safe in CUDA-graph capture, allocates nothing on the
// GPU. Same input, same bits.
int32_t clip_linear_launch(const ClipLinearParams* params, cudaStream_t stream);

// Which algorithm is fastest on the current device, from what cuBLASLt suggests.
typedef struct ClipLinearTuneParams {
  const void* x;       // random, not zeros: a GPU computes with zeros faster
  const void* weight;  // `weights` matrices one after the other, which launches take in turns as
                       // the layers of a network do
  const void* bias;    // or NULL
  void* out;
  void* workspace;  // kClipLinearWorkspaceBytes
  int64_t rows;     // 1 .. kClipLinearMaxRows
  int32_t inputs;
  int32_t outputs;
  int32_t weights;            // >= 1
  int32_t quantized;          // 1: x and weight are E4M3, 0: fp16
  int32_t fast_accumulation;  // 0 or 1, of E4M3: a table's entries are measured with 1
  float milliseconds;  // suggestions are no longer added after this long, one being tried anyway
} ClipLinearTuneParams;

// Waits for its own work, on a stream of its own; the inputs must be complete. microseconds: of a
// launch; may be NULL.
int32_t clip_linear_tune(const ClipLinearTuneParams* params, ClipLinearEntry* best,
                         float* microseconds);

// cublasLtGetVersion(), such as 130100; 0 where there is no cuBLASLt.
uint64_t clip_linear_version(void);

// sizeof the structs: lets a caller in another language check that its copies agree.
int32_t clip_linear_params_size(void);
int32_t clip_linear_tune_params_size(void);
int32_t clip_linear_table_size(void);
int32_t clip_linear_entry_size(void);

#ifdef __cplusplus
}
#endif

#endif  // CLIP_TTRT_LINEAR_H_
