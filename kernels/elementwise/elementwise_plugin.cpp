// The TensorRT plugins around the launchers of elementwise.h, all version "3", default namespace. Tensors are linear;
// "fp32, n" is a constant of n elements, in any shape.
//
//   ClipBiasQuickGelu
//     fields   none
//     inputs   0 x     fp16 [.., width]
//              1 bias  fp32, width
//     output   0       fp16, x's shape: y sigmoid(1.702 y) with y = x + bias
//
//   ClipResidualLayerNorm
//     fields   residual  int32    0 or 1
//              epsilon   float32  > 0
//     residual 1
//     inputs   0 x      fp16 [.., width]
//              1 delta  fp16, x's shape
//              2 bias, 3 scale, 4 shift  fp32, width
//     outputs  0 sum   fp16, x's shape: x + delta + bias
//              1       fp16, x's shape: layer norm of the sum over the last axis, times scale, plus shift
//     residual 0
//     inputs   0 x, 1 scale, 2 shift
//     output   0       fp16, x's shape: layer norm of x
//
//   ClipExtractPatches
//     fields   patch_size  int32  even
//     input    0 images  fp32 or fp16 [batch, 3, resolution, resolution]
//     output   0         fp16 [batch * side * side, 3 * patch_size * patch_size] with side = resolution / patch_size
//
//   ClipEmbedImage
//     fields   tokens                  int32    >= 2, the class token and the patches of an image
//              epsilon_pre, epsilon_1  float32  > 0
//     inputs   0 patches      fp16 [batch * (tokens - 1), width]
//              1 class_token  fp32, width
//              2 positions    fp32, tokens * width
//              3 scale_pre, 4 shift_pre, 5 scale_1, 6 shift_1  fp32, width
//     outputs  0 x  fp16 [batch * tokens, width]: layer norm of class token and patches plus positions
//              1 y  fp16 [batch * tokens, width]: layer norm of x
//
// x has rank 2 or more. Nothing depends on the number of rows: an engine with a dynamic batch runs the same kernels as
// a static one.
//
// The creators register themselves when the library is loaded, if libnvinfer is in the process by then;
// clip_elementwise_register_plugins() does the same later (../plugin_support.h).

#include <NvInferRuntime.h>

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <string>

#include "../plugin_support.h"
#include "elementwise.h"

namespace {

constexpr char kVersion[] = "3";
constexpr int32_t kLayout = 1;  // of the serialised structs; another number is another version of this file
constexpr int32_t kMinRank = 2;

void report(const char* plugin, const char* what) { std::fprintf(stderr, "%s plugin: %s\n", plugin, what); }

bool same(const nvinfer1::Dims& a, const nvinfer1::Dims& b) {
  if (a.nbDims != b.nbDims) return false;
  for (int32_t i = 0; i < a.nbDims; ++i)
    if (a.d[i] != b.d[i]) return false;
  return true;
}

int64_t volume(const nvinfer1::Dims& dims) {
  int64_t count = 1;
  for (int32_t i = 0; i < dims.nbDims; ++i) count *= dims.d[i];
  return count;
}

// [.., width] as rows and width; false where the rank is too small.
bool as_rows(const nvinfer1::Dims& dims, int64_t& rows, int32_t& width) {
  if (dims.nbDims < kMinRank) return false;
  width = dims.d[dims.nbDims - 1];
  rows = 1;
  for (int32_t i = 0; i + 1 < dims.nbDims; ++i) rows *= dims.d[i];
  return true;
}

// What the plugins have in common. Derived has kName; wrong(data), what is wrong with its data or null; inputs() and
// outputs(); takes(position, type), whether a tensor may have a type; shape(inputs, builder), of every output; and
// run(), which checks the shapes and launches.
template <class Derived, class Serialized>
class Plugin : public nvinfer1::IPluginV2DynamicExt {
 public:
  Plugin(const Serialized& data, const std::string& plugin_namespace) : data_(data), namespace_(plugin_namespace) {}

  // IPluginV2DynamicExt

  nvinfer1::IPluginV2DynamicExt* clone() const noexcept override {
    try {
      return new Derived(data_, namespace_);
    } catch (const std::exception& error) {
      report(Derived::kName, error.what());
      return nullptr;
    }
  }

  nvinfer1::DimsExprs getOutputDimensions(int32_t, const nvinfer1::DimsExprs* inputs, int32_t,
                                          nvinfer1::IExprBuilder& builder) noexcept override {
    return derived().shape(inputs, builder);
  }

  bool supportsFormatCombination(int32_t position, const nvinfer1::PluginTensorDesc* tensors, int32_t inputs,
                                 int32_t outputs) noexcept override {
    return inputs == derived().inputs() && outputs == derived().outputs() && position >= 0 &&
           position < inputs + outputs && tensors[position].format == nvinfer1::TensorFormat::kLINEAR &&
           derived().takes(position, tensors[position].type);
  }

  void configurePlugin(const nvinfer1::DynamicPluginTensorDesc*, int32_t, const nvinfer1::DynamicPluginTensorDesc*,
                       int32_t) noexcept override {}

  size_t getWorkspaceSize(const nvinfer1::PluginTensorDesc*, int32_t, const nvinfer1::PluginTensorDesc*,
                          int32_t) const noexcept override {
    return 0;
  }

  int32_t enqueue(const nvinfer1::PluginTensorDesc* input, const nvinfer1::PluginTensorDesc*, const void* const* inputs,
                  void* const* outputs, void*, cudaStream_t stream) noexcept override {
    return derived().run(input, inputs, outputs, stream);
  }

  // IPluginV2Ext

  nvinfer1::DataType getOutputDataType(int32_t, const nvinfer1::DataType* inputs, int32_t) const noexcept override {
    return inputs[0];
  }

  // IPluginV2

  const char* getPluginType() const noexcept override { return Derived::kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  int32_t getNbOutputs() const noexcept override { return derived().outputs(); }
  int32_t initialize() noexcept override { return 0; }
  void terminate() noexcept override {}
  size_t getSerializationSize() const noexcept override { return sizeof(data_); }
  void serialize(void* buffer) const noexcept override { std::memcpy(buffer, &data_, sizeof(data_)); }
  void destroy() noexcept override { delete this; }

  void setPluginNamespace(const char* plugin_namespace) noexcept override {
    try {
      namespace_ = plugin_namespace == nullptr ? "" : plugin_namespace;
    } catch (const std::exception& error) {
      report(Derived::kName, error.what());
    }
  }

  const char* getPluginNamespace() const noexcept override { return namespace_.c_str(); }

 protected:
  // The first `halves` inputs are fp16, the others fp32; outputs are fp16.
  bool half_then_float(int32_t position, nvinfer1::DataType type, int32_t halves) const {
    const bool constant = position >= halves && position < derived().inputs();
    return type == (constant ? nvinfer1::DataType::kFLOAT : nvinfer1::DataType::kHALF);
  }

  static int32_t refuse(const char* what) {
    report(Derived::kName, what);
    return static_cast<int32_t>(cudaErrorInvalidValue);
  }

  static int32_t reported(cudaError_t status) {
    if (status != cudaSuccess) report(Derived::kName, cudaGetErrorString(status));
    return static_cast<int32_t>(status);
  }

  const Serialized data_;

 private:
  const Derived& derived() const { return static_cast<const Derived&>(*this); }

  std::string namespace_;
};

// One field of a creator: its name, and where in the data its value goes.
struct Field {
  const char* name;
  nvinfer1::PluginFieldType type;  // kINT32 or kFLOAT32, four bytes either
  size_t offset;
};

// Plugin has, beside the above, Data, kFields and kFieldsWanted, what to say of other fields.
template <class Plugin>
class Creator final : public nvinfer1::IPluginCreator {
  using Data = typename Plugin::Data;
  static constexpr int32_t kCount = static_cast<int32_t>(Plugin::kFields.size());

 public:
  Creator() {
    for (int32_t i = 0; i < kCount; ++i) fields_[i] = {Plugin::kFields[i].name, nullptr, Plugin::kFields[i].type, 1};
  }

  const char* getPluginName() const noexcept override { return Plugin::kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }

  nvinfer1::IPluginV2* createPlugin(const char*, const nvinfer1::PluginFieldCollection* fields) noexcept override {
    Data data = Plugin::kNothing;  // nothing in it is valid
    for (int32_t i = 0; fields != nullptr && i < fields->nbFields; ++i) {
      const nvinfer1::PluginField& given = fields->fields[i];
      const Field* field = nullptr;
      for (const Field& known : Plugin::kFields)
        if (std::strcmp(given.name, known.name) == 0) field = &known;
      if (field == nullptr || given.type != field->type || given.length != 1 || given.data == nullptr) {
        report(Plugin::kName, Plugin::kFieldsWanted);
        return nullptr;
      }
      std::memcpy(reinterpret_cast<char*>(&data) + field->offset, given.data, sizeof(int32_t));
    }
    return create(data);
  }

  nvinfer1::IPluginV2* deserializePlugin(const char*, const void* bytes, size_t size) noexcept override {
    Data data = {};
    if (bytes == nullptr || size != sizeof(data)) {
      report(Plugin::kName, "the engine holds data of another size than this version writes");
      return nullptr;
    }
    std::memcpy(&data, bytes, sizeof(data));
    if (data.layout != kLayout) {
      report(Plugin::kName, "the engine was built with another version of this plugin");
      return nullptr;
    }
    return create(data);
  }

  void setPluginNamespace(const char* plugin_namespace) noexcept override {
    try {
      namespace_ = plugin_namespace == nullptr ? "" : plugin_namespace;
    } catch (const std::exception& error) {
      report(Plugin::kName, error.what());
    }
  }

  const char* getPluginNamespace() const noexcept override { return namespace_.c_str(); }

 private:
  nvinfer1::IPluginV2* create(const Data& data) noexcept {
    if (const char* wrong = Plugin::wrong(data)) {
      report(Plugin::kName, wrong);
      return nullptr;
    }
    try {
      return new Plugin(data, namespace_);
    } catch (const std::exception& error) {
      report(Plugin::kName, error.what());
      return nullptr;
    }
  }

  std::array<nvinfer1::PluginField, kCount> fields_;
  const nvinfer1::PluginFieldCollection collection_ = {kCount, fields_.data()};
  std::string namespace_;
};

constexpr auto kInt = nvinfer1::PluginFieldType::kINT32;
constexpr auto kFloat = nvinfer1::PluginFieldType::kFLOAT32;

bool positive(float x) { return std::isfinite(x) && x > 0; }

// What an engine file holds for one layer.
struct GeluData {
  int32_t layout;
};

struct LayerNormData {
  int32_t layout;
  int32_t residual;
  float epsilon;
};

struct PatchesData {
  int32_t layout;
  int32_t patch_size;
};

struct EmbedData {
  int32_t layout;
  int32_t tokens;
  float epsilon_pre;
  float epsilon_1;
};

class GeluPlugin final : public Plugin<GeluPlugin, GeluData> {
 public:
  using Data = GeluData;
  using Plugin::Plugin;
  static constexpr char kName[] = "ClipBiasQuickGelu";
  static constexpr char kFieldsWanted[] = "there are no fields";
  static constexpr std::array<Field, 0> kFields = {};
  static constexpr Data kNothing = {kLayout};

  static const char* wrong(const Data&) { return nullptr; }
  int32_t inputs() const { return 2; }
  int32_t outputs() const { return 1; }
  bool takes(int32_t position, nvinfer1::DataType type) const { return half_then_float(position, type, 1); }
  nvinfer1::DimsExprs shape(const nvinfer1::DimsExprs* inputs, nvinfer1::IExprBuilder&) const { return inputs[0]; }

  int32_t run(const nvinfer1::PluginTensorDesc* input, const void* const* inputs, void* const* outputs,
              cudaStream_t stream) const {
    ClipBiasQuickGeluParams params = {};
    if (!as_rows(input[0].dims, params.rows, params.width)) return refuse("x has no rows: its rank is below 2");
    if (volume(input[1].dims) != params.width) return refuse("the bias does not have one element for each column of x");
    params.in = inputs[0];
    params.bias = inputs[1];
    params.out = outputs[0];
    return reported(clip_bias_quick_gelu_launch(&params, stream));
  }
};

class LayerNormPlugin final : public Plugin<LayerNormPlugin, LayerNormData> {
 public:
  using Data = LayerNormData;
  using Plugin::Plugin;
  static constexpr char kName[] = "ClipResidualLayerNorm";
  static constexpr char kFieldsWanted[] = "the fields are residual, one int32, and epsilon, one float32";
  static constexpr std::array<Field, 2> kFields = {
      {{"residual", kInt, offsetof(Data, residual)}, {"epsilon", kFloat, offsetof(Data, epsilon)}}};
  static constexpr Data kNothing = {kLayout, -1, 0.0f};

  static const char* wrong(const Data& data) {
    const bool valid = (data.residual == 0 || data.residual == 1) && positive(data.epsilon);
    return valid ? nullptr : "residual must be 0 or 1 and epsilon finite and above 0, both given";
  }
  int32_t inputs() const { return data_.residual ? 5 : 3; }
  int32_t outputs() const { return data_.residual ? 2 : 1; }
  bool takes(int32_t position, nvinfer1::DataType type) const {
    return half_then_float(position, type, data_.residual ? 2 : 1);
  }
  nvinfer1::DimsExprs shape(const nvinfer1::DimsExprs* inputs, nvinfer1::IExprBuilder&) const { return inputs[0]; }

  int32_t run(const nvinfer1::PluginTensorDesc* input, const void* const* inputs, void* const* outputs,
              cudaStream_t stream) const {
    ClipResidualLayerNormParams params = {};
    if (!as_rows(input[0].dims, params.rows, params.width)) return refuse("x has no rows: its rank is below 2");
    if (data_.residual && !same(input[1].dims, input[0].dims)) return refuse("delta has another shape than x");
    for (int32_t i = data_.residual ? 2 : 1; i < this->inputs(); ++i)
      if (volume(input[i].dims) != params.width)
        return refuse("a constant does not have one element for each column of x");
    params.x = inputs[0];
    if (data_.residual) {
      params.delta = inputs[1];
      params.bias = inputs[2];
      params.sum_out = outputs[0];
    }
    params.scale = inputs[data_.residual ? 3 : 1];
    params.shift = inputs[data_.residual ? 4 : 2];
    params.out = outputs[data_.residual ? 1 : 0];
    params.epsilon = data_.epsilon;
    return reported(clip_residual_layer_norm_launch(&params, stream));
  }
};

class PatchesPlugin final : public Plugin<PatchesPlugin, PatchesData> {
 public:
  using Data = PatchesData;
  using Plugin::Plugin;
  static constexpr char kName[] = "ClipExtractPatches";
  static constexpr char kFieldsWanted[] = "the field is patch_size, one int32";
  static constexpr std::array<Field, 1> kFields = {{{"patch_size", kInt, offsetof(Data, patch_size)}}};
  static constexpr Data kNothing = {kLayout, 0};

  static const char* wrong(const Data& data) {
    const bool valid = data.patch_size >= 2 && data.patch_size <= kClipMaxResolution && data.patch_size % 2 == 0;
    return valid ? nullptr : "patch_size must be even, 2 to 4096, and given";
  }
  int32_t inputs() const { return 1; }
  int32_t outputs() const { return 1; }
  bool takes(int32_t position, nvinfer1::DataType type) const {
    return type == nvinfer1::DataType::kHALF || (position == 0 && type == nvinfer1::DataType::kFLOAT);
  }

  nvinfer1::DimsExprs shape(const nvinfer1::DimsExprs* inputs, nvinfer1::IExprBuilder& builder) const {
    using Operation = nvinfer1::DimensionOperation;
    const auto* const* images = inputs[0].d;
    const nvinfer1::IDimensionExpr* size = builder.constant(data_.patch_size);
    const nvinfer1::IDimensionExpr* side = builder.operation(Operation::kFLOOR_DIV, *images[2], *size);
    nvinfer1::DimsExprs out = {};
    out.nbDims = 2;
    out.d[0] = builder.operation(Operation::kPROD, *images[0], *builder.operation(Operation::kPROD, *side, *side));
    out.d[1] = builder.operation(Operation::kPROD, *images[1], *builder.constant(data_.patch_size * data_.patch_size));
    return out;
  }

  int32_t run(const nvinfer1::PluginTensorDesc* input, const void* const* inputs, void* const* outputs,
              cudaStream_t stream) const {
    const nvinfer1::Dims& dims = input[0].dims;
    if (dims.nbDims != 4 || dims.d[1] != kClipImageChannels || dims.d[2] != dims.d[3] || dims.d[2] % data_.patch_size != 0)
      return refuse("the images are not [batch, 3, resolution, resolution] with a multiple of patch_size as resolution");
    ClipExtractPatchesParams params = {};
    params.images = inputs[0];
    params.out = outputs[0];
    params.batch = dims.d[0];
    params.resolution = dims.d[2];
    params.patch_size = data_.patch_size;
    params.half = input[0].type == nvinfer1::DataType::kHALF ? 1 : 0;
    return reported(clip_extract_patches_launch(&params, stream));
  }
};

class EmbedPlugin final : public Plugin<EmbedPlugin, EmbedData> {
 public:
  using Data = EmbedData;
  using Plugin::Plugin;
  static constexpr char kName[] = "ClipEmbedImage";
  static constexpr char kFieldsWanted[] = "the fields are tokens, one int32, epsilon_pre and epsilon_1, one float32 each";
  static constexpr std::array<Field, 3> kFields = {{{"tokens", kInt, offsetof(Data, tokens)},
                                                    {"epsilon_pre", kFloat, offsetof(Data, epsilon_pre)},
                                                    {"epsilon_1", kFloat, offsetof(Data, epsilon_1)}}};
  static constexpr Data kNothing = {kLayout, 0, 0.0f, 0.0f};

  static const char* wrong(const Data& data) {
    const bool valid = data.tokens >= 2 && positive(data.epsilon_pre) && positive(data.epsilon_1);
    return valid ? nullptr : "tokens must be at least 2, epsilon_pre and epsilon_1 finite and above 0, all given";
  }
  int32_t inputs() const { return 7; }
  int32_t outputs() const { return 2; }
  bool takes(int32_t position, nvinfer1::DataType type) const { return half_then_float(position, type, 1); }

  nvinfer1::DimsExprs shape(const nvinfer1::DimsExprs* inputs, nvinfer1::IExprBuilder& builder) const {
    using Operation = nvinfer1::DimensionOperation;
    nvinfer1::DimsExprs out = inputs[0];
    const auto* batch = builder.operation(Operation::kFLOOR_DIV, *out.d[0], *builder.constant(data_.tokens - 1));
    out.d[0] = builder.operation(Operation::kPROD, *batch, *builder.constant(data_.tokens));
    return out;
  }

  int32_t run(const nvinfer1::PluginTensorDesc* input, const void* const* inputs, void* const* outputs,
              cudaStream_t stream) const {
    const nvinfer1::Dims& dims = input[0].dims;
    if (dims.nbDims != 2 || dims.d[0] % (data_.tokens - 1) != 0)
      return refuse("the patches are not [batch * (tokens - 1), width] for the tokens that it was built with");
    const int64_t width = dims.d[1];
    for (int32_t i = 1; i < this->inputs(); ++i)
      if (volume(input[i].dims) != (i == 2 ? width * data_.tokens : width))
        return refuse("a constant has not as many elements as the width, or the positions as the tokens' widths");
    ClipEmbedImageParams params = {};
    params.patches = inputs[0];
    params.class_token = inputs[1];
    params.positions = inputs[2];
    params.scale_pre = inputs[3];
    params.shift_pre = inputs[4];
    params.scale_1 = inputs[5];
    params.shift_1 = inputs[6];
    params.x = outputs[0];
    params.y = outputs[1];
    params.batch = dims.d[0] / (data_.tokens - 1);
    params.tokens = data_.tokens;
    params.width = dims.d[1];
    params.epsilon_pre = data_.epsilon_pre;
    params.epsilon_1 = data_.epsilon_1;
    return reported(clip_embed_image_launch(&params, stream));
  }
};

}  // namespace

extern "C" int32_t clip_elementwise_register_plugins() {
  static bool registered = false;
  registered = registered || plugin_support::with_loaded_registry([](nvinfer1::IPluginRegistry& registry) {
    const bool known[] = {plugin_support::register_creator<Creator<GeluPlugin>>(registry), plugin_support::register_creator<Creator<LayerNormPlugin>>(registry),
                          plugin_support::register_creator<Creator<PatchesPlugin>>(registry), plugin_support::register_creator<Creator<EmbedPlugin>>(registry)};
    return known[0] && known[1] && known[2] && known[3];
  });
  return registered ? 1 : 0;
}

namespace {
__attribute__((constructor)) void register_when_loaded() { clip_elementwise_register_plugins(); }
}  // namespace
