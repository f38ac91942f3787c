// Included in front of the core's sources in the tests: reads that wait for a disk go through slowPread(), which can take
// the time that a disk takes (rig.h, slowReads).
#pragma once

#include <sys/types.h>
#include <unistd.h>

ssize_t slowPread(int fd, void* data, size_t size, off_t offset);
#define pread slowPread
