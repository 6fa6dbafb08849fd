// The TensorRT plugin around clip_attention_launch (attention.h).
//
//   name     ClipAttention, version "3", default namespace
//   fields   heads       int32  1 .. 40
//            tokens      int32  1 .. 1024
//            causal      int32  0 or 1
//            query_bias  int32  0 or 1: whether there is an input 1
//   input 0  qkv, fp16, linear, [batch * tokens, 3 * heads * 64] or [batch, tokens, 3 * heads * 64]
//   input 1  query_bias, fp32, linear, [heads * 64]: added to q before the scores
//   output 0 fp16, linear, input 0's shape with heads * 64 as its last dimension
//
// Rank 2 is what TensorRT's matrix products give and take without a copy; the number of tokens, which the
// shape then does not show, is a field.
//
// The creator registers itself when the library is loaded, if libnvinfer is in the process by then;
// clip_attention_register_plugin() does the same later (../plugin_support.h).

#include <NvInferRuntime.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <string>

#include "../plugin_support.h"
#include "attention.h"

namespace {

constexpr char kName[] = "ClipAttention";
constexpr char kVersion[] = "3";
constexpr int32_t kOutputs = 1;
constexpr int32_t kQkv = 0, kQueryBias = 1;  // inputs
constexpr int32_t kFlatRank = 2;     // [batch * tokens, width]
constexpr int32_t kBatchedRank = 3;  // [batch, tokens, width]

// What an engine file holds for one attention layer.
struct Serialized {
  int32_t layout;  // of this struct; another number is another version of this file
  int32_t heads;
  int32_t tokens;
  int32_t causal;
  int32_t query_bias;
};
constexpr int32_t kLayout = 2;

bool valid(const Serialized& data) {
  return data.heads >= 1 && data.heads <= kClipAttentionMaxHeads && data.tokens >= 1 &&
         data.tokens <= kClipAttentionMaxTokens && (data.causal == 0 || data.causal == 1) &&
         (data.query_bias == 0 || data.query_bias == 1);
}

constexpr char kWrongQkv[] =
    "qkv is neither [batch * tokens, 3 * heads * 64] nor [batch, tokens, 3 * heads * 64] for the heads and "
    "tokens that it was built with";
constexpr char kWrongBias[] = "query_bias is not [heads * 64] for the heads that it was built with";

void report(const char* what) { std::fprintf(stderr, "%s plugin: %s\n", kName, what); }

class AttentionPlugin final : public nvinfer1::IPluginV2DynamicExt {
 public:
  AttentionPlugin(const Serialized& data, const std::string& plugin_namespace)
      : data_(data), namespace_(plugin_namespace) {}

  // IPluginV2DynamicExt

  nvinfer1::IPluginV2DynamicExt* clone() const noexcept override {
    try {
      return new AttentionPlugin(data_, namespace_);
    } catch (const std::exception& error) {
      report(error.what());
      return nullptr;
    }
  }

  nvinfer1::DimsExprs getOutputDimensions(int32_t, const nvinfer1::DimsExprs* inputs, int32_t count,
                                          nvinfer1::IExprBuilder& builder) noexcept override {
    nvinfer1::DimsExprs out = {};
    out.nbDims = -1;  // TensorRT's sign of an error
    if (count != this->inputs()) {
      report("the inputs are qkv and, exactly where the field query_bias is 1, query_bias");
      return out;
    }
    const int32_t rank = inputs[kQkv].nbDims;
    if (rank != kFlatRank && rank != kBatchedRank) {
      report(kWrongQkv);
      return out;
    }
    // Sizes that are known at this time; enqueue checks them all.
    const nvinfer1::IDimensionExpr* width = inputs[kQkv].d[rank - 1];
    if (width->isConstant() && width->getConstantValue() != 3 * this->width()) {
      report(kWrongQkv);
      return out;
    }
    if (count > kQueryBias) {
      const nvinfer1::DimsExprs& bias = inputs[kQueryBias];
      if (bias.nbDims != 1 || (bias.d[0]->isConstant() && bias.d[0]->getConstantValue() != this->width())) {
        report(kWrongBias);
        return out;
      }
    }
    out = inputs[kQkv];
    out.d[rank - 1] = builder.constant(this->width());
    return out;
  }

  bool supportsFormatCombination(int32_t position, const nvinfer1::PluginTensorDesc* tensors,
                                 int32_t inputs, int32_t outputs) noexcept override {
    if (inputs != this->inputs() || outputs != kOutputs || position < 0 || position >= inputs + outputs)
      return false;
    const bool bias = position == kQueryBias && position < inputs;
    return tensors[position].type == (bias ? nvinfer1::DataType::kFLOAT : nvinfer1::DataType::kHALF) &&
           tensors[position].format == nvinfer1::TensorFormat::kLINEAR;
  }

  void configurePlugin(const nvinfer1::DynamicPluginTensorDesc*, int32_t,
                       const nvinfer1::DynamicPluginTensorDesc*, int32_t) noexcept override {}

  size_t getWorkspaceSize(const nvinfer1::PluginTensorDesc*, int32_t, const nvinfer1::PluginTensorDesc*,
                          int32_t) const noexcept override {
    return 0;
  }

  int32_t enqueue(const nvinfer1::PluginTensorDesc* input, const nvinfer1::PluginTensorDesc*,
                  const void* const* inputs, void* const* outputs, void*,
                  cudaStream_t stream) noexcept override {
    const nvinfer1::Dims& dims = input[kQkv].dims;
    const bool flat = dims.nbDims == kFlatRank;
    if ((!flat && (dims.nbDims != kBatchedRank || dims.d[1] != data_.tokens)) ||
        dims.d[dims.nbDims - 1] != 3 * width()) {
      report(kWrongQkv);
      return static_cast<int32_t>(cudaErrorInvalidValue);
    }
    if (flat && dims.d[0] % data_.tokens != 0) {
      report("the number of rows is not a multiple of the tokens that it was built with");
      return static_cast<int32_t>(cudaErrorInvalidValue);
    }
    if (data_.query_bias != 0) {
      const nvinfer1::Dims& bias = input[kQueryBias].dims;
      if (bias.nbDims != 1 || bias.d[0] != width() || inputs[kQueryBias] == nullptr) {
        report(kWrongBias);
        return static_cast<int32_t>(cudaErrorInvalidValue);
      }
    }
    ClipAttentionParams params = {};
    params.qkv = inputs[kQkv];
    params.out = outputs[0];
    params.query_bias = data_.query_bias != 0 ? inputs[kQueryBias] : nullptr;
    params.batch = flat ? dims.d[0] / data_.tokens : dims.d[0];
    params.heads = data_.heads;
    params.tokens = data_.tokens;
    params.causal = data_.causal;
    if (params.batch == 0) return 0;
    const cudaError_t status = clip_attention_launch(&params, stream);
    if (status != cudaSuccess) report(cudaGetErrorString(status));
    return static_cast<int32_t>(status);
  }

  // IPluginV2Ext

  nvinfer1::DataType getOutputDataType(int32_t, const nvinfer1::DataType* inputs,
                                       int32_t) const noexcept override {
    return inputs[kQkv];
  }

  // IPluginV2

  const char* getPluginType() const noexcept override { return kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  int32_t getNbOutputs() const noexcept override { return kOutputs; }
  int32_t initialize() noexcept override { return 0; }
  void terminate() noexcept override {}
  size_t getSerializationSize() const noexcept override { return sizeof(Serialized); }

  void serialize(void* buffer) const noexcept override {
    std::memcpy(buffer, &data_, sizeof(data_));
  }

  void destroy() noexcept override { delete this; }

  void setPluginNamespace(const char* plugin_namespace) noexcept override {
    try {
      namespace_ = plugin_namespace == nullptr ? "" : plugin_namespace;
    } catch (const std::exception& error) {
      report(error.what());
    }
  }

  const char* getPluginNamespace() const noexcept override { return namespace_.c_str(); }

 private:
  int32_t inputs() const { return data_.query_bias != 0 ? 2 : 1; }
  int32_t width() const { return data_.heads * kClipAttentionHeadDim; }

  const Serialized data_;
  std::string namespace_;
};

class AttentionPluginCreator final : public nvinfer1::IPluginCreator {
 public:
  const char* getPluginName() const noexcept override { return kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }

  nvinfer1::IPluginV2* createPlugin(const char*,
                                    const nvinfer1::PluginFieldCollection* fields) noexcept override {
    Serialized data = {kLayout, 0, 0, -1, -1};  // none of the fields valid
    for (int32_t i = 0; fields != nullptr && i < fields->nbFields; ++i) {
      const nvinfer1::PluginField& field = fields->fields[i];
      int32_t* value = field.name == nullptr                        ? nullptr
                       : std::strcmp(field.name, "heads") == 0      ? &data.heads
                       : std::strcmp(field.name, "tokens") == 0     ? &data.tokens
                       : std::strcmp(field.name, "causal") == 0     ? &data.causal
                       : std::strcmp(field.name, "query_bias") == 0 ? &data.query_bias
                                                                    : nullptr;
      if (value == nullptr || field.type != nvinfer1::PluginFieldType::kINT32 || field.length != 1 ||
          field.data == nullptr) {
        report("the fields are heads, tokens, causal and query_bias, one int32 each");
        return nullptr;
      }
      std::memcpy(value, field.data, sizeof(*value));
    }
    return create(data);
  }

  nvinfer1::IPluginV2* deserializePlugin(const char*, const void* bytes, size_t size) noexcept override {
    Serialized data = {};
    if (bytes == nullptr || size != sizeof(data)) {
      report("the engine holds data of another size than this version writes");
      return nullptr;
    }
    std::memcpy(&data, bytes, sizeof(data));
    if (data.layout != kLayout) {
      report("the engine was built with another version of this plugin");
      return nullptr;
    }
    return create(data);
  }

  void setPluginNamespace(const char* plugin_namespace) noexcept override {
    try {
      namespace_ = plugin_namespace == nullptr ? "" : plugin_namespace;
    } catch (const std::exception& error) {
      report(error.what());
    }
  }

  const char* getPluginNamespace() const noexcept override { return namespace_.c_str(); }

 private:
  nvinfer1::IPluginV2* create(const Serialized& data) noexcept {
    if (!valid(data)) {
      report("heads must be 1 to 40, tokens 1 to 1024, causal and query_bias 0 or 1, all given");
      return nullptr;
    }
    try {
      return new AttentionPlugin(data, namespace_);
    } catch (const std::exception& error) {
      report(error.what());
      return nullptr;
    }
  }

  const nvinfer1::PluginField fields_[4] = {
      {"heads", nullptr, nvinfer1::PluginFieldType::kINT32, 1},
      {"tokens", nullptr, nvinfer1::PluginFieldType::kINT32, 1},
      {"causal", nullptr, nvinfer1::PluginFieldType::kINT32, 1},
      {"query_bias", nullptr, nvinfer1::PluginFieldType::kINT32, 1},
  };
  const nvinfer1::PluginFieldCollection collection_ = {4, fields_};
  std::string namespace_;
};

}  // namespace

extern "C" int32_t clip_attention_register_plugin() {
  static bool registered = false;
  registered = registered || plugin_support::with_loaded_registry([](nvinfer1::IPluginRegistry& registry) {
    return plugin_support::register_creator<AttentionPluginCreator>(registry);
  });
  return registered ? 1 : 0;
}

namespace {
__attribute__((constructor)) void register_when_loaded() { clip_attention_register_plugin(); }
}  // namespace
