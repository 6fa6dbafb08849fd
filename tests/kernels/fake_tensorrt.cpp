// A stand-in for libnvinfer: a registry that keeps creators and counts what it is asked, and plain
// functions through which test_plugins.py calls plugins as TensorRT does. Compiled with
// -DLAUNCHERS it is instead what stands in for the kernels: launchers that note what they are
// given.

#ifdef LAUNCHERS

#include <cstring>

#include "../../kernels/attention/attention.h"
#include "../../kernels/elementwise/elementwise.h"

extern "C" {
alignas(16) unsigned char launched[256];
int32_t launches = 0;
int32_t launch_status = 0;
}

template <class Params>
cudaError_t note(const Params* params) {
  std::memcpy(launched, params, sizeof(*params));
  ++launches;
  return static_cast<cudaError_t>(launch_status);
}

#define LAUNCHER(launcher, Params) \
  cudaError_t launcher(const Params* p, cudaStream_t) { return note(p); }
LAUNCHER(clip_attention_launch, ClipAttentionParams)
LAUNCHER(clip_bias_quick_gelu_launch, ClipBiasQuickGeluParams)
LAUNCHER(clip_residual_layer_norm_launch, ClipResidualLayerNormParams)
LAUNCHER(clip_extract_patches_launch, ClipExtractPatchesParams)
LAUNCHER(clip_embed_image_launch, ClipEmbedImageParams)

#else

#include <NvInferRuntime.h>

#include <cstring>
#include <memory>
#include <vector>

using namespace nvinfer1;

namespace {

struct Registry final : IPluginRegistry {
  std::vector<IPluginCreatorInterface*> creators;
  int32_t registrations = 0, questions = 0;

  bool registerCreator(IPluginCreatorInterface& creator, const char* const) noexcept override {
    creators.push_back(&creator);
    ++registrations;
    return true;
  }
  IPluginCreatorInterface* const* getAllCreators(int32_t* const count) const noexcept override {
    *count = static_cast<int32_t>(creators.size());
    return creators.empty() ? nullptr : creators.data();
  }
  IPluginCreatorInterface* const* getAllCreatorsRecursive(int32_t* const) noexcept {
    return nullptr;
  }
  IPluginCreatorInterface* getCreator(const char* const, const char* const,
                                      const char* const) noexcept override {
    ++questions;  // where TensorRT logs an error for what it does not know
    return nullptr;
  }
  bool deregisterCreator(const IPluginCreatorInterface&) noexcept override { return false; }
  void setErrorRecorder(IErrorRecorder* const) noexcept override {}
  IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
  bool isParentSearchEnabled() const override { return false; }
  void setParentSearchEnabled(const bool) override {}
  PluginLibraryHandle loadLibrary(const char*) noexcept override { return nullptr; }
  void deregisterLibrary(PluginLibraryHandle) noexcept override {}
  IPluginResource* acquirePluginResource(const char*, IPluginResource*) noexcept override {
    return nullptr;
  }
  int32_t releasePluginResource(const char*) noexcept override { return 0; }
#if NV_TENSORRT_MAJOR < 11
  bool registerCreator(IPluginCreator&, const char* const) noexcept override { return false; }
  IPluginCreator* const* getPluginCreatorList(int32_t* const) const noexcept override {
    return nullptr;
  }
  IPluginCreator* getPluginCreator(const char* const, const char* const,
                                   const char* const) noexcept override {
    ++questions;
    return nullptr;
  }
  bool deregisterCreator(const IPluginCreator&) noexcept override { return false; }
#endif
};

Registry registry;

// Sizes of tensors as a plugin's shape function has them: known, or below 0.
struct Size final : IDimensionExpr, apiv::VDimensionExpr {
  explicit Size(int64_t size) : size(size) { mImpl = this; }
  bool isConstant() const override { return size >= 0; }
  int64_t getConstantValue() const override { return size; }
  bool isSizeTensor() const override { return false; }
  const int64_t size;
};

struct Sizes final : IExprBuilder, apiv::VExprBuilder {
  Sizes() { mImpl = this; }
  const IDimensionExpr* constant(int64_t size) override {
    made.push_back(std::make_unique<Size>(size));
    return made.back().get();
  }
  const IDimensionExpr* operation(DimensionOperation op, const IDimensionExpr& first,
                                  const IDimensionExpr& second) override {
    const int64_t a = static_cast<const Size&>(first).size,
                  b = static_cast<const Size&>(second).size;
    if (a < 0 || b < 0) return constant(-1);
    if (op == DimensionOperation::kPROD) return constant(a * b);
    return op == DimensionOperation::kFLOOR_DIV ? constant(a / b) : nullptr;
  }
  const IDimensionExpr* declareSizeTensor(int32_t, const IDimensionExpr&,
                                          const IDimensionExpr&) override {
    return nullptr;
  }
  std::vector<std::unique_ptr<Size> > made;
};

template <class Part>
Part& part(IPluginV3* plugin, PluginCapabilityType type) {
  return *static_cast<Part*>(plugin->getCapabilityInterface(type));
}
auto& core(IPluginV3* p) { return part<IPluginV3OneCore>(p, PluginCapabilityType::kCORE); }
auto& build(IPluginV3* p) { return part<IPluginV3OneBuild>(p, PluginCapabilityType::kBUILD); }
auto& runtime(IPluginV3* p) { return part<IPluginV3OneRuntime>(p, PluginCapabilityType::kRUNTIME); }

// A shape as its rank, then up to 8 sizes, below 0 where they are not known.
constexpr int kSizes = 9;

IPluginCreatorV3One& creator(int32_t i) {
  return static_cast<IPluginCreatorV3One&>(*registry.creators.at(i));
}

}  // namespace

extern "C" {

IPluginRegistry* getPluginRegistry() { return &registry; }
int32_t tensorrt_major() { return NV_TENSORRT_MAJOR; }
int32_t registrations() { return registry.registrations; }
int32_t questions() { return registry.questions; }

const char* creator_name(int32_t i) { return creator(i).getPluginName(); }
const char* creator_version(int32_t i) { return creator(i).getPluginVersion(); }
const char* creator_namespace(int32_t i) { return creator(i).getPluginNamespace(); }
const PluginFieldCollection* creator_fields(int32_t i) { return creator(i).getFieldNames(); }
IPluginV3* create(int32_t i, const PluginFieldCollection* fields, int32_t phase) {
  return creator(i).createPlugin("layer", fields, static_cast<TensorRTPhase>(phase));
}

const char* plugin_name(IPluginV3* plugin) { return core(plugin).getPluginName(); }
const char* plugin_version(IPluginV3* plugin) { return core(plugin).getPluginVersion(); }
IPluginV3* copy(IPluginV3* plugin) { return plugin->clone(); }
IPluginV3* attach(IPluginV3* plugin) { return runtime(plugin).attachToContext(nullptr); }
void destroy(IPluginV3* plugin) { delete plugin; }
const PluginFieldCollection* fields(IPluginV3* plugin) {
  return runtime(plugin).getFieldsToSerialize();
}
int32_t outputs(IPluginV3* plugin) { return build(plugin).getNbOutputs(); }
size_t workspace(IPluginV3* plugin) {
  return build(plugin).getWorkspaceSize(nullptr, 0, nullptr, 0);
}

int32_t output_types(IPluginV3* plugin, const int32_t* in, int32_t inputs, int32_t* out) {
  const int32_t count = outputs(plugin);
  std::vector<DataType> types(inputs), found(count, DataType::kINT8);
  for (int32_t i = 0; i < inputs; ++i) types[i] = static_cast<DataType>(in[i]);
  const int32_t status =
      build(plugin).getOutputDataTypes(found.data(), count, types.data(), inputs);
  for (int32_t i = 0; i < count; ++i) out[i] = static_cast<int32_t>(found[i]);
  return status;
}

// Whether the tensor at a position may have a type and format, the others being of no type.
int32_t supports(IPluginV3* plugin, int32_t at, int32_t type, int32_t format, int32_t inputs,
                 int32_t outputs) {
  std::vector<DynamicPluginTensorDesc> tensors(inputs + outputs);
  tensors.at(at).desc.type = static_cast<DataType>(type);
  tensors.at(at).desc.format = static_cast<TensorFormat>(format);
  return build(plugin).supportsFormatCombination(at, tensors.data(), inputs, outputs) ? 1 : 0;
}

int32_t output_shapes(IPluginV3* plugin, const int64_t* dims, int32_t inputs, int64_t* out) {
  Sizes sizes;
  std::vector<DimsExprs> in(inputs), found(outputs(plugin));
  for (int32_t i = 0; i < inputs; ++i) {
    in[i].nbDims = static_cast<int32_t>(dims[kSizes * i]);
    for (int32_t axis = 0; axis < in[i].nbDims; ++axis)
      in[i].d[axis] = sizes.constant(dims[kSizes * i + 1 + axis]);
  }
  const int32_t count = static_cast<int32_t>(found.size());
  const int32_t status =
      build(plugin).getOutputShapes(in.data(), inputs, nullptr, 0, found.data(), count, sizes);
  for (int32_t i = 0; status == 0 && i < count; ++i) {
    out[kSizes * i] = found[i].nbDims;
    for (int32_t axis = 0; axis < found[i].nbDims; ++axis)
      out[kSizes * i + 1 + axis] = static_cast<const Size*>(found[i].d[axis])->size;
  }
  return status;
}

// Input i is at address 16 * (i + 1), output i at 1600 + 16 * i, the workspace at 16000.
int32_t enqueue(IPluginV3* plugin, const int64_t* dims, const int32_t* types, int32_t inputs) {
  std::vector<PluginTensorDesc> in(inputs);
  std::vector<const void*> x(inputs);
  std::vector<void*> y(outputs(plugin));
  for (int32_t i = 0; i < inputs; ++i) {
    in[i].dims.nbDims = static_cast<int32_t>(dims[kSizes * i]);
    for (int32_t axis = 0; axis < in[i].dims.nbDims; ++axis)
      in[i].dims.d[axis] = dims[kSizes * i + 1 + axis];
    in[i].type = static_cast<DataType>(types[i]);
    x[i] = reinterpret_cast<const void*>(uintptr_t(16) * (i + 1));
  }
  for (size_t i = 0; i < y.size(); ++i) y[i] = reinterpret_cast<void*>(1600 + 16 * i);
  return runtime(plugin).enqueue(in.data(), nullptr, x.data(), y.data(),
                                 reinterpret_cast<void*>(uintptr_t{16000}), nullptr);
}

}  // extern "C"

#endif
