#include "layout.h"

#include <errno.h>
#include <linux/magic.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "assert.h"
#include "wire.h"

namespace nbd {

namespace {

constexpr size_t kVectorPartsMax = 1024;  // IOV_MAX

/// `bytes` of the parts are done.
void advance(iovec** parts, size_t* count, size_t bytes) {
  while (bytes > 0) {
    iovec& part = **parts;
    const size_t step = std::min(bytes, part.iov_len);
    part.iov_base = static_cast<uint8_t*>(part.iov_base) + step;
    part.iov_len -= step;
    bytes -= step;
    if (part.iov_len > 0) return;
    (*parts)++;
    (*count)--;
  }
}

}  // namespace

void probeMembers(Layout& layout) {
  for (Member& member : layout.members) {
    struct stat status;
    if (fstat(member.fd, &status) == 0) member.blockDevice = S_ISBLK(status.st_mode);
    struct statfs fs;
    if (fstatfs(member.fd, &fs) == 0) member.inMemory = !member.blockDevice && fs.f_type == TMPFS_MAGIC;
    uint8_t byte;
    iovec part{&byte, 1};
    const ssize_t got = preadv2(member.fd, &part, 1, 0, RWF_NOWAIT);
    member.nowait = got >= 0 || errno == EAGAIN;
  }
}

uint32_t wireErrorOf(int error) {
  switch (error) {
    case 0:
      return kOk;
    case ENOSPC:
    case EDQUOT:
    case EFBIG:
      return kEnospc;
    default:
      return kEio;
  }
}

void mapRange(const Layout& layout, uint32_t slot, uint64_t stripeOffset, uint8_t* data, uint64_t length,
              Segments& segments) {
  const uint64_t chunkSize = layout.chunkSize;
  const uint32_t width = layout.dataMembers + layout.parityMembers;
  const uint64_t base = layout.dataOffset + slot * chunkSize;
  while (length > 0) {
    const uint64_t chunk = layout.dataMembers == 1 ? 0 : stripeOffset / chunkSize;
    const uint64_t within = stripeOffset - chunk * chunkSize;
    const uint64_t part = std::min(length, chunkSize - within);
    const uint32_t member = width == 1 ? 0 : static_cast<uint32_t>((slot + chunk) % width);
    const uint64_t offset = base + within;
    Segment* last = segments.empty() ? nullptr : &segments.back();
    if (last != nullptr && last->member == member && last->offset + last->length == offset &&
        last->data + last->length == data) {
      last->length += part;
    } else {
      segments.push_back({member, offset, data, part});
    }
    stripeOffset += part;
    data += part;
    length -= part;
  }
}

/// Segments that follow each other on a member become one vector: one call for it. `each` says whether to go on.
template <typename Each>
void MemberIo::gather(const Segments& segments, Each each) {
  bool goesOn = true;
  auto pass = [&](uint32_t member) {
    if (goesOn) goesOn = each(member, vectors_[member]);
    vectors_[member].parts.clear();
  };
  for (const Segment& segment : segments) {
    Vector& vector = vectors_[segment.member];
    const bool joins = !vector.parts.empty() && vector.offset + vector.length == segment.offset &&
                       vector.parts.size() < kVectorPartsMax;
    if (!joins) {
      if (!vector.parts.empty()) pass(segment.member);
      if (!goesOn) break;
      vector.offset = segment.offset;
      vector.length = 0;
    }
    vector.parts.push_back({segment.data, segment.length});
    vector.length += segment.length;
  }
  for (uint32_t member = 0; member < layout_.members.size(); member++) {
    if (!vectors_[member].parts.empty()) pass(member);
  }
}

MemberIo::ReadResult MemberIo::readCached(const Segments& segments, IoError* error) {
  if (segments.size() == 1) {
    const Segment& segment = segments[0];
    iovec part{segment.data, segment.length};
    return readCachedParts(segment.member, segment.offset, &part, 1, segment.length, error);
  }
  ReadResult result = ReadResult::Done;
  gather(segments, [&](uint32_t member, Vector& vector) {
    result = readCachedParts(member, vector.offset, vector.parts.data(), vector.parts.size(), vector.length, error);
    return result == ReadResult::Done;
  });
  return result;
}

MemberIo::ReadResult MemberIo::readCachedParts(uint32_t index, uint64_t offset, iovec* parts, size_t count,
                                               uint64_t length, IoError* error) {
  const Member& member = layout_.members[index];
  if (!member.nowait && !member.inMemory) return ReadResult::WouldBlock;
  const int flags = member.nowait ? RWF_NOWAIT : 0;
  const uint64_t end = offset + length;
  while (offset < end) {
    const ssize_t got = preadv2(member.fd, parts, static_cast<int>(count), static_cast<off_t>(offset), flags);
    if (got > 0) {
      offset += static_cast<uint64_t>(got);
      advance(&parts, &count, static_cast<size_t>(got));
    } else if (got == 0) {
      for (; count > 0; parts++, count--) memset(parts->iov_base, 0, parts->iov_len);
      break;
    } else if (errno == EAGAIN) {
      return ReadResult::WouldBlock;
    } else if (errno != EINTR) {
      *error = {errno, index, offset};
      return ReadResult::Failed;
    }
  }
  counters_[index].reads.add(1);
  counters_[index].readBytes.add(length);
  return ReadResult::Done;
}

bool MemberIo::readWaiting(const Segments& segments, IoError* error) {
  for (const Segment& segment : segments) {
    uint64_t done = 0;
    while (done < segment.length) {
      const ssize_t got = pread(layout_.members[segment.member].fd, segment.data + done, segment.length - done,
                                static_cast<off_t>(segment.offset + done));
      if (got > 0) {
        done += static_cast<uint64_t>(got);
      } else if (got == 0) {
        memset(segment.data + done, 0, segment.length - done);
        break;
      } else if (errno != EINTR) {
        *error = {errno, segment.member, segment.offset + done};
        return false;
      }
    }
    counters_[segment.member].reads.add(1);
    counters_[segment.member].readBytes.add(segment.length);
  }
  return true;
}

bool MemberIo::readVector(uint32_t member, Vector& vector, IoError* error) {
  uint64_t offset = vector.offset;
  const uint64_t end = vector.offset + vector.length;
  iovec* parts = vector.parts.data();
  size_t count = vector.parts.size();
  while (offset < end) {
    const ssize_t got = preadv(layout_.members[member].fd, parts, static_cast<int>(count), static_cast<off_t>(offset));
    if (got < 0) {
      if (errno == EINTR) continue;
      *error = {errno, member, offset};
      return false;
    }
    if (got == 0) {
      for (; count > 0; parts++, count--) memset(parts->iov_base, 0, parts->iov_len);
      break;
    }
    offset += static_cast<uint64_t>(got);
    advance(&parts, &count, static_cast<size_t>(got));
  }
  counters_[member].reads.add(1);
  counters_[member].readBytes.add(vector.length);
  return true;
}

bool MemberIo::readGathered(const Segments& segments, IoError* error) {
  if (segments.size() <= 1) return readWaiting(segments, error);
  bool ok = true;
  gather(segments, [&](uint32_t member, Vector& vector) {
    ok = readVector(member, vector, error);
    return ok;
  });
  return ok;
}

bool MemberIo::writeOne(const Segment& segment, IoError* error) {
  uint64_t done = 0;
  while (done < segment.length) {
    const ssize_t put = pwrite(layout_.members[segment.member].fd, segment.data + done, segment.length - done,
                               static_cast<off_t>(segment.offset + done));
    if (put > 0) {
      done += static_cast<uint64_t>(put);
    } else if (put == 0 || errno != EINTR) {
      *error = {put == 0 ? EIO : errno, segment.member, segment.offset + done};
      return false;
    }
  }
  counters_[segment.member].writes.add(1);
  counters_[segment.member].writeBytes.add(segment.length);
  return true;
}

bool MemberIo::writeVector(uint32_t member, Vector& vector, IoError* error) {
  uint64_t offset = vector.offset;
  const uint64_t end = vector.offset + vector.length;
  iovec* parts = vector.parts.data();
  size_t count = vector.parts.size();
  while (offset < end) {
    const ssize_t put = pwritev(layout_.members[member].fd, parts, static_cast<int>(count), static_cast<off_t>(offset));
    if (put <= 0) {
      if (put < 0 && errno == EINTR) continue;
      *error = {put == 0 ? EIO : errno, member, offset};
      return false;
    }
    offset += static_cast<uint64_t>(put);
    advance(&parts, &count, static_cast<size_t>(put));
  }
  counters_[member].writes.add(1);
  counters_[member].writeBytes.add(vector.length);
  return true;
}

bool MemberIo::write(const Segments& segments, IoError* error) {
  if (segments.size() == 1) return writeOne(segments[0], error);
  bool ok = true;
  gather(segments, [&](uint32_t member, Vector& vector) {
    ok = writeVector(member, vector, error);
    return ok;
  });
  return ok;
}

}  // namespace nbd
