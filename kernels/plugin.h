// One base for the TensorRT plugins of this library: IPluginV3 of TensorRT 10 and 11.
//
// A plugin is a struct of what a layer knows and a class with what is its own. The members that
// kFields names are what a network gives and what an engine holds: both come to createPlugin.
// Plugins have the library's version (library.h): an engine never meets those of other sources.
// Outputs are fp16; tensors are linear. Errors are one line on stderr.
//
// A tensor of E4M3 goes through TensorRT as fp16 of half its width, two numbers in the bytes of
// one: layers that move such a tensor or take rows of it do not look into it.
#ifndef CLIP_TTRT_PLUGIN_H_
#define CLIP_TTRT_PLUGIN_H_

#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "e4m3.h"
#include "library.h"

namespace clip {

using namespace nvinfer1;

// The creators of the plugins, from the *_plugin.cpp, made when they are first asked for.
std::vector<IPluginCreatorV3One*> attention_creators();
std::vector<IPluginCreatorV3One*> elementwise_creators();
std::vector<IPluginCreatorV3One*> linear_creators();

// Shapes. A size below 0 is not known yet, and agrees with everything.
inline bool agrees(int64_t a, int64_t b) { return a < 0 || b < 0 || a == b; }
inline bool multiple(int64_t size, int64_t of) { return size < 0 || size % of == 0; }
// Of the first `axes` axes.
inline int64_t volume(const Dims& dims, int32_t axes) {
  int64_t count = 1;
  for (int32_t i = 0; i < axes; ++i) {
    if (dims.d[i] < 0) return -1;
    count *= dims.d[i];
  }
  return count;
}
inline int64_t volume(const Dims& dims) { return volume(dims, dims.nbDims); }
inline int64_t width_of(const Dims& dims) { return dims.d[dims.nbDims - 1]; }
inline int64_t rows_of(const Dims& dims) { return volume(dims, dims.nbDims - 1); }
// The last size becomes that of the E4M3 of so wide an output.
inline void halve_width(DimsExprs& dims, IExprBuilder& builder) {
  const IDimensionExpr*& width = dims.d[dims.nbDims - 1];
  width = builder.operation(DimensionOperation::kFLOOR_DIV, *width, *builder.constant(2));
}
// For the launchers' int32 sizes: what is beyond them stays beyond their limits.
inline int32_t narrow(int64_t n) { return n > INT32_MAX ? INT32_MAX : static_cast<int32_t>(n); }

// Fields: one int32, one float32, or int8, one or more
using Bytes = std::vector<int8_t>;

template <class Data, class Value>
struct Field {
  const char* name;
  Value Data::* member;
};
template <class Data, class Value>
Field(const char*, Value Data::*) -> Field<Data, Value>;

inline PluginField to_field(const char* name, const int32_t& value) {
  return {name, &value, PluginFieldType::kINT32, 1};
}
inline PluginField to_field(const char* name, const float& value) {
  return {name, &value, PluginFieldType::kFLOAT32, 1};
}
inline PluginField to_field(const char* name, const Bytes& value) {
  return {name, value.data(), PluginFieldType::kINT8, static_cast<int32_t>(value.size())};
}

// Null where the field is such a value, which it then becomes, else what it should be.
template <class Value>
const char* from_field(const PluginField& field, Value& value) {
  const PluginFieldType wanted = to_field("", value).type;
  if (field.type != wanted || field.length != 1 || field.data == nullptr)
    return wanted == PluginFieldType::kINT32 ? "one int32" : "one float32";
  std::memcpy(&value, field.data, sizeof(value));
  return nullptr;
}
inline const char* from_field(const PluginField& field, Bytes& value) {
  if (field.type != PluginFieldType::kINT8 || field.length < 1 || field.data == nullptr)
    return "int8, one or more";
  const auto* bytes = static_cast<const int8_t*>(field.data);
  value.assign(bytes, bytes + field.length);
  return nullptr;
}

template <class Made>
std::vector<PluginField> to_fields(const typename Made::Data& data) {
  const auto all = [&data](const auto&... field) {
    return std::vector<PluginField>{to_field(field.name, data.*field.member)...};
  };
  return std::apply(all, Made::kFields);
}

// Fills data in with what was given. Returns what is wrong with that: nothing where it is each
// field once and no other.
template <class Made>
std::string from_fields(const PluginFieldCollection* given, typename Made::Data& data) {
  const int32_t count = given == nullptr ? 0 : given->nbFields;
  if (count < 0 || (count > 0 && given->fields == nullptr)) return "the collection has no fields";
  const auto for_each = [](const auto& f) {
    std::apply([&f](const auto&... field) { (f(field), ...); }, Made::kFields);
  };
  std::set<std::string> names;
  for (int32_t i = 0; i < count; ++i) {
    const PluginField& one = given->fields[i];
    if (one.name == nullptr) return "a field has no name";
    const std::string name = one.name;
    if (!names.insert(name).second) return "the field " + name + " is given twice";
    std::string wrong = "there is no field " + name;
    for_each([&](const auto& field) {
      if (name != field.name) return;
      const char* wanted = from_field(one, data.*field.member);
      wrong = wanted == nullptr ? "" : "the field " + name + " is not " + wanted;
    });
    if (!wrong.empty()) return wrong;
  }
  std::string wrong;
  for_each([&](const auto& field) {
    if (wrong.empty() && names.count(field.name) == 0)
      wrong = std::string("the field ") + field.name + " is missing";
  });
  return wrong;
}

inline void report(const char* plugin, const std::string& what) {
  std::fprintf(stderr, "%s plugin: %s\n", plugin, what.c_str());
}

// Of a field out_scale: 0, where an output is fp16, or what E4M3 is divided by.
constexpr char kWrongOutScale[] = "out_scale must be 0 or a normal number above 0";

// What a launch is given: shapes of the inputs, the type of the first, and pointers.
struct Call {
  const Dims* in;
  DataType type;
  const void* const* x;
  void* const* y;
  void* workspace;
  cudaStream_t stream;
};

// Derived has
//   static constexpr char kName[]
//   static constexpr std::tuple kFields     of Field
//   static const char* complete(Data&)   what is wrong, or null; fills in what is no field
//   int32_t inputs() const, outputs() const
//   int32_t halves() const               so many inputs, the first, are fp16, the others fp32
//   const char* wrong_shapes(const Dims* in) const   or null
//   int32_t launch(const Call&) const    0, or a status that explain() knows
// and, where it differs from here, takes(), shape(), workspace(), prepare() and explain().
template <class Derived, class DataOfDerived>
class Plugin : public IPluginV3,
               public IPluginV3OneCore,
               public IPluginV3OneBuild,
               public IPluginV3OneRuntime {
 public:
  using Data = DataOfDerived;

  explicit Plugin(const Data& data) : data_(data), fields_(to_fields<Derived>(data_)) {}

  // What a plugin may have otherwise. shape: of an output, where it is not that of input 0.
  // prepare: for an execution context, ahead of launches that a CUDA graph may capture.
  bool takes(int32_t input, DataType type) const {
    return type == (input < self().halves() ? DataType::kHALF : DataType::kFLOAT);
  }
  void shape(const DimsExprs*, int32_t, DimsExprs&, IExprBuilder&) const {}
  size_t workspace() const { return 0; }
  int32_t prepare() const { return 0; }
  static std::string explain(int32_t status) {
    return cudaGetErrorString(static_cast<cudaError_t>(status));
  }

  // IPluginV3 and IPluginV3OneCore
  IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
    if (type == PluginCapabilityType::kCORE) return static_cast<IPluginV3OneCore*>(this);
    if (type == PluginCapabilityType::kBUILD) return static_cast<IPluginV3OneBuild*>(this);
    if (type == PluginCapabilityType::kRUNTIME) return static_cast<IPluginV3OneRuntime*>(this);
    return nullptr;
  }
  IPluginV3* clone() noexcept override {
    try {
      return new Derived(data_);
    } catch (const std::exception& error) {
      report(Derived::kName, error.what());
      return nullptr;
    }
  }
  const char* getPluginName() const noexcept override { return Derived::kName; }
  const char* getPluginVersion() const noexcept override { return clip_ttrt_version(); }
  const char* getPluginNamespace() const noexcept override { return ""; }

  // IPluginV3OneBuild
  int32_t getNbOutputs() const noexcept override { return self().outputs(); }

  int32_t getOutputDataTypes(DataType* types, int32_t count, const DataType*,
                             int32_t) const noexcept override {
    for (int32_t i = 0; i < count; ++i) types[i] = DataType::kHALF;
    return 0;
  }

  int32_t getOutputShapes(const DimsExprs* in, int32_t count, const DimsExprs*, int32_t,
                          DimsExprs* out, int32_t outputs, IExprBuilder& build) noexcept override {
    if (count != self().inputs()) return refuse("its fields ask for another number of inputs");
    Dims known[kMaxInputs] = {};
    for (int32_t i = 0; i < count; ++i) {
      known[i].nbDims = in[i].nbDims;
      for (int32_t axis = 0; axis < in[i].nbDims; ++axis) {
        const IDimensionExpr& size = *in[i].d[axis];
        known[i].d[axis] = size.isConstant() ? size.getConstantValue() : -1;
      }
    }
    if (const char* wrong = self().wrong_shapes(known)) return refuse(wrong);
    for (int32_t i = 0; i < outputs; ++i) {
      out[i] = in[0];
      self().shape(in, i, out[i], build);
    }
    return 0;
  }

  bool supportsFormatCombination(int32_t at, const DynamicPluginTensorDesc* tensors, int32_t inputs,
                                 int32_t outputs) noexcept override {
    if (inputs != self().inputs() || outputs != self().outputs() || at < 0) return false;
    const PluginTensorDesc& one = tensors[at].desc;
    return one.format == TensorFormat::kLINEAR &&
           (at < inputs ? self().takes(at, one.type) : one.type == DataType::kHALF);
  }

  int32_t configurePlugin(const DynamicPluginTensorDesc*, int32_t, const DynamicPluginTensorDesc*,
                          int32_t) noexcept override {
    return 0;
  }

  size_t getWorkspaceSize(const DynamicPluginTensorDesc*, int32_t, const DynamicPluginTensorDesc*,
                          int32_t) const noexcept override {
    return self().workspace();
  }

  // IPluginV3OneRuntime
  const PluginFieldCollection* getFieldsToSerialize() noexcept override {
    collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
    return &collection_;
  }

  IPluginV3* attachToContext(IPluginResourceContext*) noexcept override {
    return failed(self().prepare()) ? nullptr : clone();
  }

  int32_t onShapeChange(const PluginTensorDesc*, int32_t, const PluginTensorDesc*,
                        int32_t) noexcept override {
    return 0;
  }

  int32_t enqueue(const PluginTensorDesc* in, const PluginTensorDesc*, const void* const* x,
                  void* const* y, void* workspace, cudaStream_t stream) noexcept override {
    Dims dims[kMaxInputs] = {};
    for (int32_t i = 0; i < self().inputs(); ++i) dims[i] = in[i].dims;
    if (const char* wrong = self().wrong_shapes(dims)) return refuse(wrong);
    const int32_t status = self().launch({dims, in[0].type, x, y, workspace, stream});
    return failed(status) ? status : 0;
  }

 protected:
  const Data data_;

 private:
  static constexpr int32_t kMaxInputs = 8;

  const Derived& self() const { return static_cast<const Derived&>(*this); }

  static int32_t refuse(const char* what) {
    report(Derived::kName, what);
    return static_cast<int32_t>(cudaErrorInvalidValue);
  }

  static bool failed(int32_t status) {
    if (status != 0) report(Derived::kName, Derived::explain(status));
    return status != 0;
  }

  const std::vector<PluginField> fields_;
  PluginFieldCollection collection_ = {};
};

template <class Made>
class Creator final : public IPluginCreatorV3One {
 public:
  Creator() : fields_(to_fields<Made>({})) {
    for (PluginField& field : fields_) field.data = nullptr;  // names and types only
    collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
  }

  const char* getPluginName() const noexcept override { return Made::kName; }
  const char* getPluginVersion() const noexcept override { return clip_ttrt_version(); }
  const char* getPluginNamespace() const noexcept override { return ""; }
  const PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }

  IPluginV3* createPlugin(const char*, const PluginFieldCollection* given,
                          TensorRTPhase) noexcept override {
    try {
      typename Made::Data data = {};
      std::string wrong = from_fields<Made>(given, data);
      const char* of_values = wrong.empty() ? Made::complete(data) : nullptr;
      if (of_values != nullptr) wrong = of_values;
      if (wrong.empty()) return new Made(data);
      report(Made::kName, wrong);
    } catch (const std::exception& error) {
      report(Made::kName, error.what());
    }
    return nullptr;
  }

 private:
  std::vector<PluginField> fields_;
  PluginFieldCollection collection_ = {};
};

}  // namespace clip

#endif  // CLIP_TTRT_PLUGIN_H_
