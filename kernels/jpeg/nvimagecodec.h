// The part of nvImageCodec's C interface that jpeg.cpp uses, found at run time: the library is
// never linked, and its header need not be installed.
//
// Layouts and values are those of version 0.9. tests/kernels/test_jpeg.py compares this file with
// the header of NVIDIA's wheel.
#ifndef CLIP_TTRT_NVIMAGECODEC_H_
#define CLIP_TTRT_NVIMAGECODEC_H_

#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>

namespace nvimagecodec {

using Status = int32_t;  // 0: success
using Instance = struct InstanceHandle*;
using Extension = struct ExtensionHandle*;
using Decoder = struct DecoderHandle*;
using Stream = struct StreamHandle*;
using Image = struct ImageHandle*;
using Future = struct FutureHandle*;

enum : uint32_t { kVersion = 900, kNextVersion = 1000 };  // 1000 * major + 100 * minor + patch
enum : int32_t {
  kCpuOnlyDevice = -99999,
  kCpuOnlyBackend = 1,
  kEnginesBackend = 4,
  kFixedLoadHint = 2,
  kSrgb = 1,
  kGrey = 2,
  kNoSubsampling = 0,
  kGreySubsampling = 7,
  kInterleavedY = 4,
  kInterleavedRgb = 8,
  kUint8 = 0x0802,
  kDeviceMemory = 1,
  kHostMemory = 2,
};
enum : uint32_t { kProcessed = 1 };

// What every struct begins with: its type, as numbered there, its size, and no extension.
struct Head {
  int32_t type;
  size_t size;
  void* next;
};

struct Properties {
  Head head{1, sizeof(Properties), nullptr};
  uint32_t version;
  uint32_t cuda;
};

struct InstanceInfo {
  Head head{2, sizeof(InstanceInfo), nullptr};
  int32_t builtin_modules;
  int32_t extension_modules;
  const char* extensions;
  int32_t messenger;  // 0: nothing is printed
  const void* messenger_description;
  uint32_t severity;
  uint32_t category;
};

struct DecodeParams {
  Head head{5, sizeof(DecodeParams), nullptr};
  int32_t exif_orientation;
};

struct Orientation {
  Head head{7, sizeof(Orientation), nullptr};
  int32_t rotated;
  int32_t flip_x;
  int32_t flip_y;
};

struct Plane {
  Head head{12, sizeof(Plane), nullptr};
  uint32_t width;
  uint32_t height;
  size_t row_stride;
  uint32_t channels;
  int32_t sample_type;
  uint8_t precision;
};

struct ImageInfo {
  Head head{11, sizeof(ImageInfo), nullptr};
  char codec[256];
  int32_t color;
  int32_t subsampling;
  int32_t format;
  Orientation orientation;
  uint32_t planes;
  Plane plane[32];
  void* buffer;
  int32_t memory;
  cudaStream_t stream;
};

struct BackendParams {
  Head head{29, sizeof(BackendParams), nullptr};
  float load_hint;
  int32_t load_hint_policy;
};

struct Backend {
  Head head{17, sizeof(Backend), nullptr};
  int32_t kind;
  BackendParams params;
};

struct ExtensionDescription {
  Head head{27, sizeof(ExtensionDescription), nullptr};
  void* instance;
  const char* id;
  uint32_t version;
  uint32_t api;
  void* create;
  void* destroy;
};

struct ExecutionParams {
  Head head{30, sizeof(ExecutionParams), nullptr};
  void* device_allocator;
  void* pinned_allocator;
  int32_t cpu_threads;
  void* executor;
  int32_t device;
  int32_t pre_init;
  int32_t skip_pre_sync;
  int32_t backend_count;
  const Backend* backends;
};

struct Functions {
  Status (*nvimgcodecGetProperties)(Properties*);
  Status (*nvimgcodecInstanceCreate)(Instance*, const InstanceInfo*);
  Status (*nvimgcodecInstanceDestroy)(Instance);
  Status (*nvimgcodecExtensionCreate)(Instance, Extension*, ExtensionDescription*);
  Status (*nvimgcodecExtensionDestroy)(Extension);
  Status (*nvimgcodecDecoderCreate)(Instance, Decoder*, const ExecutionParams*, const char*);
  Status (*nvimgcodecDecoderDestroy)(Decoder);
  Status (*nvimgcodecDecoderDecode)(Decoder, const Stream*, const Image*, int32_t,
                                    const DecodeParams*, Future*);
  Status (*nvimgcodecFutureWaitForAll)(Future);
  Status (*nvimgcodecFutureGetProcessingStatus)(Future, uint32_t*, size_t*);
  Status (*nvimgcodecFutureDestroy)(Future);
  Status (*nvimgcodecCodeStreamCreateFromHostMem)(Instance, Stream*, const unsigned char*, size_t,
                                                  const void*);
  Status (*nvimgcodecCodeStreamGetImageInfo)(Stream, ImageInfo*);
  Status (*nvimgcodecCodeStreamDestroy)(Stream);
  Status (*nvimgcodecImageCreate)(Instance, Image*, const ImageInfo*);
  Status (*nvimgcodecImageDestroy)(Image);
};

}  // namespace nvimagecodec

#endif  // CLIP_TTRT_NVIMAGECODEC_H_
