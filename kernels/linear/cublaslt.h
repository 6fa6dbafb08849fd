// The part of cuBLASLt's C interface that linear.cpp uses, found at run time: the library is never
// linked, and what nvcc comes with need not include cublasLt.h.
//
// Names, values and layouts are those of cublasLt.h and cublas_api.h of 13.1. Descriptors are made
// by the library and held by pointer. tests/kernels/test_launchers.py compares this file with the
// header of PyTorch's cuBLAS wheel.
#ifndef CLIP_TTRT_CUBLASLT_H_
#define CLIP_TTRT_CUBLASLT_H_

#include <cuda_runtime_api.h>
#include <library_types.h>
#include <stddef.h>
#include <stdint.h>

namespace cublaslt {

using cublasStatus_t = int;
using cublasLtHandle_t = struct Context*;
using cublasLtMatmulDesc_t = struct MatmulDesc*;
using cublasLtMatrixLayout_t = struct MatrixLayout*;
using cublasLtMatmulPreference_t = struct MatmulPreference*;

enum : int {
  CUBLAS_STATUS_SUCCESS = 0,
  CUBLAS_STATUS_NOT_SUPPORTED = 15,
  CUBLAS_OP_T = 1,
  CUBLAS_COMPUTE_32F = 68,
  CUBLASLT_EPILOGUE_BIAS = 4,
  CUBLASLT_REDUCTION_SCHEME_NONE = 0,
  CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE = 2,
  // attributes of a product
  CUBLASLT_MATMUL_DESC_TRANSA = 3,        // int32_t
  CUBLASLT_MATMUL_DESC_EPILOGUE = 7,      // uint32_t
  CUBLASLT_MATMUL_DESC_BIAS_POINTER = 8,  // const void*
  CUBLASLT_MATMUL_DESC_FAST_ACCUM = 25,   // int8_t
  // attributes of a preference
  CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES = 1,    // uint64_t
  CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK = 3,  // uint32_t
  CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES = 5,  // uint32_t, so the next three
  CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES = 6,
  CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES = 7,
  CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES = 8,
};

struct cublasLtMatmulAlgo_t {
  uint64_t data[8];
};

struct cublasLtMatmulHeuristicResult_t {
  cublasLtMatmulAlgo_t algo;
  size_t workspaceSize;
  cublasStatus_t state;
  float wavesCount;
  int reserved[4];
};

// The functions, as members of the same names.
struct Functions {
  size_t (*cublasLtGetVersion)();
  cublasStatus_t (*cublasLtCreate)(cublasLtHandle_t*);
  cublasStatus_t (*cublasLtMatmulDescCreate)(cublasLtMatmulDesc_t*, int compute_type,
                                             cudaDataType_t scale_type);
  cublasStatus_t (*cublasLtMatmulDescDestroy)(cublasLtMatmulDesc_t);
  cublasStatus_t (*cublasLtMatmulDescSetAttribute)(cublasLtMatmulDesc_t, int attribute, const void*,
                                                   size_t);
  cublasStatus_t (*cublasLtMatrixLayoutCreate)(cublasLtMatrixLayout_t*, cudaDataType type,
                                               uint64_t rows, uint64_t columns,
                                               int64_t leading_dimension);
  cublasStatus_t (*cublasLtMatrixLayoutDestroy)(cublasLtMatrixLayout_t);
  cublasStatus_t (*cublasLtMatmulPreferenceCreate)(cublasLtMatmulPreference_t*);
  cublasStatus_t (*cublasLtMatmulPreferenceDestroy)(cublasLtMatmulPreference_t);
  cublasStatus_t (*cublasLtMatmulPreferenceSetAttribute)(cublasLtMatmulPreference_t, int attribute,
                                                         const void*, size_t);
  cublasStatus_t (*cublasLtMatmulAlgoGetHeuristic)(
      cublasLtHandle_t, cublasLtMatmulDesc_t, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
      cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d, cublasLtMatmulPreference_t, int wanted,
      cublasLtMatmulHeuristicResult_t*, int* found);
  cublasStatus_t (*cublasLtMatmulAlgoCheck)(cublasLtHandle_t, cublasLtMatmulDesc_t,
                                            cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                            cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                            const cublasLtMatmulAlgo_t*,
                                            cublasLtMatmulHeuristicResult_t*);
  cublasStatus_t (*cublasLtMatmul)(cublasLtHandle_t, cublasLtMatmulDesc_t, const void* alpha,
                                   const void* a, cublasLtMatrixLayout_t, const void* b,
                                   cublasLtMatrixLayout_t, const void* beta, const void* c,
                                   cublasLtMatrixLayout_t, void* d, cublasLtMatrixLayout_t,
                                   const cublasLtMatmulAlgo_t*, void* workspace,
                                   size_t workspace_bytes, cudaStream_t);
};

}  // namespace cublaslt

#endif  // CLIP_TTRT_CUBLASLT_H_
