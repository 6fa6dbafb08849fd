// What the library of kernels tells about itself, and its TensorRT plugins. Plain C: Python and C++
// programs look these functions up in the loaded library.
#ifndef CLIP_TTRT_LIBRARY_H_
#define CLIP_TTRT_LIBRARY_H_

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// A hash of the sources, 12 hexadecimal digits; the version of its plugins too.
const char* clip_ttrt_version(void);

// The GPUs that it has code for, such as "80 86 90a"; 120 has PTX too, for what is newer.
const char* clip_ttrt_architectures(void);

// The TensorRT that its plugins are of, such as 10; 0 where it has none, built without TensorRT's
// headers.
int32_t clip_ttrt_tensorrt_major(void);

// Registers the plugins with the TensorRT that is loaded in this process; never loads one. 1:
// TensorRT knows them all now, also if it did before; 0: it does not, or there is none. Loading the
// library does the same where TensorRT is loaded by then, so only a program that loads TensorRT
// later needs to call it. Any thread may.
int32_t clip_ttrt_register_plugins(void);

// The first three in one text, which a reader of the file finds without loading it
// (clip_ttrt/kernels.py).
extern const char clip_ttrt_about[];

#ifdef __cplusplus
}
#endif

#endif  // CLIP_TTRT_LIBRARY_H_
