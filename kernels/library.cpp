// What the library tells about itself, and the registration of its plugins (library.h).
//
// clip_ttrt/build_kernels.py defines CLIP_TTRT_VERSION and CLIP_TTRT_ARCHITECTURES, texts, and
// CLIP_TTRT_PLUGINS where it compiles the plugins.

#include "library.h"

#ifdef CLIP_TTRT_PLUGINS
#include <NvInferRuntime.h>
#include <NvInferVersion.h>
#include <dlfcn.h>

#include <cstring>
#include <exception>
#include <mutex>

#include "plugin.h"
#define CLIP_TTRT_MAJOR NV_TENSORRT_MAJOR
#else
#define CLIP_TTRT_MAJOR 0
#endif

#define STRING_OF(x) #x
#define STRING(x) STRING_OF(x)

extern "C" const char clip_ttrt_about[] =
    "clip_ttrt kernels: version=" CLIP_TTRT_VERSION " architectures=" CLIP_TTRT_ARCHITECTURES
    " tensorrt=" STRING(CLIP_TTRT_MAJOR) ";";
extern "C" const char* clip_ttrt_version(void) { return CLIP_TTRT_VERSION; }
extern "C" const char* clip_ttrt_architectures(void) { return CLIP_TTRT_ARCHITECTURES; }
extern "C" int32_t clip_ttrt_tensorrt_major(void) { return CLIP_TTRT_MAJOR; }

#ifdef CLIP_TTRT_PLUGINS
namespace {

using nvinfer1::IPluginCreatorInterface;
using nvinfer1::IPluginCreatorV3One;
using nvinfer1::IPluginRegistry;

// Whether a registered creator is one of a plugin of this name and version. Asking TensorRT for one
// that it does not know (getCreator) logs an error, and so does registering one that it knows.
bool same_plugin(const IPluginCreatorInterface* registered, const IPluginCreatorV3One& creator) {
  if (registered == nullptr ||
      std::strcmp(registered->getInterfaceInfo().kind, creator.getInterfaceInfo().kind) != 0)
    return false;
  const auto& other = static_cast<const IPluginCreatorV3One&>(*registered);
  return std::strcmp(other.getPluginName(), creator.getPluginName()) == 0 &&
         std::strcmp(other.getPluginVersion(), creator.getPluginVersion()) == 0 &&
         std::strcmp(other.getPluginNamespace(), creator.getPluginNamespace()) == 0;
}

bool register_creator(IPluginRegistry& registry, IPluginCreatorV3One& creator) {
  int32_t count = 0;
  const auto* registered = registry.getAllCreators(&count);
  for (int32_t i = 0; registered != nullptr && i < count; ++i)
    if (same_plugin(registered[i], creator)) return true;
  return registry.registerCreator(creator, "");
}

// libnvinfer is looked up among the libraries that are loaded and never linked: this library then
// also loads where there is no TensorRT (the benchmarks, the PyTorch ops), and finds the one that
// Python loaded privately.
bool register_all() {
  void* runtime = dlopen("libnvinfer.so." STRING(CLIP_TTRT_MAJOR), RTLD_LAZY | RTLD_NOLOAD);
  if (runtime == nullptr) return false;
  using GetRegistry = IPluginRegistry* (*)();
  const auto get_registry = reinterpret_cast<GetRegistry>(dlsym(runtime, "getPluginRegistry"));
  IPluginRegistry* registry = get_registry == nullptr ? nullptr : get_registry();
  bool known = registry != nullptr;
  if (known)
    for (const auto& creators :
         {clip::attention_creators(), clip::elementwise_creators(), clip::linear_creators()})
      for (IPluginCreatorV3One* creator : creators)
        known = register_creator(*registry, *creator) && known;
  dlclose(runtime);  // gives back the reference that dlopen took; TensorRT stays loaded
  return known;
}

}  // namespace

extern "C" int32_t clip_ttrt_register_plugins(void) {
  static std::mutex mutex;
  static bool registered = false;
  try {
    const std::lock_guard<std::mutex> lock(mutex);
    registered = registered || register_all();
    return registered ? 1 : 0;
  } catch (const std::exception&) {  // of memory
    return 0;
  }
}

namespace {
__attribute__((constructor)) void register_when_loaded() { clip_ttrt_register_plugins(); }
}  // namespace
#else
extern "C" int32_t clip_ttrt_register_plugins(void) { return 0; }
#endif
