/*
 * Preloaded into a daemon, this notes everything that it asks the disk to keep: which bytes went where, in which order,
 * and what was synced when. From the note the power-cut test builds the states that a disk may be found in after the
 * power failed at any moment (disk-log.ts).
 *
 *   record  | kind u32 | file u32 | offset u64 | length u64 |, for kinds 1, 2 and 6 followed by `length` bytes
 *   kinds   1 write   2 write through a descriptor with O_DSYNC   3 sync begins (offset: its number)   4 it ended well
 *           5 punch   6 a file's name, before the first record that speaks of it
 *
 * A write and its record are one step: writes take turns. The record of a sync's beginning precedes the call, so what is
 * noted before it had been written. DISK_LOG names the note, DISK_LOG_ROOT the directory whose files count,
 * DISK_LOG_BOOT_ID a file that takes the place of the kernel's boot id. When the file DISK_LOG_KILL appears, the process
 * kills itself between two writes: a kill from outside could come between a write and its record.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { kWrite = 1, kWriteThrough, kSyncBegin, kSyncEnd, kPunch, kName };
enum { kFilesMax = 64, kPartsMax = 1024 };
enum { kSyncMicroseconds = 2000 }; /* in which others write; the test's files may lie in memory */

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static int logFd = -1;
static const char *root;
static const char *bootId;
static char names[kFilesMax][PATH_MAX];
static uint32_t fileCount;
static uint64_t syncCount;

struct header {
  uint32_t kind, file;
  uint64_t offset, length;
};

static void *waitForDeath(void *path) {
  for (;;) {
    usleep(500);
    if (access(path, F_OK) != 0) continue;
    pthread_mutex_lock(&mutex);
    kill(getpid(), SIGKILL);
  }
  return NULL;
}

__attribute__((constructor)) static void begin(void) {
  root = getenv("DISK_LOG_ROOT");
  bootId = getenv("DISK_LOG_BOOT_ID");
  const char *path = getenv("DISK_LOG");
  char *death = getenv("DISK_LOG_KILL");
  if (root == NULL || path == NULL || death == NULL) abort();
  logFd = (int)syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
  pthread_t thread;
  if (logFd < 0 || pthread_create(&thread, NULL, waitForDeath, death) != 0) abort();
}

static void note(uint32_t kind, uint32_t file, uint64_t offset, const struct iovec *parts, int count, uint64_t length) {
  struct header header = {kind, file, offset, length};
  struct iovec all[kPartsMax + 1] = {{&header, sizeof header}};
  int used = 1;
  size_t total = sizeof header;
  uint64_t left = parts == NULL ? 0 : length;
  for (int i = 0; i < count && left > 0 && used <= kPartsMax; i++) {
    const size_t part = parts[i].iov_len < left ? parts[i].iov_len : left;
    all[used++] = (struct iovec){parts[i].iov_base, part};
    total += part;
    left -= part;
  }
  if (left > 0 || syscall(SYS_writev, logFd, all, used) != (long)total) abort();
}

/* The file's number; 0 where it is none of ours. Under the mutex. */
static uint32_t fileOf(int fd) {
  char link[64], path[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  const ssize_t length = readlink(link, path, sizeof path - 1);
  if (length <= 0) return 0;
  path[length] = 0;
  const size_t rootLength = strlen(root);
  if (strncmp(path, root, rootLength) != 0 || path[rootLength] != '/') return 0;
  for (uint32_t i = 0; i < fileCount; i++) {
    if (strcmp(names[i], path) == 0) return i + 1;
  }
  if (fileCount == kFilesMax) abort();
  strcpy(names[fileCount++], path);
  const struct iovec name = {path, (size_t)length};
  note(kName, fileCount, 0, &name, 1, (uint64_t)length);
  return fileCount;
}

/* One of ours: notes what was written, after it was. Under the mutex. */
static void wrote(int fd, uint32_t file, off_t offset, const struct iovec *parts, int count, ssize_t length) {
  if (length <= 0) return;
  const int saved = errno;
  const int through = (fcntl(fd, F_GETFL) & O_DSYNC) != 0;
  note(through ? kWriteThrough : kWrite, file, (uint64_t)offset, parts, count, (uint64_t)length);
  errno = saved;
}

#define REAL(name) \
  static __typeof__(name) *real; \
  if (real == NULL) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

/* The body of every kind of write: `call` under the mutex where the file is ours, and just `call` where it is not. */
#define NOTED(fd, offset, parts, count, call) \
  if (logFd < 0) return call; \
  pthread_mutex_lock(&mutex); \
  const uint32_t file = fileOf(fd); \
  if (file == 0) { \
    pthread_mutex_unlock(&mutex); \
    return call; \
  } \
  const off_t at = offset; \
  const ssize_t done = call; \
  wrote(fd, file, at, parts, count, done); \
  pthread_mutex_unlock(&mutex); \
  return done

#define POSITIONED(name) \
  ssize_t name(int fd, const void *bytes, size_t length, off_t offset) { \
    REAL(name); \
    const struct iovec part = {(void *)bytes, length}; \
    NOTED(fd, offset, &part, 1, real(fd, bytes, length, offset)); \
  }
POSITIONED(pwrite)
POSITIONED(pwrite64)

#define VECTOR(name) \
  ssize_t name(int fd, const struct iovec *parts, int count, off_t offset) { \
    REAL(name); \
    NOTED(fd, offset, parts, count, real(fd, parts, count, offset)); \
  }
VECTOR(pwritev)
VECTOR(pwritev64)

ssize_t writev(int fd, const struct iovec *parts, int count) {
  REAL(writev);
  NOTED(fd, lseek(fd, 0, SEEK_CUR), parts, count, real(fd, parts, count));
}

ssize_t write(int fd, const void *bytes, size_t length) {
  REAL(write);
  const struct iovec part = {(void *)bytes, length};
  NOTED(fd, lseek(fd, 0, SEEK_CUR), &part, 1, real(fd, bytes, length));
}

static uint64_t syncBegins(int fd, uint32_t *file) {
  *file = 0;
  if (logFd < 0) return 0;
  pthread_mutex_lock(&mutex);
  *file = fileOf(fd);
  const uint64_t number = ++syncCount;
  if (*file != 0) note(kSyncBegin, *file, number, NULL, 0, 0);
  pthread_mutex_unlock(&mutex);
  return number;
}

static void syncEnds(uint32_t file, uint64_t number) {
  const int saved = errno;
  pthread_mutex_lock(&mutex);
  note(kSyncEnd, file, number, NULL, 0, 0);
  pthread_mutex_unlock(&mutex);
  errno = saved;
}

#define SYNC(name) \
  int name(int fd) { \
    REAL(name); \
    uint32_t file; \
    const uint64_t number = syncBegins(fd, &file); \
    if (file != 0) usleep(kSyncMicroseconds); \
    const int result = real(fd); \
    if (result == 0 && file != 0) syncEnds(file, number); \
    return result; \
  }
SYNC(fsync)
SYNC(fdatasync)

#define PUNCH(name) \
  int name(int fd, int mode, off_t offset, off_t length) { \
    REAL(name); \
    if (logFd < 0) return real(fd, mode, offset, length); \
    pthread_mutex_lock(&mutex); \
    const uint32_t file = fileOf(fd); \
    const int result = real(fd, mode, offset, length); \
    if (result == 0 && file != 0) note(kPunch, file, (uint64_t)offset, NULL, 0, (uint64_t)length); \
    pthread_mutex_unlock(&mutex); \
    return result; \
  }
PUNCH(fallocate)
PUNCH(fallocate64)

#define OPEN(name) \
  int name(const char *path, int flags, ...) { \
    REAL(name); \
    va_list more; \
    va_start(more, flags); \
    const mode_t mode = (flags & (O_CREAT | O_TMPFILE)) != 0 ? va_arg(more, mode_t) : 0; \
    va_end(more); \
    const int isBootId = bootId != NULL && strcmp(path, "/proc/sys/kernel/random/boot_id") == 0; \
    return real(isBootId ? bootId : path, flags, mode); \
  }
OPEN(open)
OPEN(open64)
