// The TensorRT plugins around the launchers of elementwise.h. "fp32, n" is a constant of n
// elements, in any shape; x has rank 2 or more. out_scale is float32: 0 where an output is fp16,
// else the output marked with a * is E4M3, divided by out_scale, as plugin.h says.
//
//   ClipBiasGelu         out_scale
//     in    x fp16 [.., width], bias fp32, width
//     out   * fp16, x's shape: y sigmoid(1.702 y) with y = x + bias
//   ClipResidualLayerNorm     residual int32, 0 or 1; epsilon float32; out_scale
//     in    x fp16 [.., width]; with residual 1 delta fp16, x's shape, and bias fp32, width;
//           scale and shift fp32, width
//     out   with residual 1 the sum x + delta + bias, fp16, x's shape; * the layer norm of x or of
//           the sum over the last axis, times scale, plus shift, fp16, x's shape
//   ClipExtractPatches        patch_size int32, even
//     in    images fp32 or fp16 [batch, 3, resolution, resolution]
//     out   fp16 [batch * side * side, 3 * patch_size * patch_size], side = resolution / patch_size
//   ClipEmbedImage            tokens int32, the class token and the patches of an image;
//                             epsilon_pre, epsilon_1 float32; out_scale
//     in    patches fp16 [batch * (tokens - 1), width], class_token fp32, width,
//           positions fp32, tokens * width, scale_pre, shift_pre, scale_1, shift_1 fp32, width
//     out   x fp16 [batch * tokens, width]: layer norm of class token and patches plus positions;
//           * y fp16, the same shape: layer norm of x

#include <cmath>

#include "../plugin.h"
#include "elementwise.h"

namespace {

using namespace clip;

constexpr char kNoRows[] = "x has no rows: its rank is below 2";
constexpr char kWrongConstant[] = "a constant does not have one element for each column of x";

bool positive(float x) { return std::isfinite(x) && x > 0; }

struct GeluData {
  int32_t approximate;
  float out_scale;
};

class Gelu final : public Plugin<Gelu, GeluData> {
 public:
  using Plugin::Plugin;
  static constexpr char kName[] = "ClipBiasGelu";
  static constexpr std::tuple kFields{Field{"approximate", &Data::approximate},
                                      Field{"out_scale", &Data::out_scale}};

  static const char* complete(Data& data) {
    if (!e4m3::valid_scale(data.out_scale)) return kWrongOutScale;
    const bool valid = data.approximate >= kClipGeluQuick && data.approximate <= kClipGeluNone;
    return valid ? nullptr : "approximate must be 0, 1 or 2";
  }
  int32_t inputs() const { return 2; }
  int32_t outputs() const { return 1; }
  int32_t halves() const { return 1; }
  const char* wrong_shapes(const Dims* in) const {
    if (in[0].nbDims < 2) return kNoRows;
    return agrees(volume(in[1]), width_of(in[0])) ? nullptr : kWrongConstant;
  }
  void shape(const DimsExprs*, int32_t, DimsExprs& out, IExprBuilder& builder) const {
    if (data_.out_scale > 0) halve_width(out, builder);
  }

  int32_t launch(const Call& call) const {
    const ClipBiasGeluParams params = {call.x[0],
                                       call.x[1],
                                       call.y[0],
                                       rows_of(call.in[0]),
                                       narrow(width_of(call.in[0])),
                                       data_.approximate,
                                       data_.out_scale};
    return clip_bias_gelu_launch(&params, call.stream);
  }
};

struct LayerNormData {
  int32_t residual;
  float epsilon, out_scale;
};

class LayerNorm final : public Plugin<LayerNorm, LayerNormData> {
 public:
  using Plugin::Plugin;
  static constexpr char kName[] = "ClipResidualLayerNorm";
  static constexpr std::tuple kFields{Field{"residual", &Data::residual},
                                      Field{"epsilon", &Data::epsilon},
                                      Field{"out_scale", &Data::out_scale}};

  static const char* complete(Data& data) {
    const bool valid = (data.residual | 1) == 1 && positive(data.epsilon);
    if (!e4m3::valid_scale(data.out_scale)) return kWrongOutScale;
    return valid ? nullptr : "residual must be 0 or 1 and epsilon finite and above 0";
  }
  int32_t inputs() const { return data_.residual != 0 ? 5 : 3; }
  int32_t outputs() const { return 1 + data_.residual; }
  int32_t halves() const { return 1 + data_.residual; }
  const char* wrong_shapes(const Dims* in) const {
    if (in[0].nbDims < 2) return kNoRows;
    if (data_.residual != 0) {
      bool same = in[1].nbDims == in[0].nbDims;
      for (int32_t i = 0; same && i < in[0].nbDims; ++i) same = agrees(in[1].d[i], in[0].d[i]);
      if (!same) return "delta has another shape than x";
    }
    for (int32_t i = 1 + data_.residual; i < inputs(); ++i)
      if (!agrees(volume(in[i]), width_of(in[0]))) return kWrongConstant;
    return nullptr;
  }
  void shape(const DimsExprs*, int32_t output, DimsExprs& out, IExprBuilder& builder) const {
    if (data_.out_scale > 0 && output == data_.residual) halve_width(out, builder);
  }

  int32_t launch(const Call& call) const {
    ClipResidualLayerNormParams params = {};
    params.x = call.x[0];
    if (data_.residual != 0) {
      params.delta = call.x[1];
      params.bias = call.x[2];
      params.sum_out = call.y[0];
    }
    params.scale = call.x[inputs() - 2];
    params.shift = call.x[inputs() - 1];
    params.out = call.y[outputs() - 1];
    params.rows = rows_of(call.in[0]);
    params.width = narrow(width_of(call.in[0]));
    params.epsilon = data_.epsilon;
    params.out_scale = data_.out_scale;
    return clip_residual_layer_norm_launch(&params, call.stream);
  }
};

struct PatchesData {
  int32_t patch_size;
};

class Patches final : public Plugin<Patches, PatchesData> {
 public:
  using Plugin::Plugin;
  static constexpr char kName[] = "ClipExtractPatches";
  static constexpr std::tuple kFields{Field{"patch_size", &Data::patch_size}};

  static const char* complete(Data& data) {
    const bool valid =
        data.patch_size >= 2 && data.patch_size <= kClipMaxResolution && data.patch_size % 2 == 0;
    return valid ? nullptr : "patch_size must be even and 2 to 4096";
  }
  int32_t inputs() const { return 1; }
  int32_t outputs() const { return 1; }
  bool takes(int32_t, DataType type) const {
    return type == DataType::kHALF || type == DataType::kFLOAT;
  }
  const char* wrong_shapes(const Dims* in) const {
    const bool right = in[0].nbDims == 4 && agrees(in[0].d[1], kClipImageChannels) &&
                       agrees(in[0].d[2], in[0].d[3]) && multiple(in[0].d[2], data_.patch_size);
    return right ? nullptr
                 : "the images are not [batch, 3, resolution, resolution] with a multiple of "
                   "patch_size as resolution";
  }
  void shape(const DimsExprs* in, int32_t, DimsExprs& out, IExprBuilder& builder) const {
    const auto prod = [&](const IDimensionExpr& a, const IDimensionExpr& b) {
      return builder.operation(DimensionOperation::kPROD, a, b);
    };
    const auto* size = builder.constant(data_.patch_size);
    const auto* side = builder.operation(DimensionOperation::kFLOOR_DIV, *in[0].d[2], *size);
    out.nbDims = 2;
    out.d[0] = prod(*in[0].d[0], *prod(*side, *side));
    out.d[1] = prod(*in[0].d[1], *prod(*size, *size));
  }

  int32_t launch(const Call& call) const {
    const Dims& images = call.in[0];
    const ClipExtractPatchesParams params = {
        call.x[0],           call.y[0],        images.d[0],
        narrow(images.d[2]), data_.patch_size, call.type == DataType::kHALF ? 1 : 0};
    return clip_extract_patches_launch(&params, call.stream);
  }
};

struct EmbedData {
  int32_t tokens;
  float epsilon_pre, epsilon_1, out_scale;
};

class Embed final : public Plugin<Embed, EmbedData> {
 public:
  using Plugin::Plugin;
  static constexpr char kName[] = "ClipEmbedImage";
  static constexpr std::tuple kFields{
      Field{"tokens", &Data::tokens}, Field{"epsilon_pre", &Data::epsilon_pre},
      Field{"epsilon_1", &Data::epsilon_1}, Field{"out_scale", &Data::out_scale}};

  static const char* complete(Data& data) {
    if (!e4m3::valid_scale(data.out_scale)) return kWrongOutScale;
    const bool valid = data.tokens >= 2 && positive(data.epsilon_pre) && positive(data.epsilon_1);
    return valid ? nullptr
                 : "tokens must be 2 or more, epsilon_pre and epsilon_1 finite and above 0";
  }
  int32_t inputs() const { return 7; }
  int32_t outputs() const { return 2; }
  int32_t halves() const { return 1; }
  const char* wrong_shapes(const Dims* in) const {
    if (in[0].nbDims != 2 || !multiple(in[0].d[0], data_.tokens - 1))
      return "the patches are not [batch * (tokens - 1), width] for its tokens";
    const int64_t width = in[0].d[1];
    for (int32_t i = 1; i < inputs(); ++i)
      if (width >= 0 && !agrees(volume(in[i]), i == 2 ? width * data_.tokens : width))
        return "a constant has not width elements, or the positions not tokens * width";
    return nullptr;
  }
  void shape(const DimsExprs* in, int32_t output, DimsExprs& out, IExprBuilder& builder) const {
    const auto* patches = builder.constant(data_.tokens - 1);
    const auto* tokens = builder.constant(data_.tokens);
    const auto* batch = builder.operation(DimensionOperation::kFLOOR_DIV, *in[0].d[0], *patches);
    out.d[0] = builder.operation(DimensionOperation::kPROD, *batch, *tokens);
    if (data_.out_scale > 0 && output == 1) halve_width(out, builder);
  }

  int32_t launch(const Call& call) const {
    const auto [tokens, epsilon_pre, epsilon_1, out_scale] = data_;
    const int64_t batch = call.in[0].d[0] / (tokens - 1);
    const int32_t width = narrow(call.in[0].d[1]);
    const void* const* x = call.x;  // in the order of the struct
    void* const* y = call.y;
    const ClipEmbedImageParams params = {x[0],   x[1],  x[2],        x[3],      x[4],
                                         x[5],   x[6],  y[0],        y[1],      batch,
                                         tokens, width, epsilon_pre, epsilon_1, out_scale};
    return clip_embed_image_launch(&params, call.stream);
  }
};

}  // namespace

std::vector<IPluginCreatorV3One*> clip::elementwise_creators() {
  static Creator<Gelu> gelu;
  static Creator<LayerNorm> layer_norm;
  static Creator<Patches> patches;
  static Creator<Embed> embed;
  return {&gelu, &layer_norm, &patches, &embed};
}
