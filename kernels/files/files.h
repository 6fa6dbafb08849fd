// Reading many files at once, by a few threads and without a Python interpreter's lock. Plain C,
// neither CUDA nor Torch.
//
// A batch is `count` parts of regular files: a whole file, or some bytes of an archive. First
// clip_files_measure fills in their sizes, then the caller allocates, and clip_files_read reads
// them one after the other into `buffer`, in order. Entries one after the other with the same path
// are read through one descriptor. What fails has an error, size 0 and no place in the buffer if
// clip_files_measure found it so; a failure of clip_files_read leaves its bytes as they are.
//
// Both return 0, or EINVAL for a size or a pointer outside the contract, and may be called from any
// number of threads at once.
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
  void* sizes;          // int64 [count], bytes; -1: clip_files_measure puts those up to the end
  void* errors;         // int32 [count]
  void* buffer;         // the sum of the sizes, in bytes; clip_files_measure leaves it alone
  int64_t count;
  int64_t most;     // bytes of an entry
  int32_t threads;  // at most, the caller's among them
} ClipFilesParams;

int32_t clip_files_measure(const ClipFilesParams* params);
int32_t clip_files_read(const ClipFilesParams* params);

// sizeof the struct: lets a caller in another language check that its copy agrees.
int32_t clip_files_params_size(void);

#ifdef __cplusplus
}
#endif

#endif  // CLIP_TTRT_FILES_H_
