// Runs variants of the attention kernel on small cases and compares with a float64 loop on the
// host. For compute-sanitizer, where Python and PyTorch would take minutes:
//   nvcc -std=c++17 -gencode=arch=compute_90a,code=sm_90a -o check
//       tests/kernels/attention_check.cu kernels/attention/attention.cu
//   compute-sanitizer --tool racecheck ./check 0          (variant 0: the automatic choice)
//   ./check 23 32 16 257 0 1 0.01 64     (variant batch heads tokens causal bias out_scale
//   head_dim)
// Exit code 0 if every case passed. `./check list` prints the ids of the variants.

#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../kernels/attention/attention.h"

namespace {

#define CHECK(call)                                                                         \
  do {                                                                                      \
    const cudaError_t status = (call);                                                      \
    if (status != cudaSuccess) {                                                            \
      std::printf("%s:%d %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(status)); \
      return false;                                                                         \
    }                                                                                       \
  } while (0)

// out_scale: 0, or that of an output in E4M3.
bool run(int variant, int batch, int heads, int tokens, int causal, int biased, float out_scale,
         int dim) {
  const int width = heads * dim;
  const size_t in_count = size_t(batch) * tokens * 3 * width,
               out_count = size_t(batch) * tokens * width;
  std::vector<__half> qkv(in_count);
  std::vector<unsigned char> out(out_count * (out_scale > 0 ? 1 : 2));
  unsigned state = 12345u + tokens;
  for (auto& x : qkv) {  // uniform in [-2, 2)
    state = state * 1664525u + 1013904223u;
    x = __float2half(float(state >> 8) / (1 << 22) - 2.0f);
  }
  std::vector<float> bias(width);
  for (auto& x : bias) {
    state = state * 1664525u + 1013904223u;
    x = biased ? float(state >> 8) / (1 << 22) - 2.0f : 0.0f;
  }
  void *device_qkv = nullptr, *device_out = nullptr, *device_bias = nullptr;
  CHECK(cudaMalloc(&device_qkv, in_count * 2));
  CHECK(cudaMalloc(&device_out, out.size()));
  if (biased) {
    CHECK(cudaMalloc(&device_bias, width * sizeof(float)));
    CHECK(cudaMemcpy(device_bias, bias.data(), width * sizeof(float), cudaMemcpyHostToDevice));
  }
  CHECK(cudaMemcpy(device_qkv, qkv.data(), in_count * 2, cudaMemcpyHostToDevice));
  CHECK(cudaMemset(device_out, 0xff, out.size()));  // NaN
  const ClipAttentionParams params = {device_qkv, device_out, device_bias, batch,   heads,
                                      tokens,     dim,        causal,      variant, out_scale};
  CHECK(clip_attention_launch(&params, nullptr));
  CHECK(cudaDeviceSynchronize());
  CHECK(cudaMemcpy(out.data(), device_out, out.size(), cudaMemcpyDeviceToHost));
  CHECK(cudaFree(device_qkv));
  CHECK(cudaFree(device_out));
  CHECK(cudaFree(device_bias));

  double worst = 0;
  std::vector<double> weight(tokens);
  const int pairs = batch * heads;
  const int step = pairs > 64 ? 1 + pairs / 61 : 1;  // a sample of a large batch
  for (int pair = 0; pair < pairs; pair += step) {
    const float* head_bias = bias.data() + pair % heads * dim;
    const __half* base =
        qkv.data() + size_t(pair / heads) * tokens * 3 * width + pair % heads * dim;
    // Of a long sequence, some rows: 61 is prime to every tile size, so all positions in a tile
    // occur.
    for (int i = tokens - 1; i >= 0; i -= tokens > 200 || pairs > 64 ? 61 : 1) {
      const int keys = causal ? i + 1 : tokens;
      double query[kClipAttentionMaxHeadDim];  // as the interface says: the bias in fp16, added in
                                               // fp16
      for (int d = 0; d < dim; ++d)
        query[d] = __half2float(__float2half(__half2float(base[size_t(i) * 3 * width + d]) +
                                             __half2float(__float2half(head_bias[d]))));
      double top = -INFINITY, sum = 0;
      for (int j = 0; j < keys; ++j) {
        double dot = 0;
        for (int d = 0; d < dim; ++d)
          dot += query[d] * __half2float(base[size_t(j) * 3 * width + width + d]);
        weight[j] = dot / std::sqrt(dim);
        top = std::fmax(top, weight[j]);
      }
      for (int j = 0; j < keys; ++j) sum += weight[j] = std::exp(weight[j] - top);
      for (int d = 0; d < dim; ++d) {
        double exact = 0;
        for (int j = 0; j < keys; ++j)
          exact += weight[j] / sum * __half2float(base[size_t(j) * 3 * width + 2 * width + d]);
        const size_t at = (size_t(pair / heads) * tokens + i) * width + pair % heads * dim + d;
        double error = 0;
        if (out_scale > 0) {  // beyond the half unit of E4M3's last place that rounding costs
          const double got = float(reinterpret_cast<const __nv_fp8_e4m3*>(out.data())[at]);
          const double scaled = std::fmin(std::fmax(exact / out_scale, -448.0), 448.0);
          const int exponent = std::ilogb(std::fmax(std::fabs(scaled), std::ldexp(1, -6)));
          error = std::fmax(0, std::fabs(got - scaled) - std::ldexp(1, exponent - 4)) * out_scale;
          if (got != got) error = got;
        } else {
          error = std::fabs(__half2float(reinterpret_cast<const __half*>(out.data())[at]) - exact);
        }
        if (!(error <= worst)) worst = error;  // a NaN sticks
      }
    }
  }
  // Values up to 2: fp16 rounding of weights and result is under 2e-3.
  const bool ok = worst < 4e-3;
  std::printf("variant %2d  %4dx%2dx%4d of %3d causal %d  bias %d  out_scale %g  error %.2e  %s\n",
              variant, batch, heads, tokens, dim, causal, biased, out_scale, worst,
              ok ? "ok" : "WRONG");
  return ok;
}

}  // namespace

int main(int count, char** arguments) {
  if (count > 1 && std::strcmp(arguments[1], "list") == 0) {
    int32_t id = 0;
    for (int i = 0; clip_attention_variant(i, &id) != nullptr; ++i) std::printf("%d ", id);
    std::printf("\n");
    return 0;
  }
  const int variant = count > 1 ? std::atoi(arguments[1]) : 0;
  if (count > 5)
    return run(variant, std::atoi(arguments[2]), std::atoi(arguments[3]), std::atoi(arguments[4]),
               std::atoi(arguments[5]), count > 6 ? std::atoi(arguments[6]) : 0,
               count > 7 ? std::atof(arguments[7]) : 0, count > 8 ? std::atoi(arguments[8]) : 64)
               ? 0
               : 1;
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) {
    std::printf("no CUDA device\n");
    return 2;
  }
  bool ok = true;
  const int tokens[] = {1, 17, 50, 65, 77, 197, 257, 577, 1000}, dims[] = {64, 72, 80, 88, 104};
  for (int dim : dims)
    for (int t : tokens)
      for (int causal = 0; causal < 2; ++causal) {
        const bool served =
            variant == 0 ? clip_attention_supported(2, 3, t, dim, major, minor)
                         : clip_attention_variant_serves(variant, t, dim, causal, major, minor);
        if (!served) continue;
        ok = run(variant, 2, 3, t, causal, 0, 0, dim) && run(variant, 2, 3, t, causal, 1, 0, dim) &&
             ok;
        if (t <= 77)
          ok = run(variant, 100, 4, t, causal, 1, 0, dim) && ok;  // several units a block
        if (major * 10 + minor >= 89) ok = run(variant, 2, 3, t, causal, 1, 0.002f, dim) && ok;
      }
  return ok ? 0 : 1;
}
