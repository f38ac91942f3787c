// Where slots lie on the members, and reading and writing them.
//
// Chunk c (0..k-1) of slot s is on member (s + c) mod (k + p) at `dataOffset + s * chunkSize`. A range of a stripe is
// cut into *segments*: one run of bytes on one member, with its place in memory. Segments that are neighbours both on
// the member and in memory are one; those that are neighbours on the member only go out in one vectored call.
#pragma once

#include <sys/uio.h>

#include <array>
#include <cstdint>
#include <vector>

#include "counters.h"

namespace nbd {

constexpr uint32_t kMembersMax = 32;

struct Member {
  int fd = -1;
  bool nowait = true;        // preadv2(RWF_NOWAIT) tells cached from uncached data
  bool inMemory = false;     // a read never waits for a disk (tmpfs)
  bool blockDevice = false;
};

struct Layout {
  std::vector<Member> members;
  uint32_t dataMembers = 1;
  uint32_t parityMembers = 0;
  uint64_t chunkSize = 0;
  uint64_t dataOffset = 0;

  uint64_t stripeSize() const { return dataMembers * chunkSize; }
};

/// Finds out what each descriptor can do.
void probeMembers(Layout& layout);

struct Segment {
  uint32_t member;
  uint64_t offset;  // bytes, on the member
  uint8_t* data;
  uint64_t length;
};
using Segments = std::vector<Segment>;

/// Appends the segments of [stripeOffset, stripeOffset + length) of the stripe in `slot`.
void mapRange(const Layout& layout, uint32_t slot, uint64_t stripeOffset, uint8_t* data, uint64_t length,
              Segments& segments);

struct IoError {
  int error = 0;  // errno
  uint32_t member = 0;
  uint64_t offset = 0;  // bytes, on the member
};

/// errno of a member as the wire number a client gets.
uint32_t wireErrorOf(int error);

/// Scratch of one thread, so that no call allocates in the steady state.
class MemberIo {
 public:
  MemberIo(const Layout& layout, MemberCounters* counters) : layout_(layout), counters_(counters) {}

  enum class ReadResult { Done, WouldBlock, Failed };

  /// Reads all segments without waiting for a disk. On WouldBlock the memory holds anything. Bytes past the end of a
  /// member file are zeros.
  ReadResult readCached(const Segments& segments, IoError* error);
  /// Reads all segments, waiting as long as it takes. Does not allocate: safe on any worker.
  bool readWaiting(const Segments& segments, IoError* error);
  /// The same in as few calls as possible: neighbours on a member come in together.
  bool readGathered(const Segments& segments, IoError* error);
  /// Writes all segments; short writes go on. Neighbours on a member go out together.
  bool write(const Segments& segments, IoError* error);

  MemberCounters* counters() { return counters_; }

 private:
  struct Vector {
    uint64_t offset = 0;
    uint64_t length = 0;
    std::vector<iovec> parts;
  };

  template <typename Each>
  void gather(const Segments& segments, Each each);
  ReadResult readCachedParts(uint32_t member, uint64_t offset, iovec* parts, size_t count, uint64_t length,
                             IoError* error);
  bool readVector(uint32_t member, Vector& vector, IoError* error);
  bool writeVector(uint32_t member, Vector& vector, IoError* error);
  bool writeOne(const Segment& segment, IoError* error);

  const Layout& layout_;
  MemberCounters* counters_;
  std::array<Vector, kMembersMax> vectors_;
};

}  // namespace nbd
