// The TensorRT plugins around the launchers of elementwise.h, both version "2", default namespace.
//
//   ClipBiasQuickGelu
//     fields   none
//     inputs   0 x     fp16 [.., width]
//              1 bias  fp32, width elements
//     output   0       fp16, x's shape: y sigmoid(1.702 y) with y = x + bias
//
//   ClipResidualLayerNorm
//     fields   residual  int32    0 or 1
//              epsilon   float32  > 0
//     residual 1
//     inputs   0 x      fp16 [.., width]
//              1 delta  fp16, x's shape
//              2 bias, 3 scale, 4 shift  fp32, width elements each
//     outputs  0 sum   fp16, x's shape: x + delta + bias
//              1       fp16, x's shape: layer norm of the sum over the last axis, times scale, plus shift
//     residual 0
//     inputs   0 x, 1 scale, 2 shift
//     output   0       fp16, x's shape: layer norm of x
//
// x has rank 2 or more; the fp32 constants may have leading axes of size 1. All are linear. Nothing depends on
// the number of rows: an engine with a dynamic batch runs the same kernels as a static one.
//
// Registration: as for the attention plugin (kernels/attention/attention_plugin.cpp), when the library is loaded
// if libnvinfer is in the process by then, or by clip_elementwise_register_plugins() later.

#include <NvInferRuntime.h>
#include <NvInferVersion.h>

#include <dlfcn.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <string>

#include "elementwise.h"

namespace {

constexpr char kVersion[] = "2";
constexpr int32_t kLayout = 1;  // of the serialised structs; another number is another version of this file
constexpr int32_t kMinRank = 2;

void report(const char* plugin, const char* what) { std::fprintf(stderr, "%s plugin: %s\n", plugin, what); }

int32_t refuse(const char* plugin, const char* what) {
  report(plugin, what);
  return static_cast<int32_t>(cudaErrorInvalidValue);
}

bool same(const nvinfer1::Dims& a, const nvinfer1::Dims& b) {
  if (a.nbDims != b.nbDims) return false;
  for (int32_t i = 0; i < a.nbDims; ++i)
    if (a.d[i] != b.d[i]) return false;
  return true;
}

// [.., width] as rows and width; false where the rank is too small.
bool as_rows(const nvinfer1::Dims& dims, int64_t& rows, int32_t& width) {
  if (dims.nbDims < kMinRank) return false;
  width = dims.d[dims.nbDims - 1];
  rows = 1;
  for (int32_t i = 0; i + 1 < dims.nbDims; ++i) rows *= dims.d[i];
  return true;
}

bool is_constant(const nvinfer1::Dims& dims, int32_t width) {
  if (dims.nbDims < 1 || dims.d[dims.nbDims - 1] != width) return false;
  for (int32_t i = 0; i + 1 < dims.nbDims; ++i)
    if (dims.d[i] != 1) return false;
  return true;
}

// What the two plugins have in common. Derived has kName, kHalfInputs() (leading inputs that are fp16; the others
// are fp32), inputs() and outputs(), Serialized and serialized(), and a constructor from a Serialized.
template <class Derived, class Serialized>
class RowPlugin : public nvinfer1::IPluginV2DynamicExt {
 public:
  RowPlugin(const Serialized& data, const std::string& plugin_namespace) : data_(data), namespace_(plugin_namespace) {}

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
                                          nvinfer1::IExprBuilder&) noexcept override {
    return inputs[0];
  }

  bool supportsFormatCombination(int32_t position, const nvinfer1::PluginTensorDesc* tensors, int32_t inputs,
                                 int32_t outputs) noexcept override {
    if (inputs != derived().inputs() || outputs != derived().outputs()) return false;
    if (position < 0 || position >= inputs + outputs) return false;
    const bool constant = position >= derived().half_inputs() && position < inputs;
    return tensors[position].type == (constant ? nvinfer1::DataType::kFLOAT : nvinfer1::DataType::kHALF) &&
           tensors[position].format == nvinfer1::TensorFormat::kLINEAR;
  }

  void configurePlugin(const nvinfer1::DynamicPluginTensorDesc*, int32_t, const nvinfer1::DynamicPluginTensorDesc*,
                       int32_t) noexcept override {}

  size_t getWorkspaceSize(const nvinfer1::PluginTensorDesc*, int32_t, const nvinfer1::PluginTensorDesc*,
                          int32_t) const noexcept override {
    return 0;
  }

  int32_t enqueue(const nvinfer1::PluginTensorDesc* input, const nvinfer1::PluginTensorDesc*, const void* const* inputs,
                  void* const* outputs, void*, cudaStream_t stream) noexcept override {
    int64_t rows = 0;
    int32_t width = 0;
    if (!as_rows(input[0].dims, rows, width)) return refuse(Derived::kName, "x has no rows: its rank is below 2");
    for (int32_t i = 1; i < derived().inputs(); ++i) {
      if (i < derived().half_inputs() && !same(input[i].dims, input[0].dims))
        return refuse(Derived::kName, "delta has another shape than x");
      if (i >= derived().half_inputs() && !is_constant(input[i].dims, width))
        return refuse(Derived::kName, "a constant does not have as many elements as x's last dimension");
    }
    const cudaError_t status = derived().launch(inputs, outputs, rows, width, stream);
    if (status != cudaSuccess) report(Derived::kName, cudaGetErrorString(status));
    return static_cast<int32_t>(status);
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
  const Serialized data_;

 private:
  const Derived& derived() const { return static_cast<const Derived&>(*this); }

  std::string namespace_;
};

template <class Plugin, class Serialized>
class Creator : public nvinfer1::IPluginCreator {
 public:
  const char* getPluginName() const noexcept override { return Plugin::kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }

  nvinfer1::IPluginV2* deserializePlugin(const char*, const void* bytes, size_t size) noexcept override {
    Serialized data = {};
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

 protected:
  nvinfer1::IPluginV2* create(const Serialized& data) noexcept {
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

 private:
  std::string namespace_;
};

// What an engine file holds for one layer.
struct GeluData {
  int32_t layout;
};

struct LayerNormData {
  int32_t layout;
  int32_t residual;
  float epsilon;
};

class GeluPlugin final : public RowPlugin<GeluPlugin, GeluData> {
 public:
  static constexpr char kName[] = "ClipBiasQuickGelu";
  using RowPlugin::RowPlugin;

  static const char* wrong(const GeluData&) { return nullptr; }
  int32_t half_inputs() const { return 1; }
  int32_t inputs() const { return 2; }
  int32_t outputs() const { return 1; }

  cudaError_t launch(const void* const* inputs, void* const* outputs, int64_t rows, int32_t width,
                     cudaStream_t stream) const {
    ClipBiasQuickGeluParams params = {};
    params.in = inputs[0];
    params.bias = inputs[1];
    params.out = outputs[0];
    params.rows = rows;
    params.width = width;
    return clip_bias_quick_gelu_launch(&params, stream);
  }
};

class LayerNormPlugin final : public RowPlugin<LayerNormPlugin, LayerNormData> {
 public:
  static constexpr char kName[] = "ClipResidualLayerNorm";
  using RowPlugin::RowPlugin;

  static const char* wrong(const LayerNormData& data) {
    const bool valid = (data.residual == 0 || data.residual == 1) && std::isfinite(data.epsilon) && data.epsilon > 0;
    return valid ? nullptr : "residual must be 0 or 1 and epsilon finite and above 0, both given";
  }
  int32_t half_inputs() const { return data_.residual ? 2 : 1; }
  int32_t inputs() const { return data_.residual ? 5 : 3; }
  int32_t outputs() const { return data_.residual ? 2 : 1; }

  cudaError_t launch(const void* const* inputs, void* const* outputs, int64_t rows, int32_t width,
                     cudaStream_t stream) const {
    ClipResidualLayerNormParams params = {};
    params.x = inputs[0];
    if (data_.residual) {
      params.delta = inputs[1];
      params.bias = inputs[2];
      params.sum_out = outputs[0];
    }
    params.scale = inputs[data_.residual ? 3 : 1];
    params.shift = inputs[data_.residual ? 4 : 2];
    params.out = outputs[data_.residual ? 1 : 0];
    params.rows = rows;
    params.width = width;
    params.epsilon = data_.epsilon;
    return clip_residual_layer_norm_launch(&params, stream);
  }
};

class GeluCreator final : public Creator<GeluPlugin, GeluData> {
 public:
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }

  nvinfer1::IPluginV2* createPlugin(const char*, const nvinfer1::PluginFieldCollection* fields) noexcept override {
    if (fields != nullptr && fields->nbFields != 0) {
      report(GeluPlugin::kName, "there are no fields");
      return nullptr;
    }
    return create({kLayout});
  }

 private:
  const nvinfer1::PluginFieldCollection collection_ = {0, nullptr};
};

class LayerNormCreator final : public Creator<LayerNormPlugin, LayerNormData> {
 public:
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }

  nvinfer1::IPluginV2* createPlugin(const char*, const nvinfer1::PluginFieldCollection* fields) noexcept override {
    LayerNormData data = {kLayout, -1, 0.0f};  // neither of them valid
    for (int32_t i = 0; fields != nullptr && i < fields->nbFields; ++i) {
      const nvinfer1::PluginField& field = fields->fields[i];
      const bool residual = std::strcmp(field.name, "residual") == 0, epsilon = std::strcmp(field.name, "epsilon") == 0;
      const auto type = residual ? nvinfer1::PluginFieldType::kINT32 : nvinfer1::PluginFieldType::kFLOAT32;
      if ((!residual && !epsilon) || field.type != type || field.length != 1 || field.data == nullptr) {
        report(LayerNormPlugin::kName, "the fields are residual, one int32, and epsilon, one float32");
        return nullptr;
      }
      if (residual)
        std::memcpy(&data.residual, field.data, sizeof(data.residual));
      else
        std::memcpy(&data.epsilon, field.data, sizeof(data.epsilon));
    }
    return create(data);
  }

 private:
  const nvinfer1::PluginField fields_[2] = {
      {"residual", nullptr, nvinfer1::PluginFieldType::kINT32, 1},
      {"epsilon", nullptr, nvinfer1::PluginFieldType::kFLOAT32, 1},
  };
  const nvinfer1::PluginFieldCollection collection_ = {2, fields_};
};

#define CLIP_TTRT_STRING_OF(x) #x
#define CLIP_TTRT_STRING(x) CLIP_TTRT_STRING_OF(x)
constexpr char kRuntime[] = "libnvinfer.so." CLIP_TTRT_STRING(NV_TENSORRT_MAJOR);

bool register_creator(nvinfer1::IPluginRegistry& registry, nvinfer1::IPluginCreator& creator) {
  return registry.registerCreator(creator, "") ||
         registry.getPluginCreator(creator.getPluginName(), kVersion, "") != nullptr;
}

}  // namespace

extern "C" int32_t clip_elementwise_register_plugins() {
  static bool registered = false;
  if (registered) return 1;
  void* runtime = dlopen(kRuntime, RTLD_LAZY | RTLD_NOLOAD);
  if (runtime == nullptr) return 0;
  using GetRegistry = nvinfer1::IPluginRegistry* (*)();
  const auto get_registry = reinterpret_cast<GetRegistry>(dlsym(runtime, "getPluginRegistry"));
  nvinfer1::IPluginRegistry* registry = get_registry == nullptr ? nullptr : get_registry();
  if (registry != nullptr) {
    // Live as long as the process: TensorRT keeps the pointers, and the library is never unloaded.
    static GeluCreator gelu;
    static LayerNormCreator layer_norm;
    const bool has_gelu = register_creator(*registry, gelu), has_layer_norm = register_creator(*registry, layer_norm);
    registered = has_gelu && has_layer_norm;
  }
  dlclose(runtime);  // gives back the reference that dlopen took; the library stays loaded
  return registered ? 1 : 0;
}

namespace {
__attribute__((constructor)) void register_when_loaded() { clip_elementwise_register_plugins(); }
}  // namespace
