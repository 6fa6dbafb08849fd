// The headers of JPEG files, and their decoding through nvImageCodec (jpeg.h).

#include "jpeg.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "nvimagecodec.h"

namespace {

using namespace nvimagecodec;

// Headers

int64_t adler32(const uint8_t* data, int64_t size) {
  uint32_t low = 1, high = 0;  // 256 bytes overflow neither
  for (int64_t i = 0; i < size; ++i) high += low += data[i];
  return int64_t{high % 65521} << 16 | low % 65521;
}

// Whether an end of image is among the last 1024 bytes.
bool ends(const uint8_t* data, int64_t size) {
  for (int64_t i = size - 2; i > std::max<int64_t>(0, size - 1025); --i)
    if (data[i] == 0xFF && data[i + 1] == 0xD9) return true;
  return false;
}

// NVIDIA gives no limits of the engines; what they refuse the CPU gets.
bool fits(int64_t side) { return 16 <= side && side <= 16384; }

// A JPEG's samplings that the engines take: grey, 4:4:4, 4:2:2, 4:2:0.
bool easy_sampling(const uint8_t* components, int64_t channels) {
  const uint8_t first = components[1];
  if (channels == 1) return first == 0x11;
  return (first == 0x11 || first == 0x21 || first == 0x22) && components[4] == 0x11 &&
         components[7] == 0x11 && components[0] == 1 && components[3] == 2 && components[6] == 3;
}

struct Header {
  int64_t route = kClipJpegOther, height = 0, width = 0, channels = 0;
};

Header scan(const uint8_t* data, int64_t size, int64_t large) {
  constexpr uint8_t kBaseline = 0xC0, kProgressive = 0xC2, kScan = 0xDA, kAdobe = 0xEE;
  if (size < 3 || data[0] != 0xFF || data[1] != 0xD8 || data[2] != 0xFF) return {};
  int64_t at = 2, height = 0, width = 0, channels = 0;
  uint8_t kind = 0, bits = 0, components[9] = {};
  bool rgb = false;
  while (true) {
    if (at + 4 > size || data[at] != 0xFF) return {};
    const uint8_t marker = data[at + 1];
    if (marker == kScan && kind != 0) break;
    if (kBaseline <= marker && marker <= kProgressive && kind == 0) {
      if (at + 10 > size) return {};
      kind = marker, bits = data[at + 4], channels = data[at + 9];
      height = data[at + 5] << 8 | data[at + 6], width = data[at + 7] << 8 | data[at + 8];
      std::copy_n(data + at + 10, std::min(size - at - 10, std::min<int64_t>(9, 3 * channels)),
                  components);
    } else if (marker == kAdobe && at + 9 <= size && std::memcmp(data + at + 4, "Adobe", 5) == 0) {
      if (at + 15 >= size) return {};
      rgb = data[at + 15] != 1;  // the transform: YCbCr is 1
    } else if (marker != 0xC4 && marker != 0xDB && marker != 0xDD && marker != 0xFE &&
               (marker & 0xF0) != 0xE0) {  // tables, comments and applications' own
      return {};
    }
    at += 2 + (data[at + 2] << 8 | data[at + 3]);
  }
  if (at + 4 >= size) return {};
  rgb = rgb || (components[0] == 'R' && components[3] == 'G' && components[6] == 'B');
  // Chroma that is halved in height alone (4:4:0) older libjpegs upsample otherwise than Pillow's.
  const bool tall = channels == 3 && components[1] >> 4 < (components[1] & 15);
  if (bits != 8 || (channels != 1 && (channels != 3 || rgb)) || tall || width * height == 0 ||
      width * height > large)
    return {};
  const bool easy = kind == kBaseline && data[at + 4] == channels && fits(width) && fits(height) &&
                    easy_sampling(components, channels) && ends(data, size);
  return {easy ? kClipJpegEngines : kClipJpegLibrary, height, width, channels};
}

// Decoding

void check(Status status, const char* what) {
  if (status != 0)
    throw std::runtime_error(std::string(what) + " fails with status " + std::to_string(status));
}

void* open(const char* path) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
  if (library == nullptr) throw std::runtime_error(dlerror());
  return library;
}

template <class Function>
void find(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  if (function == nullptr) throw std::runtime_error(dlerror());
}

struct Engines : Functions {
  Instance instance = nullptr;
  Extension extension = nullptr;
  Decoder decoder = nullptr;
  bool cpu;

  Engines(const char* path, const char* extension_path, int32_t device, int32_t threads)
      : Functions{}, cpu(device < 0) {
    void* library = open(path);
#define FIND(name) find(library, #name, name)
    FIND(nvimgcodecGetProperties);
    FIND(nvimgcodecInstanceCreate);
    FIND(nvimgcodecInstanceDestroy);
    FIND(nvimgcodecExtensionCreate);
    FIND(nvimgcodecExtensionDestroy);
    FIND(nvimgcodecDecoderCreate);
    FIND(nvimgcodecDecoderDestroy);
    FIND(nvimgcodecDecoderDecode);
    FIND(nvimgcodecFutureWaitForAll);
    FIND(nvimgcodecFutureGetProcessingStatus);
    FIND(nvimgcodecFutureDestroy);
    FIND(nvimgcodecCodeStreamCreateFromHostMem);
    FIND(nvimgcodecCodeStreamGetImageInfo);
    FIND(nvimgcodecCodeStreamDestroy);
    FIND(nvimgcodecImageCreate);
    FIND(nvimgcodecImageDestroy);
#undef FIND
    Properties properties{};
    check(nvimgcodecGetProperties(&properties), "nvimgcodecGetProperties");
    if (properties.version < kVersion || properties.version >= kNextVersion)
      throw std::runtime_error("its version is " + std::to_string(properties.version / 1000) + "." +
                               std::to_string(properties.version / 100 % 10) + ", not 0.9");
    ExtensionDescription description{};
    Status (*describe)(ExtensionDescription*) = nullptr;
    find(open(extension_path), "nvimgcodecExtensionModuleEntry", describe);
    check(describe(&description), "nvimgcodecExtensionModuleEntry");
    try {
      InstanceInfo info{};
      info.builtin_modules = 1;
      check(nvimgcodecInstanceCreate(&instance, &info), "nvimgcodecInstanceCreate");
      check(nvimgcodecExtensionCreate(instance, &extension, &description),
            "nvimgcodecExtensionCreate");
      Backend backend{};
      backend.kind = cpu ? kCpuOnlyBackend : kEnginesBackend;
      backend.params.load_hint = 1;
      backend.params.load_hint_policy = kFixedLoadHint;
      ExecutionParams params{};
      params.cpu_threads = threads;
      params.device = cpu ? kCpuOnlyDevice : device;
      params.backend_count = 1;
      params.backends = &backend;
      check(nvimgcodecDecoderCreate(instance, &decoder, &params,
                                    ":fancy_upsampling=1 :force_batch_single=1"),
            "nvimgcodecDecoderCreate");
    } catch (...) {
      destroy();
      throw;
    }
  }

  void destroy() {
    if (decoder != nullptr) nvimgcodecDecoderDestroy(decoder);
    if (extension != nullptr) nvimgcodecExtensionDestroy(extension);
    if (instance != nullptr) nvimgcodecInstanceDestroy(instance);
  }

  ~Engines() { destroy(); }

  Status decode(ClipJpegFile* files, int32_t count, cudaStream_t stream);
};

// Handles of a batch, all destroyed at its end.
template <class Handle>
struct Handles : std::vector<Handle> {
  Status (*destroy)(Handle);

  Handles(int32_t count, Status (*destroy)(Handle)) : destroy(destroy) { this->reserve(count); }
  Handles(const Handles&) = delete;
  ~Handles() {
    for (Handle handle : *this) destroy(handle);
  }
};

Status Engines::decode(ClipJpegFile* files, int32_t count, cudaStream_t stream) {
  Handles<Stream> streams(count, nvimgcodecCodeStreamDestroy);
  Handles<Image> images(count, nvimgcodecImageDestroy);
  std::vector<ClipJpegFile*> given;
  given.reserve(count);
  for (ClipJpegFile* file = files; file < files + count; ++file) {
    file->written = 0;
    Stream code = nullptr;
    if (nvimgcodecCodeStreamCreateFromHostMem(instance, &code,
                                              static_cast<const unsigned char*>(file->data),
                                              file->size, nullptr) != 0)
      continue;  // no file that it knows
    streams.push_back(code);
    ImageInfo info{};
    Image image = nullptr;
    bool good = nvimgcodecCodeStreamGetImageInfo(code, &info) == 0;
    Plane& plane = info.plane[0];
    good = good && plane.width == file->width && plane.height == file->height &&
           std::max(info.planes, plane.channels) == file->channels;
    if (good) {
      const bool grey = file->channels == 1;
      info.color = grey ? kGrey : kSrgb;
      info.subsampling = grey ? kGreySubsampling : kNoSubsampling;
      info.format = grey ? kInterleavedY : kInterleavedRgb;
      info.planes = 1;
      plane.row_stride = file->width * file->channels;
      plane.channels = file->channels;
      plane.sample_type = kUint8;
      plane.precision = 0;
      info.buffer = file->pixels;
      info.memory = cpu ? kHostMemory : kDeviceMemory;
      info.stream = stream;
      good = nvimgcodecImageCreate(instance, &image, &info) == 0;
    }
    if (good) {
      images.push_back(image);
      given.push_back(file);
    } else {
      streams.pop_back();
      nvimgcodecCodeStreamDestroy(code);
    }
  }
  // The engines write without waiting for the stream.
  if (!cpu)
    if (const cudaError_t error = cudaStreamSynchronize(stream)) return error;
  if (given.empty()) return 0;
  DecodeParams params{};
  Future future = nullptr;
  std::vector<uint32_t> processed(given.size());
  size_t size = processed.size();
  if (const Status status = nvimgcodecDecoderDecode(decoder, streams.data(), images.data(),
                                                    static_cast<int32_t>(size), &params, &future))
    return -status;
  Status status = nvimgcodecFutureWaitForAll(future);
  if (status == 0) status = nvimgcodecFutureGetProcessingStatus(future, processed.data(), &size);
  nvimgcodecFutureDestroy(future);
  const cudaError_t error = cpu ? cudaSuccess : cudaStreamSynchronize(stream);
  if (status != 0) return -status;
  if (error != cudaSuccess) return error;
  for (size_t i = 0; i < given.size(); ++i) given[i]->written = processed[i] == kProcessed;
  return 0;
}

}  // namespace

extern "C" void clip_jpeg_scan(ClipJpegFile* files, int32_t count, int32_t large) {
  for (ClipJpegFile* file = files; file < files + count; ++file) {
    const auto* data = static_cast<const uint8_t*>(file->data);
    const Header header = scan(data, file->size, large);
    file->route = header.route;
    file->height = header.height;
    file->width = header.width;
    file->channels = header.channels;
    const int64_t tail = std::min<int64_t>(file->size, 256);
    file->hash = adler32(data + file->size - tail, tail);
  }
}

extern "C" void* clip_jpeg_create(const char* library, const char* extension, int32_t device,
                                  int32_t threads, char* error, int32_t error_size) {
  try {
    return new Engines(library, extension, device, threads);
  } catch (const std::exception& problem) {
    std::snprintf(error, error_size, "%s", problem.what());
    return nullptr;
  }
}

extern "C" int32_t clip_jpeg_decode(void* decoder, ClipJpegFile* files, int32_t count,
                                    cudaStream_t stream) {
  try {
    return static_cast<Engines*>(decoder)->decode(files, count, stream);
  } catch (...) {  // of memory
    return cudaErrorMemoryAllocation;
  }
}

extern "C" void clip_jpeg_destroy(void* decoder) { delete static_cast<Engines*>(decoder); }

extern "C" int32_t clip_jpeg_file_size(void) { return sizeof(ClipJpegFile); }
