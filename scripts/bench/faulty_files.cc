// Lets file operations of a process fail: g++ -shared -fPIC -o faulty_files.so faulty_files.cc -ldl, then LD_PRELOAD.
//
// FAULTY_FILES=ERRNO:TIMES:read:PART fails the first TIMES opens for reading of paths that contain PART. With `write`, it
// fails opens for writing and writes. The variable is read at each call, and a changed one counts from the start.

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <mutex>

namespace {
bool fails(const char* path, bool writes) {
  static std::mutex mutex;
  static char seen[4096];
  static int number, left;
  const char* wish = getenv("FAULTY_FILES");
  if (!wish || !path) return false;
  std::lock_guard<std::mutex> guard(mutex);
  if (strcmp(wish, seen)) {
    strncpy(seen, wish, sizeof seen - 1);
    sscanf(seen, "%d:%d", &number, &left);
  }
  const char* part = strrchr(seen, ':') + 1;
  if (left <= 0 || writes != (strstr(seen, ":write:") != nullptr) || !strstr(path, part)) return false;
  left--;
  errno = number;
  return true;
}

bool fails(const char* path, int flags) {
  return !(flags & O_DIRECTORY) && fails(path, (flags & O_ACCMODE) != O_RDONLY);
}

bool fails(int fd) {
  const char* wish = getenv("FAULTY_FILES");
  if (!wish || !strstr(wish, ":write:")) return false;
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t size = readlink(link, path, sizeof path - 1);
  if (size < 0) return false;
  path[size] = 0;
  return fails(path, true);
}
}  // namespace

#define NEXT(NAME, ...) (reinterpret_cast<int (*)(__VA_ARGS__)>(dlsym(RTLD_NEXT, #NAME)))
#define NEXT_WRITE(NAME, ...) (reinterpret_cast<ssize_t (*)(__VA_ARGS__)>(dlsym(RTLD_NEXT, #NAME)))
#define OPEN(NAME)                                                                            \
  extern "C" int NAME(const char* path, int flags, ...) {                                     \
    va_list rest;                                                                             \
    va_start(rest, flags);                                                                    \
    mode_t mode = va_arg(rest, mode_t);                                                       \
    va_end(rest);                                                                             \
    return fails(path, flags) ? -1 : NEXT(NAME, const char*, int, mode_t)(path, flags, mode); \
  }
#define OPENAT(NAME)                                                                                       \
  extern "C" int NAME(int at, const char* path, int flags, ...) {                                          \
    va_list rest;                                                                                          \
    va_start(rest, flags);                                                                                 \
    mode_t mode = va_arg(rest, mode_t);                                                                    \
    va_end(rest);                                                                                          \
    return fails(path, flags) ? -1 : NEXT(NAME, int, const char*, int, mode_t)(at, path, flags, mode);     \
  }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

extern "C" ssize_t write(int fd, const void* data, size_t size) {
  return fails(fd) ? -1 : NEXT_WRITE(write, int, const void*, size_t)(fd, data, size);
}
extern "C" ssize_t pwrite(int fd, const void* data, size_t size, off_t at) {
  return fails(fd) ? -1 : NEXT_WRITE(pwrite, int, const void*, size_t, off_t)(fd, data, size, at);
}
