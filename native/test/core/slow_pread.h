// Included in front of the core's sources in the tests: reads that wait for a disk go through slowPread() and slowPreadv(),
// which can take the time that a disk takes (rig.h, slowReads), or wait for the test (holdReads).
#pragma once

#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

ssize_t slowPread(int fd, void* data, size_t size, off_t offset);
ssize_t slowPreadv(int fd, const iovec* parts, int count, off_t offset);
#define pread slowPread
#define preadv slowPreadv
