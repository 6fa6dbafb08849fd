// The TensorRT plugin around the launcher of linear.h:
//
//   name     ClipLinear, version "3", default namespace
//   field    table   int8, as many as it has bytes: a ClipLinearTable and its entries, which say the layer's sizes too
//   inputs   0 x       fp16 [.., inputs]
//            1 weight  fp16, outputs * inputs elements, in any shape: a row for each output
//            2 bias    fp16, outputs elements; only with table.bias 1
//   output   0         fp16 [.., outputs]: x weight^T + bias
//
// x has rank 2 or more. Tensors are linear. The algorithm is chosen for the number of rows that a launch has, from the
// table; where another cuBLASLt runs than the one that the table is of, from cuBLASLt's own suggestions.
//
// The creator registers itself when the library is loaded, if libnvinfer is in the process by then;
// clip_linear_register_plugins() does the same later (../plugin_support.h).

#include <NvInferRuntime.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "../plugin_support.h"
#include "linear.h"

namespace {

constexpr char kName[] = "ClipLinear";
constexpr char kVersion[] = "3";
constexpr char kTable[] = "table";
constexpr int32_t kLayout = 2;  // of what an engine holds: this number, then the table
constexpr int32_t kMinRank = 2;

void report(const char* what) { std::fprintf(stderr, "%s plugin: %s\n", kName, what); }

// 0, or what clip_linear_* returned, with a word on stderr.
int32_t reported(int32_t status) {
  if (status == kClipLinearNoLibrary)
    report("there is no cuBLASLt: neither libcublasLt.so.13 nor libcublasLt.so.12 is found");
  else if (status > 0)
    report(cudaGetErrorString(static_cast<cudaError_t>(status)));
  else if (status < 0)
    report(("cuBLASLt answers with status " + std::to_string(-status)).c_str());
  return status;
}

int64_t volume(const nvinfer1::Dims& dims, int32_t first, int32_t last) {
  int64_t count = 1;
  for (int32_t i = first; i < last; ++i) count *= dims.d[i];
  return count;
}

// What a layer and its copies share: the table as it is serialised, and the layer of linear.h.
class Layer {
 public:
  // Throws std::exception where there is no memory; without a layer where the table or the library are wrong.
  explicit Layer(std::vector<char> table) : table_(std::move(table)) {
    const int32_t status = clip_linear_create(table_.data(), static_cast<int64_t>(table_.size()), &layer_);
    if (status == static_cast<int32_t>(cudaErrorInvalidValue)) {
      report("the table is not one of this version: sizes, a count and entries, as in linear.h");
      return;
    }
    if (reported(status) != 0) return;
    std::memcpy(&about_, table_.data(), sizeof(about_));
    static std::atomic<bool> told{false};
    if (about_.count > 0 && about_.version != clip_linear_version() && !told.exchange(true))
      report("the algorithms are of another cuBLASLt than this one, whose own suggestions take their place");
  }
  Layer(const Layer&) = delete;
  ~Layer() { clip_linear_destroy(layer_); }

  ClipLinear* get() const { return layer_; }
  const ClipLinearTable& about() const { return about_; }
  const std::vector<char>& table() const { return table_; }

 private:
  const std::vector<char> table_;
  ClipLinearTable about_ = {};
  ClipLinear* layer_ = nullptr;
};

class LinearPlugin final : public nvinfer1::IPluginV2DynamicExt {
 public:
  LinearPlugin(std::shared_ptr<const Layer> layer, const std::string& plugin_namespace)
      : layer_(std::move(layer)), namespace_(plugin_namespace) {}

  // IPluginV2DynamicExt

  nvinfer1::IPluginV2DynamicExt* clone() const noexcept override {
    try {
      return new LinearPlugin(layer_, namespace_);
    } catch (const std::exception& error) {
      report(error.what());
      return nullptr;
    }
  }

  nvinfer1::DimsExprs getOutputDimensions(int32_t, const nvinfer1::DimsExprs* inputs, int32_t,
                                          nvinfer1::IExprBuilder& builder) noexcept override {
    nvinfer1::DimsExprs out = inputs[0];
    if (out.nbDims > 0) out.d[out.nbDims - 1] = builder.constant(layer_->about().outputs);
    return out;
  }

  bool supportsFormatCombination(int32_t position, const nvinfer1::PluginTensorDesc* tensors, int32_t inputs,
                                 int32_t outputs) noexcept override {
    return inputs == this->inputs() && outputs == 1 && position >= 0 && position < inputs + outputs &&
           tensors[position].format == nvinfer1::TensorFormat::kLINEAR && tensors[position].type == nvinfer1::DataType::kHALF;
  }

  void configurePlugin(const nvinfer1::DynamicPluginTensorDesc*, int32_t, const nvinfer1::DynamicPluginTensorDesc*,
                       int32_t) noexcept override {}

  size_t getWorkspaceSize(const nvinfer1::PluginTensorDesc*, int32_t, const nvinfer1::PluginTensorDesc*,
                          int32_t) const noexcept override {
    return kClipLinearWorkspaceBytes;
  }

  int32_t enqueue(const nvinfer1::PluginTensorDesc* input, const nvinfer1::PluginTensorDesc*, const void* const* inputs,
                  void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
    const ClipLinearTable& about = layer_->about();
    const nvinfer1::Dims& x = input[0].dims;
    if (x.nbDims < kMinRank || x.d[x.nbDims - 1] != about.inputs) return refuse("x is not [.., inputs] of the layer, in rank 2 or more");
    if (volume(input[1].dims, 0, input[1].dims.nbDims) != int64_t{about.inputs} * about.outputs)
      return refuse("the weight has not as many elements as inputs times outputs of the layer");
    if (about.bias != 0 && volume(input[2].dims, 0, input[2].dims.nbDims) != about.outputs)
      return refuse("the bias has not one element for each output of the layer");
    ClipLinearParams params = {};
    params.layer = layer_->get();
    params.x = inputs[0];
    params.weight = inputs[1];
    params.bias = about.bias != 0 ? inputs[2] : nullptr;
    params.out = outputs[0];
    params.workspace = workspace;
    params.rows = volume(x, 0, x.nbDims - 1);
    return reported(clip_linear_launch(&params, stream));
  }

  // IPluginV2Ext

  nvinfer1::DataType getOutputDataType(int32_t, const nvinfer1::DataType* inputs, int32_t) const noexcept override {
    return inputs[0];
  }

  // IPluginV2

  const char* getPluginType() const noexcept override { return kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  int32_t getNbOutputs() const noexcept override { return 1; }
  int32_t initialize() noexcept override { return reported(clip_linear_prepare()); }
  void terminate() noexcept override {}
  size_t getSerializationSize() const noexcept override { return sizeof(kLayout) + layer_->table().size(); }

  void serialize(void* buffer) const noexcept override {
    std::memcpy(buffer, &kLayout, sizeof(kLayout));
    std::memcpy(static_cast<char*>(buffer) + sizeof(kLayout), layer_->table().data(), layer_->table().size());
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
  int32_t inputs() const { return layer_->about().bias != 0 ? 3 : 2; }

  static int32_t refuse(const char* what) {
    report(what);
    return static_cast<int32_t>(cudaErrorInvalidValue);
  }

  const std::shared_ptr<const Layer> layer_;
  std::string namespace_;
};

class LinearCreator final : public nvinfer1::IPluginCreator {
 public:
  const char* getPluginName() const noexcept override { return kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }

  nvinfer1::IPluginV2* createPlugin(const char*, const nvinfer1::PluginFieldCollection* fields) noexcept override {
    const nvinfer1::PluginField* table = fields != nullptr && fields->nbFields == 1 ? fields->fields : nullptr;
    if (table == nullptr || std::strcmp(table->name, kTable) != 0 || table->type != nvinfer1::PluginFieldType::kINT8 ||
        table->length < 1 || table->data == nullptr) {
      report("the field is table, as many int8 as it has bytes");
      return nullptr;
    }
    return create(static_cast<const char*>(table->data), static_cast<size_t>(table->length));
  }

  nvinfer1::IPluginV2* deserializePlugin(const char*, const void* bytes, size_t size) noexcept override {
    int32_t layout = 0;
    if (bytes == nullptr || size < sizeof(layout)) {
      report("the engine holds less data than this version writes");
      return nullptr;
    }
    std::memcpy(&layout, bytes, sizeof(layout));
    if (layout != kLayout) {
      report("the engine was built with another version of this plugin");
      return nullptr;
    }
    return create(static_cast<const char*>(bytes) + sizeof(layout), size - sizeof(layout));
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
  nvinfer1::IPluginV2* create(const char* table, size_t size) noexcept {
    try {
      const auto layer = std::make_shared<const Layer>(std::vector<char>(table, table + size));
      return layer->get() == nullptr ? nullptr : new LinearPlugin(layer, namespace_);
    } catch (const std::exception& error) {
      report(error.what());
      return nullptr;
    }
  }

  const nvinfer1::PluginField field_ = {kTable, nullptr, nvinfer1::PluginFieldType::kINT8, 1};
  const nvinfer1::PluginFieldCollection collection_ = {1, &field_};
  std::string namespace_;
};

}  // namespace

extern "C" int32_t clip_linear_register_plugins() {
  static bool registered = false;
  registered = registered || plugin_support::with_loaded_registry([](nvinfer1::IPluginRegistry& registry) {
    return plugin_support::register_creator<LinearCreator>(registry);
  });
  return registered ? 1 : 0;
}

namespace {
__attribute__((constructor)) void register_when_loaded() { clip_linear_register_plugins(); }
}  // namespace
