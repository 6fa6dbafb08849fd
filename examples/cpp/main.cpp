// An artifact's encoders from C++: loads image.ts and text.ts, prints features and writes them for
// Python.
//
//   clip_features ARTIFACT_DIR INPUTS.pt [OUTPUT.pt] [--device cpu|cuda] [--runtime LIB] [--plugin
//   LIB]
//
// INPUTS.pt   torch.save({"images": float32 [N, 3, R, R], "tokens": int32 [N, 77]}, path); either
// may be absent OUTPUT.pt   the features, {"image": float32 [N, embed_dim], "text": the same}, for
// torch.load(.., weights_only=False)
// --runtime   libtorchtrt_runtime.so of the torch_tensorrt wheel, where the modules hold TensorRT
// engines
// --plugin    the library of fused kernels, where the engines were built with it
//
// Exit code 0; 2 with one sentence on stderr for anything that goes wrong.
#include <dlfcn.h>
#include <torch/csrc/jit/runtime/jit_exception.h>
#include <torch/script.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

constexpr const char* kUsage =
    "usage: clip_features ARTIFACT_DIR INPUTS.pt [OUTPUT.pt] [--device cpu|cuda] [--runtime LIB] "
    "[--plugin LIB]";
constexpr int64_t kShown = 4;  // values printed of each row

struct Encoder {
  const char* input;   // key in INPUTS.pt
  const char* module;  // file in the artifact
  const char* output;  // key in OUTPUT.pt
};
constexpr Encoder kEncoders[] = {{"images", "image.ts", "image"}, {"tokens", "text.ts", "text"}};

struct Options {
  std::string artifact, inputs, output, runtime, plugin;
  torch::Device device = torch::kCPU;
};

Options parse(int argc, char** argv) {
  Options options;
  std::vector<std::string> names;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (word.rfind("--", 0) != 0) {
      names.push_back(word);
      continue;
    }
    if (++i == argc) throw std::invalid_argument(kUsage);
    const std::string value = argv[i];
    if (word == "--device" && (value == "cpu" || value == "cuda"))
      options.device = torch::Device(value);
    else if (word == "--runtime")
      options.runtime = value;
    else if (word == "--plugin")
      options.plugin = value;
    else
      throw std::invalid_argument(kUsage);
  }
  if (names.size() < 2 || names.size() > 3) throw std::invalid_argument(kUsage);
  options.artifact = names[0];
  options.inputs = names[1];
  if (names.size() == 3) options.output = names[2];
  return options;
}

// What went wrong, in one line: Torch's messages come with source excerpts and stack traces.
std::string sentence(const std::exception& problem) {
  std::string text = problem.what();
  if (auto* raised = dynamic_cast<const torch::jit::JITException*>(&problem)) {
    text = raised->getOriginalMsg().value_or(text);  // what the module's own code raised
  } else if (auto* error = dynamic_cast<const c10::Error*>(&problem)) {
    text = error->what_without_backtrace();
  }
  text.erase(text.find_last_not_of(" \n") + 1);
  // An error inside an op comes after the interpreter's trace; any other message begins with the
  // point.
  if (text.rfind("The following operation failed", 0) == 0)
    return text.substr(text.find_last_of('\n') + 1);
  text.erase(std::min(text.find('\n'), text.size()));
  return text;
}

// Calls f; what it throws comes back as one line that begins with what was worked on.
template <class F>
auto naming(const std::string& what, F f) {
  try {
    return f();
  } catch (const std::exception& problem) {
    throw std::runtime_error(what + ": " + sentence(problem));
  }
}

// TensorRT engines are a class that this library registers on loading.
void* load_library(const std::string& path) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL);
  if (library == nullptr) throw std::runtime_error(dlerror());
  return library;
}

// The fused kernels, whose plugins TensorRT must know; it is loaded by then (kernels/library.h).
void load_plugins(const std::string& path) {
  using Register = int32_t (*)();
  const auto ask =
      reinterpret_cast<Register>(dlsym(load_library(path), "clip_ttrt_register_plugins"));
  if (ask == nullptr || ask() != 1)
    throw std::runtime_error(path +
                             ": this TensorRT does not take its plugins; build them with python -m "
                             "clip_ttrt.build_kernels");
}

// The runtime links TensorRT's own plugins, which an engine for a range of images may hold; they
// register on being asked to.
void register_tensorrt_plugins() {
  using Register = bool (*)(void* logger, const char* library_namespace);
  if (const auto ask = reinterpret_cast<Register>(dlsym(RTLD_DEFAULT, "initLibNvInferPlugins")))
    ask(nullptr, "");
}

c10::Dict<c10::IValue, c10::IValue> read_tensors(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  if (!file) throw std::runtime_error("cannot be read");
  const auto value = torch::jit::pickle_load(bytes);
  if (!value.isGenericDict()) throw std::runtime_error("holds no dict of tensors");
  return value.toGenericDict();
}

void write_tensors(const std::string& path, const c10::Dict<std::string, torch::Tensor>& tensors) {
  const auto bytes = torch::jit::pickle_save(tensors);
  std::ofstream file(path, std::ios::binary);
  if (!file.write(bytes.data(), bytes.size()).flush())
    throw std::runtime_error("cannot be written");
}

torch::jit::Module load_module(const std::string& path, torch::Device device) {
  try {
    auto module = torch::jit::load(path, device);
    module.eval();
    return module;
  } catch (const std::exception& problem) {
    if (std::string(problem.what()).find("torch.classes.tensorrt") == std::string::npos) throw;
    throw std::runtime_error(
        "holds a TensorRT engine; pass --runtime .../torch_tensorrt/lib/libtorchtrt_runtime.so");
  }
}

// features: float32 [N, D] on the CPU
void print(const char* name, const torch::Tensor& features) {
  const auto norms = features.to(torch::kDouble).norm(2, 1);
  for (int64_t row = 0; row < features.size(0); ++row) {
    std::printf("%-5s %3ld:", name, static_cast<long>(row));
    for (int64_t i = 0; i < std::min(kShown, features.size(1)); ++i)
      std::printf(" %15.9g", features[row][i].item<float>());
    std::printf("  ...  norm %.9g\n", norms[row].item<double>());
  }
}

void run(const Options& options) {
  if (options.device.is_cuda() && !at::hasCUDA())
    throw std::runtime_error("--device cuda: no CUDA GPU answers");
  if (!options.runtime.empty()) load_library(options.runtime);
  if (!options.plugin.empty()) load_plugins(options.plugin);
  register_tensorrt_plugins();
  const auto inputs = naming(options.inputs, [&] { return read_tensors(options.inputs); });
  c10::Dict<std::string, torch::Tensor> outputs;
  for (const auto& encoder : kEncoders) {
    if (!inputs.contains(encoder.input)) continue;
    const auto path = options.artifact + "/" + encoder.module;
    auto module = naming(path, [&] { return load_module(path, options.device); });
    const auto features = naming(encoder.input, [&] {
      const torch::NoGradGuard no_grad;
      const auto x = inputs.at(encoder.input).toTensor().to(options.device);
      return module.forward({x}).toTensor().cpu();
    });
    print(encoder.output, features);
    outputs.insert(encoder.output, features);
  }
  if (outputs.empty())
    throw std::runtime_error(options.inputs + ": holds neither images nor tokens");
  if (!options.output.empty())
    naming(options.output, [&] { write_tensors(options.output, outputs); });
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run(parse(argc, argv));
    return 0;
  } catch (const std::exception& problem) {
    std::fprintf(stderr, "clip_features: %s\n", sentence(problem).c_str());
    return 2;
  }
}
