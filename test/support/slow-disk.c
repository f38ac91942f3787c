/*
 * Preloaded into a daemon, this makes its member files behave as files do whose data is not in the page cache, and refuses
 * io_uring where told: so tests reach the code that waits for a disk, on any machine, with either engine.
 *
 *   a read that may not wait (RWF_NOWAIT)   is refused two times out of three
 *   other reads and writes of a member      take 2 ms longer, one time in SLOW_DISK, and now and then 30 ms
 *   io_uring_enter                          the same: what was submitted has looked up its slots, and waits
 *   io_uring_setup                          fails with ENOSYS where SLOW_DISK_NO_URING is set
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { kMicroseconds = 2000, kMicrosecondsMax = 30000, kMaxOneIn = 8 };

static uint32_t oneIn;
static int refuseUring;

__attribute__((constructor)) static void begin(void) {
  const char *text = getenv("SLOW_DISK");
  if (text == NULL) abort();
  oneIn = (uint32_t)atoi(text);
  refuseUring = getenv("SLOW_DISK_NO_URING") != NULL;
}

static uint32_t chance(void) {
  static __thread uint32_t state;
  if (state == 0) state = (uint32_t)(uintptr_t)&state | 1;
  state ^= state << 13;
  state ^= state >> 17;
  state ^= state << 5;
  return state;
}

static int isMember(int fd) {
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  const ssize_t length = readlink(link, path, sizeof path - 1);
  if (length <= 0) return 0;
  path[length] = 0;
  return strstr(path, "/member-") != NULL;
}

static int isTime(void) { return oneIn > 0 && chance() % oneIn == 0; }

static void delay(void) { usleep(chance() % kMaxOneIn == 0 ? kMicrosecondsMax : kMicroseconds); }

#define REAL(name) \
  static __typeof__(name) *real; \
  if (real == NULL) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

#define NOWAIT(name) \
  ssize_t name(int fd, const struct iovec *parts, int count, off_t offset, int flags) { \
    REAL(name); \
    if ((flags & RWF_NOWAIT) != 0 && chance() % 3 != 0 && isMember(fd)) { \
      errno = EAGAIN; \
      return -1; \
    } \
    return real(fd, parts, count, offset, flags); \
  }
NOWAIT(preadv2)
NOWAIT(preadv64v2)

#define SLOW(name, buffer) \
  ssize_t name(int fd, buffer bytes, size_t length, off_t offset) { \
    REAL(name); \
    if (isTime() && isMember(fd)) delay(); \
    return real(fd, bytes, length, offset); \
  }
SLOW(pread, void *)
SLOW(pread64, void *)
SLOW(pwrite, const void *)
SLOW(pwrite64, const void *)

#define SLOWV(name) \
  ssize_t name(int fd, const struct iovec *parts, int count, off_t offset) { \
    REAL(name); \
    if (isTime() && isMember(fd)) delay(); \
    return real(fd, parts, count, offset); \
  }
SLOWV(pwritev)
SLOWV(pwritev64)

long syscall(long number, ...) {
  REAL(syscall);
  if (number == SYS_io_uring_setup && refuseUring) {
    errno = ENOSYS;
    return -1;
  }
  if (number == SYS_io_uring_enter && isTime()) delay();
  va_list more;
  va_start(more, number);
  long a[6];
  for (int i = 0; i < 6; i++) a[i] = va_arg(more, long);
  va_end(more);
  return real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
