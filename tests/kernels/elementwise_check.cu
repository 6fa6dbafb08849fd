// Launches the elementwise kernels at sizes that leave lanes, rows and blocks over. For
// compute-sanitizer, where Python and PyTorch would take minutes; the numbers are checked in
// test_numbers.py.
//   nvcc -std=c++17 -gencode=arch=compute_90a,code=sm_90a -o check
//       tests/kernels/elementwise_check.cu kernels/elementwise/*.cu
//   compute-sanitizer --tool memcheck ./check      (also racecheck, initcheck, synccheck)
// Exit code 0 if every launch ran.

#include <cuda_runtime.h>

#include <cstdio>
#include <vector>

#include "../../kernels/elementwise/elementwise.h"

namespace {

std::vector<void*> buffers;

// Exactly so many bytes of zeros, so that the sanitizer sees what goes past them.
void* zeros(size_t bytes) {
  void* pointer = nullptr;
  if (cudaMalloc(&pointer, bytes) != cudaSuccess || cudaMemset(pointer, 0, bytes) != cudaSuccess)
    return nullptr;
  buffers.push_back(pointer);
  return pointer;
}

void* output(size_t bytes) {
  void* pointer = nullptr;
  if (cudaMalloc(&pointer, bytes) != cudaSuccess) return nullptr;
  buffers.push_back(pointer);
  return pointer;
}

size_t bytes_of(float out_scale) { return out_scale > 0 ? 1 : 2; }

bool finish(cudaError_t status, const char* what, int64_t rows, int width) {
  if (status == cudaSuccess) status = cudaDeviceSynchronize();
  for (void* pointer : buffers) cudaFree(pointer);
  buffers.clear();
  if (status != cudaSuccess)
    std::printf("%s %lld x %d: %s\n", what, static_cast<long long>(rows), width,
                cudaGetErrorString(status));
  return status == cudaSuccess;
}

// out_scale: 0, or that of an output in E4M3.
bool gelu(int64_t rows, int width, int approximate, bool bias, float out_scale) {
  ClipBiasGeluParams p = {};
  p.in = zeros(rows * width * 2), p.out = output(rows * width * bytes_of(out_scale)),
  p.bias = bias ? zeros(width * 4) : nullptr;
  p.rows = rows, p.width = width, p.approximate = approximate, p.out_scale = out_scale;
  return finish(clip_bias_gelu_launch(&p, nullptr), "gelu", rows, width);
}

bool layer_norm(int64_t rows, int width, bool residual, float out_scale) {
  ClipResidualLayerNormParams p = {};
  p.x = zeros(rows * width * 2), p.scale = zeros(width * 4), p.shift = zeros(width * 4),
  p.out = output(rows * width * bytes_of(out_scale));
  if (residual)
    p.delta = zeros(rows * width * 2), p.bias = zeros(width * 4),
    p.sum_out = output(rows * width * 2);
  p.rows = rows, p.width = width, p.epsilon = 1e-5f, p.out_scale = out_scale;
  return finish(clip_residual_layer_norm_launch(&p, nullptr), "layer_norm", rows, width);
}

bool patches(int batch, int patch, int resolution, int half) {
  ClipExtractPatchesParams p = {};
  const size_t pixels = size_t(batch) * 3 * resolution * resolution;
  p.images = zeros(pixels * (half ? 2 : 4)), p.out = output(pixels * 2);
  p.batch = batch, p.resolution = resolution, p.patch_size = patch, p.half = half;
  return finish(clip_extract_patches_launch(&p, nullptr), "extract_patches", batch, patch);
}

bool embed(int batch, int tokens, int width, float out_scale) {
  ClipEmbedImageParams p = {};
  p.patches = zeros(size_t(batch) * (tokens - 1) * width * 2),
  p.positions = zeros(size_t(tokens) * width * 4);
  p.class_token = zeros(width * 4), p.scale_pre = zeros(width * 4), p.shift_pre = zeros(width * 4);
  p.scale_1 = zeros(width * 4), p.shift_1 = zeros(width * 4);
  p.x = output(size_t(batch) * tokens * width * 2),
  p.y = output(size_t(batch) * tokens * width * bytes_of(out_scale)), p.out_scale = out_scale;
  p.batch = batch, p.tokens = tokens, p.width = width, p.epsilon_pre = p.epsilon_1 = 1e-5f;
  return finish(clip_embed_image_launch(&p, nullptr), "embed_image", batch, width);
}

}  // namespace

int main() {
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) {
    std::printf("no CUDA device\n");
    return 2;
  }
  std::vector<float> out_scales = {0};
  if (major * 10 + minor >= 89) out_scales.push_back(0.1f);
  bool ok = true;
  for (float out_scale : out_scales) {
    for (int width : {8, 64, 72, 192, 264, 512, 520, 768, 1000, 1024, 1032, 2056, 4104, 8192})
      for (int rows : {1, 5, 50, 1601})
        for (bool with : {false, true}) {
          for (int approximate : {0, 1, 2})
            ok = gelu(rows, width, approximate, with, out_scale) && ok;
          ok = layer_norm(rows, width, with, out_scale) && ok;
        }
    ok = gelu(8224, 4096, 0, true, out_scale) && ok;
    for (int width : {8, 264, 512, 768, 1000, 1024, 4104})
      for (int batch : {2, 3, 33}) ok = embed(batch, batch == 2 ? 2 : 50, width, out_scale) && ok;
  }
  for (int half : {0, 1})
    for (int batch : {1, 3}) {
      for (int patch : {2, 6, 12, 14}) ok = patches(batch, patch, 3 * patch, half) && ok;
      for (int patch : {14, 16, 32}) ok = patches(batch, patch, 224, half) && ok;
    }
  for (int patch : {14, 16, 32})
    ok = patches(9, patch, 224, 0) && patches(9, patch, 7 * patch, 0) && ok;
  std::printf("%s\n", ok ? "every launch ran" : "FAILED");
  return ok ? 0 : 1;
}
