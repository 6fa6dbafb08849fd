// Reading many files at once, by a few threads and without a Python interpreter's lock. Plain C,
// neither CUDA nor Torch.
//
// A batch is `count` parts of regular files: a whole file, or some bytes of an archive. They go one
// after the other into `buffer`, in order. Entries one after the other with the same path are read
// through one descriptor. What fails has an error; its size is 0 if it fails before it is read, and
// else its bytes are undefined.
//
// Returns 0; ENOBUFS where the sizes, which are filled in then, are more than `capacity` together,
// and nothing is read; EINVAL for a size or a pointer outside the contract; ENOMEM. Any number of
// threads may call it at once.
#ifndef CLIP_TTRT_FILES_H_
#define CLIP_TTRT_FILES_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// What `errors` holds beside 0 and the values of errno, which are positive.
enum {
  kClipFilesNotRegular = -1,  // a folder, a pipe or a device
  kClipFilesBeyondEnd = -2,   // more bytes than there are, or than `most`
};

// Plain data, also filled through ctypes (clip_ttrt/kernels.py): keep the two alike.
typedef struct ClipFilesParams {
  const void* paths;    // `count` names, each with a NUL at its end
  const void* offsets;  // int64 [count], of the first byte in its file
  void* sizes;          // int64 [count], bytes; -1: up to the end, and the number is filled in
  void* errors;         // int32 [count]
  void* buffer;         // of `capacity` bytes
  int64_t count;
  int64_t most;  // bytes of an entry
  int64_t capacity;
  int32_t threads;  // at most, the caller's among them
} ClipFilesParams;

int32_t clip_files_read(const ClipFilesParams* params);

// sizeof the struct: lets a caller in another language check that its copy agrees.
int32_t clip_files_params_size(void);

#ifdef __cplusplus
}
#endif

#endif  // CLIP_TTRT_FILES_H_
