// JPEG files to pixels: what their headers tell, and their decoding in batches by a GPU's JPEG
// engines, through nvImageCodec's C interface (nvimagecodec.h). Neither Torch nor Python.
//
// Everything returns its errors as it says below, and no exception leaves.
#ifndef CLIP_TTRT_JPEG_H_
#define CLIP_TTRT_JPEG_H_

#include <cuda_runtime_api.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {                   // a file's route: what decodes it
  kClipJpegEngines = 0,  // the GPU's engines
  kClipJpegLibrary = 1,  // libjpeg on the CPU
  kClipJpegOther = 2,    // neither: no JPEG, or one of colours or sizes that those do not give
};
enum { kClipJpegCpu = -1 };  // in place of a device: nvImageCodec's own decoder on the CPU

// Plain data, also filled through numpy (clip_ttrt/kernels.py): keep the two alike.
typedef struct ClipJpegFile {
  const void* data;  // the file's bytes
  void* pixels;      // decode: where to, uint8 [height, width, channels], on the decoder's device
  int64_t size;      // of the file, in bytes
  int64_t route;     // scan gives this and the next four; height to channels are 0 of others
  int64_t height;    // decode compares the next three with what it finds in the file
  int64_t width;
  int64_t channels;  // 1: grey, 3: RGB
  int64_t hash;      // Adler-32 of the last 256 bytes, for samples that depend on the bytes alone
  int64_t written;   // decode: 1 where nvImageCodec says that it has written the pixels, else 0
} ClipJpegFile;

// Reads the headers of [count] files. A JPEG of more than `large` pixels is of kClipJpegOther.
void clip_jpeg_scan(ClipJpegFile* files, int32_t count, int32_t large);

// A decoder, which serves one call at a time; NULL where it cannot be had, and why in `error`,
// [error_size] bytes with the 0 at their end. library: the path of libnvimgcodec.so.0. extension:
// that of its extension that decodes, libnvjpeg_ext, or libjpeg_turbo_ext with kClipJpegCpu.
// device: the GPU's number, or kClipJpegCpu. threads: of the CPU, that parse.
void* clip_jpeg_create(const char* library, const char* extension, int32_t device, int32_t threads,
                       char* error, int32_t error_size);

// Decodes [count] files and returns when their pixels are there. What `stream` has been given
// before is waited for first; with kClipJpegCpu it is not used. The engines may skip a picture and
// call it written. Returns 0, a CUDA error, or minus a status of nvImageCodec: then nothing is
// written.
int32_t clip_jpeg_decode(void* decoder, ClipJpegFile* files, int32_t count, cudaStream_t stream);

void clip_jpeg_destroy(void* decoder);

int32_t clip_jpeg_file_size(void);  // sizeof ClipJpegFile

#ifdef __cplusplus
}
#endif

#endif  // CLIP_TTRT_JPEG_H_
