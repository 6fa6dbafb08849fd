// Files read by a few threads, which take a few entries at a time from a shared counter.

#include "files.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <new>
#include <thread>
#include <vector>

namespace {

constexpr int64_t kEntries = 8;  // that a thread takes at a time

// A batch as arrays of their own types.
struct Batch {
  explicit Batch(const ClipFilesParams& params)
      : offsets(static_cast<const int64_t*>(params.offsets)),
        sizes(static_cast<int64_t*>(params.sizes)),
        errors(static_cast<int32_t*>(params.errors)),
        buffer(static_cast<char*>(params.buffer)),
        most(params.most) {
    const char* path = static_cast<const char*>(params.paths);
    for (int64_t i = 0; i < params.count; ++i, path += strlen(path) + 1) paths.push_back(path);
  }

  std::vector<const char*> paths;
  const int64_t* offsets;
  int64_t* sizes;
  int32_t* errors;
  char* buffer;
  int64_t most;
};

// The size of what an entry asks for in a file, or its error.
void measure(const struct stat& file, int64_t offset, int64_t most, int64_t& size, int32_t& error) {
  const int64_t left = file.st_size - offset, wanted = size < 0 ? left : size;
  if (!S_ISREG(file.st_mode)) {
    error = kClipFilesNotRegular;
  } else if (offset < 0 || left < 0 || wanted > left || wanted > most) {
    error = kClipFilesBeyondEnd;
  } else {
    size = wanted;
  }
}

void measure(Batch& batch, int64_t begin, int64_t end) {
  struct stat file;
  int32_t missing = 0;
  for (int64_t i = begin; i < end; ++i) {
    if (i == begin || strcmp(batch.paths[i], batch.paths[i - 1]) != 0) {
      missing = stat(batch.paths[i], &file) == 0 ? 0 : errno;
    }
    batch.errors[i] = missing;
    if (!missing) measure(file, batch.offsets[i], batch.most, batch.sizes[i], batch.errors[i]);
    if (batch.errors[i]) batch.sizes[i] = 0;
  }
}

int32_t read_all(int file, char* out, int64_t size, int64_t offset) {
  while (size > 0) {
    const ssize_t got = pread(file, out, size, offset);
    if (got == 0) return kClipFilesBeyondEnd;
    if (got < 0 && errno != EINTR) return errno;
    if (got > 0) out += got, offset += got, size -= got;
  }
  return 0;
}

void read(Batch& batch, const std::vector<int64_t>& places, int64_t begin, int64_t end) {
  int file = -1, problem = 0;
  const char* opened = nullptr;
  for (int64_t i = begin; i < end; ++i) {
    if (batch.errors[i]) continue;
    if (!opened || strcmp(batch.paths[i], opened) != 0) {
      if (file >= 0) close(file);
      opened = batch.paths[i];
      // A pipe that took the file's place since would wait for a writer.
      file = open(opened, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
      problem = file < 0 ? errno : 0;
    }
    batch.errors[i] =
        problem ? problem
                : read_all(file, batch.buffer + places[i], batch.sizes[i], batch.offsets[i]);
  }
  if (file >= 0) close(file);
}

// Calls function(begin, end) for parts of 0 .. count, from this thread and others.
template <class F>
void share(int64_t count, int32_t threads, F function) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t i; (i = next.fetch_add(kEntries)) < count;) {
      function(i, std::min(i + kEntries, count));
    }
  };
  std::vector<std::thread> others;
  try {
    const int64_t most = std::min<int64_t>(threads, (count + kEntries - 1) / kEntries);
    for (int64_t i = 1; i < most; ++i) others.emplace_back(work);
  } catch (const std::exception&) {  // no more threads here: those that there are do it
  }
  work();
  for (std::thread& each : others) each.join();
}

bool valid(const ClipFilesParams* params) {
  return params && params->count >= 0 && params->most >= 0 && params->threads >= 1 &&
         params->capacity >= 0 && (params->capacity == 0 || params->buffer) &&
         (params->count == 0 ||
          (params->paths && params->offsets && params->sizes && params->errors));
}

}  // namespace

int32_t clip_files_read(const ClipFilesParams* params) try {
  if (!valid(params)) return EINVAL;
  Batch batch(*params);
  share(params->count, params->threads,
        [&](int64_t begin, int64_t end) { measure(batch, begin, end); });
  std::vector<int64_t> places;
  int64_t total = 0;
  for (int64_t i = 0; i < params->count; ++i) {
    places.push_back(total);
    total += batch.sizes[i];
  }
  if (total > params->capacity) return ENOBUFS;
  share(params->count, params->threads,
        [&](int64_t begin, int64_t end) { read(batch, places, begin, end); });
  return 0;
} catch (const std::bad_alloc&) {
  return ENOMEM;
}

int32_t clip_files_params_size(void) { return sizeof(ClipFilesParams); }
