// What the TensorRT plugins of this library share: registering their creators with the TensorRT of this process.
//
// libnvinfer is looked up among the libraries already loaded and never linked: the library then also loads where
// there is no TensorRT (the benchmarks, the PyTorch ops), and finds the one that Python loaded privately.
#ifndef CLIP_TTRT_PLUGIN_SUPPORT_H_
#define CLIP_TTRT_PLUGIN_SUPPORT_H_

#include <NvInferRuntime.h>
#include <NvInferVersion.h>

#include <dlfcn.h>

namespace plugin_support {

#define CLIP_TTRT_STRING_OF(x) #x
#define CLIP_TTRT_STRING(x) CLIP_TTRT_STRING_OF(x)
constexpr char kRuntime[] = "libnvinfer.so." CLIP_TTRT_STRING(NV_TENSORRT_MAJOR);

// Registers a creator in the default namespace; true where TensorRT knows it now, also if it did before. The creator
// lives as long as the process: TensorRT keeps the pointer, and the library is never unloaded.
template <class Creator>
bool register_creator(nvinfer1::IPluginRegistry& registry) {
  static Creator creator;
  return registry.registerCreator(creator, "") ||
         registry.getPluginCreator(creator.getPluginName(), creator.getPluginVersion(), "") != nullptr;
}

// Calls register_all(registry), which returns a bool, with the registry of the TensorRT that is loaded; false where none is.
template <class RegisterAll>
bool with_loaded_registry(RegisterAll register_all) {
  void* runtime = dlopen(kRuntime, RTLD_LAZY | RTLD_NOLOAD);
  if (runtime == nullptr) return false;
  using GetRegistry = nvinfer1::IPluginRegistry* (*)();
  const auto get_registry = reinterpret_cast<GetRegistry>(dlsym(runtime, "getPluginRegistry"));
  nvinfer1::IPluginRegistry* registry = get_registry == nullptr ? nullptr : get_registry();
  const bool registered = registry != nullptr && register_all(*registry);
  dlclose(runtime);  // gives back the reference that dlopen took; the library stays loaded
  return registered;
}

}  // namespace plugin_support

#endif  // CLIP_TTRT_PLUGIN_SUPPORT_H_
